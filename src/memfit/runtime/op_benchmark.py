"""Calibration: run single operators on a device of this machine to measure their time and peak memory.

If a kernel allocates scratch memory, the peak of an operator's call (including outputs) cannot be seen on
fake tensors. Running it once on real tensors of the same shapes shows it. Times and peaks are labelled as
calibration wherever they are used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memfit.runtime.devices import memory_info, synchronize
from memfit.runtime.memory import PeakCounter
from memfit.techniques.offload import Spool, SpooledTensor
from memfit.types.device_kind import HOST
from memfit.types.machine import Calibration

_HOST = torch.device(HOST)
_RNN_BACKWARD = "aten.mkldnn_rnn_layer_backward.default"
_REPEATS = 10
_CALLS, _FEWEST_CALLS = 9, 2  # per operator
_HEAVIEST, _CALLS_OF_LIGHT = 64, 4  # the other operators are a small share of a step, and there are hundreds
_OP_LIMIT_S = 0.1  # no single operator may use up the budget
_MATMUL_SIZE = 1024
_DEVICE_MATMUL_SIZE = 4096  # large enough for the matrix units of an accelerator
_SLOW_MATMUL_S = 5e-3  # an accelerator that needs longer for the smaller product is not given the larger one
_COPY_BYTES = 64 * 2**20
_DEVICE_CACHE_BYTES = 256 * 2**20  # several times the cache of an accelerator
_IN_A_ROW_S, _MOST_IN_A_ROW = 1e-3, 100
_BETWEEN_BYTES = 8 * 2**20  # written between two calls, as other operators of a step fill the caches
_LARGE_BYTES = 4 * 2**20
_FILE_BYTES, _FILES = 64 * 2**10, 64
_SCHEDULED = Path("/proc/thread-self/schedstat")


def calibrate(
    signatures: Iterable[str],
    *,
    timing_s: float,
    counter: PeakCounter,
    rates: bool = True,
    device: torch.device = _HOST,
) -> Calibration:
    """Run the operators that ``signatures`` describe (JSON, see `prepare_call`) on ``device`` and return
    their times (medians, in seconds) and peak bytes.

    They are run in order, which should be that of their share of a step: the first 64 up to nine times each,
    the others up to four times. None is begun after ``timing_s`` seconds. With ``rates``, the machine itself
    is measured first: matrix products, copies, offloading and the overhead of a call; without, these fields
    keep their defaults. This takes from the same ``timing_s``, but is never cut short. Operators that cannot
    run alone are listed in ``not_timed``; those for which no time was left are in no field. ``counter``, of
    this device, measures the peaks."""
    start, waited_s = time.perf_counter(), _waited_s()
    machine = _rates(device) if rates else Calibration()
    probes: dict[str, ProbeResult] = {}
    failures: list[str] = []
    for index, signature in enumerate(signatures):
        if time.perf_counter() - start > timing_s:
            break
        calls = _CALLS if index < _HEAVIEST else _CALLS_OF_LIGHT
        if (result := probe(signature, counter, device, calls)) is not None:
            probes[signature] = result
        else:
            failures.append(signature)
    took_s = time.perf_counter() - start
    return dataclasses.replace(
        machine,
        threads=torch.get_num_threads(),
        op_s={s: p.seconds for s, p in probes.items()},
        op_peak_bytes={s: p.peak_bytes for s, p in probes.items()},
        op_kept_bytes={s: p.kept_bytes for s, p in probes.items() if p.kept_bytes},
        op_spread_ratio={s: p.spread_ratio for s, p in probes.items()},
        not_timed=tuple(failures),
        load_count=os.getloadavg()[0],
        waited_ratio=min(1.0, (_waited_s() - waited_s) / took_s),
        took_s=took_s,
    )


def _rates(device: torch.device) -> Calibration:
    dtypes = (torch.float32, torch.bfloat16)
    disk_bytes_s, disk_file_s = _disk() if device == _HOST else (_host_bytes_s(device), 0.0)
    return Calibration(
        overhead_s=_overhead_s(device),
        flops_s={str(d).removeprefix("torch."): _matmul_flops_s(d, device) for d in dtypes},
        bandwidth_bytes_s=_copy_bytes_s(device),
        disk_bytes_s=disk_bytes_s,
        disk_file_s=disk_file_s,
    )


def _waited_s() -> float:
    """Return the seconds for which this thread, though ready to run, has waited for a CPU since it started,
    as the kernel counts them, or 0 if it does not count them."""
    try:
        return int(_SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def workspaces(
    signatures: Iterable[str], *, timing_s: float, counter: PeakCounter
) -> Iterator[tuple[str, CallMemory | None]]:
    """Run each signature's operator once on the processor, in order, as the results are asked for. End when
    ``timing_s`` seconds have passed, without the remaining operators. Yield (signature, bytes that its
    operator takes, as ``counter`` counts them), with None instead of the bytes if the operator cannot run
    alone."""
    start = time.perf_counter()
    for signature in signatures:
        if time.perf_counter() - start > timing_s:
            return
        try:
            yield signature, measure_call(signature, counter)[1]
        except CANNOT_RUN:
            yield signature, None


class CallMemory(NamedTuple):
    """Bytes of one operator call. ``peak_bytes``: its peak, including outputs but not inputs. ``kept_bytes``:
    the part of the peak that is a oneDNN workspace kept for backward."""

    peak_bytes: int
    kept_bytes: int


class ProbeResult(NamedTuple):
    """Measurements of one operator run alone.

    ``seconds`` is the median time of its calls. ``peak_bytes`` is the peak of a call, including outputs but
    not inputs. ``kept_bytes`` is the part of this peak that is a kernel's workspace for backward, whose size
    fake tensors do not know. ``spread_ratio`` says by which fraction the median time lies above the shortest.
    """

    seconds: float
    peak_bytes: int
    kept_bytes: int = 0
    spread_ratio: float = 0.0


def probe(
    signature: str, counter: PeakCounter, device: torch.device = _HOST, calls: int = _CALLS
) -> ProbeResult | None:
    """Measure one operator on ``device``: run it once for the memory, which ``counter`` counts, then at most
    ``calls`` times for the time. Return None if it cannot run alone (`CANNOT_RUN`)."""
    try:
        call, usage = measure_call(signature, counter, device)
        seconds, spread_ratio = _typical_s(call, device, calls)
        return ProbeResult(seconds, usage.peak_bytes, usage.kept_bytes, spread_ratio)
    except CANNOT_RUN:
        return None


# Errors of an operator that cannot run alone: an argument cannot be made from its signature, or the kernel
# rejects made-up values.
CANNOT_RUN = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    MemoryError,
)


def measure_call(
    signature: str, counter: PeakCounter, device: torch.device = _HOST
) -> tuple[Callable[[], Any], CallMemory]:
    """Run the signature's operator once on ``device``. Return a function that repeats the call with the same
    made-up arguments, and the bytes that the call took, as ``counter`` counts them. Raises one of the errors
    `CANNOT_RUN`, such as RuntimeError, if the operator cannot run alone."""
    if device != _HOST:  # the first product takes a workspace that stays
        torch.mm(*(torch.ones(2, 2, device=device) for _ in range(2)))
    call, args, kwargs = prepare_call(signature, device)
    start_bytes = counter.live_bytes()
    counter.reset_peak()
    out = call(*args, **kwargs)  # no input requires a gradient; kernels that check see training
    peak_bytes = counter.peak_bytes() - start_bytes
    kept_bytes = sum(t.nbytes for t in _tensors(out) if t.dtype == torch.uint8 and "mkldnn" in signature)
    return lambda: call(*args, **kwargs), CallMemory(peak_bytes, kept_bytes)


def prepare_call(
    signature: str, device: torch.device = _HOST
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return (operator, arguments with real tensors of made-up values on ``device``, keyword arguments) for a
    ``signature``, the JSON text that `memfit.trace.signature.describe` makes. Raises one of the errors
    `CANNOT_RUN`, such as ValueError, if an argument cannot be made or there is no such operator."""
    name, args, kwargs = json.loads(signature)
    inputs = [_real(a, device) for a in args]
    if name == _RNN_BACKWARD:
        inputs = _after_forward(inputs)
    return _operator(name), inputs, {k: _real(v, device) for k, v in kwargs.items()}


