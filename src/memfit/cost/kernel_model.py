"""Seconds of one kernel on an accelerator that was not measured, by class of operator.

The rate of a matrix product is the device's dense peak, times the ratio that large products reach (catalog),
times what its shape leaves of it: whole waves of output tiles over the multiprocessors, tiles that extend
beyond the matrix, and a tile's fixed work beside its inner loop. Attention is modelled the same way over
tiles of queries. Operators that only move bytes run at a ratio of the memory bandwidth. No kernel is shorter
than its launch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from memfit.types.machine import Device
from memfit.types.trace import OpCall

# Share of the peak that large operators reach, used if the catalog has none; marked assumed in reports.
ASSUMED_RATIOS = {
    "matmul": 0.72,
    "matmul_float8": 0.60,
    "matmul_tf32": 0.70,
    "matmul_float32": 0.85,
    "attention": 0.45,
    "attention_backward": 0.36,
    "memory": 0.85,
}
ASSUMED_MULTIPROCESSORS = 128  # 108 of an A100, 132 of an H100, 148 of a B200
LAUNCH_S = 2e-6  # time from the start of an empty kernel to the start of the next (nodes of CUDA graphs)

# (rows, columns, share of the largest tile's rate): an inner step reads rows + columns elements and
# multiplies rows x columns, so small tiles are bound by shared memory (CUTLASS's efficient GEMM notes).
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.94), (64, 128, 0.82), (128, 64, 0.82), (64, 64, 0.7))
# Cost of filling the pipeline and writing the tile, in elements of the inner dimension, at this rate in
# FLOP/s of one multiprocessor (an H100's in half precision). Faster multiprocessors spend the same time on
# it.
_TILE_START, _TILE_START_FLOPS_S = 128, 7.5e12
_SPLITS = (1, 2, 4, 8)  # ways to split the inner dimension over multiprocessors that would be idle
# (number of half-precision elements that row lengths are a multiple of, share of the rate). Assumed, after
# NVIDIA's guide to matrix multiplication, which shows that the rate falls in steps.
_ALIGNED = ((8, 1.0), (4, 0.7), (2, 0.45), (1, 0.25))
_ROW_START = 128  # in elements of a normalised row, which has its own block of threads; assumed
STRIDED, BROADCAST = 0.6, 0.8  # share of the bandwidth, by layout; assumed
NARROW = 0.7  # share of the bandwidth of a memory-bound product: its tiles start and end more than they run
# 8-bit products that accumulate in full precision, as in the backward of torchao and Transformer Engine, take
# more instructions than the fast accumulation: about three quarters of its rate; assumed.
FULL_SUM = 0.75
_WHOLE = (  # these have their own kernels, which are not sensitive to the layout
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "native_",
    "_scaled_dot",
    "embedding",
    "_fused",
    "_foreach",
    "nll_loss",
    "convolution",
    "_softmax",
    "_log_softmax",
    "sum",
    "mean",
    "_scaled_mm",
    "_grouped_mm",
)
_LARGE = 8192  # matrix size for which the catalog's product ratios hold
# Start and end costs of a query tile in keys, and the same of a key tile in backward. FlashAttention-2's
# published curves over the length (Dao 2023, figures 5 and 6) reach half of the rate at about as many keys.
_KEYS_START, _KEYS_START_BACKWARD = 240, 300
_QUERY_TILE = 128
_HEAD_START = 16  # in elements of the head dimension: exponentials beside the products
_HALF = ("bfloat16", "float16")

_PRODUCTS = {  # position of their first matrix among the arguments
    "mm": 0,
    "bmm": 0,
    "_scaled_mm": 0,
    "_grouped_mm": 0,
    "addmm": 1,
    "baddbmm": 1,
    "_addmm_activation": 1,
}
_CAUSAL_AT = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_efficient_attention_backward": 11,
    "_scaled_dot_product_cudnn_attention": 6,
    "_scaled_dot_product_cudnn_attention_backward": 14,
}


class Product(NamedTuple):
    """Sizes of a batched matrix product: ``batch`` products of a matrix (``rows``, ``inner``) with a matrix
    (``inner``, ``columns``).
    """

    batch: int
    rows: int
    columns: int
    inner: int


class Scores(NamedTuple):
    """Sizes that decide the time of an attention kernel.

    ``tiles``: batch x heads x number of tiles of 128 queries. ``keys``: number of keys that a query attends
    to, on average. ``share``: part of the queries x keys scores that is computed, less than 1 for causal
    attention. ``backward``: True for the gradient; then ``tiles`` counts tiles of 128 keys, and ``keys`` is
    the number of queries that attend to a key, on average.
    """

    tiles: int
    keys: float
    head_dim: int
    share: float
    backward: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Rates of one accelerator.

    ``flops_s``: peak FLOP/s by dtype. ``bandwidth_bytes_s``: peak memory bandwidth. ``ratios``: share of
    these peaks that large operators reach, by class of operator; the classes are the keys of
    `ASSUMED_RATIOS`, such as "matmul", "attention" and "memory". ``multiprocessors``: their number.
    """

    flops_s: Mapping[str, float]
    bandwidth_bytes_s: float
    ratios: Mapping[str, float]
    multiprocessors: int = ASSUMED_MULTIPROCESSORS

    def seconds(self, op: OpCall) -> float:
        """Return the seconds from the start of the operator's kernel to the start of the next kernel: the
        longer of its arithmetic and its memory traffic, plus 2 microseconds for the launch.
        """
        return max(self.arithmetic_s(op), self.moving_s(op)) + LAUNCH_S

    def moving_s(self, op: OpCall) -> float:
        return op.moved_bytes / (self.bandwidth_bytes_s * self.ratios["memory"] * layout_share(op.signature))

    def arithmetic_s(self, op: OpCall) -> float:
        if not op.flops:
            return 0.0
        shape, kind = shape_of(op.signature), "matmul"
        flops: float = op.flops
        share = 1.0
        if isinstance(shape, Scores):
            kind = "attention_backward" if shape.backward else "attention"
            flops *= shape.share
            share = _attention_share(shape, self.multiprocessors)
        elif isinstance(shape, Product):
            share = _alignment_share(shape, op.dtype) * (FULL_SUM if _sums_fully(op.signature) else 1.0)
            start = _TILE_START * self.rate(op.dtype) / self.multiprocessors / _TILE_START_FLOPS_S
            share *= product_share(shape, self.multiprocessors, start) / _large_share(
                self.multiprocessors, start
            )
        return flops / (self.rate(op.dtype) * self.ratio(kind, op.dtype) * share)

    def rate(self, dtype: str) -> float:
        """Return the device's peak FLOP/s for the dtype. All dtypes that begin with "float8" have the same.
        If it is not known, that of float32 is returned, and if that is not known either, infinity.
        """
        name = "float8" if dtype.startswith("float8") else dtype
        return self.flops_s.get(name) or self.flops_s.get("float32") or math.inf

    def ratio(self, kind: str, dtype: str) -> float:
        if kind != "matmul" or dtype in _HALF:
            return self.ratios[kind]
        name = "float8" if dtype.startswith("float8") else dtype
        return self.ratios.get(f"matmul_{name}", self.ratios["matmul_float32"])


