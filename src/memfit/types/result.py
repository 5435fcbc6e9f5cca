"""Results: estimates before running, measurements after running, verdicts, records."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from memfit.types.dependence import SampleDependence
from memfit.types.launch import RunSpec
from memfit.types.plan import EffectClass, Plan
from memfit.types.workload import Workload

# Memory that a training loop may use beside what is predicted.
NOT_INCLUDED = ("learning-rate schedulers", "metrics", "logging", "retain_graph", "the dataset in memory")


class OutcomeKind(enum.StrEnum):
    """How a run ended."""

    OK = "ok"
    OOM = "oom"
    TIMEOUT = "timeout"
    FAILED = "failed"


class VerdictKind(enum.StrEnum):
    """Result of an equivalence test."""

    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with the range it should lie in; ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.value <= self.high, f"not in order: {self.low}, {self.value}, {self.high}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The prediction for one plan on one machine. A field is None if facts that it needs are unknown, unless
    stated otherwise.

    Memory is that of one device. ``allocated_bytes`` is the peak of live tensor bytes. ``phase_peak_bytes``
    has one peak per phase of a step. ``at_peak_bytes`` splits the bytes at the peak by category.
    ``peak_phase`` and ``peak_op``: phase and operator at the peak.
    """

    plan: Plan
    allocated_bytes: Interval
    phase_peak_bytes: Mapping[str, int]
    at_peak_bytes: Mapping[str, int]
    by_module_bytes: Mapping[str, int]  # bytes at the peak by path of the module that made them
    step_s: Interval | None
    flops_per_step: int
    energy_j: float | None = None  # per step
    energy_boundary: str = ""  # e.g. "package (modelled: power x time)"
    usd: float | None = None  # per step
    co2_g: float | None = None  # per step
    peak_phase: str = ""
    peak_op: str = ""
    traced: bool = True  # False: composed from traces of parts
    workspace_probed: bool = False  # the peak lies inside a kernel whose own workspace was measured
    reserved_bytes: Interval | None = None  # by the caching allocator; None: the device has none
    device_bytes: Interval | None = None  # reserved, plus everything outside the allocator
    # what the device holds outside the allocator: context, kernels, ...
    device_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # memory of one host that all its ranks need: the maximum of before and during training
    host_bytes: Interval | None = None
    host_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # offload, workers, ...
    host_memory_bytes: int | None = None  # memory of the host; None: unknown
    host_memory_assumed: bool = False
    oom_probability: float | None = None  # of needing more than the memory that the estimate was made for
    rank: int = 0  # the rank with the highest peak, among distinct ranks
    assumptions: tuple[str, ...] = ()  # of the trace: values that were needed and could not be known
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch

    @property
    def split_warning(self) -> str:
        """The objection to splitting the batch as the plan does: that it changes the training, or that this
        was not tested. "" if there is none, or if the plan does not split it."""
        return self.dependence.sentence if self.dependence is not None else ""

    @property
    def guesses(self) -> list[str]:
        """Those of ``assumptions`` that do not say "as in the batch": they are not taken from the batch."""
        return [a for a in self.assumptions if "as in the batch" not in a]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run as measured by its child process. Tuples have one entry per optimizer step, in order, except
    ``timeline_bytes``. None or empty: not measured."""

    outcome: OutcomeKind
    reason: str = ""  # what happened, in one line, unless the outcome is ok
    steps_done: int = 0
    peak_bytes: int | None = None  # live tensor bytes, counting allocator over all threads
    peak_source: str = ""  # "counting allocator" or "torch allocator events"
    phase_peak_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    phase_rss_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rss_peak_bytes: int | None = None
    footprint_bytes: int | None = None  # of the process before the limit was set
    limit_kind: str = ""  # "", "RLIMIT_DATA", "cgroup", "cuda fraction"
    process_peak_bytes: int | None = None  # as counted by the cap, above the footprint
    overhead_ratio: float | None = None  # process_peak_bytes / peak_bytes
    step_s: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    headroom_bytes: tuple[int, ...] = ()  # cap minus the step's peak
    metric: float | None = None
    energy_j: float | None = None
    energy_boundary: str = ""
    timeline_bytes: tuple[int, ...] = ()  # live bytes over the last step, thinned
    weights_digest: str = ""  # SHA-256 of the trained parameters
    wall_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A RunSpec with its prediction, None or empty if there is none, and its measurement."""

    spec: RunSpec
    predicted_peak_bytes: int | None
    predicted_phase_peak_bytes: Mapping[str, int]
    predicted_step_s: float | None
    measurement: Measurement
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The reason for a verdict, independent of language.

    ``kind`` names a text of the word catalogs (``why.KIND``); the other fields fill its placeholders.
    """

    kind: str
    seed: int | None = None
    step: int | None = None  # from 0
    difference: float | None = None  # of two losses, relative
    limit_ratio: float | None = None  # largest allowed difference
    needed_count: int | None = None  # number of seed pairs
    detail: str = ""  # text that is not translated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the runs of a plan (the candidate) are scientifically equivalent to plain training.

    ``effect``: the plan's effect class, which decides the test. ``test`` names the test. If metrics were not
    compared, as for the class E0 or with too few runs, ``metric`` is "" and ``margin``, ``difference``,
    ``low``, ``high`` and ``power`` are None.
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproducibility:
    """Whether a second run with the same plan and seed gave the same result. ``reproducible`` is None if this
    was not tried or could not be judged, for example because a run did not complete.
    ``first_differing_step`` is counted from 0; None if no step is known to differ. ``detail`` says in words
    what differs, what was equal, or why it could not be judged."""

    reproducible: bool | None
    first_differing_step: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The work of adopting the plan here.

    ``commands``: number of commands typed. ``changed_lines``: non-blank lines of the user's job file.
    ``packages`` and ``installed_mib``: number and size of the packages that memfit and the plan need beside
    torch and numpy. ``failed_attempts``: runs that failed or timed out, and proofs of concept that were begun
    and not finished. ``attended_minutes``: minutes during which a person attended; None if nobody counted
    them. They are never estimated.
    """

    commands: int
    changed_lines: int
    packages: int
    installed_mib: float
    attended_minutes: float | None
    failed_attempts: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An append-only row of the store. ``body`` is JSON text; ``kind`` says how to read it."""

    record_id: int
    poc_id: str
    kind: str
    created: str  # ISO, UTC
    environment: str  # fingerprint digest
    body: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a technique is in a plan or was left out.

    ``kind`` names a text of the word catalogs (``reason.KIND``), such as ``saves`` or ``left_out_slower``;
    the other fields fill its placeholders. ``left_out_too_large``: none of the ``plan_count`` priced plans
    with the technique fits the device's memory; the smallest needs ``least_bytes``. ``needed_priced``: the
    same of the plans without it. ``left_out_late`` (plans with it) and ``needed_late`` (without it): none
    meets device memory, host memory, deadline and cost limit together, although the device has enough memory
    for the smallest.
    """

    kind: str
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

    ``fits``: on one device, the memory; in a search over several devices also host memory, deadline, cost
    limit and requested micro-batch. ``needed_bytes``: the bytes that are compared with the memory cap; None
    in records of older versions.
    """

    estimate: Estimate
    fits: bool
    effect: EffectClass
    reasons: tuple[Reason, ...] = ()
    needed_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a change of the machine would bring, as ratios to the recommended plan; None: unknown.

    ``kind``: "memory" (``more_bytes`` on each device), "devices" (``more_devices``), or a part of the machine
    whose work takes a tenth less time; then only ``time_ratio`` is known. ``plan``: the plan with the change:
    for memory the better plan that needs the fewest bytes, for devices the best one; "": the recommended
    plan.
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
    """How reliable this machine's timings are.

    ``spread_ratio``: spread of an operator's repeated calls, as in Calibration. ``load_count`` and
    ``waited_ratio``: the system's load average during the timings, and the share of that time spent waiting
    for a processor. ``processor_count``: number of processors used.
    """

    spread_ratio: float
    load_count: float
    waited_ratio: float
    processor_count: int

    @property
    def noisy(self) -> bool:
        """Whether the timings are too noisy to be trusted: one of the ratios is above 15 %, or the load
        average above 1.5 per processor."""
        return (
            self.spread_ratio > 0.15
            or self.waited_ratio > 0.15
            or self.load_count > 1.5 * self.processor_count
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A few steps of one plan on this machine. It is run in rounds, in turn with the plans that it is
    compared with.

    ``step_s``: the median of the step times of each round; empty if the plan did not run, for the ``reason``
    given. ``predicted_s``: the predicted time of a step, None if unknown.
    """

    plan: Plan
    predicted_s: float | None
    step_s: tuple[float, ...]
    peak_bytes: int | None = None
    reason: str = ""

    @property
    def median_s(self) -> float | None:
        times = sorted(self.step_s)
        return times[len(times) // 2] if times else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The result of a search for the best plan.

    ``cap_bytes``: the memory that a plan may use. ``considered``: number of distinct plans priced.
    ``baseline``: plain training. ``frontier``: by increasing peak, the plans that fit and that no other plan
    beats in peak, time and effect class at once, and, even if they do not fit or are beaten, plain training
    and the smallest and the recommended plan. ``recommended`` is None if nothing fits. ``smallest`` has the
    lowest peak. ``trials``: plans run for a few steps before one of them was recommended. ``unfinished``: the
    search was interrupted. ``cap_reason``: where the cap comes from, such as "asked for" or "the device's
    memory".
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """Interaction of two techniques (such as precision and checkpointing): a measured quantity without both,
    with each alone, and with both, at equal numbers of steps.

    The interaction is both - first only - second only + neither; zero means that the effects add up.
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
    """Predictions for a PoC's job at its size "paper" on one machine of the catalog: plain training and the
    best plan that fits."""

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

    ``plain``: whether it is plain training. ``power_w``: of the machine's devices and hosts during a step.
    None: unknown.
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
    """The largest size of a job that fits one machine, with plain training (``plain``) and with the allowed
    plan that needs the least memory (``recommended``).

    ``quantity``: what the two numbers count: "parameters" or "length" (tokens or residues of a sample). None:
    not even the smallest size tried fits. ``*_label``: name of the size. ``at_limit``: the largest size tried
    fits with that plan, so that larger ones may fit too.
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
    """The verdict on one plan against plain training."""

    name: str  # "recommended" or the ablation's name
    plan: Plan
    verdict: Verdict


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Poc:
    """Everything that one proof of concept found. The report and ``--json`` are made from this alone."""

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
    cap_reason: str  # "demonstration: a quarter of the baseline's predicted peak", "asked for", "free now"
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
