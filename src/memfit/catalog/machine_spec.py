"""A machine as one word: number of hosts x number of devices in each x device @ network between hosts.

Examples: ``H100-SXM``, ``8xH100-SXM``, ``64x8xH100-SXM@IB-NDR``.
"""

from __future__ import annotations

import re
from typing import Final

from memfit.catalog import load
from memfit.types.errors import UserError
from memfit.types.machine import Machine

EXAMPLES: Final = "H100-SXM, 8xH100-SXM or 64x8xH100-SXM@IB-NDR"
_TIMES: Final = r"(?:(\d{1,7})\s*[xX*×]\s*)?"
_WORDS: Final = r"([^@\s](?:[^@]*[^@\s])?)"
_SPEC: Final = re.compile(rf"\s*{_TIMES}{_TIMES}{_WORDS}\s*(?:@\s*{_WORDS}\s*)?")


def machine(spec: str, place: str = "world") -> Machine:
    """Return the machine that ``spec`` names, with the electricity of ``place``. ``spec``: DEVICE,
    COUNTxDEVICE or HOSTSxCOUNTxDEVICE, each possibly with @NETWORK, where COUNT is the number of devices in
    each host. Examples: "H100-SXM", "8xH100-SXM", "64x8xH100-SXM@IB-NDR".

    With a COUNT alone, all devices are in one host. In COUNTxDEVICE@NETWORK, COUNT is the number of all
    devices: they fill as many hosts as needed of the kind that the catalog has for the device (one host if it
    has none). Raises UserError if they need several hosts and do not fill the last one. Raises UserError also
    for a text of another form, an unknown device, network or place, a count of 0, and several hosts without a
    network.
    """
    match = _SPEC.fullmatch(spec)
    counts = [int(count) for count in match.groups()[:2] if count] if match else [0]
    if match is None or 0 in counts:
        raise UserError(
            f"{spec!r} does not name a machine in an allowed form, or has a count of 0",
            allowed="DEVICE, COUNTxDEVICE or HOSTSxCOUNTxDEVICE, each with @NETWORK or without",
            hint=f"for example {EXAMPLES}",
        )
    device = load.device(match.group(3))
    network = load.network(match.group(4)).name if match.group(4) else ""
    hosts, devices_per_host = (
        counts if len(counts) == 2 else _fill_hosts(spec, device.name, *counts, network=network)
    )
    if hosts > 1 and not network:
        raise UserError(
            f"{spec!r} has {hosts} hosts but names no network between them",
            allowed=f"@NETWORK at the end; networks: {', '.join(load.network_names())}",
            hint=f"for example {format_spec(device.name, hosts, devices_per_host, 'IB-NDR')}",
        )
    host_name = load.host_of(device.name)
    return Machine(
        name=format_spec(device.name, hosts, devices_per_host, network),
        device=device,
        device_count=hosts * devices_per_host,
        place=load.place(place),
        devices_per_host=devices_per_host if hosts > 1 else 0,
        host=load.host(host_name, devices_per_host) if host_name else None,
        network=load.network(network, devices_per_host) if network else None,
    )


def format_spec(device: str, hosts: int, devices: int, network: str = "") -> str:
    """Return the text from which `machine` reads this machine: "H100-SXM" for one device, "8xH100-SXM" for
    several in one host, "2x1xT4@IB-HDR" for several hosts. ``devices``: number in each host. ``network``: ""
    for none.

    One host has its own count ("1x16xH100-SXM@IB-NDR") if there is a network and the catalog's host for the
    device has fewer devices.
    """
    host_name = load.host_of(device)
    exceeds_host = bool(network and host_name) and devices > load.devices_of(
        host_name
    )  # a single count would mean several hosts
    counts = (hosts, devices) if hosts > 1 or exceeds_host else (devices,) if devices > 1 else ()
    return "".join(f"{count}x" for count in counts) + device + (f"@{network}" if network else "")


def _fill_hosts(spec: str, device: str, count: int = 1, *, network: str) -> tuple[int, int]:
    """Return (number of hosts, number of devices in each) if only the total number of devices, ``count``, is
    given.

    Without a network, or if the catalog has no host for the device, all are in one host. Otherwise they fill
    hosts of the catalog's kind for the device. Raises UserError with the text ``spec`` if they need several
    hosts and do not fill the last one.
    """
    host_name = load.host_of(device)
    if not (network and host_name) or count <= (devices_per_host := load.devices_of(host_name)):
        return 1, count
    if count % devices_per_host:
        raise UserError(
            f"{spec!r} names a network, so its {count} devices must fill whole hosts, but one host of the "
            f"kind {host_name} holds {devices_per_host}",
            allowed=f"at most {devices_per_host} devices, which are in one host, or a multiple of "
            f"{devices_per_host}",
            hint="or give the number of hosts and of devices in each, for example "
            f"{format_spec(device, 2, devices_per_host, network)}",
        )
    return count // devices_per_host, devices_per_host
