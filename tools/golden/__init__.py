"""Parity of the shipped modules with recorded reference tensors: the engine behind ``tools/check_golden.py``."""
