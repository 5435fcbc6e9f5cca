"""The predicted memory with which a watched training is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from memfit.files.read import read_json
from memfit.types.errors import UserError
from memfit.types.result import Interval

# What is predicted -> the field of WatchStep with which it is compared.
MEASURED_AS: Final = {
    "allocated_bytes": "peak_allocated_bytes",
    "reserved_bytes": "peak_reserved_bytes",
    "device_bytes": "device_bytes",
    "host_bytes": "peak_host_bytes",
}
QUANTITIES: Final = tuple(MEASURED_AS)
_ALLOWED: Final = (
    "a prediction of memfit.estimate, or the JSON of `memfit estimate` or `memfit plan` with --json, or a "
    f"mapping of {', '.join(QUANTITIES)} to a number or to value, low and high"
)
_BYTES: Final = 'bytes: a number of at least 0, or {"value": V, "low": L, "high": H} with L <= V <= H'


def predicted_intervals(prediction: Any) -> dict[str, Interval]:
    """Return the predicted memory by name, of those of `QUANTITIES` that were predicted. ``prediction``: what
    `memfit.estimate` returns, an Estimate, a file with the JSON output of a command, a mapping of names to
    numbers or intervals, or None, for which the result is empty. Raises UserError for anything else, if the
    file cannot be read, if a number is negative or not finite, and if nothing of `QUANTITIES` is in it or was
    predicted."""
    if prediction is None:
        return {}
    if isinstance(prediction, str | Path):
        return _of_file(Path(prediction))
    if isinstance(prediction, Mapping):
        return _of_mapping(prediction, "the prediction")
    values = {name: getattr(prediction, name, None) for name in QUANTITIES}
    intervals = {name: v for name, v in values.items() if isinstance(v, Interval)}
    if not intervals:
        raise UserError(f"the prediction is a {type(prediction).__name__}", allowed=_ALLOWED)
    return intervals


def _of_file(path: Path) -> dict[str, Interval]:
    data = read_json(path)
    while isinstance(data, dict) and not data.keys() & set(QUANTITIES):
        data = next((data[key] for key in ("estimate", "prediction", "recommended") if key in data), None)
    if not isinstance(data, dict):
        raise UserError(f"the file {path}, given as a prediction, has no predicted memory", allowed=_ALLOWED)
    return _of_mapping(data, str(path))


def _of_mapping(values: Mapping[str, Any], source: str) -> dict[str, Interval]:
    intervals = {}
    for name in QUANTITIES:
        value = values.get(name)
        try:
            if isinstance(value, Interval):
                intervals[name] = value
            elif isinstance(value, Mapping):
                number = float(value["value"])
                low, high = float(value.get("low", number)), float(value.get("high", number))
                intervals[name] = Interval(value=number, low=low, high=high)
            elif value is not None:
                intervals[name] = Interval.exactly(float(value))
            if name in intervals and not 0 <= intervals[name].low <= intervals[name].high < math.inf:
                raise ValueError
        except (TypeError, ValueError, OverflowError, KeyError, AssertionError) as error:
            raise UserError(f"{source}: {name} is {value!r}", allowed=_BYTES) from error
    if not intervals:
        raise UserError(f"{source} has no predicted memory", allowed=_ALLOWED)
    return intervals
