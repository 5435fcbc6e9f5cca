"""The search for many devices, whole: grids priced, finalists traced, the answer with what more would buy.

Nothing depends on how long anything took, so the answer is the same every time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memfit.cost.estimate import around, modelled_boundary, scaled
from memfit.cost.footprint import ASSUMED_RESERVED_RATIO, sketched
from memfit.cost.money import bill
from memfit.cost.play import Player
from memfit.engines import native
from memfit.engines.registry import engine
from memfit.pricing import Pricer
from memfit.scaling.find import Found, Sketch, find, per_host
from memfit.scaling.traced import Traced
from memfit.search.choose import Objective, best, frontier, keeps, score
from memfit.search.layouts import CUTTING, Limits
from memfit.search.space import complexity
from memfit.techniques.registry import TECHNIQUES, brief, effect_of, plain, technique
from memfit.techniques.world import layout
from memfit.trace.ranks import priming
from memfit.types.collector import uncollected
from memfit.types.errors import NothingFits, UserError
from memfit.types.machine import Machine
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import Choice, Estimate, Reason, SearchResult, Sensitivity

FINALISTS, _MOST_FINALISTS, _TRACED_BLOCKS = 3, 12, 48  # more of small models, whose traces are quick
_TOO_SLOW = 0.85  # sketches of plans of up to 8 ranks were up to a quarter off, most of them less than this
_TOO_LARGE = 0.5  # and of memory: short pipelines, where what is gathered at the ends is half of all
_SKETCH_MEMORY_RATIO, _SKETCH_TIME_RATIO = 0.15, 0.40
_GAIN = 0.03  # a change of the score that is worth telling

Fits = Callable[[Estimate], bool]
Tell = Callable[[str, int, int, str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is wanted. ``needs``: the memory that an estimate asks of a device."""

    goal: Objective
    accuracy: Accuracy
    cap_bytes: int
    needs: Callable[[Estimate], int]
    bounds: Bounds
    tell: Tell


