"""The bill of a step: figures computed by hand, proportionality, and unknown inputs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost import money
from memfit.types.machine import Device, Fact, Host, Machine, Place

AMOUNT = st.floats(min_value=1e-3, max_value=1e6)
FACTOR = st.floats(min_value=1.0, max_value=1e3)


def _fact(value: float) -> Fact:
    return Fact(value=value, source="test", date="2025", kind="assumed")


def _place(usd: float = 0.2, co2: float = 400.0, pue: float = 1.5) -> Place:
    return Place(name="p", usd_per_kwh=_fact(usd), co2_g_per_kwh=_fact(co2), pue_ratio=_fact(pue))


def _machine(
    *, power: float | None = 500.0, rent: float | None = 3.6, count: int = 4, place: Place | None = None
) -> Machine:
    device = Device(
        name="d",
        kind="cuda",
        memory_bytes=_fact(1e9),
        power_w=None if power is None else _fact(power),
        usd_per_hour=None if rent is None else _fact(rent),
    )
    return Machine(name="m", device=device, device_count=count, place=place or _place())


def test_the_bill_of_a_step_matches_hand_computation() -> None:
    """4 x 500 W x 1800 s = 3.6 MJ = 1 kWh; x 1.5 = 1.5 kWh at the site: 0.30 USD, 600 g.
    Rent: 4 x 3.6 USD/h x half an hour = 7.20 USD."""
    bill = money.bill(_machine(), step_s=1800.0)
    assert bill.energy_j == pytest.approx(3.6e6)
    assert bill.usd == pytest.approx(0.30 + 7.20)
    assert bill.co2_g == pytest.approx(600.0)


@pytest.mark.parametrize(("each", "hosts"), [(0, 1), (4, 1), (2, 2), (1, 4)])
def test_hosts_with_known_power_add_to_the_energy(each: int, hosts: int) -> None:
    """Each host draws 300 W, which adds 0.54 MJ in half an hour."""
    inside = Host(name="h", power_w=_fact(300.0))
    machine = dataclasses.replace(_machine(), host=inside, devices_per_host=each)
    assert money.bill(machine, step_s=1800.0).energy_j == pytest.approx(3.6e6 + hosts * 0.54e6)
    silent = dataclasses.replace(machine, host=Host(name="h"))
    assert money.bill(silent, step_s=1800.0) == money.bill(_machine(), step_s=1800.0)


def test_an_owned_machine_costs_only_its_electricity() -> None:
    bill = money.bill(_machine(rent=None), step_s=1800.0)
    assert bill.usd == pytest.approx(0.30)


def test_unknown_power_leaves_energy_money_and_carbon_unknown() -> None:
    unknown = dataclasses.replace(_machine(power=None), host=Host(name="h", power_w=_fact(300.0)))
    assert money.bill(unknown, step_s=1.0) == money.Bill(energy_j=None, usd=None, co2_g=None)


def test_unknown_time_or_place_leaves_the_bill_unknown() -> None:
    assert money.bill(_machine(), step_s=None) == money.Bill(energy_j=None, usd=None, co2_g=None)
    nowhere = money.bill(dataclasses.replace(_machine(), place=None), step_s=1800.0)
    assert nowhere == money.Bill(energy_j=pytest.approx(3.6e6), usd=None, co2_g=None)


def _usd(*, price: float, rent: float, pue: float) -> float:
    machine = _machine(rent=rent, place=_place(usd=price, pue=1 + pue))
    total = money.bill(machine, step_s=2.0).usd
    assert total is not None
    return total


@given(price=AMOUNT, rent=AMOUNT, pue=AMOUNT, factor=FACTOR)
def test_cost_never_falls_when_a_price_rises(price: float, rent: float, pue: float, factor: float) -> None:
    base = _usd(price=price, rent=rent, pue=pue)
    assert base > 0
    assert _usd(price=price * factor, rent=rent, pue=pue) >= base
    assert _usd(price=price, rent=rent * factor, pue=pue) >= base
    assert _usd(price=price, rent=rent, pue=pue * factor) >= base


@given(power=AMOUNT, step=AMOUNT, factor=FACTOR, count=st.integers(min_value=1, max_value=1024))
def test_energy_is_proportional_to_power_and_number_of_devices(
    power: float, step: float, factor: float, count: int
) -> None:
    one = money.bill(_machine(power=power, count=1), step_s=step).energy_j
    assert one is not None
    assert money.bill(_machine(power=power, count=count), step_s=step).energy_j == pytest.approx(one * count)
    more = money.bill(_machine(power=power * factor, count=1), step_s=step).energy_j
    assert more == pytest.approx(one * factor)


@given(power=AMOUNT, co2=AMOUNT, factor=FACTOR)
def test_carbon_is_proportional_to_grid_intensity_and_energy(power: float, co2: float, factor: float) -> None:
    def carbon_g(power: float, co2: float) -> float | None:
        return money.bill(_machine(power=power, place=_place(co2=co2)), step_s=1.0).co2_g

    base = carbon_g(power, co2)
    assert base is not None
    assert base > 0
    assert carbon_g(power, co2 * factor) == pytest.approx(base * factor)
    assert carbon_g(power * factor, co2) == pytest.approx(base * factor)
