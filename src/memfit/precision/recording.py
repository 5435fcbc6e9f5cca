"""Record one training step in float32 call by call.

Recorded are what each module received and returned, and the gradients of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.precision.tensors import is_float, leaves, rebuild
from memfit.types.errors import UserError

# Errors that a precision may cause. Errors of a user's job file are raised as UserError.
FAILURES: Final = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, UserError)
LOSS: Final = "<loss>"  # the job's own loss function, around the model
# Operators that compute nothing: they move, copy or create tensors.
_MOVING = """
clone copy_ _to_copy cat stack index index_select gather arange detach zeros ones full empty eye
zeros_like ones_like full_like empty_like fill_ new_zeros new_ones new_full new_empty scalar_tensor
lift_fresh zero_ repeat constant_pad_nd _unsafe_view _reshape_alias flip roll scatter tril triu
max_pool2d_with_indices max_pool3d_with_indices pixel_shuffle native_dropout bernoulli_
"""
_MOVES: Final = frozenset(_MOVING.split())


@dataclasses.dataclass(slots=True, eq=False)
class RecordedCall:
    """A call of one module.

    ``path``: of the module, or LOSS for the job's loss function. ``inputs``: copies of (args, kwargs);
    ``output``: a copy of the result. ``input_grads``, ``output_grads``: the gradients of their tensors, by
    the index of the tensor in the order of `leaves`; tensors without a gradient are absent. ``inner``: the
    calls that the module's own code makes of other modules, in order. ``computes``: whether the module's own
    code makes floating-point tensors by computing, not by moving, copying or creating them. ``dtypes``: name
    of a mode -> (dtypes of the tensors of inputs, those of output) in a real run in that mode; empty for a
    mode without such a run."""

    path: str
    inputs: Any = None
    output: Any = None
    input_grads: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    output_grads: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    inner: list[RecordedCall] = dataclasses.field(default_factory=list)
    computes: bool = False
    dtypes: dict[str, tuple[list[torch.dtype], list[torch.dtype]]] = dataclasses.field(default_factory=dict)

    def all(self) -> Iterator[RecordedCall]:
        """Yield this call and all calls within it, each before its inner calls."""
        yield self
        for call in self.inner:
            yield from call.all()


def record(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], torch.Tensor], *, backward: bool = True
) -> RecordedCall:
    """Run the loss and, with ``backward``, its backward, without dropout. Return the root of the tree of
    recorded calls: the call of the loss function, whose inner calls are those of modules. Without
    ``backward`` no gradients are recorded. Errors of the loss are raised as they are."""
    root = RecordedCall(LOSS, inputs=((batch,), {}))
    recorder = _Watch(model, root)
    with recorder, _Computing(recorder.stack), deterministic():
        output = loss(model, batch)
    root.output = output.detach().clone()
    root.output_grads = {0: torch.ones_like(output)}
    if backward:
        output.backward()
        model.zero_grad(set_to_none=True)
    return root


class _Watch:
    def __init__(self, model: nn.Module, root: RecordedCall) -> None:
        self.model, self.stack, self.handles = model, [root], list[Any]()

    def __enter__(self) -> _Watch:
        for path, module in self.model.named_modules():
            before, after = self._before(path), self._after
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, prepend=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, path: str) -> Callable[..., Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = RecordedCall(path, inputs=_copy_value((args, kwargs)))
            self.stack[-1].inner.append(call)
            self.stack.append(call)
            return _with_gradient_hooks((args, kwargs), call.input_grads)

        return enter

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.stack.pop()
        call.output = _copy_value(output)
        for index, tensor in enumerate(leaves(output)):
            if tensor.requires_grad and is_float(tensor):
                tensor.register_hook(_keeping(call.output_grads, index))


def _copy_value(value: Any) -> Any:
    """Return a copy of the value with detached copies of its tensors, which require gradients if the
    originals do.

    A tensor that occurs twice gets one copy, because code may test whether query and key are identical."""
    memo: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return rebuild(value, keep)


def _with_gradient_hooks(value: Any, grads: dict[int, torch.Tensor]) -> Any:
    """Return a copy of the value with an alias in place of each floating-point tensor that requires
    gradients. In backward, ``grads`` gets the gradient of each alias, by the index of the tensor's first
    occurrence in the order of `leaves`. It is the gradient that comes from this call alone."""
    memo: dict[int, torch.Tensor] = {}
    count = -1

    def alias(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if not (tensor.requires_grad and is_float(tensor) and torch.is_grad_enabled()):
            return tensor
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.view_as(tensor)
            memo[id(tensor)].register_hook(_keeping(grads, count))
        return memo[id(tensor)]

    return rebuild(value, alias)


def _keeping(grads: dict[int, torch.Tensor], index: int) -> Callable[[torch.Tensor], None]:
    def keep(grad: torch.Tensor) -> None:
        grads[index] = grad.detach().clone()

    return keep


class _Computing(TorchDispatchMode):
    """Mode that sets ``computes`` of a call when its own code makes floating-point tensors by computing, not
    by moving, copying or creating them. ``stack``: the calls that are running, innermost last."""

    def __init__(self, stack: list[RecordedCall]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = self.stack[-1]
        if not call.computes and not func.is_view and func.overloadpacket.__name__ not in _MOVES:
            call.computes = any(is_float(t) for t in leaves(result))
        return result


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within the context, disable dropout: functions with "dropout" in their names return their input, and
    attention and recurrent networks get a dropout of 0. The host's random generator starts from seed 0, and
    its state is restored afterwards. Generators of accelerators are left alone, because modules are examined
    on the host."""
    with torch.random.fork_rng(devices=[]), _WithoutDropout():
        torch.manual_seed(0)
        yield


# Functions that drop elements inside, where no mode sees it.
_WITH_DROPOUT: Final = frozenset(
    {"scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"}
)


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensor = args[0] if args else kwargs.get("input")
        if "dropout" in name and isinstance(tensor, torch.Tensor):
            return tensor
        if name in _WITH_DROPOUT:  # the only float among their positional arguments
            args = tuple(0.0 if isinstance(a, float) else a for a in args)
            kwargs |= {k: 0.0 for k in ("dropout_p", "dropout") if k in kwargs}
        return func(*args, **kwargs)


def learn_dtypes(root: RecordedCall, mode: str, run: Callable[[], RecordedCall]) -> None:
    """Set ``dtypes[mode]`` of ``root`` and every call within it from the calls of ``run()``, which records
    the same step in another precision. Set nothing if ``run`` raises one of `FAILURES` or does not make the
    same calls."""
    try:
        narrow_root = run()
    except FAILURES:
        return
    pairs = list(zip(root.all(), narrow_root.all(), strict=False))
    if [c.path for c in root.all()] != [c.path for c in narrow_root.all()]:
        return
    for call, narrow_call in pairs:
        call.dtypes[mode] = (
            [t.dtype for t in leaves(narrow_call.inputs)],
            [t.dtype for t in leaves(narrow_call.output)],
        )
