"""Workspaces: memory that a kernel allocates and frees while it runs. Fake tensors do not show them.

This module says which operators may use a workspace, an upper bound on its size, and whether that could move
the peak. A probe (the operator run alone, runtime/op_benchmark.py) replaces the bound by a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy

from memfit.cost.cuda_workspaces import CUDA_BOUNDS, cuda_bound_bytes
from memfit.cost.memory import MemoryProfile, levels, memory_profile, with_kept
from memfit.types.device_kind import HOST, device_kind
from memfit.types.machine import Calibration
from memfit.types.trace import OpCall, Phase, Trace, base_name
from memfit.types.units import KIB

# A possible rise below this share of the peak is ignored: it is within the interval of the estimate.
MATTERS_RATIO: Final = 0.003
_BLOCK: Final = 16  # most channels that oneDNN stores together in a block
_SMALL_INPUT: Final = 20_480  # elements; single samples up to this size are convolved by torch's own kernel
_ITEM_BYTES: Final = {
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
}
_HALVES: Final = ("bfloat16", "float16")
_ONCE: Final = 64 * KIB  # rounding of small buffers

# CPU kernels that write their outputs and use no other memory, in any precision, if all tensors have the same
# dtype.
_POINTWISE: Final = (
    "abs add addcdiv addcmul arange atan2 bernoulli bitwise_and bitwise_not bitwise_or bitwise_xor celu "
    "ceil clamp clamp_max clamp_min clone copy cos detach div elu empty empty_like empty_strided eq erf erfc "
    "exp expm1 fill floor fmod full full_like ge gelu gt hardsigmoid hardswish hardtanh isinf isnan le "
    "leaky_relu lerp log log10 log1p log2 logical_and logical_not logical_or logical_xor lt masked_fill "
    "maximum minimum mish mul ne neg new_empty new_empty_strided "
    "new_full new_ones new_zeros normal ones ones_like pow rand rand_like randn randn_like random reciprocal "
    "relu remainder round rsqrt rsub scalar_tensor selu sigmoid sign silu sin softplus sqrt square sub tan "
    "tanh threshold trunc uniform where zero zeros zeros_like "
    "elu_backward gelu_backward hardsigmoid_backward hardswish_backward hardtanh_backward "
    "leaky_relu_backward log_sigmoid_backward mish_backward sigmoid_backward silu_backward "
    "softplus_backward tanh_backward threshold_backward cat stack _to_copy"
)
# The same, but only in single or double precision.
_OTHERS: Final = (
    "_fused_adam _fused_adamw _fused_sgd _local_scalar_dense _log_softmax _log_softmax_backward_data "
    "_softmax _softmax_backward_data addmm amax amin avg_pool2d avg_pool2d_backward binary_cross_entropy "
    "binary_cross_entropy_backward constant_pad_nd dot embedding embedding_dense_backward index_select "
    "linalg_vector_norm max_pool2d_with_indices max_pool2d_with_indices_backward mean mm mse_loss "
    "mse_loss_backward native_batch_norm native_layer_norm nll_loss2d_backward "
    "nll_loss2d_forward nll_loss_backward nll_loss_forward resize select_backward set slice_backward "
    "slice_scatter smooth_l1_loss smooth_l1_loss_backward split_with_sizes sum tril triu "
    "view wait_tensor"
)
_ANY_DTYPE: Final = frozenset(_POINTWISE.split())
_PLAIN: Final = _ANY_DTYPE | frozenset(_OTHERS.split())
# Of these, the operators that take indices, masks or any dtype without converting them.
_AS_THEY_ARE: Final = (
    "_local_scalar_dense _to_copy amax amin arange bernoulli clone constant_pad_nd copy detach embedding "
    "embedding_dense_backward empty empty_like empty_strided fill full full_like index_select masked_fill "
    "max_pool2d_with_indices max_pool2d_with_indices_backward new_empty new_empty_strided new_full new_ones "
    "new_zeros nll_loss2d_backward nll_loss2d_forward nll_loss_backward nll_loss_forward normal ones "
    "ones_like rand rand_like randn randn_like random resize scalar_tensor select_backward set "
    "slice_backward slice_scatter split_with_sizes tril triu uniform view wait_tensor zero zeros zeros_like"
)
_CONVERTS_NOTHING: Final = frozenset(_AS_THEY_ARE.split())
# These copy an input whose memory layout they cannot use, or whose layout differs from that of the others.
_PRODUCTS: Final = frozenset({"mm", "addmm"})
_BY_LAYOUT: Final = frozenset(
    {
        "_log_softmax",
        "_log_softmax_backward_data",
        "_softmax",
        "_softmax_backward_data",
        "avg_pool2d",
        "avg_pool2d_backward",
        "embedding_dense_backward",
        "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward",
        "native_batch_norm",
        "native_layer_norm",
        "nll_loss2d_backward",
        "nll_loss2d_forward",
    }
)
_NO_KERNELS: Final = ("memfit.", "stream.", "c10d.", "_c10d_functional.", "prim.", "profiler.")
# The only operators checked on an accelerator, because their workspaces are the large ones; of attention,
# CUDA's backward kernels only.
_CONVOLUTIONS: Final = frozenset({"convolution", "convolution_backward", "cudnn_convolution"})
_FLASH_FORWARD: Final = "_scaled_dot_product_flash_attention"
_FLASH_BACKWARD: Final = "_scaled_dot_product_flash_attention_backward"
_CUDA_ATTENTION: Final = frozenset(
    {_FLASH_FORWARD, _FLASH_BACKWARD, "_scaled_dot_product_efficient_attention_backward"}
)
_MULTIPROCESSORS: Final = range(16, 193, 4)  # of one CUDA device
_RECURRENT: Final = frozenset({"mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UnprobedWorkspaces:
    """Operators that may allocate memory while they run (a workspace), were not probed (run alone to measure
    it), and could raise the peak.

    ``high_bytes``: the peak if each of them needs the upper bound of its workspace. ``signatures``: of these
    operators, largest effect on the peak first. ``calls``: name of the operator, as `base_name` returns it,
    -> number of its calls in the last traced step that could raise the peak.
    """

    high_bytes: int
    signatures: tuple[str, ...]
    calls: Mapping[str, int]

    def assumption(self) -> str:
        """Return the sentence for the estimate's assumptions, with each operator and its number of calls.
        Example: "workspaces not probed, so the upper end includes their upper bounds: convolution (12
        calls)".
        """
        names = ", ".join(f"{name} ({count} calls)" for name, count in self.calls.items())
        return f"workspaces not probed, so the upper end includes their upper bounds: {names}"


def find_unprobed(
    trace: Trace, profile: MemoryProfile, calibration: Calibration
) -> UnprobedWorkspaces | None:
    """Return the operators whose workspaces were not probed (they are not in ``calibration.op_peak_bytes``)
    and could raise the peak by more than 0.3 %. ``profile``: of ``trace``; it has the peak.

    None if there are no such operators, or if the trace has no operators or no allocations.
    """
    trace = with_kept(trace, calibration)
    clock, live = levels(trace)
    if not trace.ops or not len(clock):
        return None
    kept_bytes = _kept_bytes(trace, calibration)
    calls = [
        (op, bound)
        for op in trace.ops
        if op.signature not in calibration.op_peak_bytes
        and (op.phase is not Phase.SETUP or op.step == 0)
        and (bound := bound_bytes(op.signature, trace.device, calibration.threads or 1))
    ]
    peaks = [
        (level + bound + kept_bytes, op)
        for level, (op, bound) in zip(
            _with_outputs(trace, clock, live, [op for op, _ in calls]), calls, strict=True
        )
    ]
    threshold = profile.peak_bytes * (1 + MATTERS_RATIO)
    critical_calls = sorted((r for r in peaks if r[0] > threshold), key=lambda r: -r[0])
    if not critical_calls:
        return None
    call_counts: dict[str, int] = {}
    for _, op in critical_calls:
        name = base_name(op.op)
        call_counts[name] = call_counts.get(name, 0) + (op.step == trace.steps - 1)
    return UnprobedWorkspaces(
        high_bytes=max(critical_calls[0][0], profile.peak_bytes + kept_bytes),
        signatures=tuple(dict.fromkeys(op.signature for _, op in critical_calls)),
        calls=call_counts,
    )


def unprobed_signatures(trace: Trace, calibration: Calibration) -> tuple[str, ...]:
    """Return the signatures of the operators whose workspaces were not probed (they are not in
    ``calibration.op_peak_bytes``) and could raise the trace's peak by more than 0.3 %, largest effect first;
    empty if there are none.
    """
    workspaces = find_unprobed(trace, memory_profile(trace, calibration), calibration)
    return workspaces.signatures if workspaces else ()


def _with_outputs(
    trace: Trace, clock: numpy.ndarray, live: numpy.ndarray, ops: Sequence[OpCall]
) -> list[int]:
    """Return for each of ``ops`` the highest live bytes from its start to the start of the trace's next
    operator. They include its outputs. ``clock`` and ``live``: the levels of the trace (`levels`).
    """
    if not ops:
        return []
    starts = sorted({op.clock for op in trace.ops})
    next_starts = dict(zip(starts, [*starts[1:], int(clock[-1]) + 1], strict=True))
    start_indices = numpy.searchsorted(clock, [op.clock for op in ops], side="right") - 1
    end_indices = numpy.searchsorted(clock, [next_starts[op.clock] for op in ops], side="right")
    return [int(live[max(0, i) : max(1, j)].max()) for i, j in zip(start_indices, end_indices, strict=True)]


def _kept_bytes(trace: Trace, calibration: Calibration) -> int:
    """Return an upper bound on the bytes of the unprobed workspaces that recurrent layers on the CPU pass to
    backward in one step.
    """
    return sum(
        _recurrent_bytes(*_sizes(op.signature))
        for op in trace.ops
        if base_name(op.op) == "mkldnn_rnn_layer"
        and op.step == trace.steps - 1
        and op.signature not in calibration.op_peak_bytes
    )


@functools.lru_cache(maxsize=100_000)
def bound_bytes(signature: str, device: str, threads: int) -> int:
    """Return an upper bound on the bytes that the operator uses beside its inputs and outputs while it runs.

    0 if it uses none or is not a torch operator. On an accelerator, only convolutions and nn.Bilinear's
    operator have a bound and, if it runs CUDA's kernels, attention and the operators of `CUDA_BOUNDS`; what
    CUDA's other kernels allocate inside is known exactly and added to the trace (`with_temporaries`).
    ``device``: its kind. ``threads``: number of the CPU's threads that run the operator.
    """
    name = signature[2 : signature.index('"', 2)] if signature.startswith('["') else ""
    base, halves = base_name(name), any(half in signature for half in _HALVES)
    if not name or name.startswith(_NO_KERNELS):
        return 0
    on_cuda = device_kind(device).kernels == "cuda"
    if base == "_trilinear" or (on_cuda and base in CUDA_BOUNDS):
        args = json.loads(signature)[1]
        return _trilinear_bytes(args) if base == "_trilinear" else cuda_bound_bytes(base, args)
    if base in _ANY_DTYPE or (base in _PLAIN and not halves):
        return _copied_bytes(signature, base) if device == HOST else 0
    if device != HOST and base not in _CONVOLUTIONS and not (on_cuda and base in _CUDA_ATTENTION):
        return 0
    _, args, kwargs = json.loads(signature)
    if base in _CONVOLUTIONS:
        return _convolution_bytes(args, backward=base.endswith("backward"), device=device, threads=threads)
    tensors = _tensors([args, kwargs])
    if base in _RECURRENT:
        return _recurrent_bytes(*_sizes(signature))
    if base.startswith("_scaled_dot_product"):
        return _cuda_attention_bytes(args, base) if on_cuda else _attention_bytes(tensors, threads)
    output_bytes = 0  # an output that may first be made in another layout
    if base.startswith("upsample") and not base.endswith("backward"):
        shape, _, dtype = args[0]["t"][:3]
        output_bytes = int(math.prod([*shape[:2], *args[1]])) * _ITEM_BYTES.get(dtype, 1)
    return (sum(map(_tensor_bytes, tensors)) + output_bytes) * (3 if halves else 2) + _ONCE


def _trilinear_bytes(args: Sequence[Any]) -> int:
    """Return an upper bound on the bytes inside nn.Bilinear's operator, on every device: for each index of
    one dimension, it multiplies its first two inputs and the product by the third, and may copy what it
    multiplies."""
    inputs, expanded_dims = [a["t"] for a in args[:3]], args[3:6]
    sizes = [1] * (len(inputs[0][0]) + len(expanded_dims[0]))
    for (shape, *_), expanded in zip(inputs, expanded_dims, strict=True):
        for dim, size in zip((d for d in range(len(sizes)) if d not in expanded), shape, strict=True):
            sizes[dim] = size
    unrolled = args[7] if len(args) > 7 else 1
    products = 4 * math.prod(sizes) // max(1, sizes[unrolled]) * _ITEM_BYTES.get(inputs[0][2], 8)
    return products + 2 * sum(map(_tensor_bytes, inputs)) + _ONCE


def _copied_bytes(signature: str, base: str) -> int:
    """Return an upper bound on the bytes of the copies that the operator's CPU kernel makes of its inputs; 0
    if it makes none. ``base``: the operator's `base_name`.

    Copied are tensors whose layout the kernel cannot use, and tensors whose dtype differs from the one in
    which the kernel computes. If one of these is changed in place, its result needs a copy, too.
    """
    name, args, kwargs = json.loads(signature)
    tensors = [t for t in _tensors([args, kwargs]) if t[0]]
    if base in _PRODUCTS:
        copies = [t for t in tensors if not _takes_product(t)]
        return sum(map(_tensor_bytes, copies)) + _ONCE * bool(copies)
    layouts = {_layout(t) for t in tensors if len(t[0]) > 1} - {""}
    if base in _BY_LAYOUT and (len(layouts) > 1 or "other" in layouts):
        return 2 * sum(map(_tensor_bytes, tensors)) + _ONCE
    if base in _CONVERTS_NOTHING:
        return 0
    if base == "where":
        tensors = tensors[1:]  # the condition is used without conversion
    dtypes = {t[2] for t in tensors}
    widest = _computing_dtype(dtypes)
    if dtypes <= {widest} and not widest.startswith("complex"):
        return 0
    item_bytes = _ITEM_BYTES.get(widest, 8)  # integers alone may become int64 or float32
    mixed_tensors = [t for t in tensors if t[2] != widest] or tensors
    in_place = [t for t in mixed_tensors[:1] if t is tensors[0] and name.split(".")[1].endswith("_")]
    return _ONCE + sum(
        int(math.prod(t[0])) * max(item_bytes, _ITEM_BYTES.get(t[2], 1)) for t in (*mixed_tensors, *in_place)
    )


def _takes_product(tensor: Sequence[Any]) -> bool:
    """Return whether a matrix product can use the tensor without a copy: the rows or the columns of its
    matrices are contiguous or of length 1, or it is not a matrix.
    """
    shape, strides = tensor[:2]
    return len(shape) < 2 or 1 in strides[-2:] or 1 in shape[-2:]


def _layout(tensor: Sequence[Any]) -> str:
    """Return the memory layout of a tensor, given as [shape, strides, ...]: "contiguous", "channels last" or
    "other"; "" if it is both of the first two.
    """
    shape, strides = tensor[:2]
    channels_last = [0, *range(2, len(shape)), 1]
    layouts = [
        layout
        for layout, order in (("contiguous", range(len(shape))), ("channels last", channels_last))
        if _lies_in(order, shape, strides)
    ]
    return "other" if not layouts else (layouts[0] if len(layouts) == 1 else "")


def _lies_in(order: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def _computing_dtype(dtypes: Collection[str]) -> str:
    """Return the floating or complex dtype in which torch computes with tensors of these dtypes together,
    such as "float32" for "bfloat16" and "float16"; "" if all are integers.
    """
    float_dtypes = sorted((d for d in dtypes if d.startswith(("float", "bfloat", "complex"))), key=_wideness)
    if len(float_dtypes) > 1 and set(float_dtypes) == set(_HALVES):
        return "float32"
    return (
        "complex128"
        if {"complex64", "float64"} <= set(float_dtypes)
        else (float_dtypes[-1] if float_dtypes else "")
    )


def _wideness(dtype: str) -> tuple[bool, int]:
    return dtype.startswith("complex"), _ITEM_BYTES.get(dtype, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Convolution:
    """A convolution's arguments.

    Shapes: x (N, C_in, *), weight (C_out, C_in / groups, *), or (C_in, C_out / groups, *) if transposed, out
    (N, C_out, *).
    """

    x: Sequence[int]
    weight: Sequence[int]
    out: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    groups: int
    dtype: str
    backward: bool


def input_bytes(signature: str) -> int:
    """Return the bytes of all tensors in an operator's signature, which are its inputs."""
    return sum(map(_tensor_bytes, _tensors(json.loads(signature)[1:])))


