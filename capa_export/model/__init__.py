"""The model as it was published: its files, its prompts, and its eager execution."""
