"""The ranks of a plan: how many along each mesh dimension, and which one this process is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError
from memfit.types.plan import Plan, Use

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Outermost first, as torchtitan and Megatron order them: ranks of one tensor-parallel group are closest.
DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")
_DEGREE_OF = {
    "tensor-parallel": ("tensor", "degree"),
    "context-parallel": ("context", "degree"),
    "axial-parallel": ("context", "degree"),
    "pipeline": ("pipeline", "stages"),
}
_REPLICATED, _SHARDED = ("ddp",), ("fsdp2", "zero", "sharded-ddp")
# Techniques that need several ranks.
SEVERAL = frozenset({*_DEGREE_OF, *_REPLICATED, *_SHARDED, "expert-parallel"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees (numbers of ranks) along the mesh dimensions. Their product is the number of ranks of the plan.

    - ``pipeline``: ranks among which the blocks are divided.
    - ``replicate`` and ``shard``: the data-parallel ranks form ``replicate`` groups of ``shard`` ranks each.
      Every group has the whole model state, divided among its ranks.
    - ``context``: ranks among which each sample is divided, along its sequence or its axes.
    - ``tensor``: ranks among which each Linear layer is divided.
    - ``owned``: the plan has sharded-ddp, with which each parameter belongs to one rank, so that the memory
      of all ranks may differ.
    """

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    owned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Degrees in the order of `DIMENSIONS`: pipeline, replicate, shard, context, tensor."""
        return tuple(getattr(self, d) for d in DIMENSIONS)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def data(self) -> int:
        """Number of data-parallel ranks, which see different samples."""
        return self.replicate * self.shard

    @property
    def communicators(self) -> tuple[int, ...]:
        """Sizes, in ranks, of the process groups in which a rank is expected to communicate. These are one
        group along each dimension but the pipeline that has several ranks and, if there is such a dimension,
        one of all ranks. With a pipeline, there is also a pair of neighbouring stages, or two pairs if there
        is no other group. Empty for one rank."""
        groups = [degree for degree in self.shape[1:] if degree > 1]
        groups = [*groups, self.ranks] if groups else []
        return (*groups, *((2,) if groups else (2, 2))) if self.pipeline > 1 else tuple(groups)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return the index of ``rank`` along each dimension, by the dimension's name. From one rank to the
        next, the index along "tensor" changes first, then those along "context", "shard", "replicate" and
        "pipeline"."""
        place = {}
        for name, degree in zip(reversed(DIMENSIONS), reversed(self.shape), strict=True):
            rank, place[name] = divmod(rank, degree)
        return place

    def data_index(self, rank: int) -> int:
        """Return the index of ``rank`` among the data-parallel ranks, 0 to `data` - 1. Ranks that differ only
        in pipeline, context or tensor have the same index."""
        place = self.coordinate(rank)
        return place["replicate"] * self.shard + place["shard"]

    def distinct_ranks(self) -> tuple[int, ...]:
        """Return ranks whose memory stands for that of all, in ascending order: the first rank of the first,
        of the second and of the last pipeline stage, each once. Stages between the second and the last differ
        from the second only in keeping fewer micro-batches. Along dimensions other than the pipeline, index 0
        has the largest shard and all ranks do the same work. If parameters are owned, return the first eight
        ranks instead (all, if there are fewer), which get the first parameters and therefore the most."""
        if self.owned:
            return tuple(range(min(self.ranks, 8)))
        per_stage = self.ranks // self.pipeline
        return tuple(per_stage * stage for stage in sorted({0, min(1, self.pipeline - 1), self.pipeline - 1}))


