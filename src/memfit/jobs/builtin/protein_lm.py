"""``protein-lm``: an ESM-2-style masked language model on real UniProt sequences."""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import (
    Array,
    as_tensors,
    epoch_indices,
    evaluating,
    full_parts,
    step_rng,
    to_device,
    token_loss,
)
from memfit.jobs.builtin.fasta import read_fasta
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.esm import EsmSize

NAME: Final = "protein-lm"
TITLE: Final = "Masked language model of proteins (ESM-2)"
SIZES: Final = ("tiny", "8M", "35M", "150M", "650M", "3B", "15B", "paper")
DATA_SOURCE: Final = "5,000 sequences drawn at random from UniProt (The UniProt Consortium, CC BY 4.0)"
# ESM-2's alphabet: four special tokens, then letters by number. It has no J, which is read as X.
_LETTERS: Final = "LAGVSERTIDPKQNFYMHWCXBUZO"
_START, _PAD, _END, _FIRST, _MASK = 0, 1, 2, 4, 32
_DIMENSIONS: Final = {"layers": "layers", "hidden": "width"}
_STANDARD: Final = 20  # number of letters that random replacements are drawn from
_MASKED_SHARE: Final = 0.15
_TEST_COUNT: Final = 128
_TEST_SEED: Final = 20_230_317


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Sequences for training and testing: an int64 array of token numbers for each, without start and end
    token. ``source``: where they come from."""

    train: tuple[Array, ...]
    test: tuple[Array, ...]
    source: str


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "8M", "35M", "150M", "650M", "3B", "15B", "paper"), by default
    on the built-in sequences.

    ``data``: a FASTA file, which may be gzipped (``.gz``). ``batch``: sequences of a step. ``length``: tokens
    to which sequences are padded or cropped, the start and the end token included. Raises UserError as
    `read_sequences` does, and for a dimension that is unknown or no multiple of twice the number of heads
    ("hidden").
    """
    shape = options.resize(_shape(options.size), _DIMENSIONS)
    sequences = read_sequences(options.data)
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(
            sequences, shape.length, shape.batch_size, step=step, seed=seed
        ),
        loss=masked_loss,
        loss_terms=lambda part: int((part["labels"] >= 0).sum()),
        evaluate=lambda model: held_out_nats(model, sequences, shape.length, shape.batch_size),
        metric=metric(sequences, shape.length),
        optimizer=OptimizerChoice(learning_rate=1e-3 if options.label == "tiny" else 4e-4, betas=(0.9, 0.98)),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"hidden": 2 * shape.heads}),
        tokens_per_batch=shape.batch_size * shape.length,
        length_unit="residues",
        blocks="esm.encoder.layer",
        head="lm_head.decoder",
        data_source=sequences.source,
    )


def _shape(size: str) -> EsmSize:
    from memfit.jobs.builtin.esm import ESM_SIZES

    return ESM_SIZES[size]


def _build(shape: EsmSize) -> torch.nn.Module:
    from memfit.jobs.builtin.esm import MaskedLanguageModel

    return MaskedLanguageModel(shape)


