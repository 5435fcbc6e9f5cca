"""What contacts can be read from the alignments of the job ``alphafold2`` without a network.

Every method gives each pair of residues of a held-out chain a score, from the same crops and the same
simulated alignments that the network sees. Only ``oracle of the simulation`` knows how the alignments were
made: it weighs the covariance of two columns with the potential of the couplings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from memfit.jobs.builtin.alphafold.coevolution import contact_map
from memfit.jobs.builtin.alphafold2 import APART, TESTED, Folds

Array = np.ndarray[Any, Any]

RANDOM, SEPARATION, PAIR_COUNTS = (
    "random pairs",
    "separation alone",
    "pair counts with profiles and separation",
)
MEAN_FIELD, ORACLE, PERFECT = "mean-field coupling analysis", "oracle of the simulation", "true contacts"
METHODS = (RANDOM, SEPARATION, PAIR_COUNTS, MEAN_FIELD, ORACLE, PERFECT)


def precisions(folds: Folds, residues: int) -> Mapping[str, float]:
    """Percentages: of the L/2 best-scored pairs at least 12 apart, how many are in contact, by method."""
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    prior = _log_prior(folds, residues)
    for chain in range(folds.train_count, folds.count)[:TESTED]:
        span = slice(folds.offset[chain], min(folds.offset[chain + 1], folds.offset[chain] + residues))
        contacts = contact_map(folds.atoms[span])
        first, second = np.triu_indices(len(contacts), APART)
        if len(first):
            best_count = max(1, len(contacts) // 2)
            for method, scores in _scores(folds, span, contacts, prior, chain):
                best = np.argsort(-scores[first, second], kind="stable")[:best_count]
                found[method].append(float(contacts[first[best], second[best]].mean()))
    return {method: 100 * float(np.mean(each)) for method, each in found.items()}


def _log_prior(folds: Folds, residues: int) -> Array:
    contacts, totals = np.zeros(residues), np.zeros(residues)
    for chain in range(folds.train_count):
        start = folds.offset[chain]
        touching = contact_map(folds.atoms[start : min(folds.offset[chain + 1], start + residues)])
        for gap in range(APART, len(touching)):
            contacts[gap] += touching.diagonal(gap).sum()
            totals[gap] += len(touching) - gap
    return np.asarray(np.log(contacts / np.maximum(totals, 1) + 1e-4))


def _scores(
    folds: Folds, span: slice, contacts: Array, prior: Array, chain: int
) -> Iterator[tuple[str, Array]]:
    assert folds.alignment_of is not None
    assert folds.potential is not None
    length, profile = len(contacts), folds.profile[span]
    separation = prior[np.abs(np.subtract.outer(np.arange(length), np.arange(length)))]
    yield RANDOM, np.random.default_rng(chain).random((length, length))
    yield SEPARATION, separation
    yield PAIR_COUNTS, separation + profile @ folds.potential @ profile.T
    rows = np.eye(20)[folds.alignment_of(chain)[:, :length]]  # (sequences, n, 20)
    yield MEAN_FIELD, mean_field(rows)
    centred = rows - rows.mean(0)
    yield ORACLE, np.einsum("sia,ab,sjb->ij", centred, folds.potential, centred, optimize=True)
    yield PERFECT, contacts.astype(float)


def mean_field(rows: Array, pseudo_count: float = 0.5) -> Array:
    """Coupling analysis by the inverse of the covariance (Morcos et al. 2011), from one-hot ``rows``
    (sequences, n, 20): norms of the couplings in the gauge of zero sums, less the average product (Dunn et
    al. 2008)."""
    count, length, letters = rows.shape
    states = letters - 1
    flat = rows[..., :states].reshape(count, -1)
    single = (1 - pseudo_count) * flat.mean(0) + pseudo_count / letters
    pairs = (1 - pseudo_count) * flat.T @ flat / count + pseudo_count / letters**2
    for column in range(length):
        own = slice(column * states, (column + 1) * states)
        pairs[own, own] = np.diag(single[own])
    couplings = np.zeros((length, length, letters, letters))
    inverse = np.linalg.inv(pairs - np.outer(single, single))
    couplings[..., :states, :states] = -inverse.reshape(length, states, length, states).swapaxes(1, 2)
    for axis in (2, 3):
        couplings -= couplings.mean(axis, keepdims=True)
    norms = np.sqrt((couplings**2).sum((2, 3)))
    np.fill_diagonal(norms, 0)
    means = norms.sum(0) / (length - 1)
    return np.asarray(norms - np.outer(means, means) / means.mean())
