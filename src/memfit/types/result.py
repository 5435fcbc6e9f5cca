"""Results: estimates before running, measurements after running, verdicts, records."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from memfit.types.dependence import SampleDependence
from memfit.types.launch import RunSpec
from memfit.types.plan import EffectClass, Plan
from memfit.types.workload import Workload

# Memory that a training loop may use besides what is predicted.
NOT_INCLUDED = ("learning-rate schedulers", "metrics", "logging", "retain_graph", "the dataset in memory")
NOT_INCLUDED_OF_SCRIPTS = ("memory that torch does not allocate, such as arrays of NumPy",)


class OutcomeKind(enum.StrEnum):
    """How a run ended: "ok" (completed), "oom" (out of memory), "timeout" (stopped at its time limit),
    "interrupted" (stopped by SIGTERM) or "failed".
    """

    OK = "ok"
    OOM = "oom"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class VerdictKind(enum.StrEnum):
    """Result of an equivalence test: "equivalent", "different", "undecided", or "not_sensitive": the
    difference lies inside the margin, but that of the negative control would not have been judged different.
    """

    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    UNDECIDED = "undecided"
    NOT_SENSITIVE = "not_sensitive"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with the range that it should lie in; ``low <= value <= high`` is asserted."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.value <= self.high, f"not in order: {self.low}, {self.value}, {self.high}"

    @staticmethod
    def exactly(value: float) -> Interval:
        """Return the interval that contains ``value`` alone."""
        return Interval(value=value, low=value, high=value)

    def scaled(self, factor: float) -> Interval:
        """Return the interval with its value and both ends multiplied by ``factor``, which is not
        negative."""
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def __add__(self, other: Interval) -> Interval:
        """Return the sum end to end: what makes one part large may make the other large, too."""
        return Interval(value=self.value + other.value, low=self.low + other.low, high=self.high + other.high)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The prediction for one plan on one machine. A field is None if facts that it needs are unknown, unless
    its comment states otherwise.

    Memory is that of one device. ``allocated_bytes``: the peak of live tensor bytes. On devices whose caching
    allocator works as CUDA's, it includes, as torch's own count does, the unused ends of cached blocks that
    are too small to be split off. ``phase_peak_bytes``: phase of a step -> its peak, with such unused ends
    only in the phase of the highest. ``at_peak_bytes``: category of allocations -> bytes at the peak, without
    unused ends. ``peak_phase`` and ``peak_op``: phase and operator in which the peak occurs.
    """

    plan: Plan
    allocated_bytes: Interval
    phase_peak_bytes: Mapping[str, int]
    at_peak_bytes: Mapping[str, int]
    by_module_bytes: Mapping[str, int]  # bytes at the peak by path of the module that made them
    step_s: Interval | None
    flops_per_step: int
    step_basis: str = ""  # rates behind step_s: "timed" here, "published" or "assumed"; "": no step_s
    energy_j: float | None = None  # per step
    energy_boundary: str = ""  # e.g. "package (modelled: power x time)"
    usd: float | None = None  # per step
    co2_g: float | None = None  # per step
    peak_phase: str = ""
    peak_op: str = ""
    traced: bool = True  # False: composed from traces of parts
    workspace_probed: bool = False  # the peak lies inside a kernel whose own workspace was measured
    reserved_bytes: Interval | None = None  # by the caching allocator; None: none, or unknown
    device_bytes: Interval | None = None  # reserved, plus everything outside the allocator
    # the parts of device_bytes that are known: reserved, and outside the allocator context, kernels, ...
    device_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # memory of one host that all its ranks need: the maximum of before and during training
    host_bytes: Interval | None = None
    host_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # offload, workers, ...
    host_memory_bytes: int | None = None  # memory of the host; None: unknown
    host_memory_assumed: bool = False
    # of one host's local storage, for all its ranks: the most that it holds, and what a step writes to it
    storage_bytes: int = 0
    storage_written_bytes: int = 0
    oom_probability: float | None = None  # of needing more than the memory that the estimate was made for
    rank: int = 0  # the rank with the highest peak, among distinct ranks
    assumptions: tuple[str, ...] = ()  # of the trace: values that were needed and could not be known
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch

    @property
    def needed_host_bytes(self) -> float | None:
        """The bytes of one host's memory that are enough for the plan: the upper end of ``host_bytes``. None
        if the need is unknown."""
        return None if self.host_bytes is None else self.host_bytes.high

    @property
    def lacks_host_memory(self) -> bool:
        """Whether ``host_memory_bytes`` is less than ``needed_host_bytes``. If the host's memory is unknown,
        it counts as too small for a plan that keeps tensors there, and as enough for any other. False if the
        need is unknown."""
        if self.needed_host_bytes is None:
            return False
        if self.host_memory_bytes is None:
            return bool(self.host_parts_bytes.get("offload"))
        return self.needed_host_bytes > self.host_memory_bytes

    @property
    def split_warning(self) -> str:
        """The objection to splitting the batch as the plan does, in words: that it changes the training, or
        that this was not tested. "" if the samples are independent, or if the plan does not split the batch.
        """
        return self.dependence.sentence if self.dependence is not None else ""

    @property
    def guesses(self) -> list[str]:
        """Those of ``assumptions``, sentences, whose values were guessed and not taken from the job's batch:
        all that do not contain "as in the batch".
        """
        return [a for a in self.assumptions if "as in the batch" not in a]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A rank failed in training, and all ranks started again.

    ``rank`` failed first, for ``reason``, in step ``step``, counted from 0. ``first_step``: the step that the
    run continued with. ``checkpoint``: path of the checkpoint that it continued from; "": it began again.
    """

    rank: int
    reason: str
    step: int
    first_step: int
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResidentMemory:
    """The resident memory of a training process, as the operating system counts it, in bytes.

    ``peak_bytes``: the most from the beginning of training on. ``start_bytes``: before the job was loaded:
    Python and the libraries. ``footprint_bytes``: when training began, after a step for warm-up.
    ``loaded_bytes``: what the process then held in large blocks (64 KiB or more) more than before the job was
    loaded: data that the job reads at import or for its first batch. ``shared_bytes``, ``mapped_bytes``: the
    most that was seen of shared memory, and of mapped files that are not libraries, both without what there
    was before the job was loaded. A memory cap by RLIMIT_DATA, set when training begins, does not count
    ``loaded_bytes``, ``shared_bytes`` and ``mapped_bytes``.
    """

    peak_bytes: int
    start_bytes: int
    footprint_bytes: int
    loaded_bytes: int = 0
    shared_bytes: int = 0
    mapped_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankComparison:
    """How several ranks trained together.

    ``collectives``: the library that connected them, such as "gloo" or "nccl 2.27.5"; "": unknown. ``nodes``:
    number of machines, each with ``per_node`` ranks. ``peak_bytes``: peak of each rank; ``fullest``: the rank
    with the highest. ``before_backward_s``: of each rank the median time of a step until its first backward
    pass: making the batch and the forward pass. ``slowest``: the rank with the longest; None if not all
    have measured it. Ranks that gather parameters or activations in the forward pass wait for others there,
    so that the times of all are then alike; where nothing is gathered before the backward pass, as under DDP,
    they are each rank's own.
    """

    collectives: str
    nodes: int
    per_node: int
    peak_bytes: tuple[int, ...]
    fullest: int
    before_backward_s: tuple[float, ...] = ()
    slowest: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run as measured by its child process. ``step_s``, ``batch_s`` (seconds), ``losses``,
    ``grad_norms`` and ``headroom_bytes`` have one entry per optimizer step, in order. A field that is None or
    empty was not measured.
    """

    outcome: OutcomeKind
    reason: str = ""  # what happened, in one line, unless the outcome is ok
    oom_message: str = ""  # what the allocator said that found no memory, with its class
    steps_done: int = 0
    first_step: int = 0  # counted from 0; above it if the run resumed from a checkpoint
    failed_after_rank: int | None = None  # the rank whose failure made this one fail
    restarts: tuple[Restart, ...] = ()  # after failures of ranks, in order
    peak_bytes: int | None = None  # live tensor bytes, counting allocator over all threads
    peak_source: str = ""  # what counted it, such as "counting allocator"
    device: str = ""  # product name of the accelerator; "": the processor
    reserved_peak_bytes: int | None = None  # taken by torch's allocator of an accelerator
    device_peak_bytes: int | None = (
        None  # of an accelerator, by its driver, less what was used before the run
    )
    allocator_retries: int | None = None  # times that the allocator freed its cache to find a block
    phase_peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    phase_rss_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rss_peak_bytes: int | None = None
    resident: ResidentMemory | None = None
    save_copy_bytes: int = 0  # the largest copy of this rank's state that an asynchronous save wrote
    cap_bytes: int | None = None  # the cap that was set, if the warm-up raised that of the spec
    footprint_bytes: int | None = None  # of the process before the limit was set
    limit_kind: str = ""  # "", "RLIMIT_DATA", "cgroup", "memory fraction"
    process_peak_bytes: int | None = None  # as counted by the cap, above the footprint
    overhead_ratio: float | None = None  # process_peak_bytes / peak_bytes
    step_s: tuple[float, ...] = ()
    batch_s: tuple[float, ...] = ()  # making the step's batch, before the step
    before_backward_s: float | None = None  # median of batch and forward pass, of a step
    collectives: str = ""  # library that connects the ranks, such as "gloo"; "": there is one rank
    node: int = 0  # number of the machine among those of the launch
    ranks: RankComparison | None = None  # of all ranks together; None: one rank
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    headroom_bytes: tuple[int, ...] = ()  # cap minus the step's peak
    metric: float | None = None
    surrogates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # endpoints besides the metric
    energy_j: float | None = None
    energy_boundary: str = ""
    timeline_bytes: tuple[int, ...] = ()  # live bytes over the last step, thinned
    weights_digest: str = ""  # SHA-256 of the trained parameters
    wall_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The reason for a verdict, independent of language.

    ``kind``: the text ``why.KIND`` of the word catalogs, such as "loss_differs"; the other fields fill its
    placeholders.
    """

    kind: str
    seed: int | None = None
    step: int | None = None  # from 0
    difference: float | None = None  # of two losses, relative
    limit_ratio: float | None = None  # largest allowed difference
    needed_count: int | None = None  # number of seed pairs
    detail: str = ""  # text that is not translated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndpointDifference:
    """The difference of two trainings in one endpoint of a job (its metric or a surrogate), in ``unit``: the
    mean over pairs of runs of the same seed, with the 90 % interval ``low`` to ``high``. ``kind``: what the
    equivalence test with ``margin`` concludes from them.
    """

    name: str
    unit: str
    margin: float
    difference: float
    low: float
    high: float
    kind: VerdictKind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """How the equivalence test judged a job's negative control, a degraded training, against plain training.

    ``control``: such as "half-steps". ``noticed``: whether it was judged different in an endpoint.
    ``source``: "study", a power study stored with memfit, made on the day ``date`` (ISO); or "pair", one pair
    of runs of this PoC, whose difference gets the width of the interval of the plan that is judged.
    ``pairs``: number of pairs of runs. ``problem``: why the control could not be judged; then ``endpoints``
    is empty.
    """

    control: str
    noticed: bool
    source: str
    pairs: int
    endpoints: tuple[EndpointDifference, ...] = ()
    date: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PowerStudy:
    """Whether the test of one job, with its own steps and batch, judges its negative control different and a
    repetition of plain training equivalent. ``control`` and ``repetition``: their differences to plain
    training in each endpoint, over the seeds ``seeds``. ``date``: the day of the last run (ISO).
    """

    job: str
    size: str
    steps: int
    batch_size: int
    negative_control: str
    seeds: tuple[int, ...]
    control: tuple[EndpointDifference, ...]
    repetition: tuple[EndpointDifference, ...]
    date: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the runs of a plan (the candidate) are scientifically equivalent to plain training (the
    baseline).

    ``effect``: the plan's effect class, which decides the test. ``test``: name of the test. ``reason``: the
    result in words. If metrics were not compared, as for the class E0 or with too few runs, ``metric`` is ""
    and ``margin``, ``difference``, ``low``, ``high`` and ``power`` are None. ``surrogates``: the same of the
    job's endpoints besides the metric. ``control``: how the test judged the job's negative control; None if
    the verdict does not depend on it, and in records of older versions.
    """

    kind: VerdictKind
    effect: EffectClass
    test: str
    reason: str
    metric: str = ""
    margin: float | None = None
    difference: float | None = None  # metric of candidate - baseline, mean over pairs of equal seed
    low: float | None = None  # 90 % interval of the difference (two one-sided 5 % tests)
    high: float | None = None
    pairs: int = 0
    power: float | None = None  # probability of showing equivalence if there is no difference
    cause: Cause | None = None  # the reason in structured form; None in records of older versions
    surrogates: tuple[EndpointDifference, ...] = ()
    control: ControlResult | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A run ran out of memory and continued under another plan.

    ``step``: the step that failed, counted from 0. ``reason``: how it failed. ``checkpoint``: path of the
    checkpoint that the run continued from; "": it began again with its first step. ``first_step``: the step
    that it continued with. ``effect``: effect class of the plan that failed; ``plan`` has the same or a lower
    one. The bytes are the memory that the two plans are predicted to need for the batch of the failed step,
    and ``limit_bytes`` is what ``plan`` had to fit. ``verdict``: on the steps that both plans trained, from
    ``first_step`` to before ``step``; None if the run did not reach them again.
    """

    step: int
    reason: str
    failed_plan: Plan
    plan: Plan
    effect: EffectClass
    checkpoint: str
    first_step: int
    failed_bytes: int
    needed_bytes: int
    limit_bytes: int
    verdict: Verdict | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A RunSpec with its prediction and its measurement. If there is no prediction, its fields are None or
    empty.

    ``recoveries``: from running out of memory, in order. If there are any, the plan of ``spec`` and the
    prediction are those after the last one, predicted for the batch of the step that had failed. The losses,
    restarts, ``first_step`` and ``steps_done`` of the measurement are those of the whole run, its other
    values those after the last recovery. ``recovery_stop``: why there was no further recovery although memory
    ran out; "" if it did not, or if none was asked for. ``alarms``: what was unusual in the steps of rank 0,
    one sentence each.
    """

    spec: RunSpec
    predicted_peak_bytes: int | None
    predicted_phase_peak_bytes: Mapping[str, int]
    predicted_step_s: float | None
    measurement: Measurement
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch
    recoveries: tuple[Recovery, ...] = ()
    recovery_stop: str = ""
    alarms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A run that is to be made, and its prediction: what `memfit run --spec` reads."""

    spec: RunSpec
    estimate: Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproducibility:
    """Whether a second run with the same plan and seed gave the same result, bit for bit. ``reproducible`` is
    None if this was not tried or could not be judged, for example because a run did not complete.
    ``first_differing_step`` is counted from 0; None if no step is known to differ. ``steps``: the number of
    steps of the second run if it had fewer than the first; None: it had as many. ``detail``: a text that says
    what differs, what was equal, or why it could not be judged.
    """

    reproducible: bool | None
    first_differing_step: int | None = None
    steps: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The work of adopting the plan with memfit.

    ``commands``: number of commands typed. ``changed_lines``: number of lines of the user's job file that are
    not blank. ``packages`` and ``installed_mib``: number and size of the packages that the plan needs, with
    memfit and what it needs, without torch and numpy. ``failed_attempts``: number of runs that failed or
    timed out, and of proofs of concept that were begun and not finished. ``attended_minutes``: minutes during
    which a person attended; None if nobody counted them. They are never estimated.
    """

    commands: int
    changed_lines: int
    packages: int
    installed_mib: float
    attended_minutes: float | None
    failed_attempts: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row of the store, where rows are only added. ``body`` is JSON text; ``kind`` says what it describes,
    and so how to read it.
    """

    record_id: int
    poc_id: str
    kind: str
    created: str  # ISO, UTC
    environment: str  # fingerprint digest
    body: str


class ReasonKind(enum.StrEnum):
    """Why a technique is in a plan or was left out. The texts are ``reason.KIND`` of the word catalogs."""

    SAVES = "saves"  # the plan without it has a higher peak, or a lower one if ``saved_bytes`` is negative
    NEEDED = "needed"  # there is no plan without it
    # None of the ``plan_count`` plans without it fits the device; the smallest needs ``least_bytes``.
    NEEDED_FOR_DEVICE = "needed_priced"
    # The device has enough memory for the smallest plan without it, but no plan without it meets device
    # memory, host memory, deadline and cost limit together.
    NEEDED_FOR_LIMITS = "needed_late"
    # ``plan_count`` plans without it may fit, but the best of them were not traced.
    NEEDED_NOT_LOOKED_AT = "needed_not_looked_at"
    WITHOUT_WORSE = "without_worse"  # the best plan without it is worse for the goal
    WITHOUT_AS_GOOD = "without_as_good"  # it is nearly as good
    LEFT_OUT_SLOWER = "left_out_slower"  # the best plan with it is worse for the goal
    LEFT_OUT_NOT_NEEDED = "left_out_not_needed"  # it is nearly as good
    LEFT_OUT_UNCERTAIN = "left_out_uncertain"  # it is better by less than predicted times are off
    LEFT_OUT_TOO_LARGE = "left_out_too_large"  # of plans with it what NEEDED_FOR_DEVICE says of those without
    LEFT_OUT_LATE = "left_out_late"  # of plans with it what NEEDED_FOR_LIMITS says
    LEFT_OUT_NOT_LOOKED_AT = "left_out_not_looked_at"  # of plans with it what NEEDED_NOT_LOOKED_AT says
    LEFT_OUT_ACCURACY = "left_out_accuracy"  # the request's accuracy does not allow it
    LEFT_OUT_SMALL = "left_out_small"  # the ``saved_bytes`` of the job's state are too few to matter
    # Each plan that could have it fits without it, and it only adds time; plans with it were not estimated.
    LEFT_OUT_ONLY_SAVES = "left_out_only_saves"
    LEFT_OUT_CHANGES = "left_out_changes"  # it changes the training, because samples depend on each other
    LEFT_OUT_UNAVAILABLE = "left_out_unavailable"  # a package that it needs is not installed
    LEFT_OUT_DOES_NOT_FIT = "left_out_does_not_fit"  # in records of older versions only
    LEFT_OUT_FORBIDDEN = "left_out_forbidden"  # in records of older versions only
    CHANGES = "changes"  # the plan splits the batch, which changes the training
    NOT_TESTED = "not_tested"  # whether samples depend on each other was not tested
    EXPERT_LOAD = "expert_load"  # the assumed load of the busiest device's experts, over an even one
    CANNOT = "cannot"  # the model does not allow it

    @property
    def is_comparison(self) -> bool:
        """Whether the reason compares the plan with another that differs in having the technique: with the
        same plan without it (SAVES), otherwise with the best one."""
        return self in (
            ReasonKind.SAVES,
            ReasonKind.WITHOUT_WORSE,
            ReasonKind.WITHOUT_AS_GOOD,
            ReasonKind.LEFT_OUT_SLOWER,
            ReasonKind.LEFT_OUT_NOT_NEEDED,
            ReasonKind.LEFT_OUT_UNCERTAIN,
        )

    @property
    def speaks_for(self) -> bool:
        """Whether the reason is one to have the technique in the plan."""
        return self in (
            ReasonKind.SAVES,
            ReasonKind.NEEDED,
            ReasonKind.NEEDED_FOR_DEVICE,
            ReasonKind.NEEDED_FOR_LIMITS,
            ReasonKind.WITHOUT_WORSE,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a technique is in a plan or was left out. The fields besides ``kind`` fill the placeholders of its
    text; `ReasonKind` says what they mean.
    """

    kind: ReasonKind
    technique: str
    saved_bytes: int | None = None  # peak without it minus peak with it
    time_ratio: float | None = None  # step time with it over without it
    plan_count: int | None = None
    least_bytes: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan kept by the search, with its estimate, whether it fits, its effect class, and the reasons why
    techniques are in it or were left out.

    ``fits``: whether it fits the memory of device and host; in a search over several devices with tensor,
    context and pipeline parallelism, and in an interrupted search, also whether it meets deadline, cost limit
    and requested micro-batch. ``needed_bytes``: the bytes that are compared with the memory cap; None in
    records of older versions.
    """

    estimate: Estimate
    fits: bool
    effect: EffectClass
    reasons: tuple[Reason, ...] = ()
    needed_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a change of the machine would bring. The ratios are those of the changed step time, cost and CO2
    over those of the recommended plan; None: unknown.

    ``kind``: "memory" (``more_bytes`` more on each device), "devices" (``more_devices`` more), or a resource
    of the machine whose work takes a tenth less time; then only ``time_ratio`` is known. ``plan``: label of
    the plan after the change: for memory, of the plans that are better, the one that needs the fewest bytes;
    for devices the best one; "" means the recommended plan.
    """

    kind: str
    more_bytes: float = 0.0
    more_devices: int = 0
    time_ratio: float | None = None
    cost_ratio: float | None = None
    carbon_ratio: float | None = None
    plan: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How reliable the timings of operators on this machine are.

    ``spread_ratio``: by how much repeated calls of an operator differ, as in Calibration. ``load_count``: the
    system's load average during the timings. ``waited_ratio``: share of that time during which the operators
    waited for a processor. ``processor_count``: number of processors that the load is compared with.
    """

    spread_ratio: float
    load_count: float
    waited_ratio: float
    processor_count: int

    @property
    def noisy(self) -> bool:
        """Whether the timings are too noisy to be trusted: ``spread_ratio`` or ``waited_ratio`` is above 15
        %, or the load average is above 1.5 per processor.
        """
        return (
            self.spread_ratio > 0.15
            or self.waited_ratio > 0.15
            or self.load_count > 1.5 * self.processor_count
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Measured runs of a few steps of one plan on this machine. There are several rounds; in each, every plan
    that may still be the fastest is run once.

    ``step_s``: for each round of the plan, the median of its step times in seconds; empty if no run
    succeeded. ``reason``: why none did, "" if one did. ``predicted_s``: the predicted seconds of a step, None
    if unknown.
    """

    plan: Plan
    predicted_s: float | None
    step_s: tuple[float, ...]
    peak_bytes: int | None = None
    reason: str = ""

    @property
    def median_s(self) -> float | None:
        """The median of ``step_s``, of an even number of rounds the larger middle one; None if empty."""
        times = sorted(self.step_s)
        return times[len(times) // 2] if times else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchExtent:
    """How far a search got, and how much better than the best traced plan another of its plans could be.

    ``priced_count``: number of plans that were predicted by sketches (composed from traces of parts).
    ``traced_count``: number of those that were traced whole. ``unpriced_count``: number of plans that there
    was no time to predict. ``limit_s``: the time limit of the search in seconds; None: none; 0: the result
    rests on what an earlier search has kept that hit its limit. ``time_up``: whether the search hit its
    limit; if not, the result does not depend on it.

    ``gain_ratio``: the goal's score of a plan that was sketched and not traced is lower than that of the best
    traced one that fits by at most this ratio (0.01 is 1 %), as far as the errors of sketches can be judged
    by the traced plans. None: there is no such bound; ``gain_unknown`` then says why: "unpriced",
    "few_pairs", "no_score", "not_searched" or "goal". ``contender_count``: number of plans that could be
    better at all. ``pairs``: number of plans with a score by sketch and by trace. ``low_ratio``,
    ``high_ratio``: the lowest and highest score of a trace over that of its sketch among these.
    ``chosen_ratio``: by how much the recommended plan's score is above that of the best traced one, which
    counts as equal because the recommended one is milder or simpler.
    """

    priced_count: int
    traced_count: int
    unpriced_count: int = 0
    limit_s: float | None = None
    time_up: bool = False
    gain_ratio: float | None = None
    gain_unknown: str = ""
    pairs: int = 0
    low_ratio: float | None = None
    high_ratio: float | None = None
    contender_count: int = 0
    chosen_ratio: float = 0.0

    @property
    def left_count(self) -> int:
        """The number of plans that are known only by their sketches."""
        return max(0, self.priced_count - self.traced_count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The result of a search for the best plan.

    ``cap_bytes``: the memory that a plan may use. ``considered``: number of distinct plans whose memory and
    time were predicted. ``baseline``: plain training, or the training as it is if the search was for better
    plans of an existing set-up. ``frontier``, by increasing peak: the plans that fit and that no other plan
    beats in peak, time and effect class at once; and, even if they do not fit or are beaten, the baseline,
    the smallest and the recommended plan (in an interrupted search only these three).
    ``recommended`` is None if nothing fits. ``smallest``: the plan with the lowest peak. ``trials``: plans
    run for a few steps before one of them was recommended. ``unfinished``: whether the search was
    interrupted. ``cap_reason``: where the cap is from, such as "asked for" or "the device's memory".
    ``extent``: how far the search got; None in records of earlier versions and if it was interrupted.
    """

    goal: str
    cap_bytes: int
    considered: int
    baseline: Choice
    frontier: tuple[Choice, ...]
    recommended: Choice | None
    smallest: Choice
    sensitivity: tuple[Sensitivity, ...] = ()
    timings: Timings | None = None  # None: the machine is from the catalog
    trials: tuple[Trial, ...] = ()
    unfinished: bool = False
    cap_reason: str = ""
    extent: SearchExtent | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """Interaction of two techniques (such as precision and checkpointing): one measured quantity in four
    plans, without both (``neither``), with each alone and with ``both``, at equal numbers of steps.

    ``interaction`` is both - first only - second only + neither; zero means that the effects add up.
    """

    first: str  # technique name
    second: str
    quantity: str  # "peak_bytes", "step_s" or "metric"
    neither: float
    first_only: float
    second_only: float
    both: float

    @property
    def interaction(self) -> float:
        return self.both - self.first_only - self.second_only + self.neither


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """Predictions for a job at its size "paper" on one machine of the catalog: plain training, and the best
    plan that fits.
    """

    machine: str
    size: str
    device_memory_bytes: int
    plain: Estimate
    plain_fits: bool
    recommended: Estimate | None  # None: nothing fits this machine
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one machine would do with one plan of the job at one size, as predicted.

    ``plain``: whether the plan is plain training. ``power_w``: of the machine's devices and hosts during a
    step; None: unknown. ``step_s``: None: unknown.
    """

    machine: str
    size: str
    plan: str  # label of the plan
    plain: bool
    fits: bool
    memory_bytes: Interval  # held on one device if that can be predicted, else its allocated tensors only
    step_s: Interval | None
    power_w: float | None
    engine: str = "native"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestSize:
    """The largest size of a job that fits one machine: with plain training (``plain``), and with a plan of as
    many as are allowed of bf16 autocast, recomputation of every block, 8-bit optimizer state and the smallest
    micro-batches (``recommended``).

    ``quantity``: what these two numbers count: "parameters", or "length" (tokens or residues of a sample).
    They are None if not even the smallest size tried fits. ``plain_label``, ``recommended_label``: names of
    the sizes. ``at_limit``: whether the largest size tried fits with the ``recommended`` plan, so that larger
    ones may fit, too.
    """

    machine: str
    quantity: str
    plain: float | None
    recommended: float | None
    plain_label: str = ""
    recommended_label: str = ""
    at_limit: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NamedVerdict:
    """The verdict on one plan against plain training. ``name``: "recommended" or the name of an ablation, a
    variant of the recommended plan or of plain training.
    """

    name: str
    plan: Plan
    verdict: Verdict


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Poc:
    """Everything that one proof of concept (PoC) found: the search, the runs and the verdicts. The report and
    ``--json`` are made from this alone.
    """

    poc_id: str
    created: str  # ISO, UTC
    command: str
    job_name: str
    job_title: str
    job_size: str
    data_source: str
    parameter_count: int
    workload: Workload | None = None  # None in records of older versions
    metric: str
    metric_unit: str
    metric_naive: float | None
    metric_naive_name: str
    metric_margin_source: str
    machine: str
    environment: Mapping[str, str]
    cap_bytes: int
    cap_reason: str  # "demonstration: a quarter of the baseline's predicted peak", "asked for"
    search: SearchResult
    runs: tuple[Run, ...]
    verdicts: tuple[NamedVerdict, ...]
    interactions: tuple[Interaction, ...]
    reproducibility: Reproducibility
    effort: Effort
    step_time_ratio: float | None = None  # recommended / baseline, median of interleaved pairs
    predicted_timeline_bytes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    paper: tuple[PaperRow, ...] = ()
    reach: tuple[LargestSize, ...] = ()
    offers: tuple[Offer, ...] = ()  # of every machine in the catalog that has a price
    place: str = ""
    steps_per_run: int = 0
    notes: tuple[str, ...] = ()  # limitations of this PoC
    took_s: float = 0.0
    report: str = ""  # path of the HTML file
    finished: bool = True  # False: the PoC was interrupted; its content is still valid
    control: Run | None = None  # the negative control, trained with seed 0; None: not trained
