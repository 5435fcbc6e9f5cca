"""A control group (version 2) for one process, if the user has permission to make one; and the memory limit
of the group that this process is in, of either version.

This module uses only the standard library. A child process makes and enters its group; its parent reads what
happened in the group and removes it. Without such a group, the parent reads what happened in its own, where
the child is. docs/decisions/002-memory-cap.md says why only version 2 is used, and never for root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")
# Of version 2 and of version 1: the files of the limit and of the use, and the key of cached files.
_FILES: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_UNLIMITED_BYTES: Final = 2**60  # version 1 has no other word for "no limit" than a very large number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The control group that limits the memory of process `pid`. `path` is its folder, which exists only
    between `make` and `remove`. `home` is the folder of the group in which the process is before `enter`."""

    path: Path
    home: Path
    pid: int

    @classmethod
    def of(cls, pid: int, *, root: Path = _ROOT, own: Path = _OWN) -> Group | None:
        """Return the group for process `pid`, which is this process or its child. Nothing is created. Return
        None without control groups of version 2, if the user is root, and if he may not make a sibling of
        this process's group that limits memory. ``root`` is the folder of all control groups, ``own`` the
        file that names this process's group."""
        home = _delegated_home(root, own)
        return cls(path=home.parent / f"memfit-{pid}", home=home, pid=pid) if home else None

    def make(self, cap_bytes: int) -> None:
        """Create the group, without processes, with a limit of ``cap_bytes`` on its memory, and without swap
        where the kernel counts swap. Raises OSError if the group exists or the system does not allow it."""
        self.path.mkdir()
        try:
            self.limit(cap_bytes)
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                (self.path / "memory.swap.max").write_text("0")
        except OSError:
            self.remove()
            raise

    def limit(self, cap_bytes: int) -> None:
        """Set the limit on the group's memory. Raises OSError if the system does not allow it."""
        (self.path / "memory.max").write_text(str(cap_bytes))

    def enter(self) -> None:
        """Move the process into the group. Pages that it touched before stay charged to the group that it
        leaves, so the limit does not count them. Raises OSError if the system does not allow it."""
        (self.path / "cgroup.procs").write_text(str(self.pid))

    def leave(self) -> None:
        """Move the process back to its home group. Raises OSError if the system does not allow it."""
        (self.home / "cgroup.procs").write_text(str(self.pid))

    def peak_bytes(self) -> int | None:
        """Return the highest number of bytes that the group has held since it was created. Return None if the
        kernel does not record it (before Linux 5.19), and if the group does not exist."""
        with contextlib.suppress(OSError):
            return int((self.path / "memory.peak").read_text())
        return None

    def oom_kills(self) -> int:
        """Return how many processes in the group the kernel has killed because memory ran out, since the
        group was created; 0 if the group does not exist."""
        with contextlib.suppress(OSError):
            return _oom_kills(self.path / "memory.events")
        return 0

    def remove(self) -> None:
        """Remove the group. Do nothing if the system refuses, as while processes are in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def oom_kills_here(*, root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Return how many processes in this process's control group, without the groups below it, the kernel has
    killed because memory ran out. Return None if the kernel does not count them: without control groups that
    limit memory, of version 2 before Linux 5.2, of version 1 before Linux 4.13, and if this process is in the
    top group. ``root`` and ``own``: as in `Group.of`."""
    with contextlib.suppress(OSError, StopIteration):
        return _oom_kills(_home(root, own) / "memory.events.local")
    with contextlib.suppress(OSError, StopIteration):
        lines = (line.split(":", 2) for line in own.read_text().splitlines())
        path = next(path for _, controllers, path in lines if "memory" in controllers.split(","))
        return _oom_kills(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return None


def limit_here(*, root: Path = _ROOT, own: Path = _OWN) -> tuple[int, int] | None:
    """Return (least limit, least free bytes) of this process's control group and those above it that limit
    memory, in version 2 or in the memory hierarchy of version 1. A container's limit is such a group. Cached
    files that the kernel can drop count as free. Return None if none of these groups limits memory. ``root``
    and ``own``: as in `Group.of`."""
    limits = [limit for g in _memory_groups(root, own) if (limit := _limit(g)) is not None]
    if not limits:
        return None
    return min(limit for limit, _ in limits), min(free for _, free in limits)


def _memory_groups(root: Path, membership_file: Path) -> list[Path]:
    """Return the folders of the groups of both versions that may limit this process's memory: its own and
    those above it. A container may see a hierarchy in which its own group is the top one, and the path of
    another in the file that names its group: then folders do not exist, and only the top one counts."""
    groups = []
    with contextlib.suppress(OSError):
        for line in membership_file.read_text().splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if not controllers or "memory" in controllers.split(","):
                top = root / "memory" if controllers else root
                home = top / path.lstrip("/")
                groups += [g for g in (home, *home.parents) if g == top or top in g.parents]
    return groups


def _limit(group: Path) -> tuple[int, int] | None:
    """Return (limit, free bytes) of a group, or None if it has no limit or cannot be read."""
    for limit_name, usage_name, cache_name in _FILES:
        with contextlib.suppress(OSError, ValueError):
            limit_bytes = int((group / limit_name).read_text())  # "max" in version 2 if there is no limit
            if limit_bytes >= _UNLIMITED_BYTES:
                continue
            lines = (group / "memory.stat").read_text().splitlines()
            cache_bytes = int(dict(line.split() for line in lines).get(cache_name, 0))
            used_bytes = int((group / usage_name).read_text())
            return limit_bytes, min(limit_bytes, max(0, limit_bytes - used_bytes + cache_bytes))
    return None


def _oom_kills(events: Path) -> int:
    lines = events.read_text().splitlines()
    return int(dict(line.split() for line in lines).get("oom_kill", 0))


def _home(root: Path, membership_file: Path) -> Path:
    """Return the folder of this process's control group of version 2. Raises OSError if the file cannot be
    read, and StopIteration if it names no such group."""
    lines = membership_file.read_text().splitlines()
    return root / next(line[4:] for line in lines if line.startswith("0::/"))


def _delegated_home(root: Path, membership_file: Path) -> Path | None:
    """Return the folder of this process's control group if the user may write to its parent group, and if the
    parent delegates the memory controller to its children. Return None otherwise, and if the user is root.

    A group that contains processes cannot delegate a controller, so a new group must be a sibling of this
    process's group."""
    if os.geteuid() == 0:
        return None  # root may write anywhere, which does not show a delegation
    with contextlib.suppress(OSError, StopIteration):
        home = _home(root, membership_file)
        parent = home.parent
        controllers = (parent / "cgroup.subtree_control").read_text().split()
        is_writable = os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK)
        if home != root and "memory" in controllers and is_writable:
            return home
    return None