def kernels(device: Device) -> Kernels | None:
    """Return the device's rates. Shares that the catalog does not have are those of `ASSUMED_RATIOS`; without
    a number of multiprocessors there are 128. None if the peak FLOP/s or the memory bandwidth of the device
    is unknown.
    """
    if not device.peak_flops or device.bandwidth_bytes_s is None:
        return None
    catalog_ratios = {name: fact.value for name, fact in device.efficiency_ratio.items()}
    return Kernels(
        flops_s={k: f.value for k, f in device.peak_flops.items()},
        bandwidth_bytes_s=device.bandwidth_bytes_s.value,
        ratios=ASSUMED_RATIOS | catalog_ratios,
        multiprocessors=int(
            device.multiprocessor_count.value if device.multiprocessor_count else ASSUMED_MULTIPROCESSORS
        ),
    )


def bound_by(op: OpCall, rates: Kernels | None) -> str:
    """Return what limits the operator's speed: "memory" if moving its bytes takes longer than its arithmetic,
    else "attention" for attention and "matmul" for any other operator.

    Operators without FLOPs are limited by "memory". If ``rates`` is None, operators with FLOPs are taken as
    limited by their arithmetic.
    """
    if not op.flops:
        return "memory"
    kind = "attention" if "attention" in op.op or isinstance(shape_of(op.signature), Scores) else "matmul"
    return kind if rates is None or rates.arithmetic_s(op) >= rates.moving_s(op) else "memory"


