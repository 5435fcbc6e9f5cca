"""How many elements of a prepared model and its optimizer this rank holds, whoever prepared them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_DEEP = 8  # wrappers of wrappers of an optimizer


def whole(param: nn.Parameter) -> int:
    """Elements before data-parallel sharding, of this rank's part under tensor parallelism."""
    if (told := getattr(param, "ds_numel", None)) is not None:
        return int(told)
    placements = getattr(param, "placements", None)
    if placements is None:
        return param.numel()
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    cut = [
        mesh.size(i)
        for i, (p, name) in enumerate(zip(placements, names, strict=True))
        if p.is_shard() and name in {"tensor", "tp"}
    ]
    whole: int = param.numel()
    return math.ceil(whole / int(math.prod(cut)))


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_elements(tensor: torch.Tensor) -> int:
    """Elements of it that this rank holds."""
    if (shard := getattr(tensor, "ds_tensor", None)) is not None and tensor.numel() == 0:
        return int(shard.numel())
    local: torch.Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return int(local.numel()) if local.untyped_storage().nbytes() else 0


def layers(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those it wraps, outermost first."""
    for _ in range(_DEEP):
        if optimizer is None:
            return
        yield optimizer
        inner = (getattr(optimizer, name, None) for name in ("optimizer", "optim", "inner"))
        optimizer = next((i for i in inner if i is not None and hasattr(i, "step")), None)


def state_elements(optimizer: Any) -> int:
    """Elements that the optimizer has a state for on this rank: of each entry the largest tensor."""
    for layer in reversed(list(layers(optimizer))):
        state = getattr(layer, "state", None)
        if isinstance(state, Mapping) and state:
            entries = [_tensors(entry) for entry in state.values() if isinstance(entry, Mapping)]
            return sum(max((local_elements(t) for t in e if t.dim()), default=0) for e in entries)
    return 0


def _tensors(entry: Mapping[str, Any]) -> list[torch.Tensor]:
    return [v for v in entry.values() if isinstance(v, torch.Tensor)]
