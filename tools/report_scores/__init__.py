"""Parts of ``tools/score_reports.py``."""
