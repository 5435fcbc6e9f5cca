"""``protein-ss``: three-state secondary structure of real PDB chains, an ESM-2-style encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import (
    Array,
    as_tensors,
    equal_parts,
    evaluating,
    open_arrays,
    step_rng,
    to_device,
    token_loss,
)
from memfit.jobs.builtin.chains import ConcatenatedChains
from memfit.jobs.builtin.fasta import RESIDUES, STATES, read_labelled
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.esm import EsmSize

NAME: Final = "protein-ss"
TITLE: Final = "Secondary structure of proteins (ESM-2-style encoder)"
SIZES: Final = ("tiny", "8M", "35M", "150M", "650M", "3B", "15B", "paper")
DATA_SOURCE: Final = (
    "2,500 PDB chains split by 30 % identity clusters "
    "(wwPDB, CC0; profiles and DSSP from ProMod3, Apache-2.0)"
)
_DIMENSIONS: Final = {"layers": "layers", "hidden": "width"}
_NO_LABEL: Final = -100
_BATCH_SIZES: Final = {"tiny": 24, "8M": 32, "35M": 32, "150M": 32}  # of the sizes for chains of 128 residues


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chains(ConcatenatedChains):
    """Chains of proteins, one after another, with ``residues`` residues in all. ``features`` (residues, 41)
    uint8, where 255 stands for 1: 21 of the one-hot residue and 20 of the profile. ``state`` (residues,): 0
    helix, 1 strand, 2 coil. ``source``: where they come from. The first ``train_count`` chains are for
    training."""

    features: Array
    state: Array
    source: str


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "8M", "35M", "150M", "650M", "3B", "15B", "paper"), by default
    on the built-in chains.

    ``data``: a file, which may be gzipped (``.gz``), of records of three lines: ``>name``, sequence, and
    states H, E, C (helix, strand, coil), one per residue. ``weights``: those of an ESM-2, which may lack
    parameters of the input projection and of the head. ``batch``: chains of a step. ``length``: residues to
    which chains are padded or cropped. Raises UserError as `user_chains` does, and for a dimension that is
    unknown or no multiple of twice the number of heads ("hidden").
    """
    shape = options.resize(_shape(options.size), _DIMENSIONS)
    chains = user_chains(options.data) if options.data else built_in_chains()
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: options.load_into(_build(shape), may_miss=("embed.", "head.")),
        make_batch=lambda step, seed: train_batch(
            chains, shape.length, shape.batch_size, step=step, seed=seed
        ),
        loss=loss,
        loss_terms=lambda part: int(part["valid"].sum()),
        evaluate=lambda model: scores(model, chains, shape.length, shape.batch_size),
        metric=(q3 := metric(chains, shape.length)),
        surrogates=(dataclasses.replace(q3, name="expected Q3"),),
        optimizer=OptimizerChoice(learning_rate=5e-4 if options.label == "tiny" else 1e-4),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"hidden": 2 * shape.heads}),
        tokens_per_batch=shape.batch_size * shape.length,
        length_unit="residues",
        blocks="esm.encoder.layer",
        head="head",
        data_source=chains.source,
    )


def _shape(size: str) -> EsmSize:
    """Return the shape of the network for ``size``. "tiny" to "150M" have 128 residues, as many as the
    longest built-in chain. The larger ones, which are for planning, have 1,024, ESM-2's training length."""
    from memfit.jobs.builtin.esm import ESM_SIZES

    shape = ESM_SIZES[size]
    if size not in _BATCH_SIZES:
        return shape
    return dataclasses.replace(shape, length=128, batch_size=_BATCH_SIZES[size])


def _build(shape: EsmSize) -> torch.nn.Module:
    from memfit.jobs.builtin.esm import SecondaryStructure

    return SecondaryStructure(shape)


def built_in_chains() -> Chains:
    """Return the 2,500 chains of the PDB that come with memfit."""
    with open_arrays("pdb_ss") as archive:
        one_hot = _one_hot(archive["residue"])
        return Chains(
            offset=np.concatenate([[0], np.cumsum(archive["length"])]),
            features=np.concatenate([one_hot, archive["profile"]], axis=1),
            state=archive["state"].astype(np.int64),
            train_count=int(archive["n_train"]),
            source=DATA_SOURCE,
        )


