"""Command-line tools around the framework."""
