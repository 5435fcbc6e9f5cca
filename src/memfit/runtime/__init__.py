"""Child processes, this machine, memory caps, meters, and benchmarks of single operators."""
