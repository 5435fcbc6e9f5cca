"""Patches of torch through which a script's training steps are noticed while it runs unmodified."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import (  # type: ignore[attr-defined]
    UninitializedBuffer,
    UninitializedParameter,
    UninitializedTensorMixin,
    is_lazy,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, dataloader
from torch.utils.weak import WeakIdKeyDictionary

from memfit.capture.device_redirect import DeviceRedirect
from memfit.capture.script_trace import ScriptTrace
from memfit.capture.tensors import has_fakes, holds_real, is_fake, is_real
from memfit.model.batch_objects import batch_tensors

# As torch has them: traces of jobs refuse lazy modules.
_NEW_PARAMETER, _NEW_BUFFER = UninitializedParameter.__new__, UninitializedBuffer.__new__
_NOT_FINITE = frozenset({torch.isnan, torch.isinf, torch.Tensor.isnan, torch.Tensor.isinf})
_FINITE = frozenset({torch.isfinite, torch.Tensor.isfinite})
_SHAPING = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__getitem__", "contiguous", "flatten", "long", "reshape", "squeeze", "to", "view")
) | {torch.flatten, torch.reshape, torch.squeeze}
_COMPARISONS = frozenset(
    getattr(owner, f"{around}{name}{around}")
    for owner, around in ((torch, ""), (torch.Tensor, ""), (torch.Tensor, "__"))
    for name in ("lt", "le", "gt", "ge")
)


@contextlib.contextmanager
def script_patches(trace: ScriptTrace) -> Iterator[None]:
    """Inside this context, new parameters are fake, and ``trace`` sees calls of modules, backward passes and
    steps of optimizers. Data loaders work in this process. Losses and gradients count as finite. Files that
    ``torch.save`` writes stay empty, except those without fake tensors before the first training step."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.nn.Parameter, "__new__", _parameter_new(trace)),
            (torch.nn.Module, "__call__", _module_call(trace)),
            (torch.nn.TransformerEncoderLayer, "forward", _encoder_layer_forward(trace)),
            (torch.nn.Module, "_apply", _apply_in_place),
            (torch.autograd, "backward", _traced(trace, torch.autograd.backward, trace.backward)),
            (torch.autograd, "grad", _traced(trace, torch.autograd.grad, trace.gradient)),
            (torch.amp.GradScaler, "_maybe_opt_step", _step_without_overflow),
            (torch.nn.utils, "clip_grad_norm_", _clipping(trace)),
            (torch.optim.Optimizer, "__init__", _optimizer_init(trace)),
            (torch.optim.Optimizer, "add_param_group", _add_param_group(trace)),
            (torch, "save", _saving(trace, torch.save)),
            (torch, "set_anomaly_enabled", _without_nan_check(torch.set_anomaly_enabled)),
            (FakeTensor, "__format__", _format),
            (FakeTensor, "data_ptr", lambda tensor: tensor.untyped_storage().data_ptr()),
            (torch.UntypedStorage, "data_ptr", _data_pointer(torch.UntypedStorage.data_ptr)),
            (UninitializedTensorMixin, "materialize", _materialize(trace)),
            (UninitializedParameter, "__new__", _on_host(_NEW_PARAMETER)),
            (UninitializedBuffer, "__new__", _on_host(_NEW_BUFFER)),
            (DataLoader, "_get_iterator", _single_process_iterator(trace)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        if safetensors := _safetensors():
            stack.enter_context(mock.patch.object(safetensors, "save_file", _save))
            stack.enter_context(mock.patch.object(safetensors, "save", lambda *args, **options: b""))
        stack.enter_context(trace.foreign.notice_shared())
        stack.enter_context(_optimizer_hooks(trace))
        stack.enter_context(LoopFunctions(trace))
        yield


class LoopFunctions(torch.overrides.TorchFunctionMode):
    """Mode in which fake tensors count as finite, so that a script's checks for overflow pass. A number that
    is not known, such as a loss, compares as its ``item()`` does (`ScriptTrace.loop_number`). Calls of the
    script's loop are noted (`StepCalls`)."""

    def __init__(self, trace: ScriptTrace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in _NOT_FINITE or func in _FINITE) and isinstance(args[0], FakeTensor):
            return torch.full(args[0].shape, func in _FINITE, dtype=torch.bool)
        is_asked = func in _COMPARISONS and self.trace.begun and isinstance(args[1], int | float)
        if is_asked and self.trace.is_unknown_number(args[0]):
            number = self.trace.loop_number(args[0], is_compared=not self.trace.inside)
            with _disable_current_modes():
                return func(torch.tensor(float(number)), args[1])
        is_read = func is torch.Tensor.item and self.trace.begun and not self.trace.inside
        if is_read and self.trace.is_unknown_number(args[0]):
            return self.trace.loop_number(args[0])
        out = func(*args, **(kwargs or {}))
        if not self.trace.inside:
            self.trace.note_loop_result(out)
        calls = self.trace.calls
        is_early = calls.is_waiting or not self.trace.begun
        is_noted = not (is_early or self.trace.inside or calls.done)
        has_results = not self.trace.inside and has_fakes((args, kwargs)) and bool(batch_tensors(out))
        if is_noted and has_results:
            calls.note_call(func, args, kwargs or {}, out)
        elif is_early and has_results:
            is_weight = any(isinstance(t, torch.nn.Parameter) for t in _pytree.tree_leaves((args, kwargs)))
            calls.note_early_call((args, kwargs), out, has_weights=is_weight)
        elif is_noted and func in _SHAPING and is_real(out):
            calls.note_reshape(func, args, kwargs or {}, out)
        return out


def _format(tensor: torch.Tensor, spec: str) -> str:
    """Format a tensor as torch formats one with data: a number if it has no dimensions."""
    return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _safetensors() -> Any:
    """Return the module of safetensors that writes files of torch's tensors, or None if there is none."""
    try:
        import safetensors.torch
    except ImportError:
        return None
    return safetensors.torch


def _save(values: Any, file: Any = None, *args: Any, **options: Any) -> None:
    """Stands for ``torch.save`` and the like: make an empty file if ``file`` is a path; else do nothing."""
    if isinstance(file, str | os.PathLike):
        open(file, "wb").close()  # noqa: PTH123  the sandbox's open


def _saving(trace: ScriptTrace, inner: Callable[..., None]) -> Callable[..., None]:
    """Return a stand-in for ``torch.save``. Before the first training step it writes what holds no fake
    tensor, such as a data set that the script prepares and loads again. Otherwise, and if that cannot be
    written, it does what `_save` does."""

    @functools.wraps(inner)
    def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        is_path = isinstance(f, str | os.PathLike)
        if trace.begun or has_fakes(obj):
            _save(obj, f)
            return
        try:  # torch would open a path itself, and not in the sandbox
            with open(f, "wb") if is_path else contextlib.nullcontext(f) as file:  # noqa: PTH123
                inner(obj, file, *args, **options)
        except (RuntimeError, TypeError, AttributeError, pickle.PicklingError):
            # an object that hides fake tensors, which cannot be written
            _save(obj, f)

    return save


def _without_nan_check(inner: Callable[..., None]) -> Callable[..., None]:
    """Return a stand-in for ``torch.set_anomaly_enabled`` that never checks for NaN, as fake gradients have
    no values."""
    return lambda mode, check_nan=True: inner(mode, False)


def _data_pointer(inner: Callable[..., int]) -> Callable[..., int]:
    """Return a stand-in for ``data_ptr`` that gives each storage without data a number of its own."""
    return lambda storage: storage._cdata if storage.device.type == "meta" else inner(storage)


def _parameter_new(trace: ScriptTrace) -> Any:
    inner = torch.nn.Parameter.__new__

    def new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if data is not None and holds_real(data):
            data = trace.fake_parameter(data)
        return inner(cls, data, requires_grad)

    return staticmethod(new)


def _on_host(inner: Callable[..., Any]) -> Any:
    """Return a ``__new__`` for the parameters and buffers of lazy modules that makes them on the host,
    whatever the script's device is."""

    def new(cls: Any, requires_grad: bool = True, device: Any = None, dtype: Any = None, **rest: Any) -> Any:
        return inner(cls, requires_grad, "cpu", dtype, **rest)

    return staticmethod(new)


def _materialize(trace: ScriptTrace) -> Callable[..., None]:
    """Return a stand-in for the function that gives a lazy module's parameter or buffer its shape."""
    inner = UninitializedTensorMixin.materialize

    @functools.wraps(inner)
    def materialize(tensor: Any, shape: Any, device: Any = None, dtype: Any = None) -> None:
        is_parameter = isinstance(tensor, UninitializedParameter)
        with _disable_current_modes():
            inner(tensor, shape, "cpu", dtype)
        if is_parameter or trace.inside:
            trace.make_fake(tensor)
        if trace.inside:
            trace.recorder.move(tensor, "")

    return materialize


def _apply_in_place(module: Any, fn: Callable[..., Any], recurse: bool = True) -> Any:
    """Stands for ``Module._apply``: convert the tensors of parameters, which stay the same objects, as the
    script's optimizer may hold them."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for param in module._parameters.values():
        if param is None or is_lazy(param):
            continue
        with torch.no_grad():
            converted = fn(param)
            is_wrapper = is_traceable_wrapper_subclass(converted)  # ``data`` does not set what it holds
            is_alike = not is_wrapper and torch._has_compatible_shallow_copy_type(param, converted)
            if converted is not param and is_alike:
                param.data = converted
            elif converted is not param:  # or it was on "meta"
                torch.utils.swap_tensors(param, torch.nn.Parameter(converted, param.requires_grad))
            if param.grad is not None:
                param.grad = fn(param.grad)
    for key, buffer in module._buffers.items():
        if buffer is not None and not is_lazy(buffer):
            module._buffers[key] = fn(buffer)
    return module


def _module_call(trace: ScriptTrace) -> Any:
    inner: Any = torch.nn.Module.__call__
    with_fakes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # modules that have fake parameters

    def is_traced(module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
        if module not in with_fakes and any(map(is_fake, module.parameters())):
            with_fakes[module] = True
        return module in with_fakes or has_fakes((args, kwargs))

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if trace.inside or not is_traced(self, args, kwargs):
            return inner(self, *args, **kwargs)
        return trace.forward(self, functools.partial(inner, self), args, kwargs)

    return call


def _encoder_layer_forward(trace: ScriptTrace) -> Callable[..., Any]:
    """Return a forward of `TransformerEncoderLayer` that takes its fast path where torch does so on a CPU: in
    evaluation without gradients. Under modes for functions, such as memfit's or that of a default device,
    torch does not."""
    inner = torch.nn.TransformerEncoderLayer.forward

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        modes = torch.overrides._get_current_function_mode_stack()
        is_slow = any(not isinstance(m, LoopFunctions | DeviceRedirect) for m in modes)
        if is_slow or self.training or torch.is_grad_enabled() or not trace.is_host:
            return inner(self, *args, **kwargs)
        for _ in modes:
            torch._C._pop_torch_function_stack()
        try:
            return inner(self, *args, **kwargs)
        finally:
            for mode in modes:
                torch._C._push_on_torch_function_stack(mode)

    return forward


def _traced(
    trace: ScriptTrace,
    inner: Callable[..., Any],
    run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Callable[..., Any]:
    """Return ``inner``, of which ``run(inner, args, kwargs)`` makes the calls of the script's loop on fake
    tensors."""

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        if trace.inside or not has_fakes((args, kwargs)):
            return inner(*args, **kwargs)
        return run(inner, args, kwargs)

    return call


def _optimizer_init(trace: ScriptTrace) -> Callable[..., None]:
    inner = torch.optim.Optimizer.__init__

    @functools.wraps(inner)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        trace.cycle.created.add(self)
        if isinstance(self, torch.optim.LBFGS):  # it does all its iterations
            for group in self.param_groups:
                group["tolerance_grad"] = group["tolerance_change"] = -math.inf

    return init


def _add_param_group(trace: ScriptTrace) -> Callable[..., None]:
    inner = torch.optim.Optimizer.add_param_group

    @functools.wraps(inner)
    def add_param_group(self: Any, param_group: Any) -> None:
        inner(self, param_group)
        trace.adopt_leaves(self)

    return add_param_group


def _clipping(trace: ScriptTrace) -> Callable[..., Any]:
    inner = torch.nn.utils.clip_grad_norm_

    @functools.wraps(inner)
    def clip(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        trace.clip = float(max_norm)
        return inner(parameters, max_norm, *args, **kwargs)

    return clip


def _step_without_overflow(
    scaler: Any, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any
) -> Any:
    """Stands for `GradScaler._maybe_opt_step`: no gradient overflows."""
    return optimizer.step(*args, **kwargs)


@contextlib.contextmanager
def _optimizer_hooks(trace: ScriptTrace) -> Iterator[None]:
    running: list[contextlib.ExitStack] = []  # an optimizer may call another

    def before(optimizer: Any, args: Any, kwargs: Any) -> Any:
        stack = contextlib.ExitStack()
        is_outermost = not running and not trace.inside
        running.append(stack)
        if not is_outermost:
            return None
        trace.adopt_states(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            stack.enter_context(trace.region())
            return None

        def outside_region() -> Any:
            """Run the closure, which is the script's code, outside the region that records the
            optimizer's operators."""
            stack.close()
            try:
                return closure()
            finally:
                stack.enter_context(trace.region())

        if "closure" in kwargs:
            return args, {**kwargs, "closure": outside_region}
        return (args[0], outside_region, *args[2:]), kwargs

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        running.pop().close()
        if running:
            trace.cycle.note_inner(optimizer)
        else:
            trace.updated(optimizer)

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single_process_iterator(trace: ScriptTrace) -> Any:
    """Return a ``DataLoader._get_iterator`` that loads in this process. What worker processes would load is
    not counted: it comes in shared memory."""

    def get_iterator(loader: Any) -> Any:
        workers, timeout = loader.num_workers, loader.timeout
        loader.num_workers, loader.timeout = 0, 0
        try:
            iterator: Any = dataloader._SingleProcessDataLoaderIter(loader)
        finally:
            loader.num_workers, loader.timeout = workers, timeout
        trace.workers = max(trace.workers, workers)
        inner = iterator._next_data

        def next_data() -> Any:
            if trace.evaluation is not None and trace.evaluation.skips(loader):
                raise StopIteration
            with trace.uncounted() if workers else contextlib.nullcontext():
                batch = inner()
            trace.batches.note(batch, loader)
            return batch

        iterator._next_data = next_data
        return iterator

    return get_iterator
