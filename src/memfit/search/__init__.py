"""Stage 3: which plan. Knows techniques by their table and plans by their estimates, nothing else."""
