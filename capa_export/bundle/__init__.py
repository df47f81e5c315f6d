"""The bundle: a folder of results that knows what made them and whether they are still the same."""
