"""Predict memory, time and cost of plans: exactly, by tracing them whole (`Predictor.whole`), or quickly, by
composing traces of their parts (`Predictor.sketch`).

A search needs predictions of hundreds of plans that share their parts. The memory that forward and backward
use above the resident bytes depends on precision, recomputation and micro-batch, not on the optimizer. The
optimizer's phase depends on precision and adapters, not on recomputation. Values for a micro-batch size are
interpolated linearly between the smallest and the largest one. Blocks repeat. The best sketches are traced
whole before anything is recommended, unless Ctrl-C ends the search first.

An example: activation-checkpointing(every=1) + adafactor + gradient-accumulation(micro_batches=2), of a batch
of 4 samples and a model of 12 equal blocks. Its sketch is composed of three parts (`Predictor._composed_of`):

- activation-checkpointing(every=1) with the whole batch (`_forward_backward_plan`), with weight 1/3
- the same with 4 micro-batches of one sample, with weight 2/3
- adafactor with 4 micro-batches, two steps (`_optimizer_plan`), for the optimizer's phase

Each is traced with 3 blocks, lengthened to 4 or traced with these, too, and extrapolated linearly to 12. What
was seen in a trace becomes a `PartDigest`, whose entries are a vector: resident bytes, bytes of forward above
these, and so on. The vectors of the first two parts are added up with their weights. Resident bytes and the
optimizer's entries are taken from the third. The peak of forward is then resident bytes + forward, that of
backward resident bytes + backward, and the highest peak is the prediction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy

from memfit.cost.estimate import (
    estimate,
    estimate_of_sketch,
    interval_around,
    interval_of_rates,
    peak_with_batch,
    widened,
)
from memfit.cost.host import HostTensors
from memfit.cost.memory import levels, step_ops
from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.cost.op_time import TimeModel, nominal_s, step_basis, time_model
from memfit.cost.step_time import host_bytes_s, simulate_step, sketched_s
from memfit.cost.step_time_calibration import factor
from memfit.engines.registry import engine
from memfit.model.blocks import find_stacks
from memfit.model.scalar_parameters import refuse_scalars
from memfit.planner.operator_timer import OperatorTimer
from memfit.planner.recompute_budget import choose_tensors, open_budget, resolved_plans
from memfit.planner.stored_predictions import CallOutcome, StoredPredictions, Traces
from memfit.store import trace_columns
from memfit.store.prediction_cache import digest_of
from memfit.techniques.base import JobFacts, StepPart
from memfit.techniques.rank_mesh import layout
from memfit.techniques.recompute.checkpointing import kept_operators
from memfit.techniques.registry import freezes_parameters, make_plain_plan, splits_batch, technique
from memfit.trace.sample_dependence import remember_dependence, sample_dependence, trial_limit_bytes
from memfit.trace.trace_extrapolation import deep_traces, find_repeated_blocks, traces_of
from memfit.trace.trace_pool import ForkedWorkers, from_both_ends, run_parallel
from memfit.trace.tracer import fake_model, trace, use_step
from memfit.trace.truncated_model import with_blocks
from memfit.trace.unroll import Blocks, Mismatch, add_periods, mix_recomputed
from memfit.types.deadline import Deadline, TimeUp
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Job
from memfit.types.machine import Calibration, Machine
from memfit.types.plan import Plan, Use, use
from memfit.types.result import Estimate
from memfit.types.serialization import to_plain
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, Trace
from memfit.worker.train import step_maker

_ACCUMULATION, _CHECKPOINTING = "gradient-accumulation", "activation-checkpointing"
# It runs each module slice by slice, so that its parts take several times as long to trace.
SLOW_TO_TRACE = "chunking"
_SKETCH_MEMORY_RATIO, _SKETCH_TIME_RATIO = 0.10, 0.40

# The numbers a sketch adds up, as one vector so that parts compose by plain arithmetic.
_RESIDENT, _FORWARD, _BACKWARD, _OPTIMIZER, _SAVED = range(5)
_FORWARD_AGAIN, _BACKWARD_AGAIN = 5, 6  # in a later micro-batch, when the gradients of earlier ones exist
_STEPPED, _FLOPS, _TENSORS, _HOST = range(7, 11)  # _STEPPED: backward with the optimizer stepping inside it
_FORWARD_OFFLOADED, _BACKWARD_OFFLOADED = 11, 12  # by how much offloading activations lowers a peak
_MICRO_S, _STEP_S = 13, 14
_ENTRIES = 15
_OFFLOADED_BYTES = 64 * 1024  # the offload technique's default minimum
# Ticks of the trace's clock for which an offloaded activation is in use in forward, and again in backward.
_USED_TICKS = 16
_LASTING = (Category.PARAMETER, Category.OPTIMIZER_STATE, Category.EMA, Category.INPUT)
_SCALAR_BYTES = 4
# Fields of an estimate that say nothing of memory.
_COSTS = ("step_s", "flops_per_step", "step_basis", "energy_j", "energy_boundary", "usd", "co2_g")


Weighted = list[tuple[OpCall, int]]


class SketchPart(NamedTuple):
    """A part of a sketch: a plan to trace, and the number of steps to trace."""

    plan: Plan
    steps: int


class PartKey(NamedTuple):
    """What a `PartDigest` was seen in: a trace of ``steps`` steps of the plan, with ``blocks`` blocks of the
    model (0: all)."""

    plan: Plan
    blocks: int
    steps: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PartDigest:
    """What was seen in the last step of a trace (`_digest`): ``entries``, numbers such as bytes and FLOPs in
    the order that `_digest` lists; (operator, number of its calls) of all micro-batches and of the optimizer;
    and the number of micro-batches."""

    entries: list[float]
    micro_ops: Weighted
    optimizer_ops: Weighted
    micro_batches: int


@dataclasses.dataclass(kw_only=True)
class Predictor:
    """Predicts memory, time and cost of plans of one job on one machine and engine. Traces are cached; a new
    calibration changes the predictions that are made from them.

    ``model``: predicts the seconds of operators; None if the device's speed is unknown, and then predictions
    have no step time. ``part_digests``: what was seen in each traced part, from which sketches are composed.
    ``own_memory``: an estimate whose memory stands for that of its plan; None: memory is that of the traces.
    ``choices``: for plans with a memory budget for recomputation, the plan with the tensors to recompute
    chosen, or why the budget cannot be met. ``stored``: what was predicted of the job before, on disk; None:
    nothing is read from disk or kept there, nor is it if the predictor's job is replaced by another.
    ``deadline``: once it has passed, a method that would have to make a trace raises TimeUp.
    ``operator_timer``: the process that times operators during a search for this machine; None: each
    calibration starts its own.
    """

    job: Job
    machine: Machine
    job_facts: JobFacts
    engine: str = "native"
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    model: TimeModel | None = None
    lines: bool = False  # whether traces record the user's source line of each allocation
    traces: MutableMapping[tuple[Plan, int], Trace] = dataclasses.field(default_factory=Traces)
    part_digests: dict[PartKey, PartDigest] = dataclasses.field(default_factory=dict)
    choices: dict[Plan, Plan | UserError] = dataclasses.field(default_factory=dict)
    is_searching: bool = False  # whether tensors to recompute are chosen quickly (`choose_tensors`)
    # reserved over allocated bytes of the plain plan, once traced
    reserved_ratio: float = ASSUMED_RESERVED_RATIO
    stored: StoredPredictions | None = None
    own_memory: Estimate | None = None
    deadline: Deadline = dataclasses.field(default_factory=Deadline)
    operator_timer: OperatorTimer | None = None
    plain: dict[int, tuple[int, HostTensors]] = dataclasses.field(default_factory=dict)  # see `_plain`
    # Entries of the digests, with the seconds that the present calibration gives, as vectors to add up.
    _vectors: dict[PartKey, numpy.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _workers: tuple[Any, ForkedWorkers] | None = dataclasses.field(default=None, init=False, repr=False)
    # Traces of parts, as bytes, from which others are put together; and these, with the two plans that they
    # need.
    _source_traces: dict[Plan, CallOutcome] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _parts_to_mix: dict[SketchPart, tuple[Plan, Plan]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    # By (plan, lines), with the present calibration: one estimate for every distinct rank.
    _rank_estimates: dict[tuple[Plan, bool], list[Estimate]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.traces, Traces):
            given_traces, self.traces = self.traces, Traces()
            self.traces.update(given_traces)
        self.recalibrate(self.calibration)

    @property
    def trace_kind(self) -> str:
        return self.machine.device.trace_kind

    @property
    def _decoded(self) -> Traces:
        assert isinstance(self.traces, Traces)
        return self.traces

    @functools.cached_property
    def repeats(self) -> bool:
        """Whether the model has repeated blocks that are all alike (`find_repeated_blocks`), so that traces
        with few of them can represent the whole model. It becomes False if such a trace fails.
        """
        if (stored := self._stored()) is None:
            return self._blocks is not None
        return stored.get_or_compute(bool, lambda: self._blocks is not None, "repeats")

    @functools.cached_property
    def _blocks(self) -> tuple[str, int, int] | None:
        return find_repeated_blocks(fake_model(self.job), self.job)

    @functools.cached_property
    def dependence(self) -> SampleDependence:
        """Whether and how the samples of a batch of the job depend on each other; tested on first access."""
        if (stored := self._stored()) is None:
            return sample_dependence(self.job)
        limit_bytes = trial_limit_bytes()
        return stored.get_or_compute(
            SampleDependence, lambda: sample_dependence(self.job), "dependence", limit_bytes
        )

    def test_dependence(
        self,
        plans: Sequence[Plan],
        deadline: Deadline,
        progress: Callable[[int, int, str], None] = lambda *state: None,
    ) -> None:
        """Test whether samples depend on each other (`dependence`) in one process, while others trace the
        parts of the sketches of ``plans``, none of which splits the batch: a search needs these whatever the
        answer is. Do nothing if the answer is known, or if no part is left to trace. After the deadline the
        answer may still be unknown. ``progress(done, count, label)`` is called whenever a trace begins or
        ends, with the numbers of finished and of all parts, and the label of a part's plan."""
        stored, is_known = self._stored(), "dependence" in self.__dict__
        if is_known or (stored is not None and stored.has("dependence", trial_limit_bytes())):
            return
        counts = Counter(
            part
            for plan in plans
            for part in (SketchPart(_forward_backward_plan(plan), 1), self._composed_of(plan)[1][-1])
        )
        sources = {part: self._mix_sources(*part) for part in counts}
        parts = [part for part in counts if sources[part] is None and not self._load_part(*part)]
        source_plans = {plan for plans_of_part in sources.values() for plan in plans_of_part or ()}
        if parts:
            with contextlib.suppress(TimeUp):
                ordered = self._in_order(parts, plans, counts)
                self._trace_parts(ordered, source_plans, progress, deadline, self._dependence_outcome)

    def trace_error(self, plan: Plan) -> str:
        """Return the text of the UserError that tracing forward and backward under the plan with the job's
        model raises; "" if they can be traced. Other errors are raised. What is traced is kept as a part of
        sketches."""
        part = SketchPart(_forward_backward_plan(plan), 1)
        try:
            if not self._load_part(*part):
                self._trace_parts([part], (), lambda *state: None, Deadline())
        except UserError as error:
            return str(error)
        return ""

    def _dependence_outcome(self) -> CallOutcome:
        """Test whether samples depend on each other. The value is what `dependence` returns."""
        return self._run(lambda: sample_dependence(self.job))

    def dependence_under(self, plan: Plan) -> SampleDependence | None:
        """Return `dependence` if the plan splits the batch into micro-batches or over data-parallel ranks,
        else None. Raises UserError if the plan's degrees do not fit its ranks.
        """
        return self.dependence if splits_batch(plan) else None

    def recalibrate(self, calibration: Calibration) -> None:
        """Replace the calibration. What was predicted with the one before is dropped; traces are kept."""
        self.calibration = calibration
        seen_ops = self.seen() if calibration.op_s else ()  # only timed operators matter
        self.model = time_model(self.machine.device, calibration, seen_ops)
        # All depend on the seconds of operators.
        self.choices, self._vectors, self._rank_estimates = {}, {}, {}
        self._kept_digest = ""

    def _stored(self) -> StoredPredictions | None:
        return self.stored if self.stored is not None and self.stored.job is self.job else None

    def _run(self, call: Callable[[], Any]) -> CallOutcome:
        """Return what the function returns, and whether it may be kept on disk. It may not if no predictions
        are kept there, or if the function read files or loaded modules that are no part of the job's
        content."""
        stored = self._stored()
        return stored.run(call) if stored is not None else CallOutcome(call(), may_be_kept=False)

    def _prediction_digest(self) -> str:
        """Return a digest of all that the predictions depend on beside the traces: the machine and what is
        known of the seconds of its operators."""
        if not self._kept_digest:
            curves = sorted(self.model.curves.items()) if self.model else None
            facts = to_plain(self.machine), to_plain(self.calibration), to_plain(curves)
            self._kept_digest = digest_of(*facts)
        return self._kept_digest

    def resolve(self, plan: Plan) -> Plan:
        """Return the plan with the tensors to recompute chosen, if it has optimal-checkpointing with a memory
        budget and they are not chosen yet; any other plan is returned itself. Raises UserError if the budget
        cannot be met, or if the plan is not valid or cannot be traced.
        """
        if open_budget(plan) is None:
            return plan
        if plan not in self.choices:
            self.choices[plan] = self._choose(plan)
        choice = self.choices[plan]
        if isinstance(choice, UserError):
            raise choice
        return choice

    def _choose(self, plan: Plan) -> Plan | UserError:
        """Return what `choose_tensors` returns or raises: what is on disk, or else what a forked process
        finds, in which packages import faster (`trace`)."""
        facts = (self.trace_kind, self.is_searching, self._prediction_digest(), plan.fingerprint)
        stored, kind = self._stored(), "chosen tensors"
        known: Plan | None = stored.read(Plan, kind, *facts) if stored is not None else None
        if known is not None:
            return known
        # The forked processes have their own copies of what may have changed since they were forked.
        call = functools.partial(
            self._choice_outcome, plan, self.model, self.calibration, quickly=self.is_searching
        )
        with pause_gc():
            outcome = run_parallel([call], workers=self._forked_workers(), deadline=self.deadline)[0]
        choice: Plan | UserError = outcome.value
        if stored is not None and outcome.may_be_kept and isinstance(choice, Plan):
            stored.write(choice, kind, *facts)
        return choice

    def _choice_outcome(
        self, plan: Plan, model: TimeModel | None, calibration: Calibration, *, quickly: bool
    ) -> CallOutcome:
        def choice() -> Plan | UserError:
            try:
                return choose_tensors(
                    self.job,
                    plan,
                    device=self.trace_kind,
                    seconds=model.op_s if model else nominal_s,
                    calibration=calibration,
                    quickly=quickly,
                )
            except UserError as error:
                return error

        return self._run(choice)

    def seen(self) -> list[OpCall]:
        """Return one operator call for each distinct signature in the cached traces of whole plans. Traces of
        parts, from which sketches are composed, do not count.
        """
        ops = {op.signature: op for t in self.traces.values() for op in t.ops}
        return list(ops.values())

    def trace(self, plan: Plan, rank: int = 0) -> Trace:
        """Return the trace of the plan on this rank: the cached one, that on disk, or a new one. Raises
        UserError if the plan's memory budget for recomputation cannot be met, or if the model does not
        support the plan; TimeUp if the trace would have to be made after the deadline."""
        plan = self.resolve(plan)
        self._trace(plan, [rank])
        return self.traces[plan, rank]

    def _trace(self, plan: Plan, ranks: Iterable[int]) -> None:
        if missing_ranks := self._load_and_list_missing(plan, ranks):
            self.deadline.check()
            with pause_gc():
                result = self._traced_outcome(plan, missing_ranks)
                keys = [(plan, rank) for rank in missing_ranks]
                self._add(keys, _as_bytes(result) if result.may_be_kept else result)

    def _load_and_list_missing(self, plan: Plan, ranks: Iterable[int]) -> list[int]:
        """Add to the traces those of the plan on these ranks that are on disk. Return the ranks without a
        trace."""
        stored = self._stored()
        for rank in ranks:
            if stored is not None and (plan, rank) not in self.traces:
                data = stored.read_bytes("trace", *self._facts(plan, rank))
                if data is not None:
                    self._decoded.add((plan, rank), data)
        return [rank for rank in ranks if (plan, rank) not in self.traces]

    def _facts(self, plan: Plan, rank: int) -> tuple[Any, ...]:
        """Return what decides the plan's trace beside the job: engine, kind of device, whether source lines
        are recorded, the plan's fingerprint, and the rank."""
        return self.engine, self.trace_kind, self.lines, plan.fingerprint, rank

    def _traced_outcome(self, plan: Plan, ranks: list[int]) -> CallOutcome:
        """Trace the plan on these ranks. The value of the result is a list of the traces. They may not be
        kept on disk if the engine traces a training step of its own."""
        if engine(self.engine).own_trace:  # it depends on more than the job's content
            return CallOutcome(self._trace_ranks(plan, ranks), may_be_kept=False)
        return self._run(lambda: self._trace_ranks(plan, ranks))

    def _add(self, keys: Sequence[tuple[Plan, int]], result: CallOutcome) -> None:
        """Add the traces in the value of the result, and keep them on disk if they may be kept."""
        stored = self._stored()
        for (plan, rank), traced in zip(keys, result.value, strict=True):
            self._decoded.add((plan, rank), traced)
            if stored is not None and result.may_be_kept:
                stored.write_bytes(traced, "trace", *self._facts(plan, rank))

    def _trace_ranks(self, plan: Plan, ranks: list[int]) -> Sequence[Trace]:
        """Trace the plan on these ranks and return the traces, one per rank. If the engine has a training
        step of its own and it can run here, that is traced; else the step of native, memfit's own engine. If
        the engine's own step cannot run here, the traces' assumptions say so.

        Raises UserError if the model has parameters without dimensions and the engine does not support these
        under this plan.
        """
        backend = engine(self.engine)
        if backend.no_scalars(plan):
            refuse_scalars(fake_model(self.job), self.engine)
        if not backend.own_trace:
            plan = backend.predicted(plan)
            return deep_traces(
                self.job, plan, ranks, deadline=self.deadline, device=self.trace_kind, lines=self.lines
            )
        if obstacle := backend.probe().problem or ", ".join(backend.asks_cuda(plan)):
            traces = deep_traces(self.job, plan, ranks, device=self.trace_kind, lines=self.lines)
            assumption = (
                f"{self.engine}'s own step cannot be traced here ({obstacle}), so native's step was predicted"
            )
            return [dataclasses.replace(t, assumptions=(*t.assumptions, assumption)) for t in traces]
        with use_step(step_maker(self.engine, None)):
            return [trace(self.job, plan, rank=r, device=self.trace_kind, lines=self.lines) for r in ranks]

    def trace_ahead(self, plans: Sequence[Plan]) -> None:
        """Trace every distinct rank (`Layout.distinct_ranks`) of all these plans in parallel, so that later
        calls find the traces cached. Does nothing if the engine is not native.

        If one of the plans cannot be traced, none of these traces is kept, and no error is raised; the later
        call for that plan raises it. Raises TimeUp if the deadline passes before all are made.
        """
        if self.engine != "native":
            return
        with contextlib.suppress(Exception), pause_gc():
            concrete_plans = [self.resolve(plan) for plan in plans]
            keys = [(plan, rank) for plan in concrete_plans for rank in layout(plan).distinct_ranks()]
            missing_keys = [key for key in keys if self._load_and_list_missing(key[0], [key[1]])]

            def make() -> list[Trace]:
                return traces_of(
                    self.job, missing_keys, deadline=self.deadline, device=self.trace_kind, lines=self.lines
                )

            result = self._run(make)
            self._add(missing_keys, _as_bytes(result) if result.may_be_kept else result)

    # -- exact ----------------------------------------------------------------------------------------

    def whole(self, plan: Plan) -> Estimate:
        """Return the plan's estimate, made from traces of the whole plan on its distinct ranks: that of the
        rank with the highest peak, with the host memory of the rank that needs most of it, and the highest
        probability of running out of memory.

        Raises UserError if the plan's memory budget for recomputation cannot be met, or if the model does not
        support the plan; TimeUp if a trace would have to be made after the deadline.
        """
        rank_estimates = self.each_rank(plan)
        largest = max(rank_estimates, key=lambda e: e.allocated_bytes.value)
        host_largest = max(rank_estimates, key=lambda e: e.host_bytes.value if e.host_bytes else 0.0)
        chances = [e.oom_probability for e in rank_estimates]
        return dataclasses.replace(
            largest,
            host_bytes=host_largest.host_bytes,
            host_parts_bytes=host_largest.host_parts_bytes,
            oom_probability=None if None in chances else max(filter(None, chances), default=0.0),
        )

    def load_traces(self, plan: Plan) -> bool:
        """Load the plan's traces from disk. Return whether all are in memory then, so that `whole` traces
        nothing."""
        return not self._load_and_list_missing(plan, layout(plan).distinct_ranks())

    def load_parts(self, plan: Plan) -> bool:
        """Load the parts of the plan's sketch from disk. Return whether all are in memory then."""
        return all(self._load_part(*part) for part in self._composed_of(plan)[1])

    def had_hit_time_limit(self, *question: Any) -> bool:
        """Return whether the last search of the job for which `note_time_limit` was called with this
        question, in this process or another one, hit its time limit; False if none is on disk. ``question``:
        what was searched, as values that ``json`` accepts."""
        stored = self._stored()
        return stored is not None and bool(stored.read(bool, "hit time limit", *self._question(question)))

    def note_time_limit(self, is_hit: bool, *question: Any) -> None:
        """Store on disk, for `had_hit_time_limit`, whether a search for this question hit its time limit.
        Does nothing if no predictions are kept on disk."""
        if (stored := self._stored()) is not None and (is_hit or self.had_hit_time_limit(*question)):
            stored.write(is_hit, "hit time limit", *self._question(question))

    def _question(self, question: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.trace_kind, self.engine, self.job_facts.half_precision, *question

    def whole_in_time(self, plans: Iterable[Plan]) -> Iterator[Estimate]:
        """Yield the estimate of each plan by its whole trace; plans that would have to be traced after the
        deadline are left out. Raises UserError if the model does not support a plan."""
        for plan in plans:
            with contextlib.suppress(TimeUp):
                yield self.whole(plan)

    def each_rank(self, plan: Plan) -> list[Estimate]:
        """Return one estimate for every distinct rank of the plan (`Layout.distinct_ranks`), such as those of
        the first, second and last stage of a pipeline. Raises UserError if the plan's memory budget for
        recomputation cannot be met, or if the model does not support the plan; TimeUp if a trace would have
        to be made after the deadline."""
        plan = self.resolve(plan)
        estimates = self._rank_estimates.get((plan, self.lines))
        if estimates is None:
            estimates = self._rank_estimates[plan, self.lines] = self._stored_estimates(plan)
        if plan == make_plain_plan(plan.ranks) and estimates[-1].reserved_bytes is not None:
            self.reserved_ratio = estimates[-1].reserved_bytes.value / estimates[-1].allocated_bytes.value
        if self.own_memory is not None and plan == self.own_memory.plan:
            estimates = [_with_memory_of(self.own_memory, e) for e in estimates]
        elif self.job.largest_batch_ratio > 1:
            estimates = [self._with_largest_batch(e) for e in estimates]
        return [dataclasses.replace(e, dependence=self.dependence_under(plan)) for e in estimates]

    def _with_largest_batch(self, estimate: Estimate) -> Estimate:
        """Return the estimate with upper ends of memory that hold with the job's largest batch."""
        _, tensors = self._plain(estimate.plan.ranks)
        peak_bytes = peak_with_batch(estimate, self.job.largest_batch_ratio, tensors.batch_bytes)
        return widened(estimate, high=peak_bytes)

    def _stored_estimates(self, plan: Plan) -> list[Estimate]:
        """Return one estimate for every distinct rank of the plan: those on disk, else new ones, which are
        then kept there."""
        ranks, stored = layout(plan).distinct_ranks(), self._stored()
        self._trace(plan, ranks)
        if stored is not None and not engine(self.engine).own_trace:
            facts = (self._prediction_digest(), *self._facts(plan, -1))
            estimates: list[Estimate] | None = stored.read(list[Estimate], "estimates", *facts)
            if estimates is not None:
                return estimates
        with pause_gc():
            traces = [self.trace(plan, rank) for rank in ranks]
        return self._add_estimates(plan, self._estimates(plan, traces))

    def _add_estimates(self, plan: Plan, estimates: list[Estimate]) -> list[Estimate]:
        """Keep the estimates of the plan in memory and on disk, and return them."""
        self._rank_estimates[plan, self.lines] = estimates
        if (stored := self._stored()) is not None and not engine(self.engine).own_trace:
            stored.write(estimates, "estimates", self._prediction_digest(), *self._facts(plan, -1))
        return estimates

    def _estimates(self, plan: Plan, traces: Sequence[Trace]) -> list[Estimate]:
        with pause_gc():
            step = simulate_step(traces, plan, self.machine, self.model) if self.model else None
            return [
                estimate(
                    traced,
                    plan,
                    machine=self.machine,
                    calibration=self.calibration,
                    model=self.model,
                    step=step,
                    workers=self.job.workers,
                )
                for traced in traces
            ]

    def trace_all(
        self, plans: Sequence[Plan], progress: Callable[[int, int, str], None] = lambda *state: None
    ) -> None:
        """Trace rank 0 of several plans in parallel, for those that are not cached.

        ``progress(done, count, label)`` is called whenever a trace begins or ends, with the number of
        finished traces, the number of all to make, and the label of a plan that is being traced (if none is,
        of the one just finished). Plans whose memory budget for recomputation cannot be met are skipped;
        `whole` raises their error. Any other error of a trace is raised, and TimeUp if the deadline passes
        before all are made; the traces that are finished then, or at an interrupt, are kept. A plan whose
        only distinct rank is 0 is also estimated.
        """
        missing_plans = [
            p
            for p in dict.fromkeys(resolved_plans(plans, self.resolve))
            if self._load_and_list_missing(p, [0])
        ]
        results: dict[int, tuple[CallOutcome, str, list[Estimate] | None]] = {}
        try:
            with pause_gc():
                run_parallel(
                    [functools.partial(self._trace_and_estimate, plan) for plan in missing_plans],
                    lambda done, i: progress(done, len(missing_plans), missing_plans[i].label),
                    results,
                    workers=self._forked_workers(),
                    deadline=self.deadline,
                )
        finally:  # after an interrupt, the finished ones are kept
            for index, (result, digest, estimates) in results.items():
                self._add([(missing_plans[index], 0)], result)
                if estimates is not None and digest == self._prediction_digest():
                    self._add_estimates(missing_plans[index], estimates)

    def _trace_and_estimate(self, plan: Plan) -> tuple[CallOutcome, str, list[Estimate] | None]:
        """Trace rank 0 of the plan. Return (the trace as bytes; `_prediction_digest`; the plan's estimates,
        or None if it has other distinct ranks)."""
        result = self._traced_outcome(plan, [0])
        is_all = list(layout(plan).distinct_ranks()) == [0]
        estimates = self._estimates(plan, result.value) if is_all else None
        return _as_bytes(result), self._prediction_digest(), estimates

    def _forked_workers(self) -> ForkedWorkers:
        """Return the forked processes that trace for this predictor. If the job, its facts or other things
        that they were forked with have changed, they are ended and new ones are returned."""
        state = (self.job, self.lines, self.job_facts, self.__dict__.get("repeats", True))
        if self._workers is not None and self._workers[1].owner is not self:
            self._workers = None  # those of the predictor of which this is a copy
        if self._workers is not None and self._workers[0] != state:
            self.end_workers()
        if self._workers is None:
            self._workers = state, ForkedWorkers(self)
        return self._workers[1]

    def end_workers(self) -> None:
        """End the forked processes that trace for this predictor; later traces fork new ones."""
        if self._workers is not None:
            self._workers[1].end()
            self._workers = None

    # -- quick ----------------------------------------------------------------------------------------

    def prepare(
        self, plans: Iterable[Plan], progress: Callable[[int, int, str], None] = lambda *state: None
    ) -> None:
        """Trace, in parallel, the parts that the sketches of ``plans`` are composed from and that are not
        cached.

        The order is such that a deadline leaves out what matters least (`_in_order`). Parts in which some
        blocks are recomputed are put together from others (`compose`). ``progress(done, count, label)`` is
        called whenever a trace begins or ends, with the numbers of finished and of all parts, and the label
        of a part's plan. Raises TimeUp if the deadline passes before all parts are traced; the caller then
        calls `compose`.
        """
        plans = list(plans)
        counts = Counter(part for composed_plan in plans for part in self._composed_of(composed_plan)[1])
        missing_parts = [part for part in counts if not self._load_part(*part)]
        sources = {part: self._mix_sources(*part) for part in missing_parts}
        self._parts_to_mix = {
            part: plans_of_part
            for part, plans_of_part in sources.items()
            if plans_of_part is not None
            and all(SketchPart(plan, 1) in sources or plan in self._source_traces for plan in plans_of_part)
        }
        for part, source_plans in self._parts_to_mix.items():
            counts.update({SketchPart(plan, 1): counts[part] for plan in source_plans})
        traced_parts = [part for part in missing_parts if part not in self._parts_to_mix]
        self._trace_parts(
            self._in_order(traced_parts, plans, counts),
            {plan for source_plans in self._parts_to_mix.values() for plan in source_plans},
            progress,
            self.deadline,
        )
        self._add_parts([functools.partial(self._digest_part_outcome, *part) for part in self.compose()])

    def _in_order(
        self, parts: Iterable[SketchPart], plans: Iterable[Plan], counts: Mapping[SketchPart, int]
    ) -> list[SketchPart]:
        """Return the parts in the order in which they are traced: updates that need no pass before them
        first, as they are quick and every sketch needs one; parts with chunking last; of the others those
        with the fewest techniques in another than their first setting first; of these, the parts of the most
        plans first. The first setting of a technique is the one in the first of ``plans`` that has it.
        ``counts``: number of the plans with a part."""
        first = dict[str, Use]()
        for u in (u for plan in plans for u in plan.uses):
            first.setdefault(u.technique, u)
        return sorted(
            parts,
            key=lambda part: (
                part.steps == 1 or not self._updates_need_no_pass(part.plan),
                SLOW_TO_TRACE in part.plan,
                sum(u != first.get(u.technique, u) for u in part.plan.uses),
                -counts[part],
                (part.plan.fingerprint, part.steps),
            ),
        )

    def _trace_parts(
        self,
        parts: Sequence[SketchPart],
        source_plans: Collection[Plan],
        progress: Callable[[int, int, str], None],
        deadline: Deadline,
        *first_calls: Callable[[], CallOutcome],
    ) -> None:
        """Make ``first_calls``, and trace the parts in this order, in parallel. ``source_plans``: plans from
        whose traces other parts are put together, and whose traces are therefore kept. Raises TimeUp if
        ``deadline`` passes before all is done."""
        if parts:
            deadline.check()
            fake_model(self.job)  # before processes are forked, each of which would build it
            _ = parts[0].plan.ranks == 1 and self._leaves_only_gradients
        parts = from_both_ends(parts)
        calls = [
            functools.partial(self._digest_part_outcome, *part, part.steps == 1 and part.plan in source_plans)
            for part in parts
        ]

        def report_part(done: int, index: int) -> None:
            others = len(first_calls)
            progress(max(0, done - others), len(parts), parts[max(0, index - others)].plan.label)

        self._add_parts([*first_calls, *calls], report_part, deadline)

    def compose(self) -> list[SketchPart]:
        """Put together the parts for which `prepare` has traced what they need (`mix_recomputed`), in
        parallel and whatever the deadline: it takes about a second each. Return those that cannot be put
        together."""
        ready = {
            part: [self._source_traces[plan] for plan in plans]
            for part, plans in self._parts_to_mix.items()
            if all(plan in self._source_traces for plan in plans)
        }
        calls = [
            functools.partial(self._part_from_two_traces, part.plan, *traces)
            for part, traces in ready.items()
        ]
        self._parts_to_mix = {part: p for part, p in self._parts_to_mix.items() if part not in ready}
        self._add_parts(calls, deadline=Deadline())
        return [part for part in ready if not self._load_part(*part)]

    def _add_parts(
        self,
        calls: Sequence[Callable[[], CallOutcome]],
        progress: Callable[[int, int], None] = lambda done, index: None,
        deadline: Deadline | None = None,
    ) -> None:
        """Make the calls in parallel, and add the parts, or the `dependence`, that they return.
        ``progress(done, index)`` is called whenever a call begins or ends: ``done`` calls are finished, and
        call ``index`` is running or has just ended. Raises TimeUp if ``deadline`` passes before all are made;
        None: the predictor's deadline."""
        results: dict[int, CallOutcome] = {}
        deadline = deadline or self.deadline
        try:
            with pause_gc():
                run_parallel(calls, progress, results, workers=self._forked_workers(), deadline=deadline)
        finally:  # after an interrupt, the finished ones are kept
            for index in sorted(results):
                self._add_part(results[index])

    def _mix_sources(self, plan: Plan, steps: int) -> tuple[Plan, Plan] | None:
        """Return (the plan without recomputation, the plan with all blocks recomputed), from whose traces the
        part can be put together. None unless the part recomputes only some of the blocks
        (activation-checkpointing with ``every`` above 1), in one step on one rank, and all blocks are alike.
        """
        recompute = plan.get(_CHECKPOINTING)
        if steps > 1 or plan.ranks > 1 or recompute is None or recompute.settings["every"] == 1:
            return None
        if self._blocks is None or self._blocks[2] > 1 or not self.repeats:
            return None
        return plan.without(_CHECKPOINTING), plan.with_use(use(_CHECKPOINTING, every=1))

    def _part_from_two_traces(self, plan: Plan, kept: CallOutcome, recomputed: CallOutcome) -> CallOutcome:
        """Return the digests of the part of ``plan``, made from the traces of the two plans of
        `_mix_sources`: ``kept``, without recomputation, and ``recomputed``. No digests are returned if these
        traces do not determine it (`mix_recomputed`)."""
        recompute = plan.get(_CHECKPOINTING)
        assert recompute is not None
        assert self._blocks is not None
        counts, source_counts = self._block_counts(plan), self._block_counts(plan.without(_CHECKPOINTING))
        traces = [trace_columns.from_bytes(source.value) for source in (kept, recomputed)]
        digests: dict[PartKey, PartDigest] = {}
        with contextlib.suppress(Mismatch):
            if any(t.host_step_bytes for t in traces):
                raise Mismatch("blocks may keep tensors in host memory")
            if source_counts is not None:
                blocks = Blocks(path=self._blocks[0], first=0, count=source_counts[0])
                more = (counts[0] if counts else self.job_facts.block_count) - source_counts[0]
                traces = [add_periods(t, blocks, more) for t in traces]
            stacks = tuple(find_stacks(fake_model(self.job), self.job.blocks, self.job.more_blocks))
            small = mix_recomputed(traces[0], traces[1], stacks, int(recompute.settings["every"]))
            large = self._longer(small, counts) if counts else small
            if large is not None:
                digests = {
                    PartKey(plan, n, 1): _digest(t, plan)
                    for n, t in zip(counts or (0,), (small, large), strict=False)
                }
        return CallOutcome((digests, b""), kept.may_be_kept and recomputed.may_be_kept)

    def _load_part(self, plan: Plan, steps: int) -> bool:
        """Load the part from disk, with all numbers of blocks of `_block_counts`. Return whether it is in
        memory then."""
        stored = self._stored()
        for key in self._part_keys(plan, steps):
            if key not in self.part_digests and stored is not None:
                digest = stored.read(PartDigest, "part", *self._part_facts(key))
                if digest is not None:
                    self.part_digests[key] = digest
        return self._part_keys(plan, steps) <= self.part_digests.keys()

    def _part_facts(self, key: PartKey) -> tuple[Any, ...]:
        """Return what decides the part beside the job: kind of device, fingerprint of its plan, numbers of
        blocks and of steps."""
        return self.trace_kind, key.plan.fingerprint, key.blocks, key.steps

    def _add_part(self, result: CallOutcome) -> None:
        stored = self._stored() if result.may_be_kept else None
        if isinstance(result.value, SampleDependence):
            self.dependence = result.value
            remember_dependence(self.job, result.value)
            if stored is not None:
                stored.write(result.value, "dependence", trial_limit_bytes())
            return
        digests, data = result.value
        self.part_digests |= digests
        if data:
            self._source_traces[next(iter(digests)).plan] = CallOutcome(data, result.may_be_kept)
        if stored is not None:
            for key, digest in digests.items():
                stored.write(digest, "part", *self._part_facts(key))

    def _composed_of(self, plan: Plan) -> tuple[float, list[SketchPart]]:
        """Return (weight, parts): the parts that the plan's sketch is composed of, and the weight, from 0 to
        1, of the first kind of them. In order, they are:

        - the plan's `_forward_backward_plan` with the whole batch in one micro-batch, with this weight; left
          out if that is 0
        - the `_forward_backward_plan` with the smallest micro-batches, whose weight is the rest up to 1; left
          out if that is 0
        - `_optimizer_plan` with the smallest micro-batches, for the optimizer's phase; two steps, and no
          weight
        """
        max_micro_batches, micros = self.job_facts.micro_batch_counts[-1], plan.micro_batches
        whole_batch_share = (
            (1 / micros - 1 / max_micro_batches) / (1 - 1 / max_micro_batches)
            if max_micro_batches > 1
            else 1.0
        )
        passes = _forward_backward_plan(plan)
        parts = [SketchPart(passes, 1)] if whole_batch_share > 0 else []
        parts += (
            [SketchPart(_with_micro_batches(passes, max_micro_batches), 1)] if whole_batch_share < 1 else []
        )
        optimizer = _with_micro_batches(_optimizer_plan(plan), max_micro_batches)
        return whole_batch_share, [*parts, SketchPart(optimizer, 2)]

    def sketch(self, plan: Plan) -> Estimate:
        """Return the plan's estimate, composed from traces of parts without tracing the plan itself. Parts
        that are not cached are traced, and so is plain training. Raises UserError if the model does not
        support what is traced; TimeUp if a trace would have to be made after the deadline.

        For a micro-batch between the smallest one and the whole batch, numbers are interpolated linearly in
        the size of the micro-batch between the traces of these two. A peak so found is an upper bound,
        because a maximum of linear functions is convex and lies below its chord.
        """
        max_micro_batches, micros = self.job_facts.micro_batch_counts[-1], plan.micro_batches
        passes, whole_batch_share = _forward_backward_plan(plan), self._composed_of(plan)[0]
        vector = numpy.zeros(_ENTRIES)
        if whole_batch_share > 0:
            vector += whole_batch_share * self._vector(passes)
        if whole_batch_share < 1:
            vector += (1 - whole_batch_share) * self._vector(_with_micro_batches(passes, max_micro_batches))
        if micros > 1:
            vector[[_FORWARD, _BACKWARD]] = vector[[_FORWARD_AGAIN, _BACKWARD_AGAIN]]
        optimizer = self._vector(_with_micro_batches(_optimizer_plan(plan), max_micro_batches), steps=2)
        vector[[_RESIDENT, _OPTIMIZER, _STEP_S]] = optimizer[[_RESIDENT, _OPTIMIZER, _STEP_S]]
        vector[_HOST] = max(vector[_HOST], optimizer[_HOST])
        if plan.get("optimizer-in-backward"):
            vector[[_BACKWARD, _OPTIMIZER]] = vector[[_STEPPED, _RESIDENT]]
        if (offload := plan.get("activation-offload")) is not None:
            vector[[_FORWARD, _BACKWARD]] -= vector[[_FORWARD_OFFLOADED, _BACKWARD_OFFLOADED]]
            vector[_HOST] += vector[_SAVED] * (
                offload.settings["to"] == "host" and not self.machine.device.is_host
            )
            if self.model:
                vector[_MICRO_S] += 2 * vector[_SAVED] / host_bytes_s(self.machine, self.model)
                vector[_MICRO_S] += vector[_TENSORS] * self.calibration.disk_file_s
        return self._estimate_of_vector(plan, vector, micros)

    def _estimate_of_vector(self, plan: Plan, vector: numpy.ndarray, micros: int = 1) -> Estimate:
        resident = vector[_RESIDENT]
        peaks = {
            "forward": int(resident + vector[_FORWARD]),
            "backward": int(resident + vector[_BACKWARD]),
            "optimizer": int(vector[_OPTIMIZER]),
        }
        phase = max(peaks, key=lambda p: peaks[p])
        seconds = float(micros * vector[_MICRO_S] + vector[_STEP_S]) * factor(self.calibration, plan)
        parameter_count, plain_tensors = self._plain(plan.ranks)
        step_s = sketched_s(seconds, plan, parameter_count, self.machine, micros) if self.model else None
        host_kept_bytes = float(vector[_HOST])
        sketch = estimate_of_sketch(
            plan,
            machine=self.machine,
            allocated=interval_around(peaks[phase], _SKETCH_MEMORY_RATIO),
            step_s=interval_of_rates(step_s, _SKETCH_TIME_RATIO) if step_s is not None else None,
            host_tensors=HostTensors(
                is_sketch=True,
                kept_bytes=host_kept_bytes,
                building_bytes=host_kept_bytes,
                model_bytes=plain_tensors.model_bytes,
                batch_bytes=plain_tensors.batch_bytes,
            ),
            workers=self.job.workers,
            reserved_ratio=self.reserved_ratio,
        )
        return dataclasses.replace(
            sketch,
            phase_peak_bytes=peaks,
            peak_phase=phase,
            step_basis=step_basis(self.machine.device, self.calibration) if step_s is not None else "",
            flops_per_step=int(micros * vector[_FLOPS]),
            dependence=self.dependence_under(plan),
        )

    def _plain(self, ranks: int) -> tuple[int, HostTensors]:
        """Return (number of parameters, host memory of the tensors) of the plain plan's trace."""
        if ranks not in self.plain:
            plain_trace = self.trace(make_plain_plan(ranks))
            self.plain[ranks] = plain_trace.parameter_count, HostTensors.of(plain_trace)
        return self.plain[ranks]

    def _block_counts(self, plan: Plan, steps: int = 1) -> tuple[int, int] | None:
        """Return (smaller, larger) numbers of blocks with which a part is traced, and then extrapolated
        linearly to all blocks of the model. None if it is traced with all blocks.

        They are (3, 4), or (3k, 4k) if activation-checkpointing recomputes every k-th block. It is None if
        the model has no more blocks than the larger number, if its blocks are not all alike, and for a part
        that is a whole trace (`_is_whole`).
        """
        if self._is_whole(plan, steps):
            return None
        recompute = plan.get(_CHECKPOINTING)
        period = int(recompute.settings["every"]) if recompute else 1
        is_deep = self.job_facts.block_count > 4 * period
        return (3 * period, 4 * period) if is_deep and self.repeats else None

    def _is_whole(self, plan: Plan, steps: int) -> bool:
        """Return whether the part is the same as the whole trace of plain training: of more than one step,
        with memfit's own engine."""
        return steps > 1 and self.engine == "native" and plan == make_plain_plan(plan.ranks)

    def _part_keys(self, plan: Plan, steps: int) -> set[PartKey]:
        return {PartKey(plan, blocks, steps) for blocks in self._block_counts(plan, steps) or (0,)}

    def _vector(self, plan: Plan, *, steps: int = 1) -> numpy.ndarray:
        counts = self._block_counts(plan, steps)
        if counts is None:
            return self._part_vector(PartKey(plan, 0, steps))
        try:
            small_vector, large_vector = (self._part_vector(PartKey(plan, n, steps)) for n in counts)
        except Exception:  # noqa: BLE001  the model may not run with fewer blocks; the whole one shows the error
            self.repeats = False
            return self._part_vector(PartKey(plan, 0, steps))
        extrapolated_vector: numpy.ndarray = small_vector + (large_vector - small_vector) * (
            (self.job_facts.block_count - counts[0]) / (counts[1] - counts[0])
        )
        return extrapolated_vector

    def _part_vector(self, key: PartKey) -> numpy.ndarray:
        if key not in self._vectors:
            if not self._load_part(key.plan, key.steps):
                self.deadline.check()
                self._add_part(self._digest_part_outcome(key.plan, key.steps))
            digest = self.part_digests[key]
            micro_s, optimizer_s = (
                self.model.total_s(ops) if self.model else 0.0
                for ops in (digest.micro_ops, digest.optimizer_ops)
            )
            entries = [*digest.entries, micro_s / digest.micro_batches, optimizer_s]
            self._vectors[key] = numpy.array(entries)
        return self._vectors[key]

    def _digest_part_outcome(self, plan: Plan, steps: int, keeps_trace: bool = False) -> CallOutcome:
        """Trace a part. The value of the result is what `_digest_part` returns: what was seen, and the trace
        as bytes, or b"" without ``keeps_trace``."""
        return self._run(lambda: self._digest_part(plan, steps, keeps_trace))

    def _digest_part(
        self, plan: Plan, steps: int, keeps_trace: bool
    ) -> tuple[dict[PartKey, PartDigest], bytes]:
        """Trace the part and return what was seen in it, by the numbers of blocks of `_block_counts`, and
        with ``keeps_trace`` the trace with the smaller number, else b"". For forward and backward the model
        is traced with the smaller number, and its middle blocks are repeated for the larger one
        (`add_periods`); where they do not repeat, it is traced with both. An optimizer's operators take the
        tensors of all blocks at once, so its part is traced with both as well.
        """
        counts = self._block_counts(plan, steps)
        if self._is_whole(plan, steps):
            known = self.traces.get((plan, 0))
            traces = [known or deep_traces(self.job, plan, [0], device=self.trace_kind)[0]]
        elif counts is None:
            traces = [self._trace_part(self.job, plan, steps)]
        else:
            traces = [self._trace_part(with_blocks(self.job, counts[0]), plan, steps)]
            large = self._longer(traces[0], counts) if steps == 1 else None
            traces.append(large or self._trace_part(with_blocks(self.job, counts[1]), plan, steps))
        digests = {
            PartKey(plan, n, steps): _digest(t, plan) for n, t in zip(counts or (0,), traces, strict=True)
        }
        return digests, trace_columns.to_bytes(traces[0]) if keeps_trace else b""

    def _longer(self, traced: Trace, counts: tuple[int, int]) -> Trace | None:
        """Return the trace of a part with ``counts[1]`` blocks, made from the one with ``counts[0]``. None if
        its blocks do not repeat with the plan's period, or if the step keeps bytes in host memory, which
        `add_periods` would not add to.
        """
        if self._blocks is None or traced.host_step_bytes:
            return None
        path, _, model_period = self._blocks
        period = counts[1] - counts[0]
        if period % model_period:
            return None
        with contextlib.suppress(Mismatch):
            return add_periods(traced, Blocks(path=path, first=0, count=counts[0], period=period))
        return None

    def _trace_part(self, job: Job, plan: Plan, steps: int) -> Trace:
        return trace(
            job,
            plan,
            device=self.trace_kind,
            steps=steps,
            max_micro_batches=int(steps == 1 or not self._updates_need_no_pass(plan)),
            update=steps > 1,
        )

    def _updates_need_no_pass(self, plan: Plan) -> bool:
        """Return whether the plan's optimizer finds the same memory after gradients of zero as after forward
        and backward, so that these need not be traced before it."""
        is_own = self.engine == "native" and plan.ranks == 1
        return is_own and not freezes_parameters(plan) and self._leaves_only_gradients

    @functools.cached_property
    def _leaves_only_gradients(self) -> bool:
        """Whether nothing but a dense gradient of each trainable parameter and a scalar, the loss, is left of
        forward and backward when plain training updates its weights."""
        traced = self.trace(make_plain_plan())
        start = next(s.start for s in traced.last_step_spans if s.phase is Phase.OPTIMIZER)
        left = [a for a in traced.live_at(start - 1) if a.category not in _LASTING]
        sizes = [p.numel() * p.element_size() for p in fake_model(self.job).parameters() if p.requires_grad]
        return sorted(a.requested_bytes for a in left) == sorted([*sizes, _SCALAR_BYTES])


def _with_memory_of(memory: Estimate, estimate: Estimate) -> Estimate:
    """Return ``estimate`` with the memory of the estimate ``memory`` in place of its own."""
    return dataclasses.replace(
        memory,
        plan=estimate.plan,
        **{name: getattr(estimate, name) for name in (*_COSTS, "rank", "assumptions", "dependence")},
    )


def _as_bytes(result: CallOutcome) -> CallOutcome:
    """Return the result with its traces as bytes (`trace_columns.to_bytes`), which take less memory and less
    time to send."""
    return dataclasses.replace(result, value=[trace_columns.to_bytes(t) for t in result.value])


def _digest(traced: Trace, plan: Plan) -> PartDigest:
    """Return what was seen in the last step of the plan's trace. Equal operators are stored once with their
    count, so that many traces can be kept.

    The entries, in the order of `_RESIDENT` to `_HOST`, are: live bytes at the end; highest live bytes of
    forward, of backward and of the optimizer; bytes of activations of at least 64 KiB, which would be
    offloaded; highest live bytes of forward and of backward in a later micro-batch; of backward with the
    optimizer stepping in it; FLOPs of one micro-step; number of activations of at least 64 KiB; bytes that
    the step keeps in host memory; bytes by which offload lowers the highest live bytes of forward and of
    backward. The live bytes of forward and backward are those above the start of the last step, without its
    batch.
    """
    clock, live_bytes = levels(traced)
    last_spans = traced.last_step_spans
    input_size = sum(
        a.size_bytes
        for a in traced.allocations
        if a.category is Category.INPUT and a.step == last_spans[0].step
    )
    base_bytes = int(live_bytes[max(0, int(numpy.searchsorted(clock, last_spans[0].start)) - 1)]) - input_size
    peaks = _phase_peaks(traced, last_spans)
    ops = step_ops(traced)
    micros = 1 + traced.repeated_micro_steps
    step_allocations = [a for a in traced.allocations if a.start >= last_spans[0].start]
    gradients = [a for a in step_allocations if a.category is Category.GRADIENT and a.end]
    pass_ops = [(o, n) for o, n in ops if o.phase is not Phase.OPTIMIZER]
    micro_ops = _count_equal(pass_ops + [(_accumulation_op(g), micros - 1) for g in gradients if micros > 1])
    optimizer_ops = _count_equal((o, n) for o, n in ops if o.phase is Phase.OPTIMIZER)
    accumulation_peaks, stepping_peaks = _with_gradients_moved(traced, last_spans, gradients)
    activations = [a for a in step_allocations if a.category is Category.ACTIVATION]
    selective = plan.get("selective-checkpointing")
    kept_ops = set(map(str, kept_operators(str(selective.settings["keep"])))) if selective else set()
    offloaded = [a for a in activations if a.size_bytes >= _OFFLOADED_BYTES and a.op not in kept_ops]
    offload_peaks = _with_activations_offloaded(traced, last_spans, offloaded)
    entries = [
        int(live_bytes[-1]),
        peaks[Phase.FORWARD] - base_bytes,
        peaks[Phase.BACKWARD] - base_bytes,
        peaks[Phase.OPTIMIZER],
        sum(a.size_bytes for a in offloaded),
        accumulation_peaks[Phase.FORWARD] - base_bytes,
        accumulation_peaks[Phase.BACKWARD] - base_bytes,
        stepping_peaks[Phase.BACKWARD] - base_bytes,
        sum(o.flops * n for o, n in micro_ops) / micros,
        len(offloaded),
        traced.host_step_bytes,
        *(peaks[phase] - offload_peaks[phase] for phase in (Phase.FORWARD, Phase.BACKWARD)),
    ]
    return PartDigest(entries=entries, micro_ops=micro_ops, optimizer_ops=optimizer_ops, micro_batches=micros)


def _phase_peaks(traced: Trace, spans: Iterable[PhaseSpan]) -> dict[Phase, int]:
    """Return the highest live bytes in each of forward, backward and optimizer, within ``spans``; 0 for a
    phase that has no span among them.
    """
    clock, live_bytes = levels(traced)
    peaks = dict.fromkeys((Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER), 0)
    for span in spans:
        begin, end = numpy.searchsorted(clock, (span.start, span.end))
        peaks[span.phase] = max(peaks[span.phase], int(live_bytes[begin:end].max()) if end > begin else 0)
    return peaks


def _accumulation_op(gradient: Allocation) -> OpCall:
    """Return the operator by which each micro-batch after the first adds its gradient to the accumulated
    one.
    """
    return OpCall(
        clock=gradient.start,
        op="aten.add_.Tensor",
        signature=f"gradients of {gradient.size_bytes} bytes",
        phase=Phase.BACKWARD,
        step=gradient.step,
        module=gradient.module,
        dtype="float32",
        flops=0,
        moved_bytes=3 * gradient.size_bytes,
    )


def _with_gradients_moved(
    traced: Trace, last_spans: Sequence[PhaseSpan], gradients: list[Allocation]
) -> tuple[dict[Phase, int], dict[Phase, int]]:
    """Return the highest live bytes of each phase, as `_phase_peaks` does, in two cases that were not traced:
    (in a micro-batch after the first, if the optimizer steps in backward).

    In a later micro-batch, the accumulated gradients are alive from the start, and for a moment beside the
    new gradient that is added to them. If the optimizer steps in backward, each gradient is freed as soon as
    it is computed, after two temporaries of AdamW, together twice its size, were alive beside it.
    """
    accumulated_gradients = [
        dataclasses.replace(g, start=last_spans[0].start, end=g.start + 1) for g in gradients
    ]
    releases = [dataclasses.replace(g, start=g.start + 1, size_bytes=-g.size_bytes) for g in gradients]
    temporaries = [dataclasses.replace(g, end=g.start + 1, size_bytes=2 * g.size_bytes) for g in gradients]
    accumulation_trace, stepping_trace = (
        dataclasses.replace(traced, allocations=(*traced.allocations, *extra_allocations))
        for extra_allocations in (accumulated_gradients, [*releases, *temporaries])
    )
    return _phase_peaks(accumulation_trace, last_spans), _phase_peaks(stepping_trace, last_spans)


def _with_activations_offloaded(
    traced: Trace, last_spans: Sequence[PhaseSpan], offloaded: Sequence[Allocation]
) -> dict[Phase, int]:
    """Return the highest live bytes of each phase, as `_phase_peaks` does, if the activations ``offloaded``
    are away except for a short time after they are made and before they are freed, in which the operators run
    that use them."""
    away = [
        dataclasses.replace(
            a,
            start=a.start + _USED_TICKS,
            end=None if a.end is None else a.end - _USED_TICKS,
            size_bytes=-a.size_bytes,
        )
        for a in offloaded
        if a.end is None or a.end - a.start > 2 * _USED_TICKS
    ]
    return _phase_peaks(dataclasses.replace(traced, allocations=(*traced.allocations, *away)), last_spans)


def _count_equal(ops: Iterable[tuple[OpCall, int]]) -> Weighted:
    counts: dict[str, int] = {}
    examples: dict[str, OpCall] = {}
    for op, count in ops:
        counts[op.signature] = counts.get(op.signature, 0) + count
        examples[op.signature] = op
    return [(examples[s], n) for s, n in counts.items()]


def _with_micro_batches(plan: Plan, micros: int) -> Plan:
    return plan.with_use(use(_ACCUMULATION, micro_batches=micros)) if micros > 1 else plan


def _forward_backward_plan(plan: Plan) -> Plan:
    """Return the plan with only those of its techniques that decide forward and backward. bf16-parameters,
    if it is among them, gets a float32 master copy.

    `Predictor.sketch` adds the effect of what is left out.
    """
    passes = _of_part(plan, StepPart.PASSES)
    if passes.get("bf16-parameters") is None:
        return passes
    return passes.with_use(use("bf16-parameters", rounding="master"))


def _optimizer_plan(plan: Plan) -> Plan:
    """Return the plan with only those of its techniques that decide the optimizer's phase."""
    return _of_part(plan, StepPart.UPDATE)


def _of_part(plan: Plan, part: StepPart) -> Plan:
    uses = tuple(u for u in plan.uses if part in technique(u.technique).changes)
    return Plan(uses=uses, ranks=plan.ranks)
