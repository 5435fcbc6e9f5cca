"""The catalog: every row sourced, dated and sane; names forgiving; a user's file strict."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.types.errors import UserError
from memfit.types.machine import Device, Fact

GIB = 2**30
DATE = re.compile(r"20\d\d(-\d\d(-\d\d)?)?")
DEVICES = [catalog.device(name) for name in catalog.device_names()]
NETWORKS = [catalog.network(name) for name in catalog.network_names()]
PLACES = [catalog.place(name) for name in catalog.place_names()]


def _facts(noun: Any) -> Iterator[Fact]:
    for name in noun.__dataclass_fields__:
        value = getattr(noun, name)
        if isinstance(value, Fact):
            yield value
        elif isinstance(value, dict):
            yield from value.values()
        elif hasattr(value, "__dataclass_fields__"):
            yield from _facts(value)


@pytest.mark.parametrize("noun", [*DEVICES, *PLACES, *NETWORKS], ids=lambda n: n.name)
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


@pytest.mark.parametrize("file", ["gpus.toml", "places.toml", "hosts.toml"])
def test_every_source_is_used(file: str) -> None:
    text = (files("memfit.catalog") / file).read_text(encoding="utf-8")
    for key in tomllib.loads(text)["sources"]:
        assert f'"{key}"]' in text, f"{file}: nothing cites {key}"


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_device_is_physically_plausible(device: Device) -> None:
    assert device.kind == "cuda"
    assert device.bandwidth_bytes_s is not None
    assert 200e9 < device.bandwidth_bytes_s.value < 10e12
    assert device.power_w is not None
    assert 50 <= device.power_w.value <= 1200
    assert device.usd_per_hour is None or 0.1 < device.usd_per_hour.value < 15
    peaks = {dtype: fact.value for dtype, fact in device.peak_flops.items()}
    assert set(peaks) <= {"float32", "tf32", "float16", "bfloat16", "float8"}
    assert 5e12 < peaks["float32"] <= peaks["float16"]
    # half the bytes, twice the rate: a sparse figure in one row but not in the other would break this
    if "bfloat16" in peaks:
        assert peaks["bfloat16"] == peaks["float16"]
        assert 1.95 <= peaks["float16"] / peaks["tf32"] <= 2.05
    if "float8" in peaks:
        assert 1.95 <= peaks["float8"] / peaks["float16"] <= 2.05


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_what_a_device_reaches_of_its_peak_is_plausible(device: Device) -> None:
    ratios = {kind: fact.value for kind, fact in device.efficiency_ratio.items()}
    assert {"matmul", "matmul_float32", "attention", "attention_backward", "memory", "link"} <= set(ratios)
    assert 0.4 <= ratios["matmul"] <= 1.1
    assert 0.1 <= ratios["attention_backward"] < ratios["attention"] <= 1.0
    assert 0.7 <= ratios["memory"] < 0.95
    assert ("matmul_float8" in ratios) >= ("float8" in device.peak_flops)
    assert device.link is not None


def test_what_nobody_measured_is_its_architectures_and_says_so() -> None:
    h100, variant = catalog.device("H100-SXM"), catalog.device("H100-96GB-HBM2e")
    assert h100.efficiency_ratio["attention"].kind == "published"
    assert variant.efficiency_ratio["attention"].kind == "assumed"
    assert variant.efficiency_ratio["attention"].value == h100.efficiency_ratio["attention"].value
    with pytest.raises(UserError, match="unknown architecture"):
        catalog.efficiency("hoper")


def test_links_of_known_devices() -> None:
    """Data sheets print the sum of both directions: 300, 600, 900 and 1,800 GB/s."""
    names = ("V100-32GB", "A100-80GB", "H100-SXM", "B200", "MI300X")
    links = {name: catalog.device(name).link for name in names}
    assert [link.bytes_s.value / 1e9 for link in links.values() if link] == [150, 300, 450, 900, 448]


@pytest.mark.parametrize(
    ("name", "box_gb"),
    [("T4", 16), ("L40S", 48), ("A100-40GB-SXM", 40), ("A100-80GB-SXM", 80), ("H100-SXM", 80),
     ("H200-SXM", 141), ("RTX-4090", 24), ("RTX-5090", 32), ("V100-16GB-SXM2", 16), ("MI300X", 192)],
)  # fmt: skip
def test_usable_memory_is_a_little_less_than_the_number_on_the_box(name: str, box_gb: int) -> None:
    usable_gib = catalog.device(name).memory_bytes.value / GIB
    assert 0.9 * box_gb < usable_gib < box_gb


def test_dense_peaks_of_known_devices() -> None:
    """The data sheets print 1,979 (H100), 624 (A100) and 4,500 (B200) TFLOPS with sparsity."""
    bf16 = {
        name: catalog.device(name).peak_flops["bfloat16"].value
        for name in ("H100-SXM", "A100-80GB-SXM", "B200")
    }
    assert bf16["H100-SXM"] == pytest.approx(989e12, rel=0.01)
    assert bf16["A100-80GB-SXM"] == 312e12
    assert bf16["B200"] == 2250e12


def test_what_hardware_lacks_is_unknown_not_guessed() -> None:
    assert "bfloat16" not in catalog.device("T4").peak_flops
    assert "float8" not in catalog.device("A100-80GB-SXM").peak_flops
    assert catalog.device("V100-32GB").usd_per_hour is None


def test_places_are_plausible() -> None:
    co2 = {p.name: p.co2_g_per_kwh.value for p in PLACES}
    assert co2["sweden"] < 60
    assert co2["france"] < 60 < co2["uk"] < co2["world"] < co2["india"]
    for one in PLACES:
        assert 0.05 < one.usd_per_kwh.value < 0.5
        assert 10 < one.co2_g_per_kwh.value < 900
        assert 1.0 <= one.pue_ratio.value < 2.0


@pytest.mark.parametrize(
    ("given_name", "found"),
    [("h100 sxm", "H100-SXM"), ("H100_SXM5", "H100-SXM"), ("NVIDIA H100 80GB HBM3", "H100-SXM"),
     ("NVIDIA H100 PCIe", "H100-PCIe"), ("Tesla V100-SXM2-16GB", "V100-16GB-SXM2"), ("Tesla T4", "T4"),
     ("NVIDIA A100-SXM4-80GB", "A100-80GB-SXM"), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
     ("rtx4090", "RTX-4090"), ("AMD Instinct MI300X", "MI300X"), ("nvidia l4", "L4")],
)  # fmt: skip
def test_names_are_found_as_people_and_torch_write_them(given_name: str, found: str) -> None:
    assert catalog.device(given_name).name == found


@given(st.sampled_from(catalog.device_names()), st.sampled_from(["", " ", "-", "_", "."]), st.booleans())
def test_case_and_punctuation_never_matter(name: str, separator: str, upper: bool) -> None:
    spelled = name.replace("-", separator)
    assert catalog.device(spelled.upper() if upper else spelled.lower()).name == name


@pytest.mark.parametrize(
    ("given_name", "suggested"),
    [("H100-SMX", ["H100-SXM"]), ("RTX 4900", ["RTX-4090"]), ("H100", ["H100-SXM", "H100-PCIe"]),
     ("A100", ["A100-40GB-SXM", "A100-80GB-SXM"])],
)  # fmt: skip
def test_a_typo_or_an_ambiguous_name_is_told_what_is_near(given_name: str, suggested: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        catalog.device(given_name)
    assert caught.value.given == f"unknown device: {given_name!r}"
    assert all(name in caught.value.hint for name in suggested)
    assert "\n" not in str(caught.value)
    assert "MI300X" in caught.value.allowed


def test_nothing_near_gives_the_list_and_no_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        catalog.place("zzzz")
    assert caught.value.hint == ""
    assert "japan" in caught.value.allowed


@pytest.mark.parametrize(
    ("spec", "name", "count"),
    [("H100-SXM", "H100-SXM", 1), ("8xH100-SXM", "8xH100-SXM", 8), ("8 x h100 sxm", "8xH100-SXM", 8),
     ("1xT4", "T4", 1), ("2XA10G", "2xA10G", 2)],
)  # fmt: skip
def test_machine_specs(spec: str, name: str, count: int) -> None:
    made = catalog.machine(spec, "Japan")
    assert (made.name, made.device_count) == (name, count)
    assert made.place == catalog.place("jp")


def test_machine_is_in_the_world_unless_told() -> None:
    assert catalog.machine("T4").place == catalog.place("world")


@pytest.mark.parametrize("spec", ["", "  ", "0xT4", "-1xT4", "8x", "xT4", "8xNOPE"])
def test_bad_machine_specs_are_the_users_mistake(spec: str) -> None:
    with pytest.raises(UserError):
        catalog.machine(spec)


def test_cpu_power_is_an_assumption_that_says_so() -> None:
    fact = catalog.cpu_power(2)
    assert fact.value == pytest.approx(7.6)
    assert fact.kind == "assumed"
    assert "2 threads" in fact.source


FULL = """
name = "lab box"
device_count = 2
place = "sweden"
[device]
name = "Custom"
kind = "cuda"
memory_bytes = {value = 5e10, source = "torch total_memory", date = "2025-06-01", kind = "measured"}
peak_flops.bfloat16 = {value = 1.8e14, source = "data sheet", date = "2024-03"}
"""

OWN_PLACE = """
name = "m"
device = "rtx 4090"
[place]
name = "desk"
usd_per_kwh = {row}
co2_g_per_kwh = {row}
pue_ratio = {row}
"""


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "machine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_users_own_machine(tmp_path: Path) -> None:
    made = catalog.from_toml(_written(tmp_path, FULL))
    assert made.device_count == 2
    assert made.place == catalog.place("sweden")
    assert made.device.memory_bytes == Fact(
        value=5e10, source="torch total_memory", date="2025-06-01", kind="measured"
    )
    assert made.device.peak_flops["bfloat16"].kind == "published"
    assert made.device.power_w is None


def test_a_users_machine_may_name_a_device_and_write_a_place(tmp_path: Path) -> None:
    row = '{value = 1.0, source = "own meter", date = "2025"}'
    made = catalog.from_toml(_written(tmp_path, OWN_PLACE.format(row=row)))
    assert made.device == catalog.device("RTX-4090")
    assert made.place is not None
    assert made.place.name == "desk"


def test_all_problems_of_a_file_are_told_in_one_line(tmp_path: Path) -> None:
    text = FULL.replace("device_count", "device_cuont").replace('kind = "cuda"', "power_watts = 3")
    text = text.replace('date = "2024-03"', 'dat = "2024-03"')
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert "device_cuont: unknown key (did you mean device_count?)" in message
    assert "device.power_watts: unknown key" in message
    assert "device.peak_flops.bfloat16.dat: unknown key (did you mean date?)" in message
    assert "device.kind: " in message
    assert "device.peak_flops.bfloat16.date: " in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [("device_count = 2", "device_count = 0", "device_count: 0"), ('"cuda"', '"tpu"', "device.kind: 'tpu'"),
     ("5e10", "-1", "device.memory_bytes: -1"), ("1.8e14", "0", "device.peak_flops.bfloat16: 0"),
     ('"measured"', '"guessed"', "device.memory_bytes"), ('"sweden"', '"swedn"', "did you mean sweden"),
     ("5e10", "nan", "device.memory_bytes: nan"), ("5e10", '"lots"', "device.memory_bytes.value"),
     ('name = "lab box"', "name = lab box", "is not TOML")],
)  # fmt: skip
def test_what_cannot_be_true_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, FULL.replace(old, new)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        catalog.from_toml(tmp_path / "none.toml")


def test_a_site_draws_at_least_what_its_computers_draw(tmp_path: Path) -> None:
    row = '{value = 0.9, source = "own meter", date = "2025"}'
    with pytest.raises(UserError, match=r"place\.pue_ratio"):
        catalog.from_toml(_written(tmp_path, OWN_PLACE.format(row=row)))


def test_catalog_loads_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from memfit import catalog; catalog.machine('8xH100-SXM');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
