"""Fingerprints of this rank's gradients between backward and the optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from memfit.conformance.fingerprints import as_real, fingerprint
from memfit.conformance.observation import Figures, GradientFigures
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import fsdp_groups, in_backward, layers, mesh_placements, meshes_of, shape

_FSDP = (
    "torch.distributed.fsdp._fully_shard._fsdp_param_group",
    "torch.distributed._composable.fsdp._fsdp_param_group",
)


class GradientProbe:
    """Records fingerprints of this rank's gradients between `__enter__` and `__exit__`. Records nothing if
    the plan has only one data-parallel and context-parallel rank. Figures are the numbers of a fingerprint
    (fingerprints.py). All mappings have parameter names as keys.

    - ``local``: the figures of the gradient that this rank's backward passes made, before any reduction over
      ranks, followed by the sum of its squares. Both are added up over the passes, from the last time on that
      gradients were reset.
    - ``backward``, ``before``, ``after``: the figures of what this rank holds of the gradient after the last
      backward, and before and after the optimizer's last step.
    - ``began``: whether gradients already existed when the first backward began; None before it.
    - ``waiting``: whether FSDP2 had not reduced some gradients when the optimizer stepped last.
    - ``hooked``: whether trained parameters had hooks of the user at `__enter__` that run after a gradient is
      accumulated and may change it.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.local: dict[str, torch.Tensor] = {}
        self.backward: Figures = {}
        self.before: Figures = {}
        self.after: Figures = {}
        self.began: bool | None = None
        self.waiting = False
        self.hooked = False
        self._filled = False
        self._names: dict[int, str] = {}
        # Kept here, because modules may hold gathered parameters in the meantime.
        self._params: list[nn.Parameter] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        prepared = self._prepared
        if prepared.layout.data * prepared.layout.context == 1:
            return self
        self._names = {id(p): n for n, p in prepared.model.named_parameters() if p.requires_grad}
        self._params = list(prepared.trainable())
        for param in self._params:
            self.hooked |= bool(getattr(param, "_post_accumulate_grad_hooks", None))
            handle = param.register_hook(functools.partial(self._add_local, self._names[id(param)]))
            self._stack.callback(handle.remove)
        self._patch(torch.autograd, "backward", self._backward)
        for layer in layers(prepared.optimizer):
            has_hooks = hasattr(layer, "_optimizer_step_pre_hooks")
            if has_hooks:  # hooks of others run first
                self._stack.callback(layer.register_step_pre_hook(lambda *_: self._stepping()).remove)
            self._patch(layer, "step", functools.partial(self._step, has_hooks))
        if (module := _fsdp_module()) is not None:
            self._patch(module, "foreach_reduce", self._reduce)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def observed(self, *, only: Container[str] | None = None) -> GradientFigures:
        """Return what was recorded so far. In ``local``, only parameters whose names are in ``only`` are
        returned, or all if ``only`` is None. ``has_user_hooks`` is true for communication hooks of DDP and,
        with fsdp2, for hooks in ``hooked``."""
        prepared = self._prepared
        has_comm_hooks = any(getattr(m, "_comm_hooks", None) for m in prepared.model.modules())
        return GradientFigures(
            local={n: numbers.tolist() for n, numbers in self.local.items() if only is None or n in only},
            backward=self.backward,
            before=self.before,
            after=self.after,
            began=bool(self.began),
            waiting=self.waiting,
            has_user_hooks=has_comm_hooks or (self.hooked and "fsdp2" in prepared.plan),
        )

    def _patch(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        inner = getattr(target, name)
        call = functools.wraps(inner)(functools.partial(wrapper, inner))
        with contextlib.suppress(AttributeError):  # an object without settable attributes
            self._stack.enter_context(mock.patch.object(target, name, call))

    def _add_local(self, name: str, grad: torch.Tensor) -> None:
        local = as_real(getattr(grad, "_local_tensor", grad).detach())
        squares = torch.linalg.vector_norm(
            local.coalesce().values() if local.is_sparse else local, dtype=torch.float64
        ).square()
        numbers = torch.cat([fingerprint(local), squares[None]])
        previous = self.local.get(name)
        self.local[name] = numbers if previous is None else previous + numbers

    def _reduce(self, inner: Any, params: Any, grads: Iterable[torch.Tensor], *args: Any, **kw: Any) -> Any:
        """Record ``grads``, the gradients of ``params`` that FSDP2 is about to reduce, and return the result
        of ``inner``, FSDP2's function that reduces them. FSDP2's layers compute with other tensors than the
        model's parameters, so that hooks on these do not see their gradients."""
        for param, grad in zip(params, grads := list(grads), strict=True):
            if (name := self._names.get(id(param.sharded_param))) is not None:
                self._add_local(name, grad)
        return inner(params, grads, *args, **kw)

    def _backward(self, inner: Any, *args: Any, **kwargs: Any) -> None:
        if in_backward():
            inner(*args, **kwargs)
            return
        has_gradients = _any(self._read())
        if self.began is None:
            self.began = has_gradients
        if self._filled and not has_gradients:  # gradients were reset: sharpness-aware steps, LBFGS
            self.local.clear()
        inner(*args, **kwargs)
        self.backward = self._read()
        self._filled = _any(self.backward)

    def _stepping(self) -> None:
        self.before = self._read() or self.before  # an outer optimizer may already have taken the gradients
        self.waiting = any(id(p) in self._names for p in _unreduced(self._prepared))

    def _step(self, hooked: bool, inner: Any, *args: Any, **kwargs: Any) -> Any:
        if not hooked:
            self._stepping()
        out = inner(*args, **kwargs)
        self.after = self._read()
        return out

    def _read(self) -> Figures:
        with meshes_of(self._prepared.plan, self._prepared.model):
            gradients = list(_own_gradients(self._prepared, self._params))
        pieces = [(n, piece) for piece in gradients if (n := self._names.get(id(piece.of))) is not None]
        if not pieces:
            return {}
        fingerprints = [fingerprint(p.values, p.start, p.columns).cpu() / p.copies for _, p in pieces]
        totals: dict[str, list[float]] = {}
        for (name, _), values in zip(pieces, torch.stack(fingerprints).tolist(), strict=True):
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * len(values)), values, strict=True)]
        return totals


