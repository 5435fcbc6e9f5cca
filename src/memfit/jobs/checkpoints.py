"""Where a run's checkpoints are stored: one folder per save, which is complete or does not exist.

::

    DIR/step-00000010/                 as torch.distributed.checkpoint writes it, and memfit.json beside
    DIR/step-00000020.partial/         a save that was interrupted
    DIR/latest                         the name of the newest

A save is written into ``.partial``, made durable, then renamed; ``latest`` is updated last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from memfit.files.read import read_text
from memfit.files.replace import must_be_writable, write_whole
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.launch import Checkpoint, CheckpointSettings

ABOUT = "memfit.json"
LATEST, PARTIAL = "latest", ".partial"
_NAME = re.compile(r"step-\d{8,}")


def find(folder: Path) -> tuple[Path, Checkpoint, tuple[str, ...]]:
    """Return (the folder of the newest complete checkpoint in ``folder``; its description; for each newer
    checkpoint that is not complete, newest first, one text such as "step-00000020: no memfit.json").

    ``folder`` may itself be a checkpoint: then it is returned, without texts. Raises UserError if it is not
    complete, or if there is no complete checkpoint in ``folder``.
    """
    if (folder / ABOUT).is_file() or _NAME.fullmatch(folder.name.removesuffix(PARTIAL)):
        if what_is_missing := why_incomplete(folder):
            raise UserError(
                f"{folder} is not a complete checkpoint: {what_is_missing}",
                hint=f"give {folder.parent} to use the newest complete checkpoint in it",
            )
        return folder, about(folder), ()
    skipped_reasons: list[str] = []
    for path in _newest_first(folder):
        if not (reason := why_incomplete(path)):
            return path, about(path), tuple(skipped_reasons)
        skipped_reasons.append(f"{path.name}: {reason}")
    incomplete_ones = f", only incomplete ones: {'; '.join(skipped_reasons)}" if skipped_reasons else ""
    raise UserError(
        f"there is no complete checkpoint in {folder}{incomplete_ones}",
        allowed="to resume a run, a folder that `memfit run --save` wrote checkpoints into, or one of these "
        "checkpoints",
    )


def resolve_settings(
    keep: CheckpointSettings, seed: int | None, steps: int
) -> tuple[CheckpointSettings, int]:
    """Return ``keep`` and the seed, ready for a run. Paths in the returned ``keep`` are absolute, and the
    folder to save in is created. If ``keep`` resumes, its ``resume`` becomes the newest complete checkpoint
    found there, and ``passed_over`` names the newer incomplete ones.

    The returned seed is ``seed``, or if that is None, that of the checkpoint to resume from, or 0 without
    one. ``steps``: steps of the whole run, those done before the checkpoint included. Raises UserError if
    there is no complete checkpoint to resume from, if it has another seed than ``seed`` or has done at least
    ``steps`` steps, if the folder to save in is a file or cannot be written, and if it contains checkpoints
    of later steps than the run starts from, other than the ``passed_over`` ones (see `must_be_free`).
    """
    completed_steps, resume_seed = 0, seed or 0
    if keep.resume:
        path, checkpoint, skipped_reasons = find(Path(keep.resume))
        completed_steps, resume_seed = checkpoint.step, checkpoint.seed
        if seed not in {None, checkpoint.seed}:
            raise UserError(
                f"seed {seed} differs from the seed of the run to resume, {checkpoint.seed}",
                allowed=f"--seed {checkpoint.seed}, or no --seed: the checkpoint's is then used",
            )
        if completed_steps >= steps:
            raise UserError(
                f"the run of the checkpoint {path} has done {completed_steps} steps, so nothing remains "
                f"to be done of {steps} steps in all",
                allowed=f"--steps above {completed_steps}",
            )
        keep = dataclasses.replace(keep, resume=str(path.resolve()), passed_over=skipped_reasons)
    if keep.save and Path(keep.save).exists() and not Path(keep.save).is_dir():
        raise UserError(f"--save {keep.save} is a file", allowed="a folder, existing or new")
    if keep.save:
        is_own = bool(keep.resume) and Path(keep.resume).parent == Path(keep.save).resolve()
        damaged = {text.partition(":")[0] for text in keep.passed_over} if is_own else set[str]()
        must_be_free(Path(keep.save), completed_steps, damaged)
        must_be_writable(Path(keep.save), "checkpoints")
        keep = dataclasses.replace(keep, save=str(Path(keep.save).resolve()))
    return keep, resume_seed


def resume_if_restarted(keep: CheckpointSettings) -> CheckpointSettings:
    """Return ``keep`` for a process that a launcher may have restarted.

    If ``keep.resume`` is the folder ``keep.save``, it is replaced by the newest complete checkpoint in that
    folder, or by "" (start from the first step) if there is none. Otherwise ``keep`` is returned unchanged.
    """
    if not keep.resume or keep.resume != keep.save:
        return keep
    try:
        path, _, skipped_reasons = find(Path(keep.save))
    except UserError:
        return dataclasses.replace(keep, resume="")
    return dataclasses.replace(keep, resume=str(path), passed_over=skipped_reasons)


def must_be_free(folder: Path, after: int, damaged: Collection[str] = ()) -> None:
    """Raise UserError if ``folder`` contains a checkpoint, complete or not, after more than ``after`` steps,
    because it belongs to another run. Remains of interrupted saves (``.partial``) do not count, nor do those
    named in ``damaged``, of the run itself."""
    later_checkpoints = [
        p for p in _newest_first(folder) if p.suffix != PARTIAL and _step(p) > after and p.name not in damaged
    ]
    if later_checkpoints:
        raise UserError(
            f"{folder}, where this run is to save, already contains {later_checkpoints[0].name} of another "
            f"run; this run starts after {after} steps",
            allowed=f"a folder without checkpoints of more than {after} steps",
            hint=f"to continue the run that saved {later_checkpoints[0].name}, give --resume {folder}",
        )


def about(path: Path) -> Checkpoint:
    """Return the description stored in the checkpoint folder ``path``, in memfit.json. Raises UserError if it
    cannot be read or parsed, if it has a SHA-256 that is not that of its other fields, if it names files
    outside the folder, and if its step or seed is below 0, its seed 2**63 or above, or its ranks below 1."""
    description = serialization.loads(Checkpoint, read_text(path / ABOUT), what=f"{path / ABOUT}")
    has_checksums = bool(description.files_sha256 or description.sha256)
    if has_checksums and description.sha256 != _sha256_of_description(description):
        raise UserError(
            f"{path}/{ABOUT} is damaged: its content is not what was saved",
            hint=f"give {path.parent} to use the newest complete checkpoint in it",
        )
    if any(Path(name).name != name for name in (*description.files_bytes, *description.files_sha256)):
        raise UserError(f"{path}/{ABOUT} names files outside its folder", allowed="names of files beside it")
    if description.step < 0 or description.ranks < 1 or not 0 <= description.seed < 2**63:
        raise UserError(
            f"{path}/{ABOUT} has step {description.step}, ranks {description.ranks} and seed "
            f"{description.seed}"[:300],
            allowed="step and seed of at least 0, and at least 1 rank",
        )
    return description


def _sha256_of_description(description: Checkpoint) -> str:
    text = serialization.dumps(dataclasses.replace(description, sha256=""))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def reserve(folder: str) -> Iterator[None]:
    """Inside this context, ``folder`` is reserved for this process, because two runs would delete each
    other's unfinished checkpoints. Raises UserError if another process has reserved it, and OSError if there
    is no such folder. For "", and on a file system without locks, nothing is reserved. The system ends a
    reservation with its process."""
    if not folder:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run of memfit saves in {folder} and has not ended",
            allowed="a folder (--save) of its own for each run",
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def why_incomplete(path: Path, *, contents: bool = True) -> str:
    """Return why the folder ``path`` is not a complete checkpoint, such as "no memfit.json"; "" if it is
    complete. It is complete if its name does not end in ``.partial``, if its description can be read
    (`about`), and if every file that this names exists with the size and the SHA-256 that are stated there.
    All files are read for this. Without ``contents``, and of checkpoints whose description has no SHA-256 of
    files, only the sizes are compared."""
    if path.suffix == PARTIAL:
        return "its save was interrupted"
    if not (path / ABOUT).is_file():
        return f"no {ABOUT}"
    try:
        description = about(path)
    except UserError as error:
        return error.given
    for name, size_bytes in description.files_bytes.items():
        file = path / name
        actual_bytes = file.stat().st_size if file.is_file() else None
        if actual_bytes != size_bytes:
            problem = "is missing" if actual_bytes is None else f"has {actual_bytes} bytes of {size_bytes}"
            return f"{name} {problem}"
    for name, sha256 in description.files_sha256.items() if contents else ():
        try:
            if sha256_of(path / name) != sha256:
                return f"{name} is damaged: its content is not what was saved"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return ""


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of the file's content, as hexadecimal digits. Raises OSError if it cannot be
    read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def begin(folder: Path, step: int) -> Path:
    """Create an empty folder in ``folder``, which is created too if necessary, for the checkpoint after
    ``step`` steps, and return it. Its name, such as step-00000010.partial, is that of an unfinished save.
    What is left of earlier unfinished saves is deleted; links are not followed. Raises OSError if the folder
    cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step-*{PARTIAL}"):
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink()
        else:
            shutil.rmtree(leftover)
    path = folder / f"step-{step:08d}{PARTIAL}"
    path.mkdir()
    return path


