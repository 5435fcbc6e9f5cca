"""Functions to call in the user's own code: ``memfit.estimate``, ``from_trainer`` and ``assert_fits`` predict
the memory of a training step; ``largest`` finds the largest batch or other size that fits; ``apply`` applies
a plan to a model in the user's own loop; ``conform`` compares a prepared model with a plan; ``watch`` records
a training, and ``next_plan`` chooses a safer plan after it ran out of memory.

::

    import memfit
    prediction = memfit.estimate(model, batch, optimizer="adamw", machine="H100-SXM")
    prediction.allocated_bytes.value, prediction.fits
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memfit.conformance.monitor import Monitor
from memfit.conformance.sharding import world_size
from memfit.cost.host import host_holds, host_line, with_host_memory
from memfit.files.replace import write_whole
from memfit.inputs import job_of, machine_of, on_ranks, plan_of, refuse_lazy, says_ranks
from memfit.jobs.user_job import run_user_code
from memfit.lint import to_plan
from memfit.lint.clipping import clipping_setting
from memfit.lint.option_reasons import option_reasons
from memfit.lint.trainer_setup import setup_of_trainer
from memfit.model.batch_objects import repeat
from memfit.monitoring.record import OutOfMemory
from memfit.monitoring.watch import watch
from memfit.planner.batch_shape import with_batch_shape
from memfit.planner.capacity import fits_under, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.largest import LargestValue, MeasuredSize, batch_multiple, find_largest, prober
from memfit.planner.largest_runs import MEASURED_STEPS, measured_size, with_boundary
from memfit.planner.request import job_facts
from memfit.planner.safer_plans import FAILURES, predictor_of_batch, safer_plan
from memfit.planner.workload import workload_of
from memfit.planner.workspace_probes import probe_workspaces
from memfit.report.workload_text import workload_text
from memfit.runtime import local_machine
from memfit.techniques.base import JobFacts
from memfit.techniques.imported_optimizer import SeparateOptimizers
from memfit.techniques.plan_file import plan_text
from memfit.techniques.rank_mesh import SEVERAL, layout
from memfit.techniques.registry import check, proposable, technique
from memfit.trace.lifecycle import Lifecycle, lifecycle
from memfit.trace.real_weights import WeightsSource, build_weights, offer_weights
from memfit.types.conformance import Conformance, Difference, NotConforming
from memfit.types.dependence import DependenceKind
from memfit.types.errors import MemfitError, UserError, first_line
from memfit.types.gc_pause import pause_gc
from memfit.types.job import Bound, Job, JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Machine
from memfit.types.parsing import parse_bytes
from memfit.types.plan import Plan, Use, use
from memfit.types.result import NOT_INCLUDED, Estimate, Interval
from memfit.types.units import format_bytes
from memfit.types.workload import Workload
from memfit.user_loop import Fit, apply_plan
from memfit.worker.forked import train_forked

__all__ = [
    "Fit",
    "Prediction",
    "apply",
    "assert_fits",
    "conform",
    "estimate",
    "from_trainer",
    "largest",
    "next_plan",
    "watch",
]
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# Limits of a step that is computed on real tensors: operations, and share of free memory.
_MOST_COMPUTED_FLOPS, _FREE_RATIO = 4e12, 0.5
_TIMELINE_POINTS = 400
# Arguments of a Trainer that act on its loop, not on its model, loss, optimizer or loader.
_LOOP_ARGUMENTS = (
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "auto_find_batch_size",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "torch_compile_backend",
    "torch_compile_mode",
)
_CHEAP_BYTES = 64 * 2**30  # larger models are not searched for a plan that would fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction for one training step of ``job`` under ``plan`` on ``machine``. Memory of the device is
    that of the rank with the highest peak.

    ``cap_bytes``: the memory of one device that the step should fit. ``allocated_bytes`` (live tensors),
    ``reserved_bytes`` (what torch's caching allocator takes for them), ``device_bytes`` (these, and all that
    the device holds outside the allocator, such as the context) and ``host_bytes`` (main memory of one host)
    are intervals. Each of the last three is None if the machine has no such memory, or if memfit does
    not know enough of the device to predict it.
    """

    estimate: Estimate
    job: Job
    machine: Machine
    cap_bytes: int
    predictor: Predictor = dataclasses.field(repr=False)
    probe: bool = True  # whether kernel workspaces may be probed, as given to `estimate`

    @property
    def plan(self) -> Plan:
        """The plan that the prediction is for."""
        return self.estimate.plan

    @property
    def allocated_bytes(self) -> Interval:
        """Highest number of bytes of tensors alive at once on one device: the predicted ``value``, and the
        range from ``low`` to ``high`` that the true number should lie in."""
        return self.estimate.allocated_bytes

    @property
    def reserved_bytes(self) -> Interval | None:
        """What torch's caching allocator takes from one device for these tensors. None on a CPU, which has no
        such allocator, and on a device other than CUDA's and ROCm's, where memfit cannot predict it."""
        return self.estimate.reserved_bytes

    @property
    def device_bytes(self) -> Interval | None:
        """What one device needs in all: ``reserved_bytes`` and what lies outside the allocator, such as the
        context. None where ``reserved_bytes`` is, or if the catalog has too few facts."""
        return self.estimate.device_bytes

    @property
    def host_bytes(self) -> Interval | None:
        """Memory that one host needs for all its ranks, or None if it is not predicted: the processes, and
        the larger of what loading the model and what training needs (offloaded tensors, DataLoader workers).
        On a CPU, training includes the tensors of the step, and loading counts nothing."""
        return self.estimate.host_bytes

    @property
    def fits(self) -> bool:
        """Whether ``needed_bytes`` is at most ``cap_bytes`` and the host has the memory that the plan needs
        there (see ``host``).

        If the host's memory is unknown, a plan that keeps tensors there does not fit, and for others it is
        not checked. On a CPU the host is not checked if ``cap_bytes`` is above the machine's memory.
        """
        return fits_under(self.cap_bytes, self.machine)(self.estimate)

    @property
    def needed_bytes(self) -> int:
        """The bytes that `fits` compares with ``cap_bytes``. On a CPU, these are the tensors plus 5 % and
        2 MiB, and at least the upper end of ``allocated_bytes`` plus 2 MiB. On an accelerator of this
        machine, it is the upper end of ``reserved_bytes``. On another accelerator, it is the upper end of
        ``device_bytes`` or, if that is None, the value of ``reserved_bytes`` plus 1 GiB. Where
        ``reserved_bytes`` is None, 1.06 times the value of ``allocated_bytes`` stands for it."""
        return needed_bytes(self.estimate, self.machine)

    @property
    def host(self) -> str:
        """A line that says what the plan needs of one host's memory, what the host has, and whether that is
        not enough, such as "needs 300 GiB of host memory for 8 ranks, the host has 256 GiB: does not fit". If
        the host's memory is unknown or assumed, it says so. "" on a CPU, or if the need is unknown."""
        return host_line(self.estimate, self.machine)

    def safer(self, batch: Any = None) -> Prediction:
        """Return the prediction of the plan with which to continue after a training ran out of memory under
        this one, as `memfit run --on-oom next-plan` does. That plan fits ``cap_bytes``, its effect class is
        not higher, and it differs only in micro-batches, recomputation, offload of activations and chunking.
        If this plan was itself predicted to fit, that one needs at least 10 % less.

        ``batch``: the batch that failed, for example a longer one; None: that of this prediction. Nothing is
        trained and no plan applied. Raises UserError, which says why, if there is no such plan, or if this
        plan cannot be predicted for the batch."""
        facts = job_facts(self.job, self.machine.device.kind, self.plan.ranks)
        predictor = dataclasses.replace(self.predictor, job_facts=facts)
        if batch is not None:
            predictor = predictor_of_batch(predictor, batch)
        try:
            safer = safer_plan(predictor, self.plan, limit_bytes=self.cap_bytes)
        except FAILURES as error:
            raise UserError(
                f"the plan {self.plan.label} cannot be predicted for this batch, so no safer plan can be "
                f"chosen: {error}"
            ) from error
        if isinstance(safer, str):
            why_none = safer
            raise UserError(
                f"there is no safer plan than {self.plan.label}, one that needs less memory and changes "
                f"results no further: {why_none}"
            )
        return dataclasses.replace(self, estimate=safer.estimate, job=predictor.job, predictor=predictor)

    @property
    def not_included(self) -> tuple[str, ...]:
        """Names of what a training loop may keep in memory beside the step, such as logging. No number of a
        prediction includes it. The names are the same for every prediction."""
        return NOT_INCLUDED

    @property
    def by_category(self) -> Mapping[str, int]:
        """Bytes of the tensors alive at the peak, category -> bytes, such as "parameter" or "activation"."""
        return self.estimate.at_peak_bytes

    @property
    def by_module(self) -> Mapping[str, int]:
        """Bytes of the tensors alive at the peak, path of the module that made them -> bytes. "" is the model
        itself."""
        return self.estimate.by_module_bytes

    @property
    def by_phase(self) -> Mapping[str, int]:
        """Peak bytes of live tensors in each phase, phase -> bytes: "setup" (model and optimizer are built),
        "forward", "backward" and "optimizer"."""
        return self.estimate.phase_peak_bytes

    @functools.cached_property
    def workload(self) -> Workload:
        """What is predicted, for a line of text: model, number of parameters, batch size over all ranks,
        length or shape of a sample, and machine."""
        return workload_of(self.job, self.machine.name)

    @functools.cached_property
    def lifecycle(self) -> Lifecycle:
        """Peaks of live tensors during loading, the first step, evaluation, saving and resuming, and sizes of
        checkpoints. They are traced when this is first accessed. Raises UserError if the plan has several
        ranks, and if a size depends on values that are neither known nor bounded (`Job.bound`)."""
        if self.plan.ranks > 1:
            raise UserError(
                "lifecycle (peaks of loading, first step, evaluation, saving and resuming) and "
                f"checkpoint_bytes are predicted only for plans of 1 rank, not of {self.plan.ranks}",
                hint="predict a plan of 1 rank",
            )
        return lifecycle(self.job, self.plan, device=self.machine.device.trace_kind)

    @property
    def checkpoint_bytes(self) -> Mapping[str, int]:
        """Bytes of the files that ``torch.save`` writes, file -> bytes: "model", "optimizer" and, if some
        parameters are frozen, "trainable", which has the other parameters alone. Raises UserError if the plan
        has several ranks."""
        return self.lifecycle.checkpoint_bytes

    def explain(self) -> str:
        """Return a text of several lines of at most 110 characters, in English: the workload, the predicted
        memory, and what the peak consists of."""
        from rich.console import Console
        from rich.text import Text

        from memfit.report.terminal import print_estimate

        text = io.StringIO()
        console = Console(file=text, width=110)
        console.print(Text(workload_text(self.workload)))
        print_estimate(self.estimate, console=console, lang="en")
        return text.getvalue()

    def __str__(self) -> str:
        allocated = self.allocated_bytes
        kinds = (("reserved", self.reserved_bytes), ("device", self.device_bytes), ("host", self.host_bytes))
        other_memory = "".join(f", {name} {format_bytes(v.value)}" for name, v in kinds if v is not None)
        guesses = self.estimate.guesses
        caveats = f"; {self.estimate.split_warning}" if self.estimate.split_warning else ""
        caveats += f"; assumed: {guesses[0]}" if guesses else ""
        caveats += f" and {len(guesses) - 1} more" if len(guesses) > 1 else ""
        need, cap = format_bytes(self.needed_bytes), format_bytes(self.cap_bytes)
        verdict = f"{'fits' if self.fits else 'does not fit'} {cap}, of which it needs {need}"
        if not self.fits and self.needed_bytes <= self.cap_bytes:
            verdict = f"does not fit the host; of the device's {cap} it needs {need}"
        return (
            f"{workload_text(self.workload)}; {self.plan.label}: allocated {format_bytes(allocated.value)} "
            f"({format_bytes(allocated.low)} to {format_bytes(allocated.high)}){other_memory}; peak in "
            f"{self.estimate.peak_phase}; {verdict}{caveats}"
            f"{f'; {self.host}' if self.host else ''}; not included: {', '.join(NOT_INCLUDED)}"
        )

    def __repr__(self) -> str:
        return f"<memfit.Prediction {self}>"

    def _repr_html_(self) -> str:
        from memfit.cost.memory import timeline
        from memfit.report.notebook import estimate_html

        try:
            live_bytes = timeline(self.predictor.trace(self.plan, self.estimate.rank), _TIMELINE_POINTS)
        except (MemfitError, *_FAILURES):  # what was predicted is shown without it
            live_bytes = ()
        return estimate_html(
            self.estimate,
            title=workload_text(self.workload),
            machine=self.machine.name,
            cap_bytes=self.cap_bytes,
            fits=self.fits,
            host=self.host,
            timeline_bytes=live_bytes,
        )


