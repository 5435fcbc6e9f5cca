"""Simulated alignments whose columns evolve together where residues are in contact.

A Potts model gives a sequence the energy of its fields and of its couplings. The fields are real (the
family's profile), the couplings lie on the real contacts of the chain, and every contact favours the same
pairs of amino acids, by a potential that is counted in real structures. No row of these alignments is a real
sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import threadpoolctl

Array = np.ndarray[Any, Any]

CONTACT_ANGSTROM: Final = 8.0  # between CB atoms
_COUPLED_APART: Final = 3  # least separation along the chain of a coupled pair
_COUNTED_APART: Final = 6  # least separation of the pairs that the potential is counted from


def contact_map(atoms: Array) -> Array:
    """Return, as bool (n, n), which residues of the backbone ``atoms`` (n, 3 of N CA C, 3) in Angstrom are in
    contact: CB atoms under 8 Angstrom apart. CB is placed by the ideal tetrahedron, as `model.beta_of`
    does."""
    n, ca, c = (atoms[:, atom] for atom in range(3))
    b, d = ca - n, c - ca
    normal = b[:, [1, 2, 0]] * d[:, [2, 0, 1]] - b[:, [2, 0, 1]] * d[:, [1, 2, 0]]
    beta = -0.58273431 * normal + 0.56802827 * b - 0.54067466 * d + ca
    return np.asarray(((beta[:, None] - beta[None]) ** 2).sum(-1) < CONTACT_ANGSTROM**2)


def contact_potential(chains: Iterable[tuple[Array, Array]]) -> Array:
    """Return the logarithm, float (20, 20), of how much more often two amino acids are in contact than by
    chance. ``chains``: pairs of (residue numbers (n,), atoms (n, 3, 3) in Angstrom). Pairs at least 6
    residues apart along the chain are counted, except those with a residue number of 20 or more. All counts
    start at one."""
    touching, all_pairs = np.ones((20, 20)), np.ones((20, 20))
    for residue, atoms in chains:
        first, second = np.triu_indices(len(residue), _COUNTED_APART)
        known = (residue[first] < 20) & (residue[second] < 20)
        first, second = first[known], second[known]
        np.add.at(all_pairs, (residue[first], residue[second]), 1)
        touches = contact_map(atoms)[first, second]
        np.add.at(touching, (residue[first[touches]], residue[second[touches]]), 1)
    touching, all_pairs = touching + touching.T, all_pairs + all_pairs.T
    return np.asarray(np.log((touching / touching.sum()) / (all_pairs / all_pairs.sum())))


def sample_alignment(
    profile: Array,
    contacts: Array,
    potential: Array,
    rng: np.random.Generator,
    *,
    rows: int,
    strength: float,
    spread: float = 0.5,
    sweeps: int = 30,
) -> Array:
    """Return ``rows`` sequences, residue numbers 0 to 19, uint8 (rows, n), drawn from a Potts model by Gibbs
    sampling: ``sweeps`` passes over all columns, all rows at once, from rows drawn column by column.

    ``profile`` (n, 20): shares of the amino acids in each column. ``contacts`` (n, n) bool: which columns are
    coupled, if at least 3 apart. The coupling of two columns is ``potential`` (20, 20) times ``strength``
    times a number drawn from a lognormal distribution of the width ``spread``, less its means under the two
    profiles, so that columns keep about their profile. It is computed in float64, so that rounding, which
    differs between machines, decides no letter.
    """
    profile, potential, length = profile.astype(float), potential.astype(float), len(profile)
    scale = np.triu(contacts, _COUPLED_APART) * rng.lognormal(0.0, spread, (length, length)) * strength
    weight = scale + scale.T
    fields = np.log(profile + 1e-4) - weight @ (profile @ potential)
    letters = np.stack([rng.choice(20, rows, p=p / p.sum()) for p in profile])
    groups = [(columns, weight[columns]) for columns in _uncoupled_groups(weight > 0)]
    # The products are small: several threads would spend their time waiting for each other.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        _sweep(letters, groups, fields, potential, rng, sweeps)
    return letters.T.astype(np.uint8)


def _sweep(
    letters: Array,
    groups: Sequence[tuple[Array, Array]],
    fields: Array,
    potential: Array,
    rng: np.random.Generator,
    sweeps: int,
) -> None:
    """Draw all ``letters`` (n, rows) anew ``sweeps`` times, one group of columns after the other. Each of
    ``groups`` has its columns, and the weights of their couplings to all columns. No energy may be so high
    that its exponential is infinite."""
    couplings, (length, rows) = potential[letters], letters.shape  # couplings: (n, rows, 20)
    # Arrays that are made anew in each pass would cost more time, in page faults, than the arithmetic.
    energies, cumulative = np.empty_like(couplings), np.empty_like(couplings)
    smaller, numbers = np.empty(couplings.shape, bool), np.empty((length, rows, 1), np.float32)
    up_to = np.triu(np.ones((20, 20)))
    for _ in range(sweeps):
        for columns, weights in groups:
            count = len(columns)
            energy, below = energies[:count], smaller[:count]
            np.matmul(weights, couplings.reshape(length, -1), out=energy.reshape(count, -1))
            energy += fields[columns][:, None]
            likely = np.exp(energy, out=energy).reshape(-1, 20)
            np.matmul(likely, up_to, out=cumulative[:count].reshape(-1, 20))  # np.cumsum takes longer
            drawn = rng.random(dtype=np.float32, out=numbers[:count])
            np.less(cumulative[:count], drawn * cumulative[:count, :, -1:], out=below)
            letters[columns] = below.sum(-1)
            couplings[columns] = np.take(potential, letters[columns], axis=0, out=energy, mode="clip")


def _uncoupled_groups(coupled: Array) -> list[Array]:
    """Return the columns in groups without a coupled pair, those with most couplings first."""
    group = np.full(len(coupled), -1)
    for column in np.argsort(-coupled.sum(1), kind="stable"):
        taken = set(group[coupled[column]].tolist())
        group[column] = next(g for g in range(len(coupled) + 1) if g not in taken)
    return [np.flatnonzero(group == g) for g in range(group.max() + 1)]
