"""Predict plans for many devices: quickly by sketches, which are composed from small traces, or from whole
traces; and the error between both.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy

from memfit.cost.estimate import estimate_of_sketch, interval_around, interval_of_rates
from memfit.cost.host import HostMemory, host_process_bytes, memory_bytes, oom_probability
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO, sketch_footprint
from memfit.cost.money import bill
from memfit.cost.step_time import storage_rates
from memfit.cost.stream_simulator import StreamSimulator
from memfit.engines import native
from memfit.engines.registry import engine
from memfit.planner.block_traces import BlockTracer
from memfit.planner.capacity import Cap
from memfit.planner.evaluate import Predictor
from memfit.planner.grid_search import GridSketches, Sketch, find, sketch_fields
from memfit.planner.parallelism_grid import Limits
from memfit.planner.plan_kinds import kind
from memfit.planner.plan_space import may_share, may_split
from memfit.planner.request import Progress
from memfit.planner.selection import Objective
from memfit.techniques.rank_mesh import layout
from memfit.techniques.registry import TECHNIQUES, excluded_techniques, short_label, unsupported_techniques
from memfit.trace.fake_process_group import optimizer_steps_only
from memfit.types.deadline import TimeUp
from memfit.types.errors import UserError, first_line
from memfit.types.gc_pause import pause_gc
from memfit.types.machine import Machine
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import Estimate

# They divide the blocks or the sequence of one chain of equal blocks.
NEEDS_SINGLE_CHAIN = frozenset({"pipeline", "context-parallel", "axial-parallel"})
_SKETCH_MEMORY_RATIO, _SKETCH_TIME_RATIO = 0.15, 0.40


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MultiDeviceRequest:
    """What a search for many devices is asked for.

    ``cap``: the memory of one device and of its host that a plan may use. ``bounds``: the deadline, the
    budget of money and other limits beside memory. ``progress`` is called often.
    """

    goal: Objective
    accuracy: Accuracy
    cap: Cap
    bounds: Bounds
    progress: Progress
    limit_s: float | None = None  # the search's time limit, as the result states it


class NoPartsError(UserError):
    """Raised by a search for several devices if plans are possible, but none can be predicted from traces of
    parts of the model, as when its blocks do not run one after the other. The message is the first reason."""


class MultiDevicePredictor:
    """Predicts plans of one job on one machine for different numbers of devices: by sketches, composed from
    small traces, and by whole traces.

    The small traces are shared between the numbers of devices. ``refused``: for each plan whose whole trace
    failed, a text that says why. ``pairs``: (estimate by the sketch, estimate by the whole trace) of each
    plan that was traced whole and has a step time. Creating a MultiDevicePredictor raises UserError if the
    speed of the device is unknown or the model has no repeated blocks.
    """

    def __init__(self, plan_predictor: Predictor, request: MultiDeviceRequest) -> None:
        self.plan_predictor, self.request, self.machine = plan_predictor, request, plan_predictor.machine
        self.bounds, self.progress, self.needs = request.bounds, request.progress, request.cap.needs
        self.deadline = plan_predictor.deadline
        self.engine = engine(plan_predictor.engine)
        self.refused: dict[Plan, str] = {}
        self.pairs: list[tuple[Estimate, Estimate]] = []  # (sketch, whole trace) of each finalist
        if plan_predictor.model is None:
            raise UserError(
                f"step times on {self.machine.device.name} are unknown, because its machine file lacks the "
                "peak FLOP/s (peak_flops) or the memory bandwidth (bandwidth_bytes_s)",
                hint="a search of plans for several devices needs both: add them to its [device] table",
            )
        self.model = plan_predictor.model
        self.traced = BlockTracer(plan_predictor.job, plan_predictor.trace_kind)
        self.grid_sketches: dict[int, GridSketches] = {}
        self.sketched: dict[int, list[Sketch]] = {}  # by number of devices
        self.tried: set[int] = set()  # numbers of devices for which plans were looked for
        self.cap_bytes = self.allocated_cap(request.cap.bytes)

    def allocated_cap(self, cap_bytes: float) -> float:
        """Return the highest peak of live tensors, in bytes, at which a sketch without buffers of NCCL needs
        no more device memory than ``cap_bytes``. It is found by bisection between 0 and 2**50. Return 0 if
        none fits.
        """
        fitting_bytes, excessive_bytes = 0.0, 2.0**50
        for _ in range(60):
            middle_bytes = (fitting_bytes + excessive_bytes) / 2
            allocated = interval_around(middle_bytes, _SKETCH_MEMORY_RATIO)
            memory = sketch_footprint(allocated, self.machine, reserved_ratio=ASSUMED_RESERVED_RATIO)
            probe = Estimate(
                plan=Plan(),
                allocated_bytes=allocated,
                phase_peak_bytes={},
                at_peak_bytes={},
                by_module_bytes={},
                step_s=None,
                flops_per_step=0,
                traced=False,
                reserved_bytes=memory.reserved_bytes,
                device_bytes=memory.device_bytes,
            )
            fitting_bytes, excessive_bytes = (
                (middle_bytes, excessive_bytes)
                if self.needs(probe) <= cap_bytes and self.request.cap.host(probe)
                else (fitting_bytes, middle_bytes)
            )
        return fitting_bytes

    def host_cap(self, ranks: int) -> float:
        """Return the bytes of host memory that each of ``ranks`` ranks may use for tensors of the plan: the
        memory of one host, less what its processes and loader workers need, divided by the number of ranks on
        it, and at least 0. Return 0 if the host's memory is unknown."""
        host_memory_bytes = memory_bytes(self.machine)
        if host_memory_bytes is None:
            return 0.0
        workers = self.plan_predictor.job.workers
        taken_bytes = host_process_bytes(ranks, self._machine(ranks), workers=workers)
        return max(0.0, host_memory_bytes - taken_bytes) / min(ranks, self.machine.devices_in_host)

    def fits_memory(self, estimate: Estimate) -> bool:
        return self.request.cap.holds(estimate)

    def sketches(self, ranks: int) -> GridSketches:
        """Return the selected plans for ``ranks`` devices with their predictions (`grid_search.find`), which
        are searched in the first call. Raises UserError if there is no plan for so many.
        """
        self.tried.add(ranks)
        if ranks not in self.grid_sketches:
            self.progress("search", 0, 0, f"{ranks} devices")
            limits = self.limits(ranks)
            with pause_gc():
                self.grid_sketches[ranks] = find(
                    self.traced, self.machine, self.model, limits, (self.cap_bytes, self.host_cap(ranks))
                )
            self.sketched[ranks] = [*self.grid_sketches[ranks].sketches]
        return self.grid_sketches[ranks]

    def limits(self, ranks: int) -> Limits:
        """Return what the job, the machine, the engine and the request allow for ``ranks`` devices."""
        devices_in_host = self.machine.devices_in_host
        known_techniques = self.engine.known - excluded_techniques(self.plan_predictor.job_facts)
        degrees = tuple(2**i for i in range(5) if 2**i <= min(ranks, max(devices_in_host, 1)))
        return Limits(
            ranks=ranks,
            per_host=devices_in_host,
            batch=self.plan_predictor.job.batch_size,
            blocks=self.traced.blocks,
            device=self.plan_predictor.trace_kind,
            tensor=degrees,
            context=tuple(d for d in degrees if d <= 8) if self.traced.is_single_chain else (1,),
            experts=self.traced.experts,
            chunks=self.plan_predictor.job_facts.vocabulary >= 512,
            effect=self.request.accuracy.highest,
            micro_batch=self.bounds.micro_batch,
            splits=may_split(self.plan_predictor.dependence, self.request.accuracy),
            storage=storage_rates(self.machine, self.model, 1) is not None,
            shares=may_share(self.plan_predictor.dependence, self.request.accuracy),
            dependence=self.plan_predictor.dependence,
            refuses=None if self.engine.name == native.ENGINE.name else self.engine.refusals,
            without=frozenset(self.bounds.without)
            | (frozenset() if self.traced.is_single_chain else NEEDS_SINGLE_CHAIN)
            | (frozenset(TECHNIQUES) - known_techniques)
            | unsupported_techniques(self.machine),
            excluded=frozenset(self.bounds.without),
        )

    def estimates(self, ranks: int) -> list[Estimate]:
        return [self.estimate(s) for s in self.sketches(ranks).sketches]

    def sketch_of(self, plan: Plan) -> Sketch | None:
        """Return the plan's sketch, of those selected and their neighbours; None if it has none."""
        return next((s for s in self.sketched.get(plan.ranks, ()) if s.plan == plan), None)

    def neighbours(self, sketch: Sketch) -> list[Estimate]:
        """Return, as estimates, the sketches of the plans that differ from this one in the value of exactly
        one axis of its `Grid`, whether they fit or not.
        """
        ranks = sketch.grid.layout.ranks
        neighbours = self.grid_sketches[ranks].neighbours(sketch)
        self.sketched[ranks] += neighbours
        return [self.estimate(s) for s in neighbours]

    def extremes(self, counts: Sequence[int]) -> list[Estimate]:
        """Return, as estimates, the `GridSketches.extremes` for each of these numbers of devices that was
        searched: for every technique, the best and the smallest plans with it, and without it.
        """
        results = [self.grid_sketches[ranks] for ranks in counts if ranks in self.grid_sketches]
        sketches = {s.plan: s for result in results for chosen in result.extremes.values() for s in chosen}
        return [self.estimate(sketch) for sketch in sketches.values()]

    def over(self, counts: Sequence[int]) -> list[Estimate]:
        """Return, as estimates, the sketches that `grid_search.find` selects for each of these numbers of
        devices.

        Numbers for which no plan is possible are left out. If the deadline passes once a number has a plan,
        the numbers after it are left out, too. Raises the UserError of the first number if none has a plan,
        and NoPartsError if plans are possible but none can be predicted.
        """
        estimates, reasons = list[Estimate](), list[UserError]()
        for ranks in counts:
            try:
                if estimates:
                    self.deadline.check()
                estimates += self.estimates(ranks)
            except UserError as error:
                reasons.append(error)
            except TimeUp:
                break
        if len(reasons) == len(counts):
            raise reasons[0]
        if not estimates:
            refused = [text for result in self.grid_sketches.values() for text in result.refused]
            raise NoPartsError(refused[0] if refused else "no plan can be predicted from parts of the model")
        return estimates

    def expected(self, e: Estimate) -> Estimate:
        """Return the estimate that a whole trace of the plan is expected to give.

        The step time, energy, cost, CO2 and device memory of a sketch (an estimate from traces of parts) are
        multiplied by the median ratios of trace to sketch, in time and in memory, over the traced plans of
        the same kind and degrees (see `kind`), or over all traced plans if there are none of these. Host
        memory is not scaled. A traced estimate is returned unchanged, and so is a sketch if nothing was
        traced yet.
        """
        if e.traced or not self.pairs:
            return e
        similar_pairs = [p for p in self.pairs if kind(p[0].plan) == kind(e.plan)] or self.pairs
        step_ratio = statistics.median(
            w.step_s.value / s.step_s.value for s, w in similar_pairs if s.step_s and w.step_s
        )
        memory_ratio = statistics.median(
            w.allocated_bytes.value / s.allocated_bytes.value for s, w in similar_pairs
        )
        allocated = e.allocated_bytes.scaled(memory_ratio)
        device_memory = sketch_footprint(
            allocated,
            self._machine(e.plan.ranks),
            reserved_ratio=ASSUMED_RESERVED_RATIO,
            communicators=layout(e.plan).communicators,
        )
        chance = device_memory.oom_probability
        if e.host_bytes is not None:
            host = HostMemory(bytes=e.host_bytes, parts_bytes=e.host_parts_bytes)
            chance = oom_probability(chance, host, self.machine)
        return dataclasses.replace(
            e,
            step_s=e.step_s and e.step_s.scaled(step_ratio),
            allocated_bytes=allocated,
            reserved_bytes=device_memory.reserved_bytes,
            device_bytes=device_memory.device_bytes,
            device_parts_bytes=device_memory.device_parts_bytes,
            oom_probability=chance,
            energy_j=e.energy_j and e.energy_j * step_ratio,
            usd=e.usd and e.usd * step_ratio,
            co2_g=e.co2_g and e.co2_g * step_ratio,
        )

    def bottleneck(self, plan: Plan) -> list[tuple[str, float]]:
        """Return (resource of the machine, seconds by which the step would be shorter if the work of this
        resource took a tenth less time) for each resource that the plan's first distinct rank uses, largest
        saving first."""
        trace = self.plan_predictor.trace(plan, layout(plan).distinct_ranks()[0])
        simulator = StreamSimulator(model=self.model, machine=self.machine, members=trace.members)
        return list(simulator.bottleneck(trace).items())

    def estimate(self, sketch: Sketch) -> Estimate:
        """Return the sketch as an `Estimate`, with energy, cost, CO2 and the memory of device and host added.
        The interval of its peak is +-15 %, that of its step time 1/1.4 to 1/0.6 of it.
        """
        estimate = estimate_of_sketch(
            sketch.plan,
            machine=self._machine(sketch.grid.layout.ranks),
            allocated=interval_around(sketch.allocated_bytes, _SKETCH_MEMORY_RATIO),
            step_s=interval_of_rates(sketch.step_s, _SKETCH_TIME_RATIO),
            host_tensors=self.traced.host_tensors(sketch.host_bytes),
            workers=self.plan_predictor.job.workers,
        )
        return dataclasses.replace(estimate, dependence=self.plan_predictor.dependence_under(sketch.plan))

    def _machine(self, ranks: int) -> Machine:
        return dataclasses.replace(self.machine, device_count=ranks)

    def trace_or_refuse(self, sketch: Estimate) -> Estimate | None:
        """Return the plan's estimate by its whole trace (`whole`). If the plan cannot be traced, note why in
        ``refused`` and return None. Raises TimeUp if the trace would have to be made after the
        deadline."""
        try:
            return self.whole(sketch)
        except UserError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  the next best plan is still an answer
            reason = first_line(error)[:200]
        self.refused[sketch.plan] = f"{short_label(sketch.plan)} could not be traced: {reason}"
        return None

    def sketch_of_plain(self, plain_plan: Plan) -> Sketch | None:
        """Return the sketch of plain training, the plan ``plain_plan``; None if no grid for its number of
        ranks has it, or if that number was not searched."""
        if plain_plan.ranks not in self.grid_sketches:
            return None
        for grid in {id(s.grid): s.grid for s in self.grid_sketches[plain_plan.ranks].picks}.values():
            places = [(0, 0, 0, 0, i) for i in range(len(grid.states))]
            place = next((i for i in places if grid.plan(i) == plain_plan), None)
            if place is not None:
                return Sketch(
                    grid,
                    *sketch_fields(
                        grid,
                        self.grid_sketches[plain_plan.ranks].predict(grid),
                        int(numpy.ravel_multi_index(place, grid.shape)),
                    ),
                )
        return None

    def trace_ahead(self, plans: Sequence[Plan]) -> None:
        with optimizer_steps_only():
            self.plan_predictor.trace_ahead(plans)

    def whole(self, sketched_as: Estimate) -> Estimate:
        """Trace the plan of the sketch ``sketched_as`` whole and return its estimate, with energy, cost and
        CO2 of as many devices as the plan has ranks.

        If the trace gives no step time, time, energy, cost and CO2 are taken from the sketch. Otherwise (the
        sketch, the estimate by the trace) is added to ``pairs``, from which `expected` corrects other
        sketches.
        """
        with optimizer_steps_only():
            traced = self.with_bill(self.plan_predictor.whole(sketched_as.plan))
        if traced.step_s is not None:
            self.pairs.append((sketched_as, traced))
            return traced
        return dataclasses.replace(
            traced,
            step_s=sketched_as.step_s,
            usd=sketched_as.usd,
            co2_g=sketched_as.co2_g,
            energy_j=sketched_as.energy_j,
        )

    def with_bill(self, e: Estimate) -> Estimate:
        """Return the estimate with energy, cost and CO2 of as many devices as the plan has ranks, in place of
        those of all devices of the machine.
        """
        cost = bill(self._machine(e.plan.ranks), step_s=e.step_s.value if e.step_s else None)
        return dataclasses.replace(e, energy_j=cost.energy_j, usd=cost.usd, co2_g=cost.co2_g)
