"""Searching a table of embeddings; see ``tools/retrieve.py``."""
