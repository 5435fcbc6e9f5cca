"""Read a user's own machine file. Unknown keys and wrong values are errors, all reported at once.

::

    name = "lab cluster"
    hosts = 4                  # any two of hosts, devices_per_host and device_count (of all hosts together);
    devices_per_host = 2       # or one of the last two for a single host; without all three, one device
    network = "RoCE-100G"      # between hosts, or a [network] table with name and bytes_s
    host = "workstation"       # or a [host] table; by default the catalog's host for a device of the catalog
    place = "japan"            # or a [place] table with usd_per_kwh, co2_g_per_kwh and pue_ratio
    device = "RTX-4090"        # or a [device] table:

    [device]
    name = "Custom 48GB"
    kind = "cuda"              # torch's name: cpu, cuda, xpu, mps
    architecture = "ada"       # its efficiency_ratio and gpu_target are used for what the table does not give
    gpu_target = "sm_89"       # of its kernels: sm_ and CUDA's compute capability, or AMD's target (gfx942)
    link = "PCIe4"             # or a table
    memory_bytes = {value = 50e9, source = "torch total_memory", date = "2025-06-01", kind = "measured"}
    peak_flops.bfloat16 = {value = 180e12, source = "data sheet", date = "2024-03"}

A device of the catalog with its own price or other figures::

    [device]
    base = "H100-SXM"          # its figures are used where the table gives none
    usd_per_hour = {value = 1.85, source = "our contract", date = "2026-11-01"}
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from memfit.catalog import load
from memfit.files.read import read_toml
from memfit.types.device_kind import device_kinds
from memfit.types.errors import UserError, suggest
from memfit.types.machine import Device, Fact, Machine

# Keys of the file that are not fields of the data type.
_OWN_KEYS: Final = {Machine: ("hosts",), Device: ("architecture", "base")}


def from_toml(path: str | Path) -> Machine:
    """Return the machine that a TOML file describes.

    Raises UserError if the file cannot be read or is not TOML. Otherwise raises one UserError that lists the
    problems: unknown or missing keys, values of a wrong type, names that the catalog does not have,
    contradictory counts, and impossible values. The last are looked for only if the others leave a machine.
    """
    data = read_toml(Path(path))
    problems = [*_resolve_counts(data), *_resolve_names(data)]
    problems += _unknown_keys(Machine, data)
    machine, build_problems = _build(data)
    reported_keys = {problem.partition(":")[0] for problem in problems}
    problems += [
        build_problem
        for build_problem in build_problems
        if build_problem.partition(":")[0] not in reported_keys
    ]
    if machine is not None:
        problems += _impossible_values(machine)
    if problems or machine is None:
        raise UserError(
            f"machine file {path} has keys that are missing, unknown or have a wrong value: "
            f"{'; '.join(problems)}",
            hint="docs/several-gpus.md has an example of a machine file",
        )
    return machine


def _resolve_counts(data: dict[str, Any]) -> Iterator[str]:
    """Complete the counts in ``data``: remove ``hosts``, and set ``device_count`` and ``devices_per_host``,
    the latter to 0 if all devices are in one host. Yield a text for each problem with the counts; some
    problems leave ``device_count`` and ``devices_per_host`` as they were.

    Any two of the three give the third. ``device_count`` or ``devices_per_host`` alone means that many
    devices in one host; ``hosts`` = 1 alone, or none of the three, means one device. Problems are a count
    that is not a whole number of at least 1, counts that contradict each other, several ``hosts`` without
    another count, and several hosts without a network.
    """
    counts = {key: data.get(key) for key in ("hosts", "devices_per_host", "device_count")}
    hosts, devices_per_host, count = counts.values()
    data.pop("hosts", None)
    problems = [
        f"{k}: {v!r}, but a whole number of at least 1 is needed"
        for k, v in counts.items()
        if _is_invalid_count(v)
    ]
    if problems:
        yield from problems
        return
    if hosts and devices_per_host:
        total = hosts * devices_per_host
        if count not in (None, total):
            yield f"device_count: {count}, but {hosts} hosts of {devices_per_host} devices are {total}"
    elif hosts and hosts > 1 and count is None:
        yield f"hosts: {hosts}, but both devices_per_host and device_count are missing"
        return
    else:
        total = count or devices_per_host or 1
        divisor, divisor_name = (
            (devices_per_host, "devices_per_host") if devices_per_host else (hosts or 1, "hosts")
        )
        if total % divisor:
            yield f"device_count: {total} is not a multiple of {divisor_name}, {divisor}"
            return
        devices_per_host = divisor if devices_per_host else total // divisor
    hosts = total // devices_per_host
    data |= {"device_count": total, "devices_per_host": devices_per_host if hosts > 1 else 0}
    if hosts > 1 and "network" not in data:
        names = ", ".join(load.network_names())
        yield f"network: missing, but {hosts} hosts need one; give a [network] table or one of {names}"


def _is_invalid_count(count: Any) -> bool:
    return count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1)


def _resolve_names(data: dict[str, Any]) -> Iterator[str]:
    """Replace the names of a device, its base, a host, network, place, link and architecture in ``data`` by
    what the catalog has for them. Yield a text for each name that the catalog does not have.

    A device of the catalog adds its host if ``data`` has none. The architecture of a [device] table gives
    the table those efficiency ratios and the ``gpu_target`` that it lacks, and is removed. Yield a text also
    for an architecture that is not a name.
    """
    devices_per_host = data.get("devices_per_host") or data.get("device_count") or 1
    devices_per_host = 1 if _is_invalid_count(devices_per_host) else devices_per_host
    yield from _resolve_base(data)
    device = data.get("device")
    yield from _resolve_name(data, "device", load.device)
    if isinstance(data.get("device"), Device) and "host" not in data:
        data["host"] = load.host_of(data["device"].name) or None
    yield from _resolve_name(data, "place", load.place)
    yield from _resolve_name(data, "host", lambda name: load.host(name, devices_per_host))
    yield from _resolve_name(data, "network", lambda name: load.network(name, devices_per_host))
    if isinstance(device, dict):
        yield from _resolve_name(device, "link", load.link, "device.")
        if isinstance(device.get("architecture"), str):
            device.setdefault("gpu_target", load.gpu_target(device["architecture"]))
        yield from _resolve_name(device, "architecture", load.efficiency, "device.")
        architecture_ratios = device.pop("architecture", {})
        device_ratios = device.get("efficiency_ratio", {})
        if not isinstance(architecture_ratios, (str, dict)):
            yield f"device.architecture: {architecture_ratios!r}, but a name such as 'ampere' is needed"
        elif isinstance(architecture_ratios, dict) and isinstance(device_ratios, dict):
            device["efficiency_ratio"] = architecture_ratios | device_ratios


def _resolve_base(data: dict[str, Any]) -> Iterator[str]:
    """Complete a [device] table that has a ``base``, the name of a device of the catalog, with that device's
    figures, for those that the table does not give; of ``peak_flops`` and ``efficiency_ratio``, also for the
    entries that the table does not give. Add that device's host if ``data`` has none. If the catalog does not
    have the base, yield that as a text and set the device to None.
    """
    table = data.get("device")
    if not isinstance(table, dict) or "base" not in table:
        return
    try:
        base_device = load.device(str(table.pop("base")))
    except UserError as error:
        yield f"device: base: {error}"
        data["device"] = None
        return
    base_fields = {field.name: getattr(base_device, field.name) for field in dataclasses.fields(base_device)}
    for key in ("peak_flops", "efficiency_ratio"):
        if isinstance(table.get(key), dict):
            table[key] = {**base_fields[key], **table[key]}
    data["device"] = base_fields | table
    data.setdefault("host", load.host_of(base_device.name) or None)


def _resolve_name(
    data: dict[str, Any], key: str, lookup: Callable[[str], Any], prefix: str = ""
) -> Iterator[str]:
    if isinstance(data.get(key), str):
        try:
            data[key] = lookup(data[key])
        except UserError as error:
            yield f"{prefix}{key}: {error}"


def _build(data: dict[str, Any]) -> tuple[Machine | None, list[str]]:
    import pydantic

    try:
        return pydantic.TypeAdapter(Machine).validate_python(data), []
    except pydantic.ValidationError as error:
        return None, [f"{'.'.join(map(str, e['loc']))}: {_problem_text(e)}" for e in error.errors()]


def _problem_text(error: Any) -> str:
    """Return the first line of the text of one of pydantic's errors, in lower case. For a bare number where
    a Fact is needed, return a text that says that the figure needs a source.
    """
    value = error["input"]
    if error["type"] == "dataclass_type" and isinstance(value, (int, float)):
        return f'{value}, but a figure needs a source: {{value = {value}, source = "...", date = "..."}}'
    return str(error["msg"].lower().partition("\n")[0])  # pytest adds lines to the text of an assertion


def _unknown_keys(data_type: Any, data: Any, prefix: str = "") -> Iterator[str]:
    """Yield a text for each key of ``data``, and of the tables in it, that is not a field of the dataclass
    ``data_type``, with the closest field if one is close. ``prefix``: the keys that lead to ``data``, with
    dots. If ``data`` is not a mapping, nothing is yielded.
    """
    if not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(data_type)
    for key, value in data.items():
        if key not in hints:
            hint = suggest(key, [*_OWN_KEYS.get(data_type, ()), *hints])
            yield f"{prefix}{key}: unknown key" + (f" ({hint})" if hint else "")
        elif typing.get_origin(hints[key]) is Mapping and isinstance(value, Mapping):
            for inner_key, table in value.items():
                yield from _unknown_keys(Fact, table, f"{prefix}{key}.{inner_key}.")
        elif (inner_type := _dataclass_in(hints[key])) is not None:
            yield from _unknown_keys(inner_type, value, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass in a type hint, such as ``Place`` for ``Place | None``; None if it has none."""
    return next((t for t in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(t)), None)