class Scale:
    """A search of one job on one machine. Traces are kept from one number of devices to the next."""

    def __init__(self, pricer: Pricer, aim: Aim) -> None:
        self.pricer, self.aim, self.machine = pricer, aim, pricer.machine
        self.bounds, self.tell, self.needs = aim.bounds, aim.tell, aim.needs
        self.engine = engine(pricer.engine)
        self.refused: dict[Plan, str] = {}
        self.pairs: list[tuple[Estimate, Estimate]] = []  # finalists, sketched and traced
        if pricer.model is None:
            raise UserError(
                f"speeds of {self.machine.device.name} are unknown",
                hint="add its peak and bandwidth to the machine file",
            )
        self.model = pricer.model
        self.traced = Traced(pricer.job, pricer.device)
        self.found: dict[int, Found] = {}
        self.cap_bytes = self._allocated_cap()

    def _allocated_cap(self) -> float:
        """The highest peak of a sketch that fits."""
        low, high = 0.0, 2.0**50
        for _ in range(60):
            middle = (low + high) / 2
            allocated = around(middle, _SKETCH_MEMORY_RATIO)
            memory = sketched(allocated, self.machine, reserved_ratio=ASSUMED_RESERVED_RATIO)
            probe = Estimate(
                plan=Plan(), allocated_bytes=allocated, phase_peak_bytes={}, at_peak_bytes={},
                by_module_bytes={}, step_s=None, flops_per_step=0, traced=False,
                reserved_bytes=memory.reserved_bytes, device_bytes=memory.device_bytes,
            )  # fmt: skip
            low, high = (middle, high) if self.fits_memory(probe) else (low, middle)
        return low

    def fits_memory(self, estimate: Estimate) -> bool:
        return self.needs(estimate) <= self.aim.cap_bytes

    def sketches(self, ranks: int) -> Found:
        if ranks not in self.found:
            self.tell("search", 0, 0, f"{ranks} devices")
            limits = self._limits(ranks)
            with uncollected():
                self.found[ranks] = find(self.traced, self.machine, self.model, limits, self.cap_bytes)
        return self.found[ranks]

    def _limits(self, ranks: int) -> Limits:
        each, known = per_host(self.machine), self.engine.known - self.pricer.space.refused
        degrees = tuple(2**i for i in range(5) if 2**i <= min(ranks, max(each, 1)))
        return Limits(
            ranks=ranks, per_host=each, batch=self.pricer.job.batch_size, blocks=self.traced.blocks,
            device=self.pricer.device, tensor=degrees, context=tuple(d for d in degrees if d <= 8),
            chunks=self.pricer.space.vocabulary >= 512, effect=self.aim.accuracy.highest,
            micro_batch=self.bounds.micro_batch,
            refuses=None if self.engine.name == native.ENGINE.name else self.engine.supports,
            without=frozenset(self.bounds.without) | (frozenset(TECHNIQUES) - known),
        )  # fmt: skip

    def estimates(self, ranks: int) -> list[Estimate]:
        return [self.estimate(s) for s in self.sketches(ranks).sketches]

    def over(self, counts: Sequence[int]) -> list[Estimate]:
        """Of all these numbers of devices; raises the first one's UserError where none of them has a plan."""
        found, reasons = list[Estimate](), list[UserError]()
        for ranks in counts:
            try:
                found += self.estimates(ranks)
            except UserError as error:
                reasons.append(error)
        if len(reasons) == len(counts):
            raise reasons[0]
        return found

    def expected(self, e: Estimate) -> Estimate:
        """As a trace would have it: a sketch is as far off as those traced of its kind, or as all that were
        traced, in the middle."""
        if e.traced or not self.pairs:
            return e
        alike = [p for p in self.pairs if _kind(p[0].plan) == _kind(e.plan)] or self.pairs
        step = statistics.median(w.step_s.value / s.step_s.value for s, w in alike if s.step_s and w.step_s)
        memory = statistics.median(w.allocated_bytes.value / s.allocated_bytes.value for s, w in alike)
        return dataclasses.replace(
            e, step_s=e.step_s and scaled(e.step_s, step), allocated_bytes=scaled(e.allocated_bytes, memory),
            usd=e.usd and e.usd * step, co2_g=e.co2_g and e.co2_g * step,
        )  # fmt: skip

    def bottleneck(self, plan: Plan) -> list[tuple[str, float]]:
        """(resource, seconds saved by a tenth less work for it) of the traced plan, largest first."""
        trace = self.pricer.trace(plan, layout(plan).distinct_ranks()[0])
        player = Player(model=self.model, machine=self.machine, members=trace.members)
        return list(player.bottleneck(trace).items())

    def estimate(self, sketch: Sketch) -> Estimate:
        """The sketch in the words of an estimate."""
        machine = self._machine(sketch.grid.layout.ranks)
        cost = bill(machine, step_s=sketch.step_s)
        allocated = around(sketch.allocated_bytes, _SKETCH_MEMORY_RATIO)
        memory = sketched(allocated, machine, reserved_ratio=ASSUMED_RESERVED_RATIO)
        return Estimate(
            plan=sketch.plan, allocated_bytes=allocated, phase_peak_bytes={}, at_peak_bytes={},
            by_module_bytes={}, step_s=around(sketch.step_s, _SKETCH_TIME_RATIO), flops_per_step=0,
            energy_j=cost.energy_j, energy_boundary=modelled_boundary(machine), usd=cost.usd,
            co2_g=cost.co2_g, traced=False, reserved_bytes=memory.reserved_bytes,
            device_bytes=memory.device_bytes, device_parts_bytes=memory.device_parts_bytes,
            oom_probability=memory.oom_probability,
            host_bytes=around(sketch.host_bytes, _SKETCH_MEMORY_RATIO) if sketch.host_bytes else None,
        )  # fmt: skip

    def _machine(self, ranks: int) -> Machine:
        return dataclasses.replace(self.machine, device_count=ranks)

    def traced_or_refused(self, sketch: Estimate) -> Estimate | None:
        try:
            return self.whole(sketch)
        except Exception as error:  # noqa: BLE001  the next best is still an answer, and the reason is told
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            self.refused[sketch.plan] = f"{brief(sketch.plan)}: {reason}"
            return None

    def whole(self, sketched_as: Estimate) -> Estimate:
        """Traced. Seconds, where the trace gives none, are the sketch's."""
        with priming():
            traced = self.billed(self.pricer.whole(sketched_as.plan))
        if traced.step_s is not None:
            self.pairs.append((sketched_as, traced))
            return traced
        return dataclasses.replace(
            traced, step_s=sketched_as.step_s, usd=sketched_as.usd, co2_g=sketched_as.co2_g,
            energy_j=sketched_as.energy_j,
        )  # fmt: skip

    def billed(self, e: Estimate) -> Estimate:
        """For the devices that the plan uses, as sketches are."""
        cost = bill(self._machine(e.plan.ranks), step_s=e.step_s.value if e.step_s else None)
        return dataclasses.replace(e, energy_j=cost.energy_j, usd=cost.usd, co2_g=cost.co2_g)


