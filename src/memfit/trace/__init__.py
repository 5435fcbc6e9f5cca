"""Run one training step on fake tensors and record the lifetime of every storage."""
