"""Files and options that somebody chose to do harm with, and what a command makes of each."""
