"""``weather``: forecast fields of a rotating flow step by step with a neural operator.

Each forecast is made from the one before, and the loss covers all of them, so memory grows with the rollout.
``tiny`` is an FNO on turbulence of the barotropic vorticity equation. ``paper`` is FourCastNet in the second
stage of its training: two steps of six hours on 20 fields of ERA5's grid (Pathak et al. 2022, arXiv
2202.11214), with the network's output added to the fields.

The mixing in Fourier space is float32 under any plan. There is no FFT in bfloat16, and in float16 its sums
over the grid overflow. Forecasts are summed and compared in float32 too: a step changes little, and an 8-bit
mantissa would lose a change below 1/256 of the field.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import (
    EVALUATED_AT_ONCE,
    Array,
    as_tensors,
    epoch_indices,
    evaluating,
    full_parts,
    open_arrays,
)
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.neural_operator import ForecasterSize

NAME: Final = "weather"
TITLE: Final = "Forecasts of gridded fields (neural operator, autoregressive)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "64 trajectories of turbulence on a beta plane, solved pseudo-spectrally by scripts/vorticity.py "
    "(memfit's own, Apache-2.0)"
)
_DIMENSIONS: Final = {"rollout": "rollout", "layers": "layers", "hidden": "width"}
_TEST_STRIDE: Final = 3  # frames between the starts of scored forecasts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Trajectories of one field: ``train`` and ``test``, float32 (trajectories, frames, rows, columns), in
    units of the standard deviation of the training data."""

    train: Array
    test: Array

    @staticmethod
    def windows(frames: Array, rollout: int) -> int:
        """Return how many windows of ``rollout`` + 1 consecutive frames there are in the trajectories
        ``frames``, (trajectories, frames, rows, columns). Windows may overlap, but each is inside one
        trajectory."""
        return int(frames.shape[0] * (frames.shape[1] - rollout))


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "paper") on the built-in fields.

    ``batch``: windows of a step. Raises UserError for any ``data`` or ``length``, for a rollout of as many
    steps as a trajectory has frames, or more, and for a dimension that is unknown or, at "paper", no multiple
    of 8 ("hidden").
    """
    options.refuse("data", "length", job=NAME, why="it trains on the fields that come with memfit")
    shape, fields = options.resize(_shape(options.size), _DIMENSIONS), read()
    frame_count = fields.train.shape[1]
    if shape.rollout >= frame_count:
        raise UserError(
            f"{NAME} cannot be trained on {shape.rollout} forecasts in a row (--dim rollout)",
            allowed=f"1 to {frame_count - 1}, as the trajectories have {frame_count} frames",
        )
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(
            fields.train, shape, shape.batch_size, step=step, seed=seed
        ),
        loss=loss,
        loss_terms=lambda part: len(part["fields"]),
        evaluate=lambda model: relative_error(model, fields.test, shape),
        metric=metric(fields, shape.rollout),
        optimizer=OptimizerChoice(learning_rate=5e-3 if options.size == "tiny" else 5e-4),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"hidden": shape.groups}),
        steps=100,
        blocks="blocks",
        islands=("blocks.*.mixing",),
        data_source=DATA_SOURCE,
    )


def _shape(size: str) -> ForecasterSize:
    from memfit.jobs.builtin.neural_operator import ForecasterSize

    if size == "tiny":
        return ForecasterSize(
            layers=3, width=20, channels=1, grid=(32, 32), patch=1, rollout=4, batch_size=8, modes=10
        )
    return ForecasterSize(
        layers=12,
        width=768,
        channels=20,
        grid=(720, 1440),
        patch=8,
        rollout=2,
        batch_size=2,
        groups=8,
        positions=True,
    )


def _build(shape: ForecasterSize) -> torch.nn.Module:
    from memfit.jobs.builtin.neural_operator import Forecaster

    return Forecaster(shape)


def read() -> Fields:
    """Return the built-in fields: 64 trajectories of simulated turbulence."""
    with open_arrays("vorticity") as archive:
        fields, count = archive["vorticity"].astype(np.float32), int(archive["n_train"])
    fields /= fields[:count].std()
    return Fields(train=fields[:count], test=fields[count:])


def train_batch(
    frames: Array, shape: ForecasterSize, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch: ``fields`` (batch_size, rollout + 1, channels, rows, columns) float32. Each
    sample is a window of consecutive frames of one trajectory. Every epoch uses each window once."""
    indices = epoch_indices(Fields.windows(frames, shape.rollout), batch_size, step=step, seed=seed)
    starts = frames.shape[1] - shape.rollout
    windows = [frames[i // starts, i % starts : i % starts + shape.rollout + 1] for i in indices]
    return {"fields": _on_grid(np.stack(windows), shape)}


def _on_grid(windows: Array, shape: ForecasterSize) -> torch.Tensor:
    """Return ``windows`` (windows, time, rows, columns) on the model's grid and with its channels: (windows,
    time, channels, rows, columns).

    If the grid is larger than the data, the fields, which are periodic, are repeated; if it is smaller, they
    are cut. The first channel is the field; each other is the one before it, rolled by a row.
    """
    import torch

    rows, columns = shape.grid
    repeats = (1, 1, -(-rows // windows.shape[2]), -(-columns // windows.shape[3]))
    field = as_tensors({"fields": np.tile(windows, repeats)[:, :, :rows, :columns]})["fields"]
    return torch.stack([field.roll(channel, 2) for channel in range(shape.channels)], dim=2)


def _errors(model: torch.nn.Module, fields: torch.Tensor) -> torch.Tensor:
    """Return the relative L2 error of each forecast, (batch, rollout): the norm of its deviation from the
    truth over channels, rows and columns, divided by the norm of the truth. ``fields``: as `train_batch`
    returns them; the model gets the first frame."""
    import torch

    truth = fields[:, 1:]
    deviation = torch.stack(model(fields[:, 0], truth.shape[1]), dim=1) - truth
    deviation = torch.linalg.vector_norm(deviation, dim=(2, 3, 4))
    relative_errors: torch.Tensor = deviation / torch.linalg.vector_norm(truth, dim=(2, 3, 4))
    return relative_errors


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean relative L2 error (as a share of the truth's norm) over all forecasts of the rollout
    and all samples."""
    return _errors(model, batch["fields"]).mean()


def relative_error(model: torch.nn.Module, frames: Array, shape: ForecasterSize) -> float:
    """Return the mean relative L2 error (as a share of the truth's norm) of the last forecast of the rollout,
    over the windows of the held-out trajectories ``frames`` that start at every third frame."""
    windows, errors = _test_windows(frames, shape.rollout), []
    with evaluating(model) as device:
        for part in full_parts(windows, EVALUATED_AT_ONCE):
            fields = _on_grid(part, shape)
            errors += _errors(model, fields.to(device))[:, -1].tolist()
    return float(np.mean(errors))


def _test_windows(frames: Array, rollout: int) -> Array:
    """Return the windows of ``rollout`` + 1 frames of each trajectory in ``frames`` that start at every third
    frame, from frame 0: (windows, rollout + 1, rows, columns)."""
    starts = range(0, frames.shape[1] - rollout, _TEST_STRIDE)
    return np.concatenate([frames[:, a : a + rollout + 1] for a in starts])


def metric(fields: Fields, rollout: int) -> Metric:
    """Return the metric, the relative L2 error of the last forecast of the rollout; lower is better.

    Its naive result takes as forecast the first field times one factor, that with the least squared error on
    the training data. On these it is no worse than persistence (factor 1) or the climatological mean (factor
    0).
    """
    first, last = fields.train[:, :-rollout], fields.train[:, rollout:]
    factor = float((first * last).sum() / (first * first).sum())
    windows = _test_windows(fields.test, rollout)
    deviation = np.linalg.norm(windows[:, -1] - factor * windows[:, 0], axis=(1, 2))
    return Metric(
        name=f"relative L2 error after {rollout} steps",
        unit="",
        higher_is_better=False,
        margin=0.018,
        margin_source=(
            "two variants of FNO by the same authors reach 0.1559 and 0.1918 on Navier-Stokes at a viscosity "
            "of 1e-4 from 1,000 trajectories (Li et al. 2021, arXiv 2010.08895, table 1): half of their "
            "difference is no difference"
        ),
        naive=float(np.mean(deviation / np.linalg.norm(windows[:, -1], axis=(1, 2)))),
        naive_name=f"damped persistence (first field times {factor:.2f})",
    )