@pause_gc()
def estimate(  # noqa: PLR0913
    model: Any,
    batch: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    plan: Any = None,
    machine: Any = None,
    bound: Bound | None = None,
    ema: float | None = None,
    clip: float | None = None,
    workers: int | None = None,
    probe: bool = True,
    host_memory: str | int | None = None,
) -> Prediction:
    """Predict one training step of ``model`` on ``batch``; nothing is trained and no argument is changed.

    If the plan splits the batch, a copy of the model is run on a few samples to test whether they depend on
    each other. The result is in the prediction's ``estimate.dependence``, which is None for other plans.

    ``model``: a module, a function that builds one, or a Job, which takes no ``batch``, ``loss`` or
    ``optimizer``. ``batch``: the batch of the whole step over all ranks: a tensor, a mapping, tuple or list
    of tensors, an object with ``.to()`` that holds tensors, or a function that makes one of these. ``loss``:
    ``loss(model, batch)``, ``loss(output, batch)`` or ``loss(output, target)``; by default the loss that the
    model returns, else the mean of its output. ``optimizer``: "adamw", "adam", "sgd" or "adafactor", an
    import path such as "torch.optim:Muon", an optimizer of this model, or a function of parameters; by
    default AdamW.

    ``plan``: a Plan, ``{"activation-checkpointing": {}}``, the name of a technique, YAML text, or the path of
    a YAML file; by default plain training. A mapping, text or name of techniques for several ranks that does
    not give ``ranks`` uses all devices of the machine. ``machine``: a name of the catalog such as
    ``"8xH100-SXM"``, or the path of a machine file (.toml); by default this machine, that is its accelerator
    or, without one, its CPU; "this:cpu" is its CPU.

    ``bound``: sizes that only values decide, as in `Job`. ``ema``: the decay of a weight average that the
    loop keeps (True: 0.999); by default none. ``clip``: the largest gradient norm; by default gradients are
    not clipped. ``workers``: DataLoader worker processes of each rank, which take host memory; by default
    none. With a Job, these four replace its own values if they are not None. ``host_memory``: the memory of
    each host ("128GiB" or bytes), if it differs from the catalog's; not for a CPU.

    ``probe``: on this machine's CPU, run each operator whose kernel may use workspace at the peak once, alone
    and on made-up tensors, in a child process (a few seconds; results are stored on disk). Without it, and on
    other devices, the interval's upper end includes the most that they can use. If sizes in the step depend
    on computed values, as in a detector, and the step takes at most 4e12 operations and half of this
    machine's free memory, ``probe`` also computes the step on a copy of the model. Raises UserError if an
    argument is none of these, if the model or the machine does not support the plan, or if the step cannot be
    traced.
    """
    job = job_of(
        model, batch, loss=loss, optimizer=optimizer, bound=bound, ema=ema, clip=clip, workers=workers
    )
    target = machine_of(machine)
    if host_memory is not None:
        target = with_host_memory(target, _bytes(host_memory))
    facts = JobFacts(batch_size=job.batch_size, block_count=0, vocabulary=0, device_kind=target.device.kind)
    predictor = Predictor(job=job, machine=target, job_facts=facts)
    return Prediction(
        estimate=_predict(predictor, _plan_on(plan, target), probe),
        job=job,
        machine=target,
        cap_bytes=int(target.device.memory_bytes.value),
        predictor=predictor,
        probe=probe,
    )


