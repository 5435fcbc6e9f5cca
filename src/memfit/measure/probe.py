"""Calibration: operators run alone on this machine, for their time and for the memory inside them.

An operator's own peak (outputs included) cannot be seen on fake tensors where a kernel takes scratch
memory; running it once on real tensors of the same shapes shows it. Both figures are labelled
calibration wherever they are used.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from memfit.measure.memory import PeakCounter
from memfit.techniques.offload import Parked, Spool
from memfit.types.machine import Calibration

_RNN_BACKWARD = "aten.mkldnn_rnn_layer_backward.default"
_REPEATS = 5
_OP_LIMIT_S = 0.1  # no single operator may eat the budget
_MATMUL_SIZE = 1024
_COPY_BYTES = 64 * 2**20
_BETWEEN_BYTES = 8 * 2**20  # what other operators of a step put into the caches between two calls
_LARGE_BYTES = 4 * 2**20
_FILE_BYTES, _FILES = 64 * 2**10, 64


def calibrate(signatures: Iterable[str], *, budget_s: float, counter: PeakCounter) -> Calibration:
    """Probe the machine's rates, then the signatures in order until ``budget_s`` is spent."""
    begun = time.perf_counter()
    rates = {str(d).removeprefix("torch."): _matmul_flops_s(d) for d in (torch.float32, torch.bfloat16)}
    bandwidth, overhead_s = _copy_bytes_s(), _overhead_s()
    disk_bytes_s, disk_file_s = _disk()
    op_s: dict[str, float] = {}
    op_peak: dict[str, int] = {}
    op_kept: dict[str, int] = {}
    for signature in signatures:
        if time.perf_counter() - begun > budget_s:
            break
        if (found := probe(signature, counter)) is not None:
            op_s[signature], op_peak[signature] = found.seconds, found.peak_bytes
            if found.kept_bytes:
                op_kept[signature] = found.kept_bytes
    return Calibration(
        threads=torch.get_num_threads(),
        overhead_s=overhead_s,
        flops_s=rates,
        bandwidth_bytes_s=bandwidth,
        disk_bytes_s=disk_bytes_s,
        disk_file_s=disk_file_s,
        op_s=op_s,
        op_peak_bytes=op_peak,
        op_kept_bytes=op_kept,
        took_s=time.perf_counter() - begun,
    )


class Probed(NamedTuple):
    """One operator alone: the time of a call, the bytes at its own peak, and those of them that are a
    kernel's workspace for backward, whose size fake tensors do not know."""

    seconds: float
    peak_bytes: int
    kept_bytes: int = 0


def probe(signature: str, counter: PeakCounter) -> Probed | None:
    """None where the operator cannot be run alone."""
    try:
        call, args, kwargs = ready(signature)
        before = counter.live_bytes()
        counter.reset_peak()
        out = call(*args, **kwargs)  # no input asks for a gradient; kernels that look see training
        peak = counter.peak_bytes() - before
        kept = sum(t.nbytes for t in _tensors(out) if t.dtype == torch.uint8 and "mkldnn" in signature)
        del out
        return Probed(_typical_s(lambda: call(*args, **kwargs)), peak, kept)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return None  # an argument that JSON cannot carry, or values the kernel refuses


def ready(signature: str) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """(operator, real arguments, keyword arguments), to be called."""
    name, args, kwargs = json.loads(signature)
    inputs = [_real(a) for a in args]
    if name == _RNN_BACKWARD:
        inputs = _after_forward(inputs)
    return _operator(name), inputs, {k: _real(v) for k, v in kwargs.items()}


def _after_forward(inputs: list[Any]) -> list[Any]:
    """oneDNN's recurrent backward reads the workspace that its forward wrote; anything else crashes it."""
    *tensors, reverse, mode, hidden, layers, biases, train, both, sizes, first, _ = inputs
    out, hy, cy, workspace = torch.ops.aten.mkldnn_rnn_layer(
        *tensors[:7], reverse, sizes, mode, hidden, layers, biases, both, first, train
    )
    ends = (reverse, mode, hidden, layers, biases, train, both, sizes, first, workspace)
    return [*tensors[:7], out, hy, cy, *tensors[10:], *ends]


