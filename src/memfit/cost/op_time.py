"""Turn a trace into time: every operator on the device's roofline, corrected by what calibration measured.

An operator's time is the first of these that is available: the time measured for its exact signature; on an
accelerator of the catalog that was not measured, the time by its class and shape (kernel_model.py); the time
of a call without work, plus the roofline max(FLOPs / rate, bytes / bandwidth) divided by the efficiency
measured for the same operator and dtype, interpolated between the nearest amounts of work; the plain
roofline, at an assumed efficiency if the rates were not measured. On a processor, each call also costs the
measured overhead of autograd and Python. On an accelerator, kernels wait for their launch only if the host is
slower than the kernels (stream_simulator.py). (Williams et al. 2009.)
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from memfit.cost.kernel_model import Kernels, kernels
from memfit.types.machine import Calibration, Device
from memfit.types.trace import OpCall, Phase

ASSUMED_EFFICIENCY_RATIO = 0.6  # of dense peak, if nothing was measured; marked assumed in reports
ASSUMED_OVERHEAD_S = 5e-6  # one kernel launch
# Host time to issue an operator, its views and the modules around it: Python and autograd in forward,
# autograd's own thread in backward, one call for many tensors in the optimizer. Kernels of compiled regions
# are issued by generated code. (Profiles of eager PyTorch on servers; marked assumed.)
ASSUMED_ISSUE_S = {Phase.FORWARD: 25e-6, Phase.BACKWARD: 15e-6, Phase.OPTIMIZER: 30e-6, Phase.SETUP: 0.0}
ASSUMED_COMPILED_ISSUE_S = 4e-6
COLLECTIVES = ("c10d.", "_c10d_functional.")
FUSED = "memfit."  # a compiled group of pointwise operators, which is one kernel
STREAMS = "stream."  # one stream waits for another; no work
ASSUMED_LINK_BYTES_S = 12e9  # pinned copies over PCIe 4.0 x16 under load


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimeModel:
    """Predicts the seconds of operators on one device.

    ``flops_s``: FLOP/s by dtype. ``bandwidth_bytes_s``: memory bandwidth. ``overhead_s``: added to every
    call, except those whose seconds come from ``kernels``. ``efficiency_ratio``: seconds by `roofline_s` over
    real seconds, for operators without a curve. ``offload_bytes_s``: rate of writing offloaded tensors and of
    reading them back. ``call_s``: seconds that a call takes without work, by operator, from timed operators;
    "" for operators that are not in it. ``curves``: (operator, dtype) -> sorted [(log of the seconds by
    `roofline_s`, efficiency_ratio at that size)], from timed operators. ``kernels``: rates of an accelerator
    of the catalog that was not calibrated, else None.
    """

    calibration: Calibration
    flops_s: Mapping[str, float]
    bandwidth_bytes_s: float
    overhead_s: float
    efficiency_ratio: float
    offload_bytes_s: float
    call_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: Mapping[tuple[str, str], list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    kernels: Kernels | None = None

    def roofline_s(self, op: OpCall) -> float:
        """Return the longer of FLOPs / rate and moved bytes / bandwidth, in seconds. The rate is that of the
        operator's dtype or, if unknown, that of float32. If both are unknown, only the bytes count.
        """
        rate = self.flops_s.get(op.dtype) or self.flops_s.get("float32") or math.inf
        return max(op.flops / rate, op.moved_bytes / self.bandwidth_bytes_s)

    def op_s(self, op: OpCall) -> float:
        """Return the seconds of one call: 0 for a collective (see collectives.py) and for one stream's wait
        for another, else the first of these that is available:

        - the time that the calibration has for exactly this signature, plus ``overhead_s``
        - the time by ``kernels``, from the operator's class and shape
        - ``call_s`` of the operator, plus `roofline_s` over the efficiency, plus ``overhead_s``. The
          efficiency is interpolated in the curve of the same operator and dtype (or float32), and beyond its
          ends that of the nearer end; without a curve it is ``efficiency_ratio``.
        """
        if op.op.startswith((*COLLECTIVES, STREAMS)):
            return 0.0
        measured = self.calibration.op_s.get(op.signature)
        if measured is not None:
            return measured + self.overhead_s
        if self.kernels is not None:
            return self.kernels.seconds(op)
        ideal_s = self.roofline_s(op)
        return _call_s(self.call_s, op) + ideal_s / self._efficiency(op, ideal_s) + self.overhead_s

    def _efficiency(self, op: OpCall, ideal_s: float) -> float:
        curve = self.curves.get((op.op, op.dtype)) or self.curves.get((op.op, "float32"))
        if not curve or ideal_s <= 0:
            return self.efficiency_ratio
        log_ideal = math.log(ideal_s)
        index = bisect.bisect_left(curve, (log_ideal, 0.0))
        if index == 0:
            return curve[0][1]
        if index == len(curve):
            return curve[-1][1]
        (x0, y0), (x1, y1) = curve[index - 1], curve[index]
        return y0 + (y1 - y0) * (log_ideal - x0) / (x1 - x0) if x1 > x0 else y0

    def issue_s(self, op: OpCall) -> float:
        """Return the seconds that the host takes to launch the operator, in parallel with the work of the
        device. 0 if ``kernels`` is None (a CPU, or a calibrated device), and for one stream's wait for
        another.
        """
        if self.kernels is None or op.op.startswith(STREAMS):
            return 0.0
        return ASSUMED_COMPILED_ISSUE_S if op.op.startswith(FUSED) else ASSUMED_ISSUE_S[op.phase]

    def total_s(self, ops: Iterable[tuple[OpCall, int]]) -> float:
        """Return the seconds of (operator, number of calls) pairs, run one after the other: the sum of `op_s`
        or the sum of `issue_s` over all calls, whichever is longer.
        """
        pairs = list(ops)
        work_s = sum(self.op_s(op) * times for op, times in pairs)
        return max(work_s, sum(self.issue_s(op) * times for op, times in pairs))


def time_model(device: Device, calibration: Calibration, seen: Iterable[OpCall] = ()) -> TimeModel | None:
    """Return the time model of the device. FLOP/s and memory bandwidth are the calibration's or, if it has
    none, the catalog's. None if the FLOP/s or the bandwidth are in neither.

    ``seen``: operators. Those of them that ``calibration`` has timed give the seconds without work and the
    efficiency for calls of the same operator with other sizes.
    """
    rates = dict(calibration.flops_s) or {k: f.value for k, f in device.peak_flops.items()}
    catalog_bandwidth = device.bandwidth_bytes_s.value if device.bandwidth_bytes_s else 0.0
    bandwidth = calibration.bandwidth_bytes_s or catalog_bandwidth
    if not rates or not bandwidth:
        return None
    calibrated = bool(calibration.flops_s)
    base_model = TimeModel(
        calibration=calibration,
        flops_s=rates,
        bandwidth_bytes_s=bandwidth,
        overhead_s=calibration.overhead_s if calibrated else ASSUMED_OVERHEAD_S,
        efficiency_ratio=1.0 if calibrated else ASSUMED_EFFICIENCY_RATIO,
        offload_bytes_s=calibration.disk_bytes_s or ASSUMED_LINK_BYTES_S,
        kernels=None if calibrated or device.is_host else kernels(device),
    )
    timed_ops = _timed_ops(base_model, seen)
    call_s = _calls_without_work(timed_ops)
    return dataclasses.replace(base_model, call_s=call_s, curves=_curves(timed_ops, call_s))


def step_basis(device: Device, calibration: Calibration) -> str:
    """Return what a step time by `time_model` rests on: "timed" if the device was calibrated, "published" if
    it is an accelerator whose figures in the catalog are all published, else "assumed"."""
    if calibration.flops_s:
        return "timed"
    facts = [*device.peak_flops.values(), device.bandwidth_bytes_s]
    is_published = all(fact is not None and fact.kind == "published" for fact in facts)
    return "published" if is_published and not device.is_host else "assumed"


_Timed = tuple[OpCall, float, float]  # operator, seconds by `roofline_s`, measured seconds
_LITTLE_WORK_S = 1e-5  # by `roofline_s`; what a call with less takes beyond it is the time of the call itself


def _timed_ops(model: TimeModel, ops: Iterable[OpCall]) -> list[_Timed]:
    """Return the distinct ``ops`` that the model's calibration has timed."""
    distinct_ops = {o.signature: o for o in ops}.values()
    timings = ((op, model.roofline_s(op), model.calibration.op_s.get(op.signature)) for op in distinct_ops)
    return [(op, ideal_s, measured_s) for op, ideal_s, measured_s in timings if measured_s]


