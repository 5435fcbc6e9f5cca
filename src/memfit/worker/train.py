"""One measured training run: warm up, check that the step does what the plan says, set the memory cap, train,
evaluate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import gc
import hashlib
import importlib
import math
import signal
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfit.runtime.heartbeat import HEARTBEAT, STACKS, Heartbeat
from memfit.runtime.progress_events import tell
from memfit.types import serialization
from memfit.types.device_kind import HOST
from memfit.types.errors import MemfitError, UserError
from memfit.types.gc_pause import collect_as_usual
from memfit.types.launch import RENDEZVOUS, RESUMABLE_EXIT, RunSpec
from memfit.types.result import Measurement, OutcomeKind
from memfit.types.trace import Phase
from memfit.types.units import format_bytes
from memfit.worker.save_requests import SaveRequests

if TYPE_CHECKING:
    import torch

    from memfit.jobs.training_step import TrainingStep
    from memfit.runtime.energy import EnergyMeter
    from memfit.runtime.memory import PeakCounter
    from memfit.runtime.memory_cap import MemoryLimit
    from memfit.runtime.resident import ResidentMeter
    from memfit.techniques.rank_mesh import World
    from memfit.types.job import Job
    from memfit.types.plan import Plan
    from memfit.worker.checkpoint import Checkpointer

    MakeStep = Callable[..., TrainingStep]

TIMELINE_POINTS = 400
_WATCHED = 2  # micro-batches that are compared with the plan, if it has several
_LONGEST_MESSAGE = 1000  # characters that are kept of an allocator's message
# On CPUs a step may take longer than torch's default of half an hour.
_COLLECTIVE_LIMIT = datetime.timedelta(days=7)


def _numbers() -> array[float]:
    """Return an empty array, to which one number is added per step. A list would take four times the memory,
    which counts in the cap of the run (`RECORD_BYTES_PER_STEP`)."""
    return array("d")


class NonFinite(Exception):
    """Raised after a step whose loss or gradient norm is not finite. The message says which, its value and
    the step."""


@dataclasses.dataclass(slots=True)
class _Gauge:
    """The measurements of a run so far. ``base_bytes``: live bytes before the model is built, which are
    subtracted from all peaks that the counter measures. ``phase``: the phase that is running.
    ``phase_peaks``, ``phase_rss``: name of a phase -> peak bytes of tensors, and of resident memory of the
    process. ``step_peak_bytes``: peak of the current step. ``headroom``: cap minus peak of each step, empty
    without a cap."""

    counter: PeakCounter
    base_bytes: int
    world: World
    settle: Callable[[], bool]
    make_step: MakeStep
    elements: int  # of the whole model
    device: torch.device
    driver_bytes_before: int | None  # of the device's memory, by all processes, before this one used it
    heartbeat: Heartbeat
    requests: SaveRequests | None  # None: the run does not save
    resident: ResidentMeter
    end: str = ""  # why training ended before its last step
    phase: str = "setup"
    first: int = 0  # number of steps that a checkpoint has done
    peak_bytes: int = 0
    step_peak_bytes: int = 0
    phase_peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    phase_rss: dict[str, int] = dataclasses.field(default_factory=dict)
    step_s: array[float] = dataclasses.field(default_factory=_numbers)
    batch_s: array[float] = dataclasses.field(default_factory=_numbers)
    before_backward_s: array[float] = dataclasses.field(default_factory=_numbers)
    losses: array[float] = dataclasses.field(default_factory=_numbers)
    grad_norms: array[float] = dataclasses.field(default_factory=_numbers)
    headroom: array[float] = dataclasses.field(default_factory=_numbers)
    timeline: tuple[int, ...] = ()
    used_bytes: int | None = None  # of the cap, used by training alone
    save_copy_bytes: int = 0
    of_accelerator: dict[str, Any] = dataclasses.field(default_factory=dict)  # by training alone

    def start_phase(self, phase: str) -> None:
        """End the running phase and start the one called ``phase``. The phase that ends gets the peaks of
        tensor memory and of resident memory since it started, if they exceed those of earlier phases of the
        same name. The peaks of the step and of the run are raised likewise, the latter not by the
        evaluation."""
        from memfit.runtime.memory import reset_rss_peak, rss_peak_bytes

        peak = self.counter.peak_bytes() - self.base_bytes
        self.resident.sample(rss_peak_bytes())
        if self.phase != "evaluation":
            self.peak_bytes = max(self.peak_bytes, peak)
        self.step_peak_bytes = max(self.step_peak_bytes, peak)
        for table, value in ((self.phase_peaks, peak), (self.phase_rss, rss_peak_bytes())):
            table[self.phase] = max(table.get(self.phase, 0), value)
        self.phase = phase
        self.heartbeat.beat(self.first + len(self.losses), phase)
        self.counter.reset_peak()
        reset_rss_peak()


def main(path: Path) -> int:
    """Run the RunSpec in the JSON file ``path`` and report progress and the result as events on standard
    output. If the run raises a MemfitError, the result has the outcome failed and the error's text as reason.
    If this is a UserError, an event ``refused`` with its fields ``given``, ``allowed`` and ``hint`` comes
    before. An error in reading the file, and other errors, are raised, without a result.

    Return the status with which the process should exit: `RESUMABLE_EXIT` after SIGTERM and a save; 1 after
    any other outcome than ok if another launcher than memfit started it, as launchers and schedulers read
    nothing else; else 0."""
    spec = serialization.loads(RunSpec, path.read_text(), what="run specification")
    requests = SaveRequests() if spec.keep.save else None
    outcome = OutcomeKind.FAILED
    try:
        with _stack_traces(path.parent):
            outcome = _run(spec, path, requests)
    except MemfitError as error:
        if isinstance(error, UserError):
            tell("refused", given=error.given, allowed=error.allowed, hint=error.hint)
        tell("result", measurement=Measurement(outcome=OutcomeKind.FAILED, reason=str(error)))
    if requests is not None and requests.has_ended:
        return RESUMABLE_EXIT
    return int(outcome is not OutcomeKind.OK and not (path.parent / HEARTBEAT).exists())


@contextlib.contextmanager
def _stack_traces(folder: Path) -> Iterator[None]:
    """In this context, SIGUSR2 writes the stack traces of all threads to a file in ``folder``, even while
    this process waits in native code. The parent, which has made the folder, asks for them. Do nothing if
    another launcher than memfit started this process."""
    if not (folder / HEARTBEAT).exists():  # started by another launcher
        yield
        return
    with (folder / STACKS).open("w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)


def _run(spec: RunSpec, path: Path, requests: SaveRequests | None) -> OutcomeKind:
    import torch

    from memfit.jobs.checkpoints import resume_if_restarted
    from memfit.jobs.registry import load
    from memfit.runtime.devices import (
        driver_used_bytes,
        free_cache,
        launch_attempt,
        launch_rank,
        local_rank,
        reset_reserved_peak,
        use_device,
    )
    from memfit.runtime.gloo import gloo_first
    from memfit.runtime.memory import peak_counter
    from memfit.runtime.resident import ResidentMeter

    tell("started", rank=launch_rank()[0], attempt=launch_attempt(), time_s=time.time())
    if spec.threads:
        torch.set_num_threads(spec.threads)
    used_bytes = driver_used_bytes(torch.device(spec.device, local_rank()))  # before there is a context
    device = use_device(spec.device, local_rank())
    counter = peak_counter(device)
    spec = dataclasses.replace(spec, keep=resume_if_restarted(spec.keep))
    heartbeat = Heartbeat(path.parent / HEARTBEAT)  # a mapped file, which the meter is not to count
    resident = ResidentMeter()
    job = load(spec.job)
    collect_as_usual()
    rendezvous = path.parent / RENDEZVOUS
    with join_world(spec.plan, spec.device, rendezvous) as world, gloo_first(spec.plan.ranks > 1) as settle:
        tell("stage", stage="warm-up")
        make_step = functools.partial(
            step_maker(spec.engine, path.parent), device=spec.device, torch_device=str(device)
        )
        base_bytes = counter.live_bytes()
        elements, data_peak_bytes = _warm_up(job, spec, world, make_step, counter)
        if spec.cap_scope == "bound" and (device.type != HOST or not data_peak_bytes):
            spec = dataclasses.replace(spec, cap_scope="training")  # what evaluation takes is not known
        if device.type == HOST:
            base_bytes = counter.live_bytes()
        else:  # the workspaces that the warm-up has left are part of what is predicted
            free_cache(device)
            reset_reserved_peak(counter)
        start = time.perf_counter()
        gauge = _Gauge(
            counter=counter,
            base_bytes=base_bytes,
            world=world,
            settle=settle,
            make_step=make_step,
            elements=elements,
            device=device,
            driver_bytes_before=used_bytes,
            heartbeat=heartbeat,
            requests=requests,
            resident=resident,
        )
        counter.reset_peak()
        with _cap(spec, counter, device, data_peak_bytes) as limit:
            resident.begin()
            measurement = _train_and_measure(job, spec, gauge, limit)
        # Before the process group is left: a backend may wait there for ranks that wait for this one.
        tell("result", measurement=dataclasses.replace(measurement, wall_s=time.perf_counter() - start))
    return measurement.outcome


@contextlib.contextmanager
def join_world(plan: Plan, device: str = HOST, rendezvous: Path | None = None) -> Iterator[World]:
    """Yield the plan's world on devices of the kind ``device``: its layout, this process's rank, and the mesh
    of ranks. With several ranks, join a process group of the device's own backend by the environment
    variables that torchrun sets, and leave it at the end unless an exception is raised. With one, there is no
    process group.

    If the file ``rendezvous`` exists, the ranks find each other through the file that it names, so that no
    port is open for it. Otherwise they use the address that torchrun sets. Raises what `make_world` raises,
    and torch's error if the process group cannot be joined."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from memfit.runtime.devices import collective_backend, launch_rank
    from memfit.techniques.rank_mesh import make_world

    if plan.ranks == 1:
        yield make_world(plan, rank=0, device=device)
        return
    distributed_c10d.default_pg_timeout = _COLLECTIVE_LIMIT  # also for groups that are made later
    if rendezvous is not None and rendezvous.exists():
        rank, ranks = launch_rank()
        named_file = rendezvous.read_text(encoding="utf-8")
        store = dist.FileStore(named_file, ranks)  # type: ignore[attr-defined]
        dist.init_process_group(collective_backend(device), store=store, rank=rank, world_size=ranks)
    else:
        dist.init_process_group(collective_backend(device))
    yield make_world(plan, rank=dist.get_rank(), device=device)
    dist.destroy_process_group()  # not after an exception, when other ranks may wait in a collective


