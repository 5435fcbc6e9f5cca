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


class LinkBandwidths(NamedTuple):
    """Bytes/s, in one direction, that large transfers of one device reach: ``inside`` to another device of
    its host, ``outside`` to other hosts, ``switch`` in an all-reduce by the switch between the devices of a
    host (NVLink SHARP; 0 if the device has none).
    """

    inside: float
    outside: float
    switch: float


def link_bandwidths(machine: Machine) -> LinkBandwidths:
    """Return the bandwidths that large transfers reach on this machine: the rates of its link and network
    times the share that such transfers reach. A device without a link is assumed to have 16 GB/s, a machine
    without a network 12.5 GB/s per device, both before that share.
    """
    device, network = machine.device, machine.network
    link = device.link.bytes_s.value if device.link else ASSUMED_LINK_BYTES_S
    link_ratio = device.efficiency_ratio.get("link")
    return LinkBandwidths(
        link * (link_ratio.value if link_ratio else LINK_RATIO),
        (network.bytes_s.value if network else ASSUMED_NETWORK_BYTES_S) * NETWORK_RATIO,
        link * SWITCH_RATIO if device.nccl_multicast_channels is not None else 0.0,
    )


def collective_s(kind: str, size_bytes: Any, ranks: int, ranks_per_host: int, machine: Machine) -> Any:
    """Return the seconds that a collective takes, its launch included; 0 if ``ranks`` is 1.

    ``kind``: "all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all" or "send"; any other
    fails an assertion. ``size_bytes``: a number or a numpy array, as is the result. It is the result of a
    gather, the input of a scatter, the tensor that is reduced, broadcast or sent, or all that one rank gives
    to an all-to-all. ``ranks``: number of ranks in the group. ``ranks_per_host``: how many of them are in
    each host; a send stays inside a host if it is more than 1.
    """
    assert kind in KINDS, kind
    if ranks <= 1:
        return size_bytes * 0.0
    local_ranks = max(1, min(ranks_per_host, ranks))
    bandwidths = link_bandwidths(machine)
    if kind == "send":
        return _send_s(size_bytes, bandwidths, inside=local_ranks > 1)
    if kind == "all_to_all":
        return _exchange_s(size_bytes, ranks, local_ranks, bandwidths)
    options = [_ring_s(kind, size_bytes, ranks, local_ranks, bandwidths, p) for p in _RING]
    if kind == "all_reduce":
        options += [_tree_s(size_bytes, ranks, local_ranks, bandwidths, p) for p in _TREE]
        if bandwidths.switch and ranks == local_ranks > 2:
            options.append(_SWITCH_S + size_bytes * (2 * (ranks - 1) / ranks) / bandwidths.switch)
    return _least(options) + LAUNCH_S


def _least(options: list[Any]) -> Any:
    if isinstance(options[0], float | int):
        return min(options)
    import numpy

    return numpy.minimum.reduce(options)


def _ring_bytes_s(ranks: int, local_ranks: int, bandwidths: LinkBandwidths) -> float:
    """Return the bytes/s that a ring over ``ranks`` ranks reaches, of which ``local_ranks`` are in each host:
    ``bandwidths.outside`` with one rank per host, ``bandwidths.inside`` if all ranks are in one host.
    Otherwise it is the lower of ``inside`` and ``local_ranks`` x ``outside``, as the ring uses the network
    ports of all ranks of a host.
    """
    if local_ranks == 1:
        return bandwidths.outside
    return (
        bandwidths.inside
        if ranks == local_ranks
        else min(bandwidths.inside, bandwidths.outside * local_ranks)
    )


def _ring_s(
    kind: str, size: Any, ranks: int, local_ranks: int, bandwidths: LinkBandwidths, protocol: Protocol
) -> Any:
    start, inside_s, outside_s, share = protocol
    hosts = -(-ranks // local_ranks)
    rounds = 2 if kind == "all_reduce" else 1
    steps, network_steps = rounds * (ranks - 1), rounds * (hosts if rounds == 2 and hosts > 1 else hosts - 1)
    if kind == "broadcast":  # a chain: whole chunks follow each other
        moved_bytes, steps, network_steps = size * 1.0, ranks - 1, hosts - 1
    else:
        moved_bytes = size * (rounds * (ranks - 1) / ranks)
    return (
        start
        + max(0, steps - network_steps) * inside_s
        + network_steps * outside_s
        + moved_bytes / (_ring_bytes_s(ranks, local_ranks, bandwidths) * share)
    )


def _tree_s(size: Any, ranks: int, local_ranks: int, bandwidths: LinkBandwidths, protocol: Protocol) -> Any:
    """Return the seconds of an all-reduce along a tree, without the launch: up and down chains inside the
    hosts and a double binary tree between the hosts. ``protocol``: (seconds to start, seconds per step inside
    a host, seconds per step between hosts, share of the bandwidth that it reaches).
    """
    start, inside_s, outside_s, share = protocol
    hosts = -(-ranks // local_ranks)
    latency = 2 * ((local_ranks - 1) * inside_s + math.ceil(math.log2(hosts)) * outside_s)
    return start + latency + size * 2.0 / (_ring_bytes_s(ranks, local_ranks, bandwidths) * share)


def _send_s(size: Any, bandwidths: LinkBandwidths, *, inside: bool) -> Any:
    start, inside_s, outside_s, _ = _RING[2]
    return (
        LAUNCH_S
        + start
        + (inside_s if inside else outside_s)
        + size / (bandwidths.inside if inside else bandwidths.outside)
    )


def _exchange_s(size: Any, ranks: int, local_ranks: int, bandwidths: LinkBandwidths) -> Any:
    """Return the seconds of an all-to-all, its launch included, in which each rank exchanges ``size`` bytes.
    Traffic inside a host and traffic between hosts flow at the same time, so the longer of them counts. Each
    other rank adds 2 microseconds.
    """
    local_share, remote_share = (local_ranks - 1) / ranks, (ranks - local_ranks) / ranks
    start, _, outside_s, _ = _RING[2]
    latency = LAUNCH_S + start + (ranks - 1) * _PEER_S + (outside_s if remote_share else 0.0)
    return latency + size * max(local_share / bandwidths.inside, remote_share / bandwidths.outside)
