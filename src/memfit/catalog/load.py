"""Return entries of this package's TOML tables as data types: devices, hosts, links, networks, places,
engines.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any, Final

from memfit.catalog.embodied import estimated_kg
from memfit.catalog.prices import typical_price
from memfit.catalog.tables import fact, facts, find, normalized_name, table
from memfit.types.device_kind import CUDA
from memfit.types.machine import Device, Fact, Host, Link, Place

_DEVICE_FACTS: Final = tuple(f.name for f in dataclasses.fields(Device) if str(f.type).startswith("Fact"))
_HOST_FACTS: Final = tuple(f.name for f in dataclasses.fields(Host) if str(f.type).startswith("Fact"))


def device_names() -> tuple[str, ...]:
    """Return the names of all accelerators of the catalog, in the order of its file."""
    return tuple(table("gpus.toml")["devices"])


def place_names() -> tuple[str, ...]:
    """Return the names of all places of the catalog, such as "japan", in the order of its file."""
    return tuple(table("places.toml")["places"])


def link_names() -> tuple[str, ...]:
    """Return the names of all links between devices of one host that the catalog has, such as "NVLink4", in
    the order of its file.
    """
    return tuple(table("links.toml")["links"])


def network_names() -> tuple[str, ...]:
    """Return the names of all networks between hosts that the catalog has, such as "IB-NDR", in the order of
    its file.
    """
    return tuple(table("links.toml")["networks"])


def host_names() -> tuple[str, ...]:
    """Return the names of all servers of the catalog, such as "HGX-H100", in the order of its file."""
    return tuple(table("hosts.toml")["hosts"])


def device(name: str) -> Device:
    """Return an accelerator of the catalog by its name. Case, spaces, dashes and brand words do not matter,
    and some have other names, too: ``"h100 sxm"``, ``"H100-SXM"`` and torch's ``"NVIDIA H100 80GB HBM3"`` are
    the same.

    Raises UserError with the closest names, if any, for an unknown name, and for one that fits several
    devices (``"A100"``).
    """
    return _device(find(name, what="device", rows=table("gpus.toml")["devices"]))


def place(name: str) -> Place:
    """Return a place of the catalog, a country or ``"world"``, with the price and the CO2 of its electricity
    and its PUE.

    Raises UserError for an unknown name, with the closest names, if any, else all known names.
    """
    return _place(find(name, what="place", rows=table("places.toml")["places"]))


def link(name: str) -> Link:
    """Return a link between devices of one host, for example ``"NVLink4"``.

    Raises UserError for an unknown name, with the closest names, if any, and all known names.
    """
    return _link(find(name, what="link", rows=table("links.toml")["links"]))


def network(name: str, devices_per_host: int = 1) -> Link:
    """Return a network between hosts, for example ``"IB-NDR"``. Its ``bytes_s`` is the rate of one device. If
    the catalog has the rate of one network card that all devices of a host share, that is the card's rate /
    ``devices_per_host``.

    Raises UserError for an unknown name, with the closest names, if any, else all known names.
    """
    return _network(find(name, what="network", rows=table("links.toml")["networks"]), devices_per_host)


def host(name: str, devices: int = 0) -> Host:
    """Return a server of the catalog, for example ``"HGX-H100"``, with the figures for ``devices`` of its
    devices; 0: all with which it is sold.

    For fewer devices, the figures are their share of the server's memory, storage rate and power, marked as
    assumed; the rate between its memory and these devices together is at most the sum of their own rates. The
    name then becomes "1/8 of HGX-H100". For more devices, the figures are the whole server's, and the name
    becomes "HGX-H100 with 16 devices".

    Raises UserError for an unknown name, with the closest names, if any, else all known names.
    """
    return _host(find(name, what="host", rows=table("hosts.toml")["hosts"]), devices)


def host_of(device: str) -> str:
    """Return the name of the host in which the catalog places a device, "" if there is none. ``device``: its
    exact name in the catalog; for any other the result is "".
    """
    return str(table("gpus.toml")["devices"].get(device, {}).get("host", ""))


def devices_of(host: str) -> int:
    """Return the number of devices with which a host is sold. ``host``: its exact name in the catalog; any
    other raises KeyError.
    """
    return int(table("hosts.toml")["hosts"][host]["devices"])


def cpu_power(threads: int) -> Fact:
    """Return the watts of a server's CPU while ``threads`` hardware threads are busy: that number times the
    catalog's assumed watts per thread.
    """
    hosts = table("hosts.toml")
    per_thread = fact(hosts["cpu"]["power_w_per_thread"], hosts["sources"])
    return Fact(
        value=per_thread.value * threads,
        source=f"{per_thread.value} W x {threads} threads; {per_thread.source}",
        date=per_thread.date,
        kind=per_thread.kind,
    )


def efficiency(architecture: str, name: str = "") -> dict[str, Fact]:
    """Return by class of operator, such as "matmul", which share of its peak rate a device reaches in large
    operators. ``architecture``: for example "ampere". ``name``: the exact name of the device in the catalog.

    Classes that were measured on this device have the measured share. All others have the share of its
    architecture, marked as assumed; if ``name`` is "" or unknown, all classes have that. Raises UserError for
    an unknown architecture.
    """
    ratios = table("efficiency.toml")
    catalog_name = find(architecture, what="architecture", rows=ratios["architectures"])
    architecture_ratios = {
        key: fact(row, ratios["sources"]) for key, row in ratios["architectures"][catalog_name].items()
    }
    device_ratios = {
        key: fact(row, ratios["sources"]) for key, row in ratios["devices"].get(name, {}).items()
    }
    return {
        key: dataclasses.replace(ratio, kind="assumed") for key, ratio in architecture_ratios.items()
    } | device_ratios


def gpu_target(architecture: str) -> str:
    """Return the target for which torch compiles kernels for devices of an architecture of the catalog, such
    as "sm_75" for "turing"; "" for an unknown architecture.
    """
    targets = {normalized_name(name): target for name, target in table("gpus.toml")["gpu_targets"].items()}
    return str(targets.get(normalized_name(architecture), ""))


def engine_facts(name: str) -> dict[str, tuple[str, str, str]]:
    """Return what the catalog has on the packages of a training engine and their maintenance, as name of the
    fact -> (value, source, date). Example: "release" -> ("0.19.8, 2026-10-20", ...). Empty for an unknown
    engine.
    """
    return _upkeep("engines", name)


def package_facts(name: str) -> dict[str, tuple[str, str, str]]:
    """Return what the catalog has on the maintenance of a library that a technique needs, such as "peft", as
    name of the fact -> (value, source, date). Empty for an unknown library.
    """
    return _upkeep("packages", name)


def _upkeep(table_name: str, name: str) -> dict[str, tuple[str, str, str]]:
    engines = table("engines.toml")
    row: dict[str, list[Any]] = engines[table_name].get(name, {})
    sources = {key: engines["sources"][source] for key, (_, source) in row.items()}
    return {
        key: (str(value), sources[key]["source"], sources[key]["date"]) for key, (value, _) in row.items()
    }


@functools.cache
def _device(name: str) -> Device:
    gpus, libraries = table("gpus.toml"), table("libraries.toml")
    sources = gpus["sources"] | libraries["sources"]
    row = gpus["devices"][name] | libraries["devices"].get(name, {})
    figures: dict[str, Any] = {
        "usd_per_hour": typical_price(name, "rent"),
        "usd_to_buy": typical_price(name, "buy"),
        "embodied_kg": estimated_kg(name),
    }
    return Device(
        name=name,
        kind=row.get("kind", CUDA),
        gpu_target=row.get("gpu_target", gpu_target(row["architecture"])),
        peak_flops={dtype: fact(peak, sources) for dtype, peak in row["peak_flops"].items()},
        link=link(row["link"]) if "link" in row else None,
        efficiency_ratio=efficiency(row["architecture"], name),
        **(figures | facts(row, sources, _DEVICE_FACTS)),
    )


@functools.cache
def _link(name: str) -> Link:
    links = table("links.toml")
    return Link(name=name, **facts(links["links"][name], links["sources"], ("bytes_s", "latency_s")))


@functools.cache
def _network(name: str, devices: int) -> Link:
    links = table("links.toml")
    row = links["networks"][name]
    link_facts = facts(row, links["sources"], ("bytes_s", "host_bytes_s", "latency_s"))
    host_bytes_s = link_facts.pop("host_bytes_s", None)
    if host_bytes_s is not None:
        link_facts["bytes_s"] = _share(
            host_bytes_s, Fraction(1, devices), f"; one card for {devices} devices"
        )
    return Link(name=name, **link_facts)


@functools.cache
def _host(name: str, devices: int) -> Host:
    hosts = table("hosts.toml")
    row = hosts["hosts"][name]
    host_facts = facts(row, hosts["sources"], _HOST_FACTS)
    host_devices = row["devices"]
    if devices in (0, host_devices):
        return Host(name=name, **host_facts)
    if devices > host_devices:
        return Host(name=f"{name} with {devices} devices", **host_facts)
    share = Fraction(devices, host_devices)
    for key in ("memory_bytes", "storage_bytes_s", "power_w"):
        if key in host_facts:
            host_facts[key] = _share(
                host_facts[key], share, f"; {share} of it for {devices} of {host_devices} devices"
            )
    device_bytes_s, shared_bytes_s = host_facts.get("device_bytes_s"), host_facts.get("shared_bytes_s")
    if (
        device_bytes_s is not None
        and shared_bytes_s is not None
        and device_bytes_s.value * devices < shared_bytes_s.value
    ):
        host_facts["shared_bytes_s"] = _share(device_bytes_s, Fraction(devices), f"; {devices} at once")
    return Host(name=f"{share} of {name}", **host_facts)


def _share(total: Fact, share: Fraction, note: str) -> Fact:
    """Return ``total`` and its range times ``share``, with ``note`` added to its source. It is marked as
    assumed, because the sharing depends on what else runs there. A share of 1 returns ``total`` unchanged.
    """
    if share == 1:
        return total
    low, high = (None if bound is None else float(bound * share) for bound in (total.low, total.high))
    value, source = float(total.value * share), total.source + note
    return dataclasses.replace(total, value=value, low=low, high=high, source=source, kind="assumed")


@functools.cache
def _place(name: str) -> Place:
    places = table("places.toml")
    keys = ("usd_per_kwh", "co2_g_per_kwh", "pue_ratio")
    return Place(name=name, **facts(places["places"][name], places["sources"], keys))
