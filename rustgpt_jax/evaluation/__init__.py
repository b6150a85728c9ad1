"""Loss, perplexity, and exact-match accuracy."""
