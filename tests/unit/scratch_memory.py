"""The memory that kernels take inside, of operators run alone once, without timing them."""

from __future__ import annotations

import contextlib
import functools

from memfit.runtime.counting_allocator import CountingAllocator
from memfit.runtime.op_benchmark import CANNOT_RUN, measure_call
from memfit.types.machine import Calibration
from memfit.types.trace import Trace


@functools.cache
def _peak_bytes(signature: str, counter: CountingAllocator) -> int | None:
    with contextlib.suppress(*CANNOT_RUN):
        return measure_call(signature, counter)[1].peak_bytes
    return None


def probed(traced: Trace, counter: CountingAllocator) -> Calibration:
    """Return the peak of each operator of the trace, but of collectives and of operators that cannot run
    alone."""
    signatures = {op.signature for op in traced.ops if "c10d" not in op.op}
    peaks = {s: peak for s in signatures if (peak := _peak_bytes(s, counter)) is not None}
    return Calibration(op_peak_bytes=peaks)
