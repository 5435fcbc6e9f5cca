"""How many elements of a prepared model and its optimizer this rank holds, whoever prepared them."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from memfit.types.plan import Plan

_DEEP = 8  # wrappers of wrappers of an optimizer


def whole(param: nn.Parameter) -> int:
    """Elements before data-parallel sharding, of this rank's part under tensor parallelism."""
    if lets_go(param):
        return math.prod(shape(param))
    mesh: Any = getattr(param, "device_mesh", None)
    cut = [mesh.size(i) for i, (p, tensor) in enumerate(placed(param)) if p.is_shard() and tensor]
    return math.ceil(param.numel() / int(math.prod(cut)))


_TENSOR = ("tensor", "tp", "model", "mp", "tensor_parallel", "tensor_model_parallel")
_UNNAMED_IS_TENSOR: contextvars.ContextVar[bool] = contextvars.ContextVar("unnamed is tensor", default=False)


@contextlib.contextmanager
def meshes_of(plan: Plan, model: nn.Module) -> Iterator[None]:
    """A mesh without names is that of tensor parallelism where the plan has it and nothing else shards."""
    alone = plan.get("tensor-parallel") is not None and not any(True for _ in fsdp_groups(model))
    token = _UNNAMED_IS_TENSOR.set(alone)
    try:
        yield
    finally:
        _UNNAMED_IS_TENSOR.reset(token)


def placed(param: torch.Tensor) -> list[tuple[Any, bool]]:
    """(placement, whether tensor parallelism decides it) of each dimension of its mesh; none of a plain
    tensor."""
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None:
        return []
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    tensor = [n in _TENSOR or (not n and _UNNAMED_IS_TENSOR.get()) for n in names]
    return list(zip(param.placements, tensor, strict=True))  # type: ignore[attr-defined]


def shape(param: torch.Tensor) -> tuple[int, ...]:
    """Of the whole, where it is let go of as well: by DeepSpeed's ZeRO 3 and by memfit's."""
    return tuple(getattr(param, "ds_shape", getattr(param, "whole_shape", param.shape)))


def lets_go(param: torch.Tensor) -> bool:
    return hasattr(param, "ds_shape") or hasattr(param, "whole_shape")


def own_shard(param: torch.Tensor) -> torch.Tensor:
    """What of a parameter stays on this rank with ZeRO 3; else itself."""
    found: torch.Tensor = getattr(param, "ds_tensor", getattr(param, "shard", param))
    return found


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_all(own: Any) -> list[Any]:
    """What every rank gives, in the order of ranks."""
    every: list[Any] = [own] * world_size()
    if len(every) > 1:
        dist.all_gather_object(every, own)
    return every


def local_elements(tensor: torch.Tensor) -> int:
    """Elements of it that this rank holds."""
    if (shard := own_shard(tensor)) is not tensor and tensor.numel() == 0:
        return int(shard.numel())
    local: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    if local.is_sparse:
        return int(local.coalesce().values().numel())
    return int(local.numel()) if local.untyped_storage().nbytes() else 0


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those it wraps, outermost first."""
    for _ in range(_DEEP):
        if optimizer is None:
            return
        yield optimizer
        inner = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "inner", "base_optimizer"))
        optimizer = next((i for i in inner if i is not None and hasattr(i, "step")), None)


def states(optimizer: Any) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """(parameter, tensors of its state that are no scalars) on this rank."""
    for layer in reversed(list(layers(optimizer))):
        state = getattr(layer, "state", None)
        if isinstance(state, Mapping) and state:
            for param, entry in state.items():
                if isinstance(entry, Mapping):
                    yield param, [v for v in entry.values() if isinstance(v, torch.Tensor) and v.dim()]
            return


def buffered_gradients(optimizer: Any) -> int:
    """Elements of gradients that memfit's ZeRO 3 keeps in a buffer of its own."""
    buffers = (getattr(layer, "grads", None) for layer in layers(optimizer))
    return sum(local_elements(b) for b in buffers if isinstance(b, torch.Tensor))


def state_elements(optimizer: Any) -> int:
    """Elements that the optimizer has a state for on this rank: of each entry the largest tensor."""
    return sum(max(map(local_elements, tensors), default=0) for _, tensors in states(optimizer))


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of it on this rank; of a tensor made of others, as those of 4 bits are, of all of them."""
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(local, "__tensor_flatten__"):
        return sum(local_bytes(getattr(local, name)) for name in local.__tensor_flatten__()[0])
    return int(local.numel() * local.element_size())


def fsdp_groups(model: nn.Module) -> Iterator[Any]:
    """Parameter groups of fsdp2, also of several modules together: torch has no public way to ask."""
    states = {id(s): s for m in model.modules() if (s := getattr(m, "_get_fsdp_state", lambda: None)())}
    for state in states.values():
        yield from getattr(state, "_fsdp_param_groups", ())


def fsdp_params(model: nn.Module) -> Iterator[Any]:
    for group in fsdp_groups(model):
        yield from group.fsdp_params
