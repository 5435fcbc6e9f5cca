"""Energy, money and CO2 of one step, from the facts of a machine. If an input is unknown, the result is None;
only the power of hosts and a rental price then count as 0.

energy [J] = power [W] x step time [s]. This is an upper bound for the boards of all devices, and for the
hosts around them if the machine's facts include their power. The energy boundary says which: "board" or
"board and host (modelled: power x time)". Electricity and CO2 count the whole site: energy x PUE, with 3.6e6
J per kWh. CO2 covers the electricity only, not the making of the hardware.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from memfit.types.machine import Machine, Place

J_PER_KWH: Final = 3.6e6
S_PER_HOUR: Final = 3600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Energy, money and CO2 of one step on the whole machine. None: a fact that it needs is unknown.

    ``energy_j``: joules of all devices, and of their hosts if their power is known, before PUE.
    ``electricity_usd``, ``rental_usd``: US dollars for electricity and for renting the machine. ``usd``:
    electricity plus rental, or electricity alone if there is no rental price. ``co2_g``: grams of CO2
    equivalent of the electricity.
    """

    energy_j: float | None
    electricity_usd: float | None
    rental_usd: float | None
    usd: float | None
    co2_g: float | None


def energy_j(power_w: float | None, step_s: float | None, *, devices: int = 1) -> float | None:
    """Return the joules that `devices` devices draw at `power_w` watts each during `step_s` seconds; None if
    one of these is None.
    """
    if power_w is None or step_s is None:
        return None
    return power_w * step_s * devices


def hosts_w(machine: Machine) -> float | None:
    """Return the watts of all hosts of the machine together, without their devices; None if unknown."""
    if machine.host is None or machine.host.power_w is None:
        return None
    hosts = machine.device_count / machine.devices_per_host if machine.devices_per_host else 1
    return machine.host.power_w.value * hosts


def site_kwh(place: Place | None, energy_j: float | None) -> float | None:
    """Return the kWh at the site's meter for the computers' energy in joules. It is that energy times the
    site's PUE, which is the electricity of the whole site over that of its computers. None if the place or
    the energy is None.
    """
    if place is None or energy_j is None:
        return None
    return energy_j / J_PER_KWH * place.pue_ratio.value


def electricity_usd(place: Place | None, energy_j: float | None) -> float | None:
    """Return the price in US dollars of the site's electricity, `site_kwh`, for the computers' energy in
    joules. None if the place or the energy is None.
    """
    kwh = site_kwh(place, energy_j)
    return None if place is None or kwh is None else kwh * place.usd_per_kwh.value


def rental_usd(machine: Machine, step_s: float | None) -> float | None:
    """Return the price in US dollars of renting the machine with all its devices for `step_s` seconds; None
    if the catalog has no rental price or the seconds are unknown.
    """
    hourly = machine.device.usd_per_hour
    if hourly is None or step_s is None:
        return None
    return hourly.value * machine.device_count * step_s / S_PER_HOUR


def usd(machine: Machine, *, energy_j: float | None, step_s: float | None) -> float | None:
    """Return the US dollars of one step for electricity, plus rental if the catalog has a rental price. None
    if the electricity is unknown, or if there is a rental price but the step's seconds are unknown.

    A rental price includes the provider's own electricity, so for a rented machine the sum is slightly too
    high (a few percent). `Bill` keeps the two parts separate.
    """
    electricity, rental = electricity_usd(machine.place, energy_j), rental_usd(machine, step_s)
    if electricity is None or (rental is None and machine.device.usd_per_hour is not None):
        return None
    return electricity + (rental or 0.0)


def co2_g(place: Place | None, energy_j: float | None) -> float | None:
    """Return the grams of CO2 equivalent of the site's electricity, `site_kwh`, for the computers' energy in
    joules. None if the place or the energy is None.
    """
    kwh = site_kwh(place, energy_j)
    return None if place is None or kwh is None else kwh * place.co2_g_per_kwh.value


def bill(machine: Machine, *, step_s: float | None, measured_j: float | None = None) -> Bill:
    """Return energy, money and CO2 of one step on the whole machine.

    The energy is ``measured_j``, in joules, if that is given. Otherwise it is the power of all devices and
    hosts times ``step_s``, where hosts of unknown power count as zero; it is None if the devices' power or
    ``step_s`` is None.
    """
    power = machine.device.power_w
    boards_j = energy_j(power.value if power else None, step_s, devices=machine.device_count)
    modelled_j = None if boards_j is None else boards_j + (energy_j(hosts_w(machine), step_s) or 0.0)
    joules = measured_j if measured_j is not None else modelled_j
    return Bill(
        energy_j=joules,
        electricity_usd=electricity_usd(machine.place, joules),
        rental_usd=rental_usd(machine, step_s),
        usd=usd(machine, energy_j=joules, step_s=step_s),
        co2_g=co2_g(machine.place, joules),
    )
