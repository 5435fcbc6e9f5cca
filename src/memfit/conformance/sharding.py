"""Count the elements of a model and its optimizer that this rank holds, whichever library sharded them."""

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

_DEEP = 8  # depth of wrappers around an optimizer


def count_whole_elements(param: nn.Parameter) -> int:
    """Return the number of elements of a parameter before data-parallel sharding, also if ZeRO 3 has freed
    it. Under tensor parallelism, it is that of this rank's part, rounded up."""
    if is_freed_between_uses(param):
        return math.prod(shape(param))
    mesh: Any = getattr(param, "device_mesh", None)
    tensor_degrees = [
        mesh.size(i)
        for i, (p, tensor_parallel) in enumerate(mesh_placements(param))
        if p.is_shard() and tensor_parallel
    ]
    return math.ceil(param.numel() / int(math.prod(tensor_degrees)))


_TENSOR = ("tensor", "tp", "model", "mp", "tensor_parallel", "tensor_model_parallel")
_UNNAMED_IS_TENSOR: contextvars.ContextVar[bool] = contextvars.ContextVar("unnamed is tensor", default=False)


@contextlib.contextmanager
def meshes_of(plan: Plan, model: nn.Module) -> Iterator[None]:
    """Inside this context, `mesh_placements` reads device meshes whose dimensions have no names as those of
    tensor parallelism if the plan has tensor-parallel and no module of the model uses FSDP2, else as
    data-parallel. Outside, it reads them as data-parallel."""
    only_tensor = "tensor-parallel" in plan and not any(True for _ in fsdp_groups(model))
    token = _UNNAMED_IS_TENSOR.set(only_tensor)
    try:
        yield
    finally:
        _UNNAMED_IS_TENSOR.reset(token)


def mesh_placements(param: torch.Tensor) -> list[tuple[Any, bool]]:
    """Return (placement, whether it belongs to tensor parallelism) for each dimension of the device mesh of
    ``param``. The name of the dimension decides, for example "tp"; for one without a name, see `meshes_of`.
    Return an empty list for a plain tensor."""
    mesh: Any = getattr(param, "device_mesh", None)
    if mesh is None:
        return []
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    tensor_flags = [n in _TENSOR or (not n and _UNNAMED_IS_TENSOR.get()) for n in names]
    return list(zip(param.placements, tensor_flags, strict=True))  # type: ignore[attr-defined]


def shape(param: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also if DeepSpeed's or memfit's ZeRO 3 has freed it."""
    return tuple(getattr(param, "ds_shape", getattr(param, "whole_shape", param.shape)))


def is_freed_between_uses(param: torch.Tensor) -> bool:
    """Return whether this is a parameter of DeepSpeed's or memfit's ZeRO 3, which free it between uses unless
    it is small enough to stay whole."""
    return hasattr(param, "ds_shape") or hasattr(param, "whole_shape")


def own_shard(param: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that DeepSpeed's or memfit's ZeRO 3 keeps on this rank, else the
    parameter itself."""
    shard: torch.Tensor = getattr(param, "ds_tensor", getattr(param, "shard", param))
    return shard


def in_backward() -> bool:
    """Return whether the autograd engine is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def world_size() -> int:
    """Return the number of ranks, which is 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_all(own: Any) -> list[Any]:
    """Return every rank's ``own`` value, in the order of ranks. All ranks must call it."""
    values: list[Any] = [own] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, own)
    return values


def local_elements(tensor: torch.Tensor) -> int:
    """Return the number of elements of a tensor that this rank holds: of a sparse tensor its stored values,
    of a parameter that ZeRO 3 has freed its shard, and 0 of another tensor whose memory is freed."""
    if (shard := own_shard(tensor)) is not tensor and tensor.numel() == 0:
        return int(shard.numel())
    local: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    if local.is_sparse:
        return int(local.coalesce().values().numel())
    return int(local.numel()) if local.untyped_storage().nbytes() else 0


def layers(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and the optimizers that it wraps in its attribute ``optimizer``, ``optim``,
    ``inner`` or ``base_optimizer`` (the first of these that has a ``step``), outermost first, at most 8 in
    all. Yield nothing for None."""
    for _ in range(_DEEP):
        if optimizer is None:
            return
        yield optimizer
        candidates = (
            getattr(optimizer, name, None) for name in ("optimizer", "optim", "inner", "base_optimizer")
        )
        optimizer = next((i for i in candidates if i is not None and hasattr(i, "step")), None)


def states(optimizer: Any) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """Yield (key of the state, in general a parameter; the non-scalar tensors of its state) on this rank,
    from the innermost wrapped optimizer that has any state. Yield nothing if none has."""
    for layer in reversed(list(layers(optimizer))):
        state = getattr(layer, "state", None)
        if isinstance(state, Mapping) and state:
            for param, entry in state.items():
                if isinstance(entry, Mapping):
                    yield param, [v for v in entry.values() if isinstance(v, torch.Tensor) and v.dim()]
            return


def buffered_gradients(optimizer: Any) -> int:
    """Return the number of elements of gradients that memfit's ZeRO 3 keeps in a buffer of its optimizer,
    which may be wrapped; 0 for other optimizers."""
    buffers = (getattr(layer, "grads", None) for layer in layers(optimizer))
    return sum(local_elements(b) for b in buffers if isinstance(b, torch.Tensor))


def local_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor on this rank. For a tensor made of others, as 4-bit tensors are, sum over
    all of them."""
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(local, "__tensor_flatten__"):
        return sum(local_bytes(getattr(local, name)) for name in local.__tensor_flatten__()[0])
    return int(local.numel() * local.element_size())


def fsdp_groups(model: nn.Module) -> Iterator[Any]:
    """Yield the parameter groups of FSDP2 in the model, each once, even if several modules share it. Torch
    has no public way to list them."""
    fsdp_states = {id(s): s for m in model.modules() if (s := getattr(m, "_get_fsdp_state", lambda: None)())}
    for state in fsdp_states.values():
        yield from getattr(state, "_fsdp_param_groups", ())


def fsdp_params(model: nn.Module) -> Iterator[Any]:
    """Yield torch's FSDPParam objects of all FSDP2 parameter groups in the model."""
    for group in fsdp_groups(model):
        yield from group.fsdp_params
