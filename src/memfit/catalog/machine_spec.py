"""A machine as one word, hosts x devices x device @ network.

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
_SPELLED: Final = re.compile(rf"\s*{_TIMES}{_TIMES}{_WORDS}\s*(?:@\s*{_WORDS}\s*)?")


def machine(spec: str, place: str = "world") -> Machine:
    """Return the machine that `spec` names, powered from `place`.

    A single count means devices in one host; with a network it fills as many hosts as needed. Raises
    UserError with the closest names, and for several hosts without a network.
    """
    match = _SPELLED.fullmatch(spec)
    counts = [int(count) for count in match.groups()[:2] if count] if match else [0]
    if match is None or 0 in counts:
        raise UserError(f"not a machine: {spec!r}", hint=f"for example {EXAMPLES}")
    device = load.device(match.group(3))
    network = load.network(match.group(4)).name if match.group(4) else ""
    hosts, each = counts if len(counts) == 2 else _filled(spec, device.name, *counts, network=network)
    if hosts > 1 and not network:
        raise UserError(
            f"{spec!r} is {hosts} hosts and names no network between them",
            allowed=", ".join(load.network_names()),
            hint=f"for example {spelled(device.name, hosts, each, 'IB-NDR')}",
        )
    room = load.host_of(device.name)
    return Machine(
        name=spelled(device.name, hosts, each, network),
        device=device,
        device_count=hosts * each,
        place=load.place(place),
        devices_per_host=each if hosts > 1 else 0,
        host=load.host(room, each) if room else None,
        network=load.network(network, each) if network else None,
    )


def spelled(device: str, hosts: int, devices: int, network: str = "") -> str:
    """Return the spec that `machine` reads, such as ``2x1xT4@IB-HDR``."""
    room = load.host_of(device)
    crowded = bool(network and room) and devices > load.devices_of(
        room
    )  # a single count would mean several hosts
    counts = (hosts, devices) if hosts > 1 or crowded else (devices,) if devices > 1 else ()
    return "".join(f"{count}x" for count in counts) + device + (f"@{network}" if network else "")


def _filled(spec: str, device: str, count: int = 1, *, network: str) -> tuple[int, int]:
    """Return (hosts, devices in each) for a single count.

    Raises UserError if the devices do not fill whole hosts.
    """
    room = load.host_of(device)
    if not (network and room) or count <= (each := load.devices_of(room)):
        return 1, count
    if count % each:
        raise UserError(
            f"{spec!r}: {count} devices fill no whole number of hosts, {room} holds {each}",
            hint=f"say how many hosts and how many in each, for example {spelled(device, 2, each, network)}",
        )
    return count // each, each