def _calls_without_work(timed_ops: Iterable[_Timed]) -> dict[str, float]:
    """Return seconds by operator: the median of what its calls with little work take beyond `roofline_s`.
    The key "" has the median over operators. Empty if no call with little work was timed."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for op, ideal_s, measured_s in timed_ops:
        if ideal_s < min(_LITTLE_WORK_S, measured_s):
            seconds[op.op].append(measured_s - ideal_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "": statistics.median(medians.values())} if medians else {}


def _call_s(call_s: Mapping[str, float], op: OpCall) -> float:
    return call_s.get(op.op, call_s.get("", 0.0))


def _curves(
    timed_ops: Iterable[_Timed], call_s: Mapping[str, float]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the efficiency of each operator and dtype by work, from its calls with more than little work. It
    is at most 1."""
    points: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for op, ideal_s, measured_s in timed_ops:
        if ideal_s >= _LITTLE_WORK_S:
            working_s = max(measured_s - _call_s(call_s, op), ideal_s)
            points[op.op, op.dtype][math.log(ideal_s)] = ideal_s / working_s
    return {key: sorted(curve.items()) for key, curve in points.items()}


def nominal_s(op: OpCall) -> float:
    """Return the seconds of one call at nominal rates, 100 GFLOP/s and 10 GB/s, at least 2 microseconds, for
    a device of unknown speed."""
    return max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6)


