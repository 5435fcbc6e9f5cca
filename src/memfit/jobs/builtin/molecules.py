"""``molecules``: predict a property of a molecule from its SMILES string with MoLFormer.

Nothing must stay in float32. `memfit estimate --precision` finds errors of 0.4 % in bfloat16, mostly in the
attention, and a loss that moves by 0.25 %, because sums over tokens are short and torch's kernels accumulate
them in float32.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import (
    Array,
    as_tensors,
    epoch_indices,
    equal_parts,
    evaluating,
    step_rng,
    token_loss,
)
from memfit.jobs.builtin.fasta import read_text
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.jobs.builtin.smiles import graph, ring_skeleton, tokens
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.molformer import MolformerSize

NAME: Final = "molecules"
TITLE: Final = "Octanol-water partition of molecules from SMILES (MoLFormer)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "about 4,500 measured logP (Syracuse Research, KOWWIN) with PubChem's SMILES, read from the installed "
    "package `chemicals` (MIT); split by ring skeleton"
)
_PAD, _UNKNOWN, _MASK, _FIRST = 0, 1, 2, 3
_MASKED_SHARE: Final = 0.15
_DIMENSIONS: Final = {"layers": "layers", "hidden": "width"}
_NO_LABEL: Final = -100
_TRAIN_SHARE: Final = 0.8
_RMSE: Final = "RMSE of logP"
_FIT: Final = "r2 of logP, training molecules"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Molecules:
    """Molecules, each with a measured value, for training (the first ``train_count``) and for testing.

    ``smiles`` and ``values`` have shape (molecules,). ``tokens`` (molecules, tokens of the longest molecule)
    uint8: token numbers, 0 at padding. ``length``: tokens to which batches are padded. ``source``: where the
    data come from.
    """

    smiles: tuple[str, ...]
    values: Array
    tokens: Array
    train_count: int
    length: int
    source: str

    def pad(self, picked: Array) -> Array:
        """Return the token numbers of the molecules with the indices ``picked``, int64 (picked, length), 0 at
        padding."""
        return np.pad(self.tokens[picked].astype(np.int64), ((0, 0), (0, self.length - self.tokens.shape[1])))

    @property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training values; the latter is 1.0 if all values are equal."""
        train = self.values[: self.train_count]
        return float(train.mean()), float(train.std()) or 1.0


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "paper"), by default on the measurements of logP in the
    installed package chemicals.

    ``data``: a file of ``SMILES,value`` lines, which is used instead (`_read_user_file`). ``batch``:
    molecules of a step. ``length``: molecules with more tokens are left out, and others are padded to it.
    Raises UserError if ``data`` is None and chemicals is not installed, for faults in ``data``, if fewer than
    ten molecules remain, and for a dimension that is unknown or no multiple of twice the number of heads
    ("hidden").
    """
    shape = options.resize(_shape(options.size), _DIMENSIONS)
    pairs = _read_user_file(options.data) if options.data else _read_installed()
    molecules = split_by_skeleton(pairs, shape.length, options.data or DATA_SOURCE)
    metric, surrogate = endpoints(molecules)
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        steps=120,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(
            molecules, shape.batch_size, masked=shape.masked, step=step, seed=seed
        ),
        loss=loss,
        evaluate=lambda model: scores(model, molecules, shape.batch_size),
        metric=metric,
        surrogates=(surrogate,),
        optimizer=OptimizerChoice(learning_rate=1e-4 if shape.masked else 2e-3, betas=(0.9, 0.99)),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"hidden": 2 * shape.heads}),
        tokens_per_batch=shape.batch_size * shape.length,
        blocks="blocks",
        head="head" if shape.masked else None,
        data_source=molecules.source,
    )


def _shape(size: str) -> MolformerSize:
    from memfit.jobs.builtin.molformer import XL, MolformerSize

    if size == "paper":
        return XL
    return MolformerSize(
        layers=4, width=64, heads=4, features=16, feed=128, length=72, vocabulary=96, batch_size=48
    )


def _build(shape: MolformerSize) -> torch.nn.Module:
    from memfit.jobs.builtin.molformer import Molformer

    return Molformer(shape)


Pairs = Sequence[tuple[str, float]]


def _read_installed() -> Pairs:
    """Return (PubChem's SMILES, measured logP) of the molecules in the files of the package chemicals, joined
    by CAS number, sorted by SMILES.

    The package itself is not imported. Raises UserError if it is not installed.
    """
    spec = importlib.util.find_spec("chemicals")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the data of {NAME} come from the package `chemicals`, which is not installed",
            hint="pip install 'memfit[science]', or give --data FILE with SMILES and a number in each line",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    with gzip.open(folder / "Environment" / "Syrres logP data.csv.gz", "rt", encoding="utf-8-sig") as file:
        logp_by_cas = {row["CAS"]: float(row["logP"]) for row in csv.DictReader(file, delimiter="\t")}
    values_by_smiles = {}
    for file_kind in ("large", "small"):
        name = f"chemical identifiers pubchem {file_kind}.tsv"
        with (folder / "Identifiers" / name).open(encoding="utf-8") as file:
            for line in file:
                _, cas, _, _, smiles, *_ = line.split("\t", 5)
                if cas in logp_by_cas:
                    values_by_smiles[smiles] = logp_by_cas[cas]
    return sorted(values_by_smiles.items())


def _read_user_file(path: str) -> Pairs:
    """Return (SMILES, value) of each line of the user's file. Both are separated by the line's first comma,
    or if it has none, its first tab, else its first space. Empty lines, and a first line without a finite
    number, are skipped. Raises UserError as `read_text` does, and with the number of the line for any
    other line without a finite number, or with a SMILES string that is broken or has no atom."""
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        smiles, _, value = line.strip().partition("," if "," in line else "\t" if "\t" in line else " ")
        try:
            pair = smiles.strip(), float(value)
            if not math.isfinite(pair[1]):
                raise ValueError(value.strip())
        except ValueError as error:
            if number == 1 or not line.strip():
                continue
            raise UserError(
                f"{path} line {number}: no finite number follows the SMILES string: {error}",
                allowed="SMILES,value: a SMILES string and a number, separated by a comma, tab or space",
            ) from error
        try:
            if not graph(pair[0])[0]:
                raise ValueError("it has no atom")
        except ValueError as broken_smiles:
            raise UserError(
                f"{path} line {number}: broken SMILES string: {broken_smiles}",
                allowed="a SMILES string in which exactly the rings and branches that are opened are closed, "
                "and each ring number follows an atom",
            ) from broken_smiles
        pairs.append(pair)
    return pairs


def split_by_skeleton(pairs: Pairs, length: int, source: str) -> Molecules:
    """Return those molecules in ``pairs`` (SMILES, value) that have at most ``length`` tokens, split into
    training and test.

    They are ordered by ring skeleton, common ones first, as in MoleculeNet (Wu et al. 2018, Chem. Sci.
    9:513); molecules without rings have one skeleton. The last fifth, with the rarest skeletons, is for
    testing. The test part is larger if a skeleton would otherwise be on both sides. Only if the commonest
    skeleton has over four fifths of the molecules is it on both sides: the first four fifths are then for
    training, and the returned source says so. Raises UserError if fewer than ten molecules remain.
    """
    short_pairs = [(smiles, value) for smiles, value in pairs if len(tokens(smiles)) <= length]
    if len(short_pairs) < 10:
        raise UserError(
            f"only {len(short_pairs)} of {len(pairs)} molecules have at most {length} tokens (--length)",
            allowed="at least 10 such molecules",
            hint="give a larger --length, or a file with more molecules",
        )
    skeletons = [ring_skeleton(smiles) for smiles, _ in short_pairs]
    count = Counter(skeletons)
    order = sorted(range(len(short_pairs)), key=lambda i: (-count[skeletons[i]], skeletons[i], i))
    names = [skeletons[i] for i in order]
    most = int(_TRAIN_SHARE * len(order))
    train_count = max((i for i in range(1, most + 1) if names[i] != names[i - 1]), default=most)
    if names[train_count] == names[train_count - 1]:
        source = f"{source}: one ring skeleton has over four fifths of the molecules and is also in the test"
    smiles = tuple(short_pairs[i][0] for i in order)
    return Molecules(
        smiles=smiles,
        values=np.array([short_pairs[i][1] for i in order], np.float32),
        tokens=_numbers(smiles, smiles[:train_count]),
        train_count=train_count,
        length=length,
        source=source,
    )


def _numbers(smiles: Iterable[str], training_smiles: Iterable[str]) -> Array:
    """Return the token numbers of ``smiles``, uint8 (molecules, tokens of the longest): 0 at padding, 2 for
    the mask token, which does not occur here, and 3 to 95 for the first 93 tokens, in alphabetical order,
    that occur in ``training_smiles``. All other tokens are 1 (unknown)."""
    alphabet = sorted({token for text in training_smiles for token in tokens(text)})
    token_numbers = {token: _FIRST + i for i, token in enumerate(alphabet[: 96 - _FIRST])}
    rows = [[token_numbers.get(token, _UNKNOWN) for token in tokens(text)] for text in smiles]
    longest = max(len(row) for row in rows)
    return np.array([row + [_PAD] * (longest - len(row)) for row in rows], np.uint8)


def train_batch(
    molecules: Molecules, batch_size: int, *, masked: bool, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch of ``batch_size`` molecules.

    ``tokens`` (batch, length) int64; ``valid`` (batch, length) bool, False at padding; ``value`` (batch,)
    float32, scaled so that the training values have mean 0 and standard deviation 1. If ``masked``, each
    token is replaced by the mask token with a probability of 15 %, and ``labels`` (batch, length) int64 holds
    the numbers of those that were replaced, -100 elsewhere.
    """
    indices = epoch_indices(molecules.train_count, batch_size, step=step, seed=seed)
    mean, deviation = molecules.scale
    numbers = molecules.pad(indices)
    arrays = {
        "tokens": numbers,
        "valid": numbers != _PAD,
        "value": (molecules.values[indices] - mean) / deviation,
    }
    if masked:
        hidden = (step_rng(step, seed).random(numbers.shape) < _MASKED_SHARE) & arrays["valid"]
        arrays |= {"labels": np.where(hidden, numbers, _NO_LABEL), "tokens": np.where(hidden, _MASK, numbers)}
    return as_tensors(arrays)


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean over molecules of the squared error of the scaled value, whose unit is the standard
    deviation of the training values.

    If the batch has labels, the cross-entropy of the masked tokens in nats is added: its sum, divided by the
    number of all positions of the batch, unmasked ones and padding included.
    """
    from torch.nn import functional

    value, logits = model(batch["tokens"], batch["valid"])
    error: torch.Tensor = functional.mse_loss(value.float(), batch["value"])
    if "labels" not in batch:
        return error
    labels = batch["labels"]
    nats = token_loss(logits, labels, reduction="sum")
    total: torch.Tensor = error + nats / labels.numel()
    return total


def scores(model: torch.nn.Module, molecules: Molecules, batch_size: int) -> dict[str, float]:
    """Return "RMSE of logP", the root mean square error over the held-out molecules in the unit of the
    values, and "r2 of logP, training molecules", the squared correlation of predicted and true values over
    every fourth training molecule; 0 if either is constant. At most ``batch_size`` molecules, and at most 8,
    are evaluated at once."""
    held_out = np.arange(molecules.train_count, len(molecules.smiles))
    fitted = np.arange(0, molecules.train_count, 4)
    errors = predict(model, molecules, held_out, batch_size) - molecules.values[held_out]
    pairs = np.stack([predict(model, molecules, fitted, batch_size), molecules.values[fitted]])
    correlation = np.corrcoef(pairs)[0, 1] if (pairs.std(axis=1) > 0).all() else 0.0
    return {_RMSE: float(np.sqrt(np.mean(errors**2))), _FIT: float(correlation**2)}


def predict(model: torch.nn.Module, molecules: Molecules, picked: Array, batch_size: int) -> Array:
    """Return the predicted values of the molecules with the indices ``picked``, float64, in their unit."""
    mean, deviation = molecules.scale
    parts = []
    with evaluating(model) as device:
        for indices in equal_parts(picked, batch_size):
            numbers = as_tensors({"tokens": molecules.pad(indices)})["tokens"].to(device)
            parts.append(model(numbers, numbers != _PAD)[0].float().cpu().double().numpy())
    return np.concatenate(parts) * deviation + mean


def endpoints(molecules: Molecules) -> tuple[Metric, Metric]:
    """Return the metric, the RMSE over the test molecules in the unit of the values (lower is better), and
    its surrogate, the squared correlation over every fourth training molecule (higher is better). The
    surrogate is not moved by an offset or a scale of all predictions, which vary from step to step. The naive
    result is that of a linear fit, with a constant, of the training values to the numbers of atoms of the
    nine elements that are commonest in the training molecules."""
    elements = Counter(e for text in molecules.smiles[: molecules.train_count] for e in graph(text)[0])
    common = [element for element, _ in elements.most_common(9)]
    counts = np.array([[graph(s)[0].count(e) for e in common] + [1] for s in molecules.smiles], np.float64)
    train_count = molecules.train_count
    weights = np.linalg.lstsq(counts[:train_count], molecules.values[:train_count], rcond=None)[0]
    fit = counts @ weights
    errors = fit[train_count:] - molecules.values[train_count:]
    naive_name = f"a linear fit to the number of {', '.join(c.capitalize() for c in common)} atoms"
    metric = Metric(
        name=_RMSE,
        unit="log units",
        higher_is_better=False,
        margin=0.15,
        margin_source=(
            "determinations of one substance by the shake-flask method should agree within +-0.3 log units "
            "(OECD test guideline 107, 1995): half of that is no difference"
        ),
        naive=float(np.sqrt(np.mean(errors**2))),
        naive_name=naive_name,
    )
    surrogate = Metric(
        name=_FIT,
        unit="",
        higher_is_better=True,
        margin=0.03,
        margin_source=(
            "a model of structure and activity is acceptable from an r2 of 0.6, and r2 with and without an "
            "intercept may differ by a tenth of it (Golbraikh & Tropsha 2002, J. Mol. Graph. Model. 20:269): "
            "half of that is no difference"
        ),
        naive=float(np.corrcoef(fit[:train_count:4], molecules.values[:train_count:4])[0, 1] ** 2),
        naive_name=naive_name,
    )
    return metric, surrogate