def read_sequences(path: str | None) -> Sequences:
    """Return the sequences of the user's FASTA file ``path``, or of the built-in one if None. The last tenth,
    but at least 1 and at most 128 sequences, is for testing. Raises UserError for fewer than two sequences,
    and as `read_fasta` does."""
    if path is None:
        resource = resources.files("memfit.jobs.builtin") / "data" / "uniprot_5000.fasta.gz"
        with resources.as_file(resource) as file:
            proteins = read_fasta(str(file))
    else:
        proteins = read_fasta(path)
    if len(proteins) < 2:
        raise UserError(
            f"{path} contains only {len(proteins)} sequence",
            allowed="at least 2 sequences: one for training and one for testing",
        )
    tokens = tuple(encode(p.sequence) for p in proteins)
    test_count = min(_TEST_COUNT, max(1, len(tokens) // 10))
    source = (
        DATA_SOURCE if path is None else f"{path}: {len(tokens)} sequences, the last {test_count} for testing"
    )
    return Sequences(train=tokens[:-test_count], test=tokens[-test_count:], source=source)


def encode(sequence: str) -> Array:
    """Return ESM-2's token numbers of the upper-case letters of ``sequence``, int64 (residues,). Letters that
    ESM-2's alphabet lacks, such as J, become X."""
    return _token_numbers()[np.frombuffer(sequence.encode("ascii"), np.uint8)]


@functools.cache
def _token_numbers() -> Array:
    """Return the token number for each ASCII code, int64 (128,); the number of X for characters that ESM-2's
    alphabet lacks."""
    table = np.full(128, _FIRST + _LETTERS.index("X"), np.int64)
    table[[ord(letter) for letter in _LETTERS]] = _FIRST + np.arange(len(_LETTERS))
    return table


def train_batch(
    sequences: Sequences, length: int, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch of ``batch_size`` sequences: ``tokens`` and ``labels`` (the true token where
    one is to be predicted, -100 elsewhere), both (batch, length) int64, and ``valid`` (batch, length) bool,
    False at padding."""
    indices = epoch_indices(len(sequences.train), batch_size, step=step, seed=seed)
    return as_tensors(_mask([sequences.train[i] for i in indices], length, step_rng(step, seed)))


def _mask(rows: list[Array], length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return the sequences ``rows`` with start and end token, padded to ``length`` or cropped to it at a
    random position, and masked as BERT does, with the keys of `train_batch`.

    Labels are 15 % of the residues of each sequence after cropping, at least one. Of these, each becomes the
    mask token with a probability of 80 %, a random standard residue with 10 %, and stays with 10 % (Devlin et
    al. 2019).
    """
    tokens = np.full((len(rows), length), _PAD, np.int64)
    labels = np.full_like(tokens, -100)
    for row, sequence in enumerate(rows):
        start = rng.integers(0, max(len(sequence) - (length - 2), 0) + 1)
        part = sequence[start : start + length - 2]
        positions = rng.choice(len(part), size=max(1, round(_MASKED_SHARE * len(part))), replace=False)
        tokens[row, : len(part) + 2] = [_START, *part, _END]
        labels[row, 1 + positions] = part[positions]
        random_values = rng.random(len(positions))
        random_residues = rng.integers(_FIRST, _FIRST + _STANDARD, size=len(positions))
        tokens[row, 1 + positions] = np.where(
            random_values < 0.8, _MASK, np.where(random_values < 0.9, random_residues, part[positions])
        )
    return {"tokens": tokens, "labels": labels, "valid": tokens != _PAD}


def masked_loss(model: torch.nn.Module, batch: Any, *, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy, in nats, of the residues with labels. ``reduction``: "mean" over these
    residues, or "sum"."""
    return token_loss(model(batch["tokens"], batch["valid"]), batch["labels"], reduction=reduction)


def _test_batches(sequences: Sequences, length: int, batch_size: int) -> list[dict[str, Array]]:
    """Return batches of the test sequences, padded or cropped to ``length`` tokens, of at most ``batch_size``
    and at most 8 sequences each. Crops and masks are the same every time and for every ``batch_size``."""
    arrays = _mask(list(sequences.test), length, np.random.default_rng(_TEST_SEED))
    parts = full_parts(np.arange(len(sequences.test)), batch_size)
    return [{name: array[part] for name, array in arrays.items()} for part in parts]


def held_out_nats(model: torch.nn.Module, sequences: Sequences, length: int, batch_size: int) -> float:
    """Return the mean cross-entropy, in nats, of the masked residues of all test sequences, padded or cropped
    to ``length`` tokens. At most ``batch_size`` sequences, and at most 8, are evaluated at once."""
    total, terms = 0.0, 0
    with evaluating(model) as device:
        for arrays in _test_batches(sequences, length, batch_size):
            batch = to_device(as_tensors(arrays), device)
            total += float(masked_loss(model, batch, reduction="sum"))
            terms += int((arrays["labels"] >= 0).sum())
    return total / terms


def metric(sequences: Sequences, length: int) -> Metric:
    """Return the metric, the mean cross-entropy of masked residues of the test sequences, padded or cropped
    to ``length`` tokens, in nats; lower is better.

    Its naive result predicts every residue with its frequency in the training sequences, with one added to
    each count.
    """
    counts = np.bincount(np.concatenate(sequences.train), minlength=33)[_FIRST : _FIRST + len(_LETTERS)] + 1
    log_share = np.log(counts / counts.sum())
    parts = _test_batches(sequences, length, len(sequences.test))
    targets = np.concatenate([part["labels"][part["labels"] >= 0] for part in parts])
    return Metric(
        name="masked cross-entropy",
        unit="nats",
        higher_is_better=False,
        margin=0.02,
        margin_source=(
            "ESM-2's perplexity falls from 10.45 at 8M to 6.37 at 15B parameters (Lin et al. 2023, Science "
            f"379:1123), {math.log(10.45 / 6.37) / math.log2(15e9 / 8e6):.3f} nats per doubling of size: "
            "less than half a doubling is no difference"
        ),
        naive=float(-log_share[targets - _FIRST].mean()),
        naive_name="residue frequencies of the training sequences",
    )
