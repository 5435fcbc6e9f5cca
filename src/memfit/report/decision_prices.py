"""Prices and watts of the compared machines, each with the catalog row it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memfit import catalog
from memfit.catalog.prices import SellerPrice, seller_prices, server_usd
from memfit.report.decision_rows import PriceRow, money_figure, way_name
from memfit.report.provenance import machine_anchor, term_anchor, way_anchor
from memfit.report.quantities import Sentence, assumed, predicted
from memfit.types.decision import Alternative, Decision
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact


def price_rows(decision: Decision) -> Iterator[PriceRow]:
    """Yield the prices and then the watts of the options that the page's table shows, in its order; an option
    with the same kind (existing, purchase or cloud), machine and origin (the catalog or the user) as an
    earlier one is skipped, and so is doing nothing.

    Of a price of the catalog, each seller has a row: first those of the kind that is used, then the others,
    which are only shown. A price is yielded only if it is known. Rented machines have no row of watts,
    because their price includes electricity; existing machines have no price.
    """
    priced_keys = set()
    for index in dict.fromkeys(index for _, index in decision.slots):
        way = decision.ways[index]
        key = way.kind, way.machine, way.of_catalog
        if way.kind != "nothing" and key not in priced_keys:
            yield from _of(decision, index, way)
        priced_keys.add(key)


def _of(decision: Decision, index: int, way: Alternative) -> Iterator[PriceRow]:
    device = _device(way.machine)
    name, terms = way_name(way), {t.name: t for t in decision.numbers}
    offer = terms.get({"purchase": "purchase_price", "cloud": "rental_price"}.get(way.kind, ""))
    if offer is not None and not way.of_catalog:
        value = money_figure(decision, offer.value, term_anchor(offer.name))
        what = "own_rent" if way.kind == "cloud" else "own_price"
        yield PriceRow(name=name, what=what, value=value, kind="", source=offer.source, date=offer.date)
    elif device is not None and way.kind == "cloud":
        yield from (_seller(name, "rent", price, way.machine) for price in seller_prices(device.name, "rent"))
    elif device is not None and way.kind == "purchase":
        yield from (
            _seller(name, "device", price, way.machine) for price in seller_prices(device.name, "buy")
        )
        server = server_usd(catalog.host_of(device.name))
        if server is not None:
            yield _price(name, "server", server, way.machine)
    if way.kind != "cloud":  # a rental price includes electricity
        yield _watts(name, index, way, device)


def _seller(name: Sentence, what: str, price: SellerPrice, machine: str) -> PriceRow:
    row = _price(name, what, price.usd, machine)
    return dataclasses.replace(
        row, kind=price.kind, seller=price.seller, region=price.region, is_used=price.is_used
    )


def _price(name: Sentence, what: str, fact: Fact, machine: str) -> PriceRow:
    return PriceRow(
        name=name,
        what=what,
        value=assumed(fact.value, f"money $ {3 if what == 'rent' else 0}", machine_anchor(machine)),
        kind="",
        source=fact.source,
        date=fact.date,
    )


def _watts(name: Sentence, index: int, way: Alternative, device: Device | None) -> PriceRow:
    fact = None if way.own_power or device is None else device.power_w
    return PriceRow(
        name=name,
        what="watts",
        value=predicted(way.power_w, "W", way_anchor(index)),
        kind="",
        source=fact.source if fact else "your case" if way.power_w else "",
        date=fact.date if fact else "",
    )


def _device(machine: str) -> Device | None:
    try:
        return catalog.machine(machine).device
    except UserError:
        return None
