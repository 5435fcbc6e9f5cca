"""Techniques that distribute one model over several ranks."""