def counts(ranks: int, goal: Objective) -> tuple[int, ...]:
    """Numbers of devices to try: all of them, or fewer too where that can be better."""
    if goal in (Objective.FASTEST, Objective.SMALLEST):
        return (ranks,)
    fewer = [ranks]
    while fewer[-1] % 2 == 0:
        fewer.append(fewer[-1] // 2)
    return tuple(fewer)


def search_scale(pricer: Pricer, ranks: int, aim: Aim) -> SearchResult:
    """Raises NothingFits with what would have to change, UserError where the batch cannot be shared."""
    scale, goal = Scale(pricer, aim), aim.goal

    def fits(estimate: Estimate) -> bool:
        return scale.fits_memory(estimate) and keeps(aim.bounds, estimate)

    sizes = counts(ranks, goal)
    estimates = scale.over(sizes)
    finalists = _finalists(scale, estimates, goal, fits)
    tried = {e.plan for e in finalists}
    known = [*finalists, *(e for e in estimates if e.plan not in tried and e.plan not in scale.refused)]
    unshared = plain(min(ranks, pricer.job.batch_size))  # replicas need a sample each
    basis = next((e for e in known if e.plan == unshared), None)
    if basis is None or (not basis.traced and fits(basis)):
        basis = scale.billed(scale.pricer.whole(unshared))
    known = [e for e in known if e.plan != basis.plan]
    winner = best([e for e in (*finalists, basis) if e.traced and fits(e)], goal)
    if winner is None:
        raise _nothing(scale, [*finalists, basis], ranks)
    choices = [e for e in frontier([*known, basis]) if fits(e)]
    by_plan = {e.plan: e for e in (winner, basis, *choices)}
    smallest = min(by_plan.values(), key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        held = not e.traced or fits(e)  # sketches that do not are in no choice
        return Choice(estimate=e, fits=held, effect=effect_of(e.plan), reasons=reasons)

    recommended = choice(winner, (*_rivals(scale, winner, [*known, basis], fits), *_cannot(scale)))
    considered = sum(f.considered for n, f in scale.found.items() if n in sizes)
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    return SearchResult(
        goal=goal.value, cap_bytes=aim.cap_bytes, considered=considered,
        baseline=choice(basis), frontier=tuple(recommended if e is winner else choice(e) for e in ordered),
        recommended=recommended, smallest=choice(smallest),
        sensitivity=tuple(_sensitivity(scale, winner, known, ranks)),
    )  # fmt: skip


def _finalists(scale: Scale, estimates: Sequence[Estimate], goal: Objective, fits: Fits) -> list[Estimate]:
    """The best sketches traced whole, until none of the rest could be better or enough were traced. The rest
    are taken to be as far from their sketch as the last traced of their kind, or as much quicker as a sketch
    may be too slow; and to need as much more memory as the heaviest that did not fit."""
    waiting = _tied_first([e for e in estimates if fits(e)], goal)
    traced: list[Estimate] = []
    known: dict[object, float] = {}  # by kind: what whole traces are of their sketches
    too_high = _TOO_LARGE if goal is Objective.SMALLEST else _TOO_SLOW
    heaviest, most = 1.0, max(FINALISTS, min(_MOST_FINALISTS, _TRACED_BLOCKS // scale.traced.blocks))

    def hoped(e: Estimate) -> float:
        return score(e, goal) * known.get(_kind(e.plan), too_high)

    for tries in range(3 * most):
        waiting = [e for e in waiting if scale.needs(e) * heaviest <= scale.aim.cap_bytes]
        fitting = [e for e in traced if fits(e)]
        top = best(fitting, goal)
        sketch = min(waiting, key=hoped, default=None) if traced else next(iter(waiting), None)
        if sketch is None or len(fitting) >= most:
            break
        if top is not None and score(top, goal) <= hoped(sketch):
            break
        waiting.remove(sketch)
        scale.tell("finalists", tries, most, brief(sketch.plan))
        whole = scale.traced_or_refused(sketch)
        if whole is None:
            waiting = [e for e in waiting if _family(e.plan) != _family(sketch.plan)]
            continue
        traced.append(whole)
        known[_kind(sketch.plan)] = score(whole, goal) / score(sketch, goal)
        if not scale.fits_memory(whole):
            heaviest = max(heaviest, scale.needs(whole) / scale.needs(sketch))
    if not any(map(fits, traced)):
        smallest = sorted(estimates, key=lambda e: (e.allocated_bytes.value, complexity(e.plan)))
        found = (scale.traced_or_refused(e) for e in smallest[:FINALISTS])
        traced += list(itertools.islice(filter(None, found), 1))
    return traced


def _kind(plan: Plan) -> tuple[object, ...]:
    """What decides how far a sketch is off: the layout, and how data parallelism is set."""
    cut = tuple((u.technique, tuple(k for k in u.knobs if k[0] != "micro_batches")) for u in plan.uses
                if u.technique in CUTTING)  # fmt: skip
    return cut, tuple(u for u in plan.uses if technique(u.technique).slot == "data-parallel")


def _family(plan: Plan) -> tuple[object, ...]:
    """What plans share that fail together: the techniques, and how data parallelism is set."""
    data = [u for u in plan.uses if technique(u.technique).slot == "data-parallel"]
    return tuple(u.technique for u in plan.uses), tuple(data)


def _tied_first(fitting: list[Estimate], goal: Objective) -> list[Estimate]:
    """In order, but the mildest and simplest of those that are as good as the best before it."""
    ordered = sorted(fitting, key=lambda e: (score(e, goal), complexity(e.plan)))
    preferred = best(ordered, goal)
    return [preferred, *(e for e in ordered if e is not preferred)] if preferred else []


def _rivals(scale: Scale, winner: Estimate, known: Sequence[Estimate], fits: Fits) -> Iterator[Reason]:
    """For every technique the winner has: the best plan without it; for one it has not: the best with it."""
    goal = scale.aim.goal

    def relative(e: Estimate) -> float:  # like with like
        return score(scale.expected(e), goal) / score(winner, goal)

    used = {u.technique for u in winner.plan.uses}
    for name in sorted({u.technique for e in known for u in e.plan.uses} | used):
        inside = name in used
        others = [e for e in known if (e.plan.get(name) is None) == inside]
        rivals = [e for e in others if fits(e)]
        if not rivals:
            yield Reason(kind="needed" if inside else "left_out_does_not_fit", technique=name)
            continue
        rival = min(rivals, key=lambda e: (relative(e), complexity(e.plan)))
        worse, rival = relative(rival) > 1 + _GAIN, scale.expected(rival)
        ratio = rival.step_s.value / winner.step_s.value if rival.step_s and winner.step_s else None
        change = int(winner.allocated_bytes.value - rival.allocated_bytes.value)
        kinds = ("without_worse", "without_as_good") if inside else ("left_out_slower", "left_out_not_needed")
        yield Reason(
            kind=kinds[not worse], technique=name, saved_bytes=change, time_ratio=ratio,
            detail=brief(rival.plan),
        )  # fmt: skip


def _cannot(scale: Scale) -> list[Reason]:
    """What the model cannot be cut by, and finalists that could not be traced."""
    found = [r for f in scale.found.values() for r in f.refused] + list(scale.refused.values())
    return [Reason(kind="cannot", technique="", detail=text) for text in dict.fromkeys(found)]


def _sensitivity(
    scale: Scale, winner: Estimate, known: Sequence[Estimate], ranks: int
) -> Iterator[Sensitivity]:
    """What more memory, more devices, or a quicker part of the machine would change."""
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes

    def better(e: Estimate) -> bool:
        return score(scale.expected(e), goal) < score(winner, goal) * (1 - _GAIN)

    bigger = [e for e in known if keeps(scale.bounds, e) and scale.needs(e) > cap_bytes and better(e)]
    if bigger:
        least = min(bigger, key=lambda e: (scale.needs(e), score(e, goal)))
        more = scale.needs(least) - cap_bytes
        yield _told("memory", winner, scale.expected(least), more_bytes=more)
    if goal is not Objective.FEWEST:
        try:
            twice = best([e for e in scale.estimates(2 * ranks) if scale.fits_memory(e)], goal)
        except UserError:
            twice = None
        if twice is not None:
            yield _told("devices", winner, scale.expected(twice), more_devices=2 * ranks - winner.plan.ranks)
    for resource, saved_s in scale.bottleneck(winner.plan):
        step_s = winner.step_s.value if winner.step_s else math.inf
        if saved_s > 0.005 * step_s:
            yield Sensitivity(kind=resource, time_ratio=1 - saved_s / step_s)


def _told(kind: str, winner: Estimate, other: Estimate, **more: Any) -> Sensitivity:
    def ratio(value: Callable[[Estimate], float | None]) -> float | None:
        now, then = value(winner), value(other)
        return then / now if now and then else None

    return Sensitivity(
        kind=kind, plan=brief(other.plan), **more,
        time_ratio=ratio(lambda e: e.step_s.value if e.step_s else None), cost_ratio=ratio(lambda e: e.usd),
        carbon_ratio=ratio(lambda e: e.co2_g),
    )  # fmt: skip


def _nothing(scale: Scale, known: Sequence[Estimate], ranks: int) -> NothingFits:
    """With the least changes, each alone, that would make a plan fit."""
    goal, cap_bytes = scale.aim.goal, scale.aim.cap_bytes
    least = min(known, key=lambda e: (scale.needs(e), complexity(e.plan)))
    ways = []
    fitting = [e for e in known if scale.fits_memory(e)]
    if fitting:
        quickest = min(fitting, key=lambda e: score(e, Objective.FASTEST))
        dearest = min(fitting, key=lambda e: score(e, Objective.CHEAPEST))
        if scale.bounds.deadline_s is not None and quickest.step_s:
            needed = quickest.step_s.value * scale.bounds.steps
            ways.append(f"a deadline of {needed / 3600:.2f} h, with {brief(quickest.plan)}")
        if scale.bounds.budget_usd is not None and dearest.usd is not None:
            ways.append(f"a budget of {dearest.usd * scale.bounds.steps:.2f} USD, with {brief(dearest.plan)}")
    else:
        ways.append(f"{(scale.needs(least) - cap_bytes) / 2**30:.1f} GiB more on each device")
    for times in (2, 4, 8, 16):
        try:
            wider = [e for e in scale.estimates(times * ranks) if scale.fits_memory(e)]
        except UserError:
            continue
        if more := [e for e in wider if keeps(scale.bounds, e)]:
            found = min(more, key=lambda e: (score(e, goal), complexity(e.plan)))
            ways.append(f"{times * ranks} devices, with {brief(found.plan)}")
            break
    return NothingFits(
        cap_bytes=cap_bytes, least_bytes=scale.needs(least), plan_text=brief(least.plan), ways=tuple(ways)
    )
