"""Peak memory outside the steady training step: loading, first step, evaluation, saving and resuming, and
checkpoint sizes.

Everything runs on fake tensors as a training script would run it: the job's model, `TrainingStep`, torch's
own state dicts and its own file writer. Only reading a file is simulated: each stored storage is allocated
once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memfit.jobs.training_step import TrainingStep
from memfit.model.batch_objects import map_batch, split
from memfit.model.tensors import plain_tensors, tensor_leaves
from memfit.techniques.optimizers import innermost
from memfit.trace.allocation_recorder import AllocationRecorder
from memfit.trace.data_dependent import Guesses
from memfit.trace.fake_copy import FakeCopies
from memfit.trace.tracer import (
    TRACED_MICRO_BATCHES,
    blame_guesses,
    fake_world,
    label_state,
    label_tensors,
    recording_patches,
)
from memfit.trace.value_guess_retry import retry_guesses
from memfit.types.device_kind import device_kind
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Category, peak_of_lives, rounded


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LifecyclePeak:
    """Peaks of live tensor bytes during one event, in the memory of the device and of the host. ``event`` is
    a name that `lifecycle` lists, such as "load". For a CPU, whose memory is the host's, all bytes count as
    the device's and ``host_bytes`` is 0."""

    event: str
    device_bytes: int
    host_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lifecycle:
    """Peaks and checkpoint sizes of a job.

    ``peaks`` are in the order of the list in `lifecycle`. ``checkpoint_bytes`` are the sizes of files that
    torch.save writes, by the keys "model", "optimizer" (with fp32 masters, if there are any) and, if some
    parameters are frozen, "trainable" (the trainable parameters alone).
    """

    peaks: tuple[LifecyclePeak, ...]
    checkpoint_bytes: Mapping[str, int]

    def peak(self, event: str) -> LifecyclePeak:
        """Return the peak of ``event``. Raises StopIteration if ``peaks`` has none of this event."""
        return next(p for p in self.peaks if p.event == event)


@retry_guesses
def lifecycle(job: Job, plan: Plan, *, device: str = "cpu") -> Lifecycle:
    """Return the peaks and checkpoint sizes of one process (``plan.ranks`` must be 1) with the job's first
    batch. An event's peak counts what is live from the end of the event before it until all that it makes is
    in place. The events, in this order, are:

    - ``load``: build the plain model, ``torch.load`` to its device, ``load_state_dict``.
    - ``load-mmap``: like ``load``, but the file is memory-mapped and not read.
    - ``load-via-host``: like ``load``, with ``map_location="cpu"``; only if ``device`` is not "cpu".
    - ``load-assign``: the model is built on the meta device and loaded with ``assign=True``.
    - ``build``: model, plan and optimizer.
    - ``first-step`` creates the optimizer's state; ``steady-step`` finds it in place.
    - ``evaluate``: forward and loss of the first micro-batch without gradients.
    - ``save``: ``torch.save``, which copies one storage after the other to the host (none from a CPU).
    - ``save-async``: first copies all storages to the host, so that training can continue; also from a CPU.
    - ``resume``: build a fresh step, then load model and optimizer from one file.
    - ``resume-via-host``: like ``resume``, with ``map_location="cpu"``; only if ``device`` is not "cpu".

    ``build`` and each ``load...`` and ``resume...`` event start with empty memory; the others go on from the
    one before. Raises UserError if the plan does not suit the job, if a size depends on values that are
    neither known nor bounded (`Job.bound`), or if the step fails after a value was guessed. Other errors of
    the user's code are raised as they are.
    """
    batch = job.make_batch(0, 0)
    peaks, sizes = _training_peaks(job, plan, batch, device)
    ways = ["resume"] if device_kind(device).is_host else ["resume", "resume-via-host"]
    resume_peaks = [_resume_peak(job, plan, batch, device, way) for way in ways]
    return Lifecycle(peaks=(*_load_peaks(job, device), *peaks, *resume_peaks), checkpoint_bytes=sizes)


