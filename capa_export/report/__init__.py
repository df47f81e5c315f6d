"""Reports: what was measured, as pages, tables and machine-readable files."""
