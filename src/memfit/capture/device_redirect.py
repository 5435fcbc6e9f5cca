"""Let a script that trains on an accelerator run on a machine without one, on fake CPU tensors.

Tensors keep torch's CPU as their device. Whether they lie on the target device or on its host is kept by the
recorder (``memory_pool``), and the script's loop is answered as if the device existed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types as python_types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree
from torch.utils._device import DeviceContext

from memfit.capture.kept_memory import NOT_ON_DEVICE, ON_HOST
from memfit.capture.script_trace import ScriptTrace
from memfit.capture.tensors import is_real
from memfit.trace.device_kernels import autocast_on_host
from memfit.types.device_kind import CUDA, HOST
from memfit.types.machine import Machine
from memfit.types.trace import Category

# Functions of torch.cuda, torch.accelerator and the like: those that answer 0, those that make an object
# for a `with` statement or a stream, and those that return nothing.
_NUMBERS = (
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_cached",
    "max_memory_cached",
    "current_allocated_memory",
    "driver_allocated_memory",
)
_INERT = (
    "Stream",
    "Event",
    "stream",
    "device",
    "device_of",
    "current_stream",
    "default_stream",
    "device_index",
)
_SILENT = (
    "synchronize",
    "empty_cache",
    "set_device",
    "set_device_index",
    "set_device_idx",
    "ipc_collect",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
    "init",
    "_lazy_init",
    "_lazy_call",
    "_check_capability",
    "set_stream",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_accumulated_memory_stats",
    "set_rng_state",
    "set_rng_state_all",
    "set_per_process_memory_fraction",
    "cudart",
)
_IS_CUDA: Any = torch.Tensor.is_cuda
_TYPE_NAMES = {
    torch.float32: "FloatTensor",
    torch.float64: "DoubleTensor",
    torch.float16: "HalfTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.int64: "LongTensor",
    torch.int32: "IntTensor",
    torch.int16: "ShortTensor",
    torch.int8: "CharTensor",
    torch.uint8: "ByteTensor",
    torch.bool: "BoolTensor",
}
_HERE = (HOST, "meta")  # devices that are not redirected


class DeviceRedirect(TorchFunctionMode):
    """Mode that sends tensors to the target device where the script names an accelerator.

    If the target is the host, accelerators are other names for it. ``redirected`` holds the types of the
    accelerators that the script named.
    """

    def __init__(self, trace: ScriptTrace) -> None:
        super().__init__()
        self.trace = trace
        self.redirected: dict[str, None] = {}
        self.in_hook = False  # whether a hook of a saved tensor runs
        self.pins = False  # whether such hooks keep tensors in pinned memory
        self.target = torch.device(HOST if trace.is_host else trace.recorder.kind.name)
        self._handlers: dict[Any, Callable[..., Any]] = {
            torch.Tensor.to: self._to,
            torch.Tensor.cuda: lambda tensor, device=None, non_blocking=False, memory_format=None: self._move(
                tensor, torch.device(CUDA) if device is None else device, None, layout=memory_format
            ),
            torch.Tensor.cpu: lambda tensor, memory_format=None: self._move(
                tensor, torch.device(HOST), None, layout=memory_format
            ),
            torch.Tensor.type: self._type,
            torch.device: self._named_device,
        }
        if not trace.is_host:
            self._handlers |= {
                torch.Tensor.type_as: self._to,
                torch.Tensor.device.__get__: self._device,
                _IS_CUDA.__get__: lambda tensor: self._device(tensor).type == CUDA,
                torch.Tensor.get_device: lambda tensor: 0 if self.is_on_target(tensor) else -1,
            }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and self.names_accelerator(device):
            kwargs = {**kwargs, "device": HOST}
            if self.trace.is_host or self.trace.inside:
                return func(*args, **kwargs)
            with self.trace.region():  # a new tensor on the target device
                return self._born_on_target(func(*args, **kwargs))
        is_pinned = kwargs.get("pin_memory") is True and not self.trace.is_host
        if is_pinned:
            kwargs = {**kwargs, "pin_memory": False}  # this machine may be unable to
        self.pins |= self.in_hook and is_pinned
        if self.in_hook and (is_pinned or device is not None):
            with self.trace.region(), self.trace.recorder.in_memory_pool(ON_HOST):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def follow_hook(self, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return the hook of a saved tensor so that it runs as the script's loop does, although it is called
        in a forward or backward pass: its copies to the host and back are followed."""

        def followed(value: Any) -> Any:
            active = _get_current_function_mode_stack()
            with self.trace.as_loop(), contextlib.nullcontext() if self in active else self:
                outer, self.in_hook = self.in_hook, True
                try:
                    return hook(value)
                finally:
                    self.in_hook = outer

        return followed

    def _named_device(self, name: Any, *args: Any, **kwargs: Any) -> torch.device:
        """Return ``torch.device(name)``; an index alone is one of the target's."""
        if isinstance(name, int) and not args and not kwargs:
            return torch.device(CUDA if self.trace.is_host else self.target.type, name)
        return torch.device(name, *args, **kwargs)

    def names_accelerator(self, device: Any, *, places: bool = True) -> bool:
        """Return whether ``device``, as the script gave it, is an accelerator: an index, or neither the host
        nor "meta". False for None. ``places``: whether something is put there; its kind is then added to
        ``redirected``. Autocast puts nothing there, and torch asks for that of "cuda" where the script names
        none, as in attention and checkpoints."""
        if isinstance(device, bool) or device is None:
            return False
        kind = CUDA if isinstance(device, int) else torch.device(device).type
        if kind in _HERE:
            return False
        if places:
            self.redirected[kind] = None
        return True

    def is_on_target(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies on the target device. If that is the host, all do; otherwise real
        tensors do not."""
        if self.trace.is_host or not isinstance(tensor, FakeTensor):
            return self.trace.is_host
        return self.trace.recorder.note_real(tensor, "").memory_pool not in NOT_ON_DEVICE

    def device_of(self, tensor: FakeTensor) -> torch.device:
        """Return what a fake tensor's ``device`` is: in the script's loop the device on which it lies, inside
        a region that is recorded (`ScriptTrace.region`) and for sparse tensors the host, and in torch's own
        kernels "meta"."""
        plain = tensor.fake_device
        if tensor.fake_mode.in_kernel_invocation:
            return torch.device("meta")
        if plain.type != HOST or self.trace.inside or tensor.layout is not torch.strided:
            return plain
        life = self.trace.recorder.life_of(tensor)
        is_there = life is not None and life.memory_pool not in NOT_ON_DEVICE
        return torch.device(self.target.type, 0) if is_there else plain

    def _born_on_target(self, out: Any) -> Any:
        for leaf in _pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.trace.recorder.note_real(leaf, "created on the device")
        return out

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("other")
        if other is not None:
            device, dtype = self._device(other), other.dtype
            copy = kwargs.get("copy", args[2] if len(args) > 2 else False)
            layout = kwargs.get("memory_format")
        else:
            named = {k: self._without_index(v) for k, v in kwargs.items() if k != "copy"}
            device, dtype, _, layout = torch._C._nn._parse_to(*map(self._without_index, args[:3]), **named)
            copy = kwargs.get("copy", args[3] if len(args) > 3 else False)
        return self._move(tensor, device, dtype, copy=copy, layout=layout)

    def _type(self, tensor: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **_: Any) -> Any:
        """Stands for ``Tensor.type``: return the name of the tensor's type, such as "torch.cuda.FloatTensor",
        or the tensor converted to a dtype or a type of tensors."""
        if dtype is None:
            name = f"torch.{_TYPE_NAMES[tensor.dtype]}"
            return name.replace("torch.", "torch.cuda.") if self._device(tensor).type == CUDA else name
        if isinstance(dtype, torch.dtype):
            return self._move(tensor, None, dtype)
        target = _tensor_type(dtype)
        if target is None:
            return torch.Tensor.type(tensor, dtype)
        return self._move(tensor, torch.device(target[0]), target[1])

    def _without_index(self, argument: Any) -> Any:
        """Return a device for the index of one, and any other argument as it is."""
        is_index = isinstance(argument, int) and not isinstance(argument, bool)
        return self._named_device(argument) if is_index else argument

    def _move(
        self, tensor: torch.Tensor, device: Any, dtype: Any, *, copy: bool = False, layout: Any = None
    ) -> Any:
        """Return the tensor on ``device`` (None: where it is) in ``dtype`` and in the memory format
        ``layout`` (None: its own), as Tensor.to does."""
        trace = self.trace
        options: Any = {"dtype": dtype or tensor.dtype, "memory_format": layout or torch.preserve_format}
        to_accelerator = device is not None and self.names_accelerator(device)
        if trace.is_host or device is None or trace.inside:
            target = torch.device(device) if device is not None and not to_accelerator else None
            if target is not None and target.type == "meta":
                return torch.Tensor.to(tensor, target, copy=copy, **options)
            # torch copies from "cpu" to "cpu:0", whose tensors are on "cpu" as well
            copy = copy or (target is not None and target.index is not None)
            return torch.Tensor.to(tensor, copy=copy, **options)
        is_there = self.is_on_target(tensor)
        if is_there == to_accelerator:
            return torch.Tensor.to(tensor, copy=copy, **options)
        if torch.device(device).type == "meta":
            return torch.Tensor.to(tensor, "meta", **options)
        if not to_accelerator:
            with trace.region(), trace.recorder.in_memory_pool(ON_HOST):
                out = torch.Tensor.to(tensor, copy=True, **options)
                trace.recorder.move(out, ON_HOST)
                return out
        if layout is not None and is_real(tensor):  # a batch of the script's job has it, too
            tensor = torch.Tensor.to(tensor, memory_format=layout)
        source = trace.twin(tensor) if is_real(tensor) else tensor
        with trace.region():
            out = torch.Tensor.to(source, copy=True, **options)
            life = trace.recorder.note_real(out, "to the device")
            life.memory_pool = ""
            if is_real(tensor):
                life.category = Category.INPUT
                trace.calls.note_copy(out, tensor)
        values = trace.recorder.concrete_values.of(source)
        if values is not None:
            trace.recorder.concrete_values.attach(out, values.to(out.dtype, copy=True))
        return out

    def _device(self, tensor: torch.Tensor) -> torch.device:
        plain: torch.device = torch.Tensor.device.__get__(tensor)
        if plain.type != HOST or self.trace.inside or not self.is_on_target(tensor):
            return plain
        return torch.device(self.target.type, 0)


@contextlib.contextmanager
def device_patches(trace: ScriptTrace, machine: Machine) -> Iterator[DeviceRedirect]:
    """Inside this context, accelerators that the script names stand for the target device (`DeviceRedirect`).
    Unless that is the host, torch says that this machine has it."""
    redirect = DeviceRedirect(trace)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _device_arguments(redirect):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        if not trace.is_host:
            stack.enter_context(mock.patch.object(FakeTensor, "device", property(redirect.device_of)))
            hooks = torch.autograd.graph.saved_tensors_hooks
            stack.enter_context(mock.patch.object(hooks, "__init__", _saved_tensors_hooks(redirect)))
            stack.enter_context(
                mock.patch.object(
                    torch.optim.Optimizer, "_accelerator_graph_capture_health_check", _answer(None)
                )
            )
            for owner, name, replacement in _present(trace, machine):
                stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
            if trace.recorder.kind.foreach:
                for module in [m for n, m in sys.modules.items() if n.startswith("torch.optim.")]:
                    if hasattr(module, "_default_to_fused_or_foreach"):
                        stack.enter_context(
                            mock.patch.object(module, "_default_to_fused_or_foreach", _use_foreach)
                        )
        stack.enter_context(redirect)
        yield redirect


def _saved_tensors_hooks(redirect: DeviceRedirect) -> Callable[..., None]:
    """Return a stand-in for ``saved_tensors_hooks.__init__`` whose hooks' copies between the device and the
    host are followed. No plans can be searched for a step with such hooks. Recomputation, which runs the
    model in a hook, is left as it is."""
    inner = torch.autograd.graph.saved_tensors_hooks.__init__

    @functools.wraps(inner)
    def init(self: Any, pack_hook: Callable[[Any], Any], unpack_hook: Callable[[Any], Any]) -> None:
        if type(self).__module__ != torch.utils.checkpoint.__name__:
            redirect.trace.calls.problem = redirect.trace.calls.problem or (
                "the step changes how tensors are saved for backward (saved_tensors_hooks)"
            )
            pack_hook, unpack_hook = redirect.follow_hook(pack_hook), redirect.follow_hook(unpack_hook)
        inner(self, pack_hook, unpack_hook)

    return init


def _device_arguments(redirect: DeviceRedirect) -> list[tuple[Any, str, Any]]:
    """Return patches (owner, name, replacement) of functions and classes of torch that take a device and no
    tensors."""
    load = torch.load

    @functools.wraps(load)
    def load_here(*args: Any, **kwargs: Any) -> Any:
        place = kwargs.get("map_location", args[1] if len(args) > 1 else None)
        if isinstance(place, str | torch.device) and redirect.names_accelerator(place):
            args, kwargs = args[:1], {**kwargs, "map_location": HOST}
        return load(*args, **kwargs)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = HOST) -> Any:
            redirect.names_accelerator(device)
            return super().__new__(cls, device=HOST)  # type: ignore[call-arg]

    scaler_init = torch.amp.GradScaler.__init__

    @functools.wraps(scaler_init)
    def scaler(self: Any, device: Any = CUDA, *args: Any, **kwargs: Any) -> None:
        scaler_init(self, HOST, *args, **kwargs)

    return [
        *autocast_on_host(functools.partial(redirect.names_accelerator, places=False)),
        (torch, "load", load_here),
        (torch, "set_default_device", functools.partial(_set_default_device, torch.set_default_device)),
        (
            torch,
            "set_default_tensor_type",
            functools.partial(_set_default_tensor_type, torch.set_default_tensor_type),
        ),
        *((torch.cuda, name, CudaTensorType(dtype, redirect)) for dtype, name in _TYPE_NAMES.items()),
        (torch, "Generator", Generator),
        (torch.amp.GradScaler, "__init__", scaler),
    ]


class CudaTensorType:
    """Stands for ``torch.cuda.FloatTensor`` and the like, which make tensors on the device and name their
    type."""

    def __init__(self, dtype: torch.dtype, redirect: DeviceRedirect) -> None:
        self.dtype, self.redirect = dtype, redirect

    def __call__(self, *arguments: Any) -> torch.Tensor:
        """Return an uninitialized tensor of these sizes, or a tensor with the data that is the only argument;
        an empty one without arguments."""
        data = arguments[0] if len(arguments) == 1 else arguments or (0,)
        if isinstance(data, int):
            data = torch.Size([data])
        if isinstance(data, torch.Size) or (len(arguments) != 1 and all(isinstance(n, int) for n in data)):
            return torch.empty(data, dtype=self.dtype, device=CUDA)
        return torch.as_tensor(data, dtype=self.dtype).to(CUDA)

    def __instancecheck__(self, value: Any) -> bool:
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and value.dtype == self.dtype and self.redirect.is_on_target(value)


def _tensor_type(name: Any) -> tuple[str, torch.dtype] | None:
    """Return (device, dtype) of a type of tensors, such as ``torch.cuda.FloatTensor`` or
    "torch.FloatTensor", or None for another value."""
    if isinstance(name, CudaTensorType):
        return CUDA, name.dtype
    if not isinstance(name, str):
        name = f"{getattr(name, '__module__', '')}.{getattr(name, '__name__', '')}"
    place, _, last = name.rpartition(".")
    dtype = next((dtype for dtype, known in _TYPE_NAMES.items() if known == last), None)
    if dtype is None or place not in ("torch", "torch.cuda"):
        return None
    return (CUDA if place == "torch.cuda" else HOST), dtype


def _set_default_tensor_type(inner: Callable[..., None], kind: Any) -> None:
    """Stands for ``torch.set_default_tensor_type``: types of tensors on the device set the default device and
    dtype."""
    target = _tensor_type(kind)
    if target is None or target[0] == HOST:
        inner(kind)
        return
    torch.set_default_dtype(target[1])
    torch.set_default_device(target[0])


def _set_default_device(inner: Callable[..., None], device: Any) -> None:
    """Stands for ``torch.set_default_device``: a `DeviceRedirect` sees the device that new tensors get."""
    _sort_modes(contexts_last=False)  # as torch has left them
    inner(device)
    _sort_modes(contexts_last=True)


def _sort_modes(*, contexts_last: bool) -> None:
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())][::-1]
    for mode in sorted(modes, key=lambda mode: isinstance(mode, DeviceContext) is contexts_last):
        _push_mode(mode)


def _use_foreach(params: Any, differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
    return False, not differentiable


class _Inert:
    """Stands for a stream, an event or a device context. Its methods do nothing and return it, except
    ``query`` (True) and ``elapsed_time`` (1.0)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *failure: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _present(trace: ScriptTrace, machine: Machine) -> list[tuple[Any, str, Any]]:
    """Return patches (owner, name, replacement) with which torch says that the target device is present."""
    device = machine.device
    total_bytes, count = int(device.memory_bytes.value), machine.device_count
    kind = trace.recorder.kind.name
    capability = trace.recorder.kind.compute_capability or (8, 0)
    multiprocessors = device.multiprocessor_count
    properties = python_types.SimpleNamespace(
        name=device.name,
        total_memory=total_bytes,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=100 if multiprocessors is None else int(multiprocessors.value),
        warp_size=32,
        is_integrated=False,
        gcnArchName="",
    )
    answers: Mapping[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": count,
        "current_device": 0,
        "current_device_index": 0,
        "current_device_idx": 0,
        "get_device_name": device.name,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "mem_get_info": (total_bytes, total_bytes),
        "memory_stats": {},
        "get_rng_state_all": [],
        "utilization": 0,
        "temperature": 0,
        "power_draw": 0,
        "initial_seed": 0,
        "memory_summary": "",
        "get_arch_list": [],
        "current_accelerator": torch.device(kind),
    }
    replacements: dict[str, Any] = {name: _answer(value) for name, value in answers.items()}
    replacements |= {name: _answer(0) for name in _NUMBERS}
    replacements |= dict.fromkeys(_INERT, _Inert)
    replacements |= {name: _answer(None) for name in _SILENT}
    replacements["get_rng_state"] = lambda *arguments, **options: torch.get_rng_state()
    replacements |= {name: _answer(False) for name in ("is_current_stream_capturing", "_is_in_bad_fork")}
    homes = [torch.accelerator, getattr(torch, kind, None), getattr(torch.backends, kind, None)]
    patches = []
    for home in filter(None, homes):
        patches += [(home, name, value) for name, value in replacements.items() if hasattr(home, name)]
        for part in (getattr(home, "memory", None), getattr(home, "random", None)):
            patches += [(part, name, value) for name, value in replacements.items() if hasattr(part, name)]
    # what torch's compiler imports where the device is present
    patches.append((torch._C, f"_{kind}_getCurrentRawStream", _answer(0)))
    patches.append((torch.nn.DataParallel, "forward", _on_one_device))
    if (nvtx := getattr(homes[1], "nvtx", None)) is not None:
        names = ("range_push", "range_pop", "mark", "range_start", "range_end")
        patches += [(nvtx, name, _answer(0)) for name in names]
    return patches


def _on_one_device(self: torch.nn.DataParallel[Any], *inputs: Any, **kwargs: Any) -> Any:
    """Stands for ``DataParallel.forward`` with one device."""
    return self.module(*inputs, **kwargs)


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: value
