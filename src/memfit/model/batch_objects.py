"""Find the tensors of a batch: in mappings, tuples and lists, and in the attributes of objects with
``.to()``, such as graphs or padded images. Split a batch into micro-batches. A list with an element for each
sample, such as the targets of a detector, is split as a tensor is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from memfit.types.errors import UserError

NESTED_GIVEN = "the step uses a nested tensor, whose sizes differ from row to row"
NESTED_ALLOWED = "padded tensors, with a mask or the lengths"


def batch_tensors(batch: Any) -> list[torch.Tensor]:
    """Return every tensor of the batch: in nested dicts, tuples and lists, and in attributes of objects with
    ``.to()``. Batches of the same structure give their tensors in the same order."""
    return [tensor for leaf in _pytree.tree_leaves(batch) for tensor in _tensors_inside(leaf)]


def map_batch(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Return the batch with ``function(tensor)`` in place of each tensor that `batch_tensors` finds. Objects
    that hold tensors are copied and not changed."""

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        tensors = list(_tensors_inside(leaf))
        return copy.deepcopy(leaf, {id(tensor): function(tensor) for tensor in tensors}) if tensors else leaf

    return _pytree.tree_map(mapped, batch)


def sample_count(batch: Any) -> int | None:
    """Return the number of samples that an object in the batch states in its attribute ``num_graphs`` or,
    without an integer there, ``batch_size``. Objects are those with ``.to()`` and tensors in their
    attributes; the first that states an integer counts. Return None if there is none."""
    for leaf in _pytree.tree_leaves(batch):
        if _is_object(leaf):
            for name in ("num_graphs", "batch_size"):
                if isinstance(count := getattr(leaf, name, None), int):
                    return count
    return None


def split_object(batch: Any, sizes: Sequence[int]) -> list[Any] | None:
    """Split a batch that is one object with tensors and ``.to()``, such as a batch of graphs, into objects of
    ``sizes[0]``, ``sizes[1]``, ... samples. Return None for a batch without such an object.

    Raises UserError if the batch only contains such an object, for example in a mapping, or if the object
    cannot be split (``to_data_list()``) and joined again (``from_data_list()`` of its class).
    """
    objects = list(filter(_is_object, _pytree.tree_leaves(batch)))
    if not objects:
        return None
    join, split = getattr(type(batch), "from_data_list", None), getattr(batch, "to_data_list", None)
    if join is None or split is None:
        raise UserError(
            f"a batch that is or contains a {type(objects[0]).__name__} cannot be split into {len(sizes)} "
            "parts, such as micro-batches",
            allowed="tensors with the samples along dimension 0, also inside tuples, lists and dicts; or a "
            "batch that is itself one object with to_data_list() and from_data_list()",
        )
    samples = iter(split())
    return [join([next(samples) for _ in range(size)]) for size in sizes]


def batch_length(batch: Any) -> int:
    """Return the number of samples of a batch: the integer ``num_graphs`` or ``batch_size`` of the first
    object in it that has one and holds tensors, such as a batch of graphs; without one, the size of the first
    dimension of the batch's first tensor with dimensions. If every tensor is in a list, it is the length of
    the first list of mappings or tuples whose tensors differ in size, such as a list of targets.

    Raises UserError if the batch contains no tensor with dimensions, or a nested tensor.
    """
    tensors = [t for t in batch_tensors(batch) if t.dim() > 0]
    if any(t.is_nested for t in tensors):
        raise UserError(NESTED_GIVEN, allowed=NESTED_ALLOWED)
    if not tensors:
        raise UserError(
            "the batch contains no tensor with at least one dimension",
            allowed="a tensor, a mapping, tuple or list of tensors, or an object with .to() and tensors; at "
            "least one of them with the samples along dimension 0",
        )
    if (count := sample_count(batch)) is not None:
        return count
    batch_id = id(batch)
    leaves = _pytree.tree_leaves(
        batch, is_leaf=lambda v: isinstance(v, list | tuple) and _has_elements_of_one_kind(v, batch_id)
    )
    if not any(isinstance(leaf, torch.Tensor) and leaf.dim() > 0 for leaf in leaves):
        for leaf in leaves:
            is_of_tensors = isinstance(leaf, list | tuple) and any(isinstance(v, torch.Tensor) for v in leaf)
            if not is_of_tensors and len({t.shape[0] for t in batch_tensors(leaf) if t.dim() > 0}) > 1:
                return len(leaf)
    return int(tensors[0].shape[0])


