"""Energy, money and CO2 of one step, from the facts of a machine.

energy [J] = power [W] x step time [s]. This is an upper bound for the boards of all devices, and for the
hosts around them if the machine's facts include their power. The energy boundary says which: "board" or
"board and host (modelled: power x time)". Electricity and CO2 count the whole site: energy x PUE, with 3.6e6
J per kWh. CO2 covers the electricity only, not the making of the hardware.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from memfit.types.machine import Machine

J_PER_KWH: Final = 3.6e6
S_PER_HOUR: Final = 3600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Energy, money and CO2 of one step on the whole machine. None: a fact that it needs is unknown.

    ``energy_j``: joules of all devices, and of their hosts if their power is known, before PUE. ``usd``: US
    dollars for electricity, plus rental if there is a rental price. ``co2_g``: grams of CO2 equivalent of the
    electricity.
    """

    energy_j: float | None = None
    usd: float | None = None
    co2_g: float | None = None


def hosts_w(machine: Machine) -> float | None:
    """Return the watts of all hosts of the machine together, without their devices; None if unknown."""
    if machine.host is None or machine.host.power_w is None:
        return None
    hosts = machine.device_count / machine.devices_per_host if machine.devices_per_host else 1
    return machine.host.power_w.value * hosts


def bill(machine: Machine, *, step_s: float | None) -> Bill:
    """Return energy, money and CO2 of one step of ``step_s`` seconds on the whole machine.

    All is None if the devices' power or ``step_s`` is unknown; money and CO2 are None without a place. Hosts
    of unknown power count as zero. A rental price includes the provider's own electricity, so for a rented
    machine the sum is slightly too high (a few percent).
    """
    power, hourly, place = machine.device.power_w, machine.device.usd_per_hour, machine.place
    if power is None or step_s is None:
        return Bill()
    energy_j = power.value * step_s * machine.device_count + (hosts_w(machine) or 0.0) * step_s
    if place is None:
        return Bill(energy_j=energy_j)
    site_kwh = energy_j / J_PER_KWH * place.pue_ratio.value
    rental_usd = hourly.value * machine.device_count * step_s / S_PER_HOUR if hourly else 0.0
    return Bill(
        energy_j=energy_j,
        usd=site_kwh * place.usd_per_kwh.value + rental_usd,
        co2_g=site_kwh * place.co2_g_per_kwh.value,
    )
