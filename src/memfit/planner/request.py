"""What a search is asked and what it answers, and the predictor of a request's plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from memfit.jobs.registry import load
from memfit.model.blocks import find_blocks, find_head
from memfit.planner.batch_memory import check_batch_memory
from memfit.planner.capacity import Fits, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.plan_space import may_split
from memfit.planner.selection import Objective
from memfit.planner.stored_predictions import stored_predictions
from memfit.techniques.base import JobFacts
from memfit.techniques.optimizers import is_adamw
from memfit.techniques.registry import make_plain_plan
from memfit.types.dependence import DependenceKind
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration, Machine
from memfit.types.plan import Accuracy, Bounds, Plan, Use, use
from memfit.types.result import Choice, Estimate, Reason, SearchResult

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, detail): called often; total 0 means unknown."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for.

    ``job_ref`` names the job and says what replaces its default sizes; `make_predictor` loads it.
    ``cap_bytes``: the memory of one device that the plan must fit. None means the memory of the device or, on
    an accelerator of this machine, what is free there. On a CPU, and on an accelerator of this machine if a
    proof of concept follows, None means a demonstration: its cap is a share of plain training's peak, by
    default a quarter, or, if no plan fits that, the least that some plan needs plus 10 %. ``threads``: number
    of this machine's threads for measurements and runs; 0: all. ``ranks``: number of processes with one
    device each. On a machine of the catalog with several devices, a search takes 1 to mean all of them.
    ``own``: the estimate of the training as it is, of a script: its memory stands for that of its plan, which
    is always traced, is the baseline of the result, and may be recommended whatever else is left out.
    ``bounds``: limits beside memory; a search takes the number of steps from the job, not from
    ``bounds.steps``.
    """

    job_ref: JobRef
    machine: Machine
    cap_bytes: int | None = None
    goal: Objective = Objective.FASTEST
    accuracy: Accuracy = Accuracy.ROUNDING
    threads: int = 0
    timeout_s: float | None = None  # of each training run; None: no limit
    engine: str = "native"
    bounds: Bounds = dataclasses.field(default_factory=Bounds)
    ranks: int = 1
    correction: Calibration = dataclasses.field(default_factory=Calibration)  # from runs on this machine
    recalibrate: bool = False  # time this machine's operators again, ignoring stored times
    within_s: float | None = None  # seconds after which a search answers with what it has; None: no limit
    # Whether a search goes on where an earlier one for the same plans hit its time limit. If not, it answers
    # from what that one has kept on disk, unless that has no estimate, or no plan in it fits.
    continues: bool = True
    own: Estimate | None = None
    evaluates: bool = True  # whether a single run computes the job's metric at its end

    @property
    def baseline(self) -> Plan:
        """The plan with which others are compared: plain training, or that of `own`."""
        return make_plain_plan(self.ranks) if self.own is None else self.own.plan

    @property
    def is_here(self) -> bool:
        """Whether the request is for the machine on which memfit runs."""
        return self.machine.is_here

    @property
    def device_kind(self) -> str:
        """Torch's name of the kind of device on which runs train: that of the machine if it is this one, else
        the processor of this machine."""
        return self.machine.device.kind if self.machine.is_here else HOST


@dataclasses.dataclass(kw_only=True)
class Planning:
    """A finished search, with what is needed to predict further plans in the same way.

    ``cap_bytes``: the memory of one device that plans had to fit. ``cap_reason``: where that figure is from,
    such as "asked for". ``meets_limits``: whether an estimate fits it and keeps to the request's other
    limits. ``left_out``: why techniques were not searched. After a search for many devices with tensor,
    context or pipeline parallelism, ``estimates``, ``sketches`` and ``left_out`` are empty, and
    ``meets_limits`` is always true.
    """

    request: Request
    job: Job
    predictor: Predictor
    cap_bytes: int
    cap_reason: str
    result: SearchResult
    estimates: Sequence[Estimate] = ()  # of the traced plans
    sketches: Sequence[Estimate] = ()  # of every plan
    meets_limits: Fits = lambda estimate: True
    left_out: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        self.result = with_needs(self.result, self.request.machine)


def with_needs(result: SearchResult, machine: Machine) -> SearchResult:
    """Return the result with ``needed_bytes`` of each of its plans set to the bytes of one device's memory
    that are compared with the cap.
    """

    def with_need(choice: Choice) -> Choice:
        return dataclasses.replace(choice, needed_bytes=needed_bytes(choice.estimate, machine))

    return dataclasses.replace(
        result,
        baseline=with_need(result.baseline),
        frontier=tuple(map(with_need, result.frontier)),
        recommended=with_need(result.recommended) if result.recommended else None,
        smallest=with_need(result.smallest),
    )


