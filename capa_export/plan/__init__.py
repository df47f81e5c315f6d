"""The costs of a build and of its engines, known before anything is run."""
