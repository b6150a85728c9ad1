"""Models in the formats of others: Hugging Face folders in and out, and one safetensors file of our own parameters.

Nothing here reads a pickle or runs code that came with a model. Tensors are read and written one at a time.
"""
