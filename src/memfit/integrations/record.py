"""What every callback does: one watched step, the peak of every step, one file at the end."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from memfit.api import Prediction
from memfit.conformance.monitor import Monitor
from memfit.runtime.memory import PeakCounter, peak_counter
from memfit.types.conformance import NotConforming
from memfit.types.plan import Plan
from memfit.types.units import format_bytes


class Recorder:
    """``strict``: a plan that was not applied ends the training; ``clip``: the largest gradient norm, None
    where nobody knows. Made when the model is there and training
    has not begun."""

    def __init__(
        self,
        *,
        plan: Plan,
        prediction: Prediction | None,
        why_not: str = "",
        model: torch.nn.Module,
        strict: bool,
        blocks: str | None,
        clip: float | None = None,
    ) -> None:
        self.plan, self.prediction, self.why_not = plan, prediction, why_not
        self.strict, self.blocks, self.clip = strict, blocks, clip
        self.conformance: str | None = None
        self.peak_bytes, self.steps = 0, 0
        self._watch: Monitor | None = None
        self._counter: PeakCounter = peak_counter("cpu")
        gc.collect()
        # whether the counter was there before the model was made or not: its bytes, and what is added now
        self._offset_bytes = _resident_bytes(model) - self._counter.live_bytes()

    def step_begins(self, model: torch.nn.Module, optimizer: Any, device: torch.device) -> None:
        if device.type != "cpu" and self.steps == 0:
            self._counter, self._offset_bytes = peak_counter(str(device)), 0
        self._counter.reset_peak()
        if self.steps == 0:
            self._watch = Monitor(model, optimizer, self.plan, blocks=self.blocks)
            self._watch.clip = self.clip
            self._watch.__enter__()

    def updated(self) -> None:
        """After the optimizer's first step, on every rank alike. Raises NotConforming where strict."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.__exit__()
        try:
            found = watch.conclude()
        except NotConforming as error:
            self.conformance = str(error)
            if self.strict:
                raise
        else:
            self.conformance = str(found)

    def step_ends(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._counter.peak_bytes() + self._offset_bytes)
        self.steps += 1

    def told(self) -> dict[str, Any]:
        """The record. Peaks are of live tensor bytes of this rank, between a step's begin and its end."""
        predicted = self.prediction.allocated_bytes if self.prediction is not None else None
        return {
            "plan": {"techniques": self.plan.to_dict(), "ranks": self.plan.ranks},
            "predicted_peak_bytes": int(predicted.value) if predicted is not None else None,
            "not_predicted": self.why_not,
            "measured_peak_bytes": self.peak_bytes or None,
            "measured_by": self._counter.source,
            "predicted_over_measured_ratio": predicted.value / self.peak_bytes
            if predicted is not None and self.peak_bytes
            else None,
            "steps": self.steps,
            "conformance": self.conformance,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(self.told(), indent=2) + "\n", encoding="utf-8")
        new.replace(path)

    @property
    def line(self) -> str:
        """Predicted against measured in one line."""
        measured = f"peak {format_bytes(self.peak_bytes)} measured over {self.steps} steps"
        if self.prediction is None or not self.peak_bytes:
            return f"memfit: {measured}; not predicted: {self.why_not or 'nothing was measured'}"
        predicted = self.prediction.allocated_bytes.value
        off = 100 * (predicted / self.peak_bytes - 1)
        return f"memfit: {measured}, {format_bytes(predicted)} predicted ({off:+.2f} %); {self.conformance}"


def _resident_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
