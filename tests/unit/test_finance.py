"""The catalog of prices: every row has a source, a date and a plausible value; unknown names are refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest

from memfit import catalog
from memfit.catalog import finance
from memfit.types.errors import UserError
from memfit.types.machine import Fact

TEXT = (files("memfit.catalog") / "finance.toml").read_text(encoding="utf-8")
ROOMS = tomllib.loads(TEXT)
SOURCES = ROOMS["sources"]
DATE = re.compile(r"20\d\d(-\d\d(-\d\d)?)?")


def _rows(table: Any, where: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{where}{key}.")
        elif isinstance(value, list) and key != "aliases":
            yield f"{where}{key}", value


ROWS = dict(_rows({room: table for room, table in ROOMS.items() if room != "sources"}))
SANE = {
    r"currencies\..*\.per_usd": (0.5, 2000),
    r"taxes\..*\.ratio": (0, 0.27),
    r"write_off\..*_years": (1, 10),
    r"suppliers\..*\.co2_g_per_kwh": (50, 900),
    r"hosts\..*\.usd_to_buy": (1_000, 1_000_000),
    r"tariffs\.japan-.*\.energy_per_kwh": (10, 45),
    r"tariffs\.japan-.*\.levy_per_kwh": (2, 5),
    r"tariffs\.japan-.*\.basic_per_kw_month": (200, 3_100),
    r"tariffs\.(?!japan).*": (0.01, 40),
    r"sites\..*\.pue_ratio": (1, 1.6),
    r"labour\.japan\.per_hour": (2_000, 15_000),
    r"labour\..*\.per_hour": (10, 200),
    r"effort\..*": (0.01, 40),
    r"defaults\..*(ratio|rate)": (0, 1),
    r"defaults\..*_spread": (0.5, 2),
    r"defaults\.(years|runs_per_year|steps_per_run)": (1, 100_000),
}


@pytest.mark.parametrize("where", ROWS)
def test_every_row_has_a_source_and_lies_in_its_range(where: str) -> None:
    value, key, *bounds = ROWS[where]
    source = SOURCES[key]
    assert len(source["source"]) > 10
    assert DATE.fullmatch(source["date"]), source
    assert source.get("kind", "published") in ("published", "assumed")
    assert ("recalled" in source["source"]) <= (source.get("kind") == "assumed"), source
    assert len(bounds) in (0, 2)
    (least, most) = next(limits for pattern, limits in SANE.items() if re.fullmatch(pattern, where))
    low, high = bounds or (value, value)
    assert least <= low <= value <= high <= most


def test_every_source_is_used() -> None:
    used = {key for _, key, *_ in ROWS.values()}
    assert used == set(SOURCES)


def test_places_hosts_and_currencies_exist_in_the_other_catalog_tables() -> None:
    places = set(catalog.place_names())
    assert set(ROOMS["taxes"]) <= places
    assert set(ROOMS["write_off"]) <= places
    assert set(ROOMS["hosts"]) <= set(catalog.host_names())
    for name in finance.tariff_names():
        one = finance.tariff(name)
        assert one.place in places
        assert one.currency in finance.currency_codes()


def test_supplier_names_and_aliases_are_unique() -> None:
    names = [[name, *row["aliases"]] for name, row in ROOMS["suppliers"].items()]
    flat = [name.lower() for group in names for name in group]
    assert len(flat) == len(set(flat))
    assert finance.supplier_co2("tepco").value == finance.supplier_co2("TEPCO-EP").value == 421
    assert all(row["place"] == "japan" for row in ROOMS["suppliers"].values())


def test_tariffs_printed_with_tax_are_stored_without_it() -> None:
    """The prices are printed with Japan's consumption tax of 10 %."""
    power, light = finance.tariff("japan-low-voltage-power"), finance.tariff("japan-kansai-low-voltage")
    for fact, printed in (
        (power.levy_per_kwh, 4.18),
        (power.basic_per_kw_month, 1155.84),
        (light.energy_per_kwh, 28.59),
    ):
        assert fact is not None
        assert fact.value * 1.1 == pytest.approx(printed, abs=0.01)


def test_catalog_covers_many_currencies_and_suppliers_and_higher_voltage_costs_less() -> None:
    assert len(finance.currency_codes()) >= 12
    assert len(finance.supplier_names()) >= 10
    classes = ("japan-low-voltage", "japan-high-voltage", "japan-special-high-voltage")
    totals = [finance.tariff(name).energy_per_kwh.value for name in classes]
    assert totals == sorted(totals, reverse=True)


def test_currencies_have_unique_symbols_and_yen_and_won_have_no_decimals() -> None:
    money = [finance.currency(code) for code in finance.currency_codes()]
    assert len({one.symbol for one in money}) == len(money)
    assert {one.code for one in money if one.decimals == 0} == {"JPY", "KRW"} & set(finance.currency_codes())
    assert finance.currency("usd").per_usd.value == 1
    assert finance.currency("jpy").symbol == "¥"


def test_place_aliases_give_the_same_tax_and_write_off_years() -> None:
    for name in ("japan", "Japan", "jp"):
        tax = finance.tax_ratio(name)
        assert tax is not None
        assert tax.value == 0.10
    assert finance.tax_ratio("our basement") is None
    assert finance.write_off_years("jp").value == 5
    assert finance.write_off_years("our basement") == finance.write_off_years("world")


def test_host_price_of_a_part_of_a_server_is_that_of_the_whole_server() -> None:
    whole = finance.host_usd("HGX-H100")
    assert whole is not None
    assert finance.host_usd("DGX H100") == finance.host_usd("1/8 of HGX-H100") == whole
    assert finance.host_usd(catalog.host("HGX-H100", 3).name) == whole
    assert finance.host_usd(catalog.host("HGX-H100", 16).name) == whole
    assert finance.host_usd("a box under the desk") is None


def test_the_levy_is_listed_apart_from_the_energy_price_and_is_smaller() -> None:
    one = finance.tariff("Japan high voltage")
    assert one.currency == "JPY"
    assert one.levy_per_kwh is not None
    assert one.levy_per_kwh.value < one.energy_per_kwh.value


@pytest.mark.parametrize("name", finance.default_names())
def test_defaults_are_marked_as_assumed(name: str) -> None:
    assert finance.default(name).kind == "assumed"


@pytest.mark.parametrize(
    ("ask", "wrong", "what"),
    [
        (finance.currency, "YEN", "currency"),
        (finance.tariff, "japan-high", "tariff"),
        (finance.supplier_co2, "Tepko", "electricity supplier"),
        (finance.default, "discount", "default"),
    ],
)
def test_unknown_names_raise_an_error_that_says_what_is_unknown(
    ask: Callable[[str], Fact], wrong: str, what: str
) -> None:
    with pytest.raises(UserError, match=f"unknown {what}: '{wrong}'"):
        ask(wrong)
