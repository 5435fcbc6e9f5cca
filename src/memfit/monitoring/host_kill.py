"""Signs in a log that a process was killed from outside: by the kernel, a cluster or a container."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Final

from memfit.types.units import KIB

_KERNEL: Final = re.compile(
    r"(?P<group>Memory cgroup out of memory|Out of memory): Kill(?:ed)? process \d+ \((?P<name>[^)]*)\)"
)
_RESIDENT: Final = re.compile(r"(?:anon|file|shmem)-rss:(\d+) ?kB")
_LIMIT: Final = re.compile(r"memory: usage (\d+)kB, limit (\d+)kB")
# The scheduler, the container runtime or a daemon says that memory ran out.
_STATED: Final = re.compile(
    r"oom[-_ ]kill event|Exceeded (?:job|step) memory limit|exceeded memory limit|task \d+: Out Of Memory|"
    r"\bOUT_OF_MEMORY\b|(?:reason|Reason|lastState|status).{0,40}\bOOMKilled\b(?!\W+false)|^\s*OOMKilled\b|"
    r"\"OOMKilled\": true|\bTERM_MEMLIMIT\b|mem(?:ory)? .{0,40}exceeded limit|node running low on memory|"
    r"crashed after using all available RAM|systemd-oomd.*Killed|"
    r"killed by the kernel (?:at its cap|: its group)"
)
_SHARED: Final = re.compile(
    r"insufficient shared memory|out of shared memory|unable to (?:write to file|mmap .*from file) </?torch_|"
    r"(?:failed to extend|Error while creating shared memory segment) /dev/shm|"
    r"No space left on device.*/dev/shm|/dev/shm.*No space left on device"
)
# SIGKILL, of which the log does not say who sent it.
_SIGKILL: Final = re.compile(
    r"killed by signal: Killed|exit ?code *:? *\(?-9\b|"
    r"exit(?:ed)?(?: with)? (?:code|status)[: =]+\(?(?:137|-9)\b|return code = -9|SIGKILL|"
    r"Exit Code: *137|^\s*(?:Killed|強制終了)\s*$|\b\d+ (?:Killed|強制終了)\s{3,}\S|"
    r"^\S*: line \d+: +\d+ Killed"
)
_TRAINER: Final = re.compile(r"python|^pt_|train|torchrun|accelerate|deepspeed|ray|^memfit", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostKill:
    """A sign that a process was killed. ``kind``: "kernel", "stated" (a scheduler or container runtime says
    that memory ran out), "shared-memory" or "sigkill" (the log does not say why). ``row`` and ``text``: index
    and text of the line in the log. ``process``: its name, "" if unknown. ``resident_bytes``: resident memory
    of the process when the kernel killed it. ``in_group``: whether the kernel killed it because its control
    group was full. ``limit_bytes``: limit of that group. Both figures are None if the log has none.
    """

    kind: str
    row: int
    text: str
    process: str = ""
    resident_bytes: int | None = None
    limit_bytes: int | None = None
    in_group: bool = False

    @property
    def is_training(self) -> bool:
        """Whether the name of the process looks like that of a training, or is unknown."""
        return not self.process or _TRAINER.search(self.process) is not None


def host_kills(lines: Sequence[str]) -> Iterator[HostKill]:
    """Yield the signs of killed processes in a log, in order."""
    limit_bytes = None
    for row, line in enumerate(lines):
        if limit := _LIMIT.search(line):
            limit_bytes = int(limit[2]) * KIB
        if kill := _KERNEL.search(line):
            in_group = "cgroup" in kill["group"]
            resident = [int(kib) * KIB for kib in _RESIDENT.findall(" ".join(lines[row : row + 2]))]
            yield HostKill(
                kind="kernel",
                row=row,
                text=line.strip(),
                process=kill["name"],
                resident_bytes=sum(resident[:3]) if resident else None,
                limit_bytes=limit_bytes if in_group else None,
                in_group=in_group,
            )
        else:
            kinds = (("shared-memory", _SHARED), ("stated", _STATED), ("sigkill", _SIGKILL))
            kind = next((k for k, pattern in kinds if pattern.search(line)), None)
            if kind is not None:
                yield HostKill(kind=kind, row=row, text=line.strip())
