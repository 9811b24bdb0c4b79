"""Look for everything that is wrong with packed files or with a download, and say how to mend it."""
