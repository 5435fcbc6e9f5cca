"""A user's unmodified training script as inputs of a trace: run up to its first steps, on fake parameters."""