def layout(plan: Plan) -> Layout:
    """Return the layout of a plan. The degrees of pipeline, context and tensor are those of the plan's
    techniques, 1 without such a technique. The number of data-parallel ranks is the plan's number of ranks
    divided by them.

    Raises UserError if the product of these degrees does not divide the plan's ranks, if there are several
    data-parallel ranks but none of ddp, fsdp2, zero and sharded-ddp, or if the setting ``replicas`` does not
    divide the number of data-parallel ranks.
    """
    degrees = {}
    for u in plan.uses:
        if u.technique in _DEGREE_OF:
            dimension, knob = _DEGREE_OF[u.technique]
            degrees[dimension] = int(u.settings[knob])
    model_ranks = math.prod(degrees.values())
    data, rest = divmod(plan.ranks, model_ranks)
    if rest or not data:
        degrees_of_techniques = " x ".join(f"{d} {n}" for d, n in degrees.items())
        raise UserError(
            f"{plan.ranks} ranks cannot be divided among the degrees {degrees_of_techniques}",
            allowed=f"a multiple of {model_ranks} ranks, the product of these degrees",
        )
    replicate, shard = _data_degrees(plan, data)
    return Layout(replicate=replicate, shard=shard, owned=plan.get("sharded-ddp") is not None, **degrees)


def split_batch(plan: Plan, batch_size: int) -> int:
    """Return the number of samples in one micro-batch of one data-parallel rank. A pipeline cuts each
    micro-batch of gradient-accumulation into smaller ones, and the result is for those. ``batch_size``:
    samples of one step of all ranks. Raises UserError if the micro-batches would not be equal, and as
    `layout` does."""
    ranks, stages = layout(plan).data, plan.get("pipeline")
    micro_batches = plan.micro_batches * (int(stages.settings["micro_batches"]) if stages is not None else 1)
    parts = ranks * micro_batches
    samples, rest = divmod(batch_size, parts)
    if rest or not samples:
        sizes = " or ".join(str(parts * n) for n in (samples, samples + 1) if n)
        counts = ((ranks, "data-parallel ranks"), (micro_batches, "micro-batches"))
        raise UserError(
            f"a batch of {batch_size} samples cannot be split equally over "
            f"{' x '.join(f'{count} {name}' for count, name in counts if count > 1)}",
            allowed=f"a multiple of {parts} samples, such as {sizes} (--batch)",
        )
    return samples


def _data_degrees(plan: Plan, data: int) -> tuple[int, int]:
    data_uses = [u for u in plan.uses if u.technique in (*_REPLICATED, *_SHARDED)]
    if not data_uses:
        if data == 1:
            return 1, 1
        raise UserError(
            f"the plan has {plan.ranks} ranks and no data-parallel technique, so {data} groups of these "
            "ranks would all train on the same samples",
            allowed=f"one data-parallel technique of {', '.join((*_REPLICATED, *_SHARDED))}; or "
            f"ranks: {plan.ranks // data}",
        )
    return (data, 1) if data_uses[0].technique in _REPLICATED else _replicas(data_uses[0], data)


def _replicas(use: Use, data: int) -> tuple[int, int]:
    replicas = int(use.settings.get("replicas", 1))
    if data % replicas:
        raise UserError(
            f"the setting replicas={replicas} of {use.technique} does not divide {data} data-parallel ranks",
            allowed=f"a divisor of {data}",
        )
    return replicas, data // replicas


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A layout, and this process's place in it: its rank, and the device mesh of all ranks (None if the plan
    has one rank)."""

    layout: Layout
    rank: int = 0
    mesh: DeviceMesh | None = None

    def sub(self, *names: str) -> DeviceMesh | None:
        """Return the submesh along the dimensions ``names``, in this order, without those of degree 1. Return
        None if no dimension is left or there is no mesh."""
        dimensions = tuple(n for n in names if getattr(self.layout, n) > 1)
        if not dimensions or self.mesh is None:
            return None
        return self.mesh[dimensions] if len(dimensions) > 1 else self.mesh[dimensions[0]]

    def flat(self, *names: str) -> DeviceMesh | None:
        """Return the submesh along the dimensions ``names``, flattened into one dimension. Return None if all
        of these dimensions have degree 1 or there is no mesh."""
        sub = self.sub(*names)
        return sub._flatten("_".join(n for n in names)) if sub is not None and sub.ndim > 1 else sub

    def index(self, name: str) -> int:
        """Return this rank's index along the dimension ``name``, such as "tensor"."""
        return self.layout.coordinate(self.rank)[name]


