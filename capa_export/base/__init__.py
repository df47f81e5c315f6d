"""Errors, files, settings, progress and processes: modules that every other package imports."""
