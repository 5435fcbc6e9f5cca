"""The training step of a script as a Job, so that plans for it can be searched.

While the first micro-batch runs, the calls of the script's loop are recorded: of outermost modules, and of
torch functions on what they returned, up to the loss. The job's loss repeats these calls, and keeps of their
results what the loop's variables keep, such as the outputs until the next ones. Recorded are no tensors but
which call made them, so that recording keeps nothing alive.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from memfit.capture.kept_memory import existing
from memfit.capture.tensors import KEPT_BUFFERS, is_fake, is_real
from memfit.inputs import optimizer_of
from memfit.jobs.user_job import guard_job
from memfit.model.batch_objects import batch_length, batch_tensors, map_batch, repeat
from memfit.techniques.deferred_logits import LazyLogits
from memfit.trace.concrete_values import attached_value
from memfit.trace.fake_copy import FakeCopies
from memfit.trace.source_location import user_line
from memfit.types.errors import UserError
from memfit.types.job import Job

_OF_MODULES = frozenset({"_parameters", "_buffers", "_modules", KEPT_BUFFERS})  # not the user's attributes
_FROM_WEIGHTS = "_memfit_from_weights"  # attribute of a tensor that was computed from weights
_RESHAPES = frozenset({"reshape", "view"})
_INIT_STD = 0.02  # of weights whose values are not known, where a trial computes with them


@dataclasses.dataclass(frozen=True, slots=True)
class _Output:
    """Stands for a tensor that a recorded call returned: the ``index``-th tensor of call ``call``."""

    call: int
    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    """Stands for the item ``index`` of the batch."""

    index: int


@dataclasses.dataclass(slots=True)
class _Copied:
    """The ``value`` of a real tensor when the script copied it to the device. ``item``: what stands for it in
    recorded calls, None until one uses the copy."""

    value: torch.Tensor
    item: _Item | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Attribute:
    """Stands for a parameter or buffer of ``module``, or a result that its forward has left there, in the
    attribute ``name``. ``index``: its place among the leaves of that attribute, counted from the last (-1),
    if it is a list, tuple or dict."""

    module: torch.nn.Module
    name: str
    index: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Stands for a first dimension of ``times`` the number of samples, which micro-batches have fewer of."""

    times: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """One call of the loop. ``function`` is the model, or a module in it, if the call is one of its forward
    pass. ``autocast`` is the dtype of the autocast around it, or None."""

    function: Any
    arguments: Any  # (args, kwargs) with stand-ins for tensors
    autocast: torch.dtype | None
    has_grad: bool


