"""The largest value of one size of a job, such as its batch, for which a plan fits: bisection on traces.

Every value that is tried is traced whole. The next value to try is read off a polynomial through the traces
made so far, so that few are needed; but the answer never rests on it: the value found was traced and fits,
and the next possible one was traced and does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy

from memfit.cost.host import host_line
from memfit.planner.capacity import expected_bytes, fits_under, host_holds_under, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import splits_batch
from memfit.types.errors import UserError, first_line
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.result import Estimate, OutcomeKind
from memfit.types.units import format_bytes

_LARGEST_RATIO = 2**16  # once this multiple of the first value fits, no larger one is tried
_UNAFFECTED_RATIO = 2**10  # a size that hardly changes the memory up to this multiple is not tried further
_UNCHANGED = 1e-3
_NEAR = 1.1  # of the cap: an estimate whose value is below may fit once it is more certain
# What a step of a size that the job cannot have may raise while it is traced.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TracedSize:
    """One value that was tried.

    ``needed_bytes``: memory of one device under which it is safe to run, with memfit's margin. ``fits``:
    whether the cap and the host's memory are enough for that. ``expected_bytes``, ``expected_to_fit``: the
    same without margin. ``step_s``, ``samples_per_s`` and ``tokens_per_s`` are None if they cannot be
    predicted.

    ``host``: a text with what the host has and the value needs there, "" if the host has enough or is not
    checked. ``problem``: why the job refuses the value; the numbers are then 0 or None, and nothing fits.
    ``notes``: what the prediction assumes, and what splitting the batch as the plan does would change.
    """

    value: int
    needed_bytes: int = 0
    expected_bytes: int = 0
    fits: bool = False
    expected_to_fit: bool = False
    step_s: float | None = None
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    host: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSize:
    """One value that was trained for a few steps under ``cap_bytes``. ``outcome``, ``reason``: the end of it.
    ``tensor_bytes``: the peak of tensors; ``process_bytes``: that of what the cap counts. None: unknown.
    ``limit``: what enforced the cap, such as "RLIMIT_DATA"."""

    value: int
    cap_bytes: int
    outcome: OutcomeKind
    reason: str = ""
    tensor_bytes: int | None = None
    process_bytes: int | None = None
    limit: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLargest:
    """What ran under the cap, for ``steps`` steps each. ``ran``: the largest value that did so in each of its
    runs, with a little less memory than the cap, None if none did; ``died``: the smallest that ran out of
    memory each time, with a little more, and is larger than all that ran, None if there is none
    (`planner.largest_runs`). ``runs``: all, in ascending order of values, of which one may occur several
    times."""

    steps: int
    ran: MeasuredSize | None
    died: MeasuredSize | None
    runs: tuple[MeasuredSize, ...]

    @property
    def uncertain(self) -> tuple[int, ...]:
        """The values between ``ran`` and ``died`` that were run: whether they run under the cap is chance. ()
        if ``died`` is None."""
        if self.died is None:
            return ()
        least = self.ran.value if self.ran else 0
        return tuple(sorted({run.value for run in self.runs if least < run.value < self.died.value}))

    @property
    def failed(self) -> MeasuredSize | None:
        """The run that ended the search because it failed for another reason than memory; None if there is
        none."""
        outcomes = (OutcomeKind.OK, OutcomeKind.OOM)
        return next((run for run in self.runs if run.outcome not in outcomes), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestValue:
    """The largest values of ``dimension`` for which ``plan`` fits ``cap_bytes`` of one device, among the
    multiples of ``step``.

    ``safe``: the largest that fits with the margin that memfit keeps; ``safe_next``: the next multiple, which
    does not. ``expected``, ``expected_next``: the same without margin, by the expected memory. The values
    between ``safe`` and ``expected`` may or may not run out of memory. ``safe`` and ``expected`` are None if
    no value fits; then ``safe_next`` and ``expected_next`` are the smallest that the job accepts.

    ``limit``: "memory"; "job" if the job refuses ``safe_next``, whose ``problem`` says why, although the
    memory would be enough; "none" if the needed memory hardly depends on the dimension; or "untried" if a
    value of at least 65,536 times the first one fits, above which none is tried. In the last two cases there
    is no next value. ``traced``: every value that was tried, in ascending order. ``measured``: what ran under
    the cap, None if nothing was run.
    """

    dimension: str
    plan: Plan
    cap_bytes: int
    step: int
    safe: TracedSize | None
    safe_next: TracedSize | None
    expected: TracedSize | None
    expected_next: TracedSize | None
    limit: str
    traced: tuple[TracedSize, ...]
    measured: MeasuredLargest | None = None

    @property
    def value(self) -> int | None:
        """The largest value that ran, if values were run under the cap, else the largest safe one. None if
        none ran or none is safe."""
        if self.measured is not None:
            return self.measured.ran.value if self.measured.ran else None
        return self.safe.value if self.safe else None

    def __str__(self) -> str:
        cap = format_bytes(self.cap_bytes)
        if self.safe is None:
            smallest = self.safe_next
            needs = f": {smallest.value} needs {format_bytes(smallest.needed_bytes)}" if smallest else ""
            return f"{self.plan.label}: no {self.dimension} fits {cap}{needs}{self._measured_text()}"
        text = (
            f"{self.plan.label}: largest {self.dimension} that fits {cap}: {self.safe.value}, which needs "
            f"{format_bytes(self.safe.needed_bytes)}"
        )
        if self.limit == "memory" and self.safe_next is not None:
            text += f"; {self.safe_next.value} would need {format_bytes(self.safe_next.needed_bytes)}"
        if self.limit == "job" and self.safe_next is not None:
            text += f"; the limit is not the memory of the training: {self.safe_next.problem}"
        if self.limit in ("none", "untried"):
            text += f"; {LIMIT_TEXTS[self.limit]}"
        if self.expected is not None and self.expected.value > self.safe.value:
            text += f"; up to {self.expected.value} is expected to fit, without a margin"
        return text + self._measured_text()

    def _measured_text(self) -> str:
        if self.measured is None:
            return ""
        ran, died = self.measured.ran, self.measured.died
        text = f"; measured: {ran.value} ran" if ran else "; measured: none ran"
        if self.measured.uncertain:
            text += f", {', '.join(map(str, self.measured.uncertain))} too near the cap to tell"
        return text + (f", {died.value} ran out of memory" if died else "")


LIMIT_TEXTS: Mapping[str, str] = {
    "memory": "",
    "job": "the job's own limit",
    "none": "the needed memory hardly depends on it",
    "untried": "larger values were not tried",
}


def batch_multiple(plan: Plan) -> int:
    """Return the number of which the plan's batch must be a multiple so that all micro-batches of all ranks
    have equal sizes. Raises UserError if the plan's degrees do not fit its ranks."""
    settings = [plan.get(name) for name in ("gradient-accumulation", "pipeline")]
    micro_batches = [int(use.settings.get("micro_batches", 1)) for use in settings if use is not None]
    return layout(plan).data * math.prod(micro_batches)