def _bytes(memory: object) -> int:
    """Return the bytes of ``memory``: text as `parse_bytes` reads it, or a number of at least 1. Raises
    UserError for anything else."""
    if isinstance(memory, str):
        return parse_bytes(memory)
    if not isinstance(memory, int | float) or not 1 <= memory < math.inf:
        raise UserError(
            f"not a memory size: {memory!r}", allowed='text such as "24GiB", or at least 1, in bytes'
        )
    return int(memory)


def _plan_on(plan: Any, machine: Machine) -> Plan:
    resolved_plan = plan_of(plan)
    if _of_several(resolved_plan):
        resolved_plan = plan_of(on_ranks(plan, machine.device_count))
    return check(resolved_plan, machine)


def _of_several(plan: Plan) -> list[str]:
    return [u.technique for u in plan.uses if u.technique in SEVERAL]


def _predict(predictor: Predictor, plan: Plan, probe: bool) -> Estimate:
    """Return the plan's estimate. With ``probe``, sizes that depend on computed values are computed with the
    model's weights if the step is small enough (`real_weights`), and on this machine's CPU the workspaces of
    kernels that could move the peak are measured first. Raises UserError if the step cannot be traced."""
    try:
        if not probe:
            return predictor.whole(plan)
        job, most_bytes = predictor.job, _FREE_RATIO * local_machine.free_bytes()
        source = WeightsSource(lambda: build_weights(job.build_model), _MOST_COMPUTED_FLOPS, most_bytes)
        with offer_weights(source):
            if predictor.machine.is_here and predictor.machine.device.is_host:
                probe_workspaces(predictor, plan)
            return predictor.whole(plan)
    except _FAILURES as error:  # outside the user's own functions, whose errors are already UserErrors
        raise UserError(
            "memfit cannot predict this training step, as it does not run on fake tensors, which have shapes "
            f"but no data: {type(error).__name__}: {first_line(error)[:200]}",
            hint="if the same step trains without memfit, this is a limitation of memfit; if it fails "
            "there too, correct the step",
        ) from error


