"""The inverse of a prediction: the largest batch, length or other size of a job that fits a machine, for each
plan of the frontier."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memfit.cost.lengths import Ints
from memfit.engines.registry import must_train, ready_engine, supporting_engine
from memfit.jobs.registry import load
from memfit.jobs.user_job import source_digest
from memfit.planner.batch_memory import check_batch_memory
from memfit.planner.batch_shape import length_of, with_batch_shape
from memfit.planner.evaluate import Predictor
from memfit.planner.largest import (
    LargestValue,
    MeasuredSize,
    batch_multiple,
    find_largest,
    length_multiple,
    prober,
)
from memfit.planner.largest_runs import MEASURED_STEPS, measured_size, with_boundary
from memfit.planner.machine_calibration import calibrate
from memfit.planner.request import Progress, Request, make_predictor, model_sizes
from memfit.planner.search import search
from memfit.planner.workspace_probes import probe_workspaces
from memfit.runtime import local_machine
from memfit.techniques.registry import check
from memfit.types.errors import NothingFits, UserError, suggest
from memfit.types.job import Dimension, Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Choice
from memfit.types.units import format_bytes
from memfit.workflows.single_run import measure_spec

_MOST_PLANS = 4
_OTHER_VALUES = (0.25, 0.5, 1, 2, 4)  # of the job's own value of the first of two dimensions
_BUCKETS = 8
_SYNONYMS = (("batch", "batch_size"), ("length", "seq_len"), ("hidden", "width"))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestRow:
    """The answer for one plan and, with a second dimension ``along``, for one ``value`` of it; else ``value``
    is None. ``problem``: why there is no answer, and ``result`` is then None; "": there is one."""

    plan: Plan
    value: int | None
    result: LargestValue | None
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestReport:
    """The largest values of ``dimension`` that fit ``cap_bytes`` of one device. ``cap_reason``: where that
    figure is from. ``along``: a second dimension, for several values of which the question was answered; "":
    none. ``notes``: what the reader must know to judge the answer."""

    dimension: str
    along: str
    cap_bytes: int
    cap_reason: str
    rows: tuple[LargestRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def buckets(self) -> Mapping[str, int]:
        """Value of ``along`` -> largest safe value of ``dimension`` with the first plan, for a sampler.
        Values for which nothing fits are left out. Empty without ``along``."""
        plan = self.rows[0].plan if self.rows and self.along else None
        return {
            str(row.value): row.result.value
            for row in self.rows
            if row.plan == plan and row.result is not None and row.result.value is not None
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The dimensions of a job, and how it is built with other values. ``fixed``: the job is an object that
    takes no sizes, so that its own batch is repeated or cut."""

    ref: JobRef
    job: Job
    dimensions: Mapping[str, Dimension]
    fixed: bool

    def resolve(self, name: str) -> Dimension:
        """Return the dimension called ``name`` or, if there is none, called by a synonym of it, such as
        batch_size for batch. Raises UserError if there is neither."""
        for synonyms in _SYNONYMS:
            if name not in self.dimensions and name in synonyms:
                name = next((n for n in synonyms if n in self.dimensions), name)
        if name not in self.dimensions:
            is_function = not self.fixed and ".py:" in self.ref.spec
            raise UserError(
                f"--largest {name}: the job {self.ref.spec} has no such size",
                allowed=", ".join(self.dimensions) or "none: the job takes no sizes",
                hint=suggest(name, self.dimensions)
                or (
                    "every argument of the function whose default is a whole number is a size"
                    if is_function
                    else ""
                ),
            )
        return self.dimensions[name]

    def build(self, values: Mapping[str, int]) -> Job:
        if self.fixed:
            return with_batch_shape(self.job, values.get("batch"), values.get("length"))
        ref = self.ref.with_sizes(values)
        check_batch_memory(ref)
        return load(ref)


