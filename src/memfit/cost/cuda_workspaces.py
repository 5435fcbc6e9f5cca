"""Memory that CUDA's kernels in torch allocate and free inside an operator, by the shapes of its arguments.

The formulas follow torch's sources, of which each function names the file, and were compared with the
caching allocator of torch 2.15 at several sizes and dtypes. CUB's radix sort takes two more arrays as large
as its keys and values, and at most a hundredth beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from memfit.types.device_kind import device_kind
from memfit.types.machine import Device
from memfit.types.trace import Allocation, Category, OpCall, Trace, base_name, rounded

_SMALL_SORT: Final = 4096  # longest row that is sorted in place, in shared memory
_FEW_ROWS: Final = 128  # fewer rows are sorted as one array
_SMALL_EMBEDDING: Final = 3072  # most indices whose gradients are added without a sort
NEGLIGIBLE_BYTES: Final = 4096  # a kernel that allocates no more inside counts as one that does not
# operators of which `cuda_bound_bytes` has a bound
CUDA_BOUNDS: Final = frozenset(
    {"_cdist_backward", "_pdist_backward", "index", "masked_select", "_fft_c2c", "_fft_c2r", "_fft_r2c"}
)
# Threads of a multiprocessor by architecture: "Technical specifications per compute capability" in the CUDA
# programming guide; 2,048 of all others.
_THREADS: Final = {"sm_75": 1024, "sm_86": 1536, "sm_87": 1536, "sm_89": 1536, "sm_120": 1536, "sm_121": 1536}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """Bytes that an operator's kernel allocates itself: ``beside_bytes`` while all its outputs exist, without
    them; ``alone_bytes`` before that, with those outputs that exist then. The peak of the operator is the
    higher of ``alone_bytes`` and of the outputs plus ``beside_bytes``."""

    beside_bytes: int = 0
    alone_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor in an operator's signature. ``strides``: in elements. ``dtype``: such as "float32"."""

    shape: Sequence[int]
    strides: Sequence[int]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) // 8 if bits else 1

    @property
    def bytes(self) -> int:
        return self.elements * self.item_bytes

    @property
    def copy_bytes(self) -> int:
        """Bytes of a contiguous copy; 0 if the tensor is contiguous."""
        return 0 if self.lies_in(range(len(self.shape))) else self.bytes

    @property
    def is_channels_last(self) -> bool:
        """Whether it is dense in memory with its second dimension innermost, has four or five dimensions, and
        is not contiguous, too."""
        dims = len(self.shape)
        return dims in (4, 5) and bool(self.copy_bytes) and self.lies_in((0, *range(2, dims), 1))

    def lies_in(self, order: Sequence[int]) -> bool:
        """Return whether its memory is dense with its dimensions in this order, from outside in."""
        expected = 1
        for dim in reversed(order):
            if self.shape[dim] != 1 and self.strides[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class Multiprocessors:
    """The multiprocessors of a card: their number, and the most threads that one of them runs at once. The
    defaults are those of a B200."""

    count: int = 148
    threads: int = 2048

    @classmethod
    def of(cls, device: Device) -> Multiprocessors:
        """Return those of the device: the number that the catalog has, else 148; the threads of the device's
        architecture, 1,024 (sm_75), 1,536 (sm_86, sm_87, sm_89, sm_120, sm_121) or 2,048 (all others)."""
        largest = cls()
        count = int(device.multiprocessor_count.value) if device.multiprocessor_count else largest.count
        return cls(count, _THREADS.get(device.gpu_target, largest.threads))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Temporary:
    """What the kernel of the operator ``call`` may allocate inside (``inside``), and those of its ``outputs``
    that are in the trace. ``allocation``: an allocation that raises the level of the trace to the kernel's
    peak: made and freed at the clock of the last output, or of the call if it has none, and of 0 bytes if
    4,096 bytes or fewer are missing."""

    call: OpCall
    inside: Inside
    outputs: Sequence[Allocation]
    allocation: Allocation


def with_temporaries(trace: Trace, device: Device) -> Trace:
    """Return the trace with what CUDA's kernels allocate inside operators on ``device`` added as allocations
    (`temporaries`), except those of at most 4,096 bytes."""
    added = [t.allocation for t in temporaries(trace, device) if t.allocation.size_bytes]
    return dataclasses.replace(trace, allocations=(*trace.allocations, *added)) if added else trace


def temporaries(trace: Trace, device: Device) -> list[Temporary]:
    """Return what CUDA's kernels allocate inside operators on ``device``, in the order of the calls.
    Operators without a formula (`inside_cuda`) are left out; others are in the list even if theirs allocate
    0 bytes. Empty if the trace's device does not run CUDA's kernels."""
    if device_kind(trace.device).kernels != "cuda":
        return []
    processors = Multiprocessors.of(device)
    calls = [(op, inside) for op in trace.ops if (inside := inside_cuda(op.signature, processors))]
    if not calls:
        return []
    starts = sorted({op.clock for op in trace.ops})
    outputs_by_clock: dict[int, list[Allocation]] = {}  # clock of the operator -> its outputs
    for allocation in trace.allocations:
        index = bisect_right(starts, allocation.start - 1) - 1
        if index >= 0:
            outputs_by_clock.setdefault(starts[index], []).append(allocation)
    results = []
    for op, inside in calls:
        outputs = [a for a in outputs_by_clock.get(op.clock, ()) if a.op == op.op]
        before_bytes = inside.alone_bytes - sum(a.size_bytes for a in outputs)
        size_bytes = max(inside.beside_bytes, before_bytes)
        start = max((a.start for a in outputs), default=op.clock)
        allocation = Allocation(
            start=start,
            end=start,
            size_bytes=rounded(size_bytes, trace.device) if size_bytes > NEGLIGIBLE_BYTES else 0,
            category=Category.WORKSPACE,
            phase=op.phase,
            step=op.step,
            module=op.module,
            op=op.op,
        )
        results.append(Temporary(call=op, inside=inside, outputs=outputs, allocation=allocation))
    return results


@functools.lru_cache(maxsize=100_000)
def inside_cuda(signature: str, processors: Multiprocessors) -> Inside | None:
    """Return what CUDA's kernel of the operator with this signature allocates inside on a card with these
    multiprocessors, which may be 0 bytes; None for an operator without a formula here."""
    name = signature[2 : signature.index('"', 2)] if signature.startswith('["') else ""
    is_single = name.startswith("aten.") and "._foreach_" not in name  # these have kernels of their own
    base = base_name(name) if is_single else ""
    if base not in _FORMULAS and base not in REDUCTIONS:
        return None
    _, args, kwargs = json.loads(signature)
    args, kwargs = [_parsed(a) for a in args], {k: _parsed(v) for k, v in kwargs.items()}
    if base in _FORMULAS:
        inside = _FORMULAS[base](args, kwargs)
    else:
        inside = REDUCTIONS[base](args, kwargs, processors)
    return inside if isinstance(inside, Inside) else Inside(beside_bytes=inside)


def cuda_bound_bytes(base: str, args: Sequence[Any]) -> int:
    """Return an upper bound on what CUDA's kernel allocates beside its outputs where that depends on values
    or is not known beforehand; 0 for other operators. ``base``: the operator's `base_name`. ``args``: those
    of its signature.

    An index or selection by a mask lists the positions of the mask's elements, at most all
    (aten/src/ATen/native/cuda/IndexKernel.cpp). A Fourier transform may need a work area of cuFFT, counted as
    one copy of the operand. That has not been checked. Of distances, the sum in backward takes partial
    results, whose number depends on the card.
    """
    parsed = [_parsed(a) for a in args]
    tensors = [t for t in _flat(parsed) if isinstance(t, _Tensor)]
    if base in ("_cdist_backward", "_pdist_backward"):
        return _distances_bytes(base, parsed)
    if base in ("index", "masked_select"):
        return sum(8 * t.elements * len(t.shape) for t in tensors[1:] if t.dtype == "bool")
    return tensors[0].bytes if base.startswith("_fft_") else 0


def _sum(args: Sequence[Any], kwargs: Mapping[str, Any], processors: Multiprocessors) -> int:
    """Return the bytes inside a sum or mean: those of partial results and, for integers and bool, of a copy
    of the input in the dtype of the result (ReduceOps.cpp)."""
    tensor = args[0]
    is_float = tensor.dtype.startswith(("float", "bfloat", "complex"))
    computed = dataclasses.replace(tensor, dtype=kwargs.get("dtype") or "int64")
    copy_bytes = 0 if is_float or tensor.dtype == computed.dtype else computed.bytes
    return int(copy_bytes + _reduction_bytes(tensor, args[1] if len(args) > 1 else None, processors))


def _reduced(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    processors: Multiprocessors,
    *,
    item_bytes: int = 0,
    dims_at: int = 1,
    least_bytes: int = 0,
) -> int:
    """Return the bytes of the partial results of any reduction: as many as a sum has, of ``item_bytes``
    each; if ``item_bytes`` is 0, each has the bytes of an element, but at least ``least_bytes``.
    ``dims_at``: index of the argument with the dimensions."""
    tensor, dims = args[0], args[dims_at] if len(args) > dims_at else None
    state_bytes = item_bytes or max(least_bytes, tensor.item_bytes)
    partial_bytes = _reduction_bytes(tensor, [dims] if type(dims) is int else dims, processors)
    return partial_bytes // _state_bytes(tensor) * state_bytes


def _bias_gradient(args: Sequence[Any], kwargs: Mapping[str, Any], processors: Multiprocessors) -> int:
    """Return the bytes inside the backward of a convolution: those of the bias gradient, which is a sum over
    samples and positions (Convolution.cpp); 0 if it is not asked for."""
    grad, mask = args[0], args[-1]
    dims = [d for d in range(len(grad.shape)) if d != 1]
    return _reduction_bytes(grad, dims, processors) if isinstance(mask, list) and mask[-1] is True else 0


def _reduction_bytes(tensor: _Tensor, dims: Any, processors: Multiprocessors) -> int:
    """Return the bytes of the partial results of a sum over ``dims``, which exist if several blocks of
    threads share a result (``setReduceConfig`` and ``global_memory_size`` in
    aten/src/ATen/native/cuda/Reduce.cuh). 0 if ``dims`` include the innermost dimension in memory, as such a
    sum needs little; if ``dims`` is not a list of dimensions; and for a tensor without dimensions."""
    if not isinstance(dims, list) or not dims or not tensor.shape or not tensor.elements:
        return 0
    reduced = {d % len(tensor.shape) for d in dims}
    by_stride = sorted(
        (s, n, d) for d, (n, s) in enumerate(zip(tensor.shape, tensor.strides, strict=True)) if n > 1
    )
    if not by_stride or by_stride[0][2] in reduced:
        return 0
    row = 1  # length of the contiguous run of dimensions that stay
    others = list(by_stride)
    while others and others[0][2] not in reduced and others[0][0] == row:
        row *= others.pop(0)[1]
    inputs = math.prod(tensor.shape[d] for d in reduced)
    outputs = tensor.elements // inputs
    vector = next(v for v in (4, 2, 1) if row % v == 0 and all(s % v == 0 for s, *_ in others))
    most_threads = 512 // vector
    width_limit, height_limit = (
        min(most_threads, 1 << max(0, n.bit_length() - 1)) for n in (outputs // vector, inputs)
    )
    height = min(height_limit, most_threads // min(width_limit, 32))
    width = min(width_limit, most_threads // height)
    values = -(-inputs // height)  # of one thread
    grid = -(-outputs // vector // width)
    target = processors.count * (processors.threads // (width * height))
    if values < 256 or grid > target:
        return 0
    blocks = max(min(-(-target // grid), -(-values // 16)), -(-values // 256))
    return int(_state_bytes(tensor) * outputs * blocks * width * vector) if blocks > 1 else 0


def _state_bytes(tensor: _Tensor) -> int:
    return 8 if "int" in tensor.dtype or tensor.dtype == "bool" else max(4, tensor.item_bytes)


def _distances_bytes(base: str, args: Sequence[Any]) -> int:
    """Return an upper bound on the bytes of partial results in the backward of distances, which sums the
    gradients of all pairs' coordinates over the second point of the pair (DistanceKernel.cu). ``base``:
    "_cdist_backward" or "_pdist_backward"."""
    grad, points = args[:2]
    size, count = points.shape[-1], points.shape[-2]
    first, second = grad.shape[-2:] if base == "_cdist_backward" else (count, count - 1)
    strides = [first * size, size, 1]
    pairs = dataclasses.replace(points, shape=[second, first, size], strides=strides)
    return _reduction_bytes(pairs, [0], Multiprocessors())


def _parsed(value: Any) -> Any:
    if isinstance(value, dict) and "t" in value:
        shape, strides, dtype = value["t"][:3]
        return _Tensor(shape=shape, strides=strides, dtype=dtype)
    if isinstance(value, dict) and "torch" in value:
        return value["torch"]
    return [_parsed(v) for v in value] if isinstance(value, list) else value


def _flat(value: Any) -> Iterable[Any]:
    return (x for v in value for x in _flat(v)) if isinstance(value, list) else (value,)


def _option(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any) -> Any:
    return kwargs[name] if name in kwargs else args[index] if len(args) > index else default


def _sort_bytes(tensor: _Tensor, length: int, *, is_last: bool = True) -> int:
    """Return the bytes beside values and indices in a sort of rows of ``length`` (Sort.cpp, Sort.cu in
    aten/src/ATen/native/cuda). ``is_last``: whether a row is contiguous; otherwise input, values and indices
    are copied."""
    elements, item_bytes = tensor.elements, tensor.item_bytes
    if length <= _SMALL_SORT:
        return 8 * length
    rows = elements // length
    per_element = 24 + 2 * item_bytes if 1 < rows < _FEW_ROWS else 16 + item_bytes
    return elements * (per_element + (0 if is_last else 8 + 2 * item_bytes)) + elements // 5


def _sort(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    tensor: _Tensor = args[0]
    # sort(x, dim, descending), or sort(x, *, stable, dim, descending)
    dim = kwargs.get("dim", next((a for a in args[1:] if type(a) is int), -1))
    if not tensor.shape:
        return 0
    return _sort_bytes(tensor, tensor.shape[dim], is_last=tensor.strides[dim] == 1)


def _topk(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside topk: of the counts of digits, or of the sort of the chosen values, whichever
    is more (TensorTopK.cpp, TensorTopK.cu)."""
    tensor, k, dim = args[0], args[1], _option(args, kwargs, 2, "dim", -1)
    if not tensor.shape:
        return 0
    length = tensor.shape[dim]
    rows = tensor.elements // max(1, length)
    chosen = dataclasses.replace(tensor, shape=[rows, k], strides=[k, 1])
    counts_bytes = 1600 * rows + tensor.elements // 3
    has_counts = length >= 400 and (length >= 20_000 or rows > 4000 or tensor.elements >= 400_000)
    sort_bytes = 0
    if k > _SMALL_SORT:
        sort_bytes = _sort_bytes(chosen, k) + chosen.elements * (8 + chosen.item_bytes)
    return max(counts_bytes if has_counts else 0, sort_bytes)


def _median(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside a median: those of a sort for the median of all elements, 0 for medians along a
    dimension (Sorting.cpp)."""
    tensor: _Tensor = args[0]
    if len(args) > 1 or kwargs:
        return 0
    return _sort_bytes(tensor, tensor.elements) + tensor.elements * (8 + tensor.item_bytes)


def _unique(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inside:
    """Return the bytes inside unique, before its results exist: those of the sorted keys and, if the inverse
    or the counts are asked for, of their positions (Unique.cu)."""
    tensor: _Tensor = args[0]
    has_positions = any(args[2:4]) or any(kwargs.get(n) for n in ("return_inverse", "return_counts"))
    per_element = (24 if has_positions else 0) + 2 * tensor.item_bytes
    return Inside(alone_bytes=tensor.elements * per_element + tensor.elements // 5)


def _index_put(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside index_put with ``accumulate``: those of the sort of the linear indices and
    their positions, in int64, and of a copy of values that are broadcast or not contiguous (Indexing.cu). 0
    without ``accumulate``."""
    target: _Tensor = args[0]
    indices, values = args[1], args[2]
    if not _option(args, kwargs, 3, "accumulate", False):
        return 0
    tensors = [i for i in indices if isinstance(i, _Tensor)]
    masked_dims = sum(len(i.shape) for i in tensors if i.dtype in ("bool", "uint8"))
    indexed = masked_dims + sum(i.dtype not in ("bool", "uint8") for i in tensors)
    first = next((n for n, i in enumerate(indices) if i is not None), 0)
    inner: int = math.prod(target.shape[:first]) * math.prod(target.shape[first + indexed :])
    if masked_dims:
        count = max(1, values.elements // max(1, inner))  # of a broadcast value it is not known
    else:
        count = math.prod(_broadcast([i.shape for i in tensors]))
    written: int = count * inner
    is_copied = values.elements < written or values.copy_bytes
    return int(48 * count + count // 4 + (written * target.item_bytes if is_copied else 0))


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    dims = max(map(len, shapes), default=0)
    padded = [[1] * (dims - len(shape)) + list(shape) for shape in shapes]
    return [max(sizes) for sizes in zip(*padded, strict=True)]


def _embedding_bytes(indices: _Tensor, weights: int, grad: _Tensor) -> Inside:
    """Return the bytes inside the backward of an embedding of ``weights`` rows: first of the sort of
    ``indices`` and their positions, then of partial sums of at most ten rows in at least float32
    (Embedding.cu, EmbeddingBackwardKernel.cu). ``grad``: the gradient of the output."""
    count, item_bytes, width = indices.elements, indices.item_bytes, grad.shape[-1]
    segments = min(count, weights)
    partial_segments = count // 10 + segments
    row_bytes = width * max(4, grad.item_bytes)
    sums_bytes = (3 * count + 2 * segments + partial_segments) * item_bytes + partial_segments * row_bytes
    sort_bytes = 5 * count * item_bytes + count // 4
    copy_bytes = grad.copy_bytes
    return Inside(beside_bytes=sums_bytes + copy_bytes, alone_bytes=sort_bytes + copy_bytes)


def _embedding(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inside:
    grad, indices, weights, _, is_scaled = args[:5]
    if indices.elements <= _SMALL_EMBEDDING and not is_scaled:
        return Inside()
    return _embedding_bytes(indices, weights, grad)


def _embedding_bag(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inside:
    """Return the bytes inside the backward of an embedding bag: as of an embedding for sums and means, none
    for the mode "max" (EmbeddingBag.cu). ``args``: those of _embedding_bag_backward or, without the offsets,
    of _embedding_bag_dense_backward."""
    numbers = [a for a in args[4:] if type(a) is int]  # number of weights, mode, perhaps a padding index
    weights, mode = numbers[:2]
    return _embedding_bytes(args[1], weights, args[0]) if mode != 2 else Inside()


def _softmax_backward(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inside:
    """Return the bytes inside the backward of softmax, with its result: those of the product of gradient and
    output, of the result, and of a contiguous copy of a gradient that is not contiguous (SoftMax.cu). Traces
    show the first two."""
    grad = args[0]
    output_bytes = grad.elements * dataclasses.replace(grad, dtype=args[3]).item_bytes
    return Inside(alone_bytes=output_bytes + grad.bytes + grad.copy_bytes)


def _ctc_backward(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inside:
    """Return the bytes inside the backward of the CTC loss: of log probabilities as large as forward's and,
    for long inputs, of two more tensors by step, sample and label (LossCTC.cu). Traces show a part of
    these."""
    log_probs, log_alpha = args[1], args[6]
    (steps, batch, labels), states = log_probs.shape, log_alpha.shape[2]
    is_long = 2 * steps + 24 * batch / 10 + 2 * labels / 10 > 450
    own_bytes = 2 * steps * batch * (states + 1) // 2 * log_probs.item_bytes if is_long else 0
    return Inside(alone_bytes=log_probs.bytes + log_alpha.bytes + own_bytes)


def _multinomial(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside multinomial: with replacement those of normalized and of cumulated
    probabilities, else of one of these (MultinomialKernel.cu)."""
    return int(args[0].bytes * (2 if _option(args, kwargs, 2, "replacement", False) else 1))


def _fourier(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside a Fourier transform: those of a copy of the input, 0 if the transformed
    dimensions are the innermost in memory (SpectralOps.cpp)."""
    tensor, dims = args[:2]
    inner = [d % len(tensor.shape) for d in dims]
    outer = sorted(set(range(len(tensor.shape))) - set(inner), key=lambda d: -tensor.strides[d])
    return 0 if tensor.lies_in((*outer, *inner)) else int(tensor.bytes)


def _group_norm_backward(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes inside the backward of group norm: those of copies of gradient and input, each only
    if it is not in the layout that the input has, channels last or contiguous (group_norm.cpp)."""
    tensors = args[:2]
    if tensors[1].is_channels_last:
        return sum(t.bytes for t in tensors if not t.is_channels_last)
    return _copies(tensors, kwargs)


def _copies(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    return sum(t.copy_bytes for t in args if isinstance(t, _Tensor))


_FORMULAS: Final[Mapping[str, Callable[[Sequence[Any], Mapping[str, Any]], Any]]] = {  # to int or Inside
    "sort": _sort,
    "topk": _topk,
    "median": _median,
    "nanmedian": _median,
    "_unique2": _unique,
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "_unsafe_index_put": _index_put,
    "embedding_dense_backward": _embedding,
    "_embedding_bag_backward": _embedding_bag,
    "_embedding_bag_dense_backward": _embedding_bag,
    "_softmax_backward_data": _softmax_backward,
    "_ctc_loss_backward": _ctc_backward,
    "multinomial": _multinomial,
    # DistanceKernel.cu: the gradient of each coordinate of each pair; the norm of order 0 has none
    "_cdist_backward": lambda args, _: (
        args[0].elements * args[1].shape[-1] * args[1].item_bytes * bool(args[3])
    ),
    "_pdist_backward": lambda args, _: 2 * args[0].elements * args[1].shape[-1] * args[1].item_bytes,
    # IndexKernel.cpp: the position of each element among those of the mask
    "masked_scatter": lambda args, _: 8 * args[1].elements,
    # Repeat.cu: sums of the repeats
    "repeat_interleave": lambda args, _: args[0].bytes if args and isinstance(args[0], _Tensor) else 0,
    # SpectralOps.cpp: cuFFT overwrites its input, so that this is copied
    "_fft_c2r": lambda args, _: args[0].bytes,
    "_fft_r2c": _fourier,
    "_fft_c2c": _fourier,
    # Loss.cpp: the logarithm of the sigmoid and the unreduced loss
    "binary_cross_entropy_with_logits": lambda args, _: Inside(alone_bytes=2 * args[0].bytes),
    # SoftMax.cu, layer_norm_kernel.cu, group_norm.cpp, ScanKernels.cpp: inputs are made contiguous
    "_softmax": _copies,
    "_log_softmax": _copies,
    "_log_softmax_backward_data": _copies,
    "native_layer_norm": _copies,
    "native_layer_norm_backward": _copies,
    "native_group_norm_backward": _group_norm_backward,
    "_fused_rms_norm": _copies,
    "_fused_rms_norm_backward": _copies,
    "cumsum": _copies,
    "cumprod": _copies,
}
REDUCTIONS: Final[Mapping[str, Callable[..., int]]] = {  # by multiprocessors, too
    "sum": _sum,
    "mean": _sum,
    "convolution_backward": _bias_gradient,
    # ReduceMomentKernel.cu: a mean, a sum of squares and two counts. ReduceArgMaxKernel.cu,
    # ReduceMaxValuesKernel.cu: a value and its index.
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), functools.partial(_reduced, item_bytes=16)),
    **dict.fromkeys(("max", "min", "argmax", "argmin"), functools.partial(_reduced, item_bytes=16)),
    **dict.fromkeys(("amax", "amin"), _reduced),
    **dict.fromkeys(("any", "all"), functools.partial(_reduced, item_bytes=1)),
    **dict.fromkeys(("norm", "linalg_vector_norm"), functools.partial(_reduced, dims_at=2, least_bytes=4)),
    "prod": functools.partial(_reduced, least_bytes=4),
}