def step_maker(engine: str, folder: Path | None) -> MakeStep:
    """Return the class of the training step of the engine called ``engine``. Its instances are configured by
    the engine's files in ``folder``, or by the plan alone if ``folder`` is None, as when a step is only
    traced. The native step reads no files. The folder is stored in the class, so that it holds for all
    instances until the next call. Raises ImportError if there is no such engine."""
    if engine == "native":
        from memfit.jobs.training_step import TrainingStep

        return TrainingStep
    kind = importlib.import_module(f"memfit.engines.{engine}.step").Step
    kind.folder = folder
    return kind  # type: ignore[no-any-return]


def _warm_up(
    job: Job, spec: RunSpec, world: World, make_step: MakeStep, counter: PeakCounter
) -> tuple[int, int]:
    """Build the step of the run, run it with up to two micro-batches while comparing it with the plan
    (`_conform`), run it again with one micro-batch, and throw it away. Kernels, their caches and thread
    stacks then exist before the memory that the process itself takes is read
    (docs/decisions/002-memory-cap.md gives the difference). If there is a cap, save and evaluate once, too,
    as far as the run does that under the cap (`_rehearse`). Return (number of elements of the parameters of
    the model without a plan, what `_rehearse` returns). Raises NotConforming if the step does not do what the
    plan says, and what `Checkpointer` and its `rehearse` raise."""
    import torch

    batch = job.make_batch(0, spec.seed)
    torch.manual_seed(spec.seed)
    model_facts: list[tuple[int, frozenset[Any]]] = []
    step = make_step(
        job,
        spec.plan,
        world=world,
        on_built=lambda bench: model_facts.append(_elements_and_dtypes(bench.model)),
    )
    part, terms = step.local(batch)
    keeper = _keeper(spec, step) if spec.cap_bytes is not None and spec.keep.save else None
    _conform(step, (part, terms), job, spec, model_facts[0])
    step.run(part, micro_batch_limit=1, terms_per_rank=terms)
    del batch, part
    data_peak_bytes = _rehearse(job, spec, step, keeper, counter)
    step.close()
    del step, keeper
    gc.collect()
    return model_facts[0][0], data_peak_bytes


