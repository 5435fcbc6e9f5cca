"""The common part of the callbacks: check the first step, measure the peak memory of every step, write one
file for each rank at the end."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from memfit.api import Prediction
from memfit.conformance.monitor import Monitor
from memfit.files.replace import write_whole
from memfit.runtime.memory import PeakCounter, peak_counter
from memfit.types.conformance import NotConforming
from memfit.types.plan import Plan
from memfit.types.units import format_bytes


class Recorder:
    """Checks in the first step whether the plan was applied, and measures the peak memory of every step. It
    must be created after the model is built and before training begins.

    ``prediction``: None if there is none; ``why_not`` then says why. ``strict``: whether `updated` raises
    NotConforming if the plan was not applied; otherwise the difference is only kept for the file. ``blocks``:
    module path of the repeated blocks; None: memfit finds them. ``clip``: the largest gradient norm to which
    gradients are clipped, 0 if they are not clipped, None if it is unknown, so that clipping is not checked.
    """

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
        # The model's bytes that the counter does not include: it may have started before or after the model.
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
        """Check after the optimizer's first step whether the plan was applied, and keep the result; later
        calls do nothing. Every rank must call it. Raises NotConforming if the plan was not applied and the
        recorder is strict."""
        if self._watch is None:
            return
        monitor, self._watch = self._watch, None
        monitor.__exit__()
        try:
            conformance = monitor.conclude()
        except NotConforming as error:
            self.conformance = str(error)
            if self.strict:
                raise
        else:
            self.conformance = str(conformance)

    def step_ends(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._counter.peak_bytes() + self._offset_bytes)
        self.steps += 1

    def content(self) -> dict[str, Any]:
        """Return the content of the file, key -> value: "plan"; "predicted_peak_bytes", or None with the
        reason in "not_predicted"; "measured_peak_bytes", the most bytes of live tensors on this rank between
        the beginning and the end of any step, or None if there was no step, and "measured_by", its source;
        "predicted_over_measured_ratio", None without one of the two; "steps", the number of steps; and
        "conformance", the text of the check's result, or None before the check."""
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

    def write(self, path: Path, rank: int) -> None:
        """Write `content` as JSON: on rank 0 to ``path``, on another ``rank`` to a file whose name has the
        rank before the suffix, such as memfit.1.json. Missing folders are made. Raises UserError if the file
        cannot be written."""
        own_path = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        write_whole(own_path, f"{json.dumps(self.content(), indent=2)}\n".encode(), make_folder=True)

    @property
    def line(self) -> str:
        """One line with the measured peak, the predicted one with its error in percent, and the result of the
        check. Without a prediction or a measured peak, it has the measured peak and the reason why nothing
        was predicted or measured."""
        measured_text = f"peak {format_bytes(self.peak_bytes)} measured over {self.steps} steps"
        if self.prediction is None or not self.peak_bytes:
            return f"memfit: {measured_text}; not predicted: {self.why_not or 'nothing was measured'}"
        predicted = self.prediction.allocated_bytes.value
        error_percent = 100 * (predicted / self.peak_bytes - 1)
        return (
            f"memfit: {measured_text}, {format_bytes(predicted)} predicted ({error_percent:+.2f} %); "
            f"{self.conformance}"
        )


def _resident_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
