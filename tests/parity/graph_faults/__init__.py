"""Faults of the graphs: each changes a healthy one by a size and returns the first node that is then wrong."""
