"""Thresholds of the alarms of a watched training, and how they are read from a file or a plan."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from memfit.files.read import read_toml, read_yaml
from memfit.types.errors import UserError, suggest
from memfit.types.parsing import parse_bytes
from memfit.types.units import MIB

SECTION: Final = "watch"  # of a plan file


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLimits:
    """The thresholds of the alarms. A file can change each of them by its name.

    - ``warmup_steps``: recorded steps at the beginning without alarms of the kinds "creep", "fragmentation",
      "retries" and "headroom".
    - ``creep_bytes``: least growth of memory, over 40 or more steps, that counts as creep.
    - ``maximum_after_steps``: number of steps with a peak, from the first on, whose highest peak is the
      reference. There is an alarm about a later peak that is above it by more than ``maximum_ratio`` of it
      and by more than ``maximum_bytes``; this peak is the next reference. The peak of host memory is read
      once a second at most.
    - ``fragmentation_ratio``, ``fragmentation_bytes``: there is an alarm if the peak of reserved memory is
      above the peak of allocated memory by more than this factor and by more than this difference.
    - ``loss_spike_factor``: there is an alarm if a loss is the highest of the last 50 and lies above the
      median of those before it, at least 20, by more than this number of standard deviations (estimated from
      the median absolute deviation).
    - ``headroom_ratio``: least free share of the device's memory.
    - ``slow_rank_ratio``, ``slow_rank_s``: a rank is slow if its time is above the median of the other ranks
      by more than this factor and by more than this number of seconds.
    """

    warmup_steps: int = 10
    creep_bytes: int = 16 * MIB
    maximum_after_steps: int = 50
    maximum_ratio: float = 0.1
    maximum_bytes: int = 64 * MIB
    fragmentation_ratio: float = 1.3
    fragmentation_bytes: int = 512 * MIB
    loss_spike_factor: float = 10.0
    headroom_ratio: float = 0.05
    slow_rank_ratio: float = 1.2
    slow_rank_s: float = 0.01


def limits_of(limits: AlarmLimits | Mapping[str, Any] | str | Path | None) -> AlarmLimits:
    """Return the thresholds that ``limits`` gives: an `AlarmLimits`, which is returned as it is; a mapping of
    names to numbers; a TOML file of them; or a plan file (.yaml, .yml) with them under the key ``watch``.
    Thresholds that are not given have their default, and so have all for None. Names that end in ``_bytes``
    also take a size such as "64MiB". Raises UserError if the file cannot be read, for a plan file without the
    key, for unknown names, for values that are not finite numbers of at least 0, for a number with a fraction
    where the default is a whole number, and for ``limits`` of another type."""
    if limits is None:
        return AlarmLimits()
    if isinstance(limits, AlarmLimits):
        return limits
    if isinstance(limits, Mapping):
        return _parse_limits(limits, "limits")
    if not isinstance(limits, str | os.PathLike):
        raise UserError(
            f"limits is a {type(limits).__name__}",
            allowed="a mapping of names to numbers, a TOML file or plan file with them, AlarmLimits, or None",
        )
    path = Path(limits)
    return _parse_limits(_section(path) if path.suffix in (".yaml", ".yml") else read_toml(path), str(path))


def _section(path: Path) -> Mapping[str, Any]:
    data = read_yaml(path)
    section = data.get(SECTION) if isinstance(data, dict) else None
    if not isinstance(section, dict):
        raise UserError(
            f"the plan file {path} has no thresholds for alarms",
            allowed=f"a mapping of names to numbers under the key {SECTION!r}",
        )
    return section


def _parse_limits(values: Mapping[str, Any], source: str) -> AlarmLimits:
    defaults = {f.name: f.default for f in dataclasses.fields(AlarmLimits)}
    for name in values:
        if name not in defaults:
            raise UserError(
                f"{source}: unknown threshold of alarms {name!r}",
                allowed=", ".join(defaults),
                hint=suggest(str(name), defaults),
            )
    numbers: dict[str, Any] = {n: _number(v, f"{source}: {n}", type(defaults[n])) for n, v in values.items()}
    return AlarmLimits(**numbers)


def _number(value: Any, source_and_name: str, kind: type) -> int | float:
    if isinstance(value, str) and source_and_name.endswith("_bytes"):
        return parse_bytes(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (kind is int and value != int(value)):
        or_size = ', or a size such as "64MiB"' if source_and_name.endswith("_bytes") else ""
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{source_and_name} is {value!r}", allowed=f"{number} of at least 0{or_size}")
    return kind(value)  # type: ignore[no-any-return]
