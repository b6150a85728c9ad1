"""The model: Flax modules for its components, and pure functions for the whole.

Letters in the names of arrays, throughout the package:

    B batch    T query tokens    S key or cached tokens    D d_model    V vocabulary    N repeats of the block pattern
    H heads    K key/value heads    G query heads per key/value head    C channels of a head    F d_ff
"""
