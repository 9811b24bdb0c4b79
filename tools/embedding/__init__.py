"""Scans and packed rows to a table of features: sources, the run, the table's files."""
