"""Techniques that spread one model over several ranks."""
