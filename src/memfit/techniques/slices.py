"""Which modules work on independent slices of their inputs, and what they make inside: for chunking."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from memfit.techniques.dataflow import AnyWay, valueless

_MOST_PARAMETERS = 2**25  # of a module that is tried on random numbers
_MOST_TENSORS, _MOST_TRIALS = 6, 96
_MOST_ELEMENTS = 2**18  # of the inputs of a trial: a patch embedding, say, does not run on short ones
# Bytes that a trial may make, or this part of what the real call makes: no more than the training takes.
_MOST_INSIDE, _INSIDE_RATIO = 2**22, 1 / 16
_SHORT = (5, 7, 3, 11, 13, 9)  # lengths of the small copy's inputs
_FAR = (1024, 512, 256, 128, 64, 32)  # and lengths of what is cut, to see how far it reaches
_HELD_BELOW = 0.75  # share of a module's insides that its own modules must hold to be cut in its place
_SEEN: dict[object, tuple[object, dict[str, Call]]] = {}  # by what decides it: a search asks for many plans
_MOST_SEEN = 4
_WORTH = 4  # times its output that a module makes inside, for a search to look at cutting it


@dataclasses.dataclass(slots=True)
class Call:
    """A module's first call: leaves of its arguments (tensors without values) and what came of it."""

    leaves: list[Any]
    spec: Any
    inside_bytes: int = 0  # new tensors, the output aside
    out_shape: tuple[int, ...] | None = None
    out_bytes: int = 0
    columns_bytes: int = 0  # which convolutions in float64 unfold their inputs to
    random: bool = False  # draws random numbers: slices would draw others


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """``axes``: by place among the leaves, the axis along which that tensor is cut; ``first``: the leaf that
    lengths are read from."""

    axes: Mapping[int, int]
    first: int
    out_axis: int
    inside_bytes: int
    first_count: int


