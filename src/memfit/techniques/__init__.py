"""One file a technique, all the same shape; registry.py is the table of what goes with what."""
