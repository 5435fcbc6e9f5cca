"""The baseline file as TOML, and the comparison of a prediction with it."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from memfit.cost.module_memory import COLUMNS, MODULE_RATIO, module_sums
from memfit.types.baseline import (
    OTHERS,
    ROOT,
    BaselineComparison,
    BaselineFile,
    MemoryBaseline,
    MemoryDrift,
    ModuleGrowth,
    ModuleMemory,
)
from memfit.types.errors import UserError
from memfit.types.serialization import to_plain, to_user_error, toml_text
from memfit.types.units import MIB, format_bytes

FILE: Final = "memfit-baseline.toml"
_FORMAT: Final = BaselineFile().format
_HEAD: Final = (
    "# Peaks of memory as memfit predicts them. `memfit baseline check` and the pytest fixture\n"
    "# memfit_memory compare new predictions with them. To store new ones: `memfit baseline write`,\n"
    "# `pytest --memfit-update`. Of a module, state_bytes are parameters, gradients, optimizer state and\n"
    "# inputs; the other columns are activations and temporary tensors at the peak of that phase.\n"
)
_SEGMENT_BYTES: Final = 20 * MIB  # torch's caching allocator reserves memory in steps of up to this size
_MOST_MODULES: Final = 5  # named for one drift


# -- the file -------------------------------------------------------------------------------------


def baseline_text(baseline: BaselineFile) -> str:
    """Return the baseline as TOML: equal content gives equal text. Entries are sorted by what they
    predict."""
    parts = [f'{_HEAD}format = "{baseline.format}"\n']
    for name in ("jobs", "tests"):
        entries = sorted(getattr(baseline, name), key=lambda entry: entry.key)
        parts += [f"[[{name}]]\n{''.join(_entry_lines(entry))}" for entry in entries]
    return "\n".join(parts)


def _entry_lines(entry: MemoryBaseline) -> Iterator[str]:
    for name, value in to_plain(entry).items():
        if name == "modules":
            yield "modules = [\n"
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
        raise UserError(f"there is no baseline {path}", hint="`memfit baseline write JOB` writes one")
    try:
        data = tomllib.loads(toml_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{path} is not a baseline that this memfit reads: its format is {data.get('format')!r}",
            allowed=f'format = "{_FORMAT}"',
            hint="write the baseline again with this version, or use the memfit that wrote it",
        )
    try:
        baseline = pydantic.TypeAdapter(BaselineFile).validate_python(data)
    except pydantic.ValidationError as error:
        raise to_user_error(error, f"the baseline {path}") from error
    for entries in (baseline.jobs, baseline.tests):
        counts = Counter(entry.key for entry in entries)
        for entry in entries:
            if counts[entry.key] > 1:
                raise UserError(f"{path} has two entries for {entry.title}", hint="delete one of them")
    return baseline


# -- the comparison -------------------------------------------------------------------------------


def compare_baseline(
    stored: MemoryBaseline, predicted: MemoryBaseline, tolerance_ratio: float
) -> BaselineComparison:
    """Compare a prediction, with the rows of all its modules, with the stored one.

    A phase has drifted if its peak grew by more than ``tolerance_ratio`` of it. So has a module whose bytes
    in a phase grew by more than that share of them, or of 1 % of the stored peak if they were less. New
    modules count together, against those that are gone: a renamed module is no drift. Reserved memory has
    drifted if it also grew by more than 20 MiB, as it is reserved in steps of up to that size.
    """
    least_bytes = MODULE_RATIO * stored.allocated_bytes
    grown, names = _grown_modules(stored, predicted, least_bytes, tolerance_ratio)
    drifts, fell = list[MemoryDrift](), False
    for phase in dict.fromkeys((*stored.phase_bytes, *predicted.phase_bytes)):
        from_bytes, to_bytes = stored.phase_bytes.get(phase, 0), predicted.phase_bytes.get(phase, 0)
        fell |= to_bytes < from_bytes * (1 - tolerance_ratio)
        if to_bytes <= from_bytes * (1 + tolerance_ratio):
            continue
        columns = ("state_bytes", f"{phase}_bytes")
        modules = _growth(stored, predicted, names, columns)
        drifts.append(
            MemoryDrift(
                phase=phase,
                whole=True,
                from_bytes=from_bytes,
                to_bytes=to_bytes,
                modules=modules[:_MOST_MODULES],
            )
        )
    phases = {drift.phase for drift in drifts}
    for column, modules in grown.items():
        phase = column.removesuffix("_bytes").replace("state", "states")
        # What is in the line of a whole phase is not said twice.
        if phase in phases or (phase == "states" and phases):
            continue
        drifts += _drifts_of_modules(phase, modules)
    if stored.reserved_bytes is not None and predicted.reserved_bytes is not None:
        grown_bytes = predicted.reserved_bytes - stored.reserved_bytes
        if grown_bytes > max(tolerance_ratio * stored.reserved_bytes, _SEGMENT_BYTES):
            drifts.append(
                MemoryDrift(
                    phase="reserved",
                    whole=True,
                    from_bytes=stored.reserved_bytes,
                    to_bytes=predicted.reserved_bytes,
                )
            )
    return BaselineComparison(
        title=stored.title,
        drifts=tuple(drifts),
        notes=tuple(_notes(stored, predicted, names, tolerance_ratio)),
        fell=fell,
    )


class _Names:
    """Which modules are compared under which name. ``known``: those that the baseline names and that still
    exist; ``new``: those that it does not name and that hold more than 1 % of its peak, plus the tolerance;
    ``gone``: those that it names and that hold nothing any more. All others are small."""

    def __init__(self, stored: MemoryBaseline, predicted: MemoryBaseline, limit_bytes: float) -> None:
        before, now = module_sums(stored.modules), module_sums(predicted.modules)
        listed = before.keys() - {OTHERS}
        self.known = sorted(listed & now.keys())
        self.gone = sorted(listed - now.keys())
        unlisted = now.keys() - listed
        self.new = sorted(m for m in unlisted if max(now[m].values()) > limit_bytes)
        self.small = sorted(unlisted - set(self.new))


def _grown_modules(
    stored: MemoryBaseline, predicted: MemoryBaseline, least_bytes: float, tolerance_ratio: float
) -> tuple[dict[str, list[ModuleGrowth]], _Names]:
    """Return, for each column, the modules that drifted in it, and the names of all modules."""
    names = _Names(stored, predicted, least_bytes * (1 + tolerance_ratio))
    before, now = module_sums(stored.modules), module_sums(predicted.modules)
    grown = dict[str, list[ModuleGrowth]]()

    def has_drifted(from_bytes: int, to_bytes: int) -> bool:
        return to_bytes - from_bytes > tolerance_ratio * max(from_bytes, least_bytes)

    for column in COLUMNS:
        all_modules = {g.module: g for g in _growth(stored, predicted, names, (column,))}
        in_column = [g for g in all_modules.values() if not g.new and has_drifted(g.from_bytes, g.to_bytes)]
        gone_bytes = sum(before[m][column] for m in names.gone)
        if has_drifted(gone_bytes, sum(now[m][column] for m in names.new)):
            in_column += [g for g in all_modules.values() if g.new]
        if in_column:
            grown[column] = sorted(in_column, key=lambda g: g.from_bytes - g.to_bytes)
    return grown, names


def _growth(
    stored: MemoryBaseline, predicted: MemoryBaseline, names: _Names, columns: tuple[str, ...]
) -> tuple[ModuleGrowth, ...]:
    """Return the modules that hold more bytes in these columns together than in the baseline, the largest
    growth first."""
    before, now = module_sums(stored.modules), module_sums(predicted.modules)
    growth = list[ModuleGrowth]()
    for module in (*names.known, *names.new):
        from_bytes = sum(before[module][c] for c in columns) if module in before else 0
        to_bytes = sum(now[module][c] for c in columns)
        line = _grown_line(stored.modules, predicted.modules, module, columns)
        growth.append(
            ModuleGrowth(
                module=module,
                line=line,
                from_bytes=from_bytes,
                to_bytes=to_bytes,
                new=module in names.new,
            )
        )
    others_before = sum(before[OTHERS][c] for c in columns) if OTHERS in before else 0
    others_now = sum(now[m][c] for m in names.small for c in columns)
    growth.append(ModuleGrowth(module=OTHERS, line="", from_bytes=others_before, to_bytes=others_now))
    growing = (g for g in growth if g.to_bytes > g.from_bytes)
    return tuple(sorted(growing, key=lambda g: (g.from_bytes - g.to_bytes, g.module)))


def _grown_line(
    stored: Iterable[ModuleMemory],
    predicted: Iterable[ModuleMemory],
    module: str,
    columns: tuple[str, ...],
) -> str:
    """Return the line of ``module`` that grew most in these columns: lines are the same if their file and
    text are. Return "" if no line is known."""

    def by_code(rows: Iterable[ModuleMemory]) -> Counter[tuple[str, str]]:
        sizes = Counter[tuple[str, str]]()
        for row in rows:
            if row.module == module and row.line:
                sizes[row.file, row.code] += sum(getattr(row, column) for column in columns)
        return sizes

    before, now = by_code(stored), by_code(predicted)
    place = max(now, key=lambda key: (now[key] - before[key], key), default=None)
    return next((r.line for r in predicted if r.module == module and (r.file, r.code) == place), "")


def _drifts_of_modules(phase: str, modules: Iterable[ModuleGrowth]) -> Iterator[MemoryDrift]:
    for module in modules:
        yield MemoryDrift(
            phase=phase,
            whole=False,
            from_bytes=module.from_bytes,
            to_bytes=module.to_bytes,
            modules=(module,),
        )


def _notes(
    stored: MemoryBaseline, predicted: MemoryBaseline, names: _Names, tolerance_ratio: float
) -> Iterator[str]:
    if (stored.torch, stored.memfit) != (predicted.torch, predicted.memfit):
        yield (
            f"the baseline was written by torch {stored.torch} and memfit {stored.memfit}; this is torch "
            f"{predicted.torch} and memfit {predicted.memfit}"
        )
    if stored.plan_label != predicted.plan_label:
        yield f"the plan was {stored.plan_label}; it is {predicted.plan_label}"
    if stored.parameter_count != predicted.parameter_count:
        yield f"the model had {stored.parameter_count:,} parameters; it has {predicted.parameter_count:,}"
    for what, modules in (("new modules", names.new), ("modules that are gone", names.gone)):
        if modules:
            yield f"{what}: {', '.join(map(module_name, modules))}"
    for phase, from_bytes in stored.phase_bytes.items():
        to_bytes = predicted.phase_bytes.get(phase, 0)
        if to_bytes < from_bytes * (1 - tolerance_ratio):
            yield f"{phase} takes less: {change_text(from_bytes, to_bytes)}"


# -- texts ----------------------------------------------------------------------------------------


def drift_text(drift: MemoryDrift) -> str:
    """Return the drift in one line: "forward: 1.2 GiB -> 1.3 GiB (+8.3 %); encoder +100 MiB
    (model.py:12)"."""
    change = change_text(drift.from_bytes, drift.to_bytes)
    if not drift.whole:
        module = drift.modules[0]
        place = f", {module.line}" if module.line else ""
        new = "new module " if module.new else ""
        return f"{drift.phase} of {new}{module_name(module.module)}{place}: {change}"
    grown = ", ".join(map(_growth_text, drift.modules))
    what = "reserved memory" if drift.phase == "reserved" else drift.phase
    return f"{what}: {change}{f'; {grown}' if grown else ''}"


def _growth_text(growth: ModuleGrowth) -> str:
    place = f" ({growth.line})" if growth.line else ""
    new = "new module " if growth.new else ""
    return f"{new}{module_name(growth.module)} +{format_bytes(growth.to_bytes - growth.from_bytes)}{place}"


def change_text(from_bytes: int, to_bytes: int) -> str:
    """Return "1.2 GiB -> 1.3 GiB (+8.3 %)"; without the percentage if ``from_bytes`` is 0."""
    percent = f" ({100 * (to_bytes / from_bytes - 1):+.1f} %)" if from_bytes else ""
    return f"{format_bytes(from_bytes)} -> {format_bytes(to_bytes)}{percent}"


def module_name(module: str) -> str:
    """Return the name of a module for messages."""
    return {ROOT: "the model itself", OTHERS: "modules of less than 1 % each"}.get(module, module)
