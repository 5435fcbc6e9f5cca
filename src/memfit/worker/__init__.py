"""The child process: it reads a RunSpec and trains the job, or measures single operators, and reports
measurements as JSON lines."""