def _tensors(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]


def _best_s(call: Callable[[], Any]) -> float:
    """Shortest of a few calls: other work on the machine only ever adds time."""
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _OP_LIMIT_S:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _typical_s(call: Callable[[], Any]) -> float:
    """Median of a few calls that do not find their operands in the caches nearest to the processor, as in a
    step. The shortest of calls in a row was a quarter short of a step's."""
    between, taken = torch.ones(_BETWEEN_BYTES // 4), list[float]()
    while len(taken) < _REPEATS and sum(taken) < _OP_LIMIT_S:
        between.add_(1.0)
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _operator(name: str) -> Any:
    space, packet, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _real(value: Any) -> Any:
    if isinstance(value, list):
        return [_real(v) for v in value]
    if isinstance(value, dict):
        if "t" in value:
            return _tensor(*value["t"])
        if "torch" in value:
            return getattr(torch, value["torch"])
        if "device" in value:
            return torch.device(value["device"])
        raise ValueError(f"cannot be made again: {value}")
    return value


def _tensor(shape: list[int], stride: list[int], dtype_name: str, seen_as: str = "") -> torch.Tensor:
    """Small random numbers; zeros for integers, which are valid indices everywhere; true for masks."""
    if seen_as == "conj":
        return _tensor(shape, stride, dtype_name).conj()
    dtype = getattr(torch, dtype_name)
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    if dtype == torch.bool:
        return tensor.fill_(True)
    if not dtype.is_floating_point and not dtype.is_complex:
        return tensor.zero_()
    if any(s == 0 for s in stride) and tensor.numel():
        stored = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor.as_strided([stored], [1]).fill_(0.5).as_strided(shape, stride)
    return tensor.uniform_(0.1, 1.0) if dtype.is_floating_point else tensor.fill_(0.5)


def _matmul_flops_s(dtype: torch.dtype) -> float:
    n = _MATMUL_SIZE
    left, right, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=out)
    return 2 * n**3 / _best_s(lambda: torch.mm(left, right, out=out))


def _copy_bytes_s() -> float:
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source).copy_(source)
    return 2 * _COPY_BYTES / _best_s(lambda: target.copy_(source))


def _disk() -> tuple[float, float]:
    """(bytes a second, seconds a tensor more) of writing tensors to a file and reading them back, as
    activation offload does: through the page cache, large ones and many of the smallest, in places that
    a step before has used."""
    spool = Spool()

    def seconds(tensor: torch.Tensor, count: int) -> float:
        start = time.perf_counter()
        parked = [Parked(tensor, spool) for _ in range(count)]
        while parked:
            parked.pop().back()
        return time.perf_counter() - start

    large, small = torch.ones(_LARGE_BYTES // 4), torch.ones(_FILE_BYTES // 4)
    large_s = min(seconds(large, _COPY_BYTES // _LARGE_BYTES) for _ in range(3))
    small_s = min(seconds(small, _FILES) for _ in range(3))
    spool.close()
    bytes_s = 2 * _COPY_BYTES / large_s
    return bytes_s, max(0.0, small_s / _FILES - 2 * _FILE_BYTES / bytes_s)


def _overhead_s() -> float:
    """What autograd and Python add to one operator of no size, forward and backward averaged."""
    x, calls = torch.ones(1, requires_grad=True), 200
    factor = torch.ones(1)

    def chain() -> None:
        y = x
        for _ in range(calls):
            y = y * factor
        y.backward()

    chain()
    alone_s = _best_s(lambda: torch.mul(factor, factor))
    return max(0.0, _best_s(chain) / (2 * calls) - alone_s)
