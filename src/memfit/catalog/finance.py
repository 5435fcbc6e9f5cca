"""Facts for costs: currencies, taxes, tariffs, suppliers, lifetimes and prices of servers, and defaults.

Prices are without tax. Every number is a row of finance.toml with a source and a date.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from memfit.catalog.tables import fact, facts, find, table
from memfit.types.errors import UserError
from memfit.types.machine import Fact

# suffixes and prefixes that catalog.host adds to the name of a part
_PART: Final = re.compile(r"^\d+/\d+ of | with \d+ devices$")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Currency:
    """A currency. ``code``: ISO 4217. ``per_usd``: how many of it buy one US dollar. ``decimals``: number of
    decimal places of an amount, such as 2 for USD and 0 for JPY.
    """

    code: str
    symbol: str
    decimals: int
    per_usd: Fact


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """Prices of electricity in ``currency``, without consumption tax. ``energy_per_kwh``: per kWh.
    ``levy_per_kwh``: added to that, None if there is none. ``basic_per_kw_month``: per month and kW of
    contracted power, None if there is none.
    """

    name: str
    place: str
    currency: str
    energy_per_kwh: Fact
    levy_per_kwh: Fact | None = None
    basic_per_kw_month: Fact | None = None


def currency_codes() -> tuple[str, ...]:
    """Return the ISO codes of all currencies of the catalog, such as "USD", in the order of its file."""
    return tuple(_rows("currencies"))


def tariff_names() -> tuple[str, ...]:
    """Return the names of all electricity tariffs of the catalog, such as "japan-high-voltage", in the order
    of its file.
    """
    return tuple(_rows("tariffs"))


def supplier_names() -> tuple[str, ...]:
    """Return the names of all electricity suppliers of the catalog, such as "TEPCO-EP", in the order of its
    file.
    """
    return tuple(_rows("suppliers"))


def default_names() -> tuple[str, ...]:
    """Return the names of the figures for which the catalog has a default, such as "discount_rate", in the
    order of its file.
    """
    return tuple(_rows("defaults"))


def currency(code: str) -> Currency:
    """Return a currency of the catalog by its ISO code, such as ``"JPY"`` or ``"jpy"``.

    Raises UserError for an unknown code, with the closest codes, if any, and all known codes.
    """
    catalog_code = find(code, what="currency", rows=_rows("currencies"))
    row = _rows("currencies")[catalog_code]
    rate = fact(row["per_usd"], _sources())
    return Currency(code=catalog_code, symbol=row["symbol"], decimals=row["decimals"], per_usd=rate)


def tax_ratio(place: str) -> Fact | None:
    """Return the consumption or value-added tax on purchases in ``place``, as a share of the price without
    tax, such as 0.1 for "japan". None if the place or its tax is unknown.
    """
    row = _rows("taxes").get(_place(place))
    return fact(row["ratio"], _sources()) if row else None


def write_off_years(place: str) -> Fact:
    """Return the number of years over which a server is written off in ``place``. For a place for which the
    catalog has no number, it is that of "world".
    """
    rows = _rows("write_off")
    return fact(rows.get(_place(place), rows["world"])["server_years"], _sources())


def tariff(name: str) -> Tariff:
    """Return an electricity tariff of the catalog, for example ``"japan-high-voltage"``.

    Raises UserError for an unknown name, with the closest names, if any, and all known names.
    """
    catalog_name = find(name, what="tariff", rows=_rows("tariffs"))
    row = _rows("tariffs")[catalog_name]
    prices = facts(row, _sources(), ("energy_per_kwh", "levy_per_kwh", "basic_per_kw_month"))
    return Tariff(name=catalog_name, place=row["place"], currency=row["currency"], **prices)


def supplier_place(name: str) -> str:
    """Return the name of the place that an electricity supplier of the catalog serves, such as ``"japan"``
    for "TEPCO-EP".

    Raises UserError for an unknown supplier, with the closest names, if any, and all known names.
    """
    catalog_name = find(name, what="electricity supplier", rows=_rows("suppliers"))
    place: str = _rows("suppliers")[catalog_name]["place"]
    return place


def supplier_co2(name: str) -> Fact:
    """Return the grams of CO2 per kWh of an electricity supplier of the catalog.

    Raises UserError for an unknown supplier, with the closest names, if any, and all known names.
    """
    catalog_name = find(name, what="electricity supplier", rows=_rows("suppliers"))
    return fact(_rows("suppliers")[catalog_name]["co2_g_per_kwh"], _sources())


def site_pue(name: str) -> Fact:
    """Return the PUE (electricity of the whole site over that of its computers) of the site ``name``, "desk"
    or "cloud"; any other raises KeyError. The PUE of a server room is that of its place, see `catalog.place`.
    """
    return fact(_rows("sites")[name]["pue_ratio"], _sources())


def labour_cost(place: str) -> tuple[Fact, str]:
    """Return (what an hour of a research engineer costs the employer, code of its currency) in ``place``; for
    a place for which the catalog has no number, that of "world".
    """
    row = _rows("labour").get(_place(place), _rows("labour")["world"])
    return fact(row["per_hour"], _sources()), row["currency"]


def host_usd(name: str) -> Fact | None:
    """Return the price in US dollars of a whole server of the catalog without its accelerators, as of the
    date of its source (`prices.server_usd` has it with memory at today's price). None if the catalog has no
    such server or no price of it.

    ``name`` may also be that of a part of the server, such as ``"1/8 of HGX-H100"``; the price is still that
    of the whole server.
    """
    try:
        catalog_name = find(_PART.sub("", name), what="host", rows=table("hosts.toml")["hosts"])
    except UserError:
        return None
    row = _rows("hosts").get(catalog_name)
    return fact(row["usd_to_buy"], _sources()) if row else None


def default(name: str) -> Fact:
    """Return the value of a figure, for example ``"discount_rate"``, that is used if the user gives none.

    Raises UserError if the catalog has no default of that name, with the closest names, if any, and all known
    names.
    """
    catalog_name = find(name, what="default", rows={key: {} for key in default_names()})
    return fact(_rows("defaults")[catalog_name], _sources())


def _place(name: str) -> str:
    """Return the catalog's spelling of the place's name, or ``name`` as it is if the catalog does not have
    the place.
    """
    try:
        return find(name, what="place", rows=table("places.toml")["places"])
    except UserError:
        return name


def _rows(table_name: str) -> dict[str, Any]:
    rows: dict[str, Any] = table("finance.toml")[table_name]
    return rows


def _sources() -> dict[str, dict[str, str]]:
    sources: dict[str, dict[str, str]] = table("finance.toml")["sources"]
    return sources
