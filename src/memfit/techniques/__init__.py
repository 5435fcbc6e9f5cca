"""One module per technique, all with the same structure. registry.py lists which can be combined."""
