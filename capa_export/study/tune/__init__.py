"""Finds the schedule of selectors, layers and ratios that agrees best with the dense model within a budget."""