def _sizes(ref: JobRef) -> _Sizes:
    job = load(ref)
    if job.dimensions:
        return _Sizes(ref=ref, job=job, dimensions={d.name: d for d in job.dimensions}, fixed=False)
    dimensions = {"batch": Dimension(name="batch", value=job.batch_size)}
    with contextlib.suppress(UserError):  # its batch may have no length
        dimensions["length"] = Dimension(name="length", value=length_of(job))
    return _Sizes(ref=ref, job=job, dimensions=dimensions, fixed=True)


def largest(  # noqa: PLR0913
    request: Request,
    dimension: str,
    *,
    along: str = "",
    values: Sequence[int] = (),
    plans: Sequence[Plan] = (),
    most_plans: int | None = None,
    step: int | None = None,
    measure: bool = False,
    progress: Progress = lambda stage, done, total, detail: None,
) -> LargestReport:
    """Return the largest value of the job's ``dimension`` that fits the request's machine, for each plan.

    ``plans``: those to answer for; none: at most ``most_plans`` (None: four) of a search with the job's own
    sizes or, if nothing fits these, with the smallest value of the dimension: the recommended one, plain
    training, then those of its frontier that fit. With ``along`` the question is asked for each of ``values``
    of this dimension, by default a quarter of the job's own, half, the same, twice and four times as much;
    without it, ``values`` are ignored. ``step``: only multiples of it are tried; None: what the job and the
    plan need. ``measure``: whether values are also run, each for a few steps in a process of its own under
    the cap, to find where memory runs out (`planner.largest_runs.find_boundary`).

    Raises UserError for a dimension that the job does not have, for a plan that the engine does not support,
    if ``along`` is the same dimension, and if ``measure`` is asked for another machine, without a cap on a
    processor, or of a job that takes no sizes. Raises NothingFits if no plan of a search fits: with the job's
    own sizes and, if the job takes sizes, with the smallest value of the dimension. Without ``plans``, also
    raises the other errors of `planner.search.search`. Raises RunError if operators cannot be timed here.
    """
    sizes = _sizes(request.job_ref)
    target = sizes.resolve(dimension)
    if measure:
        _must_be_measurable(request, sizes)
    other = sizes.resolve(along) if along else None
    if other is not None and other.name == target.name:
        raise UserError(f"both sizes of --largest are {target.name}", allowed="two different sizes")
    cap_bytes, cap_reason = _cap(request)
    request = dataclasses.replace(request, cap_bytes=cap_bytes)
    predictor, chosen_plans = _plans(request, sizes, target, plans, progress)
    chosen_plans = chosen_plans if plans else chosen_plans[: most_plans or _MOST_PLANS]
    if other is None:
        other_values: Sequence[int | None] = [None]
    else:
        other_values = _other_values(other, values)
    rows = []
    for plan in chosen_plans:
        start = target.value
        for value in other_values:
            fixed = {} if other is None or value is None else {other.name: value}
            row = _row(request, predictor, sizes, target, plan, fixed, start, step, progress, measure=measure)
            rows.append(dataclasses.replace(row, value=value))
            if row.result is not None and row.result.value is not None:
                start = row.result.value
    return LargestReport(
        dimension=target.name,
        along=other.name if other else "",
        cap_bytes=cap_bytes,
        cap_reason=cap_reason,
        rows=tuple(rows),
        notes=_notes(sizes, rows),
    )


