"""Simulated alignments: the Potts sampler against exact probabilities, the counted potential, the clusters of
rows, and the alignments that come with memfit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from memfit.jobs.builtin import alphafold2
from memfit.jobs.builtin.alphafold.coevolution import contact_map, contact_potential, sample_alignment
from memfit.jobs.builtin.alphafold.model import beta_of


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
    assert folds.alignment_of is not None
    assert folds.potential is not None
    touching: list[float] = []
    others: list[float] = []
    for chain in range(20):
        span = slice(folds.offset[chain], folds.offset[chain + 1])
        one_hot = np.eye(20)[folds.alignment_of(chain)].transpose(1, 2, 0)  # (n, 20, 128)
        centred = one_hot - one_hot.mean(-1, keepdims=True)
        weighted = np.einsum("ab,jbk->jak", folds.potential, centred)
        covariance = np.einsum("iak,jak->ij", centred, weighted) / 128
        contacts = contact_map(folds.atoms[span])
        first, second = np.triu_indices(len(contacts), 12)
        touching += covariance[first, second][contacts[first, second]].tolist()
        others += covariance[first, second][~contacts[first, second]].tolist()
    assert np.mean(touching) > 0.05
    assert np.mean(others) < np.mean(touching) / 2  # chains of contacts couple other pairs, too


# SHA-256 of the file's array (residues, 128) in which version 0.1 stored the alignments.
_STORED = "b9ce7c287882881de1050563de2a70e9ee0495ebf0ba2fff99b3c4989270be69"
# Of the part of it that belongs to chains 1 (with letters that rounding decides) and 1000.
_OF_TWO_CHAINS = "e1b764a7edb88c23eb4aaaa8af2c7e71f17ad2d929b6d1f8f9bdea5f87f8bd56"


def test_alignments_are_those_that_earlier_versions_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path)
    assert _digest([1, 1000]) == _OF_TWO_CHAINS
    assert len(list(tmp_path.rglob("*.u8"))) == 2
    monkeypatch.setattr(alphafold2, "simulated_alignment", None)
    assert _digest([1, 1000]) == _OF_TWO_CHAINS, "from the cache"


@pytest.mark.long
def test_all_alignments_are_those_that_earlier_versions_stored() -> None:
    assert _digest(range(1120)) == _STORED


def test_alignments_are_sampled_where_none_can_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "file")
    assert _digest([1, 1000]) == _OF_TWO_CHAINS


def _digest(chains: Iterable[int]) -> str:
    folds = alphafold2.built_in_folds()
    assert folds.alignment_of is not None
    rows = [folds.alignment_of(chain).T for chain in chains]
    return hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()


def test_chains_are_in_contact_where_the_model_places_their_cb_atoms_close() -> None:
    folds = alphafold2.built_in_folds()
    for chain in range(0, folds.count, 100):
        atoms = folds.atoms[folds.offset[chain] : folds.offset[chain + 1]]
        beta = beta_of(torch.from_numpy(atoms))
        assert (contact_map(atoms) == (torch.cdist(beta, beta) < 8).numpy()).all()
