"""Start one training run as a child process, watch it, turn any ending into a Measurement."""
