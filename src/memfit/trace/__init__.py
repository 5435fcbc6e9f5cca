"""Stage 1: the one training step on fake tensors, seen by a ledger of storages."""
