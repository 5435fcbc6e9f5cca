"""``trace(job, plan)``: run the training step on fake tensors and record its allocations and operators."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import logging
import multiprocessing
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from memfit.jobs.training_step import TrainingStep
from memfit.model.batch_objects import map_batch
from memfit.model.tensors import check_on_host
from memfit.techniques import fp32_modules
from memfit.techniques.base import Workbench
from memfit.techniques.optimizers import counts_steps_on_host
from memfit.techniques.rank_mesh import builds_on_host, moves_parameters
from memfit.techniques.registry import technique
from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.concrete_values import MOST_ELEMENTS
from memfit.trace.data_dependent import Guesses
from memfit.trace.device_kernels import use_device_kernels
from memfit.trace.fake_copy import script_modules_loaded, unsupported_tensors_refused
from memfit.trace.fake_process_group import (
    GlooScratch,
    fake_ranks,
    prepare_ddp,
    process_groups,
    runs_optimizer_steps_only,
    split_host_memory,
)
from memfit.trace.operators import fills_storage
from memfit.trace.pass_replay import PassReplay
from memfit.trace.real_weights import are_weights_followed, attach_weights
from memfit.trace.slice_replay import SliceReplay, SlicesDiffer, run_all_if_different
from memfit.trace.stream_patches import streams
from memfit.trace.truncated_model import FirstBlocks, note_modules, remember_blocks
from memfit.trace.update_replay import UpdateReplay
from memfit.trace.value_guess_retry import (
    GuessFailed,
    check_guessed_numbers,
    cover_assumed_cases,
    retry_guesses,
)
from memfit.trace.value_patches import patch_value_reads
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError, first_line
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Category, Phase, Trace

TRACED_MICRO_BATCHES = 3  # the second accumulates into existing gradients; the third repeats it
_STEP: contextvars.ContextVar[Callable[..., TrainingStep]] = contextvars.ContextVar(
    "step", default=TrainingStep
)


@contextlib.contextmanager
def use_step(make_step: Callable[..., TrainingStep]) -> Iterator[None]:
    """Let traces made inside this context run the training step that ``make_step`` returns, such as that of
    an engine (engines/NAME/step.py). ``make_step`` is called with the arguments of `TrainingStep`. Outside,
    `TrainingStep` itself is ``make_step``."""
    token = _STEP.set(make_step)
    try:
        yield
    finally:
        _STEP.reset(token)


@check_guessed_numbers
@cover_assumed_cases
@retry_guesses
@run_all_if_different
def trace(
    job: Job,
    plan: Plan,
    *,
    device: str = "cpu",
    steps: int = 2,
    max_micro_batches: int = TRACED_MICRO_BATCHES,
    update: bool = True,
    lines: bool = False,
    rank: int = 0,
) -> Trace:
    """Trace ``steps`` training steps on fake tensors and return the trace. Two is the default, so that the
    last step has the optimizer state that the first one made.

    At most ``max_micro_batches`` (default 3) micro-batches of a step are run: the first ``max_micro_batches``
    - 1 and the last. ``Trace.repeated_micro_steps`` is the number of those left out of the last step. Earlier
    steps than the last run only one micro-batch if the plan has one rank (see also `optimizer_steps_only`).
    If ``max_micro_batches`` is 0, none is run: all gradients are zeros, a scalar stands for the loss, and
    ``repeated_micro_steps`` is 0. ``update=False`` leaves out the optimizer step.
    ``device``: the kind of device, such as "cuda", whose kernels and rounding are traced. ``lines``: whether
    each allocation records the line of the user's code that made it. ``rank``: the traced rank, on a fake
    process group of ``plan.ranks`` ranks if there are several.

    If values had to be assumed, other values are traced as well (`cover_assumed_cases`). Raises UserError if
    the plan does not suit the job, if a size depends on values that are neither known nor bounded
    (`Job.bound`), if a guessed number decides sizes (`check_guessed_numbers`), or if the step fails after a
    value was guessed. Other errors of the user's code are raised as they are. Raises MemfitError as
    `fake_ranks` does.
    """
    recorder = AllocationRecorder(device, lines=lines, guesses=Guesses(job.bound))
    scratch = plan.ranks > 1 and device_kind(device).is_host
    recorder.modes_above = int(scratch)
    _import_needed(plan)
    with (
        blame_guesses(recorder),
        fake_ranks(plan, rank) as world,
        fake_world() as fake,
        recording_patches(recorder),
        recorder,
        GlooScratch() if scratch else contextlib.nullcontext(),
        streams(recorder) if plan.ranks > 1 and not recorder.kind.is_host else contextlib.nullcontext(),
    ):
        others = torch.empty(job.other_bytes, dtype=torch.uint8) if job.other_bytes else None
        if others is not None:
            recorder.label(others, Category.EMA)
        recorder.memory_pool = "host" if builds_on_host(plan, device) else ""
        model_bytes: list[int] = []
        step = _STEP.get()(
            _with_unrecorded_build(job, recorder),
            plan,
            device=device,
            world=world,
            on_built=partial(_begin, recorder, model_bytes),
        )
        recorder.memory_pool = ""
        label_state(recorder, step)
        recorder.move(list(step.model.buffers()), "")
        moves_all, own = moves_parameters(plan, device), step.bench.own_parameters
        recorder.move([p for n, p in step.model.named_parameters() if moves_all or n in own], "")
        if not recorder.kind.checked:
            recorder.guesses.assumptions[
                f"the kernels of CUDA stand for those of {device} devices; no prediction for these was "
                "compared with a measurement"
            ] = None
        if any(
            m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule"
            for m in step.model.modules()
        ):
            recorder.guesses.assumptions[
                "modules under torch.compile keep the same tensors as in eager mode"
            ] = None
        micro_batches = _run_steps(
            recorder,
            step,
            fake,
            steps=steps,
            max_micro_batches=max_micro_batches,
            update=update,
        )
        groups = process_groups()
        del others
    allocations, ops, spans = recorder.finish()
    allocations, host_memory = split_host_memory(allocations, spans)
    params = list(step.model.parameters())
    return Trace(
        device=device,
        steps=steps,
        allocations=allocations,
        ops=ops,
        spans=spans,
        parameter_count=sum(p.numel() for p in params),
        trainable_count=sum(p.numel() for p in params if p.requires_grad),
        repeated_micro_steps=step.bench.micro_batches - micro_batches if micro_batches else 0,
        offloaded_bytes=recorder.offloaded_bytes,
        restored_bytes=recorder.restored_bytes,
        offloaded_tensors=recorder.offloaded_tensors,
        storage_written_bytes=recorder.storage_written_bytes,
        storage_read_bytes=recorder.storage_read_bytes,
        storage_bytes=recorder.storage_bytes,
        assumptions=tuple(recorder.guesses.assumptions),
        guessed=tuple(filter(None, recorder.guesses.open)),
        assumed=tuple(recorder.guesses.assumed),
        rank=rank,
        ranks=plan.ranks,
        communicators=tuple((name, len(ranks)) for name, ranks in groups.items()),
        members=groups,
        model_bytes=model_bytes[0],
        **host_memory,
    )


def _import_needed(plan: Plan) -> None:
    """Import the packages that the plan's techniques need, so that they can be patched (`recording_patches`).
    Packages that are not installed are skipped; the technique refuses later.

    In a forked process (`trace_pool`), which only traces, ``torch.compile`` returns functions as they are
    meanwhile: bitsandbytes compiles some when it is imported, and torch's compiler takes a second to import.
    """
    only_traces = multiprocessing.current_process().daemon
    eager = mock.patch.object(torch, "compile", lambda function=None, **options: function or (lambda f: f))
    with eager if only_traces else contextlib.nullcontext():
        for used in plan.uses:
            for package in technique(used.technique).needs:
                with contextlib.suppress(ImportError):
                    importlib.import_module(package)


def fake_model(job: Job) -> torch.nn.Module:
    """Return the job's model on fake tensors, without any plan, to inspect its structure. Do not change it:
    later calls for jobs with the same ``build_model`` return the same model. Raises what ``build_model``
    raises, and UserError for a lazy module or if a pattern of ``job.islands`` matches no module."""
    with contextlib.suppress(TypeError, KeyError):  # build_model cannot be a weak key, or is not yet known
        model = _FAKES[job.build_model]
        fp32_modules.find(model, job.islands)
        return model
    recorder = AllocationRecorder("cpu", guesses=Guesses(job.bound))  # answers initialisers that read values
    order: list[torch.nn.Module] = []
    with fake_world(), recorder, note_modules(order):
        model = recorder.unseen(job.build_model)()
    remember_blocks(job, model, order)
    fp32_modules.find(model, job.islands)
    with contextlib.suppress(TypeError):
        _FAKES[job.build_model] = model
    return model


_FAKES: weakref.WeakKeyDictionary[Any, torch.nn.Module] = weakref.WeakKeyDictionary()


def _local_batch(step: TrainingStep, index: int) -> tuple[Any, float]:
    """Return (this rank's batch, mean number of loss terms per rank) for the step ``index``. Each step has a
    batch of its own, because lengths and graphs differ between batches.

    For a plan of one rank, batches are kept for later traces of the same ``make_batch``, with memory that is
    never touched in place of tensors whose values are not followed because they have more than
    `MOST_ELEMENTS` elements. They are not kept if weights are followed (`follow_weights`). Raises UserError
    for a batch that is not in host memory. Errors of ``make_batch`` are raised as they are.
    """

    def make() -> tuple[Any, float]:
        with _disable_current_modes():
            batch = check_on_host(step.job.make_batch(index, 0))
        return step.local(batch)

    if step.bench.world.layout.ranks > 1 or are_weights_followed():
        return make()
    with contextlib.suppress(TypeError):  # make_batch cannot be a weak key
        batches, key = _BATCHES.setdefault(step.job.make_batch, {}), (index, step.job.loss_terms)
        if key not in batches:
            part, terms = make()
            with _disable_current_modes():
                batches[key] = map_batch(_without_memory, part), terms
        return batches[key]
    return make()


_BATCHES: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Any, float]]] = weakref.WeakKeyDictionary()


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not torch.Tensor or tensor.numel() <= MOST_ELEMENTS or not fills_storage(tensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _fake_batch(recorder: AllocationRecorder, fake: FakeTensorMode, step: TrainingStep, part: Any) -> Any:
    """Return the batch ``part`` on fake tensors, as it is after it was moved to the device. It is recorded as
    input, and its real values are attached to it. Known values of the model's tensors are attached, too
    (`attach_weights`, `ConcreteValues.seed_constants`)."""
    inputs = map_batch(fake.from_tensor, part)
    if not recorder.kind.is_host:
        with _disable_current_modes(), fake:
            inputs = map_batch(_as_copied, inputs)
    recorder.label(inputs, Category.INPUT)
    attach_weights(recorder.concrete_values, step.model)
    recorder.concrete_values.seed_constants(step.model.buffers())
    recorder.concrete_values.seed(inputs, part)
    return inputs


def _as_copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that takes the bytes of a copy of ``tensor`` on another device: all elements of an
    expanded tensor, but not the rest of the storage of a slice. Contiguous first samples of a storage, and
    tensors that are not strided, are returned as they are: in a trace of fewer micro-batches than the plan
    has, the first samples of a batch so count as the whole batch."""
    if tensor.layout is not torch.strided:
        return tensor
    storage_bytes, own_bytes = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    is_first_part = storage_bytes > own_bytes and tensor.is_contiguous() and tensor.storage_offset() == 0
    is_whole = storage_bytes == own_bytes or is_first_part
    return tensor if is_whole else torch.empty_like(tensor)


def _run_steps(
    recorder: AllocationRecorder,
    step: TrainingStep,
    fake: FakeTensorMode,
    *,
    steps: int,
    max_micro_batches: int,
    update: bool,
) -> int:
    """Run ``steps`` training steps, each on its own batch of fake tensors of the mode ``fake``, and return
    the number of micro-batches run in the last one."""
    micro_batches = min(step.bench.micro_batches, max_micro_batches)
    choice = step.job.optimizer
    is_own = choice.make is None and ":" not in choice.name and "optimizer" not in step.plan
    recorder.follows_optimizer_scalars = not is_own  # the updates of memfit's own do not branch
    repeats = is_own and _is_plain(step) and step.bench.world.layout.ranks == 1
    # Building the model may have imported modules to patch.
    with not_tracing(), UpdateReplay(recorder).patches() if repeats else contextlib.nullcontext():
        return _run_recorded(recorder, step, fake, steps=steps, micro_batches=micro_batches, update=update)


def _run_recorded(
    recorder: AllocationRecorder,
    step: TrainingStep,
    fake: FakeTensorMode,
    *,
    steps: int,
    micro_batches: int,
    update: bool,
) -> int:
    step.bench.on_gradient = lambda param: recorder.label(param.grad, Category.GRADIENT)
    step.bench.on_offload = recorder.note_offload
    step.bench.on_storage = recorder.note_storage
    recorder.modules.watch(step.model)
    recorder.phase(Phase.SETUP)  # the model is built; batches are made between steps
    one_process = step.bench.world.layout.ranks == 1
    if _is_plain(step) and one_process and not step.bench.step_in_backward and max(steps, micro_batches) > 1:
        step.around_micro_batch = PassReplay(recorder, step).micro_step
    try:
        for index in range(steps):
            mark, inputs, outputs = _marker(recorder, step), None, None  # type: Any, Any, Any
            recorder.start_counts()
            if index < steps - 1 and runs_optimizer_steps_only(step.plan):
                step.prime(mark)
            else:
                part = _local_batch(step, index)
                inputs = _fake_batch(recorder, fake, step, part[0])
                # One process needs an earlier step only for the state that its optimizer makes.
                count = min(1, micro_batches) if index < steps - 1 and one_process else micro_batches
                outputs = (
                    step.run(
                        inputs,
                        mark,
                        micro_batch_limit=count,
                        update=update,
                        terms_per_rank=part[1],
                    )
                    if count
                    else _run_update(step, mark)
                )
            recorder.phase(Phase.SETUP)
            del outputs, inputs
            label_state(recorder, step)
            recorder.next_step()
    finally:
        recorder.modules.close()
        step.around_micro_batch = None
        step.close()
    return micro_batches


def _run_update(step: TrainingStep, mark: Callable[[Phase], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Set all gradients to zeros and run the end of a training step (`TrainingStep.finish`). Call ``mark``
    with each phase. Return (a scalar that stands for the loss, the norm of the gradients)."""
    mark(Phase.FORWARD)
    loss = torch.zeros(())
    mark(Phase.BACKWARD)
    for param in step.bench.trainable():
        param.grad = torch.zeros_like(param)
    mark(Phase.OPTIMIZER)
    return loss, step.finish()


def _is_plain(step: TrainingStep) -> bool:
    """Return whether the step is memfit's own `TrainingStep`, made outside `use_step`. Another one may
    observe each of its passes."""
    return type(step) is TrainingStep and _STEP.get() is TrainingStep


def _with_unrecorded_build(job: Job, recorder: AllocationRecorder) -> Job:
    if not isinstance(job.build_model, FirstBlocks):
        return job
    build: Any = recorder.unseen(job.build_model)
    build.origin = job.build_model.origin
    return dataclasses.replace(job, build_model=build)


def _begin(recorder: AllocationRecorder, model_bytes: list[int], bench: Workbench) -> None:
    tensors = [*bench.model.parameters(), *bench.model.buffers()]
    model_bytes.append(sum(t.numel() * t.element_size() for t in tensors))
    bench.on_ddp = partial(prepare_ddp, note=recorder.note_real)
    if not recorder.kind.is_host:
        bench.memory_pool = recorder.in_memory_pool
    else:
        bench.first_part = partial(_first_part, recorder, bench.first_part)
    bench.run_slices = SliceReplay(recorder)
    bench.on_kept = lambda tensor, category: recorder.label(tensor, Category(category))
    bench.on_assumption = recorder.guesses.assume
    label_tensors(recorder, [*bench.model.named_parameters(), *bench.model.named_buffers()])


def _first_part(recorder: AllocationRecorder, inner: Callable[[int], Any], parts: int) -> Any:
    """Return ``inner(parts)``, the first of ``parts`` equal parts of the job's first batch, with its tensors
    recorded as inputs. Techniques use it to observe how the model runs."""
    part = inner(parts)
    recorder.label(part, Category.INPUT)
    return part


def _marker(recorder: AllocationRecorder, step: TrainingStep) -> Any:
    def mark(phase: Phase) -> None:
        if recorder.current is Phase.BACKWARD:
            for name, param in step.model.named_parameters():
                recorder.label(param.grad, Category.GRADIENT, module=name.rpartition(".")[0])
                if not recorder.kind.is_host and step.bench.gradients_on:
                    recorder.move(param.grad, step.bench.gradients_on)
        recorder.phase(phase)

    return mark


def label_state(recorder: AllocationRecorder, step: TrainingStep) -> None:
    """Label the optimizer's state, and then the model's parameters and buffers, whose label therefore holds
    for a storage that belongs to both. Step counters that the optimizer keeps on the host of an accelerator
    are moved to the place "nowhere", where they do not count. Raises what `AllocationRecorder.label`
    raises."""
    parameters = list(step.model.named_parameters())
    owner = {id(p): name.rpartition(".")[0] for name, p in parameters}
    on_host = not recorder.kind.is_host and counts_steps_on_host(step.optimizer)
    for param, state in step.optimizer.state.items():
        recorder.label(state, Category.OPTIMIZER_STATE, module=owner.get(id(param)) or recorder.owner(param))
        counter = state.get("step") if on_host and isinstance(state, dict) else None
        if isinstance(counter, torch.Tensor) and not counter.dim():
            recorder.move(counter, "nowhere")  # a few bytes of host memory per parameter
    label_tensors(recorder, [*parameters, *step.model.named_buffers()])


def label_tensors(recorder: AllocationRecorder, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Label the tensors, given as (name, tensor), as parameters of the module whose path is the name up to
    the last dot. Raises what `AllocationRecorder.label` raises."""
    for name, tensor in named:
        recorder.label(tensor, Category.PARAMETER, module=name.rpartition(".")[0])


@contextlib.contextmanager
def fake_world() -> Iterator[FakeTensorMode]:
    """Yield an active fake tensor mode, with the patches of torch that let a training step run in it."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_patches(fake), fake:
        yield fake


@contextlib.contextmanager
def fake_patches(fake: FakeTensorMode) -> Iterator[None]:
    """Inside this context, patch torch so that a training step can run on tensors of the mode ``fake``. Among
    others, code that asks whether it is being traced takes its ordinary branch, torch.compile runs eagerly,
    modules on fake tensors can be copied and converted, and pin_memory does nothing. Torch does not log
    failing operators, because the error itself says it in one line. The cache of the mode stays off."""
    failures = logging.getLogger("torch._subclasses.fake_tensor")
    fake.cache_enabled = False  # its keys take longer than it saves: `operators.Results` keeps results
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(failures, "disabled", True))
        stack.enter_context(not_tracing())
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply_without_swap()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _deep_copy, create=True))
        # Hide warnings that the model also gives where it really runs.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        no_ops: dict[str, Any] = {"__enter__": lambda self: self, "__exit__": lambda *exc_info: None}
        stack.enter_context(mock.patch.multiple(torch.autograd.profiler.record_function, **no_ops))
        # pin_memory does nothing: fake tensors cannot be pinned, and pinned memory counts as host memory.
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, *a, **k: self))
        stack.enter_context(script_modules_loaded(fake))
        stack.enter_context(unsupported_tensors_refused())
        yield


@contextlib.contextmanager
def recording_patches(recorder: AllocationRecorder) -> Iterator[None]:
    """Inside this context, patch torch so that ``recorder`` sees what bypasses dispatch modes: states of
    random numbers, resized storages, values that are read, and the kernels of the recorder's device."""
    with (
        _random_states(recorder),
        _resizes(recorder),
        _propagation_unseen(recorder),
        use_device_kernels(recorder.device, recorder.guesses.assume),
        patch_value_reads(recorder.guesses),
    ):
        yield


@contextlib.contextmanager
def not_tracing() -> Iterator[None]:
    """Inside this context, make transformers, if it is already imported, take the branch of code that is not
    being traced. It is not imported for this, because that takes as long as a prediction."""
    with contextlib.ExitStack() as stack:
        for name in ("transformers.utils.import_utils", "transformers.masking_utils"):
            if hasattr(module := sys.modules.get(name), "is_tracing"):
                stack.enter_context(mock.patch.object(module, "is_tracing", lambda *a, **k: False))
        yield


def _random_states(recorder: AllocationRecorder) -> Any:
    """Return a context manager that lets ``recorder`` record the result of torch.get_rng_state, a real tensor
    in host memory, made below the dispatcher. Each checkpointed block keeps one. On accelerators it is not
    counted."""
    inner = torch.get_rng_state

    def noted() -> torch.Tensor:
        state = inner()
        life = recorder.note_real(state, "get_rng_state")
        if not recorder.kind.is_host:
            life.memory_pool = "nowhere"  # 5 KiB of host memory per recomputed block
        return state

    return mock.patch.object(torch, "get_rng_state", noted)


def _resizes(recorder: AllocationRecorder) -> Any:
    """Return a context manager that lets ``recorder`` record storages that are resized below the dispatcher,
    as FSDP2 does to free and refill its parameters."""
    inner = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> Any:
        out = inner(storage, size)
        recorder.resized(storage)
        return out

    return mock.patch.object(torch.UntypedStorage, "resize_", noted)


@contextlib.contextmanager
def _propagation_unseen(recorder: AllocationRecorder) -> Iterator[None]:
    """Inside this context, do not record DTensor's shape propagation, which runs on fake tensors of the
    unsharded shape."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    inner = getattr(ShardingPropagator, name)

    def quietly(*args: Any, **kwargs: Any) -> Any:
        with recorder.pause():
            return inner(*args, **kwargs)

    with mock.patch.object(ShardingPropagator, name, quietly):
        yield


@contextlib.contextmanager
def blame_guesses(recorder: AllocationRecorder) -> Iterator[None]:
    """Attribute an error inside this context to a guessed value, if there was one: another value may work, or
    the user can give it. Raises GuessFailed if a condition was assumed to be true, unless the error is a
    UserError without a cause, which memfit itself found. Otherwise raises UserError if the answer to a value
    did not follow from known values (`Guesses.last_guess`) and the error is a RuntimeError, ValueError,
    IndexError or TypeError. Other errors are raised as they are."""
    guesses = recorder.guesses
    try:
        yield
    except SlicesDiffer:
        raise
    except Exception as error:
        is_own_error = isinstance(error, UserError) and error.__cause__ is None
        guess_error = _blamed(error, guesses.last_guess)
        if guesses.doubtful and not is_own_error:
            raise GuessFailed(guesses.doubtful, guess_error or error) from error
        if guess_error is not None:
            raise guess_error from error
        raise


def _blamed(error: Exception, last_guess: str) -> UserError | None:
    if not last_guess or not isinstance(error, RuntimeError | ValueError | IndexError | TypeError):
        return None
    user_error = UserError(
        f"the step does not run on fake tensors: {first_line(error)[:200]}",
        hint=f"memfit could not know a value that the step read before, and guessed it ({last_guess}); if it "
        "is a number or a size, give the true one as in bound={'model.py:12': 4096}, an argument of Job(...) "
        "and estimate(...)",
    )
    user_error.__cause__ = error
    return user_error


def _deep_copy(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    """Return a copy of a fake tensor for ``copy.deepcopy``, or the one that ``memo`` already has. A parameter
    gives a parameter, and ``requires_grad`` is kept; gradients and other attributes are not copied. Torch's
    own deepcopy would also copy the attributes, including the fake mode, and so break the record of memory.
    """
    if id(tensor) not in memo:
        with torch.no_grad():
            clone = tensor.detach().clone()
        requires_grad = tensor.requires_grad
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = (
            torch.nn.Parameter(clone, requires_grad) if is_parameter else clone.requires_grad_(requires_grad)
        )
    result: torch.Tensor = memo[id(tensor)]
    return result


def _apply_without_swap() -> Any:
    """Return a ``Module._apply(fn)`` for fake tensors. Torch would swap parameters in place, which fails for
    fake ones. Here a parameter is replaced by a new one if ``fn`` returns another storage for it, and buffers
    always are replaced. Tied parameters stay tied. Gradients are not converted."""
    replacements: dict[int, tuple[weakref.ref[torch.nn.Parameter], torch.nn.Parameter]] = {}
    depth = 0

    def replaced(param: torch.nn.Parameter, fn: Any) -> torch.nn.Parameter:
        entry = replacements.get(id(param))
        if entry is None or entry[0]() is not param:  # a freed parameter's id may be reused
            with torch.no_grad():
                new_tensor = fn(param)
            shares_storage = (
                new_tensor is param or new_tensor.untyped_storage()._cdata == param.untyped_storage()._cdata
            )
            new_param = param if shares_storage else torch.nn.Parameter(new_tensor, param.requires_grad)
            replacements[id(param)] = (weakref.ref(param), new_param)
        return replacements[id(param)][1]

    def apply(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        nonlocal depth
        depth += 1
        for child in module.children() if recurse else ():
            child._apply(fn)
        for key, param in module._parameters.items():
            if param is not None:
                module._parameters[key] = replaced(param, fn)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = fn(buffer)
        depth -= 1
        if depth == 0:
            replacements.clear()
        return module

    return apply
