"""``char-lm``: a small GPT that predicts the next byte of real text."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import EVALUATED_AT_ONCE, as_tensors, evaluating, step_rng
from memfit.jobs.builtin.fasta import read_text
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.gpt import GptSize

    Array = np.ndarray[Any, Any]

NAME: Final = "char-lm"
TITLE: Final = "Language model of text, byte by byte (GPT)"
SIZES: Final = ("tiny", "124M", "1.3B", "paper")
DATA_SOURCE: Final = (
    f"Python {platform.python_version()} documentation from the standard library (PSF License)"
)
_TEST_WINDOWS: Final = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Training and test text as bytes, uint8 (bytes,)."""

    train: Array
    test: Array
    source: str


def make(
    *,
    size: str = "tiny",
    data: str | None = None,
    weights: str | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Job:
    """Return the job at one of SIZES, by default on the built-in text, from random weights, with the batch
    and the length of the size.

    ``data``: a text file. ``weights``: a folder of safetensors. ``batch``: windows of a step. ``length``:
    bytes of a window. The larger sizes keep GPT-2's vocabulary, because its memory is of interest, although
    their tokens are bytes.
    """
    shape = _shape(size)
    if length is not None:
        shape, size = dataclasses.replace(shape, length=length), f"{size}@{length}"
    batch_size = batch or shape.batch_size
    text = read(data, shape.length)
    return Job(
        name=NAME,
        title=TITLE,
        size=size,
        build_model=lambda: _build(shape, weights),
        make_batch=lambda step, seed: train_batch(text.train, shape.length, batch_size, step=step, seed=seed),
        loss=functools.partial(_cross_entropy, reduction="mean"),
        loss_terms=lambda part: int(part["next"].numel()),
        evaluate=lambda model: bits_per_byte(model, text.test, shape.length, batch_size),
        metric=metric(text, shape.length),
        optimizer=OptimizerChoice(learning_rate=2e-3 if size == "tiny" else 2e-4, betas=(0.9, 0.95)),
        batch_size=batch_size,
        tokens_per_batch=batch_size * shape.length,
        blocks="blocks",
        head="head",
        data_source=text.source,
    )


def _shape(size: str) -> GptSize:
    """Return a size of its own for tiny, GPT-2 small (Radford et al. 2019) for 124M, and for 1.3B and paper
    the 1.3B model of GPT-3's table 2.1 with 64-wide heads."""
    from memfit.jobs.builtin.gpt import GptSize

    if size == "tiny":
        return GptSize(layers=4, width=128, heads=4, length=256, vocabulary=256, batch_size=16)
    if size == "124M":
        return GptSize(layers=12, width=768, heads=12, length=1024, vocabulary=50_257, batch_size=8)
    return GptSize(layers=24, width=2048, heads=32, length=2048, vocabulary=50_257, batch_size=8)


def _build(shape: GptSize, weights: str | None) -> torch.nn.Module:
    from memfit.jobs.builtin.gpt import Gpt
    from memfit.jobs.weights import load_weights

    model = Gpt(shape)
    if weights:
        load_weights(model, weights)
    return model


def read(path: str | None, length: int) -> Text:
    """Return the text of the user's file ``path``, or the built-in one if None; the last tenth is held out.

    Raises UserError if the held-out part would be shorter than one window of ``length`` + 1 bytes.
    """
    text_bytes = np.frombuffer((read_text(path) if path else _documentation()).encode(), np.uint8)
    boundary = len(text_bytes) - len(text_bytes) // 10
    if len(text_bytes) - boundary < length + 1:
        source = path or "the built-in text"
        raise UserError(
            f"{source} has {len(text_bytes)} bytes, too few for a window",
            allowed=f"at least {10 * (length + 1)}",
        )
    return Text(train=text_bytes[:boundary], test=text_bytes[boundary:], source=path or DATA_SOURCE)


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def train_batch(
    text: Array, length: int, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return ``tokens`` and ``next`` (batch, length) int64: windows at random positions and the bytes that
    follow.
    """
    starts = step_rng(step, seed).integers(0, len(text) - length, size=batch_size)
    return as_tensors(_windows(text, starts, length))


def _windows(text: Array, starts: Array, length: int) -> dict[str, Array]:
    positions = starts[:, None] + np.arange(length + 1)
    window = text[positions].astype(np.int64)
    return {"tokens": window[:, :-1], "next": window[:, 1:]}


def _cross_entropy(model: torch.nn.Module, batch: Any, *, reduction: str) -> torch.Tensor:
    """Return the cross-entropy of the next byte in nats, over all positions of the batch. ``reduction``:
    "mean" or "sum"."""
    from torch.nn import functional

    logits = model(batch["tokens"])
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["next"].flatten(), reduction=reduction
    )


def _test_starts(text: Array, length: int) -> Array:
    """Return the starts of consecutive windows at the beginning of ``text``, at most 64. They do not overlap,
    so that each scored byte counts once."""
    return np.arange(0, len(text) - length, length)[:_TEST_WINDOWS]


def bits_per_byte(model: torch.nn.Module, text: Array, length: int, batch_size: int) -> float:
    """Return the mean cross-entropy in bits of the next byte over the first windows of the held-out ``text``,
    at most 64 of ``length`` bytes."""
    starts, total = _test_starts(text, length), 0.0
    with evaluating(model) as device:
        chunk_size = min(batch_size, EVALUATED_AT_ONCE)
        for start in range(0, len(starts), chunk_size):
            arrays = _windows(text, starts[start : start + chunk_size], length)
            batch = {name: tensor.to(device) for name, tensor in as_tensors(arrays).items()}
            total += float(_cross_entropy(model, batch, reduction="sum"))
    return total / (len(starts) * length * math.log(2))


def metric(text: Text, length: int) -> Metric:
    """Return the metric, bits per byte. Its naive result is that of the byte frequencies of the training text
    (plus one each)."""
    counts = np.bincount(text.train, minlength=256) + 1
    bits = -np.log2(counts / counts.sum())
    targets = _windows(text.test, _test_starts(text.test, length), length)["next"]
    return Metric(
        name="bits per byte",
        unit="bits",
        higher_is_better=False,
        margin=0.025,
        margin_source=(
            "64 layers of 235M parameters and 12 layers of 44M differ by 0.05 bits per character on text8 "
            "(1.13, 1.18) and enwik8 (1.06, 1.11; Al-Rfou et al. 2019, arXiv 1808.04444): half of that is "
            "no difference"
        ),
        naive=float(bits[targets].mean()),
        naive_name="byte frequencies of the training text",
    )
