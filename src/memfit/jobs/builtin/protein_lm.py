"""``protein-lm``: an ESM-2-style masked language model on real UniProt sequences."""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import EVALUATED_AT_ONCE, as_tensors, epoch_indices, evaluating, step_rng
from memfit.jobs.builtin.fasta import read_fasta
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.esm import EsmSize

    Array = np.ndarray[Any, Any]

NAME: Final = "protein-lm"
TITLE: Final = "Masked language model of proteins (ESM-2)"
SIZES: Final = ("tiny", "8M", "35M", "150M", "650M", "3B", "15B", "paper")
DATA_SOURCE: Final = "5,000 sequences drawn at random from UniProt (The UniProt Consortium, CC BY 4.0)"
# ESM-2's alphabet: four special tokens, then letters by number. It has no J, which is read as X.
_LETTERS: Final = "LAGVSERTIDPKQNFYMHWCXBUZO"
_START, _PAD, _END, _FIRST, _MASK = 0, 1, 2, 4, 32
_STANDARD: Final = 20  # number of letters that random replacements are drawn from
_MASKED_SHARE: Final = 0.15
_TEST_COUNT: Final = 128
_TEST_SEED: Final = 20_230_317


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Token numbers of each sequence, without its start and end tokens."""

    train: tuple[Array, ...]
    test: tuple[Array, ...]
    source: str


def make(
    *,
    size: str = "tiny",
    data: str | None = None,
    weights: str | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Job:
    """Return the job at one of SIZES, by default on the built-in sequences, from random weights, with the
    batch and the length of the size.

    ``data``: a FASTA file. ``weights``: a folder of safetensors. ``batch``: sequences of a step. ``length``:
    tokens to which sequences, with start and end token, are padded or cropped.
    """
    shape = _shape(size)
    if length is not None:
        shape, size = shape.with_length(length, shape.batch_size), f"{size}@{length}"
    batch_size = batch or shape.batch_size
    sequences = read_sequences(data)
    return Job(
        name=NAME,
        title=TITLE,
        size=size,
        build_model=lambda: _build(shape, weights),
        make_batch=lambda step, seed: train_batch(sequences, shape.length, batch_size, step=step, seed=seed),
        loss=functools.partial(_cross_entropy, reduction="mean"),
        loss_terms=lambda part: int((part["labels"] >= 0).sum()),
        evaluate=lambda model: held_out_nats(model, sequences, shape.length, batch_size),
        metric=metric(sequences, shape.length),
        optimizer=OptimizerChoice(learning_rate=1e-3 if size == "tiny" else 4e-4, betas=(0.9, 0.98)),
        batch_size=batch_size,
        tokens_per_batch=batch_size * shape.length,
        length_unit="residues",
        blocks="esm.encoder.layer",
        head="lm_head.decoder",
        data_source=sequences.source,
    )


def _shape(size: str) -> EsmSize:
    from memfit.jobs.builtin.esm import PUBLISHED, EsmSize

    if size == "tiny":
        return EsmSize(layers=4, width=128, heads=4, length=256, batch_size=16)
    return PUBLISHED["650M" if size == "paper" else size]


def _build(shape: EsmSize, weights: str | None) -> torch.nn.Module:
    from memfit.jobs.builtin.esm import MaskedLanguageModel
    from memfit.jobs.weights import load_weights

    model = MaskedLanguageModel(shape)
    if weights:
        load_weights(model, weights)
    return model


def read_sequences(path: str | None) -> Sequences:
    """Return the sequences of the user's FASTA file ``path``, or of the built-in one if None; the last tenth,
    at least 1 and at most 128, is held out. Raises UserError for fewer than two sequences, and for faults in
    the file.
    """
    if path is None:
        resource = resources.files("memfit.jobs.builtin") / "data" / "uniprot_5000.fasta.gz"
        with resources.as_file(resource) as file:
            proteins = read_fasta(str(file))
    else:
        proteins = read_fasta(path)
    if len(proteins) < 2:
        raise UserError(
            f"{path} contains {len(proteins)} sequence", allowed="at least 2, for training and for testing"
        )
    tokens = tuple(encode(p.sequence) for p in proteins)
    test_count = min(_TEST_COUNT, max(1, len(tokens) // 10))
    source = (
        DATA_SOURCE if path is None else f"{path}: {len(tokens)} sequences, the last {test_count} for testing"
    )
    return Sequences(train=tokens[:-test_count], test=tokens[-test_count:], source=source)


def encode(sequence: str) -> Array:
    """Return ESM-2's token numbers of an upper-case sequence, int64 (residues,)."""
    return _token_numbers()[np.frombuffer(sequence.encode("ascii"), np.uint8)]


@functools.cache
def _token_numbers() -> Array:
    """Return the token number of each letter, indexed by ASCII code; that of X for characters that ESM-2's
    alphabet lacks."""
    table = np.full(128, _FIRST + _LETTERS.index("X"), np.int64)
    table[[ord(letter) for letter in _LETTERS]] = _FIRST + np.arange(len(_LETTERS))
    return table


def train_batch(
    sequences: Sequences, length: int, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch: ``tokens`` and ``labels`` (-100 where nothing is to be predicted), both
    (batch, length) int64, and ``valid`` (batch, length) bool, False at padding.
    """
    indices = epoch_indices(len(sequences.train), batch_size, step=step, seed=seed)
    return as_tensors(_masked([sequences.train[i] for i in indices], length, step_rng(step, seed)))


def _masked(rows: list[Array], length: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return the sequences ``rows`` cropped at random to ``length`` with start and end tokens, padded, and
    masked as BERT does, with the keys of `train_batch`.

    Labels are 15 % of the residues of each sequence, at least one. Of these, 80 % become the mask token, 10 %
    a random residue, and 10 % stay (Devlin et al. 2019).
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


def _cross_entropy(model: torch.nn.Module, batch: Any, *, reduction: str) -> torch.Tensor:
    """Return the cross-entropy in nats over the residues with labels. ``reduction``: "mean" or "sum"."""
    from torch.nn import functional

    logits = model(batch["tokens"], batch["valid"])
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction=reduction
    )


def _test_batches(sequences: Sequences, length: int, batch_size: int) -> list[dict[str, Array]]:
    """Return batches of the test sequences, of at most 8, with the same crops and masks every time, whatever
    ``batch_size`` is."""
    rng = np.random.default_rng(_TEST_SEED)
    arrays = _masked(list(sequences.test), length, rng)
    chunk_size = min(batch_size, EVALUATED_AT_ONCE)
    starts = range(0, len(sequences.test), chunk_size)
    return [{name: array[i : i + chunk_size] for name, array in arrays.items()} for i in starts]


def held_out_nats(model: torch.nn.Module, sequences: Sequences, length: int, batch_size: int) -> float:
    """Return the mean cross-entropy in nats over the residues of the test sequences that have labels."""
    total, terms = 0.0, 0
    with evaluating(model) as device:
        for arrays in _test_batches(sequences, length, batch_size):
            batch = {name: tensor.to(device) for name, tensor in as_tensors(arrays).items()}
            total += float(_cross_entropy(model, batch, reduction="sum"))
            terms += int((arrays["labels"] >= 0).sum())
    return total / terms


def metric(sequences: Sequences, length: int) -> Metric:
    """Return the metric, the cross-entropy over masked residues of the test sequences.

    Its naive result is that of the residue frequencies of the training sequences (plus one each).
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
