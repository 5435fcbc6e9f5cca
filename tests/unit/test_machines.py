"""Machines in one word, and machines as a user's file: hosts, devices, network, place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.types.errors import UserError
from memfit.types.machine import Fact


@pytest.mark.parametrize(
    ("spec", "name", "count"),
    [("H100-SXM", "H100-SXM", 1), ("8xH100-SXM", "8xH100-SXM", 8), ("8 x h100 sxm", "8xH100-SXM", 8),
     ("1xT4", "T4", 1), ("2XA10G", "2xA10G", 2), ("64x8xH100-SXM@IB-NDR", "64x8xH100-SXM@IB-NDR", 512),
     ("16*h100-sxm @ ndr", "2x8xH100-SXM@IB-NDR", 16), ("1 x 8 x H100 SXM", "8xH100-SXM", 8),
     ("8xB200@roce 400g", "8xB200@RoCE-400G", 8), ("1x T4@efa", "T4@EFA-v1", 1)],
)  # fmt: skip
def test_machine_specs(spec: str, name: str, count: int) -> None:
    made = catalog.machine(spec, "Japan")
    assert (made.name, made.device_count) == (name, count)
    assert made.place == catalog.place("jp")


def test_machine_is_in_the_world_unless_told() -> None:
    assert catalog.machine("T4").place == catalog.place("world")


@pytest.mark.parametrize(
    "spec",
    ["", "  ", "0xT4", "-1xT4", "8x", "xT4", "8xNOPE", "8xT4@", "@IB-NDR", "T4@x@y", "2x2x2xT4",
     "0x8xT4@IB-NDR", "T4@IB-NRD"],
)  # fmt: skip
def test_bad_machine_specs_are_the_users_mistake(spec: str) -> None:
    with pytest.raises(UserError):
        catalog.machine(spec)


@given(
    st.sampled_from(catalog.device_names()),
    st.integers(1, 200),
    st.integers(1, 80),
    st.sampled_from(catalog.network_names()),
)
def test_a_spelled_machine_reads_as_itself(name: str, hosts: int, each: int, network: str) -> None:
    made = catalog.machine(f"{hosts}x{each}x{name}@{network}")
    again = catalog.machine(made.name)
    assert again == made
    assert made.device_count == hosts * each
    assert made.network is not None
    if hosts > 1:
        assert made.devices_per_host == each


def test_several_hosts_need_a_network_and_the_line_names_them() -> None:
    with pytest.raises(UserError) as caught:
        catalog.machine("4x8xH100-SXM")
    assert "is 4 hosts and names no network" in str(caught.value)
    assert "IB-NDR" in caught.value.allowed
    assert "4x8xH100-SXM@IB-NDR" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_devices_that_fill_no_whole_number_of_hosts_are_refused() -> None:
    with pytest.raises(UserError, match="HGX-H100 holds 8"):
        catalog.machine("12xH100-SXM@IB-NDR")


def test_more_devices_than_a_host_holds_are_named() -> None:
    made = catalog.machine("16xH100-SXM")
    assert made.host is not None
    assert made.host.name == "HGX-H100 with 16 devices"
    assert made.host.memory_bytes == catalog.host("HGX-H100").memory_bytes


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
