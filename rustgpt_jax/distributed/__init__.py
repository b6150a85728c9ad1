"""Several processes: start, barriers, and failures."""