def publish(partial: Path, description: Checkpoint) -> Path:
    """Finish a save: write ``description``, with its own SHA-256, into the folder ``partial``, whose other
    files must already be on the disk (fsync), rename the folder to its name without ``.partial``, and write
    this name into the file ``latest`` beside it. Return the folder's final path. An existing folder of this
    name is replaced: it must be damaged, since otherwise the run would have resumed from it. Raises UserError
    or OSError if the disk cannot be written."""
    description = dataclasses.replace(description, sha256=_sha256_of_description(description))
    write_whole(partial / ABOUT, f"{serialization.dumps(description, indent=2)}\n".encode())
    _sync(partial)
    path = partial.with_suffix("")
    damaged = path.with_name(f"{path.name}-damaged{PARTIAL}")
    if path.exists() or path.is_symlink():
        path.rename(damaged)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(damaged, ignore_errors=True)
    write_whole(path.parent / LATEST, f"{path.name}\n".encode())
    _sync(path.parent)
    return path


def prune(folder: Path, keep_last: int) -> tuple[Path, ...]:
    """Delete the complete checkpoints in ``folder`` but the ``keep_last`` newest ones, at least one, and
    return the paths of those deleted. Incomplete ones do not count and stay; contents are not read for this.
    A deletion that is interrupted leaves a folder that is named ``.partial`` and never taken for a
    checkpoint. Raises OSError if one cannot be deleted."""
    complete_ones = [path for path in _newest_first(folder) if not why_incomplete(path, contents=False)]
    old_ones = complete_ones[max(1, keep_last) :]
    for path in old_ones:
        path.rename(path.with_name(path.name + PARTIAL))
        shutil.rmtree(path.with_name(path.name + PARTIAL))
    return tuple(old_ones)


def _newest_first(folder: Path) -> Iterator[Path]:
    folders = [
        p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name.removesuffix(PARTIAL))
    ]
    yield from sorted(folders, key=lambda p: (_step(p), p.suffix != PARTIAL), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removesuffix(PARTIAL).partition("-")[2])


def _sync(folder: Path) -> None:
    """Write the list of the files in ``folder`` to the disk (fsync), but not their contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
