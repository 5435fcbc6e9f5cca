"""From a trace to time: every operator on the device's roofline, with what calibration measured.

An operator's time is, in this order: what was measured for its very signature; the roofline
max(FLOPs / rate, bytes / bandwidth) divided by the efficiency measured for the same operator and dtype
at the nearest amount of work; on an accelerator of the catalog what its class and shape say
(kernel_model.py);
the plain roofline at an assumed efficiency. On a processor each call also costs the measured overhead of
autograd and Python; an accelerator's kernels wait for their issue only where the host is slower than they
are (stream_simulator.py). (Williams et al. 2009.)
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from memfit.cost.kernel_model import Kernels, kernels
from memfit.types.machine import Calibration, Device
from memfit.types.trace import OpCall, Phase

ASSUMED_EFFICIENCY_RATIO = 0.6  # of dense peak, where nothing was measured; marked assumed in reports
ASSUMED_OVERHEAD_S = 5e-6  # one kernel launch
# What the host takes to issue an operator, its views and the modules around it: Python and autograd in
# forward, autograd's own thread in backward, one call for many tensors in the optimizer. The kernels of
# compiled regions are issued by generated code. (Profiles of eager PyTorch on servers; marked assumed.)
ASSUMED_ISSUE_S = {Phase.FORWARD: 25e-6, Phase.BACKWARD: 15e-6, Phase.OPTIMIZER: 30e-6, Phase.SETUP: 0.0}
ASSUMED_COMPILED_ISSUE_S = 4e-6
COLLECTIVES = ("c10d.", "_c10d_functional.")
FUSED = "memfit."  # a compiled group of pointwise operators, one kernel
STREAMS = "stream."  # a stream's wait for another: no work
ASSUMED_LINK_BYTES_S = 12e9  # pinned copies over PCIe 4.0 x16 under load


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimeModel:
    """``curves``: (op, dtype) to sorted [(log of roofline seconds, efficiency)]."""

    calibration: Calibration
    flops_s: Mapping[str, float]
    bandwidth_bytes_s: float
    overhead_s: float
    efficiency_ratio: float
    offload_bytes_s: float
    curves: Mapping[tuple[str, str], list[tuple[float, float]]]
    kernels: Kernels | None = None  # of an accelerator that was not calibrated

    def roofline_s(self, op: OpCall) -> float:
        rate = self.flops_s.get(op.dtype) or self.flops_s.get("float32") or math.inf
        return max(op.flops / rate, op.moved_bytes / self.bandwidth_bytes_s)

    def op_s(self, op: OpCall) -> float:
        """Seconds of one call; of a collective none (collectives.py)."""
        if op.op.startswith((*COLLECTIVES, STREAMS)):
            return 0.0
        measured = self.calibration.op_s.get(op.signature)
        if measured is not None:
            return measured + self.overhead_s
        if self.kernels is not None:
            return self.kernels.seconds(op)
        ideal_s = self.roofline_s(op)
        return ideal_s / self._efficiency(op, ideal_s) + self.overhead_s

    def _efficiency(self, op: OpCall, ideal_s: float) -> float:
        curve = self.curves.get((op.op, op.dtype)) or self.curves.get((op.op, "float32"))
        if not curve or ideal_s <= 0:
            return self.efficiency_ratio
        at = math.log(ideal_s)
        index = bisect.bisect_left(curve, (at, 0.0))
        if index == 0:
            return curve[0][1]
        if index == len(curve):
            return curve[-1][1]
        (x0, y0), (x1, y1) = curve[index - 1], curve[index]
        return y0 + (y1 - y0) * (at - x0) / (x1 - x0) if x1 > x0 else y0

    def issue_s(self, op: OpCall) -> float:
        """Seconds that the host takes to start it, beside the device."""
        if self.kernels is None or op.op.startswith(STREAMS):
            return 0.0
        return ASSUMED_COMPILED_ISSUE_S if op.op.startswith(FUSED) else ASSUMED_ISSUE_S[op.phase]

    def total_s(self, ops: Iterable[tuple[OpCall, int]]) -> float:
        """Of operators one after the other: the longer of their work and their issue."""
        known = list(ops)
        work_s = sum(self.op_s(op) * times for op, times in known)
        return max(work_s, sum(self.issue_s(op) * times for op, times in known))


def time_model(device: Device, calibration: Calibration, seen: Iterable[OpCall] = ()) -> TimeModel | None:
    """``seen``: operators whose signatures calibration measured, to learn efficiencies from.

    None where neither calibration nor catalog knows bandwidth or compute of the device.
    """
    rates = dict(calibration.flops_s) or {k: f.value for k, f in device.peak_flops.items()}
    catalog_bandwidth = device.bandwidth_bytes_s.value if device.bandwidth_bytes_s else 0.0
    bandwidth = calibration.bandwidth_bytes_s or catalog_bandwidth
    if not rates or not bandwidth:
        return None
    calibrated = bool(calibration.flops_s)
    bare = TimeModel(
        calibration=calibration,
        flops_s=rates,
        bandwidth_bytes_s=bandwidth,
        overhead_s=calibration.overhead_s if calibrated else ASSUMED_OVERHEAD_S,
        efficiency_ratio=1.0 if calibrated else ASSUMED_EFFICIENCY_RATIO,
        offload_bytes_s=calibration.disk_bytes_s or ASSUMED_LINK_BYTES_S,
        curves={},
        kernels=None if calibrated or device.kind == "cpu" else kernels(device),
    )
    return dataclasses.replace(bare, curves=_curves(bare, seen))


def _curves(model: TimeModel, seen: Iterable[OpCall]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    points: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for op in {o.signature: o for o in seen}.values():
        measured, ideal_s = model.calibration.op_s.get(op.signature), model.roofline_s(op)
        if measured and ideal_s > 0:
            points[op.op, op.dtype][math.log(ideal_s)] = ideal_s / measured
    return {key: sorted(curve.items()) for key, curve in points.items()}


def _weight_s(op: OpCall) -> float:
    """At nominal rates: 100 GFLOP/s, 10 GB/s."""
    return max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6)


def signatures_by_weight(ops: Iterable[tuple[OpCall, int]]) -> list[str]:
    """Operator signatures, those with most work in a step first."""
    weight: dict[str, float] = {}
    for op, times in ops:
        weight[op.signature] = weight.get(op.signature, 0.0) + _weight_s(op) * times
    return sorted(weight, key=lambda s: (-weight[s], s))


_CALLS, _CALLS_S, _SETUP_S = 10, 0.1, 2e-3  # that a probe takes: calls, at most so long; and its inputs


def signatures_to_time(
    ops: Iterable[tuple[OpCall, int]], known: Collection[str], *, budget_s: float
) -> list[str]:
    """Those by weight that are not ``known`` and whose probes together take ``budget_s`` at nominal rates."""
    pairs = list(ops)
    once = {op.signature: _weight_s(op) for op, _ in pairs}
    chosen, spent_s = [], 0.0
    for signature in signatures_by_weight(pairs):
        if signature not in known and spent_s < budget_s:
            chosen.append(signature)
            spent_s += _SETUP_S + max(2 * once[signature], min(_CALLS_S, _CALLS * once[signature]))
    return chosen
