"""Alarms of a run of memfit: of the steps that its worker reports."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from memfit.monitoring.alarms import AlarmDetector
from memfit.monitoring.limits import AlarmLimits
from memfit.monitoring.record import WatchStep
from memfit.types.result import Estimate, Interval
from memfit.types.units import MIB, format_bytes

# Measured peaks of a processor lie up to 2 % above the value of a prediction (benchmarks/memory_truth.md).
_ABOVE_RATIO, _ABOVE_BYTES = 1.02, MIB
# Steps in each of which memory must grow, in runs that are too short for the test of creep.
_RISING_STEPS: Final = 10
_REPORTED: Final = {
    "step_s": "step_s",
    "allocated_bytes": "allocated_bytes",
    "step_peak_bytes": "peak_allocated_bytes",
    "heap_bytes": "heap_bytes",
    "host_bytes": "host_bytes",
    "loss": "loss",
    "grad_norm": "grad_norm",
}
_RISING: Final = {"allocated_bytes": "tensors", "heap_bytes": "the memory that the process has allocated"}


class RunAlarms:
    """Collects what is unusual in the steps of one rank. ``estimate``: the prediction of the run.
    ``copy_bytes``: what its asynchronous saves may take in addition."""

    def __init__(self, estimate: Estimate, limits: AlarmLimits | None = None, *, copy_bytes: int = 0) -> None:
        allocated = estimate.allocated_bytes
        high_bytes = max(allocated.high, allocated.value * _ABOVE_RATIO) + _ABOVE_BYTES + copy_bytes
        predicted = Interval(value=allocated.value, low=allocated.low, high=high_bytes)
        self._limits = limits or AlarmLimits()
        self._detector = AlarmDetector(self._limits, prediction={"allocated_bytes": predicted})
        self._recent: dict[str, deque[int]] = {n: deque(maxlen=_RISING_STEPS + 1) for n in _RISING}
        self._creeping = False
        self.texts: list[str] = []

    def add(self, event: Mapping[str, Any]) -> None:
        """Collect the alarms of a step. ``event``: the event "step" with which the worker reported it."""
        step = int(event["step"])
        values = {name: event[key] for key, name in _REPORTED.items() if event.get(key) is not None}
        for alarm in self._detector.add(WatchStep(step=step, time_s=time.time(), **values)):
            self._creeping |= alarm.kind == "creep"
            self.texts.append(f"step {step}: {alarm.text}")
        for name, recent in self._recent.items():
            if (value := values.get(name)) is not None:
                recent.append(int(value))

    def conclude(self) -> tuple[str, ...]:
        """Return one sentence for each alarm. To be called after the last step. Without an alarm of creep,
        there is one more sentence if memory grew in each of the last 10 steps, and in all by at least the
        limit ``creep_bytes``."""
        rising = [] if self._creeping else [text for n in _RISING if (text := self._rise(n))]
        return (*self.texts, *rising[:1])

    def _rise(self, name: str) -> str:
        values = list(self._recent[name])
        growth = values[-1] - values[0] if values else 0
        is_rising = all(a < b for a, b in itertools.pairwise(values))
        if len(values) <= _RISING_STEPS or not is_rising or growth < self._limits.creep_bytes:
            return ""
        per_step = format_bytes(growth / _RISING_STEPS)
        return (
            f"{_RISING[name]} after a step grew in each of the last {_RISING_STEPS} steps, by {per_step} each"
        )