def _rehearse(
    job: Job, spec: RunSpec, step: TrainingStep, keeper: Checkpointer | None, counter: PeakCounter
) -> int:
    """Save once, if ``keeper`` is given, and evaluate once, if the run evaluates under its cap. Return the
    largest data segment of the process meanwhile in bytes; 0 if it did neither, or without the counting
    allocator. What both load for the first time is then part of the footprint. The state of torch's random
    numbers on the host is as before. Raises what `Checkpointer.rehearse` and the job's ``evaluate`` raise."""
    import torch

    from memfit.runtime.counting_allocator import CountingAllocator

    evaluates = spec.evaluate and spec.cap_bytes is not None and spec.cap_scope != "training"
    evaluates = evaluates and job.evaluate is not None
    if keeper is None and not evaluates:
        return 0
    allocator = counter if isinstance(counter, CountingAllocator) else None
    if allocator is not None:
        allocator.release()
        allocator.watch_data(True)
    if keeper is not None:
        keeper.rehearse()
    if evaluates and job.evaluate is not None:
        mode = step.model.training
        with torch.random.fork_rng(devices=[]), step.contexts():
            job.evaluate(step.model)
        step.model.train(mode)
    if allocator is None:
        return 0
    data_peak_bytes = allocator.data_peak_bytes()
    allocator.watch_data(False)
    return data_peak_bytes


