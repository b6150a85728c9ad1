"""Attention kernels: ways to compute the same softmax attention, each the fastest or leanest somewhere.

A kernel is a function of a `Task` that gives mixed_BTKGC, and one that says in words why it cannot serve a `Request`.
All compute what `plain` does, up to rounding, and `plain` alone serves every request. It alone has all scores in memory
at once, so taps find them (the site `scores`) where it is used; what is cached is always read by it.
"""
