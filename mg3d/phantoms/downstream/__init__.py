"""Drawn data sets of the downstream benchmarks, each in its true published layout; one file a benchmark."""
