"""Seconds of one collective, by kind, size, number of ranks and their placement.

This is NCCL's own model (src/graph/tuning.cc of its public source: latency per step over NVLink and over the
network, for each algorithm and protocol; bandwidth of the protocols as a share of the links). It covers rings
with their three protocols, a tree, and in-switch reduction if the device has it. The fastest is taken. A ring
over several hosts uses the network ports of all ranks of a host at once, so its speed is the lower of the
link speed inside a host and of all ports together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from memfit.types.machine import Machine

# Share of a link's bandwidth that large transfers reach, used if the catalog has none (nccl-tests: 230 to 235
# of 300 GB/s on 8 A100, 360 to 370 of 450 on 8 H100; over InfiniBand and RoCE 370 of 400 GB/s per host).
LINK_RATIO, NETWORK_RATIO = 0.80, 0.92
SWITCH_RATIO = 1.05  # in-switch all-reduce on 8 H100: 475 GB/s of bus bandwidth for 450 GB/s of link
ASSUMED_LINK_BYTES_S = 16e9  # PCIe 4.0 x16 through the host's memory
ASSUMED_NETWORK_BYTES_S = 12.5e9  # one 100 Gb/s port per device
LAUNCH_S = 3e-6
# (start s, seconds per step inside a host, seconds per step between hosts, share of the bandwidth it
# reaches).
_RING = ((6.6e-6, 0.6e-6, 2.7e-6, 0.25), (14.0e-6, 1.9e-6, 4.0e-6, 0.92), (8.4e-6, 3.4e-6, 14.0e-6, 1.0))
_TREE = ((6.8e-6, 0.6e-6, 5.0e-6, 0.24), (14.0e-6, 1.25e-6, 8.5e-6, 0.85), (8.4e-6, 4.0e-6, 14.0e-6, 0.92))
_SWITCH_S = 25e-6
_PEER_S = 2e-6  # per additional partner in an all-to-all exchange

Protocol = tuple[float, float, float, float]
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send")


class Wires(NamedTuple):
    """Bytes/s of one device in one direction: to its neighbours in the host, out of the host, and to the
    reducing switch (0 if there is none).
    """

    inside: float
    outside: float
    switch: float


def wires(machine: Machine) -> Wires:
    """Return the bandwidths that transfers reach on this machine."""
    device, network = machine.device, machine.network
    link = device.link.bytes_s.value if device.link else ASSUMED_LINK_BYTES_S
    reached = device.efficiency_ratio.get("link")
    return Wires(
        link * (reached.value if reached else LINK_RATIO),
        (network.bytes_s.value if network else ASSUMED_NETWORK_BYTES_S) * NETWORK_RATIO,
        link * SWITCH_RATIO if device.nccl_multicast_channels is not None else 0.0,
    )


def collective_s(kind: str, size_bytes: Any, ranks: int, ranks_per_host: int, machine: Machine) -> Any:
    """Return the seconds of a collective, for a number or a numpy array of sizes.

    ``size_bytes`` is the size of the whole: what every rank has after a gather or before a scatter, the
    tensor that is reduced or sent, or all that one rank exchanges. ``ranks_per_host``: ranks of this group in
    one host.
    """
    assert kind in KINDS, kind
    if ranks <= 1:
        return size_bytes * 0.0
    each = max(1, min(ranks_per_host, ranks))
    found = wires(machine)
    if kind == "send":
        return _sent_s(size_bytes, found, inside=each > 1)
    if kind == "all_to_all":
        return _exchange_s(size_bytes, ranks, each, found)
    options = [_ring_s(kind, size_bytes, ranks, each, found, p) for p in _RING]
    if kind == "all_reduce":
        options += [_tree_s(size_bytes, ranks, each, found, p) for p in _TREE]
        if found.switch and ranks == each > 2:
            options.append(_SWITCH_S + size_bytes * (2 * (ranks - 1) / ranks) / found.switch)
    return _least(options) + LAUNCH_S


def _least(options: list[Any]) -> Any:
    if isinstance(options[0], float | int):
        return min(options)
    import numpy

    return numpy.minimum.reduce(options)


def _speed(ranks: int, each: int, found: Wires) -> float:
    """Return the bus bandwidth of a ring."""
    if each == 1:
        return found.outside
    return found.inside if ranks == each else min(found.inside, found.outside * each)


def _ring_s(kind: str, size: Any, ranks: int, each: int, found: Wires, protocol: Protocol) -> Any:
    start, inside_s, outside_s, share = protocol
    hosts = -(-ranks // each)
    rounds = 2 if kind == "all_reduce" else 1
    steps, far = rounds * (ranks - 1), rounds * (hosts if rounds == 2 and hosts > 1 else hosts - 1)
    if kind == "broadcast":  # a chain: whole chunks follow each other
        moved, steps, far = size * 1.0, ranks - 1, hosts - 1
    else:
        moved = size * (rounds * (ranks - 1) / ranks)
    return (
        start
        + max(0, steps - far) * inside_s
        + far * outside_s
        + moved / (_speed(ranks, each, found) * share)
    )


def _tree_s(size: Any, ranks: int, each: int, found: Wires, protocol: Protocol) -> Any:
    """Return the seconds of a tree: chains inside hosts, a double binary tree between them, up and down."""
    start, inside_s, outside_s, share = protocol
    hosts = -(-ranks // each)
    latency = 2 * ((each - 1) * inside_s + math.ceil(math.log2(hosts)) * outside_s)
    return start + latency + size * 2.0 / (_speed(ranks, each, found) * share)


def _sent_s(size: Any, found: Wires, *, inside: bool) -> Any:
    start, near, far, _ = _RING[2]
    return LAUNCH_S + start + (near if inside else far) + size / (found.inside if inside else found.outside)


def _exchange_s(size: Any, ranks: int, each: int, found: Wires) -> Any:
    """Return the seconds of an all-to-all. Traffic inside a host and traffic leaving it flow in parallel."""
    near, far = (each - 1) / ranks, (ranks - each) / ranks
    start, _, outside_s, _ = _RING[2]
    latency = LAUNCH_S + start + (ranks - 1) * _PEER_S + (outside_s if far else 0.0)
    return latency + size * max(near / found.inside, far / found.outside)
