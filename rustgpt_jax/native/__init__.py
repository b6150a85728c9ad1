"""Code in C++ that is compiled where it runs, for what XLA does not do fast. Nothing needs it."""
