"""Run training steps on fake tensors and record the lifetime of every storage and every operator call."""
