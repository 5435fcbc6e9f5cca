"""Prices by seller, embodied carbon by method, PUE by site."""

from __future__ import annotations

import re
import statistics

import pytest

from memfit import catalog
from memfit.catalog import embodied, finance, prices, tables

TABLE = tables.table("prices.toml")
TEN = 10


def test_each_price_has_a_kind_a_region_a_seller_and_a_dated_source() -> None:
    for deal in ("rent", "buy"):
        for device in TABLE[deal]:
            assert device in catalog.device_names()
            found = prices.seller_prices(device, deal)
            assert len({(price.seller, price.kind) for price in found}) == len(found), "a seller counts once"
            for price in found:
                assert price.kind in prices.KINDS
                assert re.fullmatch(r"[a-z]{2}|world", price.region)
                assert price.seller
                assert price.usd.source
                assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", price.usd.date)
                assert price.usd.value > 0


def test_ten_devices_have_two_sellers_of_the_used_kind_in_2026() -> None:
    def sellers(device: str) -> int:
        found = prices.seller_prices(device, "rent")
        return sum(price.is_used and price.usd.date.startswith("2026") for price in found)

    assert sum(sellers(device) >= 2 for device in TABLE["rent"]) >= TEN


def test_the_price_of_a_device_is_the_median_of_the_sellers_of_one_kind() -> None:
    used = [price.usd.value for price in prices.seller_prices("H100-SXM", "rent") if price.is_used]
    fact = catalog.device("H100-SXM").usd_per_hour
    assert fact is not None
    assert (fact.value, fact.low, fact.high) == (statistics.median(used), min(used), max(used))
    assert "Lambda" in fact.source


@pytest.mark.parametrize("device", ["V100-32GB-PCIe", "RTX-4080"])
def test_a_starting_price_is_never_the_price_of_a_device(device: str) -> None:
    assert prices.seller_prices(device, "rent"), "it is shown"
    assert catalog.device(device).usd_per_hour is None, "and not used"


def test_a_price_of_one_seller_has_an_assumed_range() -> None:
    fact = prices.typical_price("A10G", "rent")
    assert fact is not None
    assert fact.low is not None
    assert fact.high is not None
    assert fact.low < fact.value < fact.high
    assert "only seller" in fact.source
    assert "assumed" in fact.source


def test_memory_costs_several_times_what_it_did_and_servers_hold_it() -> None:
    now, then = prices.memory_usd_per_gb("now"), prices.memory_usd_per_gb("then")
    assert now.value > 3 * then.value
    old, new = finance.host_usd("HGX-H100"), prices.server_usd("HGX-H100")
    assert old is not None
    assert new is not None
    assert new.value == pytest.approx(old.value + 2000 * (now.value - then.value))
    assert new.low is not None
    assert new.low < new.value


@pytest.mark.parametrize(("device", "kg"), [("A100-40GB-SXM", 127.6), ("H100-SXM", 164), ("B200", 284.25)])
def test_a_published_footprint_is_used_and_the_method_gives_it(device: str, kg: float) -> None:
    area, memory = {"A100-40GB-SXM": (826, 40), "H100-SXM": (814, 80), "B200": (1620, 180)}[device]
    fact = catalog.device(device).embodied_kg
    assert fact is not None
    assert fact.value == kg
    assert 62 + 3.5 * area / 100 + 0.92 * memory == pytest.approx(kg, rel=0.005)


def test_an_estimated_footprint_is_marked_as_assumed_and_has_the_published_range() -> None:
    fact = catalog.device("RTX-4090").embodied_kg
    assert fact is not None
    assert fact.value == pytest.approx(62 + 3.5 * 6.09 + 0.92 * 24)
    assert fact.kind == "assumed"
    assert fact.low == pytest.approx(62 + 1.44 * 6.09 + 0.065 * 24)
    assert fact.high == pytest.approx(fact.value * 2.49)
    assert "estimated" in fact.source
    assert embodied.estimated_kg("MI350X") is None, "its die area is not known"


def test_a_desk_has_no_cooling_a_cloud_little_and_a_server_room_the_places() -> None:
    desk, cloud = finance.site_pue("desk"), finance.site_pue("cloud")
    assert desk.value < cloud.value < catalog.place("japan").pue_ratio.value
