"""Techniques that distribute the training of one model over several ranks."""
