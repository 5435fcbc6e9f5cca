"""How certain the saving is: random draws over the ranges of its inputs, and each input's effect alone."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from memfit.decision.money import sheet
from memfit.types.decision import (
    DRAWS,
    OFFERS,
    OWN,
    PRICE_FACTORS,
    Alternative,
    Amount,
    Swing,
    Term,
    Terms,
)
from memfit.types.result import Interval

_ROUNDING: Final = 1e-9  # relative to the saving: a smaller swing is rounding


def interval(
    best: Alternative, reference: Alternative, terms: Terms, numbers: Sequence[Term], *, draws: int = DRAWS
) -> tuple[Interval, float] | None:
    """Return (interval of what ``best`` saves over ``reference`` in percent; percentage of random draws in
    which it saves anything). Return None if the saving is unknown.

    ``numbers``: the numbers of the decision with their ranges. For each of ``draws`` draws, every number
    with a range is drawn from it. The interval's value is the saving with all numbers at their values. Its
    ends are the 5th and the 95th percentile of the savings of all draws, moved outwards if needed to contain
    the value. A draw in which the saving is unknown counts with the value. If no number has a range, or if
    both options are the same, both ends are the value, and the percentage is 100 or 0.
    """
    import numpy

    saved_at, spans = _saving_function(best, reference, terms, numbers), ranges_of(numbers)
    point = saved_at({})
    if point is None:
        return None
    if not spans or best == reference:
        return Interval.exactly(point), 100.0 * (point > 0)
    columns = [_draw(name, span, draws) for name, span in spans.items()]
    savings = []
    for row in zip(*columns, strict=True):
        sample = {name: float(value) for name, value in zip(spans, row, strict=True)}
        saving = saved_at(sample)
        savings.append(point if saving is None else saving)
    low, high = (float(numpy.percentile(savings, percentile)) for percentile in (5, 95))
    chance = 100.0 * float(numpy.mean([f > 0 for f in savings]))
    return Interval(value=point, low=min(low, point), high=max(high, point)), chance


def _draw(name: str, span: Interval, draws: int) -> Any:
    """Return ``draws`` draws from the triangular distribution over the range ``span`` with its peak at the
    value. The random generator is seeded by ``name``.

    A number's draws thus do not depend on which other numbers are drawn, and lie at the same positions of its
    range in every currency.
    """
    import numpy

    positions = numpy.random.default_rng(zlib.crc32(name.encode())).random(draws)
    width, left, right = span.high - span.low, span.value - span.low, span.high - span.value
    rising = span.low + width * numpy.sqrt(positions * (left / width))
    falling = span.high - width * numpy.sqrt((1 - positions) * (right / width))
    return numpy.where(positions < left / width, rising, falling)


def tornado(
    best: Alternative, reference: Alternative, terms: Terms, numbers: Sequence[Term]
) -> tuple[Swing, ...]:
    """Return, for each number with a range, what ``best`` saves over ``reference`` in percent at both ends of
    the range, with the other numbers at their values; largest difference first.

    Numbers whose effect is only rounding, and those with which the saving is unknown, are left out.
    """
    swings, saved_at = [], _saving_function(best, reference, terms, numbers)
    for name, span in ranges_of(numbers).items():
        low, high = (saved_at({name: end}) for end in (span.low, span.high))
        if low is None or high is None:
            continue
        if abs(high - low) > _ROUNDING * max(100.0, abs(low), abs(high)):
            swings.append(Swing(name=name, low_percent=low, high_percent=high))
    return tuple(sorted(swings, key=lambda s: -abs(s.high_percent - s.low_percent)))


def replace_numbers(terms: Terms, values: Mapping[str, Any]) -> Terms:
    """Return `terms` with the numbers of ``values``, {name: new value}, replaced; money is in the currency of
    the case.

    The two parts of an Amount, in US dollars and in the currency of the case, are scaled by the same factor
    so that their sum is the new value. If the Amount was zero, the new value is in the currency of the case.
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        current = getattr(terms, name)
        if isinstance(current, Amount):
            amount = current.at(terms.per_usd)
            ratio = value / amount if amount else 0.0
            changes[name] = Amount(usd=current.usd * ratio, own=current.own * ratio if amount else value)
        else:
            changes[name] = value
    return dataclasses.replace(terms, **changes)