def _any(readings: Figures) -> bool:
    return any(map(any, readings.values()))


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """``values``: adjacent elements of the gradient of parameter ``of``, whose first has the index ``start``
    in the flattened gradient. ``copies``: number of ranks of a shard group that hold the same values, for
    example if FSDP2 shards other parameters, but not this one; 1 if each has others. ``columns``: elements
    per row (index along dimension 0) of the parameter, twice as many if it is complex."""

    of: nn.Parameter
    start: int
    values: torch.Tensor
    copies: int = 1

    @property
    def columns(self) -> int:
        local = getattr(self.of, "_local_tensor", None)
        count = math.prod(local.shape[1:] if local is not None else shape(self.of)[1:])
        return count * (2 if self.of.is_complex() else 1)


def _fsdp_module() -> Any:
    for name in _FSDP:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


def _own_gradients(prepared: Prepared, params: list[nn.Parameter]) -> Iterator[_Piece]:
    """Yield the gradients with which this rank updates: of ``params`` (the model's trained parameters) whole
    or as DTensors, or the parts that memfit's ZeRO and sharded DDP, DeepSpeed's ZeRO or FairScale keep on
    this rank. Gradients whose elements on this rank are not adjacent are left out."""
    plain_copies = prepared.layout.shard * prepared.layout.context if "fsdp2" in prepared.plan else 1
    for layer in layers(prepared.optimizer):
        if hasattr(layer, "own_gradients"):  # memfit's ZeRO and sharded DDP
            yield from itertools.starmap(_Piece, layer.own_gradients())
            return
        if isinstance(getattr(layer, "averaged_gradients", None), Mapping):
            yield from _deepspeed(layer)
            return
        # FairScale's; gradients of other ranks' parameters are stale
        if callable(getattr(layer, "partition_parameters", None)):
            groups = layer.partition_parameters()[dist.get_rank(layer.group)]
            params = [p for group in groups for p in group["params"]]
            break
    for param in params:
        # main_grad is Megatron's.
        grad = getattr(param, "main_grad", None) if param.grad is None else param.grad
        if grad is not None and (start := _starts(param)) is not None:
            copies = 1 if hasattr(param, "placements") else plain_copies
            yield _Piece(param, start, getattr(grad, "_local_tensor", grad), copies)


def _deepspeed(optimizer: Any) -> Iterator[_Piece]:
    """Yield the gradients that DeepSpeed's ZeRO optimizer keeps on this rank. Stages 1 and 2 keep a range of
    the concatenated parameters, so that its first parameter may begin in the middle. Stage 3 keeps a part of
    each parameter."""
    partitions = getattr(optimizer, "params_in_partition", None)
    for group, grads in optimizer.averaged_gradients.items():
        params = partitions[group] if partitions is not None else optimizer.fp16_groups[group]
        for index, (param, grad) in enumerate(zip(params, grads or (), strict=False)):  # padding follows
            if partitions is None:
                start = dist.get_rank(param.ds_process_group) * param.ds_tensor.ds_numel
            else:
                start = 0 if index else int(optimizer.first_offset[group])
            yield _Piece(param, start, grad)


def _starts(param: nn.Parameter) -> int | None:
    """Return the index, in the flattened parameter, of the first element on this rank; 0 for a plain tensor.
    Under tensor parallelism, it is the index within the part of the tensor-parallel rank. Return None if the
    elements on this rank are not adjacent: the parameter is sharded along another dimension than 0, other
    than by tensor parallelism."""
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None:
        return 0
    start, rows = 0, param.shape[0] if param.dim() else 1
    cuts = [
        (i, tensor_parallel, p.dim)
        for i, (p, tensor_parallel) in enumerate(mesh_placements(param))
        if hasattr(p, "dim")
    ]
    for index, tensor_parallel, dim in cuts:
        if tensor_parallel and dim == 0:
            rows = math.ceil(rows / mesh.size(index))
    for index, tensor_parallel, dim in cuts:
        if not tensor_parallel:
            if dim:
                return None
            start = math.ceil(rows / mesh.size(index)) * mesh.get_local_rank(index)
    return start * math.prod(param._local_tensor.shape[1:])  # type: ignore[attr-defined]


def _unreduced(prepared: Prepared) -> Iterator[nn.Parameter]:
    """Yield the sharded parameters of FSDP2 whose gradients still wait to be reduced, over the ranks of a
    shard group or among replicas."""
    for group in fsdp_groups(prepared.model):
        partly_reduced = getattr(group, "_partial_reduce_output", None) is not None
        for param in group.fsdp_params:
            full_param = getattr(param, "_unsharded_param", None)
            accumulated_grad = getattr(param, "unsharded_accumulated_grad", None)
            if (
                partly_reduced
                or accumulated_grad is not None
                or getattr(full_param, "grad", None) is not None
            ):
                yield param.sharded_param
