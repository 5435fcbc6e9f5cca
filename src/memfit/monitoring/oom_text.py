"""Read the figures in error messages about memory: of torch's allocators from 1.1 on, and of the host."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Final

from memfit.types.device_kind import HOST
from memfit.types.units import GIB, KIB, MIB

# torch writes MB and GB for binary units, too.
_UNIT_BYTES: Final = {"BYTES": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40, "P": 2**50, "E": 2**60}
_SIZE: Final = r"(\d+\.?\d*)\s*(bytes\b|[KMGTPE]i?B\b|B\b)"
_LONGEST: Final = 1500  # characters of a message
_LINES: Final = 15

# Where the message of an accelerator's allocator begins. Its first word is the kind of device.
_DEVICE: Final = re.compile(
    r"\b(?P<kind>CUDA|HIP|XPU|MPS|NPU|[a-z]\w+)(?: backend)? out of memory"
    r"(?=\W+(?:Tried to allocate|\w+ allocated:))"
)
# The same, cut off behind it or without figures.
_BARE: Final = re.compile(
    r"\b(?:OutOfMemoryError|RuntimeError): (?P<kind>CUDA|HIP|XPU|MPS|NPU)(?: backend)? out of memory"
)
_MPS_BUFFER: Final = re.compile(rf"\bInvalid buffer size: {_SIZE}")  # larger than Metal allows for one
_TRIED: Final = re.compile(r"\bTried to allocate [\d.]+ \w+ \(GPU \d")  # messages cut off at their front
_HOST: Final = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)|"
    r"not enough memory: you tried to allocate|"
    r"^(?:[\w.]*\.)?_?(?:Array)?MemoryError\b|std::bad_alloc|\[Errno 12\] Cannot allocate memory",
    re.IGNORECASE,
)
_HOST_REQUEST: Final = re.compile(rf"(?:tried to allocate|Unable to allocate) {_SIZE}", re.IGNORECASE)

_FIELDS: Final = {
    "request_bytes": rf"Tried to allocate (?:more than )?{_SIZE}|Tried to allocate (?:more than )?(1)(E)B",
    "capacity_bytes": rf"{_SIZE} total capacity|total capaci?ty of {_SIZE}",
    "free_bytes": rf"of which {_SIZE} is free|{_SIZE} free",
    "allowed_bytes": rf"{_SIZE} allowed|max allowed: {_SIZE}|process's limit of {_SIZE}",
    "allocated_bytes": rf"{_SIZE} already allocated|{_SIZE} is allocated by PyTorch|MPS allocated: {_SIZE}",
    "unallocated_bytes": rf"{_SIZE} is reserved by PyTorch but unallocated|{_SIZE} cached",
    "process_bytes": rf"this process has {_SIZE} memory in use",
    "other_bytes": rf"other allocations: {_SIZE}",
}
_PATTERNS: Final = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _FIELDS.items()}
_RESERVED: Final = re.compile(rf"{_SIZE} reserved in total", re.IGNORECASE)
_OF_PROCESS: Final = re.compile(rf"\bProcess (\d+) has {_SIZE} memory in use")
_INDEX: Final = re.compile(r"\b(?:GPU|Device):? ?(\d+)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AllocationFailure:
    """An allocation that failed, as its message describes it. A field is None if the message does not state
    it.

    ``device``: kind of the device in small letters, such as "cuda", or "cpu"; ``index``: its number. ``row``:
    index of the message's first line in the log. ``text``: the message on one line. ``request_bytes``: what
    was asked for. ``capacity_bytes``: memory of the device. ``free_bytes``: free on the device.
    ``allowed_bytes``: limit of this process if it is lower. ``allocated_bytes``: in tensors.
    ``unallocated_bytes``: reserved by torch's allocator but in no tensor. ``process_bytes``: of this process,
    with what torch's allocator does not manage. ``other_bytes``: memory outside torch's allocator, of other
    processes or of the same. ``other_processes``: number of other processes that the message names.
    """

    device: str
    row: int
    text: str
    index: int | None = None
    request_bytes: int | None = None
    capacity_bytes: int | None = None
    free_bytes: int | None = None
    allowed_bytes: int | None = None
    allocated_bytes: int | None = None
    unallocated_bytes: int | None = None
    process_bytes: int | None = None
    other_bytes: int | None = None
    other_processes: int = 0

    @property
    def on_host(self) -> bool:
        return self.device == HOST

    @property
    def limit_bytes(self) -> int | None:
        """What this process may use at most: its own limit if it has one, else the device's capacity; None if
        the message states neither."""
        return self.allowed_bytes or self.capacity_bytes

    @property
    def outside_bytes(self) -> int | None:
        """Used memory of the device that torch's allocator in this process does not manage; None if the
        message does not say enough."""
        if self.other_bytes is not None:
            return self.other_bytes
        known = (self.capacity_bytes, self.free_bytes, self.allocated_bytes, self.unallocated_bytes)
        if self.capacity_bytes is None or None in known:
            return None
        return max(0, self.capacity_bytes - sum(b for b in known[1:] if b is not None))

    def figures(self) -> dict[str, int]:
        """Return the figures in bytes that the message states, and ``outside_bytes``, by name."""
        names = ("request_bytes", *(n for n in _FIELDS if n not in ("request_bytes", "other_bytes")))
        values = {n: getattr(self, n) for n in (*names, "outside_bytes")}
        return {n: v for n, v in values.items() if v is not None}


def allocation_failures(lines: Sequence[str]) -> Iterator[AllocationFailure]:
    """Yield the allocation failures that a log reports, in order. A message may go over several lines."""
    for row, line in enumerate(lines):
        if match := _MPS_BUFFER.search(line):
            text = _message(lines, row, match.start())
            yield AllocationFailure(device="mps", row=row, text=text, request_bytes=_bytes(match.groups()))
        elif match := _DEVICE.search(line) or _TRIED.search(line) or _BARE.search(line):
            kind = match.groupdict().get("kind", "cuda").lower()
            if kind not in ("of", "ran", "was"):
                yield _of_device(kind, row, _message(lines, row, match.start()))
        elif match := _HOST.search(line):
            text = _message(lines, row, match.start())
            request = _HOST_REQUEST.search(text)
            request_bytes = _bytes(request.groups()) if request else None
            yield AllocationFailure(device=HOST, row=row, text=text, request_bytes=request_bytes)


def _message(lines: Sequence[str], row: int, start: int) -> str:
    """Return a message that begins at ``start`` of a line, on one line: up to the next message, traceback or
    empty line."""
    parts = [lines[row][start:]]
    for line in lines[row + 1 : row + _LINES]:
        if not line.strip(" │|") or "Traceback (most" in line or 'File "' in line or _DEVICE.search(line):
            break
        parts.append(line.strip(" │|"))
    return " ".join(" ".join(parts).split())[:_LONGEST]


def _of_device(kind: str, row: int, text: str) -> AllocationFailure:
    fields = {name: _search(pattern, text) for name, pattern in _PATTERNS.items()}
    reserved_bytes, allocated_bytes = _search(_RESERVED, text), fields["allocated_bytes"]
    if reserved_bytes is not None and allocated_bytes is not None:
        fields["unallocated_bytes"] = max(0, reserved_bytes - allocated_bytes)
    processes = [_bytes(m.groups()[1:]) for m in _OF_PROCESS.finditer(text)]
    own_bytes = (allocated_bytes or 0) + (fields["unallocated_bytes"] or 0)
    if fields["process_bytes"] is None and len(processes) == 1 and processes[0] >= own_bytes > 0:
        fields["process_bytes"] = processes.pop()  # in a container a process does not know its own number
    index = _INDEX.search(text)
    return AllocationFailure(
        device=kind,
        row=row,
        text=text,
        index=int(index[1]) if index else None,
        other_processes=len(processes),
        **fields,
    )


def _search(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return _bytes(match.groups()) if match else None


def _bytes(groups: Sequence[str | None]) -> int:
    number, unit = (g for g in groups if g is not None)
    return int(float(number) * _UNIT_BYTES.get(unit.upper(), _UNIT_BYTES.get(unit[0].upper(), 1)))
