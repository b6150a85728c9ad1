"""Checks that every component must pass: `rustgpt check` and a pytest plugin.

A model component is checked as part of a small model that uses it, so a check of the model is a function of a
ModelConfig and works for mixers, feed-forwards, norms, position encodings and whole families alike.
"""