def signatures_by_weight(ops: Iterable[tuple[OpCall, int]]) -> list[str]:
    """Return the distinct signatures of ``ops``, which are (operator, calls per step), sorted by the seconds
    of all their calls at nominal rates (100 GFLOP/s, 10 GB/s), longest first.
    """
    weight: dict[str, float] = {}
    for op, times in ops:
        weight[op.signature] = weight.get(op.signature, 0.0) + nominal_s(op) * times
    return sorted(weight, key=lambda s: (-weight[s], s))


# of a probe: calls, most seconds of them, and seconds to make its inputs
_CALLS, _CALLS_S, _SETUP_S = 10, 0.1, 2e-3


def signatures_to_time(
    ops: Iterable[tuple[OpCall, int]], known: Collection[str], *, timing_s: float
) -> list[str]:
    """Return the distinct signatures of ``ops``, which are (operator, calls per step), that are not in
    ``known`` and should be timed.

    They are sorted by the seconds of all their calls, longest first. Another one is added as long as timing
    the ones before it would take less than ``timing_s`` seconds, so the last may exceed that. Seconds are
    those of a machine of nominal rates (100 GFLOP/s, 10 GB/s).
    """
    pairs = list(ops)
    weights_s = {op.signature: nominal_s(op) for op, _ in pairs}
    signatures, spent_s = [], 0.0
    for signature in signatures_by_weight(pairs):
        if signature not in known and spent_s < timing_s:
            signatures.append(signature)
            spent_s += _SETUP_S + max(2 * weights_s[signature], min(_CALLS_S, _CALLS * weights_s[signature]))
    return signatures
