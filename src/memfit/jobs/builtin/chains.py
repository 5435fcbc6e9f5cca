"""Chains of proteins as the jobs on chains of the PDB keep them, one after another in arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from memfit.jobs.builtin.batches import Array, epoch_indices


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConcatenatedChains:
    """Chains whose residues lie one after another in arrays. Chain i has the residues ``offset[i]`` to
    ``offset[i + 1]`` (excluded); ``offset`` has shape (chains + 1,). The first ``train_count`` chains are for
    training, the others for testing."""

    offset: Array
    train_count: int

    @property
    def count(self) -> int:
        return len(self.offset) - 1

    def draw_crops(
        self, length: int, batch_size: int, rng: np.random.Generator, *, step: int, seed: int
    ) -> tuple[Array, Array]:
        """Return two arrays (batch_size,): the indices of the training chains of a step, and how many
        residues to skip at the start of each. For a chain longer than ``length`` the latter is drawn with
        ``rng`` so that a part of ``length`` residues at a random position remains; for others it is 0."""
        chains = epoch_indices(self.train_count, batch_size, step=step, seed=seed)
        excess = np.maximum(self.offset[chains + 1] - self.offset[chains] - length, 0)
        return chains, rng.integers(0, excess + 1)

    def spans(self, chains: Array, skipped: Array, length: int) -> Iterator[tuple[slice, slice]]:
        """Yield for each of ``chains``, without its first ``skipped`` residues (one number per chain) and cut
        to ``length``, two slices: its place in a row of a padded batch, from 0, and its place in the arrays
        of all residues."""
        for chain, skip in zip(chains, skipped, strict=True):
            start = self.offset[chain] + skip
            stop = min(self.offset[chain + 1], start + length)
            yield slice(stop - start), slice(start, stop)
