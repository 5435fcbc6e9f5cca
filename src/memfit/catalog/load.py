"""The shipped TOML tables as nouns. A name is found whatever its case, spaces, dashes and brand words."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from importlib.resources import files
from typing import Any, Final

from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Machine, Place

_BRANDS: Final = re.compile(r"\b(nvidia|amd|tesla|geforce|instinct)\b")
_DEVICE_FACTS: Final = (
    "memory_bytes", "bandwidth_bytes_s", "power_w", "usd_per_hour", "usd_to_buy", "context_bytes",
    "kernels_bytes", "blas_workspace_bytes", "nccl_channels", "nccl_multicast_channels",
)  # fmt: skip
_COUNTED: Final = re.compile(r"\s*(?:(\d+)\s*[xX*×]\s*)?(\S.*?)\s*")


def device_names() -> tuple[str, ...]:
    """Every accelerator of the catalog, in the order of the file."""
    return tuple(_table("gpus.toml")["devices"])


def place_names() -> tuple[str, ...]:
    return tuple(_table("places.toml")["places"])


def device(name: str) -> Device:
    """``"h100 sxm"``, ``"H100-SXM"`` and torch's ``"NVIDIA H100 80GB HBM3"`` are one device.

    Raises UserError with the closest names; a name that fits two devices (``"A100"``) is no name.
    """
    return _device(_find(name, what="device", table=_table("gpus.toml")["devices"]))


def place(name: str) -> Place:
    """A country or ``"world"``. Raises UserError with the closest names."""
    return _place(_find(name, what="place", table=_table("places.toml")["places"]))


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
    table = _table("hosts.toml")
    per_thread = _fact(table["cpu"]["power_w_per_thread"], table["sources"])
    return Fact(
        value=per_thread.value * threads,
        source=f"{per_thread.value} W x {threads} threads; {per_thread.source}",
        date=per_thread.date,
        kind=per_thread.kind,
    )


def engine_facts(name: str) -> dict[str, tuple[str, str, str]]:
    """What is known of an engine's packages and upkeep: fact -> (value, source, date)."""
    table = _table("engines.toml")
    row: dict[str, list[Any]] = table["engines"].get(name, {})
    sources = {key: table["sources"][source] for key, (_, source) in row.items()}
    return {
        key: (str(value), sources[key]["source"], sources[key]["date"]) for key, (value, _) in row.items()
    }


_named_place = place  # `machine` has a parameter of that name


@functools.cache
def _table(file: str) -> dict[str, Any]:
    return tomllib.loads((files("memfit.catalog") / file).read_text(encoding="utf-8"))


@functools.cache
def _device(name: str) -> Device:
    table, libraries = _table("gpus.toml"), _table("libraries.toml")
    sources = table["sources"] | libraries["sources"]
    row = table["devices"][name] | libraries["devices"].get(name, {})
    return Device(
        name=name,
        kind=row["kind"],
        peak_flops={dtype: _fact(fact, sources) for dtype, fact in row["peak_flops"].items()},
        **{key: _fact(row[key], sources) for key in _DEVICE_FACTS if key in row},
    )


@functools.cache
def _place(name: str) -> Place:
    table = _table("places.toml")
    row = table["places"][name]
    return Place(
        name=name, **{key: _fact(fact, table["sources"]) for key, fact in row.items() if key != "aliases"}
    )


def _fact(row: list[Any], sources: dict[str, dict[str, str]]) -> Fact:
    """``[value, source]`` or ``[value, source, low, high]``."""
    value, key, *bounds = row
    low, high = map(float, bounds) if bounds else (None, None)
    return Fact(value=float(value), low=low, high=high, **sources[key])


def _find(given: str, *, what: str, table: dict[str, Any]) -> str:
    """The table's own name for `given`. Raises UserError."""
    known = {_plain(a): name for name, row in table.items() for a in (name, *row.get("aliases", ()))}
    wanted = _plain(given)
    if wanted in known:
        return known[wanted]
    near = _closest(wanted, known)
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"unknown {what}: {given!r}", allowed=", ".join(table), hint=hint)


def _closest(wanted: str, known: dict[str, str]) -> tuple[str, ...]:
    """Names that begin so, else those that look alike; none twice."""
    begins = [key for key in known if wanted and key.startswith(wanted)]
    alike = begins or difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    return tuple(dict.fromkeys(known[key] for key in alike))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _BRANDS.sub("", name.lower()))