def _conform(
    step: TrainingStep,
    inputs: tuple[Any, float],
    job: Job,
    spec: RunSpec,
    model_facts: tuple[int, frozenset[Any]],
) -> None:
    """Run one step of up to two micro-batches, watch what it does, compare that with the plan, and report the
    result as an event "conformance". ``inputs``: this rank's part of the batch, and the mean number of loss
    terms per rank. ``model_facts``: the number of elements of the parameters of the model without a plan, and
    their dtypes. Raises NotConforming if the step differs from the plan."""
    from memfit.conformance.module_hooks import PlainModel
    from memfit.conformance.monitor import Monitor

    micro_batches = min(_WATCHED, spec.plan.micro_batches)
    monitor = Monitor(
        step.model,
        step.optimizer,
        spec.plan,
        blocks=job.blocks,
        head=job.head,
        whole_elements=model_facts[0],
        micro_batches=micro_batches,
    )
    monitor.clip = job.clip or 0.0
    monitor.plain_model = PlainModel(
        dtypes=model_facts[1],
        run=functools.partial(_observe_plain_blocks, job, inputs[0], step.bench.torch_device),
    )

    def on_phase(phase: Phase) -> None:
        if phase is Phase.OPTIMIZER:
            monitor.before_update()

    with monitor:
        norm = step.run(inputs[0], on_phase, micro_batch_limit=micro_batches, terms_per_rank=inputs[1])[1]
    monitor.clipping.before = float(norm)
    tell("conformance", result=str(monitor.conclude()))


def _check_trained_step(step: TrainingStep, job: Job, elements: int) -> None:
    """Compare the trained model and optimizer with the plan, as far as this is possible without watching a
    step. The step that the warm-up watched was another instance, made by the same code. ``elements``: number
    of elements of the parameters of the model without a plan. Raises NotConforming if they differ from the
    plan."""
    from memfit.conformance.monitor import Monitor

    Monitor(
        step.model, step.optimizer, step.plan, blocks=job.blocks, head=job.head, whole_elements=elements
    ).conclude()


