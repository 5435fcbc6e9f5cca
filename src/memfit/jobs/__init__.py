"""What is trained: the built-in science jobs, user-defined jobs, and the one training step."""
