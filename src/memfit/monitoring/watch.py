"""Watch a training: measure each step, write it to a file, and raise alarms. It is ``memfit.watch``.

Recording takes at most half a percent of the time; if steps are too short for that, not every step is
recorded. If memfit fails, the watch ends with one line on standard error, and the training goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from memfit.monitoring.alarms import AlarmDetector
from memfit.monitoring.limits import AlarmLimits, limits_of
from memfit.monitoring.loggers import Loggers
from memfit.monitoring.prediction import predicted_intervals
from memfit.monitoring.readings import EnergyReadings, MemoryReadings
from memfit.monitoring.record import FORMAT, Alarm, LineFile, OutOfMemory, WatchStep, rank_path
from memfit.monitoring.scalars import PendingScalars, scalar_of, split_scalars
from memfit.monitoring.traceback_text import frames_of
from memfit.monitoring.training_hooks import (
    StepHook,
    device_of_optimizer,
    observe_backward,
    observe_clipping,
)
from memfit.runtime import devices
from memfit.runtime.oom import is_oom_error
from memfit.store.environment import fingerprint
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError

if TYPE_CHECKING:
    from types import TracebackType

_BUDGET_RATIO: Final = 0.005  # of the time, for what memfit does
_ALLOWANCE_S: Final = 0.25  # beside it, for the first steps
_LONGEST_MESSAGE: Final = 4000
_MOST_PENDING: Final = 16
_WRITE_PERIOD_S: Final = 0.1  # steps that are shorter are written, and searched for alarms, together
_LOGGED: Final = (
    "allocated_bytes",
    "peak_allocated_bytes",
    "reserved_bytes",
    "device_bytes",
    "host_bytes",
    "headroom_bytes",
    "step_s",
    "energy_j",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """The file of a watch, what it reads, and its alarms. They exist from the first step on."""

    file: LineFile
    readings: MemoryReadings
    energy: EnergyReadings
    detector: AlarmDetector


class TrainingWatch:
    """Records the steps of a training between ``with`` and the end of its block. See `memfit.watch`.

    ``of_process``: the watch that ``memfit watch -- COMMAND`` began in this process. A watch in the script
    takes its place and its file, and its prediction and limits unless it has its own.
    """

    of_process: ClassVar[TrainingWatch | None] = None

    def __init__(
        self,
        model: Any = None,
        optimizer: Any = None,
        *,
        file: str | Path = "run.jsonl",
        prediction: Any = None,
        limits: AlarmLimits | Mapping[str, Any] | str | Path | None = None,
        on_alarm: Callable[[Alarm], object] | None = None,
        on_oom: Callable[[OutOfMemory], str | None] | None = None,
        logger: Any = None,
    ) -> None:
        self._path = Path(file)
        if not self._path.suffix or self._path.is_dir():
            raise UserError(
                f"the file of a watch has no suffix or is a folder: {str(self._path)!r}",
                allowed="a file name with a suffix, such as run.jsonl",
            )
        self._model, self._optimizer = model, optimizer
        self._prediction = predicted_intervals(prediction)
        self._limits, self._on_alarm, self._loggers = limits_of(limits), on_alarm, Loggers(logger)
        self._on_oom, self._has_own_limits = on_oom, limits is not None
        self.alarms: list[Alarm] = []
        self._recording: _Recording | None = None
        self._hooks = contextlib.ExitStack()
        self._step_hook: StepHook | None = None
        self._is_over = False
        self._number = self._hook_steps = 0
        self._began_s = time.perf_counter()
        self._spent_s = 0.0  # on recording
        self._last_end_s: float | None = None
        self._backward_s: float | None = None  # when the first backward pass of the step began
        self._loss: Any = None
        self._grad_norm: Any = None
        self._unwritten: list[dict[str, Any]] = []  # the values of steps
        self._written_s = -math.inf
        self._pending: deque[PendingScalars] = deque(maxlen=_MOST_PENDING)

    # -- what the training calls

    def __enter__(self) -> TrainingWatch:
        outer = TrainingWatch.of_process
        if outer is not None and outer is not self and not outer._is_over:
            self._path = outer._path
            self._prediction = self._prediction or outer._prediction
            self._limits = self._limits if self._has_own_limits else outer._limits
            outer._is_over = True
            outer._hooks.close()
        self._guard(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    @property
    def is_recording(self) -> bool:
        """Whether the file has been begun: with the first backward pass or the end of the first step."""
        return self._recording is not None

    def step(self, *, loss: Any = None, grad_norm: Any = None, step: int | None = None) -> None:
        """End a step. ``loss`` and ``grad_norm``: a Python number or a tensor of one element; anything else
        is not recorded. Without them, what ``backward`` was called on and what
        ``torch.nn.utils.clip_grad_norm_`` returned. ``step``: number of the step, by default one more than
        before. From the first call on, only these calls end steps. Exceptions of ``on_alarm`` are raised."""
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None
            if self._hook_steps:  # this step was recorded when its optimizer had stepped
                self._notify(self._guard(self._add_values, loss, grad_norm, step))
                return
        self._notify(self._guard(self._end_step, loss, grad_norm, step))

    def close(self, error: BaseException | None = None) -> None:
        """End the watch. Write its end to the file if anything was recorded, or if ``error`` is given: what
        ended the training, if it failed. Later calls do nothing. Exceptions of ``on_alarm`` are raised, and
        those of ``on_oom`` that are no UserErrors."""
        alarms = self._guard(self._end, error, self._recovery(error))
        self._is_over = True
        self._hooks.close()
        self._notify(alarms)

    def _recovery(self, error: BaseException | None) -> str:
        """If memory ran out, free the tensors of the frames in which the error was raised, and return the
        text that ``on_oom`` returns. Return "" without ``on_oom``, for another error, and if the watch is
        over. If ``on_oom`` raises a UserError, print it and return ""; its other exceptions are raised."""
        if error is None or self._on_oom is None or self._is_over or not is_oom_error(error):
            return ""
        clear_frames(error.__traceback__)
        try:
            return self._on_oom(OutOfMemory(step=self._number + 1, error=error)) or ""
        except UserError as reason:
            print(f"memfit: no recovery: {reason}", file=sys.stderr)
            return ""

    # -- memfit's own work, of which an error ends the watch

    def _guard(self, function: Callable[..., list[Alarm]], *arguments: Any) -> list[Alarm]:
        """Return what ``function(*arguments)`` returns; [] if the watch is over or the function fails. Its
        error ends the watch, not the training."""
        if self._is_over:
            return []
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 (a training must not end because its watch fails)
            self._is_over = True
            self._hooks.close()
            print(f"memfit: the watch has ended: {type(error).__name__}: {error}", file=sys.stderr)
            return []

    def _notify(self, alarms: list[Alarm]) -> None:
        self.alarms += alarms
        for alarm in alarms:
            if self._on_alarm is not None:
                self._on_alarm(alarm)
            else:
                place = f"step {alarm.step}, rank {alarm.rank}"
                print(f"memfit: {alarm.kind}, {place}: {alarm.text}", file=sys.stderr)

    def _begin(self) -> list[Alarm]:
        self._began_s = time.perf_counter()
        if self._optimizer is not False:
            self._step_hook = StepHook(self._after_optimizer_step, self._optimizer)
            self._hooks.callback(self._step_hook.remove)
        self._hooks.callback(observe_backward(lambda tensors, _: self._guard(self._before_backward, tensors)))
        self._hooks.callback(observe_clipping(lambda _, norm: self._guard(self._after_clipping, norm)))
        return []

    def _before_backward(self, tensors: Any) -> list[Alarm]:
        if self._backward_s is None:
            self._backward_s = time.perf_counter()
        loss = scalar_of(tensors)
        if loss is not None:
            self._loss = loss
            if self._recording is None:
                self._start_recording(tensors.device)
        return []

    def _after_clipping(self, norm: Any) -> list[Alarm]:
        self._grad_norm = scalar_of(norm)
        return []

    def _after_optimizer_step(self, optimizer: Any) -> None:
        self._hook_steps += 1
        self._notify(self._guard(self._end_step, None, None, None, device_of_optimizer(optimizer)))

    def _device(self) -> torch.device:
        """Return the device of the model's first parameter; without one, that of the optimizer's; without
        either, the current accelerator or, if there is none, the processor."""
        parameter = next(iter(self._model.parameters()), None) if self._model is not None else None
        if parameter is not None:
            return parameter.device  # type: ignore[no-any-return]
        if self._optimizer and (device := device_of_optimizer(self._optimizer)) is not None:
            return device
        kind = devices.accelerator_kind()
        return torch.device(kind, torch.accelerator.current_device_index()) if kind else torch.device(HOST)

    def _start_recording(self, device: torch.device | None = None) -> _Recording:
        """Return the recording. The first call makes it for ``device`` (None: `_device`), and writes the
        first line of the file."""
        if self._recording is not None:
            return self._recording
        device = device or self._device()
        (rank, world_size), readings = _rank(), MemoryReadings(device)
        predicted = dict(self._prediction)
        if world_size > 1:
            predicted.pop("host_bytes", None)  # of all ranks of a host together
        self._recording = _Recording(
            file=LineFile(rank_path(self._path, rank)),
            readings=readings,
            energy=EnergyReadings(device),
            detector=AlarmDetector(
                self._limits, rank=rank, total_bytes=readings.total_bytes, prediction=predicted
            ),
        )
        self._recording.file.write("start", self._start_values(device, rank, world_size))
        return self._recording

    def _start_values(self, device: torch.device, rank: int, world_size: int) -> dict[str, Any]:
        assert self._recording is not None
        name = "" if device.type == HOST else devices.device_name(device)
        return {
            "format": FORMAT,
            "rank": rank,
            "world_size": world_size,
            "pid": os.getpid(),
            "host": platform.node(),
            "time_s": time.time(),
            "device": str(device),
            "device_name": name,
            "total_bytes": self._recording.readings.total_bytes,
            "memory_source": self._recording.readings.source,
            "energy_boundary": self._recording.energy.boundary,
            "environment": {**fingerprint(), **({"accelerators": name} if name else {})},
            "prediction": {name: dataclasses.asdict(v) for name, v in self._prediction.items()},
            "limits": dataclasses.asdict(self._limits),
        }

    def _end_step(
        self, loss: Any, grad_norm: Any, number: int | None, device: torch.device | None = None
    ) -> list[Alarm]:
        now_s, last_s, backward_s = time.perf_counter(), self._last_end_s, self._backward_s
        self._number = self._number + 1 if number is None else number
        loss = self._loss if loss is None else loss
        grad_norm = self._grad_norm if grad_norm is None else grad_norm
        self._loss = self._grad_norm = self._backward_s = None
        if self._spent_s > _BUDGET_RATIO * (now_s - self._began_s) + _ALLOWANCE_S:
            self._last_end_s = time.perf_counter()
            return []
        recording = self._start_recording(device)
        recorded_s = time.perf_counter()
        try:
            values: dict[str, Any] = {"step": self._number, "time_s": round(time.time(), 3)}
            if last_s is not None:
                values["step_s"] = round(now_s - last_s, 6)
                if backward_s is not None:
                    values["before_backward_s"] = round(backward_s - last_s, 6)
            now, later = split_scalars({"loss": loss, "grad_norm": grad_norm})
            values |= {**recording.readings.read(), "energy_j": recording.energy.read(), **now}
            self._unwritten.append(values)
            if later:
                self._pending.append(PendingScalars(self._number, later))
            return self._write_steps() if now_s >= self._written_s + _WRITE_PERIOD_S else []
        finally:
            self._last_end_s = time.perf_counter()
            self._spent_s += self._last_end_s - recorded_s

    def _write_steps(self) -> list[Alarm]:
        """Write the steps since the last call, with their alarms, and return these."""
        if not self._unwritten:
            return []
        self._written_s, recording = time.perf_counter(), self._start_recording()
        rows, self._unwritten = self._unwritten, []
        recording.file.write("step", *rows)
        alarms = self._write_pending()
        for row in rows:
            step = WatchStep(**row)
            alarms += recording.detector.add(step)
        recording.file.write_alarms(alarms)
        if self._loggers.is_due:
            self._loggers.write({name: getattr(step, name) for name in _LOGGED}, step.step)
        return alarms

    def _add_values(self, loss: Any, grad_norm: Any, number: int | None) -> list[Alarm]:
        """Add the loss and the norm of the gradients of the step that was recorded last."""
        alarms = self._write_steps()
        now, later = split_scalars({"loss": loss, "grad_norm": grad_norm})
        added = self._with_values(self._number, now) if now else []
        if later:
            self._pending.append(PendingScalars(self._number, later))
        self._number = self._number if number is None else number
        self._start_recording().file.write_alarms(added)
        return alarms + added

    def _write_pending(self, *, wait: bool = False) -> list[Alarm]:
        """Write the values of earlier steps that have arrived from the device, and return their alarms.
        ``wait``: wait for all."""
        alarms: list[Alarm] = []
        while self._pending and (wait or self._pending[0].is_ready()):
            pending = self._pending.popleft()
            alarms += self._with_values(pending.step, pending.values())
        return alarms

    def _with_values(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        recording = self._start_recording()
        recording.file.write("values", {"step": step, **values})
        return recording.detector.add_values(step, values.get("loss"), values.get("grad_norm"))

    def _end(self, error: BaseException | None, recovery: str) -> list[Alarm]:
        if self._recording is None and error is None:
            return []  # nothing was trained in this process
        recording = self._start_recording()
        alarms = self._write_steps()
        late = self._write_pending(wait=error is None)
        recording.file.write_alarms(late)
        end = {
            "time_s": time.time(),
            "error": type(error).__name__ if error is not None else "",
            "message": str(error)[:_LONGEST_MESSAGE] if error is not None else "",
            "frames": [dataclasses.asdict(f) for f in frames_of(error)] if error is not None else None,
            "recovery": recovery,
            "memory": {name: v for name, v in recording.readings.read().items() if v is not None},
        }
        recording.file.write("end", end)
        recording.file.close()
        return alarms + late


def watch(
    model: Any = None,
    optimizer: Any = None,
    *,
    file: str | Path = "run.jsonl",
    prediction: Any = None,
    limits: AlarmLimits | Mapping[str, Any] | str | Path | None = None,
    on_alarm: Callable[[Alarm], object] | None = None,
    on_oom: Callable[[OutOfMemory], str | None] | None = None,
    logger: Any = None,
) -> TrainingWatch:
    """Watch a training on this rank: ``with memfit.watch(file="run.jsonl") as watch: ...``. Call it on every
    rank.

    Each step's memory, time, loss and gradient norm are appended to ``file`` as a line of JSON. Steps that
    take less than a tenth of a second are written, and searched for alarms, together. Ranks other than 0
    write to files beside it, such as run.1.jsonl. `memfit watch run.jsonl` and
    `memfit.monitoring.record.read_records` read and merge them. A step ends when ``optimizer`` has stepped,
    by default the optimizer that steps first; False: only calls of ``watch.step(loss=..., grad_norm=...)``
    end steps. After the first such call only they do, in any case. The watched device is that of the first
    loss or, if no loss of one element is seen, of the optimizer that steps; only without both, of ``model``.
    Not every step is recorded if steps are so short that this would take more than 0.5 % of the time.

    ``prediction``: what the memory is compared with: what `memfit.estimate` returned, a file with the JSON of
    a command, or bytes by name; by default nothing. ``limits``: thresholds of the alarms, by name, or a TOML
    file or plan file with them; by default, and for names that are left out, those of `AlarmLimits`.
    ``on_alarm``: called with each `Alarm`; its exceptions are raised in the training, which can thus stop.
    Without it, alarms are printed on standard error. ``logger``: TensorBoard's SummaryWriter, a logger of
    Lightning, a run of W&B, an Accelerator, or a function of values and step; by default the active runs of
    W&B and MLflow, if there are any.

    ``on_oom``: called when the block ends because memory ran out, such as what `memfit.next_plan` returns.
    The text that it returns is recorded, and `memfit watch --restarts N -- COMMAND` then starts the command
    again. By default nothing is called. The error is raised in any case.

    In a process of `memfit watch -- COMMAND`, this watch takes the place of the command's, writes to its
    file, and has its prediction and limits unless these are given here.

    On a processor, tensors are counted only if memfit's counting allocator is active in this process; else
    the resident memory of the process is recorded. No counter is reset. An error in memfit ends the watch,
    not the training. Raises UserError if ``file`` has no suffix or is a folder, and for a ``prediction`` or
    ``limits`` that cannot be used.
    """
    return TrainingWatch(
        model,
        optimizer,
        file=file,
        prediction=prediction,
        limits=limits,
        on_alarm=on_alarm,
        on_oom=on_oom,
        logger=logger,
    )


def _rank() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return devices.launch_rank()
