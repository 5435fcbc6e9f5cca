"""Chains of proteins as the jobs on chains of the PDB keep them, one after another in arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from memfit.jobs.builtin.batches import Array, epoch_indices


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConcatenatedChains:
    """Chains, concatenated; the first ``train_count`` are for training. ``offset`` (chains + 1,): where each
    chain starts, and the end."""

    offset: Array
    train_count: int

    @property
    def count(self) -> int:
        return len(self.offset) - 1

    def draw_crops(
        self, length: int, batch_size: int, rng: np.random.Generator, *, step: int, seed: int
    ) -> tuple[Array, Array]:
        """Return (the indices of the training chains of a step; how many residues to skip at the start of
        each, so that chains longer than ``length`` are cropped at a random position)."""
        chains = epoch_indices(self.train_count, batch_size, step=step, seed=seed)
        excess = np.maximum(self.offset[chains + 1] - self.offset[chains] - length, 0)
        return chains, rng.integers(0, excess + 1)

    def spans(self, chains: Array, skipped: Array, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield for each of ``chains``, without its first ``skipped`` residues and cut to ``length``: (its
        place in a row of a padded batch, its place in the arrays over residues)."""
        for chain, skip in zip(chains, skipped, strict=True):
            start = self.offset[chain] + skip
            stop = min(self.offset[chain + 1], start + length)
            yield slice(stop - start), slice(start, stop)
