"""What money needs: currencies, taxes, tariffs, suppliers, lives and prices of servers, and defaults.

Prices are without tax. Every number is a row of finance.toml with a source and a date.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from memfit.catalog.tables import fact, facts, find, table
from memfit.types.errors import UserError
from memfit.types.machine import Fact

PRICE_KINDS: Final = {  # what a source calls its price
    "spot": ("spot",),
    "starting": ("starting price",),
    "reserved": ("active worker",),
    "launch": ("launch price",),
    "street": ("street price",),
    "named": ("named by", "quotation", "quotes"),
    "list": ("list price",),
    "on_demand": ("on demand", "on-demand", "Secure Cloud"),
}
_PART: Final = re.compile(r"^\d+/\d+ of | with \d+ devices$")  # what catalog.host says of a part


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Currency:
    """``per_usd``: how many of it a US dollar buys. ``decimals``: of its smallest coin."""

    code: str  # ISO 4217
    symbol: str
    decimals: int
    per_usd: Fact


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """Prices of electricity without consumption tax, in `currency`."""

    name: str
    place: str
    currency: str
    energy_per_kwh: Fact
    levy_per_kwh: Fact | None = None  # on top of the energy
    basic_per_kw_month: Fact | None = None  # of contracted power


def currency_codes() -> tuple[str, ...]:
    return tuple(_rows("currencies"))


def tariff_names() -> tuple[str, ...]:
    return tuple(_rows("tariffs"))


def supplier_names() -> tuple[str, ...]:
    return tuple(_rows("suppliers"))


def default_names() -> tuple[str, ...]:
    return tuple(_rows("defaults"))


def currency(code: str) -> Currency:
    """``"JPY"``, in any case. Raises UserError with the codes there are."""
    known = find(code, what="currency", rows=_rows("currencies"))
    row = _rows("currencies")[known]
    rate = fact(row["per_usd"], _sources())
    return Currency(code=known, symbol=row["symbol"], decimals=row["decimals"], per_usd=rate)


def tax_ratio(place: str) -> Fact | None:
    """Consumption or value-added tax on what is bought there, over the price; None where no row says."""
    row = _rows("taxes").get(_place(place))
    return fact(row["ratio"], _sources()) if row else None


def write_off_years(place: str, computer: str = "server") -> Fact:
    """Years in which a ``"server"`` or a ``"pc"`` is written off there; the world's where no row says."""
    rows = _rows("write_off")
    row = rows.get(_place(place), rows["world"])
    return fact(row[f"{computer}_years"], _sources())


def tariff(name: str) -> Tariff:
    """For example ``"japan-high-voltage"``. Raises UserError with the closest names."""
    known = find(name, what="tariff", rows=_rows("tariffs"))
    row = _rows("tariffs")[known]
    prices = facts(row, _sources(), ("energy_per_kwh", "levy_per_kwh", "basic_per_kw_month"))
    return Tariff(name=known, place=row["place"], currency=row["currency"], **prices)


def supplier_place(name: str) -> str:
    known = find(name, what="electricity supplier", rows=_rows("suppliers"))
    place: str = _rows("suppliers")[known]["place"]
    return place


def supplier_co2(name: str) -> Fact:
    """Grams of CO2 per kWh that a supplier sells. Raises UserError with the closest names."""
    known = find(name, what="electricity supplier", rows=_rows("suppliers"))
    return fact(_rows("suppliers")[known]["co2_g_per_kwh"], _sources())


def host_usd(name: str) -> Fact | None:
    """US dollars for a whole server of the catalog without its accelerators, also where `name` is a part of
    it (``"1/8 of HGX-H100"``); None where no row says."""
    try:
        known = find(_PART.sub("", name), what="host", rows=table("hosts.toml")["hosts"])
    except UserError:
        return None
    row = _rows("hosts").get(known)
    return fact(row["usd_to_buy"], _sources()) if row else None


def price_kind(source: str) -> str:
    """What sort of price a source tells, a key of `PRICE_KINDS`; "" where it does not say."""
    return next((kind for kind, names in PRICE_KINDS.items() if any(n in source for n in names)), "")


def default(name: str) -> Fact:
    """What stands in until the user says better, for example ``"discount_rate"``. Raises UserError."""
    known = find(name, what="default", rows={key: {} for key in default_names()})
    return fact(_rows("defaults")[known], _sources())


def _place(name: str) -> str:
    """The catalog's name of it; a user's own place has no other."""
    try:
        return find(name, what="place", rows=table("places.toml")["places"])
    except UserError:
        return name


def _rows(room: str) -> dict[str, Any]:
    rows: dict[str, Any] = table("finance.toml")[room]
    return rows


def _sources() -> dict[str, dict[str, str]]:
    sources: dict[str, dict[str, str]] = table("finance.toml")["sources"]
    return sources