class _Watch(AnyWay):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}
        self._stack: list[Call] = []

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(self._entering, with_kwargs=True)
                module.register_forward_hook(self._leaving(name))

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._stack.append(Call(*_pytree.tree_flatten((args, kwargs))))

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            call = self._stack.pop()
            if self._stack:
                self._stack[-1].inside_bytes += call.inside_bytes
                self._stack[-1].columns_bytes += call.columns_bytes
                self._stack[-1].random |= call.random
            if isinstance(out, torch.Tensor):
                call.out_shape = tuple(out.shape)
                call.out_bytes = out.nbytes
                call.inside_bytes -= out.nbytes
            self.calls.setdefault(name, call)

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._stack:
            call = self._stack[-1]
            given = {_storage(t) for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            made = [t for t in _pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            call.inside_bytes += sum(t.nbytes for t in made if _storage(t) not in given)
            if func is torch.ops.aten.convolution.default:
                call.columns_bytes += out.nbytes // out.shape[1] * args[1][0].numel()
            call.random |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return out


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def insides(job: Any, model: nn.Module) -> dict[str, Call]:
    """Every module's first call in a forward pass of a copy without values."""
    parts = (job.build_model, job.make_batch, job.loss)
    tensors = tuple((n, t.dtype, tuple(t.shape)) for n, t in model.state_dict(keep_vars=True).items())
    wrapped = tuple(n for n, m in model.named_modules() if "forward" in vars(m) or m._forward_pre_hooks)
    key = (*map(id, parts), tensors, wrapped)
    if key not in _SEEN:
        watch = _Watch()
        with valueless(job, model) as (copied, batch):
            watch.watch(copied)
            with watch:
                job.loss(copied, batch)
        while len(_SEEN) >= _MOST_SEEN:
            del _SEEN[next(iter(_SEEN))]
        _SEEN[key] = (parts, watch.calls)  # held, so that their numbers stay theirs
    return _SEEN[key][1]


def to_cut(model: nn.Module, calls: Mapping[str, Call], budget: int) -> dict[str, Cut]:
    """The modules to cut, innermost first among those that hold the same tensors."""
    known: dict[object, Any] = {}

    def choose(name: str, module: nn.Module) -> dict[str, Cut]:
        call = calls.get(name)
        if call is not None and call.inside_bytes <= budget:
            return {}
        prefix = f"{name}." if name else ""
        below: dict[str, Cut] = {}
        for child, inner in module.named_children():
            below |= choose(prefix + child, inner)
        if call is None or sum(c.inside_bytes for c in below.values()) > _HELD_BELOW * call.inside_bytes:
            return below
        cut = _cut(module, call, known)
        return {name: cut} if cut is not None else below

    return choose("", model)


def largest(model: nn.Module, calls: Mapping[str, Call]) -> tuple[int, int]:
    """Bytes that the largest module which can be cut makes inside, and bytes that it gives out."""
    return max(((calls[n].inside_bytes, calls[n].out_bytes) for n in to_cut(model, calls, 0)), default=(0, 0))


def worth_cutting(job: Any, model: nn.Module) -> bool:
    """Whether some module makes much inside that can be cut along something else than the batch."""
    calls = insides(job, model)
    return any(
        calls[n].out_shape is not None
        and c.axes[c.first] > 0
        and c.inside_bytes > _WORTH * 4 * math.prod(calls[n].out_shape or ())
        for n, c in to_cut(model, calls, largest(model, calls)[0] // 2).items()
    )


# -- trial -----------------------------------------------------------------------------------------------


def _cut(module: nn.Module, call: Call, known: dict[object, Any]) -> Cut | None:
    if call.random or call.out_shape is None:
        return None
    tensors = {i: t for i, t in enumerate(call.leaves) if isinstance(t, torch.Tensor)}
    if not 0 < len(tensors) <= _MOST_TENSORS or not all(t.is_floating_point() for t in tensors.values()):
        return None
    if sum(p.numel() for p in module.parameters()) > _MOST_PARAMETERS:
        return None
    if not all(buffer.is_floating_point() for buffer in module.buffers()):
        return None  # random indices would point anywhere
    shapes = {i: tuple(t.shape) for i, t in tensors.items()}
    others = tuple(repr(v) for i, v in enumerate(call.leaves) if i not in tensors)
    parameters = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
    key = (type(module), tuple(shapes.items()), others, parameters, _constants(module))
    if key not in known:
        with _disable_current_modes(), torch.no_grad():
            known[key] = _tried(module, call, shapes)
    found = known[key]
    if found is None:
        return None
    axes, out_axis = found
    first = next(iter(axes))
    return Cut(
        axes=axes, first=first, out_axis=out_axis, inside_bytes=call.inside_bytes,
        first_count=math.prod(shapes[first]),
    )  # fmt: skip


_NOT_CONSTANT = {*vars(nn.Module()), "forward"}  # torch's own, and what techniques put around a module


def _constants(module: nn.Module) -> tuple[str, ...]:
    """What tells modules of one class apart beside their shapes, such as which way they sum or permute."""
    return tuple(
        f"{name}.{k}={_told(v)}"
        for name, m in module.named_modules()
        for k, v in vars(m).items()
        if k not in _NOT_CONSTANT
    )


def _told(value: Any, depth: int = 3) -> str:
    """Equal for values that are alike; what cannot be told is like itself alone."""
    if value is None or isinstance(value, int | float | str | bool | torch.dtype | torch.device):
        return repr(value)
    if depth and isinstance(value, tuple | list):
        return f"{type(value)}{[_told(v, depth - 1) for v in value]}"
    if depth and isinstance(value, dict):
        return str({str(k): _told(v, depth - 1) for k, v in value.items()})
    plain = not isinstance(value, torch.Tensor | nn.Module) and not callable(value)
    if depth and plain and hasattr(value, "__dict__"):
        return f"{type(value)}{_told(vars(value), depth - 1)}"
    return f"{type(value)} {id(value)}"


def _tried(module: nn.Module, call: Call, shapes: dict[int, tuple[int, ...]]) -> Any:
    """({leaf: axis}, output's axis) of the longest axis that can be cut, or None."""
    try:
        copied = _random_copy(module)
    except (RuntimeError, TypeError):  # what holds a file or a graph's tensor cannot be copied, so not tried
        return None
    numbers, run = torch.Generator().manual_seed(0), functools.partial(_ran, copied, call)

    def drawn(sizes: Mapping[int, tuple[int, ...]]) -> dict[int, torch.Tensor]:
        return {i: torch.randn(s, generator=numbers, dtype=torch.float64) for i, s in sizes.items()}

    def small(sizes: Mapping[int, tuple[int, ...]]) -> bool:
        """By what the real call makes inside, in float64: no dimension is longer here than there."""
        elements, real = (sum(map(math.prod, s.values())) for s in (sizes, shapes))
        made = 2 * (call.inside_bytes + call.columns_bytes) * elements / max(1, real)
        most = max(_MOST_INSIDE, _INSIDE_RATIO * call.inside_bytes)
        return elements <= _MOST_ELEMENTS and made <= most

    def runs(sizes: dict[int, tuple[int, ...]]) -> bool:
        return small(sizes) and run(drawn(sizes)) is not None

    def reaches(axes: Mapping[int, int], out_axis: int) -> bool:
        """Beyond its slice, where it is long."""
        far = _lengthened(shapes, sizes, axes, runs)
        if far is None:
            return False
        wide = drawn(far)
        told = run(wide)
        return told is None or out_axis not in _same(run, wide, told, axes)

    sizes = _shortened(shapes, runs)
    whole = drawn(sizes) if small(sizes) else {}
    expected = run(whole) if whole else None
    if expected is None:
        return None
    ways = ((axes, at) for axes in _ways(shapes, sizes) for at in _same(run, whole, expected, axes))
    return next((way for way in ways if not reaches(*way)), None)


def _ran(module: nn.Module, call: Call, tensors: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    leaves = [tensors.get(i, v) for i, v in enumerate(call.leaves)]
    args, kwargs = _pytree.tree_unflatten(leaves, call.spec)
    try:
        out = module(*args, **kwargs)
    except Exception:  # noqa: BLE001  any error says that the module does not take such shapes
        return None
    return out if isinstance(out, torch.Tensor) else None


def _lengthened(
    shapes: dict[int, tuple[int, ...]],
    sizes: dict[int, tuple[int, ...]],
    axes: Mapping[int, int],
    runs: Callable[[dict[int, tuple[int, ...]]], bool],
) -> dict[int, tuple[int, ...]] | None:
    """The same with what is cut as long as it is, or as long as can be tried: what reaches far, as dilated
    convolutions do, sees nothing beside itself in a short one."""
    first, axis = next(iter(axes.items()))
    length = shapes[first][axis], sizes[first][axis]
    for wanted in (length[0], *(n for n in _FAR if length[1] < n < length[0])):
        longer = {
            i: tuple(wanted if both == length else both[1] for both in zip(shapes[i], s, strict=True))
            for i, s in sizes.items()
        }
        if longer != sizes and runs(longer):
            return longer
    return None


def _random_copy(module: nn.Module) -> nn.Module:
    """With random float64 parameters: at zero, as some layers begin, everything would be independent."""
    numbers = torch.Generator().manual_seed(1)
    held: dict[int, Any] = {}
    for parameter in module.parameters():
        size = max(1, parameter.shape[-1] if parameter.dim() > 1 else 1)
        values = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64) / size**0.5
        held[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        held[id(buffer)] = torch.randn(buffer.shape, generator=numbers, dtype=torch.float64)
    plain = copy.deepcopy(module, held)
    for inner in plain.modules():
        vars(inner).pop("forward", None)  # what other techniques put around it
        for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
            hooks.clear()
    return plain


def _shortened(
    shapes: dict[int, tuple[int, ...]], runs: Callable[[dict[int, tuple[int, ...]]], bool]
) -> dict[int, tuple[int, ...]]:
    """Long dimensions made short where the module still runs: equal ones together, all of them or all but
    last ones (of every tensor or of one), which may be channels of the same number."""
    lengths = sorted({n for s in shapes.values() for n in s if n > max(_SHORT)}, reverse=True)
    shorts = dict(zip(lengths, itertools.cycle(_SHORT), strict=False))
    everywhere, none = frozenset[int](), frozenset(shapes)
    ways = [
        [everywhere, none, *(frozenset({i}) for i, s in shapes.items() if s and s[-1] == n), None]
        for n in lengths
    ]
    for kept in itertools.islice(itertools.product(*ways), _MOST_TRIALS):
        last_stays = dict(zip(lengths, kept, strict=True))

        def size(i: int, at: int, stays: Mapping[int, frozenset[int] | None] = last_stays) -> int:
            length = shapes[i][at]
            held = stays.get(length)
            whole = held is None or (i in held and at == len(shapes[i]) - 1)
            return length if whole else shorts[length]

        tried = {i: tuple(size(i, at) for at in range(len(s))) for i, s in shapes.items()}
        if runs(tried):
            return tried
    return shapes


def _ways(shapes: dict[int, tuple[int, ...]], sizes: dict[int, tuple[int, ...]]) -> Iterator[dict[int, int]]:
    """Ways to cut: an axis of the largest tensor, longest first, and of the others one as long or none."""
    first = max(shapes, key=lambda i: math.prod(shapes[i]))
    others = [i for i in shapes if i != first]
    long = [a for a, n in enumerate(sizes[first]) if n >= 3 and shapes[first][a] > 3]
    for axis in sorted(long, key=lambda a: -shapes[first][a]):
        length = shapes[first][axis], sizes[first][axis]
        same: list[list[int | None]] = [
            [*(a for a, n in enumerate(zip(shapes[i], sizes[i], strict=True)) if n == length), None]
            for i in others
        ]
        for chosen in itertools.islice(itertools.product(*same), _MOST_TRIALS):
            yield {first: axis} | {i: a for i, a in zip(others, chosen, strict=True) if a is not None}


def _same(
    run: Callable[[Mapping[int, torch.Tensor]], torch.Tensor | None],
    whole: Mapping[int, torch.Tensor],
    expected: torch.Tensor,
    axes: Mapping[int, int],
) -> Iterator[int]:
    """Axes of the output whose slices are those of the inputs."""
    length = next(whole[i].shape[a] for i, a in axes.items())
    slices = [(0, 2), (length // 2 - 1, 2), (length - 2, 2)]
    found = [
        run({i: t.narrow(axes[i], *part) if i in axes else t for i, t in whole.items()}) for part in slices
    ]
    for axis, size in enumerate(expected.shape):
        if size == length and all(
            out is not None
            and out.shape == (wanted := expected.narrow(axis, *part)).shape
            and torch.allclose(out, wanted, rtol=1e-9, atol=1e-12)
            for out, part in zip(found, slices, strict=True)
        ):
            yield axis