def _row(  # noqa: PLR0913
    request: Request,
    predictor: Predictor,
    sizes: _Sizes,
    target: Dimension,
    plan: Plan,
    fixed: Mapping[str, int],
    start: int,
    step: int | None,
    progress: Progress,
    *,
    measure: bool,
) -> LargestRow:
    multiples = {"batch": batch_multiple, "length": length_multiple}
    multiple = next((multiples[names[0]] for names in _SYNONYMS[:2] if target.name in names), lambda plan: 1)
    count = 0

    def job_of(value: int) -> Job:
        nonlocal count
        count += 1
        at = "".join(f", {name} {n}" for name, n in fixed.items())
        progress("trace", count, 0, f"{target.name} {value}{at}: {plan.label}")
        return sizes.build({**fixed, target.name: value})

    try:
        result = find_largest(
            prober(
                predictor,
                plan,
                job_of,
                cap_bytes=request.cap_bytes or 0,
                prepare=_workspaces(request, predictor),
            ),
            dimension=target.name,
            plan=plan,
            cap_bytes=request.cap_bytes or 0,
            start=start,
            step=math.lcm(target.multiple, multiple(plan), step or 1),
        )
        if measure:
            result = with_boundary(
                lambda value, cap_bytes: _train(
                    dataclasses.replace(request, cap_bytes=cap_bytes),
                    sizes,
                    plan,
                    {**fixed, target.name: value},
                    value,
                    progress,
                ),
                result,
                device_bytes=None
                if request.machine.device.is_host
                else int(request.machine.device.memory_bytes.value),
            )
    except UserError as error:
        return LargestRow(plan=plan, value=None, result=None, problem=str(error))
    return LargestRow(plan=plan, value=None, result=result)


def _must_be_measurable(request: Request, sizes: _Sizes) -> None:
    """Raise UserError if values cannot be run: on another machine, with the engine replay, without a cap on a
    processor, where other programs need what remains of the memory, or for a job that other processes cannot
    load with a size."""
    if not request.is_here:
        raise UserError(
            "--measure trains on this machine, but --on names another one",
            allowed="--measure without --on, or with --on this, this:cpu or this:KIND",
        )
    must_train(request.engine)
    device = request.machine.device
    is_below = request.cap_bytes is not None and request.cap_bytes < device.memory_bytes.value
    if device.is_host and not is_below:
        raise UserError(
            "--measure on a processor (CPU) needs a memory cap below the machine's memory",
            allowed=f"--memory SIZE below {format_bytes(device.memory_bytes.value)}",
        )
    if sizes.fixed:
        raise UserError(
            f"the job {sizes.ref.spec} takes no sizes, so --measure cannot train it with other sizes",
            allowed="a function FILE.py:NAME with a size as argument and a whole number as its default, such "
            "as job(batch=8)",
        )


def _train(
    request: Request,
    sizes: _Sizes,
    plan: Plan,
    values: Mapping[str, int],
    value: int,
    progress: Progress,
) -> MeasuredSize:
    """Train the job of ``values`` (name of a size -> number) for a few steps under the request's cap, and
    return how that ended for ``value``. Raises UserError if the engine cannot train the plan here or the job
    cannot be loaded."""
    ready_engine(request.engine, plan, request.device_kind)
    ref = sizes.ref.with_sizes(values)
    job = load(ref)
    progress("run", 0, 0, f"{', '.join(f'{name} {n}' for name, n in values.items())}: {plan.label}")
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=ref,
        plan=plan,
        engine=request.engine,
        seed=0,
        steps=MEASURED_STEPS,
        batch_size=job.batch_size,
        clip=job.clip,
        sizes=model_sizes(request.engine, job),
        cap_bytes=request.cap_bytes,
        device=request.device_kind,
        threads=request.threads or max(1, local_machine.threads() // plan.ranks),
        evaluate=False,
        timeout_s=request.timeout_s,
        source_digest=source_digest(ref.spec),
    )
    return measured_size(value, request.cap_bytes or 0, measure_spec(spec))


def _workspaces(request: Request, base: Predictor) -> Callable[[Predictor, Plan], None]:
    """Return what to do before an estimate counts: on the CPU of this machine, kernel workspaces that could
    move the peak are measured, and kept in the calibration of ``base`` for later values."""

    def prepare(predictor: Predictor, plan: Plan) -> None:
        if request.is_here and request.machine.device.is_host:
            probe_workspaces(predictor, plan)
            base.calibration = predictor.calibration

    return prepare


