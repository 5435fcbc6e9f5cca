"""Techniques that compute activations again in the backward pass."""
