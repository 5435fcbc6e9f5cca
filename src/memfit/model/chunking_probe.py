"""Test whether a module can be chunked: run a small copy with random parameters on a whole input and on
slices."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_TRIALS = 96
_MOST_ELEMENTS = 2**18  # of a trial's inputs; a patch embedding, for example, does not run on short ones
_MOST_INSIDE = 2**22  # bytes that a trial may allocate if the real call allocates less
_SHORT = (5, 7, 3, 11, 13, 9)  # lengths of the small copy's inputs
_FAR = (1024, 512, 256, 128, 64, 32)  # longer lengths of the cut axis, to test whether slices are independent


@dataclasses.dataclass(slots=True)
class ModuleCall:
    """A module's first call. ``leaves``, ``spec``: the flattened (args, kwargs), in which tensors hold no
    values. ``inside_bytes``: bytes of new tensors, those of submodules included, without the output.
    ``columns_bytes``: bytes to which convolutions would unfold their inputs, as those in float64 do.
    ``reach``: the largest dilation or padding inside. ``random``: whether it draws random numbers, which
    would differ between slices. ``out_shape`` and ``out_bytes`` are None and 0 if the output is not a
    tensor."""

    leaves: list[Any]
    spec: Any
    inside_bytes: int = 0
    out_shape: tuple[int, ...] | None = None
    out_bytes: int = 0
    columns_bytes: int = 0
    reach: int = 0
    random: bool = False


def columns_bytes(out: torch.Tensor, weight: torch.Tensor) -> int:
    """Return the bytes of the matrix to which a convolution unfolds its input before it multiplies it with
    ``weight``, for the output ``out``. Return 0 if its kernel has one element, as it need not unfold then."""
    return out.nbytes // out.shape[1] * weight[0].numel() if weight[0, 0].numel() > 1 else 0


class LiveBytes(TorchDispatchMode):
    """Mode that tracks the bytes of the live storages that operators return. ``peak_bytes`` is the peak of
    their sum; while a convolution runs, its unfolded input (`columns_bytes`) is added."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {k: entry for k, entry in self.live.items() if not entry[0].expired()}
        columns = columns_bytes(out, args[1]) if func is torch.ops.aten.convolution.default else 0
        self.peak_bytes = max(self.peak_bytes, columns + sum(size for _, size in self.live.values()))
        return out


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context, torch computes with one thread: several are far slower on small operators if other
    processes use the cores. Afterwards, the number of threads is as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def find_cut(module: nn.Module, call: ModuleCall, shapes: dict[int, tuple[int, ...]]) -> Any:
    """Run a small copy of the module on whole inputs and on slices of them. Return ({leaf: axis to cut}, the
    output's axis) for the longest axis of the largest input tensor that can be cut, together with the axes of
    the same length in other tensors that are cut with it. Return None if no axis can be cut, or if the module
    cannot be copied or does not run on inputs of a trial's size.

    ``shapes`` are the real shapes of the tensors among the leaves of ``call``, by the leaf's index."""
    try:
        module_copy = _random_copy(module)
    except (RuntimeError, TypeError):  # a module that holds a file or a tensor of a graph cannot be copied
        return None
    generator, run = torch.Generator().manual_seed(0), functools.partial(_ran, module_copy, call)

    def drawn(sizes: Mapping[int, tuple[int, ...]]) -> dict[int, torch.Tensor]:
        return {i: torch.randn(s, generator=generator, dtype=torch.float64) for i, s in sizes.items()}

    def small(sizes: Mapping[int, tuple[int, ...]]) -> bool:
        """Return whether inputs of these shapes are small enough for a trial: at most 2**18 elements in all,
        and estimated bytes inside of at most 4 MiB, or of those of the real call if these are more. No
        dimension is longer than in the real call, so nothing inside is."""
        elements, real_elements = (sum(map(math.prod, s.values())) for s in (sizes, shapes))
        trial_bytes = (call.inside_bytes + call.columns_bytes) * elements / max(1, real_elements)
        return elements <= _MOST_ELEMENTS and trial_bytes <= max(_MOST_INSIDE, call.inside_bytes)

    def runs(sizes: dict[int, tuple[int, ...]]) -> bool:
        return small(sizes) and run(drawn(sizes)) is not None

    def reaches(axes: Mapping[int, int], out_axis: int) -> bool:
        """Return whether a slice of the output along ``out_axis`` may depend on inputs outside the same slice
        along ``axes``. This is tested on inputs with a longer cut axis than ``sizes``; if ``sizes`` has the
        real lengths already, the answer is False. Return True if it cannot be tested."""
        long_sizes = _lengthen(shapes, sizes, axes, runs)
        tested_length = min((long_sizes or sizes)[i][axis] for i, axis in axes.items())
        if tested_length <= call.reach or (
            long_sizes is None and any(shapes[i][a] != sizes[i][a] for i, a in axes.items())
        ):
            return True
        if long_sizes is None:
            return False
        long_inputs = drawn(long_sizes)
        long_output = run(long_inputs)
        return long_output is None or out_axis not in _same(run, long_inputs, long_output, axes)

    sizes = _shortened(shapes, runs)
    inputs = drawn(sizes) if small(sizes) else {}
    expected = run(inputs) if inputs else None
    if expected is None:
        return None
    candidates = (
        (axes, output_axis)
        for axes in _ways(shapes, sizes)
        for output_axis in _same(run, inputs, expected, axes)
    )
    return next((candidate for candidate in candidates if not reaches(*candidate)), None)


