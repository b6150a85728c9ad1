"""Import and export of models: Hugging Face folders, GGUF files, and warm starts from other runs.

No pickles are read and no code of a model is run. Tensors are read and written one at a time.
"""
