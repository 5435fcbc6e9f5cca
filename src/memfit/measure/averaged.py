"""Whether the gradients that an update is given are the mean of what all ranks' backward passes made.

Of each parameter one figure is taken twice: of its gradient as this rank's backward made it, and of what is
there before the update, of this rank's shard where it is sharded. It is a sum of the elements, each times a
number that belongs to its place: linear, so the figures of the update are one multiple of the mean of the
ranks', whoever averages and however, and shards' add up. Loss scaling and clipping by the norm change the
multiple only. (Plain sums would not do: those of transformers' gradients are mostly nothing.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from memfit.measure.held import from_all, in_backward, layers, shape

if TYPE_CHECKING:
    from memfit.measure.conform import Watch

_ROUNDING, _ROUNDING_BF16 = 2.0**-20, 2.0**-8  # of many sums in float32; gradients may be reduced in bfloat16
_SURE = 10  # times what rounding can do, squared
_AT_ONCE = 2**20  # elements
_SPREAD_RATIO = 0.01  # squared, of how far ranks lie from their mean: nearer to it is at it
_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")
_FSDP = ("torch.distributed.fsdp._fully_shard._fsdp_param_group",
         "torch.distributed._composable.fsdp._fsdp_param_group")  # fmt: skip

_TENSOR = ("tensor", "tp")  # dimensions of a mesh
Figures = dict[str, float]


class Averages:
    """Listens between `__enter__` and `__exit__`. ``own``: of each parameter, by name, the figure of its
    gradient on this rank and the sum of squares; ``readings``: figures of what was there after backward and
    before the optimizer's steps; ``began``: gradients of an earlier pass were there when listening began."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.own: dict[str, torch.Tensor] = {}
        self.readings: list[Figures] = []
        self.began: bool | None = None
        self._filled = False
        self._names: dict[int, str] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        watch = self._watch
        if watch.layout.data * watch.layout.context == 1:
            return self
        self._names = {id(p): n for n, p in watch.model.named_parameters() if p.requires_grad}
        for param in watch.trainable():
            handle = param.register_hook(functools.partial(self._made, self._names[id(param)]))
            self._stack.callback(handle.remove)
        self._patch(torch.autograd, "backward", self._backward)
        for layer in layers(watch.optimizer):
            self._patch(layer, "step", self._step)
        with contextlib.suppress(ImportError):
            self._patch(_fsdp_module(), "foreach_reduce", self._reduce)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _patch(self, of: Any, name: str, around: Callable[..., Any]) -> None:
        inner = getattr(of, name)
        call = functools.wraps(inner)(functools.partial(around, inner))
        with contextlib.suppress(AttributeError):  # an object that takes no attributes
            self._stack.enter_context(mock.patch.object(of, name, call))

    def _made(self, name: str, grad: torch.Tensor) -> None:
        local = getattr(grad, "_local_tensor", grad).detach()
        values = local.coalesce().values() if local.is_sparse else local
        squares = torch.linalg.vector_norm(values, dtype=torch.float64).square()
        two = torch.stack([figure(local.to_dense() if local.is_sparse else local), squares])
        before = self.own.get(name)
        self.own[name] = two if before is None else before + two

    def _reduce(self, inner: Any, params: Any, grads: Iterable[torch.Tensor], *args: Any, **kw: Any) -> Any:
        """FSDP2's layers compute with other tensors than the parameters: what it is about to reduce."""
        for param, grad in zip(params, grads := list(grads), strict=True):
            if (name := self._names.get(id(param.sharded_param))) is not None:
                self._made(name, grad)
        return inner(params, grads, *args, **kw)

    def _backward(self, inner: Any, *args: Any, **kwargs: Any) -> None:
        if in_backward():
            inner(*args, **kwargs)
            return
        there = any(self._read().values())
        if self.began is None:
            self.began = there
        if self._filled and not there:  # somebody begins anew: sharpness-aware steps, LBFGS
            self.own.clear()
        inner(*args, **kwargs)
        self._note()
        self._filled = any(self.readings[-1].values())

    def _step(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self._note()
        return inner(*args, **kwargs)

    def _note(self) -> None:
        self.readings.append(self._read())

    def _read(self) -> Figures:
        pieces = [(n, part) for part in _held(self._watch) if (n := self._names.get(id(part.of))) is not None]
        if not pieces:
            return {}
        figures = [figure(p.values, p.start, p.columns).cpu() for _, p in pieces]
        found: Figures = collections.defaultdict(float)
        for (name, _), value in zip(pieces, torch.stack(figures).tolist(), strict=True):
            found[name] += value
        return dict(found)


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """``values``: those of a gradient that lie together, from element ``start`` on."""

    of: nn.Parameter
    start: int
    values: torch.Tensor

    @property
    def columns(self) -> int:
        wide = shape(self.of)[1:]
        local = getattr(self.of, "_local_tensor", None)
        return math.prod(local.shape[1:] if local is not None else wide)


def figure(values: torch.Tensor, start: int = 0, columns: int | None = None) -> torch.Tensor:
    """Of elements from ``start`` on, of a tensor whose rows (dimension 0) have so many of them."""
    columns = columns or math.prod(values.shape[1:])
    flat = values.detach().reshape(-1)
    head = min(-start % columns, flat.numel())
    body = head + (flat.numel() - head) // columns * columns
    row, first = divmod(start, columns)
    after = row + bool(head)
    blocks = (
        (flat[:head].view(1, -1), row, first),
        (flat[head:body].view(-1, columns), after, 0),
        (flat[body:].view(1, -1), after + (body - head) // columns, 0),
    )
    found = flat.new_zeros((), dtype=torch.float64)
    for block, at, column in blocks:
        if not block.numel():
            continue
        rows, across = _wave(at, block.shape[0], 2.4, block), _wave(column, block.shape[1], 1.9, block)
        size = max(1, _AT_ONCE // block.shape[1])  # rows, so that copies stay small
        for part, by in zip(block.split(size), rows.split(size), strict=True):
            found += ((part.float() @ across) * by).sum(dtype=torch.float64)
    return found


def _wave(first: int, count: int, turn: float, like: torch.Tensor) -> torch.Tensor:
    places = torch.arange(first, first + count, dtype=torch.float64, device=like.device)
    return (places * turn + 0.5).cos().float()


def _fsdp_module() -> Any:
    for name in _FSDP:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ImportError(f"none of {_FSDP}")


def _held(watch: Watch) -> Iterator[_Piece]:
    """What of gradients this rank's update is given."""
    params = list(watch.trainable())
    for layer in layers(watch.optimizer):
        if hasattr(layer, "own_gradients"):  # memfit's ZeRO and sharded DDP
            yield from itertools.starmap(_Piece, layer.own_gradients())
            return
        if isinstance(getattr(layer, "averaged_gradients", None), Mapping):
            yield from _deepspeed(layer)
            return
        if callable(getattr(layer, "partition_parameters", None)):  # FairScale's: others' are stale
            groups = layer.partition_parameters()[dist.get_rank(layer.group)]
            params = [p for group in groups for p in group["params"]]
            break
    for param in params:
        grad = getattr(param, "main_grad", None) if param.grad is None else param.grad  # Megatron's
        if grad is not None and (start := _starts(param)) is not None:
            yield _Piece(param, start, getattr(grad, "_local_tensor", grad))


def _deepspeed(optimizer: Any) -> Iterator[_Piece]:
    """Stages 1 and 2 keep a stretch of all parameters one behind the other, stage 3 a part of each."""
    stretches = getattr(optimizer, "params_in_partition", None)
    for group, grads in optimizer.averaged_gradients.items():
        params = stretches[group] if stretches is not None else optimizer.fp16_groups[group]
        for index, (param, grad) in enumerate(zip(params, grads or (), strict=False)):  # then padding
            if stretches is None:
                start = dist.get_rank(param.ds_process_group) * param.ds_tensor.ds_numel
            else:
                start = 0 if index else int(optimizer.first_offset[group])
            yield _Piece(param, start, grad)


def _starts(param: nn.Parameter) -> int | None:
    """Where this rank's elements of it begin, of its part under tensor parallelism; None: they do not lie
    together."""
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None:
        return 0
    names, start = mesh.mesh_dim_names or ("",) * mesh.ndim, 0
    rows = param.shape[0] if param.dim() else 1
    cuts = [(i, n, p.dim) for i, (p, n) in enumerate(zip(param.placements, names, strict=True))  # type: ignore[attr-defined]
            if hasattr(p, "dim")]  # fmt: skip
    for index, name, dim in cuts:
        if name in _TENSOR and dim == 0:
            rows = math.ceil(rows / mesh.size(index))
    for index, name, dim in cuts:
        if name not in _TENSOR:
            if dim:
                return None
            start = math.ceil(rows / mesh.size(index)) * mesh.get_local_rank(index)
    return start * math.prod(param._local_tensor.shape[1:])  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rank:
    """``group``: where it is along all dimensions but those of gradients' mean; ``copy``: which of the
    several holders of a whole gradient it belongs to."""

    group: tuple[int, ...]
    copy: tuple[int, ...]
    own: dict[str, tuple[float, float]]
    readings: tuple[Figures, ...]
    began: bool


def mean_gradients(watch: Watch) -> None:
    """Gradients of the update are the mean over all ranks that have the same parameters."""
    if watch.layout.data * watch.layout.context == 1:
        return
    feature = next((u.technique for u in watch.plan.uses if u.technique in _AVERAGING), "replicas")
    feature = f"{feature}: mean of gradients"
    staged = watch.plan.get("pipeline")
    if watch.plan.get("expert-parallel") is not None:
        watch.unseen(f"{feature}: experts are not the same on all ranks")
        return
    if staged is not None and str(staged.settings["schedule"]).startswith("zero-bubble"):
        watch.unseen(f"{feature}: those of weights come apart from backward")
        return
    every: list[_Rank] = from_all(_this_rank(watch))
    groups = [[r for r in every if r.group == g] for g in dict.fromkeys(r.group for r in every)]
    found = [_judge(group) for group in groups]
    if reasons := [f for f in found if isinstance(f, str)]:
        watch.unseen(f"{feature}: {reasons[0]}")
        return
    off, near = max((f for f in found if not isinstance(f, str)), key=lambda f: f[0] / f[1])
    if off > near and any(getattr(m, "_comm_hooks", None) for m in watch.model.modules()):
        watch.unseen(f"{feature}: a communication hook makes something else of them")
        return
    watch.differs(
        feature, f"the mean of {watch.layout.data * watch.layout.context} ranks'",
        f"{math.sqrt(off):.0%} away from it: not reduced over all of them", wrong=off > near,
    )  # fmt: skip


def _this_rank(watch: Watch) -> _Rank:
    averages, place = watch.averages, watch.layout.coordinate(dist.get_rank())
    group = tuple(v for name, v in place.items() if name not in {"replicate", "shard", "context"})
    inside = {"shard", "context"} if watch.plan.get("fsdp2") is not None else {"shard"}
    sharded = any(watch.sharded(what)[0] > 1 for what in ("optimizer state", "gradients"))
    copy = tuple(v for name, v in place.items() if not (sharded and name in inside))
    cut = _cut_names(watch) if watch.layout.tensor > 1 else None
    own = {n: (float(t[0]), float(t[1])) for n, t in averages.own.items() if cut is None or n in cut}
    return _Rank(group, copy, own, tuple(averages.readings), bool(averages.began))


def _cut_names(watch: Watch) -> set[str]:
    """Of parameters that tensor parallelism cuts: gradients of others may be parts of sums over its ranks."""

    def cut(param: nn.Parameter) -> bool:
        mesh, placements = getattr(param, "device_mesh", None), getattr(param, "placements", ())
        names = (getattr(mesh, "mesh_dim_names", None) or ()) if mesh is not None else ()
        by_mesh = any(p.is_shard() and n in _TENSOR for p, n in zip(placements, names, strict=False))
        return by_mesh or bool(getattr(param, "tensor_model_parallel", False))

    return {n for n, p in watch.model.named_parameters() if cut(p)}


def _judge(group: list[_Rank]) -> tuple[float, float] | str:
    """(squared distance from the mean, how far it may be), both as ratios; or why nothing can be said."""
    if any(r.began for r in group):
        return "an earlier pass had left some"
    if not all(r.own for r in group):
        return "none were seen on their way"
    names = sorted(set[str]().union(*(r.own for r in group)))
    own = torch.tensor([[r.own.get(n, (0.0, 0.0)) for n in names] for r in group], dtype=torch.float64)
    sums, squares = own[..., 0], own[..., 1].mean(0)
    mean = sums.mean(0)
    size = mean.square().sum()
    if not bool(own.isfinite().all()) or not float(size):
        return "they are not finite, or nothing"
    spread = float(((sums - mean).square().sum(1) / size).max())
    near, noise = _SPREAD_RATIO * spread / (1 + spread), _SURE * float(squares.sum() / size)
    if near < noise * _ROUNDING**2:
        return "ranks' own hardly differ"
    copies = [[r for r in group if r.copy == c] for c in dict.fromkeys(r.copy for r in group)]
    offs = [off for copy in copies if (off := _nearest(copy, names, mean)) is not None]
    if len(offs) < len(copies):
        return "what the update is given was not found"
    if near < max(offs) <= noise * _ROUNDING_BF16**2:
        return "ranks' own hardly differ, in bfloat16"
    return max(offs), near


def _nearest(copy: list[_Rank], names: list[str], mean: torch.Tensor) -> float | None:
    """How far the best of what was read lies from a multiple of the mean; None: no reading has them all."""
    found = []
    for reading in zip(*(r.readings for r in copy), strict=False):
        there = set[str]().union(*reading)
        missing = torch.tensor([n not in there for n in names])
        given = torch.tensor([sum(s.get(n, 0.0) for s in reading) for n in names], dtype=torch.float64)
        size = float(given.square().sum())
        if not size or not math.isfinite(size) or float(mean[missing].abs().max() if missing.any() else 0):
            continue
        times = float((mean * given).sum() / mean.square().sum())
        found.append(float((given - times * mean).square().sum()) / size)
    return min(found, default=None)
