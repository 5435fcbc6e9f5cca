"""Inputs of the predicted time and memory of all plans of a grid, and its axes as arrays of shape
(micro-batch, inside, ends, away, states), as in `Grid`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy

from memfit.cost.step_time import StorageRates
from memfit.planner.parallelism_grid import Grid, GridLayout, rank_blocks
from memfit.planner.sharding_costs import State
from memfit.types.parts import Parts

Array = Any  # of float64; broadcasting has no narrower static type
Communicate = Callable[[str, Any, int, int], Any]
"""(kind, bytes, ranks, ranks of them in one host) -> seconds"""

GATHERED: Final = {"bf16": 2, "autocast": 4, "fp32": 4}  # bytes per parameter that the forward pass reads
_SAMPLE_TIMES: Final = {"forward_s": "forward_sample_s", "backward_s": "backward_sample_s"}  # of `PartCosts`
_MICRO_SIZES: Final = (1, 2)  # traced micro-batch sizes; others lie on the line through them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridPredictions:
    """Predictions for all plans of a grid, as arrays of the grid's shape: seconds of a step, peak bytes on
    the device of the rank that needs most, and bytes in host memory of the rank that needs most.
    """

    step_s: Array
    allocated_bytes: Array
    host_bytes: Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speeds of the machine.

    ``communicate`` returns the seconds of a collective or of a point-to-point send, from its kind, bytes,
    number of ranks, and how many of these are in one host. ``per_host``: number of devices in one host. Rates
    in bytes per second: ``host_bytes_s``, of copies between one device and its host's memory;
    ``host_update_bytes_s``, at which the optimizer of one rank reads and writes host memory. ``storage``:
    those of local storage for one rank, None if unknown.
    """

    communicate: Communicate
    per_host: int
    host_bytes_s: float
    host_update_bytes_s: float
    host_call_s: float  # overhead of starting a copy or an operator of the host's optimizer
    copied_bytes_s: float  # bytes read plus bytes written by plain copies on the device
    workspace_bytes: float  # of BLAS, taken from the allocator
    # time of a kernel that runs beside a collective, over its time alone: the collective takes
    # multiprocessors
    kernel_slowdown: float
    storage: StorageRates | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridInputs:
    """Inputs from which time and memory of the plans of a grid, all of one compute precision, are computed.

    The axes are those of `Grid`: ``inside``, what changes a block's forward and backward (recomputation,
    compilation, float8 layers), and ``ends``, whether the loss is computed in chunks. ``inside[i]`` holds the
    costs of the model's pieces (`Parts`) under the i-th value of its axis: those for a micro-batch of one
    sample, and, if they are known, those for two samples. ``ends[i]`` is the same for its axis. ``states``:
    one entry for each value of the axis of that name.
    """

    blocks: int
    tensors: int  # number of trainable tensors in the whole model
    hidden_bytes: float  # of the hidden state between two blocks, for one sample
    inside: Sequence[Sequence[Parts]]
    ends: Sequence[Sequence[Parts]]
    states: Sequence[State]
    averaged: bool = False  # whether the loop keeps an averaged copy of the weights
    expert_elements: float = 0.0  # of one block's experts on one rank, under expert parallelism


def _line(parts: Sequence[Parts], which: str, field: str, sizes: Array) -> Array:
    """Return the number ``field`` of the piece ``which`` ("before", "block" or "after") for each micro-batch
    size of ``sizes``.

    ``parts``: those for one sample and, if it is known, for two. The number lies on the line through these,
    and is at least 0. If only that for one sample is known, it is proportional to the size. Seconds are at
    least the size times those that each sample adds in a large micro-batch.
    """
    single = getattr(parts[0], which)
    single_value = float(getattr(single, field))
    if len(parts) == 1:
        return single_value * sizes
    double_value = float(getattr(getattr(parts[1], which), field))
    slope = (double_value - single_value) / (_MICRO_SIZES[1] - _MICRO_SIZES[0])
    least = sizes * getattr(single, _SAMPLE_TIMES[field]) if field in _SAMPLE_TIMES else 0.0
    value: Array = numpy.maximum(single_value + slope * (sizes - _MICRO_SIZES[0]), least)
    return value


class Axes:
    """Inputs of a grid's predictions as arrays with the axes (micro, inside, ends, away, states), shaped to
    broadcast: axes on which an input does not depend have length 1.
    """

    def __init__(self, inputs: GridInputs, grid: Grid) -> None:
        self.sizes = numpy.array([float(b) for b, _ in grid.micro])
        self.counts = numpy.array([float(m) for _, m in grid.micro]).reshape(-1, 1, 1, 1, 1)
        self.inputs = inputs

    def inside(self, field: str) -> Array:
        rows = [_line(parts, "block", field, self.sizes) for parts in self.inputs.inside]
        return numpy.array(rows).T.reshape(len(self.sizes), -1, 1, 1, 1)

    def ends(self, which: str, field: str) -> Array:
        rows = [_line(parts, which, field, self.sizes) for parts in self.inputs.ends]
        return numpy.array(rows).T.reshape(len(self.sizes), 1, -1, 1, 1)

    def states(self, value: Callable[[State], float]) -> Array:
        return numpy.array([float(value(s)) for s in self.inputs.states]).reshape(1, 1, 1, 1, -1)

    def hidden(self) -> Array:
        return (self.inputs.hidden_bytes * self.sizes).reshape(-1, 1, 1, 1, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Numbers of trainable parameter elements on one rank before they are sharded over data-parallel ranks:
    of one block, of what lies before all blocks, and of what lies after them. ``expert``: those of one block
    that are on this rank only, because experts are distributed; they are never sharded.
    """

    block: float
    before: float
    after: float
    expert: float = 0.0


def depths(blocks: int, layout: GridLayout) -> tuple[int, ...]:
    """Return the number of blocks on each pipeline rank, in all of its virtual stages together; all blocks if
    there is no pipeline. ``blocks``: number of blocks of the model. Raises UserError if a stage would get
    none.
    """
    return rank_blocks(blocks, layout.stages, layout.virtual, layout.schedule, layout.fewer)
