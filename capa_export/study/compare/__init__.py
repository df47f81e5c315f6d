"""Compares two bundles, and says whether what changed may."""