def split(batch: Any, parts: int) -> Sequence[Any]:
    """Return ``parts`` micro-batches with consecutive samples of ``batch``. If the number of samples is not a
    multiple of ``parts``, the first micro-batches have one sample more than the others.

    Tensors are cut along the first dimension, as views, and lists with an element for each sample are cut,
    too. A tensor whose first dimension is not the number of samples is whole in every micro-batch. A batch
    that is an object is split by its own methods. With ``parts`` 1, the result is ``[batch]``. Otherwise
    raises UserError if there are more parts than samples, if an object cannot be split (`split_object`), and
    as `batch_length` does.
    """
    if parts == 1:
        return [batch]
    length = batch_length(batch)
    if parts > length:
        raise UserError(
            f"{parts} micro-batches, or parts for data-parallel ranks, cannot be cut from a batch of "
            f"{length} samples",
            allowed=f"at least {parts} samples, or at most {length} micro-batches or ranks",
        )
    sizes = [length // parts + (i < length % parts) for i in range(parts)]
    if (objects := split_object(batch, sizes)) is not None:
        return objects
    starts = [sum(sizes[:i]) for i in range(parts)]

    def part(start: int, size: int) -> Any:
        def cut(value: Any) -> Any:
            if not _is_per_sample(value, length, id(batch)):
                return value
            is_tensor = isinstance(value, torch.Tensor)
            return value.narrow(0, start, size) if is_tensor else value[start : start + size]

        return _map_per_sample(cut, batch, length)

    return [part(start, size) for start, size in zip(starts, sizes, strict=True)]


def repeat(batch: Any, times: int) -> Any:
    """Return a batch with all samples of ``batch`` ``times`` times, one copy after another, so that `split`
    cuts it into ``times`` micro-batches equal to ``batch``.

    A tensor whose first dimension is not the number of samples, and a list of another length, are kept as
    they are, and so is a batch that is an object. With ``times`` 1, ``batch`` itself is returned. Otherwise
    raises UserError as `batch_length` does.
    """
    if times == 1:
        return batch
    length = batch_length(batch)

    def repeated(value: Any) -> Any:
        if not _is_per_sample(value, length, id(batch)):
            return value
        return torch.cat([value] * times) if isinstance(value, torch.Tensor) else value * times

    return _map_per_sample(repeated, batch, length)


def select(batch: Any, indices: Sequence[int]) -> Any:
    """Return a batch of the samples at ``indices``, in this order. Tensors whose first dimension is not the
    number of samples, and lists of another length, stay as they are. Raises UserError if the batch holds an
    object that cannot be split (`split_object`), and as `batch_length` does.
    """
    length = batch_length(batch)
    if split_object(batch, [length]) is not None:
        samples = batch.to_data_list()
        return type(batch).from_data_list([samples[i] for i in indices])
    rows = torch.tensor(indices)

    def chosen(value: Any) -> Any:
        if not _is_per_sample(value, length, id(batch)):
            return value
        if isinstance(value, torch.Tensor):
            return value[rows.to(value.device)]
        return type(value)(value[i] for i in indices)

    return _map_per_sample(chosen, batch, length)


def join(*batches: Any) -> Any | None:
    """Return a batch with the samples of all batches, in this order. Return None if they cannot be joined:
    because their structures, dtypes or shapes apart from the number of samples differ, or because they hold
    objects without ``to_data_list()`` and ``from_data_list()``. What is not per sample is that of the first
    batch. Raises UserError as `batch_length` does.
    """
    first, lengths = batches[0], [batch_length(batch) for batch in batches]
    flattened = [
        _pytree.tree_flatten(b, is_leaf=_sample_list_test(b, n))
        for b, n in zip(batches, lengths, strict=True)
    ]
    leaves, structures = zip(*flattened, strict=True)
    if any(structure != structures[0] for structure in structures):
        return None
    if any(map(_is_object, leaves[0])):
        concatenate = getattr(type(first), "from_data_list", None)
        if concatenate is None or not hasattr(first, "to_data_list"):
            return None
        return concatenate([sample for batch in batches for sample in batch.to_data_list()])
    joined: list[Any] = []
    for values in zip(*leaves, strict=True):
        if not all(map(_is_per_sample, values, lengths, map(id, batches))):
            joined.append(values[0])
        elif not isinstance(values[0], torch.Tensor):
            joined.append(type(values[0])(item for value in values for item in value))
        elif any(v.shape[1:] != values[0].shape[1:] or v.dtype != values[0].dtype for v in values):
            return None
        else:
            joined.append(torch.cat(values))
    return _pytree.tree_unflatten(joined, structures[0])


def _map_per_sample(function: Callable[[Any], Any], batch: Any, length: int) -> Any:
    return _pytree.tree_map(function, batch, is_leaf=_sample_list_test(id(batch), length))


def _sample_list_test(batch_id: int, length: int) -> Callable[[Any], bool]:
    """Return a test whether a value is a list with an element for each sample (`_is_per_sample`). It takes
    the batch's id, because pytree's functions keep the test until the next garbage collection, and with it
    the batch's tensors."""
    return lambda v: isinstance(v, list | tuple) and _is_per_sample(v, length, batch_id)


def _is_per_sample(value: Any, length: int, batch_id: int) -> bool:
    """Return whether ``value``, inside a batch of ``length`` samples, is a tensor whose first dimension is
    the samples, or a list with an element for each sample. A list of tensors that all have the samples as
    their first dimension is none."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and value.shape[0] == length
    if (
        not isinstance(value, list | tuple)
        or len(value) != length
        or not _has_elements_of_one_kind(value, batch_id)
    ):
        return False
    first_sizes = {t.shape[0] for t in batch_tensors(value) if t.dim() > 0}
    return first_sizes != {length}


def _has_elements_of_one_kind(value: Sequence[Any], batch_id: int) -> bool:
    """Return whether ``value``, inside the batch with the id ``batch_id`` or that batch itself, is a list or
    tuple (no subclass) of at least one element, all of one kind: mappings; or elements with tensors, of the
    same structure and types. False for a batch that is itself a tuple or a list of tensors."""
    if type(value) not in (list, tuple) or not value:
        return False
    if all(isinstance(item, Mapping) for item in value):
        return id(value) != batch_id or isinstance(value, list)
    if id(value) == batch_id and not (
        isinstance(value, list) and all(isinstance(v, list | tuple) for v in value)
    ):
        return False
    kinds = [_kinds(item) for item in value]
    return bool(batch_tensors(value[0])) and all(k == kinds[0] for k in kinds)


def _kinds(item: Any) -> Any:
    leaves, structure = _pytree.tree_flatten(item)
    return structure, [(v.dtype, v.dim()) if isinstance(v, torch.Tensor) else type(v) for v in leaves]


def _is_object(leaf: Any) -> bool:
    if isinstance(leaf, torch.Tensor | torch.nn.Module | type) or not callable(getattr(leaf, "to", None)):
        return False
    return next(_tensors_inside(leaf), None) is not None


def _tensors_inside(leaf: Any) -> Iterator[torch.Tensor]:
    if isinstance(leaf, torch.Tensor):
        yield leaf
    elif callable(getattr(leaf, "to", None)) and not isinstance(leaf, torch.nn.Module | type):
        yield from _walk(leaf, set())


def _walk(value: Any, visited_ids: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors inside ``value`` depth first: of an object its attributes, of a container also its
    elements or values. Each object is visited once; those with an id in ``visited_ids`` are skipped. Modules
    and classes are not entered."""
    if id(value) in visited_ids or isinstance(value, torch.nn.Module | type):
        return
    visited_ids.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    items: list[Any] = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, Mapping):
        items += value.values()
    elif isinstance(value, list | tuple | set):
        items += value
    for item in items:
        yield from _walk(item, visited_ids)
