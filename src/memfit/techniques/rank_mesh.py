"""The ranks a plan runs on: how many along each dimension, and which one this process is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from memfit.types.errors import UserError
from memfit.types.plan import Plan, Use

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Outermost first, as torchtitan and Megatron order them: tensor parallel neighbours are closest.
DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")
_DEGREE_OF = {
    "tensor-parallel": ("tensor", "degree"),
    "context-parallel": ("context", "degree"),
    "axial-parallel": ("context", "degree"),
    "pipeline": ("pipeline", "stages"),
}
_REPLICATED, _SHARDED = ("ddp",), ("fsdp2", "zero", "sharded-ddp")
SEVERAL = frozenset({*_DEGREE_OF, *_REPLICATED, *_SHARDED, "expert-parallel"})  # techniques of several ranks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees along the mesh dimensions; their product is the plan's ranks. ``context``: ranks that share a
    sample, cut along its sequence or its axes. ``owned``: whole parameters belong to one rank each, so that
    no two ranks need be alike."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    owned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, d) for d in DIMENSIONS)

    @property
    def ranks(self) -> int:
        return math.prod(self.shape)

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    def coordinate(self, rank: int) -> dict[str, int]:
        place = {}
        for name, degree in zip(reversed(DIMENSIONS), reversed(self.shape), strict=True):
            rank, place[name] = divmod(rank, degree)
        return place

    def data_index(self, rank: int) -> int:
        place = self.coordinate(rank)
        return place["replicate"] * self.shard + place["shard"]

    def distinct_ranks(self) -> tuple[int, ...]:
        """One rank of each kind: the first of the first, the second and the last pipeline stage; those
        between differ from the second only in keeping fewer micro-batches. Along the other dimensions rank
        0 has the largest shard, and the rest do the same. Where parameters are owned, the first eight, who
        get the first and so the most."""
        if self.owned:
            return tuple(range(min(self.ranks, 8)))
        per_stage = self.ranks // self.pipeline
        return tuple(per_stage * stage for stage in sorted({0, min(1, self.pipeline - 1), self.pipeline - 1}))


def layout(plan: Plan) -> Layout:
    """Raises UserError where the degrees do not multiply to the plan's ranks."""
    degrees = {}
    for u in plan.uses:
        if u.technique in _DEGREE_OF:
            dimension, knob = _DEGREE_OF[u.technique]
            degrees[dimension] = int(u.settings[knob])
    model_ranks = math.prod(degrees.values())
    data, rest = divmod(plan.ranks, model_ranks)
    if rest or not data:
        parts = " x ".join(f"{d} {n}" for d, n in degrees.items())
        raise UserError(
            f"{plan.ranks} ranks cannot be split into {parts}", allowed=f"a multiple of {model_ranks} ranks"
        )
    replicate, shard = _data_degrees(plan, data)
    return Layout(replicate=replicate, shard=shard, owned=plan.get("sharded-ddp") is not None, **degrees)


def _data_degrees(plan: Plan, data: int) -> tuple[int, int]:
    used = [u for u in plan.uses if u.technique in (*_REPLICATED, *_SHARDED)]
    if not used:
        if data == 1:
            return 1, 1
        raise UserError(
            f"{data} of the plan's {plan.ranks} ranks have nothing to do",
            allowed=f"a data-parallel technique: {', '.join((*_REPLICATED, *_SHARDED))}",
        )
    return (data, 1) if used[0].technique in _REPLICATED else _replicas(used[0], data)


def _replicas(use: Use, data: int) -> tuple[int, int]:
    replicas = int(use.settings.get("replicas", 1))
    if data % replicas:
        raise UserError(
            f"{replicas} replicas over {data} data-parallel ranks", allowed=f"a divisor of {data}"
        )
    return replicas, data // replicas


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A layout with this process's rank and the device mesh over it (None on one rank)."""

    layout: Layout
    rank: int = 0
    mesh: DeviceMesh | None = None

    def sub(self, *names: str) -> DeviceMesh | None:
        """The mesh along these dimensions, those of degree 1 left out; None where nothing is left."""
        kept = tuple(n for n in names if getattr(self.layout, n) > 1)
        if not kept or self.mesh is None:
            return None
        return self.mesh[kept] if len(kept) > 1 else self.mesh[kept[0]]

    def flat(self, *names: str) -> DeviceMesh | None:
        """Those dimensions as one."""
        sub = self.sub(*names)
        return sub._flatten("_".join(n for n in names)) if sub is not None and sub.ndim > 1 else sub

    def index(self, name: str) -> int:
        return self.layout.coordinate(self.rank)[name]


def make_world(plan: Plan, *, rank: int, device: str) -> World:
    """The world of ``plan`` on an initialised default process group of the plan's ranks.

    On torch's fake process group only the groups this rank is in are made, so that sixteen thousand
    ranks cost no more than eight. Raises UserError where the plan's degrees do not fit its ranks.
    """
    found = layout(plan)
    if plan.ranks == 1:
        return World(layout=found)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    named = [(d, n) for d, n in zip(DIMENSIONS, found.shape, strict=True) if n > 1]
    names, shape = tuple(d for d, _ in named), tuple(n for _, n in named)
    if dist.get_backend() == "fake":
        mesh = _mesh_of_own_groups(found, rank, names, shape)
    else:
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    return World(layout=found, rank=rank, mesh=mesh)


def _mesh_of_own_groups(
    found: Layout, rank: int, names: tuple[str, ...], shape: tuple[int, ...]
) -> DeviceMesh:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    grid = torch.arange(found.ranks).view(shape)
    place = found.coordinate(rank)
    groups = [
        dist.new_group(grid[tuple(slice(None) if n == name else place[n] for n in names)].tolist())
        for name in names
    ]
    return DeviceMesh.from_group(groups, "cpu", mesh=grid, mesh_dim_names=names)