def length_multiple(plan: Plan) -> int:
    """Return the number of which the length of a sample must be a multiple so that the plan's ranks can
    divide it: of twice the context-parallel degree (1 without one) and of the tensor-parallel degree. Raises
    UserError if the plan's degrees do not fit its ranks."""
    degrees = layout(plan)
    return math.lcm(2 * degrees.context if degrees.context > 1 else 1, degrees.tensor)


def find_largest(
    probe: Callable[[int], TracedSize], *, dimension: str, plan: Plan, cap_bytes: int, start: int, step: int
) -> LargestValue:
    """Return the largest multiples of ``step`` that fit ``cap_bytes``, safely and as expected
    (`LargestValue`).

    ``probe`` traces one value; each is traced once. The first is the smallest multiple that is at least
    ``start``. Once a value of at least 65,536 times the first one fits, or one of at least 1,024 times needs
    hardly more memory (0.1 %), no larger one is tried. Raises UserError if the job refuses the first value.
    """
    sizes: dict[int, TracedSize] = {}

    def cached(units: int) -> TracedSize:
        if units not in sizes:
            sizes[units] = probe(units * step)
        return sizes[units]

    first = max(1, -(-start // step))
    if problem := cached(first).problem:
        first_value = first * step
        raise UserError(f"{dimension} {first_value}, the first value tried, cannot be predicted: {problem}")
    safe, safe_next = _bisect(cached, sizes, first, cap_bytes, safe=True)
    expected, expected_next = _bisect(cached, sizes, first, cap_bytes, safe=False)
    limit = "memory"
    if safe is not None and safe_next is None:
        limit = "none" if _unaffected(sizes, first) else "untried"
    elif safe is not None and safe_next is not None and safe_next.problem:
        limit = "job"
    return LargestValue(
        dimension=dimension,
        plan=plan,
        cap_bytes=cap_bytes,
        step=step,
        safe=safe,
        safe_next=safe_next,
        expected=expected,
        expected_next=expected_next,
        limit=limit,
        traced=tuple(sizes[units] for units in sorted(sizes)),
    )


def _bisect(
    probe: Callable[[int], TracedSize],
    sizes: Mapping[int, TracedSize],
    first: int,
    cap_bytes: int,
    *,
    safe: bool,
) -> tuple[TracedSize | None, TracedSize | None]:
    """Return (the largest size that is accepted, the next one, which is not). Sizes are in units of the step.
    With ``safe``, a size is accepted if it fits with memfit's margin, else if it is expected to fit.

    The first is None if none is accepted; the other is then the smallest that the job takes. The second is
    None if all sizes are accepted that may be tried. ``sizes``: those that were probed before.
    """

    def accepted(size: TracedSize) -> bool:
        return size.fits if safe else size.expected_to_fit

    def below(units: int, size: TracedSize) -> bool:
        return accepted(size) or (size.problem != "" and units < first)

    probe(first)
    low = max((n for n, size in sizes.items() if below(n, size)), default=0)
    high = min((n for n, size in sizes.items() if n > low), default=math.inf)
    turn = 0
    while high - low > 1:
        if math.isinf(high) and (low >= first * _LARGEST_RATIO or _unaffected(sizes, first)):
            return sizes[low], None
        turn += 1
        units = _next_units(sizes, low, high, cap_bytes, safe=safe, interpolates=turn % 3 != 0)
        if below(units, probe(units)):
            low = units
        else:
            high = units
    best = sizes.get(low)
    return (best if best is not None and accepted(best) else None), sizes[int(high)]


def _unaffected(sizes: Mapping[int, TracedSize], first: int) -> bool:
    reached = max((units for units, size in sizes.items() if not size.problem), default=0)
    if reached < first * _UNAFFECTED_RATIO:
        return False
    change = sizes[reached].needed_bytes - sizes[first].needed_bytes
    return abs(change) <= _UNCHANGED * sizes[first].needed_bytes


def _next_units(
    sizes: Mapping[int, TracedSize],
    low: int,
    high: float,
    cap_bytes: int,
    *,
    safe: bool,
    interpolates: bool,
) -> int:
    """Return the next size to probe, above ``low`` and below ``high``. It is where a polynomial through the
    probed sizes reaches the cap, but at most 8 times ``low`` if there is no upper end yet (``high`` is
    infinite). Without ``interpolates``, or if there is no such place, it is the middle, or twice ``low``
    without an upper end."""
    plain = low * 2 if math.isinf(high) else (low + int(high)) // 2
    points = [
        (units, size.needed_bytes if safe else size.expected_bytes)
        for units, size in sizes.items()
        if not size.problem
    ]
    crossing = _crossing(points, low, high, cap_bytes) if interpolates else None
    if crossing is None:
        return max(low + 1, plain)
    largest = low * 8 if math.isinf(high) else int(high) - 1
    return max(low + 1, min(math.floor(crossing), largest))


def _crossing(points: Sequence[tuple[int, int]], low: int, high: float, cap_bytes: int) -> float | None:
    """Return where the polynomial through the three points nearest to the cap (two, if there are no more)
    reaches the cap at or above ``low`` and at or below ``high``; None if it does not, or for fewer points."""
    nearest = sorted(points, key=lambda point: abs(point[1] - cap_bytes))[:3]
    if len(nearest) < 2:
        return None
    x, y = (numpy.array(column, dtype=float) for column in zip(*nearest, strict=True))
    scale = x.max()
    coefficients = numpy.polyfit(x / scale, (y - cap_bytes) / cap_bytes, len(nearest) - 1)
    roots = [float(r.real) * scale for r in numpy.roots(coefficients) if abs(r.imag) < 1e-9]
    return min((r for r in roots if low <= r <= high), default=None)


# -- probes ---------------------------------------------------------------------------------------


def _as_expected(estimate: Estimate) -> Estimate:
    """Return the estimate with the expected need of host memory as its upper end."""
    need = estimate.host_bytes
    if need is None:
        return estimate
    return dataclasses.replace(estimate, host_bytes=dataclasses.replace(need, high=need.value))


def prober(
    base: Predictor,
    plan: Plan,
    job_of: Callable[[int], Job],
    *,
    cap_bytes: int,
    prepare: Callable[[Predictor, Plan], None] = lambda predictor, plan: None,
) -> Callable[[int], TracedSize]:
    """Return a function that traces the plan at one value: on the job ``job_of(value)``, and the machine,
    engine and calibration of ``base``. If the job or the trace fails at the value, with UserError or an error
    such as RuntimeError or ValueError, nothing is raised, and the ``problem`` of its result says why.

    ``prepare`` is called with the predictor of that job and the plan if the first estimate is near the cap
    (at most 10 % above as expected) and does not fit; the value is then estimated again. Whether samples
    depend on each other is tested once, with the job of ``base``.
    """
    machine = base.machine
    fits, host_fits = fits_under(cap_bytes, machine), host_holds_under(cap_bytes, machine)

    def probe(value: int) -> TracedSize:
        try:
            job = job_of(value)
            facts = dataclasses.replace(base.job_facts, batch_size=max(1, job.batch_size // plan.ranks))
            predictor = Predictor(
                job=job, machine=machine, job_facts=facts, engine=base.engine, calibration=base.calibration
            )
            if splits_batch(plan):
                predictor.dependence = base.dependence
            estimate = predictor.whole(plan)
            is_near = expected_bytes(estimate, machine) <= _NEAR * cap_bytes
            if is_near and needed_bytes(estimate, machine) > cap_bytes:
                prepare(predictor, plan)
                estimate = predictor.whole(plan)
        except (UserError, *_FAILURES) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            return TracedSize(value=value, problem=f"{kind}{first_line(error)}")
        step_s = estimate.step_s.value if estimate.step_s else None
        expected = expected_bytes(estimate, machine)
        return TracedSize(
            value=value,
            needed_bytes=needed_bytes(estimate, machine),
            expected_bytes=expected,
            fits=fits(estimate),
            expected_to_fit=expected <= cap_bytes and host_fits(_as_expected(estimate)),
            host="" if host_fits(estimate) else host_line(estimate, machine),
            step_s=step_s,
            samples_per_s=job.batch_size / step_s if step_s else None,
            tokens_per_s=job.tokens_per_batch / step_s if step_s and job.tokens_per_batch else None,
            notes=tuple(filter(None, (estimate.split_warning, *estimate.guesses))),
        )

    return probe
