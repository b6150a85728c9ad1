"""A functional JAX framework for research on decoder-only language models: a run is a pure function of its config."""
