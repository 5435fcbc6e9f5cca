"""Child processes, this machine, memory caps, meters, checkpoints' layout, and benchmarks of operators."""
