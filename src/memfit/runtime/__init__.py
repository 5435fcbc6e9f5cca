"""Child processes, this machine, memory caps, meters and probes of single operators."""
