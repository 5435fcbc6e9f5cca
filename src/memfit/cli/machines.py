"""``memfit list machines``: the machines of the catalog, or every figure of one entry with its source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final

from memfit import catalog
from memfit.catalog.machine_file import facts_in
from memfit.cli.output import emit, print_table
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Host, Link, Place
from memfit.types.units import GIB

# The end of a fact's name -> (divisor for display, unit after the division).
_UNITS: Final = {
    "usd_per_kwh": (1, "USD/kWh"),
    "co2_g_per_kwh": (1, "g CO2/kWh"),
    "usd_per_hour": (1, "USD/h"),
    "usd_to_buy": (1, "USD"),
    "bytes_s": (1e9, "GB/s"),
    "bytes": (GIB, "GiB"),
    "latency_s": (1e-6, "us"),
    "power_w": (1, "W"),
    "embodied_kg": (1, "kg CO2"),
    "peak_flops": (1e12, "TFLOPS"),
}


def print_machines(name: str | None, *, as_json: bool) -> None:
    """Print the devices, networks, hosts and places of the catalog, with ``as_json`` also the links, or every
    figure of the entry ``name`` with its source. Raises UserError for an unknown name."""
    if name is not None:
        kind, entry = _find_entry(name)
        if as_json:
            emit({kind: entry})
        else:
            _print_one(kind, entry)
        return
    catalog_entries: dict[str, list[Any]] = {
        "devices": [catalog.device(name) for name in catalog.device_names()],
        "links": [catalog.link(name) for name in catalog.link_names()],
        "networks": [catalog.network(name) for name in catalog.network_names()],
        "hosts": [catalog.host(name) for name in catalog.host_names()],
        "places": [catalog.place(name) for name in catalog.place_names()],
    }
    if as_json:
        emit(catalog_entries)
        return
    print_table(
        ("device", "GiB", "TB/s", "16-bit TFLOPS", "link", "W", "USD/h", "USD", "host"),
        map(_device, catalog_entries["devices"]),
    )
    print_table(("network", "GB/s per device", "latency us"), map(_network, catalog_entries["networks"]))
    print_table(
        ("host", "devices", "memory GiB", "GB/s per device", "GB/s in total", "W"),
        map(_host, catalog_entries["hosts"]),
    )
    print_table(("place", "USD/kWh", "g CO2/kWh"), map(_place, catalog_entries["places"]))
    print("--on takes hosts x devices x device @ network, for example 64x8xH100-SXM@IB-NDR, or FILE.toml.")
    print("`memfit list machines NAME` shows every figure of one entry with its source and date.")


def _print_one(kind: str, entry: Any) -> None:
    """Print ``kind`` and the entry's name; a table of its figures, each with its range, if it has one, and
    the number of its source; and the sources by number."""
    sources: dict[str, int] = {}
    rows = []
    for path, fact in facts_in(entry):
        source_text = f"{fact.source} ({fact.kind}, {fact.date})"
        scale, unit = _unit(path)
        spread = "" if None in (fact.low, fact.high) else f"{_at(fact.low, scale)} to {_at(fact.high, scale)}"
        number = sources.setdefault(source_text, len(sources) + 1)
        rows.append((path, f"{_at(fact.value, scale)} {unit}".strip(), spread, str(number)))
    print(f"{kind} {entry.name}")
    print_table(("figure", "value", "range", "source"), rows)
    for source_text, number in sources.items():
        print(f"{number:3}  {source_text}")


def _find_entry(name: str) -> tuple[str, Any]:
    """Return (the kind, the entry) that ``name`` names in the catalog. The kinds are tried in this order:
    "machine", "network", "host", "link", "place"; a ``name`` that ends in .toml is a file with a machine. A
    machine of the catalog is returned with ``place`` None: where its electricity comes from is the user's
    choice, not a figure of the machine. Raises UserError if nothing has the name, with the nearest name of
    each kind that has a similar one; also for an invalid file, and for an invalid machine such as
    ``0xH100-SXM``."""
    if name.endswith(".toml"):
        return "machine", catalog.from_toml(name)
    loaders: dict[str, Callable[[], Any]] = {
        "machine": lambda: dataclasses.replace(catalog.machine(name), place=None),
        "network": lambda: catalog.network(name),
        "host": lambda: catalog.host(name),
        "link": lambda: catalog.link(name),
        "place": lambda: catalog.place(name),
    }
    hints = []
    for kind, load in loaders.items():
        try:
            return kind, load()
        except UserError as error:
            if kind == "machine" and not error.given.startswith("unknown device"):
                raise
            hints.append(error.hint)
    matches = (re.match(r"did you mean ([^?]+)\?", hint) for hint in hints)
    candidates = " or ".join(match[1] for match in matches if match is not None)
    did_you_mean_or_list = (
        f"did you mean {candidates}?"
        if candidates
        else "`memfit list machines` lists them, links only with --json"
    )
    raise UserError(
        f"no machine, network, host, link or place has the name {name!r}", hint=did_you_mean_or_list
    )


def _unit(path: str) -> tuple[float, str]:
    units = (unit for end, unit in _UNITS.items() if path.endswith(end) or f"{end}." in path)
    return next(units, (1, ""))


def _at(value: float | None, scale: float) -> str:
    scaled = (value or 0.0) / scale
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"


def _number(fact: Fact | None, scale: float = 1) -> str:
    return "" if fact is None else _at(fact.value, scale)


def _device(device: Device) -> tuple[str, ...]:
    peak = device.peak_flops.get("bfloat16", device.peak_flops.get("float16"))
    return (
        device.name,
        _number(device.memory_bytes, GIB),
        _number(device.bandwidth_bytes_s, 1e12),
        _number(peak, 1e12),
        device.link.name if device.link else "",
        _number(device.power_w),
        _number(device.usd_per_hour),
        _number(device.usd_to_buy),
        catalog.host_of(device.name),
    )


def _network(network: Link) -> tuple[str, ...]:
    shared = catalog.network(network.name, 2).bytes_s != network.bytes_s
    rate = _number(network.bytes_s, 1e9) + (" for the host" if shared else "")
    return network.name, rate, _number(network.latency_s, 1e-6)


def _host(host: Host) -> tuple[str, ...]:
    return (
        host.name,
        str(catalog.devices_of(host.name)),
        _number(host.memory_bytes, GIB),
        _number(host.device_bytes_s, 1e9),
        _number(host.shared_bytes_s, 1e9),
        _number(host.power_w),
    )


def _place(place: Place) -> tuple[str, ...]:
    return place.name, _number(place.usd_per_kwh), _number(place.co2_g_per_kwh)