def _cap(request: Request) -> tuple[int, str]:
    """Return (the memory of one device that must not be exceeded, where that figure is from)."""
    if request.cap_bytes is not None:
        return request.cap_bytes, "asked for"
    device = request.machine.device
    if request.is_here and not device.is_host:
        kernels = device.kernels_bytes  # loaded later, outside torch's allocator
        free_bytes = local_machine.free_device_bytes(request.device_kind)
        return free_bytes - int(kernels.value if kernels else 0), "what is free on the device now"
    return int(device.memory_bytes.value), "the device's memory"


def _plans(
    request: Request, sizes: _Sizes, target: Dimension, plans: Sequence[Plan], progress: Progress
) -> tuple[Predictor, Sequence[Plan]]:
    """Return (a predictor of the job, the plans to answer for): ``plans`` or, if there are none, those of a
    search, the recommended one first. If no plan fits the job's own sizes, the search and the predictor are
    for the smallest value of ``target``. Raises UserError for a plan that the engine or the machine does not
    support; UserError, RunError and NothingFits as `search` does."""
    if plans:
        _, predictor = make_predictor(request)
        for plan in plans:
            supporting_engine(request.engine, plan)
        checked_plans = [check(plan, request.machine) for plan in plans]
        if request.is_here:
            for plan in checked_plans:
                predictor.whole(plan)
            calibrate(predictor, request, progress, plans=checked_plans)
        return predictor, checked_plans
    try:
        planning = search(request, progress)
    except NothingFits:
        if sizes.fixed:
            raise
        smallest = max(target.multiple, request.ranks if target.name == "batch" else 1)
        smaller_request = dataclasses.replace(request, job_ref=sizes.ref.with_sizes({target.name: smallest}))
        planning = search(smaller_request, progress)
    result = planning.result
    recommended = [result.recommended] if result.recommended else []
    choices = [*recommended, result.baseline, *_spread([c for c in result.frontier if c.fits])]
    return planning.predictor, list(dict.fromkeys(choice.estimate.plan for choice in choices))


def _spread(frontier: Sequence[Choice]) -> list[Choice]:
    """Return the plans of the frontier in another order, so that the first few are spread over it: the first,
    the last, the middle one, then the others."""
    if len(frontier) < 3:
        return list(frontier)
    middle = len(frontier) // 2
    return [frontier[0], frontier[-1], frontier[middle], *frontier[1:middle], *frontier[middle + 1 : -1]]


def _other_values(other: Dimension, values: Sequence[int]) -> list[int]:
    if values:
        return list(dict.fromkeys(values))
    scaled = [round(other.value * ratio / other.multiple) * other.multiple for ratio in _OTHER_VALUES]
    return sorted({max(other.multiple, value) for value in scaled})


def _notes(sizes: _Sizes, rows: Sequence[LargestRow]) -> tuple[str, ...]:
    notes = []
    if sizes.fixed:
        notes.append(
            f"{sizes.ref.spec} takes no sizes: other sizes were made by repeating or cutting its own batch; "
            "`memfit run` cannot train them before the job is a function that takes them"
        )
    results = [row.result for row in rows if row.result is not None]
    notes += [note for result in results if result.safe for note in result.safe.notes]
    return tuple(dict.fromkeys(notes))


def bucket_edges(lengths: Ints, count: int = _BUCKETS) -> list[int]:
    """Return at most ``count`` ascending lengths of buckets that each hold about the same number of the
    sequences: a sequence belongs to the first bucket that is at least as long. The edges are multiples of 8,
    and the last is at least the longest sequence. ``lengths``: those of the sequences, at least one."""
    shares = np.arange(1, count + 1) / count
    edges = np.quantile(lengths, shares, method="inverted_cdf")
    return sorted({int(-(-edge // 8) * 8) for edge in edges})