def _convolution(args: list[Any], *, backward: bool) -> _Convolution:
    """Return the arguments of a convolution and the shape of its output. ``args``: those of aten.convolution
    or, with ``backward``, of aten.convolution_backward.
    """
    index = 4 if backward else 3
    stride, padding, dilation, transposed, output_padding, groups = args[index : index + 6]
    x, weight = (a["t"][0] for a in args[int(backward) : int(backward) + 2])
    dimensions = len(x) - 2
    per_dimension = [
        v * dimensions if len(v) == 1 else v for v in (stride, padding, dilation, output_padding)
    ]
    shape = x[2:], weight[2:], *per_dimension
    if backward:
        out = args[0]["t"][0]
    elif transposed:
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, k, s, p, d, m in zip(*shape, strict=True)]
        out = [x[0], weight[1] * groups, *sizes]
    else:
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in zip(*shape, strict=True)]
        out = [x[0], weight[0], *sizes]
    return _Convolution(
        x=x,
        weight=weight,
        out=out,
        dilation=dilation,
        transposed=transposed,
        groups=groups,
        dtype=args[0]["t"][2],
        backward=backward,
    )


def _convolution_bytes(args: list[Any], *, backward: bool, device: str, threads: int) -> int:
    """Return an upper bound on the workspace of a convolution in bytes. ``args``: those of its signature.

    On the CPU, the bound covers oneDNN's reordered copies of input, weight and output with channels padded to
    blocks, each thread's partial sums of weight gradients, and unfolded inputs where a matrix product does
    the work. It was fitted to 1,244 calls of random shapes (1 to 3 dimensions, groups, strides, dilations,
    transposed; float32, float64, bfloat16; 1, 2 and 4 threads). Of 234 other calls, none used more than 0.78
    of the bound (benchmarks/workspaces.py).

    On an accelerator, the bound is one copy of input, weight and output in another layout. It has not been
    checked.
    """
    convolution = _convolution(args, backward=backward)
    item_bytes = _ITEM_BYTES.get(convolution.dtype, 4)
    if device != HOST:
        copies = sum(s[0] * _round_up(s[1], 8) * math.prod(s[2:]) for s in (convolution.x, convolution.out))
        return (copies + math.prod(convolution.weight)) * item_bytes
    halves = convolution.dtype in _HALVES
    item_bytes, groups = max(4, item_bytes), convolution.groups
    cin, cout = convolution.x[1] // groups, convolution.out[1] // groups
    pads_groups = halves and 1 < groups < convolution.x[1]  # each group's channels are padded
    copies = sum(
        s[0] * (groups * _round_up(s[1] // groups) if pads_groups else _round_up(s[1])) * math.prod(s[2:])
        for s in (convolution.x, convolution.out)
    )
    kernel = math.prod(convolution.weight[2:])
    weights = max(_round_up(groups), groups * _round_up(cin) * _round_up(cout)) * kernel
    reordered_elements = 1.5 * (2 * copies + (4 + threads * convolution.backward) * weights)
    return (
        int(
            (
                reordered_elements * (3 if halves and convolution.backward else 1)
                + _unfolded_elements(convolution, threads)
            )
            * item_bytes
        )
        + _ONCE
    )


def _unfolded_elements(convolution: _Convolution, threads: int) -> int:
    """Return the number of elements of the convolution's unfolded input, in which each patch that the kernel
    covers is written out; 0 if the convolution does not unfold its input.

    torch's own kernels unfold the whole batch. oneDNN's matrix products, used for dilated, grouped and narrow
    convolutions, unfold one sample per thread.
    """
    kernel = math.prod(convolution.weight[2:])
    source, positions = (
        (convolution.out, convolution.x) if convolution.transposed else (convolution.x, convolution.out)
    )
    sample_elements = source[1] * kernel * math.prod(positions[2:])
    # of a volume, torch multiplies the first four sizes only
    is_small = convolution.x[0] == 1 and math.prod(convolution.x[:4]) <= _SMALL_INPUT
    if convolution.dtype != "float32" or kernel == 1 or is_small:
        return convolution.x[0] * sample_elements
    min_channels = int(min(convolution.x[1], convolution.out[1]))
    is_narrow = min_channels // convolution.groups < _BLOCK // 2
    if max(convolution.dilation) > 1 or 1 < convolution.groups < min_channels or is_narrow:
        return sample_elements // convolution.groups * min(threads, convolution.groups * convolution.x[0])
    return 0


def _round_up(channels: int, block: int = _BLOCK) -> int:
    return -(-channels // block) * block


def _sizes(signature: str) -> tuple[int, int, int]:
    """Return (length x batch, input size, hidden size) of a recurrent layer's call. The hidden size is taken
    as a third of the rows of the weight, which has those of all gates. For layers with more than three gates
    this is too large.
    """
    args = json.loads(signature)[1]
    (length, batch, width), (gates, _) = args[0]["t"][0], args[1]["t"][0]
    # an LSTM has four gates, so this overestimates its hidden size
    return length * batch, width, gates // 3


def _recurrent_bytes(rows: int, width: int, hidden: int) -> int:
    """Return an upper bound on the bytes of a recurrent layer in one direction: what it keeps for backward
    (gates and states at all positions), doubled to cover its workspace. ``rows``: length x batch. ``width``:
    size of the input.
    """
    return 2 * (rows * (24 * hidden + 10 * width) * 4 + 12 * hidden * (hidden + width) * 4) + _ONCE


def _attention_bytes(tensors: Sequence[Sequence[Any]], threads: int) -> int:
    """Return an upper bound on the bytes that attention on the CPU needs while it runs: scores and sums of
    one block of queries and keys per thread. ``tensors``: those of its signature, queries and keys first.

    In half precision, keys and values are also packed (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
    Backward has three blocks per thread, so the bound always has three.
    """
    (queries, width), keys = tensors[0][0][-2:], tensors[1][0][-2]
    rows = min(int(queries), 256)
    block_bytes = 3 * rows * (min(keys, 512) + width + 2) * 4
    packed_bytes = sum(map(_tensor_bytes, tensors)) if any(t[2] in _HALVES for t in tensors) else 0
    return int(threads * block_bytes + packed_bytes)


def _split_attention_bytes(args: Sequence[Any]) -> int:
    """Return an upper bound on the bytes that CUDA's flash kernel needs in forward while it runs. If few
    queries would not fill the device, the kernel splits the keys into parts and keeps a float32 result of
    each (set_params_splitkv in csrc/flash_attn/flash_api.cpp). 0 if the keys are not split, as always with
    dropout. ``args``: those of its signature: queries and keys of the shape (batch, heads, length, head
    dim), values, probability of dropout.
    """
    (batch, heads, queries, width), keys = args[0]["t"][0], args[1]["t"][0][2]
    if len(args) > 3 and args[3] > 0.0:
        return 0
    key_blocks = math.ceil(keys / (256 if width <= 64 else 128 if width <= 128 else 64))
    blocks = batch * heads * math.ceil(queries / 64)
    parts = max(_key_parts(blocks, key_blocks, 2 * n) for n in _MULTIPROCESSORS)
    padded = _round_up(width, 32 if width <= 128 else 64)
    return int(4 * parts * batch * heads * queries * (padded + 1)) if parts > 1 else 0


@functools.lru_cache(maxsize=10_000)
def _key_parts(blocks: int, key_blocks: int, most_blocks: int) -> int:
    """Return into how many parts the flash kernel splits the keys: the smallest number that keeps the device
    nearly as busy as the best one does (num_splits_heuristic in flash_api.cpp). ``blocks``: those of queries;
    ``most_blocks``: how many the device runs together."""
    if not blocks or blocks >= 0.8 * most_blocks:
        return 1
    counts = range(1, min(128, most_blocks, key_blocks) + 1)
    sizes = {count: math.ceil(key_blocks / count) for count in counts}
    waves = {n: blocks * n / most_blocks for n in counts if n == 1 or sizes[n] != sizes[n - 1]}
    busy = {count: wave / math.ceil(wave) for count, wave in waves.items()}
    return min((n for n in busy if busy[n] >= 0.85 * max(busy.values())), default=1)


def _cuda_attention_bytes(args: Sequence[Any], base: str) -> int:
    """Return an upper bound on the bytes that CUDA's attention needs while it runs: in forward those of
    `_split_attention_bytes`; in backward sums of gradients in float32, and one float32 for each row of the
    scores. ``args``: those of its signature, in backward the output's gradient, queries, keys and values of
    the shape (batch, heads, length, head dim). ``base``: the operator's `base_name`.

    The flash kernel sums the gradient of the queries, with lengths padded to 128 and heads to 32 or, above
    128, to 64 (mha_bwd in csrc/flash_attn/flash_api.cpp). The memory-efficient kernel sums that of queries,
    keys and values in tiles of at most 128 x 128 (workspace_size in fmha kernel_backward.h); it has sums of
    keys and values for large heads only, which this bound always counts.
    """
    if base == _FLASH_FORWARD:
        return _split_attention_bytes(args)
    (batch, heads, queries, width), keys = args[1]["t"][0], args[2]["t"][0][2]
    rows, heads_bytes = _round_up(queries, 128), 4 * batch * heads
    if base == _FLASH_BACKWARD:
        return int(heads_bytes * rows * (_round_up(width, 32 if width <= 128 else 64) + 1))
    columns = max(_round_up(width, 128), _round_up(args[3]["t"][0][3], 128))
    return int(heads_bytes * ((rows + 2 * _round_up(keys, 128)) * columns + queries))


def _tensors(value: Any) -> list[Sequence[Any]]:
    if isinstance(value, list):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, dict):
        return [value["t"]] if "t" in value else [t for v in value.values() for t in _tensors(v)]
    return []


def _tensor_bytes(tensor: Sequence[Any]) -> int:
    return int(math.prod(tensor[0])) * _ITEM_BYTES.get(tensor[2], 1)
