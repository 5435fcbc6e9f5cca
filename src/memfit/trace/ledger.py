"""The ledger: every storage's birth and death, every operator call, in the order they happen.

Storages are what is counted, views once, rounded to the device's granularity (64 B on CPU, c10's
alignment; 512 B on CUDA, the caching allocator's smallest block).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

from memfit.trace.signature import describe, moved_bytes
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan

GRANULARITY_BYTES = {"cpu": 64, "cuda": 512}
_PACKAGE = f"{Path(__file__).parents[1]}/"
_STEP = f"{_PACKAGE}jobs/step.py"  # whoever calls the training step wrote none of its tensors
_NOT_THE_USERS = (_PACKAGE, "/torch/", "/lib/python3", "<")
_ITEM = torch.ops.aten._local_scalar_dense.default


@dataclasses.dataclass(slots=True)
class _Life:
    start: int
    size_bytes: int
    phase: Phase
    step: int
    module: str
    op: str
    line: str
    end: int | None = None
    category: Category | None = None


class Ledger(TorchDispatchMode):
    """Enter inside a FakeTensorMode. ``phase()`` marks the step's phases; ``label()`` names storages."""

    def __init__(self, device: str, *, lines: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity_bytes = GRANULARITY_BYTES[device]
        self.lines = lines
        self.clock = 0
        self.step = 0
        self.current = Phase.SETUP
        self.lives: list[_Life] = []
        self.ops: list[OpCall] = []
        self.spans: list[PhaseSpan] = []
        self.assumptions: dict[str, None] = {}
        self.modules = ModuleStack()
        self.offloaded_bytes = 0
        self._span_start = 0
        self._known: dict[int, tuple[weakref.ref[Any], _Life]] = {}
        self._line_of_node: dict[int, str] = {}

    # -- what the step tells ------------------------------------------------------------------------

    def phase(self, phase: Phase) -> None:
        self._close_span()
        self.current = phase

    def next_step(self) -> None:
        self.step += 1

    def label(self, value: Any, category: Category, *, module: str | None = None) -> None:
        """Name the storages of every tensor in ``value``, and whose they are; births that nobody saw are
        noted now."""
        for tensor in _pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                for inner in plain_tensors(tensor):
                    life = self._note(inner, category.value)
                    life.category = category
                    life.module = life.module if module is None else module

    def note_real(self, tensor: torch.Tensor, op: str) -> None:
        """A tensor that never passes the dispatcher."""
        self._note(tensor, op)

    def note_offload(self, size_bytes: int) -> None:
        self.offloaded_bytes += size_bytes

    # -- what torch does ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, kwargs)
        if any(type(t) is not FakeTensor and is_traceable_wrapper_subclass(t) for t in inputs):
            return NotImplemented  # its inner operators come here one by one
        if func is _ITEM:
            return self._answer(args[0])
        before = self.clock
        self.clock += 1
        out = func(*args, **kwargs)
        name = str(func)
        outputs = tensors_in(out)
        for tensor in outputs:
            self._note(tensor, name)
        if not _is_view(func):
            self._record(func, name, before, (args, kwargs, out), inputs + outputs)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs more than the bookkeeping

    def _answer(self, tensor: torch.Tensor) -> bool | int | float:
        """``.item()`` has no value under fake tensors. True, 1 and 1.0 keep ordinary code going."""
        answer = True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1
        if self.current in (Phase.OPTIMIZER, Phase.SETUP):
            return answer  # an optimizer reads its own step count
        where = user_line()
        self.assumptions[
            f".item() on {tensor.dtype} answered {answer}" + (f" at {where}" if where else "")
        ] = None
        return answer

    def _note(self, tensor: torch.Tensor, op: str) -> _Life:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return known[1]
        size_bytes = -(-storage.nbytes() // self.granularity_bytes) * self.granularity_bytes
        module = self.modules.name(self.current)
        line = self._line() if self.lines else ""
        life = _Life(self.clock, size_bytes, self.current, self.step, module, op, line)
        self.clock += 1
        self.lives.append(life)
        self._known[key] = (weakref.ref(storage, self._death(key, life)), life)
        return life

    def _line(self) -> str:
        """In backward, the line whose forward made the autograd node that runs."""
        line = user_line()
        if self.current is Phase.FORWARD:
            self._line_of_node.setdefault(newest_node(), line)
        elif not line and self.current is Phase.BACKWARD:
            node: Any = torch._C._current_autograd_node()
            line = self._line_of_node.get(node._sequence_nr(), "") if node is not None else ""
        return line

    def _death(self, key: int, life: _Life) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            life.end = self.clock
            self.clock += 1
            if (known := self._known.get(key)) is not None and known[1] is life:
                del self._known[key]

        return died

    def _record(self, func: Any, name: str, clock: int, call: Any, tensors: list[torch.Tensor]) -> None:
        args, kwargs, out = call
        count = flop_registry.get(func.overloadpacket) or _EXTRA_FLOPS.get(func)
        self.ops.append(
            OpCall(
                clock=clock,
                op=name,
                signature=describe(name, args, kwargs),
                phase=self.current,
                step=self.step,
                module=self.modules.name(self.current),
                dtype=_dtype(tensors),
                flops=int(count(*args, **kwargs, out_val=out)) if count else 0,
                moved_bytes=moved_bytes(tensors),
            )
        )

    # -- what comes out -----------------------------------------------------------------------------

    def _close_span(self) -> None:
        if self.clock > self._span_start:
            self.spans.append(
                PhaseSpan(phase=self.current, step=self.step, start=self._span_start, end=self.clock)
            )
        self._span_start = self.clock

    def finish(self) -> tuple[tuple[Allocation, ...], tuple[OpCall, ...], tuple[PhaseSpan, ...]]:
        self._close_span()
        ends = {s.end for s in self.spans}
        bounds = sorted(ends)
        return tuple(self._allocation(x, bounds) for x in self.lives), tuple(self.ops), tuple(self.spans)

    def _allocation(self, life: _Life, bounds: list[int]) -> Allocation:
        import bisect

        category = life.category
        if category is None:
            index = bisect.bisect_right(bounds, life.start)
            phase_end = bounds[index] if index < len(bounds) else self.clock
            outlives = life.end is None or life.end >= phase_end
            saved = life.phase is Phase.FORWARD and outlives
            category = Category.ACTIVATION if saved else Category.TEMPORARY
        return Allocation(
            start=life.start, end=life.end, size_bytes=life.size_bytes, category=category, phase=life.phase,
            step=life.step, module=life.module, op=life.op, line=life.line,
        )  # fmt: skip


class ModuleStack:
    """Which module is at work: the forward stack, and in backward the module whose forward made the
    autograd node that runs (by its sequence number)."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._by_node: dict[int, str] = {}
        self._handles: list[Any] = []

    def watch(self, model: torch.nn.Module) -> None:
        names = {id(m): n for n, m in model.named_modules()}

        def enter(module: torch.nn.Module, args: Any) -> None:
            if id(module) in names:
                self._stack.append(names[id(module)])

        def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
            if id(module) in names and self._stack:
                self._stack.pop()

        hooks = torch.nn.modules.module
        self._handles.append(hooks.register_module_forward_pre_hook(enter))
        self._handles.append(hooks.register_module_forward_hook(leave, always_call=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def name(self, phase: Phase) -> str:
        if self._stack:
            name = self._stack[-1]
            if phase is Phase.FORWARD:
                self._by_node.setdefault(newest_node(), name)
            return name
        if phase is Phase.BACKWARD:
            node: Any = torch._C._current_autograd_node()
            return self._by_node.get(node._sequence_nr(), "") if node is not None else ""
        return ""


def newest_node() -> int:
    """Sequence number of the autograd node made last: the one whose operator is at work, in forward."""
    return torch._C._autograd._get_sequence_nr() - 1


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes: a wrapper subclass's inner ones, else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [p for t in inner if isinstance(t, torch.Tensor) for p in plain_tensors(t)]


def user_line() -> str:
    """``file.py:12`` of the innermost frame outside torch, memfit and the standard library; of memfit, a
    built-in job's own code counts. Empty where the training step itself or the optimizer allocates."""
    frame: Any = sys._getframe(1)
    while frame is not None and (path := frame.f_code.co_filename) != _STEP:
        own = any(part in path for part in _NOT_THE_USERS)
        if not own or path.startswith(f"{_PACKAGE}jobs/") or "/site-packages/transformers/models/" in path:
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _is_view(func: Any) -> bool:
    return bool(func.is_view) or func in _NO_WORK


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Tensors among arguments, in order; a hand-made walk because this runs for every operator."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def _dtype(tensors: list[torch.Tensor]) -> str:
    """The dtype the arithmetic runs in: the first floating input's, else the first output's."""
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            return _name(tensor.dtype)
    return "int64"


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Two products of (queries x keys x head dim) per head; shapes (batch, heads, length, dim)."""
    batch, heads, queries, dim = query.shape
    return int(2 * batch * heads * queries * key.shape[2] * (dim + value.shape[3]))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Five products in backward (the scores again, then dV, dP, dQ, dK)."""
    return _attention_flops(query, key, value) * 5 // 2


_ATEN: Any = torch.ops.aten
_EXTRA_FLOPS: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_flops,
}
_NO_WORK = frozenset({_ATEN.detach.default, _ATEN._unsafe_view.default, _ATEN.empty.memory_format})