def next_plan(
    prediction: Prediction, file: str | Path, *, batch: Callable[[], Any] | None = None
) -> Callable[[OutOfMemory], str]:
    """Return a function for the argument ``on_oom`` of `watch`. After memory ran out under
    ``prediction.plan``, it writes the plan with which to continue (`Prediction.safer`) to the plan file
    ``file``, and returns a line that says which plan it wrote and why. It raises UserError as
    `Prediction.safer` does, and if the file cannot be written; the file is then as it was.

    ``batch``: returns the batch that failed, which may be longer than that of the prediction; None: the batch
    of the prediction. When the script starts, it must load the plan from the file, and its own last
    checkpoint; `memfit watch --restarts N -- COMMAND` starts it again.
    """

    def write(event: OutOfMemory) -> str:
        safer = prediction.safer(batch() if batch is not None else None)
        note = f"after {prediction.plan.label} ran out of memory in step {event.step}"
        write_whole(Path(file), plan_text(safer.plan, note=note).encode())
        return f"{safer.plan.label} in {file}, {note}"

    return write


def from_trainer(
    trainer: Any, machine: Any = None, *, probe: bool = True, ranks: int | None = None
) -> Prediction:
    """Predict the step that a Hugging Face ``Trainer`` would run, on one process or on several.

    It uses the trainer's model, loss and optimizer; the first batch of its loader, repeated once for each
    accumulated micro-batch and each data-parallel rank; and of its ``TrainingArguments`` those that
    `memfit.lint.to_plan` reads: precision, recomputation, accumulation, compilation, DDP, ``fsdp`` and
    ``deepspeed``, also if only ``accelerate launch`` chose them, ``max_grad_norm`` and
    ``dataloader_num_workers``. What of them no plan can express is listed in the prediction's
    ``estimate.assumptions``. ``ranks``: the number of processes; by default the world size of the launch.
    ``machine`` and ``probe`` are as in `estimate`. Call it before ``trainer.train()``, and in a launch of
    several processes on each of them.

    Raises UserError as `estimate` does; if the trainer's loader gives no batch; for Megatron-LM, XLA and
    tensor, context or sequence parallelism; and for one process with several devices, which would use
    ``torch.nn.DataParallel``, unless ``ranks`` is given.
    """
    import torch

    args = trainer.args
    if ranks is None and args.n_gpu > 1:
        raise UserError(
            f"this Trainer would use {args.n_gpu} devices in one process by torch.nn.DataParallel, which "
            "memfit does not predict",
            hint="give ranks=N for a launch of one process per device, as by torchrun --nproc-per-node N",
        )
    setup = setup_of_trainer(trainer, ranks or args.world_size)
    carried = to_plan.convert(setup, of_objects=True)
    plan, optimizer = carried.plan, None
    if not _has_deepspeed_optimizer(trainer):
        names = [u.technique for u in plan.uses if technique(u.technique).slot == "optimizer"]
        plan = functools.reduce(Plan.without, names, plan)
        optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)

        def optimizer(params: Any) -> Any:
            return optimizer_class(params, **settings)

    with torch.random.fork_rng(devices=[]):
        micro_batch = run_user_code(
            lambda: dict(next(iter(trainer.get_train_dataloader()))), "the training loader of the trainer"
        )
    prediction = estimate(
        trainer.model,
        repeat(micro_batch, plan.micro_batches * layout(plan).data),
        loss=trainer.compute_loss,
        optimizer=optimizer,
        plan=plan,
        machine=machine,
        clip=clipping_setting(setup).limit or None,
        workers=args.dataloader_num_workers,
        probe=probe,
    )
    notes = [f"without {note.option}: {note.reason}" for note in carried.left_out]
    reasons = option_reasons("trainer").reasons
    notes += [f"without {name}: {reasons[name]}" for name in _LOOP_ARGUMENTS if getattr(args, name, None)]
    if plan.ranks > prediction.machine.device_count:
        notes.append(f"each of the {plan.ranks} processes has a device of its own")
    estimate_with_notes = dataclasses.replace(
        prediction.estimate, assumptions=(*notes, *prediction.estimate.assumptions)
    )
    return dataclasses.replace(prediction, estimate=estimate_with_notes)


