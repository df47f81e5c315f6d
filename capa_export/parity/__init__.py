"""Checks that a bundle computes what the eager model computes: the oracle, the artefacts, the gates, the report."""
