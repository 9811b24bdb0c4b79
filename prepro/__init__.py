"""Scripts a user runs: raw scans and reports in a dataset's published layout become Arrow files."""
