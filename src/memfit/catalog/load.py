"""The shipped TOML tables as nouns."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, Final

from memfit.catalog.tables import fact, facts, find, table
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Link, Machine, Place

_DEVICE_FACTS: Final = tuple(f.name for f in dataclasses.fields(Device) if str(f.type).startswith("Fact"))
_COUNTED: Final = re.compile(r"\s*(?:(\d+)\s*[xX*×]\s*)?(\S.*?)\s*")


def device_names() -> tuple[str, ...]:
    """Every accelerator of the catalog, in the order of the file."""
    return tuple(table("gpus.toml")["devices"])


def place_names() -> tuple[str, ...]:
    return tuple(table("places.toml")["places"])


def network_names() -> tuple[str, ...]:
    return tuple(table("links.toml")["networks"])


def device(name: str) -> Device:
    """``"h100 sxm"``, ``"H100-SXM"`` and torch's ``"NVIDIA H100 80GB HBM3"`` are one device.

    Raises UserError with the closest names; a name that fits two devices (``"A100"``) is no name.
    """
    return _device(find(name, what="device", rows=table("gpus.toml")["devices"]))


def place(name: str) -> Place:
    """A country or ``"world"``. Raises UserError with the closest names."""
    return _place(find(name, what="place", rows=table("places.toml")["places"]))


def link(name: str) -> Link:
    """Between devices of one host, for example ``"NVLink4"``. Raises UserError with the closest names."""
    return _link("links", find(name, what="link", rows=table("links.toml")["links"]))


def network(name: str) -> Link:
    """Between hosts, for example ``"IB-NDR"``. Raises UserError with the closest names."""
    return _link("networks", find(name, what="network", rows=table("links.toml")["networks"]))


def machine(spec: str, place: str = "world") -> Machine:
    """``"H100-SXM"`` or ``"8xH100-SXM"``, powered from `place`. Raises UserError."""
    match = _COUNTED.fullmatch(spec)
    count = int(match.group(1) or 1) if match else 0
    if match is None or count < 1:
        raise UserError(f"not a machine: {spec!r}", hint="for example H100-SXM or 8xH100-SXM")
    found = device(match.group(2))
    name = found.name if count == 1 else f"{count}x{found.name}"
    return Machine(name=name, device=found, device_count=count, place=_named_place(place))


def cpu_power(threads: int) -> Fact:
    """Watts of a server processor that keeps `threads` hardware threads busy; always an assumption."""
    hosts = table("hosts.toml")
    per_thread = fact(hosts["cpu"]["power_w_per_thread"], hosts["sources"])
    return Fact(
        value=per_thread.value * threads,
        source=f"{per_thread.value} W x {threads} threads; {per_thread.source}",
        date=per_thread.date,
        kind=per_thread.kind,
    )


def efficiency(architecture: str, name: str = "") -> dict[str, Fact]:
    """Share of its peak that each class of large operators reaches. Where nobody measured the device, its
    architecture's stands in and is marked assumed. Raises UserError for an unknown architecture."""
    ratios = table("efficiency.toml")
    known = find(architecture, what="architecture", rows=ratios["architectures"])
    general = {key: fact(row, ratios["sources"]) for key, row in ratios["architectures"][known].items()}
    own = {key: fact(row, ratios["sources"]) for key, row in ratios["devices"].get(name, {}).items()}
    return {key: dataclasses.replace(one, kind="assumed") for key, one in general.items()} | own


def engine_facts(name: str) -> dict[str, tuple[str, str, str]]:
    """What is known of an engine's packages and upkeep: fact -> (value, source, date)."""
    engines = table("engines.toml")
    row: dict[str, list[Any]] = engines["engines"].get(name, {})
    sources = {key: engines["sources"][source] for key, (_, source) in row.items()}
    return {
        key: (str(value), sources[key]["source"], sources[key]["date"]) for key, (value, _) in row.items()
    }


_named_place = place  # `machine` has a parameter of that name


@functools.cache
def _device(name: str) -> Device:
    gpus, libraries = table("gpus.toml"), table("libraries.toml")
    sources = gpus["sources"] | libraries["sources"]
    row = gpus["devices"][name] | libraries["devices"].get(name, {})
    return Device(
        name=name,
        kind="cuda",
        peak_flops={dtype: fact(peak, sources) for dtype, peak in row["peak_flops"].items()},
        link=link(row["link"]) if "link" in row else None,
        efficiency_ratio=efficiency(row["architecture"], name),
        **facts(row, sources, _DEVICE_FACTS),
    )


@functools.cache
def _link(room: str, name: str) -> Link:
    links = table("links.toml")
    return Link(name=name, **facts(links[room][name], links["sources"], ("bytes_s", "latency_s")))


@functools.cache
def _place(name: str) -> Place:
    places = table("places.toml")
    keys = ("usd_per_kwh", "co2_g_per_kwh", "pue_ratio")
    return Place(name=name, **facts(places["places"][name], places["sources"], keys))