def user_chains(path: str) -> Chains:
    """Return the chains of the user's file, as `read_labelled` reads it. The last fifth of them, rounded down
    but at least one, is for testing.

    The one-hot residue takes the place of the profile. Raises UserError for fewer than two chains, and as
    `read_labelled` does.
    """
    proteins = read_labelled(path)
    if len(proteins) < 2:
        raise UserError(
            f"{path} contains only {len(proteins)} chain",
            allowed="at least 2 chains: one for training and one for testing",
        )
    residue = np.array([max(RESIDUES.find(r), -1) % 21 for p in proteins for r in p.sequence], np.uint8)
    one_hot = _one_hot(residue)
    return Chains(
        offset=np.concatenate([[0], np.cumsum([len(p.sequence) for p in proteins])]),
        features=np.concatenate([one_hot, one_hot[:, :20]], axis=1),
        state=np.array([STATES.index(s) for p in proteins for s in p.states], np.int64),
        train_count=len(proteins) - max(1, len(proteins) // 5),
        source=f"{path}: {len(proteins)} chains, the last fifth for testing (similarity unchecked)",
    )


def _one_hot(residue: Array) -> Array:
    """Return the one-hot of the residue numbers 0 to 20, uint8 (residues, 21), with 255 in place of 1."""
    return np.where(residue[:, None] == np.arange(21), np.uint8(255), np.uint8(0))


def train_batch(
    chains: Chains, length: int, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch of ``batch_size`` chains. Chains longer than ``length`` are cropped at a random
    position, shorter ones are padded.

    ``features`` (batch, length, 41) float32, ``state`` (batch, length) int64, -100 at padding, ``valid``
    (batch, length) bool.
    """
    indices, skipped = chains.draw_crops(length, batch_size, step_rng(step, seed), step=step, seed=seed)
    return _pack(chains, indices, skipped, length)


def _pack(chains: Chains, indices: Array, skipped: Array, length: int) -> dict[str, torch.Tensor]:
    features = np.zeros((len(indices), length, chains.features.shape[1]), np.float32)
    state = np.full((len(indices), length), _NO_LABEL, np.int64)
    for row, (span, residues) in enumerate(chains.spans(indices, skipped, length)):
        features[row, span] = chains.features[residues] / np.float32(255)
        state[row, span] = chains.state[residues]
    return as_tensors({"features": features, "state": state, "valid": state != _NO_LABEL})


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean cross-entropy in nats over all residues of the batch, without padding."""
    return token_loss(model(batch["features"], batch["valid"]), batch["state"])


def scores(model: torch.nn.Module, chains: Chains, length: int, batch_size: int) -> dict[str, float]:
    """Return "Q3", the percentage of residues of the test chains whose state is predicted correctly, and
    "expected Q3", the mean probability of the correct state in percent. Only the first ``length`` residues of
    a chain count. At most ``batch_size`` chains, and at most 8, are evaluated at once."""
    correct = probability = total = 0.0
    test = np.arange(chains.train_count, chains.count)
    with evaluating(model) as device:
        for indices in equal_parts(test, batch_size):
            batch = to_device(_pack(chains, indices, np.zeros_like(indices), length), device)
            shares = model(batch["features"], batch["valid"]).float().softmax(-1)[batch["valid"]]
            states = batch["state"][batch["valid"]]
            correct += float((shares.argmax(-1) == states).sum())
            probability += float(shares.gather(-1, states[:, None]).sum())
            total += len(states)
    return {"Q3": 100 * correct / total, "expected Q3": 100 * probability / total}


def metric(chains: Chains, length: int) -> Metric:
    """Return the metric, Q3 (the percentage of residues with the correct state, of the first ``length`` of
    each test chain); higher is better. Its naive result predicts the most common state of the training chains
    everywhere."""
    boundary = chains.offset[chains.train_count]
    commonest = np.bincount(chains.state[:boundary], minlength=3).argmax()
    starts, stops = chains.offset[chains.train_count : -1], chains.offset[chains.train_count + 1 :]
    test_states = np.concatenate(
        [chains.state[a : min(b, a + length)] for a, b in zip(starts, stops, strict=True)]
    )
    return Metric(
        name="Q3",
        unit="percentage points",
        higher_is_better=True,
        margin=2.0,
        margin_source=(
            "the labels themselves bound Q3 at about 88 % and methods of the last decade lie within 81-86 % "
            "(Ho et al. 2021, doi:10.3390/biom11111627); treating single-residue bridges otherwise moves Q3 "
            "by at least 1 point (Cuff & Barton 2000); the field called 4 points a substantial advance "
            "(Rost & Eyrich 2001, Proteins 45 S5:192): half of that is no difference"
        ),
        naive=100 * float((test_states == commonest).mean()),
        naive_name=f"always the commonest training state ({('helix', 'strand', 'coil')[commonest]})",
    )
