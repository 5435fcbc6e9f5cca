"""Whether an operator is called in the same way whatever the size of the batch: a trial of a few samples says
nothing of what happens only in larger batches."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.types.trace import Phase, Trace, base_name

# Operators whose result has a size that depends on values.
_OF_VALUES = ("nonzero", "masked_select", "unique", "repeat_interleave", "index.", "bincount", "_local_")
# Operators that compare with, or select by, a number. Only these are checked after one of `_OF_VALUES`.
_SELECTING = ("topk", "kthvalue", "le.", "lt.", "ge.", "gt.")
# Operators that order samples, or count those before a sample, if they run along the dimension of samples:
# what a number of them decides may not be among a few samples.
_ORDERING = ("sort.", "argsort.", "topk.", "kthvalue.", "cumsum.", "cumprod.", "cummax.", "cummin.")
_RATIO = 1e-6


def size_dependent_operator(traces: Mapping[int, Trace]) -> str:
    """Return the name, such as "topk", of the first forward operator that a larger batch uses in another way;
    "" if there is none. ``traces``: number of samples -> trace of a step with them, for three numbers.

    In the same way means: the operators are the same, in the same order, and sizes of tensors and other
    numeric arguments are constant, or linear in the number of samples or its inverse. After an operator whose
    result has a size that depends on values, such as a masked selection, only numbers that select are
    compared. An operator that orders samples, such as a sort, counts as used in another way, and so does one
    in a loop over samples. If operators differ, one with a number of calls that is not linear in the number
    of samples is named before others.
    """
    sizes = sorted(traces)
    calls = [_forward_calls(traces[n]) for n in sizes]
    names = [[c[0] for c in of_size] for of_size in calls]
    if any(of_size != names[0] for of_size in names):
        counts = [Counter(of_size) for of_size in names]
        changed = [n for n in dict.fromkeys(names[-1]) if not _is_linear(sizes, [c[n] for c in counts])]
        places = itertools.zip_longest(*reversed(names))
        different = next(place for place in places if len(set(place)) > 1)
        return base_name(changed[0] if changed else next(filter(None, different)))
    only_selecting = False
    for same_calls in zip(*calls, strict=True):
        name = same_calls[0][0].removeprefix("aten.")
        if name.startswith(_ORDERING) and len({_ordered_size(c) for c in same_calls}) > 1:
            return base_name(same_calls[0][0])
        selects = name.startswith(_SELECTING)
        if not only_selecting or selects:
            pairs = [_numbers(c[1:], shapes=not only_selecting) for c in same_calls]
            if any(len(p) != len(pairs[0]) for p in pairs) or not all(
                _is_linear(sizes, values) for values in zip(*pairs, strict=True)
            ):
                return base_name(same_calls[0][0])
        only_selecting |= name.startswith(_OF_VALUES)
    return ""


def _forward_calls(trace: Trace) -> list[Any]:
    return [json.loads(op.signature) for op in trace.ops if op.phase is Phase.FORWARD]


def _ordered_size(call: Any) -> int:
    """Return the size of the dimension along which the call of one of `_ORDERING` runs; 1 for a scalar."""
    name, args, kwargs = call
    shape = args[0]["t"][0]
    at = 2 if name.startswith(("aten.topk", "aten.kthvalue")) or ".stable" in name else 1
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    return int(shape[dim]) if shape else 1


def _numbers(value: Any, *, shapes: bool) -> list[float]:
    """Return the numbers in ``value``, the arguments of a call, in order. ``shapes``: whether the shapes of
    tensors are among them."""
    if isinstance(value, bool | int | float):
        return [float(value)]
    if isinstance(value, dict):
        if "t" in value:
            return list(map(float, value["t"][0])) if shapes else []
        return [n for v in value.values() for n in _numbers(v, shapes=shapes)]
    return [n for v in value for n in _numbers(v, shapes=shapes)] if isinstance(value, list) else []


def _is_linear(sizes: Sequence[int], values: Sequence[float]) -> bool:
    """Return whether the three values are constant, or linear in the three sizes or in their inverses. True
    also if a value is NaN."""
    if all(v == values[0] for v in values) or any(map(math.isnan, values)):
        return True
    return any(_on_a_line([f(n) for n in sizes], values) for f in (float, lambda n: 1 / n))


def _on_a_line(xs: Sequence[float], values: Sequence[float]) -> bool:
    slope = (values[1] - values[0]) / (xs[1] - xs[0])
    expected = values[0] + slope * (xs[2] - xs[0])
    return abs(expected - values[2]) <= _RATIO * max(map(abs, values))
