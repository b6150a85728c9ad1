"""Memory and time estimates from compiled programs."""