@dataclasses.dataclass(kw_only=True)
class _Watch:
    """Reads peaks from a recorder event by event, separately for device and host. ``mark`` is the recorder's
    clock when the current event began."""

    recorder: AllocationRecorder
    mark: int = 0
    # Id of a life -> "host" or "nowhere" (not counted).
    aside: dict[int, str] = dataclasses.field(default_factory=dict)

    def begin(self) -> None:
        self.mark = self.recorder.clock

    def end(self, event: str) -> LifecyclePeak:
        device, host = self._highest(""), self._highest("host")
        if self.recorder.kind.is_host:
            device, host = self._highest("", "host"), 0
        self.begin()
        return LifecyclePeak(event=event, device_bytes=device, host_bytes=host)

    @contextlib.contextmanager
    def count_at(self, place: str) -> Iterator[None]:
        """Count storages that are made inside this context as lying at ``place``: "host", "nowhere" (not
        counted) or "" (the device, as without this context)."""
        start = len(self.recorder.lives)
        yield
        self.aside.update((id(life), place) for life in self.recorder.lives[start:])

    def _highest(self, *places: str) -> int:
        lives = [x for x in self.recorder.lives if self.aside.get(id(x), "") in places]
        lives = [x for x in lives if x.end is None or x.end > self.mark]
        device = self.recorder.device
        return peak_of_lives((max(x.start, self.mark), x.end, rounded(x.size_bytes, device)) for x in lives)


@contextlib.contextmanager
def _watched(job: Job, device: str) -> Iterator[tuple[_Watch, Any]]:
    recorder = AllocationRecorder(device, guesses=Guesses(job.bound))
    with (
        blame_guesses(recorder),
        fake_world() as fake,
        recording_patches(recorder),
        recorder,
    ):
        yield _Watch(recorder=recorder), fake


def _load_peaks(job: Job, device: str) -> list[LifecyclePeak]:
    """Return the peaks of the events of `lifecycle` that load a checkpoint of the plain model (``load...``),
    in the order of the list there."""
    peaks = []
    places = {"load": "", "load-mmap": "nowhere", "load-via-host": "host", "load-assign": ""}
    if device_kind(device).is_host:
        del places["load-via-host"]
    for way, place in places.items():
        with _watched(job, device) as (watch, _):
            model = job.build_model()
            label_tensors(watch.recorder, [*model.named_parameters(), *model.named_buffers()])
            state = model.state_dict()
            if way == "load-assign":
                watch.aside.update(_lives_of(watch.recorder, state))
                watch.begin()
            with watch.count_at(place):
                loaded_state = _copy_as_loaded(state)
            model.load_state_dict(loaded_state, assign=way == "load-assign")
            peaks.append(watch.end(way))
    return peaks


def _training_peaks(
    job: Job, plan: Plan, batch: Any, device: str
) -> tuple[list[LifecyclePeak], Mapping[str, int]]:
    with _watched(job, device) as (watch, fake):
        step = TrainingStep(job, plan, device=device)
        label_state(watch.recorder, step)
        peaks = [watch.end("build")]
        inputs = _fake(batch, fake, watch.recorder)
        watch.recorder.label(inputs, Category.INPUT)
        for event in ("first-step", "steady-step"):
            step.run(inputs, micro_batch_limit=TRACED_MICRO_BATCHES)
            label_state(watch.recorder, step)
            peaks.append(watch.end(event))
        peaks.append(_evaluation_peak(step, inputs, watch))
        peaks += _save_peaks(step, watch)
        sizes = _sizes(step)
        step.close()
    return peaks, sizes


def _evaluation_peak(step: TrainingStep, inputs: Any, watch: _Watch) -> LifecyclePeak:
    step.model.eval()
    with torch.no_grad(), step.contexts():
        step.job.loss(step.model, split(inputs, step.bench.micro_batches)[0])
    step.model.train()
    return watch.end("evaluate")


def _save_peaks(step: TrainingStep, watch: _Watch) -> list[LifecyclePeak]:
    """Return the peaks of the events ``save`` and ``save-async``. torch.save copies one storage after the
    other to the host (none from a CPU); an asynchronous save copies all of them first, also from a CPU."""
    state = _state(step)
    if not watch.recorder.kind.is_host:
        for tensor in _pytree.tree_leaves(state):
            with watch.count_at("host"):
                _copy_as_loaded(tensor)
    peaks = [watch.end("save")]
    with watch.count_at("host"):
        copy = _copy_as_loaded(state)
    peaks.append(watch.end("save-async"))
    del copy
    return peaks


