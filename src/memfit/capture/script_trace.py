"""Trace the first training steps of a script that runs unmodified.

The script's parameters are fake tensors, which have shapes but no data. What depends on them is fake, too,
and is recorded; all else (data sets, samplers, batches, random numbers) is computed for real. While the
outermost module's forward, a backward or an optimizer's step runs, all new tensors are fake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils.weak import WeakIdKeyDictionary

from memfit.capture.assumed_number import AssumedNumber
from memfit.capture.batch_sizes import BatchSizes
from memfit.capture.evaluation import EvaluationSearch
from memfit.capture.foreign_memory import ForeignMemory
from memfit.capture.kept_memory import NOT_ON_DEVICE, NOWHERE, ON_HOST, KeptMemory, existing
from memfit.capture.step_calls import StepCalls
from memfit.capture.tensors import KEPT_BUFFERS, holds_real, is_fake, is_real
from memfit.capture.update_cycle import UpdateCycle, params_of
from memfit.conformance.sharding import fsdp_groups
from memfit.model.batch_objects import map_batch
from memfit.model.tensors import tensor_leaves
from memfit.techniques.optimizers import counts_steps_on_host
from memfit.trace import operators
from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.data_dependent import Guesses
from memfit.trace.fake_process_group import process_groups, split_host_memory
from memfit.trace.source_location import reading_line, user_line
from memfit.trace.tracer import not_tracing
from memfit.types.errors import UserError
from memfit.types.job import Bound
from memfit.types.trace import Allocation, Category, Phase, Trace, rounded

_MOST_DRAWN = 2_000_000_000  # random numbers that are drawn for parameters: some ten seconds
_PASSES = 2  # of a script without an optimizer of torch


class ScriptTrace:
    """The record of a script's training steps, and the state of its tracing.

    ``device``: kind of the device for which the memory is predicted. ``fake``: the mode of all fake tensors.
    What ``recorder`` has recorded before `begin` is dropped. ``on_traced`` is called when the steps are
    traced: every optimizer has made two updates (`UpdateCycle`), and what the script keeps of each step is
    known (`KeptMemory`).
    """

    def __init__(self, device: str, *, bound: Bound | None, on_traced: Callable[[], None]) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = AllocationRecorder(device, lines=True, guesses=Guesses(bound))
        self.recorder.follows_host = not self.is_host
        self.on_traced = on_traced
        self.begun = False
        self.forwards = 0  # of outermost modules, since the last optimizer step
        self.micro_batches = 0  # backwards since the last optimizer step
        self.cycle = UpdateCycle()
        self.kept: KeptMemory | None = None  # from `begin` on
        self._in_backward = False
        self.model: torch.nn.Module | None = None  # the first that was trained
        self.foreign = ForeignMemory()
        self.foreign_bytes = 0  # of parameters in memory that torch's allocator did not make
        self.drawn = 0  # random numbers of parameters
        self.inner_modes: list[Callable[[], Any]] = []  # further modes of a region
        self.setup_peak_bytes = 0  # of fake tensors before `begin`: building and evaluation
        self.calls = StepCalls(self._note_item)
        self._items: dict[int, tuple[Life, int]] = {}  # storages of the job's batch, and bytes of it there
        self.other_bytes = 0  # alive through the last step, and no part of the job's model, state and batch
        self.batches = BatchSizes()
        self.accumulated = 1  # micro-batches of the last update
        self.clip: float | None = None  # largest norm of the gradients
        self.workers = 0  # most worker processes of a data loader
        self._depth = 0  # of regions in which all new tensors are fake
        self._twins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real tensor -> its fake copy
        self._roots: dict[str, torch.nn.Module] = {}
        self._adopted: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._had_gradient: set[int] = set()  # ids of trained tensors that had one after a backward pass
        self._patches = contextlib.ExitStack()
        self._from_workers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real tensors that are not counted
        self.evaluation: EvaluationSearch | None = None  # in the fork that looks for one
        self.is_uncounted = False  # batches of worker processes come in memory that torch does not allocate

    @property
    def is_host(self) -> bool:
        return self.recorder.kind.is_host

    # -- tensors ------------------------------------------------------------------------------------

    def fake_parameter(self, data: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor like the real tensor ``data``, which is not kept. In a wrapper such as
        DTensor, the real tensors that it holds are replaced."""
        if is_traceable_wrapper_subclass(data):
            names, context = data.__tensor_flatten__()
            inner = {n: self.fake_parameter(t) if holds_real(t := getattr(data, n)) else t for n in names}
            with _disable_current_modes():
                return type(data).__tensor_unflatten__(inner, context, data.size(), data.stride())
        with _disable_current_modes(), self.fake:
            fake = torch.empty_strided(data.size(), data.stride(), dtype=data.dtype)
        is_foreign = self.foreign.holds(data)
        if is_foreign:
            self.foreign_bytes += data.numel() * data.element_size()
        if is_foreign or not self.is_host:  # on an accelerator: until it is moved there
            self.recorder.move(fake, NOWHERE)
        return fake

    def twin(self, real: torch.Tensor) -> torch.Tensor:
        """Return the fake copy of a real tensor, which lives as long as ``real``; the same for every call.
        The values are attached to it if they are few. On the host, the memory of ``real`` is recorded."""
        twin: torch.Tensor | None = self._twins.get(real)
        if twin is None:
            with _disable_current_modes():
                twin = self.fake.from_tensor(real, static_shapes=True)
                self.recorder.concrete_values.seed(twin, real)
            self.recorder.move(twin, NOWHERE)  # the real tensor is what is counted
            self.note_real(real, Category.INPUT)
            self._twins[real] = twin
            if self.is_host and real.layout is torch.strided:
                # what saves the copy for backward keeps the memory of the real tensor
                vars(twin.untyped_storage())["real"] = real.untyped_storage()
        return twin

    def note_real(self, tensor: torch.Tensor, category: Category | None = None) -> None:
        """Record the memory of a real tensor, which lies in host memory. It is not counted if torch's
        allocator did not make it or if it is from a worker process. Do nothing before `begin`, and if the
        target is an accelerator."""
        if self.is_uncounted and isinstance(tensor, torch.Tensor):
            self._from_workers[tensor] = True
        if not (self.begun and self.is_host) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return
        life = self.recorder.note_real(tensor, category or "data")
        if category is not None and life.category is None:
            life.category = category
        if tensor in self._from_workers or self.foreign.holds(tensor):
            life.memory_pool = NOWHERE

    def as_fake(self, value: Any) -> Any:
        """Return ``value`` with the real tensors in it replaced by their fake copies, except the batch sizes
        of packed sequences: recurrent layers read them where no mode sees it."""
        leaves = _pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, PackedSequence))
        kept = {id(leaf.batch_sizes) for leaf in leaves if isinstance(leaf, PackedSequence)}
        return map_batch(lambda t: self.twin(t) if is_real(t) and id(t) not in kept else t, value)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside this context, real tensors are not counted: they come from worker processes."""
        before, self.is_uncounted = self.is_uncounted, True
        try:
            yield
        finally:
            self.is_uncounted = before

    # -- operators ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Inside this context, all new tensors are fake and all operators are recorded."""
        if self._depth:
            yield
            return
        self._depth += 1
        above, self.recorder.modes_above = self.recorder.modes_above, len(self.inner_modes)
        try:
            with _disable_current_modes(), self.fake, self.recorder, contextlib.ExitStack() as stack:
                for make_mode in self.inner_modes:
                    stack.enter_context(make_mode())
                yield
        finally:
            self._depth -= 1
            self.recorder.modes_above = above

    @contextlib.contextmanager
    def as_loop(self) -> Iterator[None]:
        """Inside this context, code runs as that of the script's loop, although a region calls it."""
        depth, self._depth = self._depth, 0
        try:
            with _disable_current_modes(), LoopMode(self):
                yield
        finally:
            self._depth = depth

    @property
    def inside(self) -> bool:
        return self._depth > 0

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator ``func`` of the script's loop with its arguments, in which real tensors are
        replaced by fake ones, record it, and return its result. Of ``item()``, return the value of the tensor
        or, if it is not known, a guess."""
        if func is operators.ITEM:
            return self._loop_item(args[0])
        args, kwargs = _pytree.tree_map_only(
            torch.Tensor, lambda t: self.twin(t) if is_real(t) else t, (args, kwargs)
        )
        if not self.begun and torch.Tag.nondeterministic_seeded in func.tags:
            self._draw(func, args, kwargs)
        self._depth += 1
        above, self.recorder.modes_above = self.recorder.modes_above, 1
        try:
            with self.fake, self.recorder:
                return func(*args, **kwargs)
        finally:
            self._depth -= 1
            self.recorder.modes_above = above

    def _draw(self, func: Any, args: Any, kwargs: Any) -> None:
        """Draw the random numbers of an operator into a real tensor that is dropped, so that later random
        numbers, such as the order of the samples, are those of the script's own run. Stop after
        `_MOST_DRAWN` (2 billion) numbers."""
        tensor = args[0]
        if not func._schema.is_mutable or not isinstance(tensor, FakeTensor):
            return
        self.drawn += tensor.numel()
        if self.drawn <= _MOST_DRAWN:
            real = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
            func(real, *args[1:], **kwargs)

    # -- the training step ----------------------------------------------------------------------------

    def begin(self, model: torch.nn.Module | None) -> None:
        """Start to record: ``model`` is about to be trained, or, if it is None, tensors that belong to no
        module that is called. All tensors that exist count from now on."""
        self.begun, self.model = True, model
        self.setup_peak_bytes = self.recorder.restart()
        self._patches.enter_context(not_tracing())  # the script may have imported modules to patch
        self._find_roots(model)
        self.recorder.modules.watch_all(self._roots)
        for name, root in self._roots.items():
            self.adopt(root, name)
            self.recorder.move(list(_shards_on_host(root)), ON_HOST)
        for owner, param in self._trained_tensors():
            if not owner and not is_lazy(param):
                self.recorder.label(param, Category.PARAMETER)
        tensors = existing(torch.Tensor)
        copies = {id(self.recorder.concrete_values.of(t)) for t in tensors if isinstance(t, FakeTensor)}
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self.recorder.note_real(tensor, "created before training")
            elif id(tensor) not in copies:  # values attached to fake tensors are memfit's own
                self.note_real(tensor, Category.INPUT)
        self.kept = KeptMemory(self.recorder)

    def adopt(self, root: torch.nn.Module, name: str = "") -> None:
        """Replace the real parameters and buffers of the module ``root`` by fake ones, and label them with
        their modules' paths, which begin with ``name``. Do nothing if this was done before."""
        if root in self._adopted:
            return
        self._adopted[root] = True
        for module in root.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and is_real(buffer):
                    module._buffers[key] = self.twin(buffer)
                    self._keep(module, buffer)
            for param in module._parameters.values():
                if param is not None and holds_real(param):
                    self.make_fake(param)
        for path, tensor in (*root.named_parameters(), *root.named_buffers()):
            if is_lazy(tensor):
                continue
            owner = ".".join(filter(None, (name, path.rpartition(".")[0])))
            self.recorder.label(tensor, Category.PARAMETER, module=owner)

    def _keep(self, module: torch.nn.Module, real: torch.Tensor) -> None:
        """Keep a real buffer alive as long as its module, and label it."""
        vars(module).setdefault(KEPT_BUFFERS, []).append(real)
        if self.is_host and not self.foreign.holds(real):
            self.recorder.note_real(real, "buffer").category = Category.PARAMETER

    def make_fake(self, tensor: torch.Tensor) -> None:
        """Turn a real parameter or buffer into a fake one. The object stays the same, as optimizers hold it.
        Raises RuntimeError if it cannot be swapped (`torch.utils.swap_tensors`), such as one that a graph of
        autograd refers to."""
        fake = self.fake_parameter(tensor.data)
        if isinstance(tensor, torch.nn.Parameter):
            fake = torch.nn.Parameter(fake, tensor.requires_grad)
        elif tensor.is_leaf:
            fake.requires_grad_(tensor.requires_grad)
        self._twins.pop(tensor, None)  # tensors with weak references cannot be swapped
        torch.utils.swap_tensors(tensor, fake)

    def adopt_leaves(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the real tensors that an optimizer trains, although they are no parameters of a module, into
        fake ones. Raises UserError for a tensor that cannot be, because other objects refer to it."""
        for tensor in filter(holds_real, params_of(optimizer)):
            try:
                with _disable_current_modes():
                    self.make_fake(tensor)
            except RuntimeError as error:
                raise UserError(
                    f"{type(optimizer).__name__} trains a tensor of shape {tuple(tensor.shape)} that is in "
                    "use before the optimizer is made, which memfit cannot follow",
                    hint="make the tensor an nn.Parameter, or use it only after the optimizer is made",
                ) from error

    def _trained_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (path of its module, tensor) for the parameters of the outermost modules, and ("", tensor)
        for the other tensors that optimizers train."""
        seen = set()
        for name, root in self._roots.items():
            for path, param in root.named_parameters():
                seen.add(id(param))
                yield ".".join(filter(None, (name, path.rpartition(".")[0]))), param
        for optimizer in self.cycle.created:
            for tensor in params_of(optimizer):
                if id(tensor) not in seen and is_fake(tensor):
                    seen.add(id(tensor))
                    yield "", tensor

    def parameters_with_gradients(self) -> list[torch.Tensor]:
        """Return the trained parameters that have taken part in a backward pass."""
        states = [o.state for o in self.cycle.optimizers.values()]
        trained = (p for _, p in self._trained_tensors())
        return [p for p in trained if p.grad is not None or any(p in state for state in states)]

    @property
    def trains_loose(self) -> bool:
        """Whether optimizers train tensors that are in no module."""
        in_modules = _ids_of_parameters()
        return any(id(t) not in in_modules for _, t in self._trained_tensors())

    @property
    def shards_model(self) -> bool:
        """Whether a trained tensor is a DTensor, as under FSDP2 and tensor parallelism, so that each process
        may hold a part of it only."""
        from torch.distributed.tensor import DTensor

        return any(isinstance(t, DTensor) for _, t in self._trained_tensors())

    def _model_parameters(self) -> list[torch.Tensor]:
        """Return the parameters of the outermost modules, and the other tensors that optimizers train and
        that had a gradient after a backward pass. Copies of parameters that an optimizer updates in their
        place, such as those in float32 of parameters in bf16, have none then and are left out."""
        counted = _ids_of_parameters() | self._had_gradient
        return [p for _, p in self._trained_tensors() if id(p) in counted]

    def adopt_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the real tensors of an optimizer's state, which the script has loaded, into fake ones. Those
        without dimensions, such as a step count, stay."""
        for param, state in optimizer.state.items():
            for tensor in state.values() if isinstance(state, dict) else ():
                if is_real(tensor) and tensor.dim() and is_fake(param):
                    self.make_fake(tensor)
                    self.recorder.label(tensor, Category.OPTIMIZER_STATE)

    def loop_number(self, tensor: torch.Tensor, *, is_compared: bool = False) -> float:
        """Return the answer to ``tensor.item()`` in the script's loop for a number that is not known: the
        bound of its line or 1.0. If the script compares that, or if ``is_compared``, it is listed as an
        assumption."""
        guesses, line = self.recorder.guesses, user_line()
        bound = guesses.bound_at("item", line)
        if bound is not None:
            return float(bound)
        text = f".item() on {tensor.dtype} answered 1.0"  # not the tensor, which may be kept with the number
        number = AssumedNumber(1.0, lambda: guesses.assume(text, line))
        if is_compared:
            number.on_compared()
        return number

    def _loop_item(self, tensor: torch.Tensor) -> bool | int | float:
        """Return the answer to ``tensor.item()`` in the script's loop. A truth value that is not known is
        listed as an assumption once the training has begun, if the user's own code asks for it."""
        values = self.recorder.concrete_values.of(tensor)
        if values is not None:
            return values.item()
        if self.begun and tensor.dtype.is_floating_point:
            return float(self.loop_number(tensor))
        guesses, line = self.recorder.guesses, user_line()
        is_bounded = self.begun and guesses.bound_at("item", line) is not None
        answer = guesses.item(tensor, is_listed=is_bounded)
        if self.begun and not is_bounded and tensor.dtype is torch.bool and f"/{line}:" in reading_line():
            guesses.assume(f".item() on torch.bool answered {answer}", line)
        return answer

    def is_unknown_number(self, value: Any) -> bool:
        """Return whether ``value`` is a fake floating-point number whose value is not known."""
        is_number = isinstance(value, FakeTensor) and value.dim() == 0 and value.is_floating_point()
        return is_number and self.recorder.concrete_values.of(value) is None

    def _find_roots(self, model: torch.nn.Module | None) -> None:
        """Find the outermost modules of the process that have parameters, and give each a name: "" to
        ``model``, if there is one, to others that of their class, with a number if it is taken. Modules that
        contain ``model`` are left out."""
        modules = existing(torch.nn.Module)
        inner = {id(c) for m in modules for c in m._modules.values() if c is not None}
        if model is not None:
            self._roots[""] = model
        for module in modules:
            if id(module) in inner or module is model or next(module.parameters(), None) is None:
                continue
            if model is not None and any(m is model for m in module.modules()):
                continue  # a wrapper that is not called itself
            name, number = type(module).__name__, 2
            while name in self._roots:
                name, number = f"{type(module).__name__}-{number}", number + 1
            self._roots[name] = module

    def forward(self, module: torch.nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the result of ``call``, the forward of the outermost module ``module``, and record it. The
        first one of a training begins the recording."""
        skips_gradients = self.evaluation is not None and self.evaluation.note_forward(module)
        if not self.begun and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self.begin(module)
        if self.begun:
            self._close_step_without_optimizer()
            self.adopt(module, "" if module is self.model else type(module).__name__)
            if self.recorder.current is not Phase.FORWARD:
                self._close_backward()
                self.recorder.phase(Phase.FORWARD)
            self.forwards += 1
            if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
                self.batches.note_call(module, (args, kwargs))
        with self.region(), torch.no_grad() if skips_gradients else contextlib.nullcontext():
            out = call(*self.as_fake(args), **self.as_fake(kwargs))
        if self.begun:
            is_trained = any(p.requires_grad for p in module.parameters())
            self.calls.note_call(module, args, kwargs, out, model=module if is_trained else None)
        else:
            has_weights = next(module.parameters(), None) is not None
            self.calls.note_early_call((args, kwargs), out, has_weights=has_weights)
        return out

    def note_loop_result(self, out: Any) -> None:
        """Note what an operator of the script's loop returned. In a training without a module, the first
        result with a gradient after an update begins the next forward pass."""
        is_next = self.begun and self.model is None and self.recorder.current is Phase.SETUP
        if is_next and isinstance(out, torch.Tensor) and out.grad_fn is not None:
            self.recorder.phase(Phase.FORWARD)

    def _close_step_without_optimizer(self) -> None:
        """If the script has no optimizer of torch, take each backward pass for a step."""
        if self.cycle.created or self.recorder.current is Phase.FORWARD or not self.micro_batches:
            return
        self._close_backward()
        self._close_step(is_over=self.micro_batches >= _PASSES)

    def backward(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``call``, a backward pass, with its arguments, record it, and return its result. In a training
        without a forward pass of a module that it trains, the first one begins the recording, and the second
        step is recorded whole. In the search for an evaluation, only make gradients."""
        if self.evaluation is not None:
            return self.evaluation.make_gradients()
        if not self.begun and any(t.requires_grad for _, t in self._trained_tensors()):
            self.begin(None)
        if self.begun:
            self.recorder.phase(Phase.BACKWARD)
            self.micro_batches += 1
            self.calls.note_loss(args[0] if args else kwargs.get("tensors"))
        outer, self._in_backward = self._in_backward, True
        try:
            with self.region():
                out = call(*self.as_fake(args), **self.as_fake(kwargs))
        finally:
            self._in_backward = outer
        if self.begun:
            self.calls.note_kept_in_backward()
            self._close_backward()
            self.recorder.phase(Phase.OPTIMIZER)
            if not outer:
                self._close_update()
        return out

    def gradient(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``call``, which is ``torch.autograd.grad``, with its arguments, record it, and return its
        result. It is a backward pass if it takes gradients of trained tensors, and no graph of them.
        Otherwise it is a part of the forward pass, such as forces or a gradient penalty."""
        inputs = _pytree.tree_leaves(args[1] if len(args) > 1 else kwargs.get("inputs"))
        trained = {id(tensor) for _, tensor in self._trained_tensors()}
        is_last = not (kwargs.get("create_graph") or (len(args) > 4 and args[4]))
        if self.evaluation is not None or (is_last and all(id(tensor) in trained for tensor in inputs)):
            return self.backward(call, args, kwargs)
        if self.begun:
            self.calls.note_gradient()
        with self.region():
            return call(*self.as_fake(args), **self.as_fake(kwargs))

    def _close_backward(self) -> None:
        for owner, param in self._trained_tensors():
            if param.grad is not None:
                self._had_gradient.add(id(param))
                self.recorder.label(param.grad, Category.GRADIENT, module=owner)
                if self.recorder.is_on_host(param):
                    self.recorder.move(param.grad, ON_HOST)

    def updated(self, optimizer: Any) -> None:
        """Note that an optimizer has made a step, and label its state. Call ``on_traced`` if enough steps are
        traced. Do nothing before `begin`."""
        if not self.begun:
            return
        steps_on_host = not self.is_host and counts_steps_on_host(optimizer)
        for param, state in optimizer.state.items():
            owner = self.recorder.owner(param)
            for tensor in filter(is_fake, _pytree.tree_leaves(state)):
                self.recorder.label(tensor, Category.OPTIMIZER_STATE, module=owner)
                if steps_on_host and not tensor.dim():
                    self.recorder.move(tensor, NOWHERE)
        self.cycle.note(optimizer, in_backward=self._in_backward)
        if not self._in_backward:  # one optimizer per parameter, each called by a hook: the step is not over
            self.recorder.phase(Phase.SETUP)
            self._close_update()

    def _close_update(self) -> None:
        if self.cycle.close(has_pass=bool(self.forwards or self.micro_batches)):
            self.accumulated, self.micro_batches, self.forwards = max(1, self.micro_batches), 0, 0
            if self.cycle.has_begun_anew:  # plans are for the training that has begun
                self.calls, self._items = StepCalls(self._note_item), {}
            elif self.calls.needs_calls_before:
                self.calls, self._items = StepCalls(self._note_item, is_waiting=True), {}
            self._close_step(is_over=self.cycle.is_over)

    def _close_step(self, *, is_over: bool) -> None:
        """End a step; call ``on_traced`` if enough of them are traced."""
        assert self.kept is not None
        self.recorder.phase(Phase.SETUP)
        self.kept.close_step()
        self.other_bytes = self._other_bytes()
        self.batches.close_step(has_begun_anew=self.cycle.has_begun_anew)
        needs_steps = self.kept.needs_steps or self.batches.needs_steps or self.calls.needs_steps
        if is_over and self.evaluation is None and not needs_steps:
            self.on_traced()
        self.recorder.next_step()

    def _note_item(self, tensor: torch.Tensor) -> None:
        life = self.recorder.life_of(tensor)
        if life is not None:
            self._items[id(life)] = life, tensor.numel() * tensor.element_size()

    def _other_bytes(self) -> int:
        """Return the bytes that were alive before the step that ends and still are, without gradients,
        optimizer states, the trained model, and the part of each storage that is the job's batch: copies of
        the model, teachers, data sets, caches, and what the script collects. Included are tensors that each
        step makes before its forward pass and keeps, beside the batch."""
        model = set[int]()
        for module in self.calls.model.modules() if self.calls.model is not None else ():
            own = (*module._parameters.values(), *module._buffers.values())
            for tensor in filter(None.__ne__, (*own, *vars(module).get(KEPT_BUFFERS, ()))):
                model.add(id(self.recorder.life_of(tensor)))
        total_bytes, step = 0, self.recorder.step
        made_bytes = -sum(size for life, size in self._items.values() if life.end is not None)
        for life in self.recorder.lives:
            if life.end is not None or life.memory_pool in NOT_ON_DEVICE:
                continue
            if life.category in (Category.GRADIENT, Category.OPTIMIZER_STATE) or id(life) in model:
                continue
            size_bytes = life.pieces * rounded(life.size_bytes, self.recorder.device)
            if life.step != step:
                total_bytes += max(0, size_bytes - self._items.get(id(life), (life, 0))[1])
            elif step and life.phase is Phase.SETUP:
                made_bytes += size_bytes
        return total_bytes + max(0, made_bytes)

    def finish(self, ranks: int) -> Trace:
        """End the recording, and return the trace of the steps that were made. ``ranks``: the size of the
        script's process group."""
        self.recorder.modules.close()
        self._patches.close()
        groups = process_groups()
        allocations, ops, spans = self.recorder.finish()
        on_device, on_host = split_host_memory(allocations, spans)
        params = self._model_parameters()
        steps = max(s.step for s in spans) + 1
        return Trace(
            device=self.recorder.device,
            ranks=ranks,
            communicators=tuple((name, len(of_group)) for name, of_group in groups.items()),
            members=groups,
            steps=steps,
            allocations=on_device,
            ops=ops,
            spans=spans,
            parameter_count=sum(p.numel() for p in params),
            trainable_count=sum(p.numel() for p in params if p.requires_grad),
            **on_host,
            **_offloaded(allocations, steps - 1),
            assumptions=tuple(self.recorder.guesses.assumptions),
            guessed=tuple(filter(None, self.recorder.guesses.open)),
            assumed=tuple(self.recorder.guesses.assumed),
            model_bytes=sum(
                t.numel() * t.element_size()
                for t in (*params, *(b for r in self._roots.values() for b in r.buffers()))
            ),
        )


def _ids_of_parameters() -> set[int]:
    """Return the ids of the parameters of all modules of the process."""
    return {id(p) for module in existing(torch.nn.Module) for p in module._parameters.values()}


def _shards_on_host(root: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield this rank's shards of the parameters that FSDP2 keeps on the host."""
    for group in fsdp_groups(root):
        if isinstance(group.offload_policy, CPUOffloadPolicy):
            yield from (param.sharded_param for param in group.fsdp_params)


def _offloaded(allocations: Iterable[Allocation], step: int) -> dict[str, Any]:
    """Return the fields of `Trace` about what the forward pass of a step copies to the host."""
    sizes_bytes = [
        a.requested_bytes
        for a in allocations
        if a.stream == ON_HOST and a.step == step and a.phase is Phase.FORWARD
    ]
    copied_bytes = sum(sizes_bytes)
    return {
        "offloaded_bytes": copied_bytes,
        "restored_bytes": copied_bytes,
        "offloaded_tensors": len(sizes_bytes),
    }


class LoopMode(TorchDispatchMode):
    """The lowest mode, active while the script runs. Operators on fake tensors are recorded; all others run
    for real."""

    def __init__(self, trace: ScriptTrace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind is not FakeTensor and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # its inner operators arrive here one by one
        if any(issubclass(kind, FakeTensor) for kind in types):
            return self.trace.call(func, args, kwargs)
        out = func(*args, **kwargs)
        # a view of a data set's tensor is no tensor of a worker process
        is_skipped = self.trace.is_uncounted and any(r.alias_info for r in func._schema.returns)
        if (self.trace.begun or self.trace.is_uncounted) and not is_skipped:
            for tensor in tensor_leaves(out):
                self.trace.note_real(tensor)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
