"""Keep the side effects of a script out: what it writes is removed again, and no existing file is changed.

New files and folders are made where the script wants them, because libraries write there without Python's
knowledge; they are listed in a journal, by which the parent process removes them. Existing files are not
touched: they are written, moved and removed as copies in a scratch folder. Folders for temporary files and
caches are left to the script.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from memfit.types.errors import first_names

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_JOURNAL = "created.txt"
_READING_PROGRAMS = frozenset({"uname", "nvidia-smi", "rocm-smi", "lscpu", "ldconfig", "which"})
_CHANGING = ("truncate", "chmod", "lchmod", "chown", "lchown", "utime", "setxattr", "removexattr")
_MOST_WATCHED = 20_000  # files
_MOST_COPIED_BYTES = 2**30
# Trackers that would write or send before the first step, and the settings that keep them quiet.
_QUIET_TRACKERS = {
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "NEPTUNE_MODE": "debug",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Sandbox:
    """What a script has written. ``scratch``: an empty folder. ``hosts``: machines it connected to.
    ``created``: files and folders that it made. ``kept``: existing files that it would have changed.
    ``programs``: programs that it started."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.hosts: dict[str, None] = {}
        self.kept: dict[str, None] = {}
        self.programs: dict[str, None] = {}
        self.created: dict[str, None] = {}
        self.active = True
        self._copies: dict[str, str] = {}  # existing file -> its copy in the scratch folder
        self._removed: set[str | None] = set()
        self._is_hdf5_patched = False
        self._journal = os.open(scratch / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._free = tuple(os.path.realpath(p) for p in _free_folders(scratch))
        # a project may lie in a folder for temporary files
        self._protected = tuple({os.path.realpath(p) for p in (Path.cwd(), sys.path[0] or ".")})
        self._before = _states(self._protected)

    def notes(self) -> list[str]:
        """Return sentences that say what the script was kept from and what it did outside this process."""
        notes = []
        tops = _outermost(self.created)
        if tops:
            notes.append(f"what the script wrote is removed again: {_few(tops)}")
        if self.kept:
            notes.append(
                f"existing files that the script would have changed are as they were: {_few(self.kept)}"
            )
        if unseen := self._unseen():
            notes.append(
                "files changed meanwhile, by another process or a library that writes without Python's "
                f"knowledge; look at them: {_few(unseen)}"
            )
        if self.hosts:
            notes.append(f"the script connected to {_few(self.hosts)}")
        if self.programs:
            notes.append(
                f"the script started other programs, which are not kept from writing: {_few(self.programs)}"
            )
        return notes

    def _unseen(self) -> list[str]:
        """Return the files below the current folder and the script's that are new or were changed although
        the patched functions of this class did not see it; [] if there are more than 20,000 files."""
        after = _states(self._protected) if self._before else {}
        changed = (name for name, state in after.items() if self._before.get(name) != state)
        outputs = _output_files()
        return [
            name
            for name in changed
            if not (self._is_free(name) or self._is_created(name) or _identity(name) in outputs)
        ]

    # -- patches --------------------------------------------------------------------------------------

    def open(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            return inner(self.place(file, writes=writes), mode, *args, **kwargs)

        return opened

    def os_open(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is None:
                path = self.place(path, writes=bool(flags & _WRITES))
            return inner(path, flags, *args, **kwargs)

        return opened

    def make_folder(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def mkdir(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._existing(path) in self._removed:
                return None
            out = inner(path, *args, **kwargs)
            self._note_created(path)
            return out

        return mkdir

    def change(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Return a stand-in for ``inner``, a function such as os.chmod that changes the file of its first
        argument without opening it. The stand-in changes a copy of the file. It leaves existing folders
        unchanged."""

        @functools.wraps(inner)
        def changed(path: Any, *args: Any, **kwargs: Any) -> Any:
            name = self._existing(path)
            if name is None or kwargs.get("dir_fd") is not None:
                return inner(path, *args, **kwargs)
            self.kept[name] = None
            return None if Path(name).is_dir() else inner(self._copy(name), *args, **kwargs)

        return changed

    def link(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Return a stand-in for ``inner``, os.symlink or os.link. It makes no link in place of a file that
        the script has removed, and a copy in place of a hard link to a file that the script did not make."""

        @functools.wraps(inner)
        def linked(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            if self._existing(target) in self._removed:
                return None
            if inner.__name__ == "link" and (name := self._existing(source)) is not None:
                source = self._copy(name)  # what is written to a hard link is written to the file
                out: Any = shutil.copyfile(source, target)
            else:
                out = inner(source, target, *args, **kwargs)
            self._note_created(target)
            return out

        return linked

    def connect(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def connected(database: Any, *args: Any, **kwargs: Any) -> Any:
            is_file = kwargs.get("uri") is not True and os.fsdecode(database) not in ("", ":memory:")
            if is_file:
                database = self.place(database, writes=True)
                for ending in ("-journal", "-wal", "-shm"):
                    self._note_created(f"{os.fsdecode(database)}{ending}")
            return inner(database, *args, **kwargs)

        return connected

    def remove(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def removed(path: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is None and (name := self._existing(path)) is not None:
                self.kept[name] = None
                self._removed.add(name)
                return None
            return inner(path, *args, **kwargs)

        return removed

    def rename(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def renamed(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            source_name = self._existing(source)
            if source_name is not None:
                self.kept[source_name] = None
                if Path(source_name).is_dir():
                    return None
                source = self._copy(source_name)
            if (target_name := self._existing(target)) is not None:
                self.kept[target_name] = None
                copy = self._copies.setdefault(target_name, self._new_copy(target_name))
                return shutil.move(source, copy)
            self._note_created(target)
            return shutil.move(source, target) if source_name else inner(source, target, *args, **kwargs)

        return renamed

    def remove_tree(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def rmtree(path: Any, *args: Any, **kwargs: Any) -> Any:
            name = self._existing(path)
            if name is None:
                return inner(path, *args, **kwargs)
            self.kept[name] = None
            self._removed.add(name)
            return None

        return rmtree

    def open_hdf5(self, inner: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(inner)
        def init(file: Any, name: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
            if isinstance(name, str | bytes | os.PathLike):
                name = self.place(name, writes=mode != "r")
            inner(file, name, mode, *args, **kwargs)

        return init

    # -- paths ----------------------------------------------------------------------------------------

    def place(self, path: Any, *, writes: bool) -> Any:
        """Return the path to open instead of ``path``: that of the copy if the script writes to an existing
        file or has written to it, otherwise ``path``. A new file is listed as created. The copy of a file
        above 1 GiB is empty. Files in folders for temporary files and caches have no copies."""
        if not self.active or isinstance(path, int):
            return path
        name = os.path.realpath(os.fsdecode(path))
        if name in self._copies:
            return self._copies[name]
        if not writes or self._is_free(name):
            return path
        existing = self._existing(path)
        if existing is None:
            self._note_created(path)
            return path
        self.kept[existing] = None
        return self._copy(existing)

    def _copy(self, name: str) -> str:
        if name not in self._copies:
            copy = self._new_copy(name)
            if name not in self._removed and Path(name).stat().st_size <= _MOST_COPIED_BYTES:
                shutil.copyfile(name, copy)
            self._copies[name] = copy
        return self._copies[name]

    def _new_copy(self, name: str) -> str:
        return str(self.scratch / f"{len(self._copies)}-{Path(name).name[-80:]}")

    def _existing(self, path: Any) -> str | None:
        """Return the absolute path of a file or folder that the script did not make. Return None if it does
        not exist, was made by the script, is no plain file or folder, or lies in a folder for temporary files
        or caches, which the script may change; also for a file descriptor, and when ``active`` is False."""
        if not self.active or isinstance(path, int):
            return None
        name = os.path.realpath(os.fsdecode(path))
        try:
            mode = Path(name).stat().st_mode
        except OSError:
            return None
        is_plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        return None if not is_plain or self._is_free(name) or self._is_created(name) else name

    def _is_created(self, name: str) -> bool:
        return any(
            name == created_path or name.startswith(f"{created_path}{os.sep}")
            for created_path in self.created
        )

    def _is_free(self, name: str) -> bool:
        """Return whether the script may write to this path: it is in a folder for temporary files or caches,
        and no project folder (the current one or the script's) is nearer around it."""
        free, protected = (_innermost(name, folders) for folders in (self._free, self._protected))
        return len(free) > len(protected)

    def _note_created(self, path: Any) -> None:
        if not self.active or isinstance(path, int):
            return
        name = os.fsdecode(path)
        if Path(name).is_symlink():  # the link itself, not the file that it leads to
            name = str(Path(os.path.realpath(Path(name).parent), Path(name).name))
        else:
            name = os.path.realpath(name)
        if self._is_free(name) or self._is_created(name):
            return
        self.created[name] = None
        os.write(self._journal, name.encode() + b"\0")

    def listen(self, event: str, args: Any) -> None:
        """Handle an audit event (`sys.addaudithook`): note the host of a connection or the program that is
        started, and patch h5py once it is imported."""
        if not self.active:
            return
        if event == "import" and not self._is_hdf5_patched:
            hdf5 = getattr(sys.modules.get("h5py._hl.files"), "File", None)
            if hdf5 is not None:
                self._is_hdf5_patched = True
                hdf5.__init__ = self.open_hdf5(hdf5.__init__)
        if event == "socket.getaddrinfo" and args[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
            self.hosts[str(args[0])] = None
        elif event == "subprocess.Popen" and (name := Path(str(args[0])).name) not in _READING_PROGRAMS:
            self.programs[name] = None


@contextlib.contextmanager
def sandboxed(scratch: Path) -> Iterator[Sandbox]:
    """Inside this context, keep the script from changing existing files outside folders for temporary files
    and caches (it changes copies in ``scratch``), and experiment trackers from sending. Its new files are
    listed in ``scratch``; `remove_created` with the same folder, to be called afterwards in any process,
    removes them."""
    sandbox = Sandbox(scratch)
    os.environ.update(_QUIET_TRACKERS)
    os.environ["MLFLOW_TRACKING_URI"] = f"file://{scratch}/mlflow"
    sys.addaudithook(sandbox.listen)
    opener = sandbox.open(builtins.open)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (builtins, "open", opener),
            (io, "open", opener),
            (os, "open", sandbox.os_open(os.open)),
            (os, "mkdir", sandbox.make_folder(os.mkdir)),
            (os, "remove", sandbox.remove(os.remove)),
            (os, "unlink", sandbox.remove(os.unlink)),
            (os, "rmdir", sandbox.remove(os.rmdir)),
            (os, "rename", sandbox.rename(os.rename)),
            (os, "replace", sandbox.rename(os.replace)),
            *((os, name, sandbox.change(getattr(os, name))) for name in _CHANGING if hasattr(os, name)),
            (os, "symlink", sandbox.link(os.symlink)),
            (os, "link", sandbox.link(os.link)),
            (sqlite3, "connect", sandbox.connect(sqlite3.connect)),
            (sqlite3.dbapi2, "connect", sandbox.connect(sqlite3.dbapi2.connect)),
            (shutil, "rmtree", sandbox.remove_tree(shutil.rmtree)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        try:
            yield sandbox
        finally:
            sandbox.active = False


def remove_created(scratch: Path) -> None:
    """Remove the files and folders that a script has made, by the journal in ``scratch``."""
    with contextlib.suppress(OSError):
        names = [n.decode() for n in (scratch / _JOURNAL).read_bytes().split(b"\0") if n]
        for name in reversed(names):
            path = Path(name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _states(folders: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return path -> (size in bytes, time of change in ns) of all files in ``folders`` and below; {} if there
    are more than 20,000."""
    states: dict[str, tuple[int, int]] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            if len(states) + len(names) > _MOST_WATCHED:
                return {}
            for name in names:
                with contextlib.suppress(OSError):
                    state = os.lstat(os.path.join(parent, name))  # noqa: PTH118  for many files
                    states[os.path.join(parent, name)] = (state.st_size, state.st_mtime_ns)  # noqa: PTH118
    return states


def _output_files() -> set[tuple[int, int]]:
    """Return the identities of the files to which the standard output and error of this process and of its
    parents are redirected. Empty where there is no /proc."""
    files, pid = set[tuple[int, int]](), os.getpid()
    with contextlib.suppress(OSError, ValueError):  # a parent may belong to another user
        while pid > 1:
            files |= {_identity(f"/proc/{pid}/fd/{number}") for number in (1, 2)}
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return files - {(0, 0)}


def _identity(name: str) -> tuple[int, int]:
    """Return the device and inode of a file; (0, 0) if it cannot be read."""
    with contextlib.suppress(OSError):
        state = Path(name).stat()
        return state.st_dev, state.st_ino
    return 0, 0


def _free_folders(scratch: Path) -> list[str]:
    caches = [os.environ.get(n, "") for n in ("HF_HOME", "HF_DATASETS_CACHE", "TORCH_HOME", "XDG_CACHE_HOME")]
    home = Path.home()
    known = [str(scratch), tempfile.gettempdir(), "/dev", "/proc", "/sys", str(home / ".cache")]
    return [*known, str(home / ".config"), str(home / ".triton"), *filter(None, caches)]


def _innermost(name: str, folders: tuple[str, ...]) -> str:
    around = [f for f in folders if name == f or name.startswith(f.rstrip(os.sep) + os.sep)]
    return max(around, key=len, default="")


def _outermost(names: dict[str, None]) -> list[str]:
    tops: list[str] = []
    for name in sorted(names):
        if not tops or not name.startswith(f"{tops[-1]}{os.sep}"):
            tops.append(name)
    return tops


def _few(names: Iterable[str]) -> str:
    here = f"{Path.cwd()}{os.sep}"
    return first_names((name.removeprefix(here) for name in names), 4)
