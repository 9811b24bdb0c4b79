"""Train, score and use the classifier that reads findings from reports (spec downstream 7.11)."""