def _ran(module: nn.Module, call: ModuleCall, tensors: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
    leaves = [tensors.get(i, v) for i, v in enumerate(call.leaves)]
    args, kwargs = _pytree.tree_unflatten(leaves, call.spec)
    try:
        out = module(*args, **kwargs)
    except Exception:  # noqa: BLE001  any error means that the module does not accept such shapes
        return None
    return out if isinstance(out, torch.Tensor) else None


def _lengthen(
    shapes: dict[int, tuple[int, ...]],
    sizes: dict[int, tuple[int, ...]],
    axes: Mapping[int, int],
    runs: Callable[[dict[int, tuple[int, ...]]], bool],
) -> dict[int, tuple[int, ...]] | None:
    """Return the shapes ``sizes`` of a trial with the cut axis made longer: at its real length in ``shapes``
    or, if the module does not run with that (``runs``), at the longest of 1024, 512, ..., 32 elements below
    it with which it runs. If the module does not run with that alone, all axes that have the same length in
    ``shapes`` and in ``sizes`` become longer with it. Return None if no longer length is possible.

    A module that combines positions far apart, such as a dilated convolution, combines none in a short input
    and would look as if its slices were independent."""
    leaf, axis = next(iter(axes.items()))
    lengths = shapes[leaf][axis], sizes[leaf][axis]
    for new_length in (lengths[0], *(n for n in _FAR if lengths[1] < n < lengths[0])):
        alone = {
            i: tuple(new_length if axes.get(i) == a else n for a, n in enumerate(s)) for i, s in sizes.items()
        }
        together = {
            i: tuple(new_length if pair == lengths else pair[1] for pair in zip(shapes[i], s, strict=True))
            for i, s in sizes.items()
        }
        for long_sizes in (alone, together):
            if long_sizes != sizes and runs(long_sizes):
                return long_sizes
    return None


def _random_copy(module: nn.Module) -> nn.Module:
    """Return a float64 copy with random parameters and buffers, without forward hooks and without functions
    that replace forward. With zeros, as some layers are initialised, everything would look independent.
    Raises RuntimeError or TypeError if the module cannot be copied."""
    generator = torch.Generator().manual_seed(1)
    copies: dict[int, Any] = {}
    for parameter in module.parameters():
        size = max(1, parameter.shape[-1] if parameter.dim() > 1 else 1)
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / size**0.5
        copies[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
    module_copy = copy.deepcopy(module, copies)
    for inner in module_copy.modules():
        vars(inner).pop("forward", None)  # remove wrappers of other techniques
        for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
            hooks.clear()
    return module_copy


def _shortened(
    shapes: dict[int, tuple[int, ...]], runs: Callable[[dict[int, tuple[int, ...]]], bool]
) -> dict[int, tuple[int, ...]]:
    """Return small shapes with which the module still runs, or ``shapes`` if none are found in 96 attempts.
    Dimensions of more than 13 elements are shortened. Those of equal length get equal short lengths. For each
    length, either all such dimensions are shortened, or all but the last dimension of every tensor, or of one
    tensor (which may be channels that happen to have this size), or none."""
    lengths = sorted({n for s in shapes.values() for n in s if n > max(_SHORT)}, reverse=True)
    short_lengths = dict(zip(lengths, itertools.cycle(_SHORT), strict=False))
    all_dims, all_but_last = frozenset[int](), frozenset(shapes)
    choices = [
        [all_dims, all_but_last, *(frozenset({i}) for i, s in shapes.items() if s and s[-1] == n), None]
        for n in lengths
    ]
    for choice in itertools.islice(itertools.product(*choices), _MOST_TRIALS):
        last_stays = dict(zip(lengths, choice, strict=True))

        def size(i: int, at: int, stays: Mapping[int, frozenset[int] | None] = last_stays) -> int:
            length = shapes[i][at]
            kept_leaves = stays.get(length)
            stays_real = kept_leaves is None or (i in kept_leaves and at == len(shapes[i]) - 1)
            return length if stays_real else short_lengths[length]

        sizes = {i: tuple(size(i, at) for at in range(len(s))) for i, s in shapes.items()}
        if runs(sizes):
            return sizes
    return shapes


def _ways(shapes: dict[int, tuple[int, ...]], sizes: dict[int, tuple[int, ...]]) -> Iterator[dict[int, int]]:
    """Yield choices of the axes to cut, {leaf: axis}, to be tried in this order: an axis of the largest
    tensor, longest first, together with an axis of the same length, or none, of each other tensor.

    ``shapes`` are the real shapes, ``sizes`` those of a trial. Axes of the largest tensor with at most 3
    elements are not cut."""
    largest = max(shapes, key=lambda i: math.prod(shapes[i]))
    other_leaves = [i for i in shapes if i != largest]
    long_axes = [a for a, n in enumerate(sizes[largest]) if n >= 3 and shapes[largest][a] > 3]
    for axis in sorted(long_axes, key=lambda a: -shapes[largest][a]):
        lengths = shapes[largest][axis], sizes[largest][axis]
        matching_axes: list[list[int | None]] = [
            [*(a for a, n in enumerate(zip(shapes[i], sizes[i], strict=True)) if n == lengths), None]
            for i in other_leaves
        ]
        for choice in itertools.islice(itertools.product(*matching_axes), _MOST_TRIALS):
            yield {largest: axis} | {i: a for i, a in zip(other_leaves, choice, strict=True) if a is not None}


def _same(
    run: Callable[[Mapping[int, torch.Tensor]], torch.Tensor | None],
    inputs: Mapping[int, torch.Tensor],
    expected: torch.Tensor,
    axes: Mapping[int, int],
) -> Iterator[int]:
    """Yield the axes of ``expected``, the output for the whole ``inputs``, along which each tested slice of
    ``expected`` equals the output for the inputs cut to that slice along ``axes``. Tested are slices of 2
    elements at the start, in the middle and at the end, and one of 1 element, as code may drop a dimension of
    1 element."""
    length = next(inputs[i].shape[a] for i, a in axes.items())
    slices = [(0, 1), (0, 2), (length // 2 - 1, 2), (length - 2, 2)]
    outputs = [
        run({i: t.narrow(axes[i], *part) if i in axes else t for i, t in inputs.items()}) for part in slices
    ]
    for axis, size in enumerate(expected.shape):
        if size == length and all(
            out is not None
            and out.shape == (expected_slice := expected.narrow(axis, *part)).shape
            and torch.allclose(out, expected_slice, rtol=1e-9, atol=1e-12)
            for out, part in zip(outputs, slices, strict=True)
        ):
            yield axis
