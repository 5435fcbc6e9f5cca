"""A control group (version 2) for one process, where the user has been given the right to make one.

Standard library only: the child enters its group, the parent reads what became of it and removes it.
Why version 2 only, and never for root: docs/decisions/002-memory-cap.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The group made for process `pid`, and `home`, the group that the process came from."""

    path: Path
    home: Path
    pid: int

    @classmethod
    def of(cls, pid: int, *, root: Path = _ROOT, own: Path = _OWN) -> Group | None:
        """Where the group of a child `pid` of this process's group would be; None where none can be made."""
        home = _delegated_home(root, own)
        return cls(path=home.parent / f"memfit-{pid}", home=home, pid=pid) if home else None

    def make(self, cap_bytes: int) -> None:
        """Raises OSError when the system does not allow it after all."""
        self.path.mkdir()
        try:
            (self.path / "memory.max").write_text(str(cap_bytes))
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                (self.path / "memory.swap.max").write_text("0")
        except OSError:
            self.remove()
            raise

    def enter(self) -> None:
        """Pages touched before stay charged to the old group: the footprint is outside the cap."""
        (self.path / "cgroup.procs").write_text(str(self.pid))

    def leave(self) -> None:
        (self.home / "cgroup.procs").write_text(str(self.pid))

    def peak_bytes(self) -> int | None:
        """None before Linux 5.19."""
        with contextlib.suppress(OSError):
            return int((self.path / "memory.peak").read_text())
        return None

    def oom_kills(self) -> int:
        """How many processes the kernel killed here because the cap was reached."""
        with contextlib.suppress(OSError):
            lines = (self.path / "memory.events").read_text().splitlines()
            return int(dict(line.split() for line in lines).get("oom_kill", 0))
        return 0

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _delegated_home(root: Path, own: Path) -> Path | None:
    """This process's group, if its parent belongs to the user and hands the memory controller down.

    A group with processes cannot hand a controller down, so the new group must be a sibling.
    """
    if os.geteuid() == 0:
        return None  # may write anywhere, which says nothing about having been given it
    with contextlib.suppress(OSError, StopIteration):
        lines = own.read_text().splitlines()
        home = root / next(line[4:] for line in lines if line.startswith("0::/"))
        parent = home.parent
        handed_down = (parent / "cgroup.subtree_control").read_text().split()
        writable = os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK)
        if home != root and "memory" in handed_down and writable:
            return home
    return None