def _after_forward(inputs: list[Any]) -> list[Any]:
    """Return ``inputs``, the arguments of oneDNN's recurrent backward, with the outputs and the workspace of
    a forward call. Backward reads the workspace that forward wrote, and crashes on anything else."""
    *tensors, reverse, mode, hidden, layers, biases, train, bidirectional, sizes, batch_first, _ = inputs
    out, hy, cy, workspace = torch.ops.aten.mkldnn_rnn_layer(
        *tensors[:7], reverse, sizes, mode, hidden, layers, biases, bidirectional, batch_first, train
    )
    trailing_arguments = (
        reverse,
        mode,
        hidden,
        layers,
        biases,
        train,
        bidirectional,
        sizes,
        batch_first,
        workspace,
    )
    return [*tensors[:7], out, hy, cy, *tensors[10:], *trailing_arguments]


def _tensors(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]


def _best_s(call: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest time of up to 10 calls in seconds, until ``device`` has done its work. No further
    call is begun once they have taken 0.1 s together. It is the shortest because other work on the machine
    only adds time."""
    times_s: list[float] = []
    while len(times_s) < _REPEATS and sum(times_s) < _OP_LIMIT_S:
        start = time.perf_counter()
        call()
        synchronize(device)
        times_s.append(time.perf_counter() - start)
    return min(times_s)


def _typical_s(
    call: Callable[[], Any], device: torch.device, most_calls: int = _CALLS
) -> tuple[float, float]:
    """Return (median time of 2 to ``most_calls`` calls in seconds; by which fraction it lies above the
    shortest). After the second call, no further one is begun once they have taken 0.1 s together. On an
    accelerator, as `_typical_of_device_s` says.

    As in a step, the calls do not find their operands in the innermost caches: the shortest of consecutive
    calls is about a quarter below the time in a step. The time that a call waited for a CPU is subtracted,
    but at least a twentieth of its time always counts."""
    if device != _HOST:
        return _typical_of_device_s(call, device, most_calls)
    filler, times_s = torch.ones(_BETWEEN_BYTES // 4), list[float]()
    while len(times_s) < most_calls and (sum(times_s) < _OP_LIMIT_S or len(times_s) < _FEWEST_CALLS):
        filler.add_(1.0)
        waited_s, start = _waited_s(), time.perf_counter()
        call()
        wall_s = time.perf_counter() - start
        times_s.append(max(wall_s / 20, wall_s - (_waited_s() - waited_s)))
    median_s = statistics.median(times_s)
    return median_s, median_s / min(times_s) - 1


def _typical_of_device_s(
    call: Callable[[], Any], device: torch.device, most_series: int
) -> tuple[float, float]:
    """Return (median time of a call in seconds; by which fraction it lies above the shortest) on an
    accelerator. It is the median of 2 to ``most_series`` series, each of calls that run back to back for
    about a millisecond (at most 100) before the host waits for them, because a step does not wait for each of
    its operators either."""
    filler = torch.ones(_between_bytes(device) // 4, device=device)

    def seconds(count: int) -> float:
        filler.add_(1.0)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / count

    count = max(1, min(_MOST_IN_A_ROW, int(_IN_A_ROW_S / max(seconds(1), 1e-7))))
    times_s: list[float] = []
    while len(times_s) < most_series and (sum(times_s) * count < _OP_LIMIT_S or len(times_s) < _FEWEST_CALLS):
        times_s.append(seconds(count))
    median_s = statistics.median(times_s)
    return median_s, median_s / min(times_s) - 1


def _between_bytes(device: torch.device) -> int:
    """Return the bytes of a tensor that displaces others from the device's caches: 8 MiB on a processor, else
    256 MiB, but at most 1/32 of the free memory."""
    return _BETWEEN_BYTES if device == _HOST else min(_DEVICE_CACHE_BYTES, memory_info(device)[0] // 32)


def _operator(name: str) -> Any:
    space, packet, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)


def _real(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_real(v, device) for v in value]
    if isinstance(value, dict):
        if "t" in value:
            return _tensor(*value["t"], device=device)
        if "torch" in value:
            return getattr(torch, value["torch"])
        if "device" in value:
            return device if value["device"] == HOST else torch.device(value["device"])  # traced on the CPU
        raise ValueError(
            "the description of an operator's argument has none of the keys t (tensor), torch (object of "
            f"torch) and device: {value}"
        )
    return value


def _tensor(
    shape: list[int], stride: list[int], dtype_name: str, variant: str = "", *, device: torch.device = _HOST
) -> torch.Tensor:
    """Return a tensor of this shape, stride and dtype on ``device``. Floating-point numbers are random,
    between 0.1 and 1. Integers are zeros, which are always valid indices, and booleans are True. Complex
    numbers, and floating-point numbers of tensors with a stride of 0, are 0.5. ``variant`` "conj" makes a
    conjugate view."""
    if variant == "conj":
        return _tensor(shape, stride, dtype_name, device=device).conj()
    dtype = getattr(torch, dtype_name)
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if dtype == torch.bool:
        return tensor.fill_(True)
    if not dtype.is_floating_point and not dtype.is_complex:
        return tensor.zero_()
    if any(s == 0 for s in stride) and tensor.numel():
        stored_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor.as_strided([stored_elements], [1]).fill_(0.5).as_strided(shape, stride)
    return tensor.uniform_(0.1, 1.0) if dtype.is_floating_point else tensor.fill_(0.5)


def _matmul_flops_s(dtype: torch.dtype, device: torch.device) -> float:
    def seconds(n: int) -> float:
        left, right, out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
        torch.mm(left, right, out=out)
        return _best_s(lambda: torch.mm(left, right, out=out), device)

    size, took_s = _MATMUL_SIZE, seconds(_MATMUL_SIZE)
    if device != _HOST and took_s < _SLOW_MATMUL_S:
        size, took_s = _DEVICE_MATMUL_SIZE, seconds(_DEVICE_MATMUL_SIZE)
    return 2 * size**3 / took_s


def _copy_bytes_s(device: torch.device) -> float:
    size_bytes = _COPY_BYTES if device == _HOST else 4 * _between_bytes(device)
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    return 2 * size_bytes / _best_s(lambda: target.copy_(source), device)


def _host_bytes_s(device: torch.device) -> float:
    """Return the bytes per second of copies between ``device`` and pinned memory of the host, as activation
    offload makes them: there and back, one after the other."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    pinned = torch.empty(_COPY_BYTES // 4, pin_memory=True)

    def both_ways() -> None:
        pinned.copy_(source, non_blocking=True)
        source.copy_(pinned, non_blocking=True)

    both_ways()
    return 2 * _COPY_BYTES / _best_s(both_ways, device)


def _disk() -> tuple[float, float]:
    """Return (bytes written or read per second, additional seconds per tensor) for writing tensors to a file
    and reading them back as activation offload does: through the page cache, and in places of the file that
    were used before. The first is measured with tensors of 4 MiB, the second with 64 tensors of 64 KiB, the
    smallest that are offloaded."""
    spool = Spool()

    def seconds(tensor: torch.Tensor, count: int) -> float:
        start = time.perf_counter()
        tensors = [SpooledTensor(tensor, spool) for _ in range(count)]
        while tensors:
            tensors.pop().back()
        return time.perf_counter() - start

    large, small = torch.ones(_LARGE_BYTES // 4), torch.ones(_FILE_BYTES // 4)
    large_s = min(seconds(large, _COPY_BYTES // _LARGE_BYTES) for _ in range(3))
    small_s = min(seconds(small, _FILES) for _ in range(3))
    spool.close()
    bytes_s = 2 * _COPY_BYTES / large_s
    return bytes_s, max(0.0, small_s / _FILES - 2 * _FILE_BYTES / bytes_s)


def _overhead_s(device: torch.device) -> float:
    """Return the seconds that autograd and Python add to a call of an operator without work, averaged over
    forward and backward."""
    x, calls = torch.ones(1, requires_grad=True, device=device), 200
    factor = torch.ones(1, device=device)

    def chain() -> None:
        y = x
        for _ in range(calls):
            y = y * factor
        y.backward()

    chain()
    alone_s = _best_s(lambda: torch.mul(factor, factor), device)
    return max(0.0, _best_s(chain, device) / (2 * calls) - alone_s)
