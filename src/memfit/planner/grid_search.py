"""Find the best plans of a job for many devices: predict time and memory of all plans of a grid at once, from
traces of parts of the model, and keep the best of each grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy

from memfit.cost.collectives import collective_s
from memfit.cost.device_overhead import device_overhead
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.cost.op_time import ASSUMED_ISSUE_S, ASSUMED_LINK_BYTES_S, TimeModel
from memfit.cost.step_time import storage_rates
from memfit.cost.stream_simulator import ASSUMED_HOST_BYTES_S, StreamSimulator
from memfit.planner.block_traces import BlockTracer, Key
from memfit.planner.grid_axes import Communicate, GridInputs, GridPredictions, Rates
from memfit.planner.grid_costs import predict
from memfit.planner.layout_costs import Composer, LayoutCut
from memfit.planner.parallelism_grid import (
    DIVIDING_TECHNIQUES,
    QUICK_BLOCKS,
    Grid,
    GridLayout,
    Limits,
    Uses,
    grids,
    no_grid_error,
)
from memfit.planner.selection import TIE_RATIO
from memfit.planner.sharding_costs import State, compute_of, state_of
from memfit.techniques.rank_mesh import Layout
from memfit.techniques.registry import effect_of, technique
from memfit.trace.trace_pool import run_parallel
from memfit.types.errors import UserError
from memfit.types.machine import Machine
from memfit.types.parts import PartCosts, Parts
from memfit.types.plan import Plan
from memfit.types.trace import OpCall, Phase

_KEPT_PER_GRID, _KEPT_PER_LAYOUT, _KEPT_TIED = 3, 3, 60
_NOT_ON_HOST = 1e9  # factor on peaks by which plans that do not fit host memory come after all that do
_ALL_KEPT = 400  # of so few plans, all are kept
_KEPT_SMALLEST = 4  # of the plans with a technique, and of those without it
_BLAS_THREADS = 2  # the caller's thread and autograd's, each with its own BLAS handle
_LEVELS_PER_DOUBLING = 4  # memory levels per doubling; the best plan of each level is kept for the frontier
LEVEL_RATIO = 2 ** (1 / _LEVELS_PER_DOUBLING)  # highest over lowest memory of a level
_WORTH = 0.005  # a relative gain in time below this adds no point to the frontier
_SHARES = 2  # number of shares of the grids that are predicted in parallel
_COPIED_BYTES = 1 << 30
_COPY = OpCall(
    clock=0,
    op="aten.copy_.default",
    signature="",
    phase=Phase.FORWARD,
    step=0,
    module="",
    dtype="float32",
    flops=0,
    moved_bytes=_COPIED_BYTES,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sketch:
    """A plan of a grid, given by its index along each axis, with its predicted step time, its peak bytes on
    the device of the rank that needs most, and its bytes in host memory of the rank that needs most. The plan
    itself is built on access to `plan`.
    """

    grid: Grid
    index: tuple[int, ...]
    step_s: float
    allocated_bytes: float
    host_bytes: float

    @property
    def plan(self) -> Plan:
        return self.grid.plan(self.index)


# grid, compute precision, and the grid's states in that precision
_Tasks = list[tuple[Grid, str, tuple[Uses, ...]]]
_SketchFields = tuple[tuple[int, ...], float, float, float]  # a sketch without its grid
_Extremes = dict[tuple[str, bool], list[_SketchFields]]  # by (technique, whether the plans have it)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridSketches:
    """Result of a search over grids for one number of devices.

    ``sketches``: the plans that `find` selects, in no particular order. ``extremes``: (technique, whether
    plans have it) -> of all predicted plans with it, or without it: the fastest one that fits, if there is
    one, and those that need the least device memory in their grids (the least first, at most 4), of the ones
    that fit host memory if there are any. ``considered``: number of plans whose time and memory were
    predicted. ``picks``: of each grid, the plans from which ``sketches`` are selected: among others the
    fastest in each interval of device memory, and all of at most 400 plans. ``refused``: a text for each
    degree by which the model cannot be divided and each technique that it cannot be traced with, which says
    why.
    """

    sketches: tuple[Sketch, ...]
    extremes: Mapping[tuple[str, bool], tuple[Sketch, ...]]  # by (technique, whether the plans have it)
    considered: int
    refused: tuple[str, ...]
    picks: tuple[Sketch, ...]
    neighbours: Callable[[Sketch], list[Sketch]]  # plans of its grid that differ from it along one axis
    predict: Callable[[Grid], GridPredictions]  # predictions for all plans of a grid of the picks


# (compute precision, techniques of an axis) -> why the model cannot be traced with them, "" if it can
Attempts = dict[tuple[str, Uses], str]
_PRECISIONS = {"bf16": "bfloat16", "autocast": "autocast", "fp32": "float32"}

# highest bytes of a rank that fit: of tensors on a device without buffers of NCCL, and in host memory
Caps = tuple[float, float]


def find(traced: BlockTracer, machine: Machine, model: TimeModel, limits: Limits, caps: Caps) -> GridSketches:
    """Predict time and memory of every plan of the grids that ``limits`` allow, and return sketches of a
    selection: plans with these predictions.

    Of at most 400 plans, all are kept. Of more, the selection is made in two steps: in each grid
    (`_select_in_grid`), then among all of these (`_select`): the frontier of memory and time, also of plans
    that do not fit; of each layout the fastest and the smallest that fit; and those at most 3 % slower than
    the fastest that fits. Degrees by which the model cannot be divided are left out, and so are techniques
    that it cannot be traced with.

    ``model`` predicts the seconds of operators. ``caps``: the highest (bytes on the device, bytes in host
    memory) with which a rank fits; from the first, the buffers of each layout's communicators are subtracted
    (`buffers_bytes`). Raises UserError if no plan is possible (`no_grid_error`).
    """
    predictor, grid_precisions, refusals = grids_to_predict(traced, machine, model, limits)
    shares = [grid_precisions[offset::_SHARES] for offset in range(_SHARES)]
    keeps_all = sum(math.prod(grid.shape) for grid, _ in grid_precisions) <= _ALL_KEPT
    share_results = run_parallel(
        [functools.partial(predictor.best, share, caps, keeps_all) for share in shares]
    )
    sketches, considered = list[Sketch](), 0
    extremes = list[tuple[Grid, _Extremes]]()
    for share, results in zip(shares, share_results, strict=True):
        for (grid, _), (plan_count, picks, grid_extremes) in zip(share, results, strict=True):
            considered += plan_count
            sketches += [Sketch(grid, *pick) for pick in picks]
            extremes += [(grid, grid_extremes)] if plan_count else []
    sketches.sort(key=lambda s: (s.step_s, s.allocated_bytes))

    def fits(sketch: Sketch) -> bool:
        device_cap, host_cap = predictor.caps_of(sketch.grid, caps)
        return sketch.allocated_bytes <= device_cap and sketch.host_bytes <= host_cap

    return GridSketches(
        sketches=tuple(sketches if keeps_all else _select(sketches, fits)),
        extremes=_merge_extremes(extremes, fits, caps[1]),
        considered=considered,
        refused=tuple(refusals),
        picks=tuple(sketches),
        neighbours=predictor.neighbours,
        predict=predictor.runnable_predictions,
    )


def grids_to_predict(
    traced: BlockTracer, machine: Machine, model: TimeModel, limits: Limits
) -> tuple[_GridPredictor, list[tuple[Grid, str]], list[str]]:
    """Return (what predicts the plans of a grid; [(grid, compute precision)] of all plans that ``limits`` and
    the model allow; texts that say by which degrees and techniques the model cannot be divided or traced, and
    why).

    ``model`` predicts the seconds of operators. Raises UserError if ``limits`` allow no grid.
    """
    optimistic_limits = dataclasses.replace(limits, sharing=traced.sharing, vocabulary=max(limits.tensor) > 1)
    tasks = _make_tasks(machine, optimistic_limits)
    # in one call, because most models can be cut
    traced.trace(*_GridPredictor(traced, machine, model, optimistic_limits).needed(tasks))
    limits, refusals = _divisible_limits(traced, machine, limits)
    limits = _with_ends(traced, model, limits, _computes(machine, limits)[0])
    if limits != optimistic_limits:
        tasks = _make_tasks(machine, limits)
    if not tasks:
        raise no_grid_error(limits)
    predictor = _GridPredictor(traced, machine, model, limits)
    traced.trace(*predictor.needed(tasks))
    attempts: Attempts = {}
    tasks = [
        (predictor.traceable(grid, compute, attempts), compute, states) for grid, compute, states in tasks
    ]
    refusals += untraceable_texts(attempts)
    grid_precisions = [
        (dataclasses.replace(grid, states=states), compute)
        for grid, compute, states in tasks
        if grid.inside and grid.ends
    ]
    return predictor, grid_precisions, refusals


def untraceable_texts(attempts: Attempts) -> list[str]:
    """Return one text for each set of techniques that the model cannot be traced with, which says why. If the
    model can be traced with them in another precision, with other settings or together with further
    techniques, the text says in which precision, with which settings or without which techniques it cannot.
    """
    traced = [key for key, error in attempts.items() if not error]
    texts = dict[str, None]()
    for (compute, uses), error in attempts.items():
        if not error:
            continue
        names = _names(uses)
        alike = [_names(other) for precision, other in traced if precision == compute]
        label = Plan(uses=uses).label if names in alike else " + ".join(sorted(names)) or "plain training"
        further = sorted(frozenset[str]().union(*(other for other in alike if other > names)) - names)
        where = f" in {_PRECISIONS[compute]}" if any(other == uses for _, other in traced) else ""
        where += f" without {', '.join(further)}" if further else ""
        texts[f"{label} cannot be traced with this model{where}: {error}"] = None
    return [*texts]


def _names(uses: Uses) -> frozenset[str]:
    return frozenset(use.technique for use in uses)


def _with_ends(traced: BlockTracer, model: TimeModel, limits: Limits, compute: str) -> Limits:
    """Return the limits with ``ends``: the times of what lies before and after all blocks, each divided by
    that of one block, without any technique. Return them unchanged if that cannot be traced."""
    key = Key(tensor=1, sequence=False, vocabulary="whole", context=1, compute=compute, uses=(), samples=1)
    try:
        parts = traced.parts(key, lambda ops: model.total_s((o, o.times) for o in ops))
    except UserError:
        return limits
    block_s, *end_s = (p.forward_s + p.backward_s for p in (parts.block, parts.before, parts.after))
    return dataclasses.replace(limits, ends=(end_s[0] / block_s, end_s[1] / block_s)) if block_s else limits


def _make_tasks(machine: Machine, limits: Limits) -> _Tasks:
    computes = _computes(machine, limits)
    return [
        (grid, compute, states)
        for grid in grids(limits)
        for compute in ("bf16", "autocast", "fp32")
        if compute in computes
        if (states := tuple(s for s in grid.states if compute_of(s) == compute))
    ]


def _computes(machine: Machine, limits: Limits) -> tuple[str, ...]:
    """Return the compute precisions to search.

    They are ("fp32",) if the accuracy does not allow lower ones (``limits.effect`` below E2), or if the
    device is an accelerator without bfloat16. Otherwise they are ("bf16", "autocast"). "fp32" is added to
    these if the model has at most 12 blocks, as small models may be faster without casts; and if the
    techniques bf16-autocast and bf16-parameters are both excluded, though a data-parallel technique may
    compute in bfloat16 even then.
    """
    has_narrow = "bfloat16" in machine.device.peak_flops or machine.device.is_host
    if not has_narrow or limits.effect < 2:
        return ("fp32",)
    narrow_excluded = {"bf16-autocast", "bf16-parameters"} <= limits.without
    with_fp32 = narrow_excluded or limits.blocks <= QUICK_BLOCKS
    return ("bf16", "autocast", "fp32") if with_fp32 else ("bf16", "autocast")


def _divisible_limits(traced: BlockTracer, machine: Machine, limits: Limits) -> tuple[Limits, list[str]]:
    """Return (the limits with only those tensor and context degrees by which the model can be divided, and
    without experts if they cannot be distributed; texts that say which other divisions are impossible, and
    why).

    A trace with each degree is tried, largest first. The first one that works and the degrees of the limits
    that divide it are kept; (1,) if none works. ``sharing`` of the result is the technique that fits the
    model. ``vocabulary`` says whether tensor-parallel ranks can divide the vocabulary; if they cannot with
    any degree, the degrees are those that work with the whole vocabulary on every rank.
    """
    compute, refusals = _computes(machine, limits)[0], list[str]()
    if not traced.is_single_chain:
        refusals.append(
            "pipeline and context parallelism are not modelled for this model, whose blocks are several "
            "chains, such as an encoder and a decoder, or not all alike"
        )

    def upto(degrees: Sequence[int], make: Callable[[int], Key]) -> tuple[int, ...]:
        for largest_degree in sorted((d for d in degrees if d > 1), reverse=True):
            traced.trace([make(largest_degree)])
            outcome = traced.outcomes[make(largest_degree)]
            if not isinstance(outcome, str):
                return tuple(d for d in degrees if largest_degree % d == 0)
            refusals.append(outcome)
        return (1,)

    uncut_key = Key(
        tensor=1, sequence=False, vocabulary="whole", context=1, compute=compute, uses=(), samples=1
    )
    cut_settings = dict[str, Any](sequence=True, vocabulary="parallel-loss")
    tensor = upto(limits.tensor, lambda d: dataclasses.replace(uncut_key, tensor=d, **cut_settings))
    context = upto(limits.context, lambda d: dataclasses.replace(uncut_key, context=d))
    vocabulary_shared = tensor != (1,)
    if not vocabulary_shared and len(limits.tensor) > 1:  # the size of the vocabulary may not be divisible
        cut_settings["vocabulary"] = "whole"
        tensor = upto(limits.tensor, lambda d: dataclasses.replace(uncut_key, tensor=d, **cut_settings))
    experts = limits.experts
    if limits.expert_degree > 1:
        key = dataclasses.replace(uncut_key, experts=limits.expert_degree)
        traced.trace([key])
        if isinstance(refusal := traced.outcomes[key], str):
            refusals.append(refusal)
            experts = 0
    elif experts and limits.ranks > 1 and "expert-parallel" not in limits.without:
        refusals.append(
            f"expert-parallel on {limits.ranks} devices is not modelled: memfit distributes experts over all "
            f"data-parallel ranks, without other parallelism, and {experts} experts cannot be shared equally "
            f"by {limits.ranks} ranks"
        )
    outcome = dataclasses.replace(
        limits,
        tensor=tensor,
        context=context,
        sharing=traced.sharing,
        vocabulary=vocabulary_shared,
        experts=experts,
    )
    return outcome, refusals


class _GridPredictor:
    def __init__(self, traced: BlockTracer, machine: Machine, model: TimeModel, limits: Limits) -> None:
        self.computes = _computes(machine, limits)
        self.composer = Composer(
            traced,
            lambda ops: model.total_s((o, o.times) for o in ops),
            self.computes[0],
            max(limits.tensor),
            max(limits.context),
            vocabulary="parallel-loss" if limits.vocabulary else "whole",
            experts=limits.expert_degree,
        )
        self.traced, self.machine = traced, machine
        link = machine.host.device_bytes_s if machine.host else None
        blas = machine.device.blas_workspace_bytes
        self.rates = Rates(
            communicate=_communicator(machine),
            per_host=machine.devices_in_host,
            host_bytes_s=link.value if link else ASSUMED_LINK_BYTES_S,
            host_update_bytes_s=ASSUMED_HOST_BYTES_S / machine.devices_in_host,
            host_call_s=ASSUMED_ISSUE_S[Phase.BACKWARD],
            copied_bytes_s=_COPIED_BYTES / model.op_s(_COPY),
            workspace_bytes=_BLAS_THREADS * (blas.value if blas else 0.0),
            storage=storage_rates(machine, model, min(machine.devices_in_host, limits.ranks)),
            kernel_slowdown=StreamSimulator(model=model, machine=machine, members={}).kernel_slowdown,
        )

    def needed(self, tasks: _Tasks) -> tuple[list[Key], list[Uses]]:
        """Return (keys of the small traces, sets of techniques under which the optimizer's step is traced)
        for all traces that the predictions of these grids are composed from.
        """
        inside, ends, updates, computes = (dict[Any, None]() for _ in range(4))
        for grid, compute, states in tasks:
            inside |= dict.fromkeys(grid.inside)
            ends |= dict.fromkeys(grid.ends)
            updates |= dict.fromkeys(map(_update_uses, states))
            computes[compute] = None
        return list(self.composer.keys(tuple(inside), tuple(ends), tuple(computes))), list(updates)

    def traceable(self, grid: Grid, compute: str, attempts: Attempts) -> Grid:
        """Return the grid without those values of its axes ``inside`` (recomputation, compilation, float8
        layers) and ``ends`` (loss in chunks) that this model cannot be traced with. Either axis may then be
        empty. The outcome for each value is added to ``attempts``.
        """

        layout = GridLayout(ranks=1, experts=grid.layout.experts)

        def traceable_values(axis: tuple[Uses, ...]) -> tuple[Uses, ...]:
            values = []
            for uses in axis:
                try:
                    self.composer.block(layout, compute, uses)
                except UserError as error:
                    attempts[compute, uses] = str(error)
                else:
                    attempts.setdefault((compute, uses), "")
                    values.append(uses)
            return tuple(values)

        return dataclasses.replace(
            grid, inside=traceable_values(grid.inside), ends=traceable_values(grid.ends)
        )

    def best(
        self, parts: Sequence[tuple[Grid, str]], caps: Caps, keeps_all: bool
    ) -> list[tuple[int, list[_SketchFields], _Extremes]]:
        """Return, for each (grid, compute precision) of ``parts``: (number of its plans; the plans that
        `_select_in_grid` selects, or all if ``keeps_all``; for each technique the fastest and the smallest
        plans with and without it, as `_extremes` returns them); (0, [], {}) if the model cannot run with the
        grid's layout."""
        results = list[tuple[int, list[_SketchFields], _Extremes]]()
        for grid, compute in parts:
            predictions = self.predict(grid, compute)
            own_caps = self.caps_of(grid, caps)
            if predictions is None:
                results.append((0, [], {}))
                continue
            every = (
                [sketch_fields(grid, predictions, i) for i in range(predictions.step_s.size)]
                if keeps_all
                else []
            )
            picks = every or _select_in_grid(grid, predictions, own_caps)
            results.append((predictions.step_s.size, picks, _extremes(grid, predictions, own_caps)))
        return results

    def caps_of(self, grid: Grid, caps: Caps) -> Caps:
        """Return (the bytes on the device, less the buffers of the communicators of the grid's layout; the
        bytes in host memory) of ``caps``."""
        return caps[0] - self._buffers_bytes(grid.layout), caps[1]

    @functools.cache  # noqa: B019  lives as long as one search
    def _buffers_bytes(self, layout: GridLayout) -> float:
        return buffers_bytes(self.machine, layout)

    def neighbours(self, sketch: Sketch) -> list[Sketch]:
        """Return sketches of all plans of the sketch's grid that differ from it along exactly one axis."""
        grid, index = sketch.grid, sketch.index
        predictions = self.runnable_predictions(grid)
        neighbours = [
            (*index[:axis], position, *index[axis + 1 :])
            for axis, size in enumerate(grid.shape)
            for position in range(size)
            if position != index[axis]
        ]
        flat_indices = (int(numpy.ravel_multi_index(neighbour, grid.shape)) for neighbour in neighbours)
        return [Sketch(grid, *sketch_fields(grid, predictions, position)) for position in flat_indices]

    def runnable_predictions(self, grid: Grid) -> GridPredictions:
        """Return the predictions for the grid (`predict`). The model must be able to run with the grid's
        layout; else an assertion fails."""
        predictions = self.predict(grid, compute_of(grid.states[0]))
        assert predictions is not None, "the model runs with this layout"
        return predictions

    def predict(self, grid: Grid, compute: str) -> GridPredictions | None:
        """Return the predicted step time and memory of every plan of the grid in this compute precision; None
        if the model cannot run with the grid's layout.
        """
        layout, composer = grid.layout, self.composer
        try:
            inside = [self._with_collectives(layout, composer.block(layout, compute, u)) for u in grid.inside]
            ends = [self._with_collectives(layout, composer.ends(layout, compute, u)) for u in grid.ends]
            hidden_bytes = self.traced.hidden_bytes("fp32" if compute == "fp32" else self.computes[0])
        except UserError:
            return None
        ranks, staged = layout.data * layout.context, layout.stages > 1
        states = [self._state(s, ranks, staged) for s in grid.states]
        cut_degree = layout.context * (layout.tensor if layout.sequence else 1)
        inputs = GridInputs(
            blocks=self.traced.blocks,
            tensors=self.traced.tensors,
            hidden_bytes=hidden_bytes / cut_degree,
            inside=inside,
            ends=ends,
            states=states,
            averaged=self.traced.job.ema is not None,
            expert_elements=self.traced.expert_elements / layout.experts * (layout.experts > 1),
        )
        return predict(grid, inputs, self.rates)

    @functools.cache  # noqa: B019  lives as long as one search
    def _state(self, uses: Uses, ranks: int, staged: bool) -> State:
        return state_of(uses, ranks, self.composer.update_costs(_update_uses(uses)), staged=staged)

    def _with_collectives(self, layout: GridLayout, cuts: Sequence[LayoutCut]) -> list[Parts]:
        """Return the parts of each layout cut, with the time of its tensor-, context- and expert-parallel
        collectives added to its forward and backward.
        """
        devices_per_host = self.rates.per_host
        near_ranks = (
            min(layout.tensor, devices_per_host),
            min(layout.context, max(1, devices_per_host // layout.tensor)),
        )

        def seconds(cut: LayoutCut, which: str, way: int) -> float:
            total_s = 0.0
            for transfers, ranks, near_count in (
                (cut.tensor_travel, layout.tensor, near_ranks[0]),
                (cut.context_travel, layout.context, near_ranks[1]),
                (cut.expert_travel, layout.experts, min(layout.experts, devices_per_host)),
            ):
                total_s += sum(
                    self.rates.communicate(k, b, ranks, near_count) for k, b in transfers[which][way]
                )
            return total_s

        def piece(cut: LayoutCut, which: str) -> PartCosts:
            base: PartCosts = getattr(cut.parts, which)
            more_s = [seconds(cuts[-1], which, way) - seconds(cuts[0], which, way) for way in (0, 1)]
            return dataclasses.replace(
                base,
                forward_s=base.forward_s + seconds(cut, which, 0),
                backward_s=base.backward_s + seconds(cut, which, 1),
                forward_sample_s=base.forward_sample_s and base.forward_sample_s + more_s[0],
                backward_sample_s=base.backward_sample_s and base.backward_sample_s + more_s[1],
            )

        return [
            Parts(before=piece(c, "before"), block=piece(c, "block"), after=piece(c, "after")) for c in cuts
        ]


def buffers_bytes(machine: Machine, layout: GridLayout) -> float:
    """Return by how many bytes the peak of tensors must be lower than without communicators, so that the
    buffers of NCCL for those of this layout fit, too, at the upper end; 0 if their size is unknown."""
    mesh = Layout(pipeline=layout.stages, shard=layout.data, context=layout.context, tensor=layout.tensor)
    groups = [("", ranks) for ranks in mesh.communicators]
    totals = [device_overhead(machine.device, g).total_bytes for g in (groups, ())]
    if totals[0] is None or totals[1] is None:
        return 0.0
    return (totals[0].high - totals[1].high) / ASSUMED_RESERVED_RATIO


def _communicator(machine: Machine) -> Communicate:
    """Return the function (kind of collective, bytes, ranks, ranks of them in one host) -> seconds for this
    machine. Results for scalar sizes are cached, because grids repeat them.
    """

    @functools.cache
    def known(kind: str, size_bytes: float, ranks: int, near: int) -> Any:
        return collective_s(kind, size_bytes, ranks, near, machine)

    def communicate(kind: str, size_bytes: Any, ranks: int, near: int) -> Any:
        if isinstance(size_bytes, float | int):
            return known(kind, size_bytes, ranks, near)
        return collective_s(kind, size_bytes, ranks, near, machine)

    return communicate


def _update_uses(uses: Uses) -> Uses:
    """Return those of the techniques that decide the optimizer's step on one rank: bf16-parameters and
    another optimizer.
    """
    return tuple(
        u for u in uses if u.technique == "bf16-parameters" or technique(u.technique).slot == "optimizer"
    )


def _select_in_grid(grid: Grid, predictions: GridPredictions, caps: Caps) -> list[_SketchFields]:
    """Return a selection of the plans of one grid. ``caps``: the highest (bytes on the device, bytes in host
    memory) of a rank that fit.

    - Of the plans that fit both: the three fastest, and the simplest of those that are at most 3 % slower
      than the fastest.
    - Of the plans that fit host memory (of all, if none does): the fastest in each interval of device memory.
      There are four intervals per doubling of memory.
    - Of all plans, whether they fit or not: the one that needs the least device memory.

    A plan that is selected for several reasons is in the list once.
    """
    step, memory = predictions.step_s.ravel(), predictions.allocated_bytes.ravel()
    picks: dict[int, None] = {}
    host_fits = predictions.host_bytes.ravel() <= caps[1]
    fitting = numpy.flatnonzero((memory <= caps[0]) & host_fits)
    if fitting.size:
        fastest = fitting[numpy.argsort(step[fitting], kind="stable")[:_KEPT_PER_GRID]]
        ties = fitting[step[fitting] <= step[fastest[0]] * (1 + TIE_RATIO)]
        simplest = ties[numpy.argmin(_burden(grid).ravel()[ties])]
        picks |= dict.fromkeys([*map(int, fastest), int(simplest)])
    levels = numpy.floor(numpy.log2(numpy.maximum(memory, 1.0)) * _LEVELS_PER_DOUBLING).astype(int)
    candidates = host_fits if host_fits.any() else ~host_fits
    for level in numpy.unique(levels[candidates]):
        flat_index = numpy.flatnonzero((levels == level) & candidates)
        picks[int(flat_index[numpy.argmin(step[flat_index])])] = None
    picks[int(numpy.argmin(memory))] = None
    return [sketch_fields(grid, predictions, flat_index) for flat_index in picks]


def _extremes(grid: Grid, predictions: GridPredictions, caps: Caps) -> _Extremes:
    """Return {(technique, whether plans have it): plans} for each technique of the grid's plans: of the plans
    with it, or without it, the fastest that fits, if there is one, and the one that needs the least device
    memory, of those that fit host memory if there are any. The key ("", False) stands for all plans of the
    grid. ``caps``: the highest (bytes on the device, bytes in host memory) of a rank that fit."""
    host_fits = predictions.host_bytes <= caps[1]
    fitting = (predictions.allocated_bytes <= caps[0]) & host_fits
    orders = (
        numpy.where(fitting, predictions.step_s, math.inf),
        predictions.allocated_bytes * numpy.where(host_fits, 1.0, _NOT_ON_HOST),
    )
    axes = range(len(grid.shape))
    lowest = [[order.min(axis=tuple(a for a in axes if a != axis)) for axis in axes] for order in orders]

    def picks(axis: int, positions: Sequence[int]) -> list[_SketchFields]:
        """Return, of the plans at these positions of an axis, the fastest that fits, if one does, and the one
        that needs the least device memory, of those that fit host memory if there are any; only one if they
        are the same."""
        indices = dict[tuple[int, ...], None]()
        for order, by_axis in zip(orders, lowest, strict=True):
            position = min(positions, key=lambda i: float(by_axis[axis][i]))
            if by_axis[axis][position] < math.inf:
                slab = numpy.take(order, position, axis)
                place = [int(i) for i in numpy.unravel_index(int(numpy.argmin(slab)), slab.shape)]
                indices[*place[:axis], position, *place[axis:]] = None
        return [
            sketch_fields(grid, predictions, int(numpy.ravel_multi_index(i, grid.shape))) for i in indices
        ]

    extremes: _Extremes = {("", False): picks(0, range(grid.shape[0]))}
    for name, axis, indices in _axis_positions(grid):
        for has in (True, False):
            positions = [i for i in range(grid.shape[axis]) if (i in indices) == has]
            if positions:
                extremes[name, has] = picks(axis, positions)
    return extremes


def _axis_positions(grid: Grid) -> Iterator[tuple[str, int, set[int]]]:
    """Yield (technique, axis of the grid, indices along it whose plans have the technique) for each technique
    that some or all plans of the grid have, except those of its layout."""
    if grid.layout.stages == 1:
        split = {i for i, (_, count) in enumerate(grid.micro) if count > 1}
        if split:
            yield "gradient-accumulation", 0, split
    for axis, values in enumerate((grid.inside, grid.ends, grid.away, grid.states), start=1):
        for name in dict.fromkeys(u.technique for uses in values for u in uses):
            yield name, axis, {i for i, uses in enumerate(values) if any(u.technique == name for u in uses)}


def _merge_extremes(
    extremes: Sequence[tuple[Grid, _Extremes]], fits: Callable[[Sketch], bool], host_cap: float
) -> Mapping[tuple[str, bool], tuple[Sketch, ...]]:
    """Return {(technique, whether plans have it): sketches} over all grids, from the ``extremes`` of each: of
    those of all grids, the fastest that fits, if there is one, and the four that need the least device
    memory. A key without sketches is left out."""
    layouts = {
        id(grid): {u.technique for u in grid.plan((0,) * 5).uses if u.technique in DIVIDING_TECHNIQUES}
        for grid, _ in extremes
    }
    names = {name for _, by_name in extremes for name, _ in by_name if name}.union(*layouts.values())
    merged: dict[tuple[str, bool], tuple[Sketch, ...]] = {}
    for name in sorted(names):
        for has in (True, False):
            sketches = list[Sketch]()
            for grid, by_name in extremes:
                if (name, True) in by_name or (name, False) in by_name:
                    picks = by_name.get((name, has), [])
                else:  # all plans of the grid have it, or none
                    picks = by_name["", False] if (name in layouts[id(grid)]) == has else []
                sketches += [Sketch(grid, *pick) for pick in picks]
            merged[name, has] = _ends_of(sketches, fits, host_cap)
    return {key: sketches for key, sketches in merged.items() if sketches}


def _ends_of(
    sketches: Sequence[Sketch], fits: Callable[[Sketch], bool], host_cap: float
) -> tuple[Sketch, ...]:
    """Return the fastest fitting sketch, if there is one, then the four that need the least device memory, of
    those that fit host memory if there are any.
    """
    fitting = list(filter(fits, sketches))
    on_host = [s for s in sketches if s.host_bytes <= host_cap] or sketches
    smallest = sorted(on_host, key=lambda s: (s.allocated_bytes, s.step_s))[:_KEPT_SMALLEST]
    fastest = [min(fitting, key=lambda s: (s.step_s, s.allocated_bytes))] if fitting else []
    return (*fastest, *smallest)


def _burden(grid: Grid) -> numpy.ndarray:
    """Return how far each plan is from plain training, as an array of the grid's shape: the sum, over all
    axes but ``micro``, of the number of techniques and 100 times their effect class (0 to 3)."""
    total = numpy.zeros(grid.shape)
    for axis, values in enumerate((grid.inside, grid.ends, grid.away, grid.states), start=1):
        weight = [_weight(u) for u in values]
        shape = [1] * len(grid.shape)
        shape[axis] = -1
        total = total + numpy.array(weight).reshape(shape)
    return total


@functools.cache
def _weight(uses: Uses) -> float:
    return len(uses) + 100.0 * int(effect_of(Plan(uses=uses)))


def _select(sketches: Sequence[Sketch], fits: Callable[[Sketch], bool]) -> list[Sketch]:
    """Return a selection of the sketches, each once:

    - The frontier of device memory and time, also of plans that do not fit. A plan that needs more memory
      must be faster by more than 0.5 %.
    - Of the fitting plans with each combination of tensor, context and pipeline degree and schedule, the
      three fastest and the one that needs the least device memory.
    - Of the fitting plans that are at most 3 % slower than the fastest of these, the first 60.
    """
    by_memory = sorted(sketches, key=lambda s: (s.allocated_bytes, s.step_s))
    selection: list[Sketch] = []
    fastest_s = math.inf
    for sketch in by_memory:
        if sketch.step_s < fastest_s * (1 - _WORTH):
            selection.append(sketch)
            fastest_s = sketch.step_s
    groups: dict[Any, list[Sketch]] = {}
    fitting = list(filter(fits, sketches))
    for sketch in fitting:
        layout = sketch.grid.layout
        groups.setdefault((layout.tensor, layout.context, layout.stages, layout.schedule), []).append(sketch)
    for group in groups.values():
        group.sort(key=lambda s: (s.step_s, s.allocated_bytes))
        selection += group[:_KEPT_PER_LAYOUT]
        selection.append(min(group, key=lambda s: (s.allocated_bytes, s.step_s)))
    if fitting:
        limit_s = min(s.step_s for s in fitting) * (1 + TIE_RATIO)
        selection += [s for s in fitting if s.step_s <= limit_s][:_KEPT_TIED]
    return list({id(s): s for s in selection}.values())


def sketch_fields(grid: Grid, predictions: GridPredictions, flat_index: int) -> _SketchFields:
    """Return (index along each axis, seconds of a step, peak bytes on the device, bytes in host memory) of
    the plan with this index in the grid's flattened arrays: the fields of a `Sketch` after its grid."""
    index = tuple(int(i) for i in numpy.unravel_index(flat_index, grid.shape))
    return (
        index,
        float(predictions.step_s[index]),
        float(predictions.allocated_bytes[index]),
        float(predictions.host_bytes[index]),
    )
