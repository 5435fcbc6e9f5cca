"""``genome``: predict the next base of a bacterial chromosome with HyenaDNA. Memory grows with the window's
length.

Two parts stay in float32. The long convolution: bfloat16 has no FFT, and float16's overflows. The network of
its filter taps, whose input is time from 0 to 1: bfloat16 distinguishes only about 256 of a million
positions. With the thousand positions of `tiny` the error is 1 %, which `memfit estimate --precision`
finds and reports as harmless.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import numpy as np

from memfit.jobs.builtin.batches import Array, as_tensors, open_arrays, step_rng
from memfit.jobs.builtin.fasta import read_text
from memfit.jobs.builtin.next_token import Corpus, mean_bits, next_token_loss, split
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.hyena import HyenaSize

NAME: Final = "genome"
TITLE: Final = "Language model of DNA with a long context (HyenaDNA)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "chromosome of Escherichia coli 536, 4,938,920 bases (NCBI NC_008253.1, free to use); the last tenth is "
    "held out"
)
_DIMENSIONS: Final = {"layers": "layers", "hidden": "width"}
_TEST_BASES: Final = 65_536
_NAIVE_ORDER: Final = 2
_BUILT_IN_GAIN: Final = 0.0072  # bits that order 4 gains over order 3 on the built-in chromosome


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "paper"), by default on the built-in chromosome.

    ``data``: a FASTA file of DNA, which may be gzipped (``.gz``). ``batch``: windows of a step. ``length``:
    tokens of a window, one per base; evaluation uses shorter windows if the held-out part is shorter. Raises
    UserError for a file that cannot be read or has too few bases, and for an unknown dimension.
    """
    shape = options.resize(_shape(options.size), _DIMENSIONS)
    genome = read(options.data, shape.length + shape.kmer)
    max_length = len(genome.test) - shape.kmer - 1
    # The held-out part may be shorter than a window.
    test_shape = dataclasses.replace(shape, length=min(shape.length, max_length))
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        steps=72,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(
            genome.train, shape, shape.batch_size, step=step, seed=seed
        ),
        loss=next_token_loss,
        loss_terms=lambda part: int(part["next"].numel()),
        evaluate=lambda model: bits_per_base(model, genome.test, test_shape, shape.batch_size),
        metric=metric(genome, test_shape),
        optimizer=OptimizerChoice(learning_rate=2e-3 if shape.kmer > 1 else 6e-4, betas=(0.9, 0.98)),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS),
        tokens_per_batch=shape.batch_size * shape.length,
        length_unit="bases",
        blocks="blocks",
        head="head",
        data_source=genome.source,
        islands=("blocks.*.mixer.long",),
    )


def _shape(size: str) -> HyenaSize:
    from memfit.jobs.builtin.hyena import LARGE_1M, HyenaSize

    if size == "paper":
        return LARGE_1M
    return HyenaSize(layers=3, width=64, filter_width=32, kmer=4, vocabulary=256, length=1024, batch_size=4)


def _build(shape: HyenaSize) -> torch.nn.Module:
    from memfit.jobs.builtin.hyena import HyenaDna

    return HyenaDna(shape)


def read(path: str | None, needed: int) -> Corpus:
    """Return the DNA of the user's file ``path``, or the built-in chromosome if None, as 0 to 3 for A, C, G,
    T, split into training and held-out part.

    ``needed``: bases of a training window. Raises UserError as `read_text` does, and if the training part has
    fewer than 400 or fewer than 2 x ``needed`` bases.
    """
    bases, source = (_fasta(path), path) if path else (_chromosome(), DATA_SOURCE)
    genome = split(bases, source)
    if len(genome.train) < (least_train := max(2 * needed, 400)):
        least_bases = least_train + (least_train - 1) // 9  # a tenth, rounded down, is held out
        raise UserError(
            f"{source}: {len(bases)} bases of DNA are too few for training on windows of {needed} bases",
            allowed=f"at least {least_bases} letters A, C, G or T",
            hint="give a longer file with --data, or a smaller --length",
        )
    return genome


def _chromosome() -> Array:
    with open_arrays("ecoli_536") as archive:
        groups = archive["packed"][:, None] >> np.array([6, 4, 2, 0], np.uint8)
        bases: Array = (groups & 3).ravel()[: int(archive["bases"])]
        return bases


def _fasta(path: str) -> Array:
    """Return the bases of all records of a FASTA file, concatenated, as 0 to 3 for A, C, G, T. Either case is
    allowed. Other letters (N, gaps) are left out. Raises UserError as `read_text` does."""
    lines = [line.strip() for line in read_text(path).splitlines() if not line.startswith(">")]
    letters = np.frombuffer("".join(lines).upper().encode(), np.uint8)
    code_of_letter = np.full(256, 255, np.uint8)
    code_of_letter[list(b"ACGT")] = range(4)
    codes = code_of_letter[letters]
    return codes[codes < 4]