def _resume_peak(job: Job, plan: Plan, batch: Any, device: str, way: str) -> LifecyclePeak:
    with _watched(job, device) as (watch, fake):
        old_step = TrainingStep(job, plan, device=device)
        label_state(watch.recorder, old_step)
        old_step.run(_fake(batch, fake, watch.recorder), micro_batch_limit=1)
        state = _state(old_step)
        watch.aside.update(_lives_of(watch.recorder, state))
        old_step.close()
        watch.begin()
        new_step = TrainingStep(job, plan, device=device)
        label_state(watch.recorder, new_step)
        with watch.count_at("host" if way == "resume-via-host" else ""):
            loaded_state = _copy_as_loaded(state)
        new_step.model.load_state_dict(loaded_state["model"])
        # On a device the optimizer moves the state it is given; on fake CPU tensors this copy stands for that
        # move.
        optimizer_states = (
            _copy_as_loaded(loaded_state["optimizer"])
            if way == "resume-via-host"
            else loaded_state["optimizer"]
        )
        with FakeCopies():
            for optimizer, optimizer_state in zip(
                _optimizers(new_step.optimizer), optimizer_states, strict=True
            ):
                optimizer.load_state_dict(optimizer_state)
        peak = watch.end(way)
        new_step.close()
    return peak


def _fake(batch: Any, fake: Any, recorder: AllocationRecorder) -> Any:
    inputs = map_batch(fake.from_tensor, batch)
    recorder.concrete_values.seed(inputs, batch)
    return inputs


def _optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return ``[optimizer]`` if it is a torch optimizer, else the torch optimizers that it wraps
    (`innermost`), such as one per parameter."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    return [inner for inner in innermost(optimizer) if isinstance(inner, torch.optim.Optimizer)]


def _state(step: TrainingStep) -> dict[str, Any]:
    """Return what a training script saves: {"model": its state dict, "optimizer": a list of the state dicts
    of every torch optimizer, "masters": a list of fp32 master weights, or [] if there are none}."""
    masters = getattr(step.optimizer, "masters", [])
    return {
        "model": step.model.state_dict(),
        "optimizer": [o.state_dict() for o in _optimizers(step.optimizer)],
        "masters": [m.detach() for m in masters],
    }


def _copy_as_loaded(state: Any) -> Any:
    """Return a copy of ``state`` with the storages that torch.load would allocate: every distinct storage
    once, and tensors as views of their storages. Tensors of wrapper subclasses are cloned."""
    buffers: dict[int, torch.Tensor] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):
            return tensor.detach().clone()
        storage = tensor.untyped_storage()
        if storage._cdata not in buffers:
            buffers[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8)
        view = buffers[storage._cdata].view(tensor.dtype)
        return view.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    return _pytree.tree_map_only(torch.Tensor, one, state)


def _lives_of(recorder: AllocationRecorder, state: Any) -> dict[int, str]:
    """Return {id of the storage's `Life`: "nowhere"} for the storages in ``state`` that ``recorder`` has
    recorded. With these entries in ``aside``, `_Watch` does not count these storages."""
    tensors = tensor_leaves(state)
    keys = {plain.untyped_storage()._cdata for t in tensors for plain in plain_tensors(t)}
    return {id(recorder._known[k][1]): "nowhere" for k in keys if k in recorder._known}


def _sizes(step: TrainingStep) -> Mapping[str, int]:
    state = _state(step)
    sizes = {
        "model": file_bytes(state["model"]),
        "optimizer": file_bytes([state["optimizer"], *state["masters"]]),
    }
    trainable = {n: p.detach() for n, p in step.model.named_parameters() if p.requires_grad}
    if len(trainable) < sum(1 for _ in step.model.parameters()):
        sizes["trainable"] = file_bytes(trainable)
    return sizes


class _Counted:
    """File object for writing that keeps its position and length but no data."""

    def __init__(self) -> None:
        self.at, self.length_bytes = 0, 0

    def write(self, data: Any) -> int:
        return self.seek(len(data), 1) and len(data)

    def seek(self, to: int, whence: int = 0) -> int:
        self.at = self.at + to if whence == 1 else to
        self.length_bytes = max(self.length_bytes, self.at)
        return self.at

    def tell(self) -> int:
        return self.at

    def flush(self) -> None:
        """Do nothing: no data is kept."""


def file_bytes(state: Any) -> int:
    """Return the bytes of the file that torch.save would write for ``state``, which holds fake tensors.
    Torch's own writer runs with the data skipped, and nothing is written."""
    file = _Counted()
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, cast(IO[bytes], file))
    return file.length_bytes
