"""A browsable picture book of a data set: studies, slices, charts and pages; see ``tools/visualize_datasets.py``."""
