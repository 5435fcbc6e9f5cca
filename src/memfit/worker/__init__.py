"""The child process: reads a RunSpec, trains for real, tells what it measured as JSON lines."""
