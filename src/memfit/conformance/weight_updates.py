"""Observe whether a training step trains: which weights it changes, with which gradients, and what the
optimizer holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn

from memfit.conformance.fingerprints import as_real
from memfit.conformance.observation import ObservedOptimizer, OptimizerGroup, WeightFigures
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import in_backward, layers, mesh_placements, own_shard, shape
from memfit.techniques.optimizers import innermost
from memfit.types.device_kind import HOST

_MOST_OPTIMIZERS = 8  # whose steps are observed; optimizers in backward are one for each parameter
_AT_ONCE = 2**20  # elements
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 1_000_003


class WeightUpdates:
    """Records between `__enter__` and `__exit__` which trained parameters change, and the largest absolute
    value of each one's gradients, which stays on the parameter's device until `observed`."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._params: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] | None = None
        self._largest_weights: dict[str, Any] = {}
        self._largest_before: dict[str, Any] = {}
        self._arrived: dict[str, Any] = {}
        self._unread = set[str]()
        self._at_update: dict[str, Any] = {}
        self._is_updating = False  # the optimizer steps, and may run backward in it
        self._ran = set[int]()
        self._listens_to_modules = False
        self._updates_count: int | None = None
        self._groups: list[OptimizerGroup] = []
        self._masters: dict[str, torch.Tensor] = {}
        self._foreign: list[tuple[torch.Tensor, Any]] = []  # with their digests before the step
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        prepared = self._prepared
        self._params = {n: p for n, p in prepared.model.named_parameters() if p.requires_grad}
        self._names = {id(p): n for n, p in self._params.items()}
        self._before = {n: _digest(own_shard(p)) for n, p in self._params.items()}
        matrices = {n: p for n, p in self._params.items() if len(shape(p)) > 1}
        shards = {n: own_shard(p) for n, p in matrices.items()}
        self._largest_before = {n: _largest(s) for n, s in shards.items() if _local(s) is not None}
        self._masters = _masters(prepared.optimizer, self._params)
        tensors = _tensors(prepared.optimizer) or {}
        self._foreign = [(t, _digest(t)) for t in _split_tensors(tensors, self._params)[1]]
        for name, param in self._params.items():
            handle = param.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, name))
            self._stack.callback(handle.remove)
        optimizers = _torch_optimizers(prepared.optimizer)
        if 0 < len(optimizers) <= _MOST_OPTIMIZERS:
            self._updates_count = 0
            for optimizer in optimizers:
                self._stack.callback(optimizer.register_step_pre_hook(self._on_update).remove)
                self._stack.callback(optimizer.register_step_post_hook(self._on_updated).remove)
        self._listens_to_modules = "compile" not in prepared.plan
        for block in prepared.blocks if self._listens_to_modules else ():
            for module in block.modules():
                self._stack.callback(module.register_forward_pre_hook(self._on_forward).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._after = {n: _digest(own_shard(p)) for n, p in self._params.items()}
        self._largest_weights = {n: _largest(own_shard(p)) for n, p in self._params.items()}

    # -- listening ------------------------------------------------------------------------------------

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if not in_backward():
            self._ran.add(id(module))

    def _on_gradient(self, name: str, param: nn.Parameter) -> None:
        if param.grad is None:  # an earlier hook has taken it
            self._unread.add(name)
            return
        largest = _largest(param.grad)
        _keep_larger(self._arrived, name, largest)
        if self._is_updating:
            _keep_larger(self._at_update, name, largest)

    def _on_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._is_updating = True
        self._groups = [*self._groups, *_groups(optimizer, self._names)]
        for group in optimizer.param_groups:
            for param in group["params"]:
                if (name := self._names.get(id(param))) is not None:
                    _keep_larger(self._at_update, name, 0.0 if param.grad is None else _largest(param.grad))

    def _on_updated(self, *_: Any) -> None:
        self._is_updating = False
        self._updates_count = (self._updates_count or 0) + 1

    def before_update(self) -> None:
        """Record the largest gradient of each parameter that has one now and of which no hook recorded one
        when it arrived. To be called before an update."""
        for name, param in self._params.items():
            if param.grad is not None and name not in self._arrived:
                _keep_larger(self._arrived, name, _largest(param.grad))

    # -- what was observed ----------------------------------------------------------------------------

    def observed(self) -> WeightFigures:
        """Return what was recorded on this rank. Without `__enter__` and `__exit__`, only what the optimizer
        holds."""
        prepared = self._prepared
        params = self._params or {n: p for n, p in prepared.model.named_parameters() if p.requires_grad}
        optimizer = _observed_optimizer(prepared.optimizer, params)
        if self._after is None:
            return WeightFigures(optimizer=optimizer)
        changed_ids = {id(t) for t, digest in self._foreign if _integer(digest) != _integer(_digest(t))}
        if optimizer is not None:
            groups = tuple(self._groups) or optimizer.groups  # at the update, before a scheduler steps
            optimizer = dataclasses.replace(optimizer, foreign_changed=len(changed_ids), groups=groups)
        arrived = {n: float(v) for n, v in self._arrived.items()}
        gradients = {**dict.fromkeys(self._unread), **arrived}
        at_update = {n: float(v) for n, v in self._at_update.items()}
        for name, value in at_update.items():
            if value:
                gradients.setdefault(name, value)
        known = {n for n, digest in self._before.items() if digest is not None and self._after[n] is not None}
        return WeightFigures(
            optimizer=optimizer,
            compared=frozenset(known),
            changed=frozenset(n for n in known if _integer(self._before[n]) != _integer(self._after[n])),
            not_finite=frozenset(n for n, v in self._largest_weights.items() if not math.isfinite(v)),
            gradients=gradients,
            gradients_at_update=at_update,
            were_zero={n: float(v) == 0 for n, v in self._largest_before.items()},
            updates=self._updates_count,
            ran=self._ran_names() if self._listens_to_modules else None,
            masters={n: _equal(m, self._params[n]) for n, m in self._masters.items() if id(m) in changed_ids},
        )

    def _ran_names(self) -> frozenset[str]:
        blocks = self._prepared.blocks
        owners = (m for block in blocks for m in block.modules() if id(m) in self._ran)
        ids = {id(p) for m in owners for p in m.parameters(recurse=False)}
        return frozenset(n for n, p in self._params.items() if id(p) in ids)


# -- tensors ----------------------------------------------------------------------------------------------


def _local(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the part of a tensor on this rank: of a sparse tensor its stored values, of a complex one a view
    as real numbers. Return None if it is freed, empty, on the meta device or made of other tensors."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor).detach()
    if hasattr(local, "__tensor_flatten__") or local.is_meta:
        return None
    if local.is_sparse:
        local = local._values()
    return as_real(local) if local.numel() and local.untyped_storage().nbytes() else None


def _largest(tensor: torch.Tensor) -> Any:
    """Return the largest absolute value of a tensor's part on this rank, as a float for tensors on the host,
    else as a scalar tensor. It is NaN if the part contains a NaN, and 0 if there is no such part (`_local`)
    or it is not floating-point."""
    local = _local(tensor)
    if local is None or not local.is_floating_point():
        return 0.0
    largest = torch.linalg.vector_norm(local, float("inf"))
    return float(largest) if local.device.type == HOST else largest


def _keep_larger(table: dict[str, Any], name: str, value: Any) -> None:
    before = table.get(name, 0.0)
    if isinstance(before, torch.Tensor) or isinstance(value, torch.Tensor):
        tensor = value if isinstance(value, torch.Tensor) else before
        table[name] = torch.maximum(torch.as_tensor(before).to(tensor), torch.as_tensor(value).to(tensor))
    else:
        table[name] = value if value != value or value > before else before  # not a number stays


def _digest(tensor: torch.Tensor) -> Any:
    """Return a digest of the bits of a tensor's part on this rank, or None if there is none. On an
    accelerator, it is a tensor of one integer there: no values are copied to the host."""
    local = _local(tensor)
    if local is None:
        return None
    if local.device.type == HOST:
        return hashlib.sha256(local.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
    flat = local.contiguous().view(-1).view(_INTEGERS[local.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 2**31, (min(_AT_ONCE, flat.numel()),), generator=generator).to(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(_AT_ONCE):
        total = total * _PRIME + (part.to(torch.int64) * factors[: part.numel()]).sum()
    return total


def _integer(digest: Any) -> Any:
    return int(digest) if isinstance(digest, torch.Tensor) else digest


def _equal(master: torch.Tensor, param: torch.Tensor) -> bool:
    ours, theirs = _local(own_shard(param)), _local(master)
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.device != theirs.device:
        return False
    return torch.equal(theirs.to(ours.dtype), ours)


# -- the optimizer ----------------------------------------------------------------------------------------


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and all that it wraps, each once; nothing for None."""
    if optimizer is not None:
        yield from {id(o): o for o in (*layers(optimizer), *innermost(optimizer))}.values()


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return those of the innermost wrapped optimizers that are torch optimizers; [] for None."""
    return [o for o in innermost(optimizer) if isinstance(o, torch.optim.Optimizer)] if optimizer else []


def _param_groups(optimizer: Any) -> Iterator[Mapping[str, Any]]:
    for inner in _optimizers(optimizer):
        groups = getattr(inner, "param_groups", None)
        if isinstance(groups, list):
            yield from groups


def _tensors(optimizer: Any) -> dict[int, torch.Tensor] | None:
    """Return, by their ids, the tensors in the parameter groups of ``optimizer`` and of all that it wraps.
    Return None if none of them has a group, or if ``optimizer`` is None."""
    groups = list(_param_groups(optimizer))
    if not groups:
        return None
    return {id(t): t for g in groups for t in g.get("params", ()) if isinstance(t, torch.Tensor)}


def _storage(tensor: torch.Tensor) -> int | None:
    local = _local(tensor)
    return None if local is None else local.untyped_storage().data_ptr()


def _observed_optimizer(optimizer: Any, params: Mapping[str, nn.Parameter]) -> ObservedOptimizer | None:
    tensors = _tensors(optimizer)
    if tensors is None:
        return None
    own_names, foreign = _split_tensors(tensors, params)
    missing_shapes = {shape(p) for n, p in params.items() if n not in own_names and mesh_placements(p)}
    unsharded = sum(not mesh_placements(t) and tuple(t.shape) in missing_shapes for t in foreign)
    names = {id(p): n for n, p in params.items()}
    return ObservedOptimizer(
        parameters=own_names,
        foreign=len(foreign),
        unsharded=unsharded,
        groups=tuple(g for o in _torch_optimizers(optimizer) for g in _groups(o, names)),
    )


def _split_tensors(
    tensors: Mapping[int, torch.Tensor], params: Mapping[str, nn.Parameter]
) -> tuple[frozenset[str], list[torch.Tensor]]:
    """Return (names of the parameters that are among ``tensors`` or share memory with one of them; those of
    ``tensors`` that require gradients, are no parameters and share no memory with one)."""
    storages = {s for t in tensors.values() if (s := _storage(t)) is not None}
    own = {n: _storage(own_shard(p)) for n, p in params.items()}
    own_names = frozenset(n for n, p in params.items() if id(p) in tensors or own[n] in storages)
    ids, own_storages = {id(p) for p in params.values()}, set(own.values())
    foreign = [
        t
        for i, t in tensors.items()
        if i not in ids and t.requires_grad and (_storage(t) is None or _storage(t) not in own_storages)
    ]
    return own_names, foreign


def _masters(optimizer: Any, params: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the optimizer's copies of the parameters that it does not hold itself, by the parameters' names:
    tensors of the same shape and, rounded to the parameter's dtype, the same values. Return {} if the tensors
    of the optimizer are unknown."""
    tensors = _tensors(optimizer)
    if tensors is None:
        return {}
    own_names, foreign = _split_tensors(tensors, params)
    queues: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for tensor in foreign:
        queues.setdefault(tuple(tensor.shape), []).append(tensor)
    pairs = {}
    for name, param in params.items():
        queue = queues.get(tuple(param.shape), [])
        if name not in own_names and queue and _equal(queue[0], param):
            pairs[name] = queue.pop(0)
    return pairs


def _groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[OptimizerGroup]:
    """Return the parameter groups of an optimizer, with the names of the model's parameters in them."""
    default = _number(optimizer.defaults.get("lr"))
    return [
        OptimizerGroup(
            names=frozenset(names[id(p)] for p in group["params"] if id(p) in names),
            rate=_number(group.get("lr")),
            initial_rate=_number(group.get("initial_lr")),
            default_rate=default,
        )
        for group in optimizer.param_groups
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | torch.Tensor) else None
