"""Where a rank keeps parameters and optimizer state, by the model's own names, for any plan.

A plan may keep a parameter whole, as a DTensor, or as a range of its elements in a flat fp32 master (ZeRO). A
range of elements consists of a few boxes of the whole tensor, which torch.distributed.checkpoint can store.
Therefore nothing is gathered to save, and any plan can read what another one wrote.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from memfit.jobs.training_step import TrainingStep
from memfit.techniques.optimizers import innermost
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.launch import Shape

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
Box = tuple[Shape, Shape]  # (offsets, sizes)


def boxes(shape: Shape, start: int, end: int) -> Iterator[Box]:
    """Yield boxes, each as (offsets, sizes), that together are the elements ``start`` to ``end`` (exclusive)
    of the flattened contiguous tensor of ``shape``, in the order of the elements. For d dimensions, these are
    at most 2 d - 1 boxes; for a scalar, one. Yield none if ``start`` is not below ``end``."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    inner_shape = shape[1:]
    row = math.prod(inner_shape)
    first_row, end_row = -(-start // row), end // row  # whole rows
    if first_row > end_row:
        yield from _in_row(end_row, inner_shape, start - end_row * row, end - end_row * row)
        return
    yield from _in_row(first_row - 1, inner_shape, start - (first_row - 1) * row, row if start % row else 0)
    if first_row < end_row:
        yield (first_row, *(0 for _ in inner_shape)), (end_row - first_row, *inner_shape)
    yield from _in_row(end_row, inner_shape, 0, end - end_row * row)


def _in_row(row: int, inner: Shape, start: int, end: int) -> Iterator[Box]:
    for offsets, sizes in boxes(inner, start, end):
        yield (row, *offsets), (1, *sizes)


class Pieces:
    """The part of a tensor of ``shape`` that this rank holds, as boxes: ``views`` maps the offsets of a box
    in the whole tensor to the box's elements, a view of this rank's memory. torch.distributed.checkpoint
    handles a `Pieces` like a DTensor."""

    def __init__(self, shape: Shape, dtype: torch.dtype, views: dict[torch.Size, torch.Tensor]) -> None:
        self.shape, self.dtype, self.views = torch.Size(shape), dtype, views

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=o, sizes=v.shape) for o, v in self.views.items()]

    def __create_write_items__(self, fqn: str, whole: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]


class PiecesSavePlanner(DefaultSavePlanner):
    """Save planner of torch.distributed.checkpoint that also saves `Pieces`, and writes parts of a larger CPU
    storage without copying them."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        if isinstance(value, Pieces):
            assert index.offset is not None
            return value.views[index.offset]
        return super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        value = super().transform_object(write_item, object)
        return _with_own_storage(value) if isinstance(value, torch.Tensor) else value


def _with_own_storage(part: torch.Tensor) -> torch.Tensor:
    """Return the elements of ``part``, in the same memory, as a tensor whose storage contains nothing else.
    The writer would copy a part of a larger storage, and keep all copies until its file is complete. Return
    ``part`` itself if it is not a plain contiguous CPU tensor."""
    is_plain = type(part) in {torch.Tensor, nn.Parameter}
    if not is_plain or part.device.type != HOST or not part.is_contiguous():
        return part
    width, start = part.element_size(), part.storage_offset() * part.element_size()
    storage = part.untyped_storage()[start : start + part.numel() * width]
    return torch.empty(0, dtype=part.dtype).set_(storage, 0, part.shape, part.stride())


class PiecesLoadPlanner(DefaultLoadPlanner):
    """Load planner of torch.distributed.checkpoint that also loads into `Pieces`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Set up the planner without torch's flattening, which turns values of unknown types into None."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value that is no tensor. Unlike torch's planner, this runs no code that the value names: it
        raises pickle.UnpicklingError for any but plain types."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        value = self.state_dict[index.fqn]
        if isinstance(value, Pieces):
            assert index.offset is not None
            return value.views[index.offset]
        return super().lookup_tensor(index)


def pieces_of_flat(shape: Shape, start: int, flat: torch.Tensor) -> Pieces:
    """Return the pieces of a tensor of ``shape`` that are in ``flat``, as views of it. ``flat`` has one
    dimension, and holds the consecutive elements of the flattened tensor from index ``start`` on."""
    views, index = {}, 0
    for offsets, sizes in boxes(shape, start, start + flat.numel()):
        count = math.prod(sizes)
        views[torch.Size(offsets)] = flat[index : index + count].view(sizes)
        index += count
    return Pieces(shape, flat.dtype, views)


