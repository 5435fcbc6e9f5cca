"""Save a run and resume it: parameters, buffers, optimizer state and random state by name, and facts about
the run such as its step, seed and plan.

Keys are those that torch.distributed.checkpoint makes of ``{"model": get_model_state_dict(...), "optimizer":
get_optimizer_state_dict(..., flatten_optimizer_state_dict=True)}``, so that other programs can read them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from memfit.engines.registry import ENGINES
from memfit.files.temporary import temporary_folder
from memfit.jobs import checkpoints
from memfit.jobs.training_step import TrainingStep
from memfit.runtime.checkpoint_layout import (
    Pieces,
    PiecesLoadPlanner,
    PiecesSavePlanner,
    TensorPlace,
    buffers,
    make_states,
    optimizers,
    places,
    spread,
)
from memfit.runtime.devices import collective_backend
from memfit.runtime.oom import is_oom_error
from memfit.runtime.progress_events import tell
from memfit.techniques.recompute.selective_recompute import rng_state, set_rng_state
from memfit.types.device_kind import HOST
from memfit.types.errors import MemfitError, UserError
from memfit.types.launch import Checkpoint, RunSpec, Shape
from memfit.types.units import format_bytes
from memfit.worker.checkpoint_reader import CheckpointReader

_REHEARSAL = "memfit-warm-up-"  # prefix of a folder
_NAMED = 3  # number of differing tensors that an error names
Shapes = Mapping[str, Shape]


class Checkpointer:
    """Saves and restores the checkpoints of one run. Every rank has one, and all ranks must save and restore
    together.

    If the run saves asynchronously, `save` copies the state to host memory and returns, and a thread writes
    the copy. There is at most one copy: the next `save` waits. ``copy_bytes``: the largest copy so far."""

    def __init__(self, spec: RunSpec, step: TrainingStep) -> None:
        """Must be called before ``step`` runs, and by all ranks, because asynchronous saves make a process
        group of their own. Raises UserError if the state of the run cannot be saved by name because of its
        engine or plan, or if the step's optimizer is or contains something other than torch optimizers
        (`optimizers`)."""
        self.spec, self.step, self.rank = spec, step, step.bench.world.rank
        engine = ENGINES[spec.engine]
        if not engine.saves:
            raise UserError(
                f"checkpoints are not supported for engine {spec.engine}",
                allowed=f"{', '.join(e.name for e in ENGINES.values() if e.saves)}, or a run without --save "
                "and --resume",
            )
        if unsaved := engine.unsaved & spec.plan.techniques:
            raise UserError(
                f"checkpoints are not supported for plans with {', '.join(unsaved)} on engine {spec.engine}",
                allowed="engine native, or a run without --save and --resume",
            )
        if step.bench.own_parameters:
            raise UserError(
                "checkpoints are not supported for plans with expert-parallel",
                hint="remove expert-parallel from the plan, or run without --save and --resume: the experts "
                "of each rank have no names of their own to save by",
            )
        zero = spec.plan.get("zero")
        if zero is not None and zero.settings["nvme"] != "none":
            raise UserError(
                "checkpoints are not supported for plans with zero that keep optimizer state on NVMe",
                allowed='nvme="none", or a run without --save and --resume',
            )
        self.device = torch.device(step.bench.torch_device)
        self.optimizers = optimizers(step.optimizer)
        self.copy_bytes = 0
        self._writing: _Writing | None = None
        self._group: Any = None  # that of the writing threads: the default one is busy with training
        if spec.keep.asynchronous and not _alone():
            self._group = dist.new_group(backend=collective_backend(HOST))
        # In a process alone, torch says so at each save. Once, as filters are shared between threads.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
        self.begun = [_numbers(group) for group in self._groups()]

    def restore(self) -> int:
        """Load the checkpoint that the run resumes from, random state included, and return the number of
        steps after which it was saved. All ranks must call it. Raises UserError if the checkpoint's
        description or metadata cannot be read, if the metadata name anything but the format's classes, if it
        belongs to another model or optimizer, and if its parameters differ in a number, such as the
        optimizer's step, that this plan keeps once for all of them. Raises MemfitError if its files are
        missing or damaged."""
        path = Path(self.spec.keep.resume)
        metadata = checkpoints.about(path)
        _must_be_alike(path, metadata.shapes, self._shapes())
        flats = {id(p.owner): p.owner for p in places(self.step).values() if p.owner.requires_grad}
        for optimizer in self.optimizers:
            make_states(optimizer, flats.values())
        for group, initial in zip(self._groups(), self.begun, strict=True):
            group.update(initial)
        entries = list(self._entries())
        _must_keep_the_same(path, metadata, _union_of_ranks({e.key for e in entries if e.kind == "state"}))
        self._read(path, entries, f"random.{self.rank % metadata.ranks}")
        spread(self.step)
        tell("resumed", path=str(path), step=metadata.step)
        return metadata.step

    def check(self) -> None:
        """Raise UserError if a value of the optimizer's state cannot be saved by name (`Entry.stored`). To be
        called after the first step, which creates the state."""
        for entry in self._entries():
            _ = entry.stored

    def due(self, done: int) -> bool:
        """Return whether to save after ``done`` steps: after each multiple of the setting ``every_steps``
        unless that is 0, and after the last step of the run. False if the run has no folder to save in."""
        keep = self.spec.keep
        is_due = done == self.spec.steps or (keep.every_steps > 0 and done % keep.every_steps == 0)
        return bool(keep.save) and is_due

    def save(self, done: int) -> None:
        """Save a checkpoint of the state after ``done`` steps in the run's folder; if the run saves
        asynchronously, begin to. All ranks must call it. Raises MemfitError if the checkpoint, or an earlier
        one that was still being written, cannot be written. If memory ran out, raises MemoryError or, while
        the state is copied, torch's RuntimeError. Raises what `check` raises."""
        self.finish()
        self._begin(Path(self.spec.keep.save), done)
        if not self.spec.keep.asynchronous:
            self.finish()

    @property
    def has_written(self) -> bool:
        """Whether a checkpoint is written, or its writing has failed, and `finish` has not been called."""
        return self._writing is not None and not self._writing.is_alive()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete, and report it as an event
        "saved". Raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            tell("saved", step=writing.done, path=str(writing.result()))

    def wait(self) -> None:
        """Wait until no checkpoint is being written. An error of the writing is not raised."""
        if self._writing is not None and self._writing.ident is not None:
            self._writing.join()

    def _begin(self, folder: Path | None, done: int) -> None:
        state, metadata = self._state(done)
        if self.spec.keep.asynchronous:
            state = {key: _copy(value) for key, value in state.items()}
            self.copy_bytes = max(self.copy_bytes, sum(map(_size_bytes, state.values())))
        self._writing = _Writing(lambda: self._write(folder, state, metadata), done)
        if self.spec.keep.asynchronous:
            self._writing.start()
        else:
            self._writing.run()

    def rehearse(self) -> None:
        """Save once into a temporary folder inside the folder of the run, and remove it. Libraries and
        buffers that the first save loads or creates then exist. All ranks must call it. Raises as `save`
        does."""
        with contextlib.ExitStack() as stack:
            folder: Path | None = None
            if self.rank == 0:
                parent = Path(self.spec.keep.save)
                try:
                    parent.mkdir(parents=True, exist_ok=True)
                    folder = stack.enter_context(temporary_folder(_REHEARSAL, parent))
                except OSError as error:
                    raise MemfitError(
                        f"checkpoints cannot be saved in {parent}: {error.strerror or error}"
                    ) from error
            self._begin(folder, 0)
            assert self._writing is not None
            self._writing.result()
            self._writing = None

    def _state(self, done: int) -> tuple[dict[str, Any], Checkpoint]:
        """Return what this rank saves after ``done`` steps, by key, and the description of the checkpoint,
        without its files."""
        entries = [e for e in self._entries() if e.kind == "state" or self._has_changed(e)]
        metadata = self._about(done, entries)
        state: dict[str, Any] = {**self._tensors(writing=True), **{e.text: e.stored for e in entries}}
        return state | self._random_states(f"random.{self.rank}"), metadata

    def _write(self, folder: Path | None, state: dict[str, Any], metadata: Checkpoint) -> Path:
        """Write a checkpoint of ``state`` in ``folder`` (None on ranks other than 0), delete older ones if
        the run keeps only the last few, and return the checkpoint's path. All ranks must call it. Raises
        MemfitError if it cannot be written, and MemoryError if memory ran out."""
        done, group, begun = metadata.step, self._group, None
        try:
            begun = checkpoints.begin(folder, done) if self.rank == 0 and folder is not None else None
            partial_folder = _broadcast_from_first(begun, group)
            save(
                state,
                storage_writer=FileSystemWriter(partial_folder),
                planner=PiecesSavePlanner(),
                process_group=group,
                no_dist=_alone(),
            )
            files = _union_of_ranks(set(self._own_files(partial_folder)), group)
            if self.rank == 0 and folder is not None:
                metadata = dataclasses.replace(
                    metadata,
                    files_bytes={name: size for name, size, _ in sorted(files)},
                    files_sha256={name: sha256 for name, _, sha256 in sorted(files)},
                )
                checkpoints.publish(partial_folder, metadata)
                if self.spec.keep.keep_last:
                    checkpoints.prune(folder, self.spec.keep.keep_last)
        except (OSError, CheckpointException) as error:
            if _is_out_of_memory(error):
                raise MemoryError(f"out of memory while saving after step {done}") from error
            reason = _full_disk(Path(self.spec.keep.save), sum(map(_size_bytes, state.values())))
            reason = reason or str(error).strip().splitlines()[-1]
            if begun is not None:
                shutil.rmtree(begun, ignore_errors=True)  # what is there may fill the disk
            raise MemfitError(
                f"the checkpoint after step {done} was not saved in {self.spec.keep.save}: {reason}"
            ) from error
        _broadcast_from_first(None, group)
        return Path(partial_folder).with_suffix("")

    def _own_files(self, folder: Path) -> Iterator[tuple[str, int, str]]:
        """Yield (name, bytes, SHA-256) of the files that this rank has written into ``folder``; rank 0 also
        wrote those that belong to no rank. Raises OSError if one cannot be read."""
        for file in folder.iterdir():
            is_of_rank = file.name.startswith("__")
            if file.name.startswith(f"__{self.rank}_") or (self.rank == 0 and not is_of_rank):
                yield file.name, file.stat().st_size, checkpoints.sha256_of(file)

    def _about(self, done: int, entries: list[Entry]) -> Checkpoint:
        spec = self.spec
        return Checkpoint(
            step=done,
            seed=spec.seed,
            job=self.step.job.name,
            plan=spec.plan.label,
            engine=spec.engine,
            ranks=spec.plan.ranks,
            shapes=self._shapes(),
            optimizer=type(self.optimizers[0]).__name__,
            state=tuple(sorted(_union_of_ranks({e.key for e in entries if e.kind == "state"}))),
            files_bytes={},
        )

    def _shapes(self) -> Shapes:
        shapes = {n: p.shape for n, p in places(self.step).items()}
        shapes |= {n: tuple(b.shape) for n, b in buffers(self.step.model).items()}
        return dict(sorted(_union_of_ranks(set(shapes.items()))))

    def _tensors(self, *, writing: bool = False) -> dict[str, Any]:
        """Return this rank's parts of parameters, and its buffers, by their keys in the checkpoint ("model."
        and the name). Buffers may differ between ranks. With ``writing``, only ranks of index 0 along every
        mesh dimension but the pipeline return buffers, so that only theirs are saved."""
        tensors: dict[str, Any] = {f"model.{n}": p.of(p.owner) for n, p in places(self.step).items()}
        coordinate = self.step.bench.world.layout.coordinate(self.rank)
        if not (writing and any(index for name, index in coordinate.items() if name != "pipeline")):
            tensors |= {f"model.{n}": b for n, b in buffers(self.step.model).items()}
        return tensors

    def _entries(self) -> Iterator[Entry]:
        """Yield an `Entry` for each value of the optimizer state of each parameter on this rank, and for each
        number of its parameter group. A parameter that is not in the optimizer has none."""
        states: dict[str, dict[int, Any]] = {
            "state": {id(owner): s for o in self.optimizers for owner, s in o.state.items()},
            "param_groups": {id(p): group for group in self._groups() for p in group["params"]},
        }
        for (name, place), kind in itertools.product(places(self.step).items(), states):
            state = states[kind].get(id(place.owner), {})
            keys = state if kind == "state" else _numbers(state)
            yield from (Entry(kind=kind, name=name, key=key, place=place, state=state) for key in keys)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers for group in o.param_groups]

    def _has_changed(self, entry: Entry) -> bool:
        """Return whether ``entry``, a number of a parameter group, differs from what it was before the run's
        first step. Only changed numbers are saved; the plan sets the others."""
        initial = next(b for g, b in zip(self._groups(), self.begun, strict=True) if g is entry.state)
        return bool(initial.get(entry.key) != entry.state[entry.key])

    def _read(self, path: Path, entries: list[Entry], random_key: str) -> None:
        reader = CheckpointReader(path, checkpoints.about(path).files_bytes)
        metadata = reader.read_metadata().state_dict_metadata
        target = {k: v for k, v in self._tensors().items() if k in metadata}
        target |= {e.text: e.into for e in entries if e.text in metadata}
        random_states = {k: v for k, v in self._random_states(random_key).items() if k in metadata}
        target |= random_states
        try:
            load(target, storage_reader=reader, planner=PiecesLoadPlanner(), no_dist=_alone())
        except CheckpointException as error:
            reason = str(error).strip().splitlines()[-1]
            raise MemfitError(f"the checkpoint {path} cannot be loaded: {reason[:300]}") from error
        torch.set_rng_state(target[random_key])
        if (device_key := f"{random_key}.{self.device.type}") in random_states:
            set_rng_state(self.device, target[device_key])
        for entry in entries:
            if entry.text in metadata:
                entry.enter(target[entry.text])
            elif entry.kind == "state":
                self._forget(entry)
        _must_step_together(path, [e for e in entries if e.shared], target)

    def _random_states(self, key: str) -> dict[str, torch.Tensor]:
        """Return the random state of the host under ``key`` and, on an accelerator, the device's under
        ``key`` and its kind, such as "random.0.cuda"."""
        states = {key: torch.get_rng_state()}
        if self.device.type != HOST:
            states[f"{key}.{self.device.type}"] = rng_state(self.device)
        return states

    def _forget(self, entry: Entry) -> None:
        """Reset ``entry``, a value of a parameter's optimizer state that the checkpoint does not have. A
        value in `Pieces` is set to zero. A number that a flat tensor keeps for all parameters in it stays.
        For any other value, the parameter's whole state is removed from the optimizer."""
        if isinstance(entry.stored, Pieces):
            for view in entry.stored.views.values():
                view.zero_()
        elif entry.place.at is None:
            for optimizer in self.optimizers:
                optimizer.state.pop(entry.place.owner, None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One value that the optimizer keeps for the parameter ``name``, which is in the dict ``state`` under
    ``key``. ``kind`` is "state" if ``state`` is the optimizer's state of the parameter, or "param_groups" if
    it is the parameter's group, of which only numbers are entries. ``place``: where the parameter is on this
    rank."""

    kind: str
    name: str
    key: str
    place: TensorPlace
    state: dict[str, Any]

    @property
    def text(self) -> str:
        """Key of the entry in the checkpoint, for example "optimizer.state.head.weight.exp_avg"."""
        return f"optimizer.{self.kind}.{self.name}.{self.key}"

    @property
    def shared(self) -> bool:
        """Whether the owner is a flat tensor and this is one number that the optimizer keeps for it, so for
        all parameters in it: a tensor of one element, or no tensor at all."""
        value = self.state[self.key]
        return self.place.at is not None and (not isinstance(value, torch.Tensor) or value.numel() == 1)

    @property
    def stored(self) -> Any:
        """What is written to the checkpoint: the parameter's part of a tensor with the owner's shape, or any
        other value as it is. Raises UserError if the owner is a flat tensor, and the value is a tensor of
        another shape with several elements."""
        value, owner = self.state[self.key], self.place.owner
        if isinstance(value, torch.Tensor) and value.shape == owner.shape:
            return self.place.of(value)
        if self.place.at is None or self.shared:
            return value
        raise UserError(
            f"{self.key} of a flat optimizer state has {value.numel()} elements, but the flat tensor of its "
            f"parameters has {owner.numel()}, so it cannot be saved by parameter name",
            allowed="with zero, an optimizer whose state tensors have one element or the shape of their "
            "parameter; or a run without --save and --resume",
        )

    @property
    def into(self) -> Any:
        """What a checkpoint's value is read into: `stored`, whose tensors have the memory of this value; but
        a copy if the value is a tensor of one element that several parameters share."""
        value = self.stored
        return value.clone() if self.shared and isinstance(value, torch.Tensor) else value

    def enter(self, read: Any) -> None:
        """Set the value to ``read``, which was read from a checkpoint into `into`. Tensors have then been
        read in place already, and only those that several parameters share are set; values that are no
        tensors are replaced."""
        value = self.state[self.key]
        if not isinstance(value, torch.Tensor):
            self.state[self.key] = read
        elif self.shared:
            value.copy_(read)


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers in a parameter group by key. True, False and tensors of one element are numbers,
    too; tensors are copied."""
    tensors = {k: v.clone() for k, v in group.items() if isinstance(v, torch.Tensor) and v.numel() == 1}
    return {k: tensors.get(k, v) for k, v in group.items() if k in tensors or isinstance(v, int | float)}


def _must_be_alike(path: Path, saved_shapes: Shapes, run_shapes: Shapes) -> None:
    names = {**saved_shapes, **run_shapes}
    differences = [n for n in names if saved_shapes.get(n) != run_shapes.get(n)]
    if differences:
        first_differences = "; ".join(
            f"{n} {_shape(saved_shapes, n)} in the checkpoint and {_shape(run_shapes, n)} in this run"
            for n in differences[:_NAMED]
        )
        and_how_many_more = f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
        raise UserError(
            f"{path} belongs to a different model: {len(differences)} of {len(names)} tensors differ: "
            f"{first_differences}{and_how_many_more}",
            allowed="the job, size and adapters that the checkpoint was saved with",
        )


def _shape(shapes: Shapes, name: str) -> str:
    return "x".join(map(str, shapes[name])) or "a scalar" if name in shapes else "missing"


def _must_keep_the_same(path: Path, metadata: Checkpoint, keys: Collection[str]) -> None:
    if set(metadata.state) != set(keys):
        own_states = ", ".join(sorted(keys)) or "nothing"
        raise UserError(
            f"{path} was saved by {metadata.optimizer}, which keeps "
            f"{', '.join(metadata.state) or 'nothing'}; this plan's optimizer keeps {own_states}",
            allowed="the optimizer that the checkpoint was saved with",
        )


def _must_step_together(path: Path, shared: list[Entry], target: Mapping[str, Any]) -> None:
    values: dict[str, set[float]] = {}
    for entry in shared:
        if entry.text in target:
            values.setdefault(entry.key, set()).add(float(target[entry.text]))
    differences = _union_of_ranks({f"{key} {sorted(v)}" for key, v in values.items() if len(v) > 1})
    if differences:
        state_and_values = sorted(differences)[0]  # such as "step [2.0, 3.0]"
        raise UserError(
            f"{path}: the saved parameters differ in the state {state_and_values}, but the flat optimizer "
            "state of this plan holds one value for all of them",
            allowed="a plan without zero stages 1 to 3",
        )


def _is_out_of_memory(error: OSError | CheckpointException) -> bool:
    """Return whether memory ran out, on this rank or, as torch's error collects them, on another."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    return any(is_oom_error(e) for e, *_ in failures)


def _alone() -> bool:
    return not dist.is_initialized()


class _Writing(threading.Thread):
    """The writing of the checkpoint after ``done`` steps: ``write``, which returns its path. It runs in a
    thread after `start`, or in the calling one by `run`. The interpreter waits for it at its end."""

    def __init__(self, write: Callable[[], Path], done: int) -> None:
        super().__init__()
        self.done = done
        self._write: Callable[[], Path] | None = write
        self._path: Path | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._write is not None
        try:
            self._path = self._write()
        except BaseException as error:  # noqa: BLE001  raised by `result`
            self._error = error
        self._write = None  # with the copy

    def result(self) -> Path:
        """Return the path when it is complete, or raise what ``write`` raised."""
        if self.ident is not None:
            self.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


def _copy(value: Any) -> Any:
    """Return a copy of a value of a state, in host memory if it is a plain tensor or one that is sharded
    (then as `Pieces`), else where it is."""
    if isinstance(value, DTensor):
        chunks = value.__create_chunk_list__()
        local = value.to_local()
        return Pieces(tuple(value.shape), value.dtype, {c.offsets: _on_host(local) for c in chunks})
    if isinstance(value, Pieces):
        views = {offsets: _on_host(view) for offsets, view in value.views.items()}
        return Pieces(tuple(value.shape), value.dtype, views)
    if type(value) in {torch.Tensor, torch.nn.Parameter}:
        return _on_host(value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _size_bytes(value: Any) -> int:
    tensors = value.views.values() if isinstance(value, Pieces) else (value,)
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def _full_disk(folder: Path, needed_bytes: int) -> str:
    """Return a text if the disk of ``folder`` has less free than ``needed_bytes``; "" if it has as much, or
    if that cannot be read. torch's writer says of a full disk only that a position in its file is not the
    expected one."""
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:
        return ""
    if free_bytes >= needed_bytes:
        return ""
    return (
        f"the disk has {format_bytes(free_bytes)} left, and this process's part of a checkpoint takes "
        f"{format_bytes(needed_bytes)}"
    )


def _union_of_ranks(values: set[Any], group: Any = None) -> set[Any]:
    """Return the union of all ranks' ``values``. All ranks must call it. Without a process group, return
    ``values``."""
    if _alone():
        return values
    rank_values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rank_values, values, group=group)
    return set().union(*rank_values)


def _broadcast_from_first(value: Any, group: Any = None) -> Any:
    """Return rank 0's ``value`` on every rank. All ranks must call it; none continues before rank 0 has sent
    the value. Without a process group, return ``value``."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group)
        return values[0]
    return value