def _has_deepspeed_optimizer(trainer: Any) -> bool:
    """Return whether DeepSpeed's configuration, not the trainer, chooses the optimizer."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and "optimizer" in plugin.deepspeed_config


@pause_gc()
def assert_fits(  # noqa: PLR0913
    model: Any,
    memory: str | int,
    *,
    batch: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    plan: Any = None,
    machine: Any = None,
    bound: Bound | None = None,
    ema: float | None = None,
    clip: float | None = None,
    workers: int | None = None,
    probe: bool = True,
    host_memory: str | int | None = None,
) -> Prediction:
    """Return the prediction, with ``memory`` as its ``cap_bytes``, if the step fits ``memory`` of one device
    ("24GiB" or bytes) and the host's memory; else raise AssertionError. For use in tests.

    ``model`` may also be a Prediction; of the other arguments, only ``memory`` is then used. Else all
    arguments are as in `estimate`. The text of the AssertionError has the needed bytes, the peak with its
    phase and operator, its largest categories and modules, and a plan that would fit, if one is found among a
    few (not for peaks above 64 GiB). Raises UserError as `estimate` does.
    """
    cap_bytes = _bytes(memory)
    prediction = (
        model
        if isinstance(model, Prediction)
        else estimate(
            model, batch, loss, optimizer, plan, machine, bound, ema, clip, workers, probe, host_memory
        )
    )
    prediction = dataclasses.replace(prediction, cap_bytes=cap_bytes)
    if not prediction.fits:
        raise AssertionError(_why_not(prediction))
    return prediction


def _why_not(prediction: Prediction) -> str:
    peak_estimate = prediction.estimate
    need_bytes = needed_bytes(peak_estimate, prediction.machine)
    smaller = next((p for p in _smaller(prediction) if p.fits), None)
    excess_text = (
        f"{format_bytes(need_bytes - prediction.cap_bytes)} more than {format_bytes(prediction.cap_bytes)}"
    )
    if need_bytes <= prediction.cap_bytes:
        excess_text = f"within {format_bytes(prediction.cap_bytes)}, but the host has too little memory"
    peak = f"peak of {format_bytes(peak_estimate.allocated_bytes.value)} in tensors"
    lines = [
        (
            f"{prediction.job.name}, {prediction.plan.label}: needs {format_bytes(need_bytes)} on "
            f"{prediction.machine.name}, {excess_text}"
        ),
        f"{peak}, in {peak_estimate.peak_phase} at {peak_estimate.peak_op}",
        f"live at the peak: {_largest(peak_estimate.at_peak_bytes)}",
        f"by module: {_largest(peak_estimate.by_module_bytes)}",
    ]
    if not host_holds(peak_estimate, prediction.machine):
        lines.insert(
            1,
            prediction.host
            or "all processes together need up to "
            f"{format_bytes(peak_estimate.needed_host_bytes or 0)} of this machine's memory",
        )
    if smaller is not None:
        smaller_need = format_bytes(needed_bytes(smaller.estimate, prediction.machine))
        warning = f"; {smaller.estimate.split_warning}" if smaller.estimate.split_warning else ""
        lines.append(f"would fit: {smaller.plan.label} ({smaller_need}){warning}")
    return "\n".join(lines)


def _largest(parts: Mapping[str, int]) -> str:
    top_parts = sorted(parts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(
        f"{name.replace('_', ' ') or 'the model itself'} {format_bytes(n)}" for name, n in top_parts
    )


def _smaller(prediction: Prediction) -> Iterator[Prediction]:
    """Yield predictions of the prediction's plan with techniques added one after another, each to the plan
    before: bf16 autocast; activation checkpointing of every block; gradient accumulation with 2, then 4, then
    as many micro-batches as samples. Each may fit or not.

    A technique that does not suit the plan or the model is left out, and gradient accumulation if samples are
    known to depend on each other. Yields nothing if the prediction's peak of tensors exceeds 64 GiB.
    """
    if prediction.allocated_bytes.value > _CHEAP_BYTES:
        return
    plan, batch = prediction.plan, prediction.job.batch_size
    extra_uses: list[Use] = [use("bf16-autocast"), use("activation-checkpointing", every=1)]
    if batch > 1 and prediction.predictor.dependence.kind is not DependenceKind.DEPENDENT:
        extra_uses += [use("gradient-accumulation", micro_batches=n) for n in (2, 4, batch) if 1 < n <= batch]
    for extra_use in extra_uses:
        with contextlib.suppress(MemfitError):  # it conflicts with the plan or does not suit the model
            extended_plan = plan_of(plan.with_use(extra_use))
            if not proposable(extended_plan):
                continue
            yield dataclasses.replace(
                prediction, estimate=_predict(prediction.predictor, extended_plan, prediction.probe)
            )
            plan = extended_plan


def apply(  # noqa: PLR0913
    plan: Any,
    model: Any,
    optimizer: Any = None,
    *,
    batch: Any = None,
    loss: Any = None,
    loss_terms: Callable[[Any], int] | None = None,
    clip: float | None = None,
    scaler: Any = None,
    device: Any = None,
    conform: bool = True,
    **structure: Any,
) -> Fit:
    """Apply ``plan`` to ``model``, in place, and return what the user's own loop must use. Call it on every
    rank, before the first step::

        fit = memfit.apply(plan, model, optimizer)
        for batch in loader:
            for part in fit.split(batch):
                with fit.forward():
                    loss = loss_function(fit.model(part["x"]), part["y"])
                fit.backward(loss)
            fit.step()

    The plan is applied by the code that memfit's worker runs. After the first step, what that step did is
    compared with the plan, as by `memfit.conform`, unless ``conform`` is False.

    ``plan``: as in `estimate`, but one that does not give ``ranks`` gets the world size of torch.distributed,
    which is 1 if that is not initialized. A plan for another number of ranks is refused.
    ``optimizer``: as in `estimate`. ``fit.optimizer`` has its groups and learning rates; it is another object
    if the plan replaces parameters or the optimizer. ``device``: where to train, such as "cuda:0"; by default
    where the model's parameters are. ``clip``: the largest gradient norm; by default gradients are not
    clipped. ``scaler``: the GradScaler of a loop that autocasts to float16 itself; ``fit`` scales the loss by
    it and updates it. ``loss_terms``: returns how many terms the loss of a batch averages, by default its
    number of samples; micro-batches are weighted by it.

    ``batch``, an example of what ``fit.split`` gets on this rank, and ``loss``, as in `estimate`, are needed
    only for plans that look at a run of the model first: chunking, tensor-parallel and context-parallel.
    ``structure``: the fields of `Job` that say where things are in the model: blocks, more_blocks, head,
    tensor_parallel, sequence_dim, experts, islands.

    Raises UserError if an argument is none of these, if a plan was applied to the model before, if the model
    is already wrapped or sharded, has parameters on the meta device or none that is trained, if the plan does
    not suit the model or the optimizer, and for a pipeline, which a loop cannot run. After an error in a
    technique, the model may be changed in part.
    """
    return apply_plan(
        plan,
        model,
        optimizer,
        batch=batch,
        loss=loss,
        loss_terms=loss_terms,
        clip=clip,
        scaler=scaler,
        device=device,
        conform=conform,
        fields=structure,
    )


def conform(
    model: Any,
    optimizer: Any,
    plan: Any,
    *,
    step: Callable[[], object] | None = None,
    blocks: str | None = None,
    ranks: int | None = None,
    clip: float | None = None,
) -> Conformance:
    """Compare a prepared model and optimizer with a plan, and return the result if they conform to it. Call
    it on every rank of the job.

    ``plan``: as in `estimate`. If it is a mapping, text or name without ``ranks``, its number of ranks is the
    argument ``ranks``, by default the world size. If neither gives it and the world size is 1, NotConforming
    is raised for a plan with techniques of several ranks (other than ``zero``). ``blocks``: module path of
    the repeated blocks, as in ``Job(blocks=...)``; found by default. Without blocks at this path, nothing
    about blocks is checked. ``clip``: the largest gradient norm that the update should receive, 0 if
    gradients must not be clipped; checked only if given, and with ``step``.

    ``optimizer``: the one that the training uses, as it is wrapped, or a list of several. With None, nothing
    about it is checked.

    Without ``step``, these are checked: ranks; whether the optimizer holds all trained parameters; number of
    parameter elements on this rank and their dtypes; how they are sharded (FSDP2's blocks, tensor
    parallelism, experts); which weights of blocks are trained (with LoRA: its rank, and beside how many
    layers) and the number of bits of the frozen ones; whether linear layers of blocks use float8; and which
    update torch's AdamW runs. If the ranks differ, nothing else is checked.

    ``step``, a function without arguments, runs one whole training step. With it, these are also checked:
    whether the step trains, that is, whether gradients reach the blocks that ran, the optimizer sees them,
    weights change for them, and parameters follow the copies that the optimizer updates; gradients and
    optimizer state on this rank and the state's bytes per element; micro-batches; which blocks are recomputed
    in backward and which are compiled; autocast; whether replicas are equal; whether data-parallel ranks get
    different samples and update with the mean of all their gradients; what FSDP2 frees after forward; whether
    tensor-parallel ranks leave the last block with the same numbers; whether ranks that share a sample work
    on different parts and use each other's (for this, a block is run four more times); whether pipeline
    stages hold what other stages train and follow the planned schedule; and, of the tensors that autograd
    keeps for backward, what was offloaded, dropped, or is whole logits. CPU offload is recognized by devices
    if the step runs on an accelerator, else by the active policy of FSDP2 or of the ZeRO optimizer.

    Of the result, ``checked`` says what was compared. What the plan states but could not be checked is in
    ``unseen``, with the reason; it is not reported as conforming. Raises NotConforming with each difference,
    on all ranks alike; UserError if the arguments are wrong. An error that ``step`` raises is passed on.
    """
    if not callable(getattr(model, "named_parameters", None)):
        raise UserError(
            f"the argument model is a {type(model).__name__}",
            allowed="a torch.nn.Module, as it was prepared for training: memfit.conform compares it with the "
            "plan",
        )
    refuse_lazy(model)
    _check_step(step)
    target_plan = plan_of(on_ranks(plan, ranks or world_size()))
    multi_rank_techniques = tuple(
        t for t in _of_several(target_plan) if t != "zero"
    )  # zero has a layout of one rank
    if multi_rank_techniques and world_size() == 1 and ranks is None and not says_ranks(plan):
        difference = Difference(
            feature="ranks",
            planned=f"several, for {', '.join(multi_rank_techniques)}",
            found="a world size of 1",
        )
        raise NotConforming(Conformance(differences=(difference,), checked=("ranks",), unseen=()))
    _check_clip(clip)
    for each in optimizer if isinstance(optimizer, list | tuple) else (optimizer,):
        if each is not None and not hasattr(each, "step"):
            raise UserError(
                f"the argument optimizer is or contains a {type(each).__name__}",
                allowed="the optimizer that the training uses, a list of several, or None",
            )
    if isinstance(optimizer, list | tuple):
        optimizer = SeparateOptimizers({str(i): each for i, each in enumerate(optimizer)})
    monitor = Monitor(model, optimizer, target_plan, blocks=blocks)
    monitor.clip = clip
    with monitor:
        if step is not None:
            step()
    return monitor.conclude()


def _check_clip(clip: object) -> None:
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < math.inf):
        raise UserError(
            f"the argument clip is not a gradient norm: {clip!r}",
            allowed="a finite positive number such as 1.0, the largest norm of all gradients; 0 if gradients "
            "must not be clipped; or None, with which clipping is not checked",
        )


def _check_step(step: object) -> None:
    if step is None:
        return
    if not callable(step):
        raise UserError(
            f"the argument step is not a function: {step!r:.60}",
            allowed="a function without arguments that runs one whole training step, or None, with which no "
            "step is run",
        )
    with contextlib.suppress(ValueError):  # built-in functions have no signature
        try:
            inspect.signature(step).bind()
        except TypeError as missing_argument:
            raise UserError(
                f"the argument step cannot be called without arguments: {missing_argument}",
                allowed="a function without required arguments that runs one whole training step, or None, "
                "with which no step is run",
            ) from None


@pause_gc()
def largest(  # noqa: PLR0913
    model: Any,
    batch: Any = None,
    *,
    memory: str | int | None = None,
    machine: Any = None,
    plan: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    start: int | None = None,
    step: int = 1,
    bound: Bound | None = None,
    clip: float | None = None,
    measure: bool = False,
) -> LargestValue:
    """Return the largest number for which a training step fits ``memory`` of one device. Nothing is trained,
    unless ``measure`` is true.

    With ``batch``, the number is that of samples: ``model`` and ``batch`` are as in `estimate`, and the batch
    is repeated or cut. A Job without ``batch`` is varied in the same way. Otherwise ``model`` is a function
    of the number, whatever it counts: ``model(n)`` returns a Job or a pair (model, batch), where both are as
    in `estimate`.

    ::

        memfit.largest(model, batch, machine="H100-SXM").value
        memfit.largest(lambda n: (Net(layers=n), batch), memory="24GiB", start=4)

    ``memory``: "24GiB" or bytes; by default that of the device. ``start``: the number that is tried first, at
    least 1; by default the samples of the batch, or 1. ``step``: only multiples of it are tried, and for
    samples of those that the plan needs, which are multiples of its micro-batches and data-parallel ranks.
    ``start`` is rounded up to one of them. ``machine``, ``plan``, ``loss``, ``optimizer``, ``bound`` and
    ``clip`` are as in `estimate`.

    The result's ``value`` is the largest number that is safe, or None if none fits. Its ``safe_next`` has the
    next multiple, which does not fit or is refused by the job or the trace (``problem`` says why); it is None
    if no larger one was tried (see ``limit``). ``expected`` has the largest that fits without memfit's
    margin.

    With ``measure``, numbers are also trained for three steps each in forked copies of this process, under a
    hard cap of ``memory``, in at most 16 runs: ``value`` is then the largest that ran, three times if the
    runs suffice, and ``measured`` also has the next one, a step or 0.1 % larger, which ran out of memory each
    time.
    ``measure`` needs Linux, this machine's CPU as ``machine``, a plan with one rank, and ``memory``. Raises
    UserError as `estimate` does, if the first number cannot be predicted, and if ``measure`` is not possible.
    """
    target, samples = machine_of(machine), batch is not None or isinstance(model, Job)
    settings: dict[str, Any] = {"loss": loss, "optimizer": optimizer, "bound": bound, "clip": clip}
    for name, number in (("start", start), ("step", step)):
        if number is not None and number < 1:
            raise UserError(f"the argument {name} is {number}", allowed="a whole number of at least 1")
    if not samples and (not callable(model) or hasattr(model, "named_parameters")):
        raise UserError(
            f"the argument model is a {type(model).__name__}, and there is no batch",
            allowed="a model and a batch; a memfit.Job; or a function that takes the number to be found, "
            "such as a number of layers, and returns a Job or a pair (model, batch)",
        )
    if samples:
        own_job = job_of(model, batch, **settings)
        start = start or own_job.batch_size

    def job_at(value: int) -> Job:
        if samples:
            return with_batch_shape(own_job, value)
        built = run_user_code(lambda: model(value), "the function given as model")
        if isinstance(built, tuple) and len(built) != 2:
            raise UserError(
                f"the function given as model returned a tuple of {len(built)}",
                allowed="a memfit.Job, or a pair (model, batch)",
            )
        return job_of(*(built if isinstance(built, tuple) else (built,)), **settings)

    target_plan = _plan_on(plan, target)
    first_job, kind = job_at(start or 1), target.device.kind
    facts = JobFacts(batch_size=first_job.batch_size, block_count=0, vocabulary=0, device_kind=kind)
    predictor = Predictor(job=first_job, machine=target, job_facts=facts)
    cap_bytes = int(target.device.memory_bytes.value) if memory is None else _bytes(memory)
    is_cpu_here = target.is_here and target.device.is_host
    if measure and (memory is None or not is_cpu_here):
        raise UserError(
            "measure=True needs the argument memory, and this machine's CPU as the machine",
            allowed="memory=SIZE, such as '4GiB', with machine='this:cpu'; on a machine without an "
            "accelerator also machine='this' or None",
            hint="for an accelerator: `memfit plan FILE.py:NAME --largest batch --measure`",
        )
    answer = find_largest(
        prober(
            predictor,
            target_plan,
            job_at,
            cap_bytes=cap_bytes,
            prepare=probe_workspaces if is_cpu_here else lambda predictor, plan: None,
        ),
        dimension="batch" if samples else "number",
        plan=target_plan,
        cap_bytes=cap_bytes,
        start=start or 1,
        step=math.lcm(step, batch_multiple(target_plan) if samples else 1),
    )
    if not measure:
        return answer
    return with_boundary(lambda value, cap: _train(job_at(value), target_plan, cap, value), answer)


def _train(job: Job, plan: Plan, cap_bytes: int, value: int) -> MeasuredSize:
    """Train ``job``, which has the number ``value``, for three steps under the cap in a forked copy of this
    process, and return how that ended. Raises UserError if this system cannot fork, or if the plan has
    several ranks."""
    spec = RunSpec(
        name=plan.label,
        role="run",
        job=JobRef(spec="the object given to memfit.largest"),
        plan=plan,
        seed=0,
        steps=MEASURED_STEPS,
        batch_size=job.batch_size,
        clip=job.clip,
        cap_bytes=cap_bytes,
        threads=1,  # others do not survive a fork
        evaluate=False,
    )
    return measured_size(value, cap_bytes, train_forked(spec, job))