class StepCalls:
    """Records the calls of a script's loop from the first forward to the loss.

    ``on_item`` is called with each tensor of the script that is a part of the job's batch.
    ``problem``: why no job can be made of them, or "". ``micro_batch``: copies of the real tensors, and of
    the objects that hold them, that the calls take. ``needs_calls_before``: the problem is a result of a
    module that ran before the model, such as a teacher: of the calls of the next step, from that of its first
    module, a job may be made. ``is_later``: these calls are recorded. ``is_waiting``: that module
    has not been called yet, and nothing is recorded.
    """

    def __init__(
        self, on_item: Callable[[Any], None] = lambda tensor: None, *, is_waiting: bool = False
    ) -> None:
        self.on_item = on_item
        self.is_waiting = is_waiting
        self.is_later = is_waiting
        self.needs_calls_before = False
        self.model: torch.nn.Module | None = None
        self.micro_batch: list[Any] = []
        self.problem = ""
        self.done = False
        self._calls: list[_Call] = []
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # fake tensor -> _Output
        self._items: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real tensor or object -> _Item
        self._copied: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real tensor -> _Copied
        self._copies: WeakIdKeyDictionary = WeakIdKeyDictionary()  # copy on the device -> _Copied
        self._reshaped: WeakIdKeyDictionary = WeakIdKeyDictionary()  # real tensor -> (function, args, kwargs)
        self._loss: Any = None
        self._paths: dict[int, str] = {}  # id of each module of the model -> its path
        # What the loop keeps while backward runs, and of that until the next forward pass has returned.
        self._kept_in_backward: set[_Output] | None = None
        self._kept_until_next: set[_Output] | None = None
        self._kept: WeakIdKeyDictionary = (
            WeakIdKeyDictionary()
        )  # copy of the model -> what its last step keeps
        self._on_real: dict[int, torch.nn.Module] = {}  # id of a module outside the model -> its real copy

    def note_copy(self, copied: torch.Tensor, real: torch.Tensor) -> None:
        """Note that ``copied``, on the target device, has the values of the script's tensor ``real``. It is a
        part of the batch only if a recorded call uses it: a data set on the device is none."""
        if self.done:
            return
        if real not in self._copied:
            with _disable_current_modes():
                self._copied[real] = _Copied(real.detach().clone(), self._items.get(real))
        self._copies[copied] = self._copied[real]

    def note_reshape(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note that the loop made the real tensor ``out`` of ``args[0]``, so that it is made again of a part
        of the batch. Only those are noted that keep the first dimension, or flatten it with the next
        ones: the rows of others need not be samples."""
        whole: Any = args[0] if args else None
        if self.done or out is whole or not (is_real(whole) and whole.dim() and out.dim()):
            return
        rows = len(whole)
        is_flattened = rows > 1 and out.numel() == whole.numel() and len(out) % rows == 0
        if len(out) == rows or is_flattened:
            self._reshaped[out] = function, args, kwargs

    def note_early_call(self, args: Any, out: Any, *, has_weights: bool) -> None:
        """Note a call of the loop before the first forward pass. What it returned was computed from weights
        if ``has_weights`` or if an argument was. Such results cannot be part of the batch; others can."""
        if has_weights or any(hasattr(t, _FROM_WEIGHTS) for t in batch_tensors(args)):
            for tensor in batch_tensors(out):
                setattr(tensor, _FROM_WEIGHTS, True)

    def note_call(self, function: Any, args: Any, kwargs: Any, out: Any, *, model: Any = None) -> None:
        """Record a call that returned ``out``, up to the loss or a ``problem``. ``model``: the called module,
        if it has trainable parameters. If no module holds it and the model so far, that is a ``problem``."""
        if self.done and self._kept_until_next is None and model is not None:
            self._kept_until_next = set(self._outputs.values())
        if self.done or self.problem:
            return
        self.is_waiting = False
        if model is not None and self.model is None:
            self.model = model
        elif model is not None and not self._enclose(model):
            self.problem = (
                f"the step trains several models ({type(self.model).__name__}, {type(model).__name__})"
            )
            return
        is_autocast = torch.is_autocast_enabled("cpu")
        arguments = _pytree.tree_map(self._stand_in, (args, kwargs), is_leaf=_is_packed)
        if getattr(function, "__name__", "") in _RESHAPES:
            arguments = self._with_rows(*arguments)
        call = _Call(
            function if model is None else model,
            arguments,
            torch.get_autocast_dtype("cpu") if is_autocast else None,
            torch.is_grad_enabled(),
        )
        for index, tensor in enumerate(batch_tensors(out)):
            self._outputs[tensor] = _Output(len(self._calls), index)
        self._calls.append(call)

    @property
    def needs_steps(self) -> bool:
        """Whether a further step must show what the loop keeps of a recorded one that was not the first."""
        return self.is_later and self.done and not self.problem and self._kept_until_next is None

    def note_loss(self, loss: Any) -> None:
        """Record the tensor from which backward starts; what follows is not recorded."""
        if self.done:
            return
        self.done = True
        self._loss = self._outputs.get(loss) if isinstance(loss, torch.Tensor) else None
        if self._loss is None and not self.problem:
            self.problem = "the loss is made by operators that memfit does not see in the script's loop"

    def note_gradient(self) -> None:
        """Note that the forward pass takes a gradient, as of an input, which is a ``problem``."""
        if not (self.done or self.problem):
            place = user_line()
            self.problem = (
                f"the step takes a gradient{f' in {place}' if place else ''} before its backward pass"
            )

    def note_kept_in_backward(self) -> None:
        """Note what the loop's variables keep of the recorded calls at the end of the first backward pass,
        which has freed what it used itself."""
        if self._kept_in_backward is None:
            self._kept_in_backward = set(self._outputs.values())

    def _with_rows(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a reshape with `_Rows` for a first dimension that is a multiple of the
        number of samples."""
        first = next((len(t) for item in self.micro_batch for t in batch_tensors(item) if t.dim()), 0)
        whole, *shape = args
        shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if first > 1 and shape and isinstance(shape[0], int) and shape[0] >= first and shape[0] % first == 0:
            args = (whole, _Rows(shape[0] // first), *shape[1:])
        return args, kwargs

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if (stand_in := self._stand_in_of(value)) is not None:
                return stand_in
            if (shaping := self._reshaped.get(value)) is not None:
                function, *arguments = shaping
                call = _Call(function, _pytree.tree_map(self._stand_in, tuple(arguments)), None, True)
                self._outputs[value] = _Output(len(self._calls), 0)
                self._calls.append(call)
                return self._outputs[value]
            if is_real(value):
                if not value.requires_grad:
                    return self._item(value)
                self._note_leaf()
                return None
            return self._attribute(value) or self._made_item(value)
        if batch_tensors(value):
            if _is_packed(value):  # its batch sizes must be a tensor, and no stand-in
                self.problem = "the step passes on packed sequences"
            elif any(map(is_fake, batch_tensors(value))):
                self.problem = f"the step passes on a {type(value).__name__} that holds results"
            else:
                return self._item(value)
            return None
        return value

    def _stand_in_of(self, tensor: torch.Tensor) -> Any:
        """Return what stands for a tensor that a call has returned or that is in the batch, else None."""
        if (copied := self._copies.get(tensor)) is not None:
            self.on_item(tensor)
            return self._item_of(copied)
        for known in (self._outputs, self._items):
            if (stand_in := known.get(tensor)) is not None:
                return stand_in
        return None

    def _item_of(self, copied: _Copied) -> _Item:
        if copied.item is None:
            copied.item = _Item(len(self.micro_batch))
            self.micro_batch.append(copied.value)
        return copied.item

    def _item(self, value: Any, real: torch.Tensor | None = None) -> _Item:
        """Return what stands for a part of the batch. ``real``: a real tensor in place of the fake one
        ``value``, which was made on the device; None: ``value`` is real."""
        if value in self._copied:
            return self._item_of(self._copied[value])
        if value not in self._items:
            self._items[value] = _Item(len(self.micro_batch))
            for tensor in batch_tensors(value):
                self.on_item(tensor)
            with _disable_current_modes():
                if real is None:
                    real = map_batch(lambda t: t.detach().clone(), value)
                self.micro_batch.append(real)
        item: _Item = self._items[value]
        return item

    def _made_item(self, value: torch.Tensor) -> _Item | None:
        """Return what stands for a tensor that the loop made on the device before the forward pass: a part of
        the batch. Of one that was computed from weights, or that requires gradients, note the problem and
        return None."""
        if type(value) is FakeTensor and not (value.requires_grad or hasattr(value, _FROM_WEIGHTS)):
            return self._item(value, _with_values(value))
        if value.requires_grad and value.is_leaf and not hasattr(value, _FROM_WEIGHTS):
            self._note_leaf()
            return None
        place = user_line()
        used = f"the step uses{f' in {place}' if place else ''}"
        self.problem = f"{used} a tensor that was computed from weights before its forward pass"
        self.needs_calls_before = not self.is_later
        return None

    def _note_leaf(self) -> None:
        place = user_line()
        self.problem = (
            f"the step uses{f' in {place}' if place else ''} a tensor that requires gradients and is no "
            "parameter of the model"
        )

    def _attribute(self, value: torch.Tensor) -> _Attribute | None:
        """Return what stands for a tensor that a module of the model holds, else None."""
        if self.model is None or (isinstance(value, torch.nn.Parameter) and not self._enclose(value)):
            return None
        for module in self.model.modules():
            for name, kept in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
                if name in _OF_MODULES:
                    continue
                leaves = [kept] if isinstance(kept, torch.Tensor) else _leaves(kept)
                for index, leaf in enumerate(leaves):
                    if leaf is value:
                        return _Attribute(module, name, index - len(leaves))
        return None

    def _enclose(self, part: torch.nn.Module | torch.nn.Parameter) -> bool:
        """Let the model be the smallest module that contains the model so far and ``part``. Return whether
        there is one."""
        assert self.model is not None

        def holds(module: torch.nn.Module) -> bool:
            inner = list(module.modules())
            tensors = [p for m in inner for p in m._parameters.values()]
            return any(m is self.model for m in inner) and any(t is part for t in (*inner, *tensors))

        if not holds(self.model):
            holders = sorted(filter(holds, existing(torch.nn.Module)), key=lambda m: len(list(m.modules())))
            if not holders:
                return False
            self.model = holders[0]
        return True

    # -- the job --------------------------------------------------------------------------------------

    def job(
        self,
        name: str,
        optimizer: Any,
        micro_batches: int,
        *,
        clip: float | None,
        workers: int,
        other_bytes: int = 0,
    ) -> Job:
        """Return the job called ``name`` whose step is that of the script: ``micro_batches`` micro-batches,
        and one update of ``optimizer``. ``clip``, ``workers`` and ``other_bytes`` are as in `Job`. Raises
        UserError if there is a ``problem``, if no step was seen, if the batch has no tensor with dimensions,
        and if ``optimizer`` holds no trainable parameter of the model."""
        if self.problem or self.model is None or not self.done:
            reason = self.problem or "no training step was seen"
            raise UserError(f"no plan can be searched for {name}: {reason}", hint=_HINT)
        model = _unwrap(self.model)
        self._paths = {id(module): path for path, module in model.named_modules()}
        micro_batch = self.micro_batch[0] if len(self.micro_batch) == 1 else tuple(self.micro_batch)
        batch = repeat(micro_batch, micro_batches)
        job = Job(
            name=name,
            build_model=lambda: _copy(model),
            make_batch=lambda step, seed: batch,
            loss=self._repeat_calls,
            batch_size=batch_length(batch),
            optimizer=optimizer_of(optimizer, model),
            clip=clip,
            workers=workers,
            other_bytes=other_bytes,
        )
        return guard_job(job, "the script's training step")

    def _kept_of(self, model: torch.nn.Module) -> dict[_Output, Any]:
        """Return what the loop keeps of the last step of ``model`` until the next forward pass."""
        kept: dict[_Output, Any] = self._kept.setdefault(model, {})
        for output in kept.keys() - (self._kept_until_next or set()):
            del kept[output]
        return kept

    def _repeat_calls(self, model: Any, batch: Any) -> torch.Tensor:
        items = (batch,) if len(self.micro_batch) == 1 else batch
        results: list[list[torch.Tensor]] = []
        bare = _unwrap(model if hasattr(model, "get_submodule") else getattr(model, "module", model))
        kept = self._kept_of(bare)

        def value_of(stand_in: Any) -> Any:
            if isinstance(stand_in, _Output):
                return results[stand_in.call][stand_in.index]
            if isinstance(stand_in, _Item):
                return items[stand_in.index]
            if isinstance(stand_in, _Rows):
                return stand_in.times * next(len(t) for t in batch_tensors(items) if t.dim())
            if isinstance(stand_in, _Attribute):
                value = getattr(module_of(stand_in.module), stand_in.name)
                return value if isinstance(value, torch.Tensor) else _leaves(value)[stand_in.index]
            return stand_in

        def module_of(module: torch.nn.Module) -> Any:
            return bare.get_submodule(self._paths.get(id(module), ""))

        def function_of(call: _Call, args: Any) -> Any:
            if call.function is not self.model and id(call.function) not in self._paths:
                return _on_plain_logits(self._outside(call.function), args)
            return module_of(call.function) if self._paths.get(id(call.function)) else model

        for call in self._calls:
            args, kwargs = _pytree.tree_map(value_of, call.arguments)
            with call_context(call.autocast, has_grad=call.has_grad):
                results.append(_results(function_of(call, args)(*args, **kwargs)))
            outputs = {_Output(len(results) - 1, i): result for i, result in enumerate(results[-1])}
            kept |= {o: outputs[o] for o in outputs.keys() & (self._kept_in_backward or set())}
        loss: torch.Tensor = results[self._loss.call][self._loss.index]
        return loss if loss.numel() == 1 else loss.sum()

    def _outside(self, function: Any) -> Any:
        """Return a function of the loop. Of a module outside the model, such as a loss with weights of
        classes, return a copy on real tensors where no fake ones are computed with."""
        if not isinstance(function, torch.nn.Module) or torch._guards.active_fake_mode() is not None:
            return function
        if id(function) not in self._on_real:
            self._on_real[id(function)] = _copy(function)
        return self._on_real[id(function)]


def _leaves(value: Any) -> list[Any]:
    return _pytree.tree_leaves(value) if isinstance(value, list | tuple | dict) else []


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _results(out: Any) -> list[Any]:
    """Return the tensors of ``out`` as `batch_tensors` does, but deferred logits as they are."""
    leaves = [[v] if isinstance(v, LazyLogits) else batch_tensors(v) for v in _pytree.tree_leaves(out)]
    return [tensor for tensors in leaves for tensor in tensors]


def _on_plain_logits(function: Any, args: tuple[Any, ...]) -> Any:
    """Return the function in the form in which it can be repeated on plain logits: if it is a method or
    property of tensors that was called on deferred logits, one that looks it up on its first argument."""
    name = getattr(function, "__name__", "")
    if not args or not isinstance(args[0], LazyLogits):
        return function
    if name == "__get__":
        return lambda logits: getattr(logits, function.__self__.__name__)
    if getattr(torch.Tensor, name, None) is function:
        return lambda logits, *rest, **kwargs: getattr(logits, name)(*rest, **kwargs)
    return function


_HINT = "write the step as a job (docs/guides/scientist.md), or use memfit.apply in the loop"


@contextlib.contextmanager
def call_context(autocast: torch.dtype | None, *, has_grad: bool) -> Iterator[None]:
    """Inside this context, autocast to the dtype ``autocast`` is on, unless that is None, and without
    ``has_grad`` no gradients are recorded."""
    with contextlib.ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", dtype=autocast))
        if not has_grad:
            stack.enter_context(torch.no_grad())
        yield


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    if isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        return _unwrap(inner.module)
    return inner


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model on fake tensors of the active fake mode, or without one on real tensors, with
    random weights and the buffers' own values, where these are known. Tied parameters stay tied."""
    fake = torch._guards.active_fake_mode()

    def make(tensor: torch.Tensor) -> torch.Tensor:
        fresh = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        value = None if isinstance(tensor, torch.nn.Parameter) else attached_value(tensor)
        if fake is None and value is not None:
            return value.clone()
        if fake is None:
            _fill(fresh)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(fresh, tensor.requires_grad)
        return fresh

    memo: dict[int, Any] = {}
    for module in model.modules():
        registered = (*module._parameters.values(), *module._buffers.values())
        others = [t for t in vars(module).values() if isinstance(t, torch.Tensor)]
        for tensor in (*registered, *others):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = make(tensor)
        if KEPT_BUFFERS in vars(module):
            memo[id(vars(module)[KEPT_BUFFERS])] = []
    with FakeCopies(fake):
        return copy.deepcopy(model, memo)


def _with_values(fake: torch.Tensor) -> torch.Tensor:
    """Return a real tensor like ``fake`` with its values or, where they are not known, with numbers that suit
    a batch: random ones, zeros where they are integers (an index or a class), and True in masks."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        if (value := attached_value(fake)) is not None:
            return value.clone()
        made = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype)
        if made.is_floating_point() or made.is_complex():
            return made.normal_(generator=torch.Generator().manual_seed(0))
        return made.fill_(made.dtype is torch.bool)


def _fill(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.normal_(0.0, _INIT_STD) if tensor.dim() > 1 else tensor.fill_(1.0)
    else:
        tensor.zero_()