def _observe_plain_blocks(job: Job, part: Any, device: str, autocast_dtype: Any) -> Any:
    """Run forward and backward of the model without a plan on the first two samples of ``part`` (on three if
    their number is odd, on one if there is one), on ``device``, under autocast to ``autocast_dtype`` unless
    that is None. Return what was observed of its blocks (`BlockActivity`), or None if the run fails."""
    import torch

    from memfit.conformance.module_hooks import BlockListener
    from memfit.model.batch_objects import batch_length, split
    from memfit.model.blocks import find_blocks

    listener = BlockListener()
    try:
        model = job.build_model().train().to(device)
        listener.listen(find_blocks(model, job.blocks)[1])
        with torch.autocast(torch.device(device).type, autocast_dtype, enabled=autocast_dtype is not None):
            loss = job.loss(model, split(part, max(1, batch_length(part) // 2))[0])
        loss.backward()
    except Exception:  # noqa: BLE001  the user's own code, which may need more samples
        return None
    return listener.observed()


def _elements_and_dtypes(model: Any) -> tuple[int, frozenset[Any]]:
    params = list(model.parameters())
    return sum(p.numel() for p in params), frozenset(p.dtype for p in params)


@contextlib.contextmanager
def _cap(spec: RunSpec, counter: PeakCounter, device: torch.device, data_peak_bytes: int) -> Any:
    """Set the cap of the run, lifted at the end, and yield it, or None if there is none. ``data_peak_bytes``:
    the largest data segment of the process while the warm-up saved and evaluated, 0 if it did not; it raises
    a cap that is memfit's own bound (``cap_scope`` "bound")."""
    if spec.cap_bytes is None:
        yield None
        return
    from memfit.runtime.memory_cap import MemoryLimit

    limit = MemoryLimit(spec.cap_bytes, device=device, counter=counter)
    limit.apply(at_least_data_bytes=data_peak_bytes if spec.cap_scope == "bound" else 0)
    try:
        yield limit
    finally:
        limit.lift()


def _train_and_measure(job: Job, spec: RunSpec, gauge: _Gauge, limit: MemoryLimit | None) -> Measurement:
    """Train, evaluate, compare the trained step with the plan, and return the measurement. Its outcome is oom
    if memory ran out, interrupted if SIGTERM ended the training (the model is then not evaluated), and failed
    if a loss or gradient norm was not finite or the run used more than its cap (`_describe_excess`). Other
    errors are raised. ``limit``: the memory cap, lifted before the evaluation if it is for training alone
    (``cap_scope`` "training"); None: no cap."""
    from memfit.runtime.energy import EnergyMeter
    from memfit.runtime.oom import is_oom_error
    from memfit.worker.degraded_training import scores_by_endpoint

    outcome, reason, oom_message, digest = OutcomeKind.OK, "", "", ""
    scores: Mapping[str, float] = {}
    meter = EnergyMeter(str(gauge.device))
    energy: tuple[float | None, str] = (None, "")
    try:
        step = _train(job, spec, gauge, meter)
        gauge.heartbeat.beat(spec.steps, "end")
        energy = meter.stop()
        gauge.of_accelerator = _accelerator_fields(gauge)
        gauge.used_bytes = limit.used_bytes() if limit is not None else None
        if gauge.end:
            outcome, reason = OutcomeKind.INTERRUPTED, gauge.end
        elif spec.evaluate and job.evaluate is not None:
            if limit is not None and spec.cap_scope == "training":
                limit.lift()  # a batch of held-out data may be larger
            gauge.start_phase("evaluation")
            tell("stage", stage="evaluate")
            gauge.heartbeat.beat(spec.steps, "evaluate")
            with step.contexts():
                scores = scores_by_endpoint(job, job.evaluate(step.model))
            gauge.start_phase("end")
            gauge.used_bytes = limit.used_bytes() if limit is not None else None
        _check_trained_step(step, job, gauge.elements)
        digest = _digest(step.model)
        step.close()
    except NonFinite as error:
        outcome, reason = OutcomeKind.FAILED, str(error)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_oom_error(error):
            raise
        gauge.start_phase(gauge.phase)
        outcome, reason, oom_message = (
            OutcomeKind.OOM,
            _oom_text(gauge.phase, gauge.first + len(gauge.losses)),
            _message(error),
        )
    gauge.resident.sample(whole=True)
    if outcome is OutcomeKind.OK and limit is not None and (passed := _describe_excess(spec, gauge, limit)):
        outcome, reason = OutcomeKind.FAILED, passed
    return dataclasses.replace(
        _measurement(spec, gauge, limit, outcome, reason, energy, scores, digest), oom_message=oom_message
    )


def _message(error: Exception) -> str:
    """Return the class and text of an error in one line of at most 1,000 characters; "" for an OSError, whose
    text may have the path of a file."""
    if isinstance(error, OSError):
        return ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_MESSAGE]


def _oom_text(phase: str, done: int) -> str:
    """Return the reason of a run that ran out of memory in ``phase``, after ``done`` steps."""
    if phase in ("evaluation", "save"):
        return f"out of memory in {phase} after {done} steps"
    return f"out of memory in {phase} of step {done}"


def _describe_excess(spec: RunSpec, gauge: _Gauge, limit: MemoryLimit) -> str:
    """Return a text that says how the run used more than its cap although nothing stopped it: by memory that
    the cap does not count, by data that was loaded before the cap was set, or because the job raised the
    limit. Return "" if it did not use more, and on an accelerator."""
    if gauge.device.type != HOST:
        return ""
    cap_bytes, resident = limit.cap_bytes, gauge.resident.observed()
    private_bytes = gauge.used_bytes or max(0, gauge.peak_bytes)
    outside_bytes = resident.shared_bytes + resident.mapped_bytes
    if limit.was_raised():
        return "the job has raised the limit that caps its memory"
    if resident.loaded_bytes > cap_bytes and spec.cap_scope == "run":
        return (
            f"passed the cap of {format_bytes(cap_bytes)}: the job holds "
            f"{format_bytes(resident.loaded_bytes)} that it loaded before the cap was set"
        )
    if outside_bytes and private_bytes + outside_bytes > cap_bytes:
        return (
            f"passed the cap of {format_bytes(cap_bytes)}: {format_bytes(private_bytes)} private, "
            f"{format_bytes(resident.shared_bytes)} shared, {format_bytes(resident.mapped_bytes)} of mapped "
            "files"
        )
    return ""


def _train(job: Job, spec: RunSpec, gauge: _Gauge, meter: EnergyMeter) -> TrainingStep:
    import torch

    from memfit.worker.degraded_training import degrade

    torch.manual_seed(spec.seed)
    step = gauge.make_step(job, spec.plan, world=gauge.world)
    after_step = degrade(step, spec.degraded)
    keeper = _keeper(spec, step)
    gauge.settle()  # building the step, and asynchronous saves, made groups with their own threads
    if keeper is not None and step.average is not None:
        raise UserError(
            "checkpoints are not supported for a job with Job(ema=...), whose averaged weights they do not "
            "store",
            allowed="a run without --save and --resume",
        )
    if keeper is not None and spec.keep.resume:
        gauge.start_phase("resume")
        gauge.first = keeper.restore()
    meter.start()
    try:
        _run_steps(job, spec, gauge, step, keeper, after_step)
    except BaseException:
        if keeper is not None:
            keeper.wait()  # it may use the process group
        raise
    if keeper is not None and spec.keep.asynchronous:
        _finish_save(keeper, gauge)
    return step


def _run_steps(
    job: Job,
    spec: RunSpec,
    gauge: _Gauge,
    step: TrainingStep,
    keeper: Checkpointer | None,
    after_step: Callable[[], None],
) -> None:
    for index in range(gauge.first, spec.steps):
        gauge.start_phase("data")
        start = time.perf_counter()
        inputs = step.local(job.make_batch(index, spec.seed))
        gauge.batch_s.append(time.perf_counter() - start)
        gauge.start_phase("between")
        _one_step(step, inputs, index, spec, gauge)
        after_step()
        del inputs
        if keeper is not None and index == gauge.first:
            keeper.check()
        if keeper is not None and _is_save_due(keeper, gauge, index + 1):
            gauge.start_phase("save")
            keeper.save(index + 1)
            gauge.start_phase("between")
        elif keeper is not None and keeper.has_written:
            _finish_save(keeper, gauge)
        if gauge.requests is not None and gauge.requests.ends(index + 1) and index + 1 < spec.steps:
            gauge.end = f"stopped by SIGTERM after {index + 1} steps, which are saved in {spec.keep.save}"
            gauge.requests.has_ended = True
            break


def _finish_save(keeper: Checkpointer, gauge: _Gauge) -> None:
    gauge.start_phase("save")
    keeper.finish()
    gauge.save_copy_bytes = keeper.copy_bytes
    gauge.start_phase("between")


def _is_save_due(keeper: Checkpointer, gauge: _Gauge, done: int) -> bool:
    """Return whether to save after ``done`` steps: by the settings of the run, or because a signal asked. All
    ranks must call it, once after each step, because it exchanges the signals (`SaveRequests.exchange`)."""
    if gauge.requests is None:
        return keeper.due(done)
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store() if distributed_c10d.is_initialized() else None
    gauge.requests.exchange(done, gauge.world.rank, store)
    return keeper.due(done) or gauge.requests.due(done)


def _keeper(spec: RunSpec, step: TrainingStep) -> Checkpointer | None:
    if not (spec.keep.save or spec.keep.resume):
        return None
    from memfit.worker.checkpoint import Checkpointer

    return Checkpointer(spec, step)


def _one_step(
    step: TrainingStep, inputs: tuple[Any, float], index: int, spec: RunSpec, gauge: _Gauge
) -> None:
    is_last = index == spec.steps - 1
    from memfit.runtime.devices import synchronize
    from memfit.runtime.memory import heap_bytes, rss_bytes

    log = getattr(gauge.counter, "start_log", None) if spec.timeline and is_last else None
    if log is not None:
        log()
        start_count = _event_count(gauge.counter)
    gauge.step_peak_bytes = 0
    start = time.perf_counter()

    phase_starts: list[int] = []

    def mark(phase: Phase) -> None:
        if phase is Phase.BACKWARD and len(gauge.before_backward_s) < len(gauge.batch_s):
            gauge.before_backward_s.append(gauge.batch_s[-1] + time.perf_counter() - start)
        gauge.start_phase(str(phase))
        if log is not None:
            phase_starts.append(_event_count(gauge.counter))

    loss, norm = step.run(inputs[0], mark, terms_per_rank=inputs[1])
    values = float(loss), float(norm)
    synchronize(gauge.device)
    gauge.step_s.append(time.perf_counter() - start)
    gauge.start_phase("between")
    if log is not None:
        event_log = gauge.counter.stop_log()  # type: ignore[attr-defined]
        gauge.timeline = _timeline(event_log, [t - start_count for t in phase_starts], gauge.base_bytes)
    gauge.losses.append(values[0])
    gauge.grad_norms.append(values[1])
    if spec.cap_bytes is not None:
        gauge.headroom.append(spec.cap_bytes - gauge.step_peak_bytes)
    tell(
        "step",
        step=index,
        steps=spec.steps,
        loss=values[0],
        peak_bytes=gauge.peak_bytes,
        grad_norm=values[1],
        step_s=gauge.step_s[-1],
        step_peak_bytes=gauge.step_peak_bytes,
        allocated_bytes=gauge.counter.live_bytes() - gauge.base_bytes,
        heap_bytes=heap_bytes(),
        host_bytes=rss_bytes(),
    )
    for name, value in zip(("loss", "gradient norm"), values, strict=True):
        if not math.isfinite(value):
            raise NonFinite(f"{name} is {value} at step {index}")


def _event_count(counter: Any) -> int:
    counts = counter.counts()
    return int(counts.allocations + counts.frees)


def _timeline(event_log: Any, phase_starts: list[int], base_bytes: int) -> tuple[int, ...]:
    """Return the live bytes above ``base_bytes`` over a step, thinned to about TIMELINE_POINTS (400) values
    in the same way as the timeline of a prediction (`thin_phases`). ``phase_starts``: indices in the event
    log at which the step's phases start."""
    from itertools import accumulate, pairwise

    from memfit.types.downsample import thin_phases

    live_bytes = [v - base_bytes for v in accumulate(event_log.deltas_bytes, initial=event_log.start_bytes)]
    return thin_phases(
        [live_bytes[a : b + 1] for a, b in pairwise([*phase_starts, len(live_bytes)])], TIMELINE_POINTS
    )


def _digest(model: Any) -> str:
    """Return the SHA-256 of the names and bytes of the model's parameters, in the order of their names: of a
    sharded parameter this rank's shard, and of one that ZeRO 3 has freed the name only."""
    import torch

    checksum = hashlib.sha256()
    for name, param in sorted(model.named_parameters()):
        checksum.update(name.encode())
        local = getattr(param, "to_local", lambda p=param: p)()  # this rank's shard of a sharded parameter
        if not local.untyped_storage().nbytes():
            continue  # freed by ZeRO 3
        checksum.update(local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def _accelerator_fields(gauge: _Gauge) -> dict[str, Any]:
    """Return the fields of a `Measurement` that only an accelerator has. Empty on a CPU."""
    from memfit.runtime.devices import AllocatorCounter, SampledCounter, device_name, driver_used_bytes

    counter = gauge.counter
    if not isinstance(counter, AllocatorCounter | SampledCounter):
        return {}
    used_bytes, before_bytes = driver_used_bytes(gauge.device), gauge.driver_bytes_before
    return {
        "device": device_name(gauge.device),
        "device_peak_bytes": None
        if used_bytes is None or before_bytes is None
        else used_bytes - before_bytes,
        "reserved_peak_bytes": counter.reserved_peak_bytes(),
        "allocator_retries": counter.retries(),
    }


def _measurement(
    spec: RunSpec,
    gauge: _Gauge,
    limit: MemoryLimit | None,
    outcome: OutcomeKind,
    reason: str,
    energy: tuple[float | None, str],
    scores: Mapping[str, float],
    digest: str,
) -> Measurement:
    from memfit.runtime.devices import collective_library, launch_node

    used_bytes = gauge.used_bytes or (limit.used_bytes() if limit is not None else None)
    outside_steps = ("between", "data", "end")
    phases = {k: v for k, v in gauge.phase_peaks.items() if k not in outside_steps}
    return Measurement(
        outcome=outcome,
        reason=reason,
        steps_done=len(gauge.losses),
        first_step=gauge.first,
        peak_bytes=gauge.peak_bytes,
        peak_source=gauge.counter.source,
        **(gauge.of_accelerator or _accelerator_fields(gauge)),
        phase_peak_bytes=phases,
        phase_rss_bytes={k: v for k, v in gauge.phase_rss.items() if k not in outside_steps},
        rss_peak_bytes=max(gauge.phase_rss.values(), default=None),
        footprint_bytes=limit.footprint_bytes if limit is not None else None,
        limit_kind=limit.kind if limit is not None else "",
        process_peak_bytes=used_bytes,
        overhead_ratio=used_bytes / gauge.peak_bytes if used_bytes and gauge.peak_bytes else None,
        resident=gauge.resident.observed(),
        save_copy_bytes=gauge.save_copy_bytes,
        cap_bytes=limit.cap_bytes if limit is not None and limit.cap_bytes != spec.cap_bytes else None,
        step_s=tuple(gauge.step_s),
        batch_s=tuple(gauge.batch_s),
        before_backward_s=statistics.median(gauge.before_backward_s) if gauge.before_backward_s else None,
        collectives=collective_library(spec.device) if spec.plan.ranks > 1 else "",
        node=launch_node(),
        losses=tuple(gauge.losses),
        grad_norms=tuple(gauge.grad_norms),
        headroom_bytes=tuple(map(int, gauge.headroom)),
        metric=next(iter(scores.values()), None),
        surrogates=dict(list(scores.items())[1:]),
        energy_j=energy[0],
        energy_boundary=energy[1],
        timeline_bytes=gauge.timeline,
        weights_digest=digest,
    )
