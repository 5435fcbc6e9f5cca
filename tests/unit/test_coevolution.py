"""Simulated alignments: the Potts sampler against exact probabilities, the counted potential, the clusters of
rows, and the alignments that come with memfit."""

from __future__ import annotations

import numpy as np
import pytest

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.coevolution import contact_map, contact_potential, sample_alignment


def test_sampled_pairs_have_the_probabilities_of_the_potts_model() -> None:
    rng = np.random.default_rng(0)
    profile = rng.dirichlet(np.full(20, 0.5), 4).astype(np.float32)
    potential = rng.normal(0, 1, (20, 20))
    potential = (potential + potential.T) / 2
    contacts = np.zeros((4, 4), bool)
    contacts[0, 3] = contacts[0, 1] = True  # the second pair is too close along the chain to be coupled
    rows = sample_alignment(
        profile, contacts, potential, rng, rows=60_000, strength=1.5, spread=0.0, sweeps=8
    )
    first, last = profile[0].astype(float), profile[3].astype(float)
    coupling = 1.5 * (potential - (potential @ last)[:, None] - (first @ potential)[None])
    wanted = (first[:, None] + 1e-4) * (last[None] + 1e-4) * np.exp(coupling)
    wanted /= wanted.sum()
    pairs = np.zeros((20, 20))
    np.add.at(pairs, (rows[:, 0], rows[:, 3]), 1 / len(rows))
    assert np.abs(pairs - wanted).max() < 0.006
    assert np.abs(pairs - np.outer(first, last)).max() > 0.02
    independent = np.zeros((20, 20))
    np.add.at(independent, (rows[:, 0], rows[:, 1]), 1 / len(rows))
    assert np.abs(independent - np.outer(pairs.sum(1), profile[1])).max() < 0.006


def test_the_potential_is_the_log_ratio_of_pairs_in_contact_to_all_pairs() -> None:
    residue = np.array([0, 20, 20, 20, 20, 20, 1, 2])
    atoms = np.zeros((8, 3, 3), np.float32)
    atoms[:, 0, 0], atoms[:, 2, 1] = -1.4, 1.5
    atoms[7] += 30  # pairs at least 6 apart and known: (0, 6), which touches, and (0, 7), which does not
    found = contact_potential([(residue, atoms)])
    touching, every = np.full((20, 20), 2.0), np.full((20, 20), 2.0)
    touching[0, 1] = touching[1, 0] = every[0, 1] = every[1, 0] = every[0, 2] = every[2, 0] = 3
    assert found == pytest.approx(np.log(touching / touching.sum() * every.sum() / every))


def test_a_row_joins_the_cluster_of_the_row_with_which_it_agrees_most_outside_hidden_places() -> None:
    eye = np.eye(23, dtype=np.float32)
    rows = np.array([[[0, 0, 0, 22, 5], [1, 1, 1, 1, 6]]])
    extra = np.array([[[0, 0, 1, 22, 6], [1, 1, 1, 0, 5], [1, 1, 0, 0, 5]]])
    mask = np.array([[1, 1, 1, 1, 0]], np.float32)
    found = alphafold2._cluster_profiles(eye[rows], eye[extra], mask)[0]
    assert found[0, :4] == pytest.approx((eye[rows[0, 0]] + eye[extra[0, 0]])[:4] / 2)
    assert found[1, :4] == pytest.approx((eye[rows[0, 1]] + eye[extra[0, 1]] + eye[extra[0, 2]])[:4] / 3)


def test_columns_of_the_alignments_covary_where_residues_are_in_contact() -> None:
    folds = alphafold2.built_in_folds()
    assert folds.alignment is not None
    assert folds.potential is not None
    assert folds.alignment.shape == (len(folds.residue), 128)
    touching: list[float] = []
    others: list[float] = []
    for chain in range(20):
        span = slice(folds.offset[chain], folds.offset[chain + 1])
        one_hot = np.eye(20)[folds.alignment[span]].transpose(0, 2, 1)  # (n, 20, 128)
        centred = one_hot - one_hot.mean(-1, keepdims=True)
        weighted = np.einsum("ab,jbk->jak", folds.potential, centred)
        covariance = np.einsum("iak,jak->ij", centred, weighted) / 128
        contacts = contact_map(folds.atoms[span])
        first, second = np.triu_indices(len(contacts), 12)
        touching += covariance[first, second][contacts[first, second]].tolist()
        others += covariance[first, second][~contacts[first, second]].tolist()
    assert np.mean(touching) > 0.05
    assert np.mean(others) < np.mean(touching) / 2  # chains of contacts couple other pairs, too


def test_the_alignments_that_come_with_memfit_are_those_of_the_script() -> None:
    folds = alphafold2.built_in_folds()
    assert folds.alignment is not None
    assert folds.potential is not None
    span = slice(folds.offset[0], folds.offset[1])
    rows = sample_alignment(
        folds.profile[span],
        contact_map(folds.atoms[span]),
        folds.potential,
        np.random.default_rng((0, 0)),
        rows=128,
        strength=4.0,
    )
    assert (folds.alignment[span] == rows.T).mean() > 0.9  # another library may round otherwise
