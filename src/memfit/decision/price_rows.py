"""What the saving would be if any one of the catalog's prices were left out.

Removing a price changes the median of its device, or leaves the device without a price. Another machine may
then be the best one or the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from memfit.catalog.prices import SellerPrice, seller_prices, typical_price
from memfit.decision.money import best_and_reference, sheet
from memfit.types.decision import Alternative, Amount, CostSheet, Terms
from memfit.types.result import Interval

_DEALS: Final = {"purchase": "buy", "cloud": "rent"}


def saving_without_a_price(
    ways: Sequence[Alternative], sheets: Sequence[CostSheet], terms: Terms
) -> Interval | None:
    """Return the lowest and the highest saving of the best option over the reference, in percent, if any one
    of the catalog's prices that a decision uses is left out; its value is the saving with all of them. None
    if that is unknown, or if no price counts.

    A price without which there is no best option or no reference, or the saving is unknown, does not count.
    """
    point = _saving(ways, sheets)
    used_prices = (
        price
        for way in ways
        if way.priced_device
        for price in seller_prices(way.priced_device, _DEALS[way.kind])
        if price.is_used
    )
    savings = [
        saving
        for price in dict.fromkeys(used_prices)
        if (saving := _saving_without(price, ways, sheets, terms)) is not None
    ]
    if point is None or not savings:
        return None
    return Interval(value=point, low=min(point, *savings), high=max(point, *savings))


def _saving(ways: Sequence[Alternative], sheets: Sequence[CostSheet]) -> float | None:
    best, reference = best_and_reference(ways, sheets)
    return None if best is None or reference is None else sheets[best].saved_percent(sheets[reference])


def _saving_without(
    price: SellerPrice, ways: Sequence[Alternative], sheets: Sequence[CostSheet], terms: Terms
) -> float | None:
    changed = [_without(price, way) for way in ways]
    kept = [
        (way, costs if way is old else sheet(way, terms))
        for old, way, costs in zip(ways, changed, sheets, strict=True)
        if way is not None
    ]
    return _saving([way for way, _ in kept], [costs for _, costs in kept])


def _without(price: SellerPrice, way: Alternative) -> Alternative | None:
    """Return the option with the catalog's price of its device without ``price``; the same object if that is
    not its price, None if no price is left.
    """
    if way.priced_device != price.device or _DEALS[way.kind] != price.deal:
        return way
    before, after = (typical_price(price.device, price.deal, without=one) for one in (None, price))
    if after is None or before is None:
        return None
    more = Amount(usd=(after.value - before.value) * way.device_count)
    return dataclasses.replace(way, price=_plus(way.price, more), per_hour=_plus(way.per_hour, more))


def _plus(amount: Amount | None, more: Amount) -> Amount | None:
    return None if amount is None else Amount(usd=amount.usd + more.usd, own=amount.own)
