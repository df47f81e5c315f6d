"""What users decide: recipes, schedules of pruning, targets and gates."""
