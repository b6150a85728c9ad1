"""Decoding: samplers, text generation, and chat."""
