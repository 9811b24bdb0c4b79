"""Pictures and page of the gates between a scan and the sentences of its report; see ``tools/explain.py``."""
