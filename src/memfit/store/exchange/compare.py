"""Compare two records: find which quantities are comparable, and why the others are not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from memfit.store.exchange.record import Energy, Part, Shared, Side


class Compared(Part):
    """One quantity of both records. ``against``: the reasons why its values are not comparable; ``ratio``: b
    / a if there are none."""

    quantity: str
    a: float | str | None
    b: float | str | None
    ratio: float | None
    against: Sequence[str]


def compare(a: Shared, b: Shared) -> tuple[Compared, ...]:
    """Return all quantities of two PoCs, each with the reasons why its values are not comparable."""
    same_model = [*_unlike("model", a.model, b.model)]
    same_work = [*same_model, *_unlike("data", a.data, b.data)]
    where = [*_unlike("hardware", a.hardware, b.hardware)]
    torch = [*_unlike("software: torch", a.software.get("torch"), b.software.get("torch"))]
    limits = ("threads", "env OMP_NUM_THREADS", "env MKL_NUM_THREADS")
    threads = [r for x in limits for r in _unlike(f"software: {x}", a.software.get(x), b.software.get(x))]
    found = []
    for name in ("baseline", "recommended"):
        one, other = getattr(a, name), getattr(b, name)
        if name == "recommended":
            found.append(_row(f"{name}: plan", _label(one), _label(other), []))
        source = list(_unlike("how peaks were measured", one.peak_source, other.peak_source))
        run = [
            *same_work,
            # Plans of different effect classes make different claims about the results.
            *_unlike("effect class", one.effect, other.effect),
            *_unlike("ranks", one.ranks, other.ranks),
            *_unlike("engine", one.engine, other.engine),
        ]
        found.append(
            _row(
                f"{name}: peak_bytes",
                one.measured_peak_bytes,
                other.measured_peak_bytes,
                [*run, *source, *torch],
            )
        )
        found.append(_row(f"{name}: step_s", one.step_s, other.step_s, [*run, *where, *torch, *threads]))
        found.append(_energy(f"{name}: joules", one.energy, other.energy, [*run, *where, *torch, *threads]))
        metric = list(_unlike("metric", (a.metric, a.metric_unit), (b.metric, b.metric_unit)))
        classes = _unlike("effect class", one.effect, other.effect)
        seeds = list(_unlike("seeds", sorted(one.metric_by_seed), sorted(other.metric_by_seed)))
        scores = [*same_work, *torch, *metric, *seeds, *classes]
        found.append(_row(f"{name}: {a.metric or 'metric'}", _mean(one), _mean(other), scores))
    found.append(_verdicts(a, b, same_work))
    return tuple(found)


def _verdicts(a: Shared, b: Shared, against: list[str]) -> Compared:
    one, other = a.verdict, b.verdict
    for name in ("effect", "test", "margin"):
        against = [
            *against,
            *_unlike(f"verdict's {name}", getattr(one, name, None), getattr(other, name, None)),
        ]
    return _row("verdict", one and one.kind, other and other.kind, against)


def _energy(quantity: str, one: Energy | None, other: Energy | None, against: list[str]) -> Compared:
    if one is not None and other is not None:
        against = [*against, *_unlike("energy boundary", one.boundary, other.boundary)]
    return _row(quantity, one and one.joules, other and other.joules, against)


def _row(quantity: str, a: Any, b: Any, against: Sequence[str]) -> Compared:
    why = [*against, *(f"{side} has none" for side, value in (("A", a), ("B", b)) if value is None)]
    numbers = not why and isinstance(a, int | float) and isinstance(b, int | float) and a
    return Compared(quantity=quantity, a=a, b=b, ratio=b / a if numbers else None, against=why)


def _unlike(what: str, a: Any, b: Any) -> Iterator[str]:
    """Yield how ``a`` and ``b`` differ; nothing if they are equal."""
    if isinstance(a, pydantic.BaseModel):
        a, b = a.model_dump(), b.model_dump()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _unlike(f"{what}: {key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{what} {a!s} and {b!s}"


def _label(side: Side) -> str:
    named = (
        f"{name}({', '.join(f'{k}={v}' for k, v in sorted(knobs.items()))})" if knobs else name
        for name, knobs in sorted(side.plan.items())
    )
    return " + ".join(named) or "plain"


def _mean(side: Side) -> float | None:
    scores = list(side.metric_by_seed.values())
    return statistics.mean(scores) if scores else None