def _impossible_values(machine: Machine) -> Iterator[str]:
    """Yield a text for each value that has the right type but cannot be true: an unknown kind of device, a
    target of neither CUDA nor AMD, a PUE below 1, and figures of device, host and network that are not
    greater than 0.
    """
    if machine.device.kind not in (kinds := [kind.name for kind in device_kinds()]):
        yield f"device.kind: {machine.device.kind!r}, but one of {', '.join(kinds)} is needed"
    if not re.fullmatch(r"(sm_\d{2,3}|gfx[0-9a-f]+)?", machine.device.gpu_target):
        yield (
            f"device.gpu_target: {machine.device.gpu_target!r}, but sm_ with the compute capability (sm_89), "
            "or AMD's target (gfx942), is needed"
        )
    if machine.place is not None and machine.place.pue_ratio.value < 1:
        yield "place.pue_ratio: below 1, but a site draws at least what its computers draw"
    for part, part_name in ((machine.device, "device"), (machine.host, "host"), (machine.network, "network")):
        for name, fact in facts_in(part, part_name):
            if not fact.value > 0:
                yield f"{name}: {fact.value:g}, but a positive number is needed"


def facts_in(value: Any, where: str = "") -> Iterator[tuple[str, Fact]]:
    """Yield (path, Fact) for every Fact in ``value``, which may be a Fact, a mapping or a dataclass, and in
    what that contains, at any depth. All else is skipped.

    The path is ``where`` followed by the keys and fields that lead to the Fact, joined by dots, such as
    "device.peak_flops.bfloat16".
    """
    if isinstance(value, Fact):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from facts_in(inner, f"{where}.{key}".lstrip("."))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from facts_in(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
