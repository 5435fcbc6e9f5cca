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
    assert bill.electricity_usd == pytest.approx(0.30)
    assert bill.rental_usd == pytest.approx(7.20)
    assert bill.usd == pytest.approx(7.50)
    assert bill.co2_g == pytest.approx(600.0)


@pytest.mark.parametrize(("each", "hosts"), [(0, 1), (4, 1), (2, 2), (1, 4)])
def test_hosts_with_known_power_add_to_the_energy(each: int, hosts: int) -> None:
    """Each host draws 300 W, which adds 0.54 MJ in half an hour."""
    inside = Host(name="h", power_w=_fact(300.0))
    machine = dataclasses.replace(_machine(), host=inside, devices_per_host=each)
    assert money.bill(machine, step_s=1800.0).energy_j == pytest.approx(3.6e6 + hosts * 0.54e6)
    assert money.bill(machine, step_s=1800.0, measured_j=7.2e6).energy_j == 7.2e6
    silent = dataclasses.replace(machine, host=Host(name="h"))
    assert money.bill(silent, step_s=1800.0) == money.bill(_machine(), step_s=1800.0)


def test_an_owned_machine_costs_only_its_electricity() -> None:
    bill = money.bill(_machine(rent=None), step_s=1800.0)
    assert bill.rental_usd is None
    assert bill.usd == pytest.approx(0.30)


def test_measured_energy_replaces_power_times_time() -> None:
    bill = money.bill(_machine(power=None), step_s=1800.0, measured_j=7.2e6)
    assert bill.energy_j == 7.2e6
    assert bill.co2_g == pytest.approx(1200.0)


def test_unknown_power_leaves_energy_money_and_carbon_unknown() -> None:
    unknown = dataclasses.replace(_machine(power=None), host=Host(name="h", power_w=_fact(300.0)))
    bill = money.bill(unknown, step_s=1.0)
    assert bill.rental_usd is not None
    assert (bill.energy_j, bill.electricity_usd, bill.usd, bill.co2_g) == (None, None, None, None)


def test_unknown_time_or_place_leaves_the_bill_unknown() -> None:
    assert money.bill(_machine(), step_s=None) == money.Bill(
        energy_j=None, electricity_usd=None, rental_usd=None, usd=None, co2_g=None
    )
    nowhere = dataclasses.replace(_machine(), place=None)
    assert money.usd(nowhere, energy_j=1.0, step_s=1.0) is None
    assert money.co2_g(None, 1.0) is None
    assert money.usd(_machine(), energy_j=1.0, step_s=None) is None  # it has a rent, for an unknown time


def _usd(*, price: float, rent: float, pue: float) -> float:
    machine = _machine(rent=rent, place=_place(usd=price, pue=1 + pue))
    total = money.usd(machine, energy_j=5e5, step_s=2.0)
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
    one = money.energy_j(power, step)
    assert one is not None
    assert money.energy_j(power, step, devices=count) == pytest.approx(one * count)
    assert money.energy_j(power * factor, step) == pytest.approx(one * factor)


@given(joules=AMOUNT, co2=AMOUNT, factor=FACTOR)
def test_carbon_is_proportional_to_grid_intensity_and_energy(
    joules: float, co2: float, factor: float
) -> None:
    base = money.co2_g(_place(co2=co2), joules)
    assert base is not None
    assert base > 0
    assert money.co2_g(_place(co2=co2 * factor), joules) == pytest.approx(base * factor)
    assert money.co2_g(_place(co2=co2), joules * factor) == pytest.approx(base * factor)
