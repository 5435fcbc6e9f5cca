"""memfit fits the training of large models into the memory you have."""

__version__ = "0.1.0"
