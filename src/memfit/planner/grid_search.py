"""Find the best plans of a job for many devices: price grids from parts and keep the best of each grid."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy

from memfit.cost.collectives import collective_s
from memfit.cost.op_time import ASSUMED_ISSUE_S, ASSUMED_LINK_BYTES_S, TimeModel
from memfit.cost.stream_simulator import ASSUMED_HOST_BYTES_S, Player
from memfit.planner.block_traces import Key, Traced
from memfit.planner.grid_axes import Communicate, Given, Priced, Rates
from memfit.planner.grid_costs import price
from memfit.planner.layout_costs import Composer, LayoutCut
from memfit.planner.parallelism_grid import Grid, GridLayout, Limits, Uses, grids
from memfit.planner.selection import TIE_RATIO
from memfit.planner.sharding_costs import State, compute_of, state_of
from memfit.techniques.registry import effect_of, technique
from memfit.trace.trace_pool import side_by_side
from memfit.types.errors import UserError
from memfit.types.machine import Machine
from memfit.types.parts import Parts, Piece
from memfit.types.plan import Plan
from memfit.types.trace import OpCall, Phase

_KEPT_PER_GRID, _KEPT_PER_LAYOUT, _KEPT_TIED = 3, 3, 60
_BLAS_THREADS = 2  # the caller's thread and autograd's, each with its own BLAS handle
_LEVELS_PER_DOUBLING = 4  # memory levels per doubling; the best plan of each level is kept for the frontier
_WORTH = 0.005  # a relative gain in time below this adds no point to the frontier
_SHARES = 2  # number of shares of the grids that are priced in parallel
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
    """A priced plan of a grid. The plan itself is built on access to `plan`."""

    grid: Grid
    index: tuple[int, ...]
    step_s: float
    allocated_bytes: float
    host_bytes: float

    @property
    def plan(self) -> Plan:
        return self.grid.plan(self.index)


# grid, compute precision, and the grid's states in that precision
_Todo = list[tuple[Grid, str, tuple[Uses, ...]]]
_Picked = tuple[tuple[int, ...], float, float, float]  # a sketch without its grid


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridSketches:
    """Result of a grid search.

    ``sketches``: the best of every grid, by time under each memory level. ``considered``: number of distinct
    plans priced. ``refused``: ways in which the model cannot be cut, with the reason.
    """

    sketches: tuple[Sketch, ...]
    considered: int
    refused: tuple[str, ...]
    beside: Callable[[Sketch], list[Sketch]]  # plans of its grid that differ from it along one axis


Caps = tuple[float, float]  # highest bytes of a rank that fit: on the device, and in host memory


def find(traced: Traced, machine: Machine, model: TimeModel, limits: Limits, caps: Caps) -> GridSketches:
    """Price every plan of the grids and return the best.

    ``caps`` are the highest bytes with which a rank fits, on the device and in host memory. Raises UserError
    if there is no plan.
    """
    hoped = dataclasses.replace(limits, sharing=traced.sharing, vocabulary=max(limits.tensor) > 1)
    todo = _todo(machine, hoped)
    # in one call, because most models can be cut
    traced.trace(*_Pricing(traced, machine, model, hoped).needed(todo))
    limits, refused = _cuttable(traced, machine, limits)
    if limits != hoped:
        todo = _todo(machine, limits)
    if not todo:
        from memfit.planner.parallelism_grid import none_at_all

        raise none_at_all(limits)
    pricing = _Pricing(traced, machine, model, limits)
    traced.trace(*pricing.needed(todo))
    todo = [(pricing.traceable(grid, compute, refused), compute, states) for grid, compute, states in todo]
    grids_of = [
        (dataclasses.replace(grid, states=states), compute)
        for grid, compute, states in todo
        if grid.inside and grid.ends
    ]
    shares = [grids_of[at::_SHARES] for at in range(_SHARES)]
    best = side_by_side([functools.partial(pricing.best, share, caps) for share in shares])
    sketches, considered = list[Sketch](), 0
    for share, found in zip(shares, best, strict=True):
        for (grid, _), (plans, picked) in zip(share, found, strict=True):
            considered += plans
            sketches += [Sketch(grid, *one) for one in picked]
    sketches.sort(key=lambda s: (s.step_s, s.allocated_bytes))
    return GridSketches(
        sketches=tuple(_few(sketches, caps)),
        considered=considered,
        refused=tuple(refused),
        beside=pricing.beside,
    )


def _todo(machine: Machine, limits: Limits) -> _Todo:
    todo = [(grid, compute, states) for grid in grids(limits) for compute, states in _by_compute(grid)]
    return [t for t in todo if t[1] in _computes(machine, limits)]


def _computes(machine: Machine, limits: Limits) -> tuple[str, ...]:
    """Return the compute precisions to search.

    float32 is searched if the accuracy requires it, if the device has nothing narrower, and beside the
    narrower precisions if the techniques that provide them are excluded.
    """
    narrow = "bfloat16" in machine.device.peak_flops or machine.device.kind == "cpu"
    if not narrow or limits.effect < 2:
        return ("fp32",)
    left_out = {"bf16-autocast", "bf16-parameters"} <= limits.without
    return ("bf16", "autocast", "fp32") if left_out else ("bf16", "autocast")


def _by_compute(grid: Grid) -> Iterator[tuple[str, tuple[Uses, ...]]]:
    for compute in ("bf16", "autocast", "fp32"):
        states = tuple(s for s in grid.states if compute_of(s) == compute)
        if states:
            yield compute, states


def _cuttable(traced: Traced, machine: Machine, limits: Limits) -> tuple[Limits, list[str]]:
    """Return the limits reduced to degrees by which the model can be cut, found by cutting it, and the
    refusals.
    """
    compute, refused = _computes(machine, limits)[0], list[str]()

    def upto(degrees: Sequence[int], make: Callable[[int], Key]) -> tuple[int, ...]:
        for most in sorted((d for d in degrees if d > 1), reverse=True):
            traced.trace([make(most)])
            found = traced.kept[make(most)]
            if not isinstance(found, str):
                return tuple(d for d in degrees if most % d == 0)
            refused.append(found)
        return (1,)

    plain = Key(tensor=1, sequence=False, vocabulary="whole", context=1, compute=compute, uses=(), samples=1)
    cut = dict[str, Any](sequence=True, vocabulary="parallel-loss")
    tensor = upto(limits.tensor, lambda d: dataclasses.replace(plain, tensor=d, **cut))
    context = upto(limits.context, lambda d: dataclasses.replace(plain, context=d))
    shared = tensor != (1,)
    if not shared and len(limits.tensor) > 1:  # the size of the vocabulary may not be divisible
        cut["vocabulary"] = "whole"
        tensor = upto(limits.tensor, lambda d: dataclasses.replace(plain, tensor=d, **cut))
    found = dataclasses.replace(
        limits, tensor=tensor, context=context, sharing=traced.sharing, vocabulary=shared
    )
    return found, refused


class _Pricing:
    def __init__(self, traced: Traced, machine: Machine, model: TimeModel, limits: Limits) -> None:
        self.computes = _computes(machine, limits)
        self.composer = Composer(
            traced,
            lambda ops: model.total_s((o, 1) for o in ops),
            self.computes[0],
            max(limits.tensor),
            max(limits.context),
            vocabulary="parallel-loss" if limits.vocabulary else "whole",
        )
        self.traced = traced
        link = machine.host.device_bytes_s if machine.host else None
        blas = machine.device.blas_workspace_bytes
        self.rates = Rates(
            communicate=_communicator(machine),
            per_host=per_host(machine),
            host_bytes_s=link.value if link else ASSUMED_LINK_BYTES_S,
            host_update_bytes_s=ASSUMED_HOST_BYTES_S / per_host(machine),
            host_call_s=ASSUMED_ISSUE_S[Phase.BACKWARD],
            copied_bytes_s=_COPIED_BYTES / model.op_s(_COPY),
            workspace_bytes=_BLAS_THREADS * (blas.value if blas else 0.0),
            beside=Player(model=model, machine=machine, members={}).beside,
        )

    def needed(self, todo: _Todo) -> tuple[list[Key], list[Uses]]:
        """Return the traces and optimizer steps that pricing these grids needs."""
        inside, ends, updates, computes = (dict[Any, None]() for _ in range(4))
        for grid, compute, states in todo:
            inside |= dict.fromkeys(grid.inside)
            ends |= dict.fromkeys(grid.ends)
            updates |= dict.fromkeys(map(_updating, states))
            computes[compute] = None
        return list(self.composer.keys(tuple(inside), tuple(ends), tuple(computes))), list(updates)

    def traceable(self, grid: Grid, compute: str, refused: list[str]) -> Grid:
        """Return the grid without the recomputation, compilation and loss chunks that this model cannot be
        traced with.
        """

        def kept(axis: tuple[Uses, ...]) -> tuple[Uses, ...]:
            fine = []
            for uses in axis:
                try:
                    self.composer.block(GridLayout(ranks=1), compute, uses)
                except UserError as error:
                    told = f"{' + '.join(u.technique for u in uses) or 'plain training'}: {error}"
                    refused.extend([told] if told not in refused else [])
                else:
                    fine.append(uses)
            return tuple(fine)

        return dataclasses.replace(grid, inside=kept(grid.inside), ends=kept(grid.ends))

    def best(self, parts: Sequence[tuple[Grid, str]], caps: Caps) -> list[tuple[int, list[_Picked]]]:
        """Return (number of plans, the best of them) for each grid."""
        found = []
        for grid, compute in parts:
            priced = self.price(grid, compute)
            found.append((priced.step_s.size, _best(grid, priced, caps)) if priced else (0, []))
        return found

    def beside(self, sketch: Sketch) -> list[Sketch]:
        """Return the plans of the sketch's grid that differ from it along one axis."""
        grid, index = sketch.grid, sketch.index
        priced = self.price(grid, compute_of(grid.states[index[-1]]))
        assert priced is not None, "it was priced before"
        others = [
            (*index[:axis], at, *index[axis + 1 :])
            for axis, size in enumerate(grid.shape)
            for at in range(size)
            if at != index[axis]
        ]
        flat = (int(numpy.ravel_multi_index(one, grid.shape)) for one in others)
        return [Sketch(grid, *_picked(grid, priced, at)) for at in flat]

    def price(self, grid: Grid, compute: str) -> Priced | None:
        """Price the grid. Returns None if the model cannot run that way."""
        layout, composer = grid.layout, self.composer
        try:
            inside = [self._settled(layout, composer.block(layout, compute, u)) for u in grid.inside]
            ends = [self._settled(layout, composer.ends(layout, compute, u)) for u in grid.ends]
        except UserError:
            return None
        ranks, staged = layout.data * layout.context, layout.stages > 1
        states = [self._state(s, ranks, staged) for s in grid.states]
        cut = layout.context * (layout.tensor if layout.sequence else 1)
        given = Given(
            blocks=self.traced.blocks,
            tensors=self.traced.tensors,
            hidden_bytes=self.traced.hidden_bytes(self.computes[0]) / cut,
            inside=inside,
            ends=ends,
            states=states,
            averaged=self.traced.job.ema is not None,
        )
        return price(grid, given, self.rates)

    @functools.cache  # noqa: B019  lives as long as one search
    def _state(self, uses: Uses, ranks: int, staged: bool) -> State:
        return state_of(uses, ranks, self.composer.updating(_updating(uses)), staged=staged)

    def _settled(self, layout: GridLayout, cuts: Sequence[LayoutCut]) -> list[Parts]:
        """Return the parts with the time of their collectives added."""
        each = self.rates.per_host
        near = min(layout.tensor, each), min(layout.context, max(1, each // layout.tensor))

        def seconds(cut: LayoutCut, which: str, way: int) -> float:
            total = 0.0
            for travel, ranks, close in (
                (cut.tensor_travel, layout.tensor, near[0]),
                (cut.context_travel, layout.context, near[1]),
            ):
                total += sum(self.rates.communicate(k, b, ranks, close) for k, b in travel[which][way])
            return total

        def piece(cut: LayoutCut, which: str) -> Piece:
            one: Piece = getattr(cut.parts, which)
            return dataclasses.replace(
                one,
                forward_s=one.forward_s + seconds(cut, which, 0),
                backward_s=one.backward_s + seconds(cut, which, 1),
            )

        return [
            Parts(before=piece(c, "before"), block=piece(c, "block"), after=piece(c, "after")) for c in cuts
        ]


def _communicator(machine: Machine) -> Communicate:
    """Return a function for seconds of collectives. Scalar sizes are cached, because grids repeat them."""

    @functools.cache
    def known(kind: str, size_bytes: float, ranks: int, near: int) -> Any:
        return collective_s(kind, size_bytes, ranks, near, machine)

    def communicate(kind: str, size_bytes: Any, ranks: int, near: int) -> Any:
        if isinstance(size_bytes, float | int):
            return known(kind, size_bytes, ranks, near)
        return collective_s(kind, size_bytes, ranks, near, machine)

    return communicate


def per_host(machine: Machine) -> int:
    """Return the number of devices in one host."""
    return machine.devices_per_host or machine.device_count


def _updating(uses: Uses) -> Uses:
    """Return the techniques that decide the optimizer's step on one rank."""
    names = ("bf16-parameters", "bf16-autocast")
    kept = [u for u in uses if u.technique in names or technique(u.technique).slot == "optimizer"]
    return tuple(u for u in kept if u.technique != "bf16-autocast")


def _best(grid: Grid, priced: Priced, caps: Caps) -> list[_Picked]:
    """Pick plans of one grid.

    Among the plans whose host memory fits: the fastest that fit, the simplest that is as fast, and the
    fastest of each memory level. The smallest plan of all is added.
    """
    step, memory = priced.step_s.ravel(), priced.allocated_bytes.ravel()
    picked: dict[int, None] = {}
    held = priced.host_bytes.ravel() <= caps[1]
    inside = numpy.flatnonzero((memory <= caps[0]) & held)
    if inside.size:
        quickest = inside[numpy.argsort(step[inside], kind="stable")[:_KEPT_PER_GRID]]
        tied = inside[step[inside] <= step[quickest[0]] * (1 + TIE_RATIO)]
        simple = tied[numpy.argmin(_burden(grid).ravel()[tied])]
        picked |= dict.fromkeys([*map(int, quickest), int(simple)])
    level = numpy.floor(numpy.log2(numpy.maximum(memory, 1.0)) * _LEVELS_PER_DOUBLING).astype(int)
    pool = held if held.any() else ~held
    for one in numpy.unique(level[pool]):
        at = numpy.flatnonzero((level == one) & pool)
        picked[int(at[numpy.argmin(step[at])])] = None
    picked[int(numpy.argmin(memory))] = None
    return [_picked(grid, priced, at) for at in picked]


def _burden(grid: Grid) -> numpy.ndarray:
    """Return the complexity of each plan: its strongest effect on the numbers first, then its number of
    techniques.
    """
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


def _few(sketches: Sequence[Sketch], caps: Caps) -> list[Sketch]:
    """Reduce the sketches to those worth choosing from.

    Kept are the frontier of time and memory, the fastest and the smallest fitting plans of each layout, and
    fitting plans that are as fast as the fastest.
    """
    ordered = sorted(sketches, key=lambda s: (s.allocated_bytes, s.step_s))
    kept: list[Sketch] = []
    quickest = math.inf
    for one in ordered:
        if one.step_s < quickest * (1 - _WORTH):
            kept.append(one)
            quickest = one.step_s
    best: dict[Any, list[Sketch]] = {}
    fitting = [s for s in sketches if s.allocated_bytes <= caps[0] and s.host_bytes <= caps[1]]
    for one in fitting:
        at = one.grid.layout
        best.setdefault((at.tensor, at.context, at.stages, at.schedule), []).append(one)
    for group in best.values():
        group.sort(key=lambda s: (s.step_s, s.allocated_bytes))
        kept += group[:_KEPT_PER_LAYOUT]
        kept.append(min(group, key=lambda s: (s.allocated_bytes, s.step_s)))
    if fitting:
        limit = min(s.step_s for s in fitting) * (1 + TIE_RATIO)
        kept += [s for s in fitting if s.step_s <= limit][:_KEPT_TIED]
    return list({id(s): s for s in kept}.values())


def _picked(grid: Grid, priced: Priced, at: int) -> _Picked:
    index = tuple(int(i) for i in numpy.unravel_index(at, grid.shape))
    return (
        index,
        float(priced.step_s[index]),
        float(priced.allocated_bytes[index]),
        float(priced.host_bytes[index]),
    )
