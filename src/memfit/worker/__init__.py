"""The child process: it reads a RunSpec, trains the job, and reports measurements as JSON lines."""