def pieces_of_rows(rows: DTensor, parts: int) -> Pieces:
    """Return this rank's pieces of the parameter ``rows``, as views of its local tensor. The parameter
    consists of ``parts`` fused parts of equal size along dimension 0, such as query, key and value. In
    ``rows`` the rows are ordered by tensor-parallel rank, and within a rank by part
    (techniques/parallel/tensor_parallel.py). In the tensor that the pieces belong to, they are ordered by
    part."""
    degree = rows.device_mesh["tensor"].size()
    local = rows.to_local()
    _, offsets = compute_local_shape_and_global_offset(rows.shape, rows.device_mesh, rows.placements)
    block = rows.shape[0] // (parts * degree)
    views, row = {}, offsets[0]
    while row < offsets[0] + local.shape[0]:
        (rank, part), row_in_block = divmod(row // block, parts), row % block
        count = min(block - row_in_block, offsets[0] + local.shape[0] - row)
        start = (part * degree + rank) * block + row_in_block
        views[torch.Size((start, *offsets[1:]))] = local.narrow(0, row - offsets[0], count)
        row += count
    return Pieces(tuple(rows.shape), local.dtype, views)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where this rank keeps a parameter of ``shape``. ``owner`` is the tensor that holds its values: the fp32
    master if there is one, else the parameter or this rank's shard of it. If the parameter is trained, the
    optimizer has state for the owner.

    If ``at`` is None, the owner has the shape of the parameter, and ``start`` and ``end`` are unused.
    ``fused`` is the number of fused parts, such as 3 for query, key and value, in the order of
    `pieces_of_rows`; 0: not fused.

    Otherwise the owner has one dimension and may hold several parameters. The elements ``start`` to ``end``
    (exclusive) of the flattened parameter are in it from index ``at`` on."""

    owner: torch.Tensor
    shape: Shape
    start: int = 0
    end: int = 0
    at: int | None = None
    fused: int = 0

    def of(self, tensor: torch.Tensor) -> torch.Tensor | Pieces:
        """Return the parameter's part of ``tensor``, detached, in the same memory. ``tensor`` is the owner or
        has its layout, as the optimizer's state has. The part is ``tensor`` itself if the owner has the shape
        of the parameter and is not fused, else a `Pieces`."""
        detached = tensor.detach()
        if self.fused:
            assert isinstance(detached, DTensor)
            return pieces_of_rows(detached, self.fused)
        if self.at is None:
            return detached
        return pieces_of_flat(self.shape, self.start, detached.narrow(0, self.at, self.end - self.start))


def places(step: TrainingStep) -> dict[str, TensorPlace]:
    """Return name -> place of every parameter of which this rank holds a part. Names are without wrappers
    (`unwrapped_name`). The owner is the parameter's fp32 master if the optimizer has one."""
    names = {p: unwrapped_name(n) for n, p in step.model.named_parameters()}
    optimizer: Any = step.optimizer
    fused_parts = {unwrapped_name(n): parts for n, parts in step.bench.fused_rows.items()}
    result = {
        n: TensorPlace(owner=p, shape=tuple(p.shape), fused=fused_parts.get(n, 0)) for p, n in names.items()
    }
    if hasattr(optimizer, "shards"):
        result = {names[p]: place for p, place in _stage3(optimizer)}
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        result = {n: place for p, n in names.items() for place in _deepspeed3(optimizer, p)}
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        master_places = {n: place for p, n in names.items() for place in _deepspeed12(optimizer, p)}
        result = master_places | {n: result[n] for p, n in names.items() if not p.requires_grad}
    elif hasattr(optimizer, "span"):
        master_places = {names[p]: place for p, place in _stage12(optimizer)}
        result = master_places | {n: result[n] for p, n in names.items() if p not in optimizer.span}
    elif hasattr(optimizer, "masters"):
        pairs = zip(optimizer.params, optimizer.masters, strict=True)
        result |= {names[p]: dataclasses.replace(result[names[p]], owner=m) for p, m in pairs}
    return result


def _stage12(optimizer: Any) -> Iterator[tuple[nn.Parameter, TensorPlace]]:
    for param, (a, b) in optimizer.own_ranges.items():
        index = optimizer.span[param][0] + a - optimizer.rank * optimizer.size
        yield param, TensorPlace(owner=optimizer.master, shape=tuple(param.shape), start=a, end=b, at=index)


def _stage3(optimizer: Any) -> Iterator[tuple[nn.Parameter, TensorPlace]]:
    shards = optimizer.shards
    for param, shape in shards.shape.items():
        count, size = math.prod(shape), shards.size[param]
        start, end = (min(r * size, count) for r in (optimizer.rank, optimizer.rank + 1))
        if start < end:
            is_trained = param in shards.place
            owner = optimizer.master if is_trained else shards.shard[param]
            index = shards.place[param] if is_trained else 0
            yield param, TensorPlace(owner=owner, shape=tuple(shape), start=start, end=end, at=index)


def _deepspeed12(optimizer: Any, param: Any) -> Iterator[TensorPlace]:
    """Yield the place of the part of a parameter whose fp32 master this rank has, under DeepSpeed's ZeRO 1
    and 2 (deepspeed/utils/tensor_fragment.py). Yield nothing if this rank has no part of it."""
    if (fragment := getattr(param, "_hp_mapping", None)) is not None:
        address, flat_address = fragment.lp_fragment_address, fragment.hp_fragment_address
        yield TensorPlace(
            owner=optimizer.single_partition_of_fp32_groups[fragment.param_group_index],
            shape=tuple(param.shape),
            start=address.start,
            end=address.start + address.numel,
            at=flat_address.start,
        )


def _deepspeed3(optimizer: Any, param: Any) -> Iterator[TensorPlace]:
    """Yield the place of this rank's part of a parameter, unless it is empty, under DeepSpeed's ZeRO 3, which
    shards evenly (deepspeed/runtime/zero/partition_parameters.py)."""
    size, count, rank = param.ds_tensor.ds_numel, param.ds_numel, dist.get_rank()
    start, end = (min(r * size, count) for r in (rank, rank + 1))
    if start < end:
        owner, index = param.ds_tensor, 0
        if param.requires_grad:
            group, index, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            owner = optimizer.fp32_partitioned_groups_flat[group]
        yield TensorPlace(owner=owner, shape=tuple(param.ds_shape), start=start, end=end, at=index)


def spread(step: TrainingStep) -> None:
    """Update the model's parameters on all ranks from the fp32 masters, after these were read from a
    checkpoint. Do nothing if there are no masters. All ranks must call it: ZeRO gathers parameters."""
    optimizer: Any = step.optimizer
    with torch.no_grad():
        if hasattr(optimizer, "shards"):
            optimizer.shards.flat.copy_(optimizer.master)
            optimizer.shards.free(list(optimizer.shards.whole))
        elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := optimizer.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "span"):
            from memfit.techniques.zero.base import all_gather

            optimizer.part.copy_(optimizer.master)
            if (work := all_gather(optimizer.flat, optimizer.part, optimizer.group)) is not None:
                work.wait()
        elif hasattr(optimizer, "masters"):
            for param, master in zip(optimizer.params, optimizer.masters, strict=True):
                param.copy_(master)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> buffer of the buffers that are in the model's state dict. Names are without wrappers
    (`unwrapped_name`)."""
    return {
        unwrapped_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def unwrapped_name(name: str) -> str:
    """Return a parameter's or buffer's name without the names of the wrapper modules of torch.compile,
    activation checkpointing and FSDP."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the torch optimizers that ``optimizer`` wraps (`innermost`), or [optimizer] if it is one itself.
    Raises UserError if an innermost object is not a torch optimizer."""
    inner_optimizers = innermost(optimizer)
    for inner in inner_optimizers:
        if not isinstance(inner, torch.optim.Optimizer):
            raise UserError(
                f"{type(inner).__name__} is not a torch optimizer, so its state cannot be saved",
                allowed="a torch.optim.Optimizer, or a wrapper that holds one, or a list or mapping of "
                "several, in its attribute optimizers, inner, optimizer or optim",
            )
    return inner_optimizers


def make_states(optimizer: torch.optim.Optimizer, flats: Iterable[torch.Tensor]) -> None:
    """Create the state that the optimizer makes in its first step, by a step with a zero gradient for each
    trained parameter in turn, while the others have none. These steps may change parameters and state, so the
    caller overwrites both afterwards with those of a checkpoint. Existing gradients are kept but become zero.

    ``flats``: the flat tensors that the optimizer gets for each step under DeepSpeed's ZeRO 3, where it has
    no parameters between steps. Steps are made for these if the optimizer has no trained parameters, else
    ``flats`` is ignored."""
    grads = {p: p.grad for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    for param in grads:
        param.grad = None
    for param, grad in grads.items():
        _step_alone(optimizer, param, grad)
    for param, grad in grads.items():
        param.grad = grad
    if not grads:
        group = optimizer.param_groups[0]
        for flat in flats:
            flat_grad = flat.grad
            group["params"] = [flat]
            _step_alone(optimizer, flat, flat_grad)
            group["params"], flat.grad = [], flat_grad


def _step_alone(optimizer: torch.optim.Optimizer, param: torch.Tensor, grad: torch.Tensor | None) -> None:
    param.grad = torch.zeros_like(param) if grad is None else grad.zero_()
    optimizer.step()
    param.grad = None
