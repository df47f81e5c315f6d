"""Does a bundle compute what the eager model computes? The oracle, the artefacts, the gates, and the report."""
