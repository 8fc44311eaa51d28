"""Who watches a run: the terminal, and experiment trackers."""
