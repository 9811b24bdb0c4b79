"""Which corpora, which split, which order: the Lightning side of the data."""