def make_world(plan: Plan, *, rank: int, device: str) -> World:
    """Return the world of ``plan`` for the process ``rank``. ``device`` is the type of the mesh's devices,
    such as "cpu" or "cuda".

    If the plan has several ranks, torch's default process group must be initialised with that number of
    ranks. On one rank, ``rank`` and ``device`` are ignored. On torch's fake process group, the mesh is of
    type "cpu", and only those process groups are made that contain this rank, so that thousands of ranks cost
    no more time than eight. Raises UserError if the plan's degrees do not fit its ranks (see `layout`).
    """
    plan_layout = layout(plan)
    if plan.ranks == 1:
        return World(layout=plan_layout)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dimensions = [(d, n) for d, n in zip(DIMENSIONS, plan_layout.shape, strict=True) if n > 1]
    names, shape = tuple(d for d, _ in dimensions), tuple(n for _, n in dimensions)
    if dist.get_backend() == "fake":
        mesh = _mesh_of_own_groups(plan_layout, rank, names, shape)
    else:
        mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    return World(layout=plan_layout, rank=rank, mesh=mesh)


def _mesh_of_own_groups(
    plan_layout: Layout, rank: int, names: tuple[str, ...], shape: tuple[int, ...]
) -> DeviceMesh:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    grid = torch.arange(plan_layout.ranks).view(shape)
    coordinate = plan_layout.coordinate(rank)
    groups = [
        dist.new_group(grid[tuple(slice(None) if n == name else coordinate[n] for n in names)].tolist())
        for name in names
    ]
    return DeviceMesh.from_group(groups, HOST, mesh=grid, mesh_dim_names=names)


def join_alone(device: str) -> bool:
    """Return False if torch's default process group is initialised in this process. Otherwise create one of
    this process alone, for libraries that need a group even with one rank, and return True. ``device``: where
    tensors are, such as "cuda:0"; the group has the backend that torch prefers for it."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import get_default_backend_for_device

    if dist.is_initialized():
        return False
    dist.init_process_group(
        get_default_backend_for_device(device),
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    return True


def builds_on_host(plan: Plan, device: str) -> bool:
    """Return whether the whole model is built in host memory and the accelerator then gets a part or copy of
    it. True under ZeRO 1, 2 and 3, fsdp2 that shards over several ranks, pipeline, tensor or expert
    parallelism, qlora, which quantizes there, and lora with bf16-parameters and without chunking, which casts
    there. False for other plans, and if ``device`` is "cpu". Raises UserError if the plan's degrees do not
    fit its ranks (see `layout`)."""
    if device_kind(device).is_host:
        return False
    if _shards(plan) or "qlora" in plan or "expert-parallel" in plan:
        return True
    if "lora" in plan and "bf16-parameters" in plan and "chunking" not in plan:
        return True  # what is frozen is never on the device in float32
    place = layout(plan)
    return place.pipeline > 1 or place.tensor > 1


def moves_parameters(plan: Plan, device: str) -> bool:
    """Return whether the model is built in host memory (`builds_on_host`) and its parameters then move to the
    accelerator. False if ZeRO 1, 2 or 3 or fsdp2 makes shards or a flat copy of the parameters there instead,
    also together with other techniques for which the model is built in host memory. Raises UserError as
    `builds_on_host` does."""
    return builds_on_host(plan, device) and not _shards(plan)


def _shards(plan: Plan) -> bool:
    uses = {u.technique: u.settings for u in plan.uses}
    if "zero" in uses and uses["zero"].get("stage") != 0:
        return True
    return "fsdp2" in uses and layout(plan).shard > 1
