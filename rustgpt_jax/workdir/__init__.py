"""What a run folder holds: its records, its code snapshot, and its environment."""
