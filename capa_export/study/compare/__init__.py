"""What changed from one bundle to the next, and whether it may."""