def words(bases: Array, length: int) -> Array:
    """Return, for each position in ``bases`` at which a word of ``length`` bases starts, the number of this
    word, 0 to 4**length - 1: its bases are the digits to the base 4, the first one the highest. int64 (bases
    - length + 1,)."""
    numbers = np.zeros(len(bases) - length + 1, np.int64)
    for i in range(length):
        numbers = 4 * numbers + bases[i : i + len(numbers)]
    return numbers


def train_batch(
    bases: Array, shape: HyenaSize, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return ``tokens`` and ``next`` (batch_size, length) int64 of windows at random positions. A token is
    the number of the word of the last ``shape.kmer`` bases (see `words`); ``next`` is the base that follows
    it, 0 to 3."""
    last = len(bases) - shape.length - shape.kmer
    return as_tensors(_windows(bases, step_rng(step, seed).integers(0, last, size=batch_size), shape))


def _windows(bases: Array, starts: Array, shape: HyenaSize) -> dict[str, Array]:
    window = bases[starts[:, None] + np.arange(shape.length + shape.kmer)]
    tokens = np.stack([words(row[:-1], shape.kmer) for row in window])
    return {"tokens": tokens, "next": window[:, shape.kmer :].astype(np.int64)}


def _test_starts(bases: Array, shape: HyenaSize) -> Array:
    """Return the starts of windows spread evenly over ``bases``, the held-out part, from its first to its
    last position where a window fits. Their number is that of windows of ``shape.length`` bases in 65,536
    bases, or in all of ``bases`` if these are fewer, but at least one."""
    last = len(bases) - shape.length - shape.kmer
    return np.linspace(0, last, max(1, min(_TEST_BASES, len(bases)) // shape.length)).astype(np.int64)


def bits_per_base(model: torch.nn.Module, bases: Array, shape: HyenaSize, batch_size: int) -> float:
    """Return the mean cross-entropy of the next base, in bits, over windows of ``shape.length`` tokens spread
    evenly over ``bases``, the held-out part, with at most about 65,536 bases in all (`_test_starts`). At most
    ``batch_size`` windows, and at most 8, are evaluated at once."""
    starts = _test_starts(bases, shape)
    return mean_bits(model, starts, lambda part: _windows(bases, part, shape), batch_size)


def markov_bits(genome: Corpus, places: Array, order: int) -> float:
    """Return the mean negative log2 probability, in bits, that a Markov chain gives the bases at the
    positions ``places`` of the held-out part, each at least ``order``.

    The chain's probabilities are how often each base follows each word of ``order`` bases in the training
    part, with one added to each count.
    """
    counts = np.bincount(words(genome.train, order + 1), minlength=4 ** (order + 1)).reshape(-1, 4) + 1
    bits = -np.log2(counts / counts.sum(1, keepdims=True))
    return float(bits.ravel()[words(genome.test, order + 1)[places - order]].mean())


def scored_positions(genome: Corpus, shape: HyenaSize) -> Array:
    """Return the positions in the held-out part of ``genome`` whose base the metric scores, (windows x
    ``shape.length``,), one window after another (`_test_starts`). Positions in overlapping windows occur more
    than once."""
    starts = _test_starts(genome.test, shape) + shape.kmer
    return (starts[:, None] + np.arange(shape.length)).ravel()


def metric(genome: Corpus, shape: HyenaSize) -> Metric:
    """Return the metric, bits per held-out base of the windows that `bits_per_base` evaluates; lower is
    better.

    Its naive result is that of a Markov chain of order two, which sees words of codon length. The margin,
    below which a difference counts as none, is half of the bits that order 4 gains over order 3 on the scored
    bases. If it gains nothing, as with few bases, it is half of what order 4 gains on the built-in
    chromosome.
    """
    positions = scored_positions(genome, shape)
    positions = positions[positions >= 4]
    bits = {order: markov_bits(genome, positions, order) for order in (_NAIVE_ORDER, 3, 4)}
    gain, measured_on = bits[3] - bits[4], "the same bases"
    if gain <= 0:
        gain, measured_on = _BUILT_IN_GAIN, "the chromosome of Escherichia coli 536"
    return Metric(
        name="bits per base",
        unit="bits",
        higher_is_better=False,
        margin=gain / 2,
        margin_source=(
            f"one more base of context, from order 3 to order 4, is worth {gain:.4f} bits to a Markov chain "
            f"on {measured_on}: half of that is no difference"
        ),
        naive=bits[_NAIVE_ORDER],
        naive_name=f"Markov chain of order {_NAIVE_ORDER} (order 4 reaches {bits[4]:.4f})",
    )
