"""Every sensible plan for many devices, as grids: one or more for each layout (degrees of tensor, context and
pipeline parallelism), with the settings that its data-parallel ranks may have.

A grid has short lists along its axes; a plan is one index along each axis. Combinations that techniques or
the job's sizes forbid are never in a grid, so every index is a plan that can run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from memfit.planner.selection import TIE_RATIO
from memfit.techniques.parallel.stage_sizes import stage_sizes
from memfit.techniques.registry import conflict, effect_of, make_use, proposable, technique
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue, Plan, Use

Uses = tuple[Use, ...]
_MOST_FEWER = 8  # blocks that the first or the last stage may have fewer
QUICK_BLOCKS = 12  # of a model whose whole traces are quick, at most
_INDEPENDENT = SampleDependence(kind=DependenceKind.INDEPENDENT)
DIVIDING_TECHNIQUES = ("tensor-parallel", "context-parallel", "axial-parallel", "pipeline", "expert-parallel")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the job, the machine and the request allow in a search for ``ranks`` devices.

    ``batch``: samples per step over all ranks. ``per_host``: ranks in one host. ``blocks``: number of
    repeated blocks of the model. ``device``: torch's name of its kind, such as "cuda". ``tensor``,
    ``context``: degrees of tensor and context parallelism that the model can be cut by. ``sharing``: the
    technique by which context-parallel ranks divide each sample, "context-parallel" or "axial-parallel".
    ``pipeline``: whether pipeline stages are allowed. ``experts``: number of experts of a mixture of experts,
    0 if the model has none. ``chunks``: whether the loss may be computed in chunks. ``effect``: the strongest
    effect on the numbers that is allowed; techniques that divide work over ranks may always reorder sums
    (E1).
    """

    ranks: int
    per_host: int
    batch: int
    blocks: int
    device: str
    tensor: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (1,)
    sharing: str = "context-parallel"
    pipeline: bool = True
    experts: int = 0
    # time of what lies before and after all blocks, over that of one block
    ends: tuple[float, float] = (0.0, 0.0)
    chunks: bool = False
    vocabulary: bool = True  # whether tensor-parallel ranks can share it
    effect: EffectClass = EffectClass.E2
    # techniques that the user excluded, or that the engine or the device does not support
    without: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()  # those of ``without`` that the user excluded
    # returns why the engine does not support a plan; None: it supports all
    refuses: Callable[[Plan], object] | None = None
    micro_batch: int = 0  # required samples per micro-batch; 0: any
    splits: bool = True  # whether a rank's samples may be trained in micro-batches
    storage: bool = False  # whether hosts have local storage of a known rate
    shares: bool = True  # whether ranks may train on different samples of the batch
    dependence: SampleDependence = _INDEPENDENT  # of samples on each other, for the message of an error

    @property
    def expert_degree(self) -> int:
        """Number of ranks that experts may be distributed over: all ranks, if each then has the same number
        of experts; else 1. It is also 1 if the model has no experts or expert-parallel is excluded."""
        divides = self.experts and self.experts % self.ranks == 0 and "expert-parallel" not in self.without
        return self.ranks if divides else 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridLayout:
    """Degrees of parallelism of a plan for ``ranks`` ranks. The ranks divided by the product of the degrees
    is the number of data-parallel ranks, `data`.

    ``tensor``, ``context``, ``stages``: the degrees of tensor, context and pipeline parallelism. ``sequence``
    and ``vocabulary`` ("whole" or "parallel-loss") are settings of tensor-parallel. ``schedule`` and
    ``virtual`` (stages per rank) are settings of the pipeline; "" and 1 without one. ``sharing``: the
    technique by which context-parallel ranks divide each sample, "context-parallel" or "axial-parallel".
    ``fewer``: blocks that the first and the last stage of the pipeline have fewer than an even share.
    ``experts``: the data-parallel ranks that experts are distributed over, 1 or all of them.
    """

    ranks: int
    tensor: int = 1
    sequence: bool = False
    vocabulary: str = "whole"
    context: int = 1
    sharing: str = "context-parallel"
    stages: int = 1
    schedule: str = ""
    virtual: int = 1
    fewer: tuple[int, int] = (0, 0)
    experts: int = 1

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.context * self.stages)

    def pipeline(self, micro_batches: int) -> Use:
        """Return the use of the technique pipeline with this layout's settings and so many micro-batches."""
        return _use(
            "pipeline",
            stages=self.stages,
            schedule=self.schedule,
            virtual=self.virtual,
            micro_batches=micro_batches,
            first_fewer=self.fewer[0],
            last_fewer=self.fewer[1],
        )

    @property
    def uses(self) -> Uses:
        """The uses of tensor, context and expert parallelism that the layout has; not the pipeline
        (`pipeline`) and data parallelism."""
        uses = []
        if self.tensor > 1:
            uses.append(
                _use(
                    "tensor-parallel", degree=self.tensor, sequence=self.sequence, vocabulary=self.vocabulary
                )
            )
        if self.context > 1:
            uses.append(_use(self.sharing, degree=self.context))
        if self.experts > 1:
            uses.append(_use("expert-parallel", degree=self.experts, dropless=True))
        return tuple(uses)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Plans of one layout: one for every combination of values of five axes.

    The values of ``micro`` are (samples in a micro-batch of one rank, number of micro-batches per step). The
    values of the other axes are sets of techniques, which may be empty. ``inside``: recomputation,
    compilation and float8 layers, which decide a block's forward and backward. ``ends``: a loss in chunks.
    ``away``: activation offload. ``states``: data parallelism, precision and optimizer, together.
    """

    layout: GridLayout
    micro: tuple[tuple[int, int], ...]
    inside: tuple[Uses, ...]
    ends: tuple[Uses, ...]
    away: tuple[Uses, ...]
    states: tuple[Uses, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.micro), len(self.inside), len(self.ends), len(self.away), len(self.states)

    def plan(self, index: Sequence[int]) -> Plan:
        """Return the plan at these five indices: along ``micro``, ``inside``, ``ends``, ``away``,
        ``states``.
        """
        axis_uses = [axis[i] for axis, i in zip(self._axes, index[1:], strict=True)]
        uses = [*self.layout.uses, *itertools.chain(*axis_uses)]
        micro_batches = self.micro[index[0]][1]
        if self.layout.stages > 1:
            uses.append(self.layout.pipeline(micro_batches))
        elif micro_batches > 1:
            uses.append(_use("gradient-accumulation", micro_batches=micro_batches))
        return Plan(uses=tuple(uses), ranks=self.layout.ranks)

    @property
    def _axes(self) -> tuple[tuple[Uses, ...], ...]:
        return self.inside, self.ends, self.away, self.states


def grids(limits: Limits) -> Iterator[Grid]:
    """Yield the grids of all layouts in a fixed order, without plans that the limits forbid. A layout has
    several grids if not all values of its axis ``states`` allow the same values of the other axes. Yields
    nothing if no plan is left, for example because the batch cannot be divided.
    """
    for layout in _layouts(limits):
        if limits.batch % layout.data or (layout.data > 1 and not limits.shares):
            continue
        micro = _micro(limits, layout)
        if not micro:
            continue
        layout_uses = layout.uses
        if layout.stages > 1:
            layout_uses = (*layout_uses, layout.pipeline(2))
        has_several = any(count > 1 for _, count in micro)
        states = _supported(
            _states(limits, layout, layout_uses, has_several=has_several), layout_uses, limits
        )
        inside = _allowed(_inside(), layout_uses, limits)
        ends = _allowed(_ends(limits, layout), layout_uses, limits)
        away = _allowed([(), (_use("activation-offload", to="host"),)], layout_uses, limits)
        accumulates = layout.stages == 1 and has_several
        engine_uses = (
            *layout_uses,
            *((_use("gradient-accumulation", micro_batches=2),) if accumulates else ()),
        )
        engine_check = None if limits.refuses is None else (limits.refuses, engine_uses, limits.ranks)
        for axes, group_states in _split_states((inside, ends, away), states, engine_check):
            yield Grid(
                layout=layout, micro=micro, inside=axes[0], ends=axes[1], away=axes[2], states=group_states
            )


def _layouts(limits: Limits) -> Iterator[GridLayout]:
    tensor_settings = [(1, False, "whole")]
    tensor_settings += [
        (degree, sequence, vocabulary)
        for degree in limits.tensor
        if degree > 1
        for sequence in (True, False)
        for vocabulary in (("parallel-loss", "whole") if limits.vocabulary else ("whole",))
    ]
    for (tensor, sequence, vocabulary), context in itertools.product(tensor_settings, limits.context):
        model_ranks = tensor * context
        if limits.ranks % model_ranks:
            continue
        for stages, schedule, virtual, fewer in _pipelines(limits, limits.ranks // model_ranks):
            layout = GridLayout(
                ranks=limits.ranks,
                tensor=tensor,
                sequence=sequence,
                vocabulary=vocabulary,
                context=context,
                sharing=limits.sharing,
                stages=stages,
                schedule=schedule,
                virtual=virtual,
                fewer=fewer,
            )
            probe_uses = layout.uses
            if stages > 1:
                probe_uses = (
                    *probe_uses,
                    _use("pipeline", stages=2, schedule="1f1b", virtual=1, micro_batches=2),
                )
            if conflict(Plan(uses=probe_uses, ranks=limits.ranks)) is None and _is_allowed(
                probe_uses, limits
            ):
                yield layout
    if limits.expert_degree > 1:
        layout = GridLayout(ranks=limits.ranks, experts=limits.expert_degree)
        if _is_allowed(layout.uses, limits):
            yield layout


def _pipelines(limits: Limits, ranks: int) -> Iterator[tuple[int, str, int, tuple[int, int]]]:
    """Yield (stages, schedule, virtual, fewer): first (1, "", 1, (0, 0)), no pipeline, then all pipelines
    that the limits allow and whose number of stages divides ``ranks``. Each is yielded with an even division
    of the blocks, (0, 0), and then with fewer of them in the first and the last stage if that makes its
    busiest rank quicker (`_best_fewer`)."""
    for stages, schedule, virtual in _even_pipelines(limits, ranks):
        yield stages, schedule, virtual, (0, 0)
        if stages > 1:
            fewer = _best_fewer(limits.blocks, stages, virtual, schedule, limits.ends)
            if fewer != (0, 0):
                yield stages, schedule, virtual, fewer


@functools.cache
def _best_fewer(
    blocks: int, stages: int, virtual: int, schedule: str, ends: tuple[float, float]
) -> tuple[int, int]:
    """Return how many blocks fewer the first and the last stage should have, so that the busiest rank has the
    least work. ``ends``: times of what lies before and after all blocks, over that of one block. It is
    (0, 0) unless that rank has over 3 % less work than with an even division. Of equally good divisions, the
    one nearest to an even one is returned. The schedule "zero-bubble-v" has both ends on one rank and is
    always divided evenly.
    """
    if schedule == "zero-bubble-v":
        return 0, 0

    def busiest(fewer: tuple[int, int]) -> float:
        try:
            sizes = rank_blocks(blocks, stages, virtual, schedule, fewer)
        except UserError:
            return math.inf
        works = [float(n) for n in sizes]
        works[0] += ends[0]
        works[-1] += ends[1]
        return max(works)

    most = [min(_MOST_FEWER, math.ceil(end)) for end in ends]
    options = sorted(itertools.product(range(most[0] + 1), range(most[1] + 1)), key=lambda f: (sum(f), f))
    best = min(options, key=busiest)
    return best if busiest(best) * (1 + TIE_RATIO) < busiest((0, 0)) else (0, 0)


def rank_blocks(
    blocks: int, stages: int, virtual: int, schedule: str, fewer: tuple[int, int]
) -> tuple[int, ...]:
    """Return the number of blocks on each of ``stages`` pipeline ranks, in all its ``virtual`` stages.
    ``fewer``: blocks that the first and the last stage have fewer than an even share. Raises UserError if a
    stage would get none.
    """
    sizes = stage_sizes(blocks, stages * virtual, *fewer)
    if schedule == "zero-bubble-v":  # the last stage is on the first rank
        return tuple(sizes[r] + sizes[-1 - r] for r in range(stages))
    return tuple(sum(sizes[r::stages]) for r in range(stages))


def _even_pipelines(limits: Limits, ranks: int) -> Iterator[tuple[int, str, int]]:
    yield 1, "", 1
    if not limits.pipeline:
        return
    for stages in (s for s in _divisors(ranks) if 1 < s <= limits.blocks):
        for schedule in ("gpipe", "1f1b"):
            yield stages, schedule, 1
        for virtual in (2, 4, 8):
            if stages * virtual <= limits.blocks:
                yield stages, "interleaved", virtual
        if ranks == stages:  # torch's split backward bypasses data-parallel hooks
            yield stages, "zero-bubble", 1
            if 2 * stages <= limits.blocks:
                yield stages, "zero-bubble-v", 2


def _micro(limits: Limits, layout: GridLayout) -> tuple[tuple[int, int], ...]:
    rank_batch = limits.batch // layout.data
    splits = [(rank_batch // count, count) for count in _divisors(rank_batch)]
    without_accumulation = layout.stages == 1 and "gradient-accumulation" in limits.without
    if without_accumulation or not limits.splits:
        splits = [f for f in splits if f[1] == 1]
    if limits.micro_batch:
        splits = [f for f in splits if f[0] == limits.micro_batch]
    if layout.schedule in ("interleaved", "zero-bubble-v"):  # rounds of as many micro-batches as stages
        splits = [f for f in splits if f[1] % layout.stages == 0]
    elif layout.schedule == "zero-bubble":  # all rounds must have the same number of micro-batches
        splits = [f for f in splits if f[1] % max(1, f[1] // layout.stages) == 0]
    elif layout.schedule == "1f1b":  # torch's 1F1B needs at least as many micro-batches as stages
        splits = [f for f in splits if f[1] >= layout.stages]
    return tuple(splits)


def _inside() -> list[Uses]:
    recomputations: list[Uses] = [(), *((_use("activation-checkpointing", every=k),) for k in (1, 2, 4))]
    recomputations += [
        (_use("selective-checkpointing", keep=k),) for k in ("attention", "matmul", "every-second-matmul")
    ]
    compilation = (_use("compile", scope="blocks"),)
    cheap_recomputations = [
        r
        for r in recomputations
        if not r or r[0].settings.get("keep") == "matmul" or r[0].settings.get("every") == 1
    ]
    float8 = (_use("float8-linear"),)  # its casts cost more than they gain unless they are fused
    return recomputations + [
        (*r, *compilation, *low_precision) for low_precision in ((), float8) for r in cheap_recomputations
    ]


def _ends(limits: Limits, layout: GridLayout) -> list[Uses]:
    chunkable = layout.vocabulary == "whole" and limits.chunks
    return [(), *((_use("chunked-cross-entropy", chunks=n),) for n in (4, 16) if chunkable)]


def _states(limits: Limits, layout: GridLayout, layout_uses: Uses, *, has_several: bool) -> list[Uses]:
    """Return all combinations of data parallelism, precision and optimizer that the limits allow and that a
    search may propose together and with ``layout_uses``, the layout's techniques. ``has_several``: whether a
    step may have several micro-batches.

    Whether two techniques conflict depends on these two only, so pairs are checked rather than whole
    combinations.
    """
    optimizers: list[Uses] = [()]
    optimizers += [(_use(n),) for n in ("adamw-fused", "adamw-single", "adamw-8bit", "adamw-4bit")]
    optimizers += [(_use(n),) for n in ("adafactor", "sgd")]
    precisions: list[Uses] = [(), (_use("bf16-autocast"),)]
    precisions += [(_use("bf16-parameters", rounding=r),) for r in ("master", "stochastic")]
    axes = [
        [u for u in axis if _is_allowed(u, limits) and _go_together(layout_uses, u)]
        for axis in (_data(limits, layout, has_several=has_several), precisions, optimizers)
    ]
    data_options, precision_options, optimizer_options = axes
    precision_optimizer_matches = [[_go_together(p, o) for o in optimizer_options] for p in precision_options]
    states: list[Uses] = []
    for d in data_options:
        data_optimizer_matches = [_go_together(d, o) for o in optimizer_options]
        for p, optimizer_matches in zip(precision_options, precision_optimizer_matches, strict=True):
            if _go_together(d, p):
                states += [
                    (*d, *p, *o)
                    for o, a, b in zip(
                        optimizer_options, optimizer_matches, data_optimizer_matches, strict=True
                    )
                    if a and b
                ]
    return states


def _data(limits: Limits, layout: GridLayout, *, has_several: bool) -> list[Uses]:
    data_ranks = layout.data * layout.context
    if data_ranks == 1:
        return [()]
    syncs = ("every", "last") if has_several else ("every",)  # with one micro-batch, both are the same
    # number of shards when one copy of the shards stays inside a host
    shards_per_host = max(1, limits.per_host // (layout.tensor * layout.context))
    replicas = sorted(
        {1, layout.data // shards_per_host if layout.data % shards_per_host == 0 else 1} - {0, layout.data}
    )
    if layout.context > 1:
        replicas = [1]
    options: list[Uses] = []
    if layout.data > 1:
        reduces_once = layout.stages > 1  # in a pipeline, DDP reduces once per step in any case
        options += [
            (_use("ddp", bucket_view=v, sync=s),) for v in (True, False) for s in syncs[: 2 - reduces_once]
        ]
        if layout.virtual > 1:  # DDP waits for the gradient of every parameter
            options = []
    for reshard, precision, sync, offload, replica_count in itertools.product(
        (True, False), ("bf16", "as-is"), syncs, (False, True), replicas
    ):
        options.append(
            (
                _use(
                    "fsdp2",
                    reshard=reshard,
                    precision=precision,
                    sync=sync,
                    offload=offload,
                    replicas=replica_count,
                ),
            )
        )
    if layout.experts > 1:  # FSDP2 leaves experts alone: their precision and place are those of the model
        alone = {"precision": "as-is", "offload": False, "replicas": 1}
        return [o for o in options if o[0].technique == "ddp" or alone.items() <= o[0].settings.items()]
    if layout.tensor == layout.context == layout.stages == 1:
        options += [(use,) for use in zero_uses(storage=limits.storage)]
    return options


def zero_uses(*, storage: bool) -> Iterator[Use]:
    """Yield the uses of zero that a search considers. ``storage``: whether optimizer state may be kept on
    local storage."""
    for stage, precision in itertools.product((1, 2, 3), ("bf16", "fp32")):
        for place in ("none", "optimizer", *(("parameters",) if stage == 3 else ())):
            for nvme in ("none", "optimizer") if storage and stage == 3 and place != "none" else ("none",):
                yield _use(
                    "zero",
                    stage=stage,
                    precision=precision,
                    offload=place,
                    nvme=nvme,
                    reduce_bucket_elements=50_000_000,
                )


def _allowed(axis: Iterable[Uses], layout_uses: Uses, limits: Limits) -> tuple[Uses, ...]:
    return tuple(u for u in axis if _is_allowed(u, limits) and _go_together(layout_uses, u))


def _supported(axis: Iterable[Uses], layout_uses: Uses, limits: Limits) -> tuple[Uses, ...]:
    refuses = limits.refuses
    if refuses is None:
        return tuple(axis)
    return tuple(u for u in axis if not refuses(Plan(uses=(*layout_uses, *u), ranks=limits.ranks)))


def _is_allowed(uses: Uses, limits: Limits) -> bool:
    """Return whether each of the techniques is allowed: its effect on the numbers is at most
    ``limits.effect`` (at most E1, if that is higher, for techniques that divide work over ranks), it supports
    the device, its packages are installed, and ``limits.without`` does not exclude it.
    """
    return all(_is_use_allowed(u, limits.effect, limits.device, limits.without) for u in uses)


@functools.cache
def _is_use_allowed(used: Use, effect: EffectClass, device: str, excluded: frozenset[str]) -> bool:
    definition = technique(used.technique)
    divides_work = definition.slot == "data-parallel" or definition.name in DIVIDING_TECHNIQUES
    accurate_enough = effect_of(Plan(uses=(used,))) <= (
        max(effect, EffectClass.E1) if divides_work else effect
    )
    return (
        accurate_enough
        and definition.runs_on(device)
        and not definition.lacks(used.settings)
        and used.technique not in excluded
    )


@functools.cache  # most layouts have the same axes
def _split_states(
    axes: tuple[tuple[Uses, ...], ...],
    states: tuple[Uses, ...],
    engine: tuple[Callable[[Plan], object], Uses, int] | None,
) -> list[tuple[list[tuple[Uses, ...]], tuple[Uses, ...]]]:
    """Split the ``states`` of a layout into groups of those that allow the same values of the other axes,
    ``axes``.

    Return [(the allowed values of each axis, the states of the group)], without groups for which an axis is
    empty. A state allows a value if a search may propose both together and the engine supports them beside
    the layout's techniques.

    ``engine``: (function that returns why the engine does not support a plan, techniques of the layout,
    ranks), or None if it supports all. These techniques include gradient accumulation if a step may have
    several micro-batches. Most engines refuse a plan on several ranks without a data-parallel technique, so
    the engine is only asked about plans that include a state.
    """

    def fit(state: Uses, other: Uses) -> bool:
        if engine is None:
            return _go_together(state, other)
        refuses, layout_uses, ranks = engine
        plan = Plan(uses=(*layout_uses, *state, *other), ranks=ranks)
        return _go_together(state, other) and not refuses(plan)

    groups: dict[tuple[tuple[bool, ...], ...], list[Uses]] = {}
    for state in states:
        fits = tuple(tuple(fit(state, other) for other in axis) for axis in axes)
        groups.setdefault(fits, []).append(state)
    result = []
    for fits, group in groups.items():
        allowed_axes = [
            tuple(v for v, fit in zip(axis, axis_fits, strict=True) if fit)
            for axis, axis_fits in zip(axes, fits, strict=True)
        ]
        if all(allowed_axes):
            result.append((allowed_axes, tuple(group)))
    return result


@functools.cache
def _go_together(uses: Uses, other_uses: Uses) -> bool:
    return proposable(Plan(uses=(*uses, *other_uses)))


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@functools.cache
def _cached_use(name: str, settings: tuple[tuple[str, KnobValue], ...]) -> Use:
    return make_use(name, dict(settings))


def _use(name: str, **settings: KnobValue) -> Use:
    return _cached_use(name, tuple(sorted(settings.items())))


def no_grid_error(limits: Limits) -> UserError:
    """Return the error to raise if there is no grid for these limits. It names the first cause that applies:

    - The batch may not be divided over data-parallel ranks (``limits.shares``).
    - The batch is a multiple of the ranks, and the engine supports none of the plans, though there are some
      for native, memfit's own engine.
    - The batch is a multiple of the ranks: exclusions, accuracy and micro-batch leave no plan.
    - The batch cannot be divided evenly.
    """
    devices = "one device" if limits.ranks == 1 else f"{limits.ranks} devices"
    if not limits.shares:
        return _undivided_batch_error(limits.dependence, devices)
    of_any_engine = dataclasses.replace(limits, refuses=None, without=limits.excluded)
    engine_refuses = limits.refuses is not None and any(True for _ in grids(of_any_engine))
    if limits.batch % limits.ranks == 0 and engine_refuses:
        return UserError(
            f"the engine (--engine) supports none of the plans for {devices} that a search considers",
            allowed="an engine with data-parallel ranks, such as native, accelerate or deepspeed",
            hint="`memfit estimate JOB --plan FILE --engines` predicts a plan of yours and shows which "
            "engines support it",
        )
    if limits.batch % limits.ranks == 0:
        return UserError(
            f"the excluded techniques, the accuracy and the micro-batch leave no plan for {devices}",
            hint="relax --without (exclude fewer techniques), --accuracy (allow larger changes of the "
            "training) or --micro-batch (a divisor of the samples of a data-parallel rank, or none)",
        )
    return UserError(
        f"a batch of {limits.batch} samples cannot be shared evenly by {devices}",
        allowed=f"a multiple of {limits.ranks}; or a multiple of the data-parallel ranks, if tensor, context "
        "or pipeline parallelism can divide the model among the other devices",
        hint="--batch sets the samples of one step over all devices",
    )


def _undivided_batch_error(dependence: SampleDependence, devices: str) -> UserError:
    """Return the error to raise if the batch may not be divided over data-parallel ranks, and no plan without
    them is left. ``dependence``: why it may not. ``devices``: text such as "8 devices"."""
    effect_on_training = dependence.changes  # such as "changes BatchNorm's statistics"
    how_this_is_known, mean_over_counted_terms = dependence.reason, dependence.way_out
    if dependence.cause is DependenceCause.SIZE:
        return UserError(
            f"every plan that is possible for {devices} splits the batch, over ranks or into micro-batches, "
            f"but the step can be computed for the whole batch only ({how_this_is_known})",
            allowed="--on a machine with one device",
        )
    if dependence.cause is DependenceCause.WEIGHTS:
        return UserError(
            f"every plan that is possible for {devices} splits the batch, over ranks or into micro-batches, "
            f"which weights the terms of the loss wrongly ({how_this_is_known})",
            allowed=f"--on a machine with one device, or a loss that is {mean_over_counted_terms}",
        )
    return UserError(
        f"every plan that is possible for {devices} splits the batch, over ranks or into micro-batches, "
        f"which {effect_on_training} ({how_this_is_known})",
        allowed="--accuracy any, or --on a machine with one device",
        hint="if the cause is BatchNorm, replace it by SyncBatchNorm, which allows data-parallel ranks",
    )
