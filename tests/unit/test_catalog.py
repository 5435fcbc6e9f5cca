"""The catalog: every row has a source, a date and plausible values, and names are matched leniently."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.catalog.tables import find
from memfit.types.device_kind import HOST, device_kinds
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact, Host

GIB = 2**30
DATE = re.compile(r"20\d\d(-\d\d(-\d\d)?)?")
DEVICES = [catalog.device(name) for name in catalog.device_names()]
NETWORKS = [catalog.network(name) for name in catalog.network_names()]
PLACES = [catalog.place(name) for name in catalog.place_names()]
HOSTS = [catalog.host(name) for name in catalog.host_names()]


def _facts(noun: Any) -> Iterator[Fact]:
    for name in noun.__dataclass_fields__:
        value = getattr(noun, name)
        if isinstance(value, Fact):
            yield value
        elif isinstance(value, dict):
            yield from value.values()
        elif hasattr(value, "__dataclass_fields__"):
            yield from _facts(value)


@pytest.mark.parametrize("noun", [*DEVICES, *PLACES, *NETWORKS, *HOSTS], ids=lambda n: n.name)
def test_every_row_has_a_source_and_a_date(noun: Any) -> None:
    rows = list(_facts(noun))
    assert rows
    for fact in rows:
        assert len(fact.source) > 10
        assert DATE.fullmatch(fact.date), fact
        assert fact.kind in ("measured", "published", "assumed")
        assert fact.value > 0
        assert fact.low is None or fact.low <= fact.value <= (fact.high or 0)
        assert ("recalled" in fact.source) <= (fact.kind == "assumed"), fact


@pytest.mark.parametrize("file", ["gpus", "places", "hosts", "links", "efficiency", "libraries"])
def test_every_source_is_cited(file: str) -> None:
    text = (files("memfit.catalog") / f"{file}.toml").read_text(encoding="utf-8")
    for key in tomllib.loads(text)["sources"]:
        assert re.search(rf'"{re.escape(key)}"[],]', text), f"{file}: nothing cites {key}"


def test_catalog_has_at_least_40_devices_40_places_and_20_networks() -> None:
    assert len(DEVICES) >= 40
    assert len(PLACES) >= 40
    assert len(NETWORKS) >= 20


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_device_is_physically_plausible(device: Device) -> None:
    assert device.kind in {kind.name for kind in device_kinds()} - {HOST}
    assert device.bandwidth_bytes_s is not None
    assert 200e9 < device.bandwidth_bytes_s.value < 10e12
    assert device.power_w is not None
    assert 50 <= device.power_w.value <= 1400
    assert device.usd_per_hour is None or 0.1 < device.usd_per_hour.value < 20
    assert device.embodied_kg is None or 50 < device.embodied_kg.value < 1000
    peaks = {dtype: fact.value for dtype, fact in device.peak_flops.items()}
    assert set(peaks) <= {"float32", "tf32", "float16", "bfloat16", "float8"}
    assert 5e12 < peaks["float32"] <= peaks["float16"]
    # half the bytes give twice the rate: a sparse figure in one row but not in the other would break this
    if "bfloat16" in peaks:
        assert peaks["bfloat16"] == peaks["float16"]
    if "tf32" in peaks:
        assert 1.95 <= peaks["float16"] / peaks["tf32"] <= 2.05
    if "float8" in peaks:
        assert 1.95 <= peaks["float8"] / peaks["float16"] <= 2.05


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_device_efficiency_ratios_are_plausible(device: Device) -> None:
    ratios = {kind: fact.value for kind, fact in device.efficiency_ratio.items()}
    assert {"matmul", "matmul_float32", "attention", "attention_backward", "memory", "link"} <= set(ratios)
    assert 0.4 <= ratios["matmul"] <= 1.1
    assert 0.1 <= ratios["attention_backward"] < ratios["attention"] <= 1.0
    assert 0.7 <= ratios["memory"] < 0.95
    assert ("matmul_float8" in ratios) >= ("float8" in device.peak_flops)
    assert device.link is not None


def test_unmeasured_efficiency_is_taken_from_the_architecture_and_marked_as_assumed() -> None:
    a100, export = catalog.device("A100-80GB-SXM"), catalog.device("A800-80GB-SXM")
    assert a100.efficiency_ratio["matmul"].kind == "published"
    assert export.efficiency_ratio["attention"].kind == "assumed"
    assert export.efficiency_ratio["attention"].value == a100.efficiency_ratio["attention"].value
    with pytest.raises(UserError, match="unknown architecture"):
        catalog.efficiency("hoper")


def test_link_bandwidths_of_known_devices_are_per_direction() -> None:
    """Data sheets print the sum of both directions: 300, 600, 900 and 1,800 GB/s."""
    names = ("V100-32GB", "A100-80GB", "H100-SXM", "B200", "MI300X")
    links = {name: catalog.device(name).link for name in names}
    assert [link.bytes_s.value / 1e9 for link in links.values() if link] == [150, 300, 450, 900, 448]


@pytest.mark.parametrize(
    ("name", "box_gb"),
    [
        ("T4", 16),
        ("L40S", 48),
        ("A100-40GB-SXM", 40),
        ("A100-80GB-SXM", 80),
        ("H100-SXM", 80),
        ("H200-SXM", 141),
        ("H100-96GB-HBM2e", 96),
        ("A30", 24),
        ("GH200-96GB", 96),
        ("B200", 192),
        ("B300", 288),
        ("H20", 96),
        ("RTX-4090", 24),
        ("RTX-5090", 32),
        ("V100-16GB-SXM2", 16),
        ("MI300X", 192),
    ],
)
def test_usable_memory_is_slightly_below_the_nominal_capacity(name: str, box_gb: int) -> None:
    usable_gib = catalog.device(name).memory_bytes.value / GIB
    assert 0.9 * box_gb < usable_gib < box_gb


def test_bf16_peaks_of_known_devices_are_without_sparsity() -> None:
    """The data sheets print 1,979 (H100), 624 (A100) and 4,500 (B200) TFLOPS with sparsity."""
    bf16 = {
        name: catalog.device(name).peak_flops["bfloat16"].value
        for name in ("H100-SXM", "A100-80GB-SXM", "B200")
    }
    assert bf16["H100-SXM"] == pytest.approx(989e12, rel=0.01)
    assert bf16["A100-80GB-SXM"] == 312e12
    assert bf16["B200"] == 2250e12


def test_values_that_a_device_lacks_are_missing_rather_than_guessed() -> None:
    assert "bfloat16" not in catalog.device("T4").peak_flops
    assert "float8" not in catalog.device("A100-80GB-SXM").peak_flops
    assert catalog.device("V100-32GB").usd_per_hour is None


def test_prices_emissions_and_pue_of_places_are_plausible() -> None:
    co2 = {p.name: p.co2_g_per_kwh.value for p in PLACES}
    assert co2["sweden"] < 60
    assert co2["france"] < 60 < co2["uk"] < co2["world"] < co2["india"]
    for one in PLACES:
        assert 0.05 < one.usd_per_kwh.value < 0.5
        assert 10 < one.co2_g_per_kwh.value < 900
        assert 1.0 <= one.pue_ratio.value < 2.0


@pytest.mark.parametrize(
    ("given_name", "found"),
    [
        ("h100 sxm", "H100-SXM"),
        ("H100_SXM5", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("Tesla V100-SXM2-16GB", "V100-16GB-SXM2"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("H100-80GB", "H100-SXM"),
        ("A100-SXM4-80GB", "A100-80GB-SXM"),
        ("A100-80GB", "A100-80GB-SXM"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("Tesla V100-PCIE-16GB", "V100-16GB-PCIe"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("AMD Instinct MI250X", "MI250X"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX-4070-Ti-Super"),
        ("rtx4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("nvidia l4", "L4"),
    ],
)
def test_devices_are_found_by_the_names_that_people_and_torch_use(given_name: str, found: str) -> None:
    assert catalog.device(given_name).name == found


@given(st.sampled_from(catalog.device_names()), st.sampled_from(["", " ", "-", "_", "."]), st.booleans())
def test_device_names_match_whatever_their_case_and_separators(
    name: str, separator: str, upper: bool
) -> None:
    spelled = name.replace("-", separator)
    assert catalog.device(spelled.upper() if upper else spelled.lower()).name == name


@pytest.mark.parametrize(
    ("given_name", "suggested"),
    [
        ("H100-SMX", ["H100-SXM"]),
        ("RTX 4900", ["RTX-4090"]),
        ("H100", ["H100-SXM", "H100-PCIe"]),
        ("A100", ["A100-40GB-SXM", "A100-80GB-SXM"]),
    ],
)
def test_a_misspelt_or_ambiguous_device_name_is_refused_with_similar_names(
    given_name: str, suggested: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        catalog.device(given_name)
    assert caught.value.given == f"unknown device: {given_name!r} is not in memfit's catalog"
    assert all(name in caught.value.hint for name in suggested)
    assert "\n" not in str(caught.value)
    assert "(`memfit list machines` lists all)" in caught.value.hint


@pytest.mark.parametrize("name", ["Gaudi3", "M3-Ultra", "Intel-Max-1550"])
def test_a_device_that_the_catalog_lacks_is_referred_to_a_machine_file(name: str) -> None:
    with pytest.raises(UserError) as caught:
        catalog.device(name)
    assert caught.value.hint.startswith("a machine file (--on FILE.toml) describes a device")
    assert len(str(caught.value)) < 200


def test_only_what_memfit_machines_lists_is_referred_to_it() -> None:
    rows: dict[str, dict[str, str]] = {f"C{n:02}": {} for n in range(20)}
    with pytest.raises(UserError) as caught:
        find("C1", what="currency", rows=rows)
    assert caught.value.allowed == ", ".join(rows)
    assert "memfit list machines" not in caught.value.hint
    with pytest.raises(UserError, match="NVLink5, ") as caught:
        catalog.link("NVLink")
    assert "memfit list machines" not in str(caught.value)


def test_an_unrecognisable_name_is_refused_with_the_list_and_no_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        catalog.place("zzzz")
    assert caught.value.hint == ""
    assert "japan" in caught.value.allowed


def test_part_of_a_host_gets_its_share_of_memory_storage_and_power() -> None:
    whole, part = catalog.host("HGX-H100"), catalog.host("dgx h100", 2)
    assert part.name == "1/4 of HGX-H100"
    for key in ("memory_bytes", "storage_bytes_s", "power_w"):
        assert getattr(part, key).value == getattr(whole, key).value / 4
        assert "1/4 of it" in getattr(part, key).source
    assert part.device_bytes_s == whole.device_bytes_s
    assert part.shared_bytes_s is not None
    assert part.device_bytes_s is not None
    assert part.shared_bytes_s.value == 2 * part.device_bytes_s.value
    assert catalog.host("HGX-H100", 8) == whole


def test_devices_of_a_host_share_an_ethernet_card_but_not_infiniband() -> None:
    one, eight = catalog.network("Ethernet-100G"), catalog.network("Ethernet-100G", 8)
    assert (one.bytes_s.value, eight.bytes_s.value) == (12.5e9, 12.5e9 / 8)
    assert catalog.network("IB-NDR", 8) == catalog.network("IB-NDR")


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_host_is_physically_plausible(host: Host) -> None:
    facts = (host.memory_bytes, host.device_bytes_s, host.shared_bytes_s, host.power_w)
    memory, device, shared, power = (fact.value if fact else 0.0 for fact in facts)
    assert 64e9 <= memory <= 20e12
    assert 9e9 <= device <= shared
    assert 50 <= power / catalog.devices_of(host.name) <= 700


def test_the_host_of_every_device_is_in_the_catalog() -> None:
    rooms = {name: catalog.host_of(name) for name in catalog.device_names()}
    assert {room for room in rooms.values() if room} <= set(catalog.host_names())
    assert rooms["H100-SXM"] == "HGX-H100"
    assert catalog.machine("MI300A").host is None


def test_cpu_power_is_marked_as_assumed_and_names_the_thread_count() -> None:
    fact = catalog.cpu_power(2)
    assert fact.value == pytest.approx(7.6)
    assert fact.kind == "assumed"
    assert "2 threads" in fact.source


def test_catalog_loads_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from memfit import catalog; catalog.machine('8xH100-SXM');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
