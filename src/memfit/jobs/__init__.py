"""What is trained: the built-in science jobs, the user's own, and the one training step."""
