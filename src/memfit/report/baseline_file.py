"""The baseline file: its text as TOML, and reading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from memfit.files.read import read_toml
from memfit.types.baseline import BaselineFile, MemoryBaseline
from memfit.types.errors import UserError
from memfit.types.serialization import to_plain, to_user_error

FILE: Final = "memfit-baseline.toml"
_FORMAT: Final = BaselineFile().format
_HEAD: Final = (
    "# Peaks of memory as memfit predicts them. `memfit baseline check` and the pytest fixture\n"
    "# memfit_memory compare new predictions with them. To store new ones: `memfit baseline write`,\n"
    "# `pytest --memfit-update`. Of a module, state_bytes are parameters, gradients, optimizer state and\n"
    "# inputs; the other columns are activations and temporary tensors at the peak of that phase.\n"
    "# Of alike blocks, modules has the sums, and blocks the bytes of the single ones, largest first.\n"
)


def baseline_text(baseline: BaselineFile) -> str:
    """Return the baseline as TOML. Entries are sorted by job, size, batch, length, plan and machine, so that
    a new entry leaves the lines of the others as they are."""
    parts = [f'{_HEAD}format = "{baseline.format}"\n']
    for name in ("jobs", "tests"):
        entries = sorted(getattr(baseline, name), key=lambda entry: entry.key)
        parts += [f"[[{name}]]\n{''.join(_entry_lines(entry))}" for entry in entries]
    return "\n".join(parts)


def _entry_lines(entry: MemoryBaseline) -> Iterator[str]:
    for name, value in to_plain(entry).items():
        if name in ("modules", "blocks"):
            yield f"{name} = [\n"
            yield from (f"    {_toml({k: v for k, v in row.items() if v})},\n" for row in value)
            yield "]\n"
        elif value is not None:
            yield f"{name} = {_toml(value)}\n"


def _toml(value: Any) -> str:
    """Return text, a number or a mapping of these as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(v)}" for name, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_baseline(path: Path) -> BaselineFile:
    """Return the content of a baseline file. Raises UserError if it cannot be read, is not TOML, is of
    another version of the format, or has unknown, missing, wrong or duplicate entries."""
    import pydantic

    if not path.exists():
        raise UserError(
            f"there is no baseline {path}", hint=f"`memfit baseline write JOB --file {path}` writes one"
        )
    data = read_toml(path)
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{path} is not a baseline that this memfit reads: its format is {data.get('format')!r}",
            allowed=f'format = "{_FORMAT}"',
            hint="delete the file and write the baseline again with this version, or use the memfit that "
            "wrote it",
        )
    try:
        baseline = pydantic.TypeAdapter(BaselineFile).validate_python(data)
    except pydantic.ValidationError as error:
        raise to_user_error(error, f"the baseline {path}") from error
    for entries in (baseline.jobs, baseline.tests):
        counts = Counter(entry.key for entry in entries)
        for entry in entries:
            if counts[entry.key] > 1:
                raise UserError(
                    f"the baseline {path} has two entries for {entry.title}", hint="delete one of them"
                )
    return baseline
