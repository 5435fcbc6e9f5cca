"""What was predicted of one job, on disk: traces, parts of sketches, estimates, and whether samples depend on
each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

from memfit.jobs.opened_files import note_opened_files
from memfit.planner.job_content import JobContent, job_content
from memfit.store import trace_columns
from memfit.store.prediction_cache import PredictionCache, default_folder, digest_of, limit_bytes
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan
from memfit.types.serialization import restore, to_plain
from memfit.types.trace import Trace

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class CallOutcome:
    """What a call returned (``value``), and whether it may be kept on disk: whether it depends on nothing but
    the job's content."""

    value: Any
    may_be_kept: bool


class StoredPredictions:
    """Entries of the cache for ``job``, whose content is ``content``.

    An entry is found again by its ``kind``, such as "trace", and by ``facts``: all that decides it beside the
    job, as values that ``json`` accepts.
    """

    def __init__(self, cache: PredictionCache, job: Job, content: JobContent) -> None:
        self.cache, self.job, self.content = cache, job, content

    def read_bytes(self, kind: str, *facts: Any) -> bytes | None:
        return self.cache.read(self._name(kind, facts))

    def write_bytes(self, data: bytes, kind: str, *facts: Any) -> None:
        self.cache.write(self._name(kind, facts), data)

    def has(self, kind: str, *facts: Any) -> bool:
        return self.read_bytes(kind, *facts) is not None

    def read(self, type_: Any, kind: str, *facts: Any) -> Any:
        """Return the entry as a value of the type ``type_`` (see `restore`). None if there is none."""
        data = self.read_bytes(kind, *facts)
        return None if data is None else restore(type_, json.loads(data))

    def write(self, value: Any, kind: str, *facts: Any) -> None:
        """Add an entry with a value that `to_plain` can convert to what ``json`` accepts. A value that it
        cannot convert is not kept, and nothing is raised."""
        with contextlib.suppress(TypeError):
            self.write_bytes(json.dumps(to_plain(value)).encode(), kind, *facts)

    def run(self, call: Callable[[], Any]) -> CallOutcome:
        """Call the function, and return its value with whether the value may be kept. It may not if the call
        opened files or loaded modules that are not in the job's content."""
        opened = dict[str, float]()
        with note_opened_files(opened):
            value = call()
        return CallOutcome(value, self.content.covers(opened))

    def get_or_compute(self, type_: Any, call: Callable[[], _T], kind: str, *facts: Any) -> _T:
        """Return the entry, or if there is none what ``call`` returns. That becomes the entry if it is not
        None, and if the call read no files and loaded no modules that are not in the job's content."""
        entry: _T | None = self.read(type_, kind, *facts)
        if entry is not None:
            return entry
        outcome = self.run(call)
        value: _T = outcome.value
        if outcome.may_be_kept and value is not None:
            self.write(value, kind, *facts)
        return value

    def _name(self, kind: str, facts: tuple[Any, ...]) -> str:
        return digest_of(self.content.digest, kind, facts)


def stored_predictions(ref: JobRef, job: Job) -> StoredPredictions | None:
    """Return the cache's entries for the job that ``ref`` names and `load` has returned. None if the cache is
    switched off or if the job's content cannot be known (`job_content`). Raises UserError if the environment
    variable ``MEMFIT_CACHE_LIMIT`` is set but is not a size."""
    folder = default_folder()
    if folder is None:
        return None
    cache = PredictionCache(folder, limit_bytes())
    content = job_content(ref, job)
    return StoredPredictions(cache, job, content) if content is not None else None


class Traces(MutableMapping[tuple[Plan, int], Trace]):
    """Traces by (plan, rank). One that was added as bytes (`trace_columns.to_bytes`), by `add`, is decoded
    when it is first read."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Plan, int], Trace | bytes] = {}

    def __getitem__(self, key: tuple[Plan, int]) -> Trace:
        entry = self._entries[key]
        if isinstance(entry, bytes):
            entry = self._entries[key] = trace_columns.from_bytes(entry)
        return entry

    def __setitem__(self, key: tuple[Plan, int], trace: Trace) -> None:
        self._entries[key] = trace

    def add(self, key: tuple[Plan, int], trace: Trace | bytes) -> None:
        self._entries[key] = trace

    def __delitem__(self, key: tuple[Plan, int]) -> None:
        del self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[tuple[Plan, int]]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
