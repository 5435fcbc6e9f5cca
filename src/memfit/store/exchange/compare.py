"""Compare the records of two PoCs: which quantities are comparable, and why the others are not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from memfit.store.exchange.record import Energy, Part, Shared, Side


class Compared(Part):
    """One quantity of two records, with its value in each, ``a`` and ``b``; None: the record has no value.
    ``against``: the reasons why the values are not comparable, of which a missing value is one; empty if they
    are. ``ratio``: b / a; None if there are reasons, if the values are not numbers, or if ``a`` is 0."""

    quantity: str
    a: float | str | None
    b: float | str | None
    ratio: float | None
    against: Sequence[str]


def compare(a: Shared, b: Shared) -> tuple[Compared, ...]:
    """Return the quantities of two records ``a`` and ``b``, each with the reasons why its values are not
    comparable.

    They are, in this order: peak memory, step time, energy and mean score over the seeds, all of plain
    training ("baseline"); the label of the recommended plan; the same four quantities of that plan; the kind
    of the verdict."""
    same_model = [*_unlike("model", a.model, b.model)]
    same_work = [*same_model, *_unlike("data", a.data, b.data)]
    hardware = [*_unlike("hardware", a.hardware, b.hardware)]
    torch = [*_unlike("software: torch", a.software.get("torch"), b.software.get("torch"))]
    thread_keys = ("threads", "env OMP_NUM_THREADS", "env MKL_NUM_THREADS")
    threads = [
        r for x in thread_keys for r in _unlike(f"software: {x}", a.software.get(x), b.software.get(x))
    ]
    rows = []
    for name in ("baseline", "recommended"):
        side_a, side_b = getattr(a, name), getattr(b, name)
        if name == "recommended":
            rows.append(_row(f"{name}: plan", _label(side_a), _label(side_b), []))
        source = list(_unlike("source of the peaks", side_a.peak_source, side_b.peak_source))
        run_reasons = [
            *same_work,
            # Plans of different effect classes make different claims about the results.
            *_unlike("effect class", side_a.effect, side_b.effect),
            *_unlike("number of ranks", side_a.ranks, side_b.ranks),
            *_unlike("engine", side_a.engine, side_b.engine),
        ]
        rows.append(
            _row(
                f"{name}: peak_bytes",
                side_a.measured_peak_bytes,
                side_b.measured_peak_bytes,
                [*run_reasons, *source, *torch],
            )
        )
        rows.append(
            _row(f"{name}: step_s", side_a.step_s, side_b.step_s, [*run_reasons, *hardware, *torch, *threads])
        )
        rows.append(
            _energy(
                f"{name}: joules", side_a.energy, side_b.energy, [*run_reasons, *hardware, *torch, *threads]
            )
        )
        metric = list(_unlike("metric", (a.metric, a.metric_unit), (b.metric, b.metric_unit)))
        classes = _unlike("effect class", side_a.effect, side_b.effect)
        seeds = list(_unlike("set of seeds", sorted(side_a.metric_by_seed), sorted(side_b.metric_by_seed)))
        scores = [*same_work, *torch, *metric, *seeds, *classes]
        rows.append(_row(f"{name}: {a.metric or 'metric'}", _mean(side_a), _mean(side_b), scores))
    rows.append(_verdicts(a, b, same_work))
    return tuple(rows)


def _verdicts(a: Shared, b: Shared, reasons: list[str]) -> Compared:
    verdict_a, verdict_b = a.verdict, b.verdict
    for name in ("effect", "test", "margin"):
        reasons = [
            *reasons,
            *_unlike(f"verdict's {name}", getattr(verdict_a, name, None), getattr(verdict_b, name, None)),
        ]
    return _row("verdict", verdict_a and verdict_a.kind, verdict_b and verdict_b.kind, reasons)


def _energy(quantity: str, energy_a: Energy | None, energy_b: Energy | None, reasons: list[str]) -> Compared:
    if energy_a is not None and energy_b is not None:
        reasons = [*reasons, *_unlike("energy boundary", energy_a.boundary, energy_b.boundary)]
    return _row(quantity, energy_a and energy_a.joules, energy_b and energy_b.joules, reasons)


def _row(quantity: str, a: Any, b: Any, reasons: Sequence[str]) -> Compared:
    all_reasons = [
        *reasons,
        *(f"{side} has no value" for side, value in (("A", a), ("B", b)) if value is None),
    ]
    comparable = not all_reasons and isinstance(a, int | float) and isinstance(b, int | float) and a
    return Compared(quantity=quantity, a=a, b=b, ratio=b / a if comparable else None, against=all_reasons)


def _unlike(what: str, a: Any, b: Any) -> Iterator[str]:
    """Yield one text for each difference between ``a`` and ``b``: one for each differing key of two mappings
    or field of two pydantic models, otherwise one in all; nothing if they are equal. ``what`` says in the
    texts what is compared: "hardware" gives, for example, "hardware: cores differs: 4 and 8"."""
    if isinstance(a, pydantic.BaseModel):
        a, b = a.model_dump(), b.model_dump()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _unlike(f"{what}: {key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{what} differs: {a!s} and {b!s}"


def _label(side: Side) -> str:
    uses = (
        f"{name}({', '.join(f'{k}={v}' for k, v in sorted(knobs.items()))})" if knobs else name
        for name, knobs in sorted(side.plan.items())
    )
    return " + ".join(uses) or "plain"


def _mean(side: Side) -> float | None:
    scores = list(side.metric_by_seed.values())
    return statistics.mean(scores) if scores else None
