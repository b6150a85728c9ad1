"""What a run did, done again: one of its steps with the same bits, looked into, and tried with other numbers."""
