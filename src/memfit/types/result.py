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
        assert self.low <= self.value <= self.high, f"{self.low} <= {self.value} <= {self.high}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The prediction for one plan on one machine. None: cannot be derived from the catalog's facts.

    ``allocated_bytes`` is the peak of live tensor bytes. ``phase_peak_bytes`` has one peak per phase.
    ``at_peak_bytes`` splits the bytes at the peak by category.
    """

    plan: Plan
    allocated_bytes: Interval
    phase_peak_bytes: Mapping[str, int]
    at_peak_bytes: Mapping[str, int]
    by_module_bytes: Mapping[str, int]  # at the peak
    step_s: Interval | None
    flops_per_step: int
    energy_j: float | None = None  # per step
    energy_boundary: str = ""  # e.g. "package (modelled: power x time)"
    usd: float | None = None  # per step
    co2_g: float | None = None  # per step
    peak_phase: str = ""
    peak_op: str = ""
    traced: bool = True  # False: composed from traces of parts
    workspace_probed: bool = False
    reserved_bytes: Interval | None = None  # by the caching allocator; None: the device has none
    device_bytes: Interval | None = None  # reserved, plus everything outside the allocator
    device_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # context, libraries
    # of one host with all its ranks: the maximum of before and during training
    host_bytes: Interval | None = None
    host_parts_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # offload, workers, ...
    host_memory_bytes: int | None = None  # memory of the host; None: unknown
    host_memory_assumed: bool = False
    oom_probability: float | None = None  # for the memory that the estimate was made for
    rank: int = 0  # the rank with the highest peak, among distinct ranks
    assumptions: tuple[str, ...] = ()  # of the trace: values that were needed and could not be known
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch

    @property
    def split_warning(self) -> str:
        """The known objection to splitting the batch as the plan does, or ""."""
        return self.dependence.sentence if self.dependence is not None else ""

    @property
    def guesses(self) -> list[str]:
        """Assumptions that do not follow from the batch."""
        return [a for a in self.assumptions if "as in the batch" not in a]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run as measured by its child process. Times are in seconds per optimizer step, in order."""

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
    """A RunSpec with its prediction and its measurement."""

    spec: RunSpec
    predicted_peak_bytes: int | None
    predicted_phase_peak_bytes: Mapping[str, int]
    predicted_step_s: float | None
    measurement: Measurement
    dependence: SampleDependence | None = None  # of the job's samples, if the plan splits the batch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The reason for a verdict, independent of language.

    ``kind`` is a key of the word catalogs (``why.KIND``); the other fields fill its placeholders.
    """

    kind: str
    seed: int | None = None
    step: int | None = None  # from 0
    difference: float | None = None  # of two losses, relative
    limit_ratio: float | None = None  # largest allowed difference
    needed_count: int | None = None  # number of seed pairs
    detail: str = ""  # text by others


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the candidate is scientifically equivalent to the baseline.

    ``test`` names the statistical test.
    """

    kind: VerdictKind
    effect: EffectClass
    test: str
    reason: str
    metric: str = ""
    margin: float | None = None
    difference: float | None = None  # candidate - baseline, mean over pairs
    low: float | None = None  # 90 % interval of the difference (two one-sided 5 % tests)
    high: float | None = None
    pairs: int = 0
    power: float | None = None  # probability of showing equivalence if there is no difference
    cause: Cause | None = None  # the reason in structured form; None in records of older versions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproducibility:
    """Whether a run with the same seed gave the same result. ``reproducible`` is None if it was not tried."""

    reproducible: bool | None
    first_differing_step: int | None = None
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The work of adopting the plan here.

    ``attended_minutes`` is None if nobody counted it; it is never estimated.
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

    ``kind`` is a key of the word catalogs (``saves``, ``left_out_slower``, ``left_out_not_needed``,
    ``left_out_uncertain``, ``left_out_forbidden``, ``left_out_accuracy``, ``left_out_unavailable``,
    ``left_out_small``, ``left_out_changes``, ``changes``, ``not_tested``); the numbers fill its placeholders.
    ``left_out_too_large``, ``needed_priced``: none of ``plan_count`` priced plans with it, or without it,
    fits; the smallest needs ``least_bytes``. ``left_out_late``, ``needed_late``: the device would be large
    enough, but host memory, deadline or budget would not.
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
    """A plan kept by the search, with its estimate, whether it fits, and the reasons.

    ``needed_bytes``: what is compared with the memory; None in records of older versions.
    """

    estimate: Estimate
    fits: bool
    effect: EffectClass
    reasons: tuple[Reason, ...] = ()
    needed_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a change would bring, as ratios to the recommended plan.

    ``kind``: "memory" (``more_bytes`` on each device), "devices" (``more_devices``), or a part of the machine
    that takes a tenth less time for its work. ``plan``: the best plan in that case; "": the same plan.
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

    Fields: the spread of an operator's repeated calls, and during the timings the load average and the share
    of time spent waiting for a processor.
    """

    spread_ratio: float
    load_count: float
    waited_ratio: float
    processor_count: int

    @property
    def noisy(self) -> bool:
        """Whether the timings are too noisy to be trusted."""
        return (
            self.spread_ratio > 0.15
            or self.waited_ratio > 0.15
            or self.load_count > 1.5 * self.processor_count
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A few steps of one plan on this machine, run in turn with its rivals.

    ``step_s``: the median of each round; empty if it did not run, with the ``reason``.
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
    """The result of a search.

    ``frontier``: plans that no other plan beats in peak, time and effect class at once, by increasing peak.
    ``recommended`` is None if nothing fits. ``considered``: number of distinct plans priced. ``trials``:
    plans run for a few steps before one of them was recommended. ``unfinished``: the search was interrupted.
    ``cap_reason``: "asked for", "the device's memory" or the reason of a demonstration.
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
    """Interaction of two techniques (such as precision and checkpointing), a 2 x 2 table at equal steps.

    The interaction is both - first - second + neither; zero means that the effects add up.
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
    """The same job at paper size on one machine of the catalog, plain and recommended."""

    machine: str
    size: str
    device_memory_bytes: int
    plain: Estimate
    plain_fits: bool
    recommended: Estimate | None  # None: nothing fits this machine
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one machine would do with one plan, as predicted. It is small, so that a record can hold many.

    ``power_w``: of its devices and hosts during a step. ``size``: of the job.
    """

    machine: str
    size: str
    plan: str  # label of the plan
    plain: bool
    fits: bool
    memory_bytes: Interval  # on a device if its parts are known, else allocated
    step_s: Interval | None
    power_w: float | None
    engine: str = "native"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The largest size that fits one machine.

    ``quantity``: "parameters" or "length" (tokens or residues). None: not even the smallest size tried fits.
    ``at_limit``: the largest size tried still fits.
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
    """The verdict on one plan."""

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
    reach: tuple[Reach, ...] = ()
    offers: tuple[Offer, ...] = ()  # of every machine in the catalog that has a price
    place: str = ""
    steps_per_run: int = 0
    notes: tuple[str, ...] = ()  # limitations of this PoC
    took_s: float = 0.0
    report: str = ""  # path of the HTML file
    finished: bool = True  # False: the PoC was interrupted; its content is still valid