def job_facts(job: Job, device_kind: str, ranks: int = 1, half_precision: str = "bfloat16") -> JobFacts:
    """Return the facts about the job from which techniques propose settings, counted on a model built without
    memory. ``batch_size`` of the result is that of one rank, at least 1.

    ``device_kind``: torch's name, such as "cuda". ``half_precision``: "bfloat16" or "float16", as
    `half_precision_of` returns it for the machine. If the job does not name its blocks and none are found,
    ``block_count`` is 0; if it does not name its head and none is found, ``vocabulary`` is 0. Raises
    UserError if the job names blocks or a head that the model does not have.
    """
    from memfit.model.chunk_analysis import worth_cutting
    from memfit.model.scalar_parameters import scalar_names
    from memfit.techniques.adapters import block_linears
    from memfit.techniques.imported_optimizer import needs_names
    from memfit.trace.tracer import fake_model

    model = fake_model(job)
    try:
        path, modules = find_blocks(model, job.blocks)
        block_count, has_linear_layers = len(modules), any(True for _ in block_linears(model, path))
    except UserError:
        if job.blocks is not None:
            raise
        block_count, has_linear_layers = 0, False
    try:
        vocabulary = find_head(model, job.head)[1].out_features
    except UserError:
        if job.head is not None:
            raise
        vocabulary = 0
    return JobFacts(
        batch_size=max(1, job.batch_size // ranks),
        block_count=block_count,
        vocabulary=vocabulary,
        device_kind=device_kind,
        ranks=ranks,
        half_precision=half_precision,
        has_linear_layers=has_linear_layers,
        has_scalar_parameters=bool(scalar_names(model)),
        has_slices=ranks == 1 and worth_cutting(job, model),
        clips_gradients=job.clip is not None,
        optimizer=job.optimizer.name.rpartition(":")[2].lower(),
        is_adamw=is_adamw(job.optimizer),
        needs_parameter_names=needs_names(job.optimizer),
    )


def half_precision_of(machine: Machine) -> str:
    """Return "float16" if the machine's device has a peak rate for it and none for bfloat16, as NVIDIA
    devices before Ampere; else "bfloat16".
    """
    rates = machine.device.peak_flops
    return "float16" if "float16" in rates and "bfloat16" not in rates else "bfloat16"


def autocast(facts: JobFacts) -> Use:
    """Return the autocast technique for the half precision of ``facts``: fp16-autocast or bf16-autocast."""
    return use("fp16-autocast" if facts.half_precision == "float16" else "bf16-autocast")


def make_predictor(request: Request, *, replicas: bool = True) -> tuple[Job, Predictor]:
    """Load the request's job and return (the job, the predictor that predicts its plans on the request's
    machine and engine).

    ``replicas``: whether every rank trains samples of its own. If so, and if the batch has fewer samples than
    there are ranks, raises UserError. Also raises it if the job cannot be loaded, if its batch is too large
    for this machine and was not predicted here before (`check_batch_memory`), if the job names blocks or a
    head that its model does not have, or if the environment variable ``MEMFIT_CACHE_LIMIT`` is no size.
    """
    job, ranks = load(request.job_ref), request.ranks
    if replicas and job.batch_size < ranks:
        raise UserError(
            f"a batch of {job.batch_size} cannot be divided over {ranks} ranks, each of which needs at least "
            "one sample",
            allowed=f"a batch of at least {ranks} samples (--batch, or the job's own)",
            hint="or fewer ranks: a smaller --nproc, or --on a machine with fewer devices",
        )
    stored = stored_predictions(request.job_ref, job)
    how = request.machine.device.kind, request.ranks, half_precision_of(request.machine)

    def compute_facts() -> JobFacts:
        check_batch_memory(request.job_ref)
        return job_facts(job, *how)

    facts = stored.get_or_compute(JobFacts, compute_facts, "job facts", *how) if stored else compute_facts()
    return job, Predictor(
        job=job,
        machine=request.machine,
        job_facts=facts,
        engine=request.engine,
        calibration=request.correction,
        stored=stored,
        own_memory=request.own,
    )


def model_sizes(name: str, job: Job) -> Mapping[str, str]:
    """Return the model's sizes as options of Megatron-LM's trainer, name of the option -> value, if ``name``
    is the engine "megatron". Empty for other engines, which build the job's own model.

    Raises UserError if the engine is "megatron" and Megatron-LM cannot build the model.
    """
    if name != "megatron":
        return {}
    from memfit.engines.megatron.gpt import read, sizes
    from memfit.trace.tracer import fake_model

    return sizes(read(fake_model(job)))


def with_steps_of(request: Request, job: Job) -> Request:
    """Return the request with the job's number of steps in its bounds, for the deadline and the budget of the
    whole training."""
    return dataclasses.replace(request, bounds=dataclasses.replace(request.bounds, steps=job.steps))


def limit_micro_batches(predictor: Predictor, accuracy: Accuracy) -> None:
    """If samples of a batch depend on each other, set the smallest micro-batch of the predictor's job facts:
    two samples if ``accuracy`` allows splitting the batch nevertheless (some layers need more than one), else
    the whole batch of a rank. If they do not depend on each other, or if a rank has only one sample, nothing
    is changed.
    """
    facts = predictor.job_facts
    if facts.batch_size == 1 or predictor.dependence.kind is not DependenceKind.DEPENDENT:
        return
    smallest = 2 if may_split(predictor.dependence, accuracy) else facts.batch_size
    predictor.job_facts = dataclasses.replace(facts, smallest_micro_batch=smallest)
