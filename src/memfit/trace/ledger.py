"""The ledger: every storage's birth and death, every operator call, in the order they happen.

Storages are what is counted, views once, rounded to the device's granularity (64 B on CPU, c10's
alignment; 512 B on CUDA, the caching allocator's smallest block).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils.flop_counter import flop_registry

from memfit.trace.guesses import Guesses
from memfit.trace.lines import ModuleStack, newest_node, running_node, user_line
from memfit.trace.signature import describe, moved_bytes
from memfit.types.errors import UserError
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan

GRANULARITY_BYTES = {"cpu": 64, "cuda": 512}


@dataclasses.dataclass(slots=True)
class _Life:
    start: int
    size_bytes: int
    phase: Phase
    step: int
    module: str
    op: str
    line: str
    node: int  # sequence number of the autograd node at work in backward
    end: int | None = None
    category: Category | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Fact:
    """What is always true of an operator; ``silent`` ones do no work and make no storage."""

    name: str
    silent: bool
    resizes: bool
    count: Callable[..., int] | None  # of floating-point operations


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What equal calls of an operator share."""

    signature: str
    dtype: str
    flops: int
    moved_bytes: int


class Ledger(TorchDispatchMode):
    """Enter inside a FakeTensorMode. ``phase()`` marks the step's phases; ``label()`` names storages."""

    def __init__(self, device: str, *, lines: bool = False, guesses: Guesses | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity_bytes = GRANULARITY_BYTES[device]
        self.lines = lines
        self.clock = 0
        self.step = 0
        self.current = Phase.SETUP
        self.lives: list[_Life] = []
        self.spans: list[PhaseSpan] = []
        self.modules = ModuleStack()
        self.guesses = guesses or Guesses()
        self.offloaded_bytes = 0
        self.paused = False
        self._span_start = 0
        self._known: dict[int, tuple[weakref.ref[Any], _Life]] = {}
        self._calls: list[tuple[int, str, _Work, Phase, int, str]] = []
        self._works: dict[Any, _Work] = {}
        self._sole = sole_counts()
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
                    life = self.note_real(inner, category.value)
                    life.category = category
                    life.module = life.module if module is None else module

    def note_real(self, tensor: torch.Tensor, op: str) -> _Life:
        """A tensor that never passes the dispatcher."""
        return self._note(tensor, op, self.modules.name(self.current))

    def note_offload(self, size_bytes: int) -> None:
        self.offloaded_bytes += size_bytes

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has grown or shrunk in place: the old block's life ends, the new one's begins."""
        known = self._known.get(storage._cdata)
        size_bytes = self._rounded(storage.nbytes())
        if known is None or known[0]() is None or known[1].size_bytes == size_bytes:
            return
        reference, old = known
        # As torch does it: the new block is there before the contents move and the old one goes.
        life = self._born(size_bytes, old.op, old.module, old.category)
        self._end(old)
        self._known[storage._cdata] = (reference, life)

    # -- what torch does ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind is not FakeTensor and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # its inner operators come here one by one
        if self.paused:
            return func(*args, **kwargs)
        fact = _fact(func)
        if fact.silent:
            out = func(*args, **kwargs)
            if func in _MAKERS:
                self._note(out, fact.name, self.modules.name(self.current))
            return out
        if func is _ITEM:
            return self.guesses.item(args[0], told=self.current not in (Phase.OPTIMIZER, Phase.SETUP))
        module = self.modules.name(self.current)
        owners = self._owners(args) if not module and self.current in (Phase.SETUP, Phase.OPTIMIZER) else []
        module = module or (owners[0] if len(owners) == 1 else "")
        before = self.clock
        self.clock += 1
        if func is _ADD and self.current is Phase.BACKWARD and self._accumulates(*args, **kwargs):
            out = args[0]
        else:
            out = self.guesses.call(func, args, kwargs)
        outputs = tensors_in(out)
        each = len(owners) == len(outputs) > 1
        for i, tensor in enumerate((*self.guesses.scratch, *outputs)):
            self._note(tensor, fact.name, owners[i] if each else module)
            if fact.resizes:
                self.resized(tensor.untyped_storage())
        self.guesses.scratch.clear()
        key = (func, _key(args), _key(kwargs) if kwargs else ())
        work = self._works.get(key)
        if work is None:
            work = self._works[key] = _work(fact, args, kwargs, out, tensors_in(args, kwargs) + outputs)
        self._calls.append((before, fact.name, work, self.current, self.step, module))
        return out

    def _owners(self, args: Any) -> list[str]:
        """Whose the first argument is, or each of a list's: outside forward and backward what an operator
        makes belongs to the module of the parameter it works on."""
        first = args[0] if args else None
        tensors = first if isinstance(first, list | tuple) else [first]
        return [self._owner(t) for t in tensors if isinstance(t, torch.Tensor)]

    def _owner(self, tensor: torch.Tensor) -> str:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[1].module if known is not None else ""

    def unseen(self, build: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
        """``build`` without a record of it: its tensors are noted when they are labelled."""

        def quietly() -> torch.nn.Module:
            self.paused = True
            try:
                return build()
            finally:
                self.paused = False

        return quietly

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs more than the bookkeeping

    def _accumulates(self, held: Any, more: Any, **kwargs: Any) -> bool:
        """Whether this sum is the autograd engine adding one gradient to another that only it holds. It
        then adds in place (torch/csrc/autograd/input_buffer.cpp), though never with fake tensors.

        The engine's sum has a first term that an earlier node made, or this node for two edges to one
        place; a formula's own sums start from what the formula made.
        """
        if kwargs or torch.is_grad_enabled() or not isinstance(more, torch.Tensor):
            return False
        storage = held.untyped_storage()
        counts = held._use_count(), torch._C._storage_Use_Count(storage._cdata)
        dense = held.numel() * held.element_size() == storage.nbytes()
        node: Any = torch._C._current_autograd_node()
        known = self._known.get(storage._cdata)
        if counts != self._sole or not dense or node is None or known is None:
            return False
        twice = len(set(node.next_functions)) < len(node.next_functions)
        return twice or known[1].node != running_node()

    def _note(self, tensor: torch.Tensor, op: str, module: str) -> _Life:
        storage = strided_storage(tensor)
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            return known[1]
        life = self._born(self._rounded(storage.nbytes()), op, module)
        self._known[key] = (weakref.ref(storage, self._death(key)), life)
        return life

    def _line(self) -> str:
        """In backward, the line whose forward made the autograd node that runs."""
        line = user_line()
        if self.current is Phase.FORWARD:
            self._line_of_node.setdefault(newest_node(), line)
        elif not line and self.current is Phase.BACKWARD:
            line = self._line_of_node.get(running_node(), "")
        return line

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self.granularity_bytes) * self.granularity_bytes

    def _born(self, size_bytes: int, op: str, module: str, category: Category | None = None) -> _Life:
        line = self._line() if self.lines else ""
        node = running_node() if self.current is Phase.BACKWARD else 0
        life = _Life(
            self.clock, size_bytes, self.current, self.step, module, op, line, node, category=category
        )
        self.clock += 1
        self.lives.append(life)
        return life

    def _end(self, life: _Life) -> None:
        life.end = self.clock
        self.clock += 1

    def _death(self, key: int) -> Callable[[Any], None]:
        def died(reference: Any) -> None:
            known = self._known.get(key)
            if known is not None and known[0] is reference:
                self._end(known[1])
                del self._known[key]

        return died

    # -- what comes out -----------------------------------------------------------------------------

    def _close_span(self) -> None:
        if self.clock > self._span_start:
            self.spans.append(
                PhaseSpan(phase=self.current, step=self.step, start=self._span_start, end=self.clock)
            )
        self._span_start = self.clock

    def finish(self) -> tuple[tuple[Allocation, ...], tuple[OpCall, ...], tuple[PhaseSpan, ...]]:
        self._close_span()
        bounds = sorted({s.end for s in self.spans})
        ops = tuple(_op_call(*call) for call in self._calls)
        return tuple(self._allocation(x, bounds) for x in self.lives), ops, tuple(self.spans)

    def _allocation(self, life: _Life, bounds: list[int]) -> Allocation:
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


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes: a wrapper subclass's inner ones, else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [p for t in inner if isinstance(t, torch.Tensor) for p in plain_tensors(t)]


def strided_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Raises UserError for layouts whose bytes are not one storage."""
    if tensor.layout is torch.strided:
        return tensor.untyped_storage()
    where = user_line()
    raise UserError(
        f"a {str(tensor.layout)[6:]} tensor" + (f" at {where}" if where else ""),
        allowed="dense tensors",
        hint="sparse gradients come from nn.Embedding(sparse=True); take that out",
    )


@functools.cache
def sole_counts() -> tuple[int, int]:
    """References to a tensor and to its storage, as a dispatch mode sees them, when the autograd engine
    alone holds the tensor: seen on ``x * x``, whose two gradients meet."""
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD:
                storage = args[0].untyped_storage()
                seen.append((args[0]._use_count(), torch._C._storage_Use_Count(storage._cdata)))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.enable_grad(), Watch():  # type: ignore[no-untyped-call]
        root = torch.ones(2, requires_grad=True).sin()
        (root * root).sum().backward()
    return seen[0]


@functools.cache
def _fact(func: Any) -> _Fact:
    count = flop_registry.get(func.overloadpacket) or _EXTRA_FLOPS.get(func)
    silent = bool(func.is_view) or func in _MAKERS or func in _NO_WORK
    return _Fact(
        str(func), silent, "resize" in func._schema.name or func._schema.name.endswith("set_"), count
    )


def _work(fact: _Fact, args: Any, kwargs: Any, out: Any, tensors: list[torch.Tensor]) -> _Work:
    return _Work(
        signature=describe(fact.name, args, kwargs),
        dtype=_dtype(tensors),
        flops=int(fact.count(*args, **kwargs, out_val=out)) if fact.count else 0,
        moved_bytes=moved_bytes(tensors),
    )


def _op_call(clock: int, name: str, work: _Work, phase: Phase, step: int, module: str) -> OpCall:
    return OpCall(
        clock=clock, op=name, signature=work.signature, phase=phase, step=step, module=module,
        dtype=work.dtype, flops=work.flops, moved_bytes=work.moved_bytes,
    )  # fmt: skip


def _key(value: Any) -> Any:
    """Equal for arguments of equal shapes, strides, dtypes and plain values. This runs for every operator."""
    kind = type(value)
    if kind is FakeTensor or isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.untyped_storage().nbytes())
    if kind is tuple or isinstance(value, list | tuple):
        return tuple([_key(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _key(v)) for k, v in value.items()])
    return value if kind is int or value is None else (kind, str(value))


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
_ITEM = _ATEN._local_scalar_dense.default
_ADD = _ATEN.add.Tensor
_NO_WORK = frozenset({_ATEN.detach.default, _ATEN._unsafe_view.default})
_MAKERS = frozenset({_ATEN.empty.memory_format, _ATEN.empty_strided.default})  # storage, but no work