def ranges_of(numbers: Sequence[Term]) -> dict[str, Interval]:
    """Return {name: range} of those of ``numbers`` that the formulas of an option use and whose low end is
    below the high end.
    """
    fields = {*OWN, *PRICE_FACTORS, *(f.name for f in dataclasses.fields(Terms))}
    return {
        t.name: Interval(value=t.value, low=t.low, high=t.high)
        for t in numbers
        if t.name in fields and t.value is not None and t.low is not None and t.high is not None
        if t.low < t.high
    }


def _saving_function(
    best: Alternative, reference: Alternative, terms: Terms, numbers: Sequence[Term]
) -> Callable[[Mapping[str, float]], float | None]:
    """Return a function from {name of a number: its value} to what ``best`` saves over ``reference`` in
    percent, or None if that is unknown. Numbers that are not named keep their values.
    """
    user_values = {t.name: t.value for t in numbers if t.name in OWN and t.value is not None}
    own_names = {*OWN, *PRICE_FACTORS}
    factors = PRICE_FACTORS[0], PRICE_FACTORS[0 if has_same_price(best, reference) else 1]

    def saved_at(values: Mapping[str, float]) -> float | None:
        moved_terms = replace_numbers(
            terms, {name: value for name, value in values.items() if name not in own_names}
        )
        best_sheet, reference_sheet = (
            sheet(with_draw(way, values, user_values, terms, values.get(name, 1.0)), moved_terms)
            for way, name in zip((best, reference), factors, strict=True)
        )
        return best_sheet.saved_percent(reference_sheet)

    return saved_at


def price_factors(best: Alternative, reference: Alternative) -> tuple[Term, ...]:
    """Return the factors on the catalog's prices of the two options, each of value 1 with the spread between
    sellers as its range. One factor if both have the same price; none for an option without a price of the
    catalog, such as an existing machine or one whose price is the user's.
    """
    ways = (best,) if has_same_price(best, reference) else (best, reference)
    return tuple(
        Term(
            name=name,
            value=1.0,
            unit="factor",
            low=way.price_low_ratio,
            high=way.price_high_ratio,
            source=f"the lowest and the highest of the sellers' prices of {way.machine}, over their median",
        )
        for name, way in zip(PRICE_FACTORS, ways, strict=False)
        if way.priced_device
    )


def has_same_price(one: Alternative, other: Alternative) -> bool:
    """Return whether both options have the same price of the catalog: that of the same device, rented in both
    or bought in both."""
    return bool(one.priced_device) and (one.kind, one.priced_device) == (other.kind, other.priced_device)


def with_draw(
    way: Alternative,
    values: Mapping[str, float],
    own: Mapping[str, float],
    terms: Terms,
    price_factor: float = 1.0,
) -> Alternative:
    """Return the option with the setup hours and prices of one draw. ``values``: {name: drawn value}, perhaps
    not of all numbers; ``own``: {name: value that the user gave}.

    - Setup hours change by the drawn less the given ones, unless the plan is plain training.
    - A price of the catalog is multiplied by ``price_factor``.
    - A price that the user gave becomes the drawn one. It is also multiplied by the factor on the catalog's
      prices in ``terms`` over that in ``values``, so that a draw of this factor has no effect on it when the
      costs are computed.
    """
    changes: dict[str, Any] = {}
    if "setup_hours" in values and not way.plain:
        changes["setup_hours"] = way.setup_hours + values["setup_hours"] - own["setup_hours"]
    for field, name, common in OFFERS:
        amount: Amount | None = getattr(way, field)
        if amount is not None and way.priced_device:
            changes[field] = Amount(usd=amount.usd * price_factor, own=amount.own * price_factor)
        if amount is None or way.of_catalog or name not in own:
            continue
        common_factor = getattr(terms, common)
        price_ratio = values.get(name, own[name]) / own[name] if own[name] else 1.0
        ratio = price_ratio * common_factor / values.get(common, common_factor)
        changes[field] = Amount(usd=amount.usd * ratio, own=amount.own * ratio)
    return dataclasses.replace(way, **changes)
