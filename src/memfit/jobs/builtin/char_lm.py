"""``char-lm``: a small GPT that predicts the next byte of real text."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Final

import numpy as np

from memfit.jobs.builtin.batches import Array, as_tensors, step_rng
from memfit.jobs.builtin.fasta import read_text
from memfit.jobs.builtin.next_token import Corpus, mean_bits, next_token_loss, split
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.gpt import GptSize

NAME: Final = "char-lm"
TITLE: Final = "Language model of text, byte by byte (GPT)"
SIZES: Final = ("tiny", "124M", "1.3B", "paper")
DATA_SOURCE: Final = (
    f"Python {platform.python_version()} documentation from the standard library (PSF License)"
)
_DIMENSIONS: Final = {"layers": "layers", "hidden": "width"}
_TEST_WINDOWS: Final = 64


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "124M", "1.3B", "paper"), by default on the built-in text.

    ``data``: a UTF-8 text file, which may be gzipped (``.gz``). ``batch``: windows of a step. ``length``:
    bytes of a window. Sizes other than ``tiny`` have GPT-2's vocabulary of 50,257 tokens for the sake of its
    memory, although only the 256 byte values occur. Raises UserError for a file that cannot be read or is too
    short, and for a dimension that is unknown or no multiple of the number of heads ("hidden").
    """
    shape = options.resize(_shape(options.size), _DIMENSIONS)
    text = read(options.data, shape.length)
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(
            text.train, shape.length, shape.batch_size, step=step, seed=seed
        ),
        loss=next_token_loss,
        loss_terms=lambda part: int(part["next"].numel()),
        evaluate=lambda model: bits_per_byte(model, text.test, shape.length, shape.batch_size),
        metric=metric(text, shape.length),
        optimizer=OptimizerChoice(learning_rate=2e-3 if options.label == "tiny" else 2e-4, betas=(0.9, 0.95)),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"hidden": shape.heads}),
        tokens_per_batch=shape.batch_size * shape.length,
        blocks="blocks",
        head="head",
        data_source=text.source,
    )


def _shape(size: str) -> GptSize:
    """Return the size of the network: a small one for "tiny", GPT-2 small (Radford et al. 2019) for "124M",
    and for "1.3B" and "paper" GPT-3's 1.3B model (Brown et al. 2020, table 2.1), but with heads 64 wide."""
    from memfit.jobs.builtin.gpt import GptSize

    if size == "tiny":
        return GptSize(layers=4, width=128, heads=4, length=256, vocabulary=256, batch_size=16)
    if size == "124M":
        return GptSize(layers=12, width=768, heads=12, length=1024, vocabulary=50_257, batch_size=8)
    return GptSize(layers=24, width=2048, heads=32, length=2048, vocabulary=50_257, batch_size=8)


def _build(shape: GptSize) -> torch.nn.Module:
    from memfit.jobs.builtin.gpt import Gpt

    return Gpt(shape)


def read(path: str | None, length: int) -> Corpus:
    """Return the bytes of the user's text file ``path``, or of the built-in text if None, split into training
    and held-out part.

    Raises UserError as `read_text` does, and if the held-out tenth has fewer than ``length`` + 1 bytes.
    """
    text_bytes = np.frombuffer((read_text(path) if path else _documentation()).encode(), np.uint8)
    text = split(text_bytes, path or DATA_SOURCE)
    if len(text.test) < length + 1:
        source = path or "the built-in text"
        least_bytes = 10 * (length + 1)
        raise UserError(
            f"{source} has {len(text_bytes)} bytes, too few: the last tenth, held out for testing, must hold "
            f"a window of {length} bytes and the byte after it",
            allowed=f"at least {least_bytes} bytes",
            hint="give a longer file with --data, or a smaller --length",
        )
    return text


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def train_batch(
    text: Array, length: int, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return ``tokens``, windows at random positions of ``text``, and ``next``, the byte after each of their
    bytes, both (batch_size, length) int64."""
    starts = step_rng(step, seed).integers(0, len(text) - length, size=batch_size)
    return as_tensors(_windows(text, starts, length))


def _windows(text: Array, starts: Array, length: int) -> dict[str, Array]:
    positions = starts[:, None] + np.arange(length + 1)
    window = text[positions].astype(np.int64)
    return {"tokens": window[:, :-1], "next": window[:, 1:]}


def _test_starts(text: Array, length: int) -> Array:
    """Return the starts of at most 64 consecutive windows of ``length`` bytes, the first at the beginning of
    ``text``. They do not overlap, so that each scored byte counts once. After each window there is at least
    one more byte."""
    return np.arange(0, len(text) - length, length)[:_TEST_WINDOWS]


def bits_per_byte(model: torch.nn.Module, text: Array, length: int, batch_size: int) -> float:
    """Return the mean cross-entropy of the next byte in bits over consecutive windows of ``length`` bytes at
    the beginning of the held-out ``text``, at most 64 of them. At most ``batch_size``, and at most 8, are
    evaluated at once."""
    starts = _test_starts(text, length)
    return mean_bits(model, starts, lambda part: _windows(text, part, length), batch_size)


def metric(text: Corpus, length: int) -> Metric:
    """Return the metric, bits per held-out byte, for windows of ``length`` bytes; lower is better. Its naive
    result predicts every byte with its frequency in the training text, with one added to each of the 256
    counts."""
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
