"""Label maps on disk: reading them without changing them, matching folders, and tables of scores."""
