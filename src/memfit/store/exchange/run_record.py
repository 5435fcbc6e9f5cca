"""The record of one run: the file that ``memfit run --record`` writes and ``memfit record --add`` adds to a
store."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from memfit.files.read import read_json
from memfit.store.database import Store
from memfit.store.environment import fingerprint
from memfit.types import serialization
from memfit.types.result import Run

RUN_FORMAT: Final = "memfit-run"
RUN: Final = "run"  # the kind of the row, and the label of a run without one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run, when (ISO, UTC) and in which environment (`fingerprint`) it was made. ``label``: the name under
    which a store keeps it."""

    format: Literal["memfit-run"] = RUN_FORMAT
    version: Literal[1] = 1
    label: str
    created: str
    environment: Mapping[str, str]
    run: Run


def record_of(run: Run, label: str) -> RunRecord:
    """Return the record of a run that was made by this process just now."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return RunRecord(label=label, created=created, environment=fingerprint(), run=run)


def run_record_text(record: RunRecord) -> str:
    """Return the record as the JSON text of a file."""
    return serialization.dumps(record, indent=1) + "\n"


def is_run_record(path: Path) -> bool:
    """Return whether the file says that it is the record of a run. Raises UserError if it is no JSON file."""
    data = read_json(path)
    return isinstance(data, dict) and data.get("format") == RUN_FORMAT


def parse_run_record(text: str, *, what: str) -> RunRecord:
    """Return the record of which ``text`` is the JSON text. Raises UserError if it is none; ``what`` names
    the text in the message."""
    return serialization.loads(RunRecord, text, what=what)


def add_run(store: Store, record: RunRecord) -> bool:
    """Add the run to the store. Return whether it was added; an equal record is not added again."""
    return store.add(record.label, RUN, record.run, created=record.created, environment=record.environment)
