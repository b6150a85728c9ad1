"""Datasets, token stores, and batches as a function of the step."""
