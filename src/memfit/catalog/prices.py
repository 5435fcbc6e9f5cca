"""Prices of accelerators and of memory by seller, and the one that a decision uses.

A price has a kind, such as on demand or spot. Only prices of one kind are compared with each other: on demand
for rent, street for purchases. The price of a device is the median of its sellers' prices of that kind; its
range goes from the lowest to the highest.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, Final

from memfit.catalog.finance import default, host_usd
from memfit.catalog.tables import table
from memfit.types.machine import Fact

KINDS: Final = ("on_demand", "street", "list", "reserved", "starting", "spot", "quotation")
USED_KIND: Final = {"rent": "on_demand", "buy": "street"}  # kind of price that decisions use, by deal
_SPREAD: Final = {"rent": "rental_spread", "buy": "hardware_spread"}  # range of a price that one seller names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SellerPrice:
    """One seller's price in US dollars without tax. ``deal``: "rent" (one device for an hour) or "buy" (one
    device). ``kind``: one of `KINDS`, such as "on_demand" or "list". ``region``: a country code, or "world".
    """

    device: str
    deal: str
    kind: str
    seller: str
    region: str
    usd: Fact

    @property
    def is_used(self) -> bool:
        """Whether a decision uses prices of this kind; all others are only shown."""
        return self.kind == USED_KIND[self.deal]


def seller_prices(device: str, deal: str) -> tuple[SellerPrice, ...]:
    """Return all prices of a device for a ``deal``, "rent" or "buy", in the order of the file; those that a
    decision uses come first. ``device``: its exact name in the catalog; for any other the result is empty.
    """
    prices = (_price(device, deal, row) for row in table("prices.toml")[deal].get(device, ()))
    return tuple(sorted(prices, key=lambda price: not price.is_used))


def _price(device: str, deal: str, row: dict[str, Any]) -> SellerPrice:
    return SellerPrice(
        device=device,
        deal=deal,
        kind=row["kind"],
        seller=row["seller"],
        region=row["region"],
        usd=_fact(row),
    )


def typical_price(device: str, deal: str, *, without: SellerPrice | None = None) -> Fact | None:
    """Return the price of a device that decisions use, in US dollars: the median of its sellers' prices of
    the used kind, with the lowest and highest as its range. None if no seller has a price of that kind.

    If there is only one such price and it has no range, its range is the catalog's assumed one. ``without``:
    a price that is left out. The date is that of the oldest price.
    """
    used = [price for price in seller_prices(device, deal) if price.is_used and price != without]
    return median_price(used, _SPREAD[deal]) if used else None


def median_price(prices: Sequence[SellerPrice], spread: str = "hardware_spread") -> Fact:
    """Return the median of the ``prices``, of which there must be at least one, with the lowest and highest
    as its range. It is marked as assumed if one of them is.

    A single price without a range gets an assumed one: the price times the low and the high ratio of the
    catalog's default called ``spread``.
    """
    value = statistics.median(price.usd.value for price in prices)
    low = min(price.usd.bounds[0] for price in prices)
    high = max(price.usd.bounds[1] for price in prices)
    names = ", ".join(f"{price.seller} {price.usd.value:g}" for price in prices)
    if len(prices) == 1:
        source = f"{prices[0].seller}, the only seller: {prices[0].usd.source}"
        if low == high:
            ratio = default(spread)
            low, high = value * (ratio.low or 1.0), value * (ratio.high or 1.0)
            source = f"{source}; its range is assumed"
    else:
        source = f"median of {len(prices)} sellers: {names}"
    return Fact(
        value=value,
        low=low,
        high=high,
        source=source,
        date=min(price.usd.date for price in prices),
        kind="assumed" if any(price.usd.kind == "assumed" for price in prices) else "published",
    )


def memory_usd_per_gb(year: str = "now") -> Fact:
    """Return the price of one GB of DDR5 in US dollars, the median of its sellers. ``year``: "now", or "then"
    for the year of the catalog's prices of servers, before the shortage of 2026; any other raises KeyError.
    """
    return median_price([_price("DDR5", "buy", row) for row in table("prices.toml")["memory"][year]])


def server_usd(host: str) -> Fact | None:
    """Return the price in US dollars of a whole server of the catalog without its accelerators, with its
    memory at today's price. None if the catalog has no price of it. ``host``: its exact name in the catalog.

    The catalog's prices of servers are older than the shortage of memory in 2026. For each GB of the server's
    memory, the rise of the price of desktop DDR5 since then is added. If the size of the memory is unknown,
    nothing is added.
    """
    old, row = host_usd(host), table("hosts.toml")["hosts"].get(host, {})
    if old is None or "memory_bytes" not in row:
        return old
    now, then = memory_usd_per_gb("now"), memory_usd_per_gb("then")
    (old_low, old_high), (now_low, now_high), (then_low, then_high) = (f.bounds for f in (old, now, then))
    gb = row["memory_bytes"][0] / 1e9
    return Fact(
        value=old.value + gb * (now.value - then.value),
        low=old_low + gb * (now_low - then_high),
        high=old_high + gb * (now_high - then_low),
        source=f"{old.source}, {old.value:,.0f} USD; its {gb:g} GB of memory at {now.value:.4g} instead of "
        f"{then.value:.4g} USD per GB, desktop DDR5 standing in ({now.source})",
        date=now.date,
        kind="assumed",
    )


def _fact(row: dict[str, Any]) -> Fact:
    low, high = row.get("low"), row.get("high")
    return Fact(
        value=float(row["usd"]),
        low=None if low is None else float(low),
        high=None if high is None else float(high),
        **table("prices.toml")["sources"][row["source"]],
    )