def product_share(shape: Product, multiprocessors: int, start: float = _TILE_START) -> float:
    """Return which share of the rate of an infinitely large product a product of this shape reaches on
    ``multiprocessors`` multiprocessors, with the best size of its tiles and the best split of its inner
    dimension.

    ``start``: fixed cost of a tile, as a number of elements of the inner dimension.
    """
    best = 0.0
    for rows, columns, rate in _TILES:
        tiles = shape.batch * -(-shape.rows // rows) * -(-shape.columns // columns)
        useful_share = shape.batch * shape.rows * shape.columns / (tiles * rows * columns)
        for split in _SPLITS:
            if split > 1 and (tiles * split > 2 * multiprocessors or shape.inner < 256 * split):
                break
            waves = tiles * split / multiprocessors
            inner = shape.inner / split
            best = max(best, rate * useful_share * waves / math.ceil(waves) * inner / (inner + start))
    return best


def _alignment_share(shape: Product, dtype: str) -> float:
    """Return the share of its rate that a half-precision product keeps with its numbers of columns and of
    inner elements: 1 if both are multiples of 8, else 0.7 if of 4, 0.45 if of 2, and 0.25 otherwise. For
    other dtypes the result is 1.

    Half-precision rows that do not start at a multiple of 16 bytes are loaded in smaller pieces.
    """
    if dtype not in _HALF:
        return 1.0
    return next(share for step, share in _ALIGNED if not (shape.columns % step or shape.inner % step))


@functools.lru_cache(maxsize=1 << 14)
def _sums_fully(signature: str) -> bool:
    """Return whether the operator is an 8-bit product (aten._scaled_mm) that accumulates in full precision:
    ``use_fast_accum``, its eighth argument, is not True. False for any other operator.
    """
    if not signature.startswith('["aten._scaled_mm'):
        return False
    _, args, kwargs = json.loads(signature)
    return not (args[7:8] == [True] or kwargs.get("use_fast_accum") is True)


@functools.cache
def _large_share(multiprocessors: int, start: float) -> float:
    return product_share(Product(1, _LARGE, _LARGE, _LARGE), multiprocessors, start)


def _attention_share(shape: Scores, multiprocessors: int) -> float:
    start = _KEYS_START_BACKWARD if shape.backward else _KEYS_START
    waves = shape.tiles / multiprocessors
    # unequal causal tiles even out over many waves
    wave_share = waves / math.ceil(waves) if waves < 4 else 1.0
    head_share = shape.head_dim / (shape.head_dim + _HEAD_START) * (128 + _HEAD_START) / 128
    return wave_share * shape.keys / (shape.keys + start) * min(1.0, head_share)


@functools.lru_cache(maxsize=1 << 16)
def shape_of(signature: str) -> Product | Scores | None:
    """Return the sizes of a matrix product (`Product`: mm, addmm, bmm, baddbmm, _scaled_mm, _grouped_mm, not
    linear) or of attention (`Scores`), read from the operator's signature, a JSON text with [name, arguments,
    keyword arguments].

    None for any other operator, if the text is not JSON, and if the tensors do not have the number of
    dimensions that such an operator takes.
    """
    try:
        name, args, _ = json.loads(signature)
    except ValueError:
        return None
    base = name.split(".")[1] if name.count(".") > 1 else name
    if base == "kernel":
        return _synthetic_shape(args[3], args[4])
    if "attention" in base:
        return _scores(base, args)
    if base not in _PRODUCTS:
        return None
    left, right = (_sizes(a) for a in args[_PRODUCTS[base] :][:2])
    if base == "_grouped_mm" or len(left) < 2 or len(right) < 2:
        return _grouped_product(left, right)
    return Product(math.prod(left[:-2]), left[-2], right[-1], left[-1])


@functools.lru_cache(maxsize=1 << 16)
def layout_share(signature: str) -> float:
    """Return the speed at which the operator moves memory with the layout of its tensors, relative to a copy
    of contiguous tensors: 0.6 if a tensor is not contiguous, else 0.8 if they differ in size (not counting
    tensors of one element), else 1. torch's pointwise kernels load several elements at once only in the last
    case (TensorIterator).

    For some operators the layout does not count: matrix products have 0.7, layer norms of width w have w / (w
    + 128), others with their own kernels, such as softmax and convolution, have 1, and so have operators that
    are not of torch.
    """
    try:
        name, args, _ = json.loads(signature)
    except ValueError:
        return 1.0
    tensors = [a["t"] for a in args if isinstance(a, dict) and "t" in a]
    base = name.split(".")[1] if name.startswith("aten.") else ""
    if not base:
        return 1.0
    if base in _PRODUCTS:
        return NARROW
    if base.startswith("native_layer_norm") and tensors:
        width = tensors[0][0][-1] if tensors[0][0] else 1
        return float(width / (width + _ROW_START))
    if base.startswith(_WHOLE):
        return 1.0
    if not all(_is_contiguous(shape, strides) for shape, strides, *_ in tensors):
        return STRIDED
    return BROADCAST if len({math.prod(shape) for shape, *_ in tensors if math.prod(shape) > 1}) > 1 else 1.0


def _is_contiguous(shape: list[int], strides: list[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= max(1, size)
    return True


def _synthetic_shape(kind: str, shape: list[int]) -> Product | Scores | None:
    """Return the sizes of the kernel that a synthetic operator (techniques/synthetic_kernel.py) stands for.

    For ``kind`` "mm", ``shape`` is [batch, rows, columns, inner]; for "attention" and "attention_backward",
    it is [batch x heads, queries, keys, head dim, causal]. For any other ``kind`` the result is None.
    """
    if kind == "mm":
        return Product(*shape)
    if not kind.startswith("attention"):
        return None
    heads, queries, keys, head_dim, causal = shape
    return _make_scores(heads, queries, keys, head_dim, bool(causal), "backward" in kind)


def _grouped_product(left: list[int], right: list[int]) -> Product | None:
    """Return the sizes of a grouped matrix product, with the number of groups as the batch. ``left`` is the
    shape (rows, inner) or (groups, rows, inner), and ``right`` is (groups, inner, columns). None for other
    numbers of dimensions.

    The rows of a ``left`` without groups are divided equally between the groups, rounded up, because the
    routing of tokens is unknown.
    """
    if len(left) == 2 and len(right) == 3:
        return Product(right[0], -(-left[0] // right[0]), right[-1], left[-1])
    if len(left) == 3 and len(right) == 3:
        return Product(left[0], left[1], right[-1], left[-1])
    return None


def _scores(base: str, args: list[Any]) -> Scores | None:
    backward = "backward" in base
    query, key = (_sizes(a) for a in args[backward:][:2])
    if len(query) != 4 or len(key) != 4:
        return None
    index = _CAUSAL_AT.get(base, 4)
    causal = index < len(args) and args[index] is True
    return _make_scores(
        query[0] * query[1], query[2], key[2], query[3], causal and query[2] == key[2], backward
    )


def _make_scores(heads: int, queries: int, keys: int, head_dim: int, causal: bool, backward: bool) -> Scores:
    share = min(1.0, (1 + _QUERY_TILE / queries) / 2) if causal else 1.0
    tiles = heads * -(-(keys if backward else queries) // _QUERY_TILE)
    return Scores(tiles, (queries if backward else keys) * share, head_dim, share, backward)


def _sizes(value: Any) -> list[int]:
    return list(value["t"][0]) if isinstance(value, dict) and "t" in value else []
