"""Machines by name and machines from a user's file: hosts, devices, network and place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit import catalog
from memfit.cli import main
from memfit.types.errors import UserError
from memfit.types.machine import Fact


@pytest.mark.parametrize(
    ("spec", "name", "count"),
    [
        ("H100-SXM", "H100-SXM", 1),
        ("8xH100-SXM", "8xH100-SXM", 8),
        ("8 x h100 sxm", "8xH100-SXM", 8),
        ("1xT4", "T4", 1),
        ("2XA10G", "2xA10G", 2),
        ("64x8xH100-SXM@IB-NDR", "64x8xH100-SXM@IB-NDR", 512),
        ("16*h100-sxm @ ndr", "2x8xH100-SXM@IB-NDR", 16),
        ("1 x 8 x H100 SXM", "8xH100-SXM", 8),
        ("1x16xH100-SXM@ndr", "1x16xH100-SXM@IB-NDR", 16),
        ("1x T4@efa", "T4@EFA-v1", 1),
        ("8xB200@roce 400g", "8xB200@RoCE-400G", 8),
    ],
)
def test_machine_names_are_parsed_and_normalised(spec: str, name: str, count: int) -> None:
    made = catalog.machine(spec, "Japan")
    assert (made.name, made.device_count) == (name, count)
    assert made.place == catalog.place("jp")


def test_a_machine_without_a_place_is_in_the_world() -> None:
    assert catalog.machine("T4").place == catalog.place("world")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "  ",
        "0xT4",
        "-1xT4",
        "8x",
        "xT4",
        "8xNOPE",
        "8xT4@",
        "@IB-NDR",
        "T4@x@y",
        "2x2x2xT4",
        "0x8xT4@IB-NDR",
        "T4@IB-NRD",
    ],
)
def test_a_malformed_machine_name_raises_a_user_error(spec: str) -> None:
    with pytest.raises(UserError):
        catalog.machine(spec)


@given(
    st.sampled_from(catalog.device_names()),
    st.integers(1, 200),
    st.integers(1, 80),
    st.sampled_from(catalog.network_names()),
)
def test_a_machines_own_name_parses_to_the_same_machine(
    name: str, hosts: int, each: int, network: str
) -> None:
    made = catalog.machine(f"{hosts}x{each}x{name}@{network}")
    again = catalog.machine(made.name)
    assert again == made
    assert made.device_count == hosts * each
    assert made.network is not None
    if hosts > 1:
        assert made.devices_per_host == each


def test_several_hosts_without_a_network_are_refused_with_the_known_networks() -> None:
    with pytest.raises(UserError) as caught:
        catalog.machine("4x8xH100-SXM")
    assert "has 4 hosts but names no network" in str(caught.value)
    assert "IB-NDR" in caught.value.allowed
    assert "4x8xH100-SXM@IB-NDR" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_devices_that_fill_no_whole_number_of_hosts_are_refused() -> None:
    with pytest.raises(UserError, match="HGX-H100 holds 8"):
        catalog.machine("12xH100-SXM@IB-NDR")


def test_a_host_with_more_devices_than_it_holds_says_so_in_its_name() -> None:
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


def test_a_machine_file_defines_a_device_of_its_own(tmp_path: Path) -> None:
    made = catalog.from_toml(_written(tmp_path, FULL))
    assert made.device_count == 2
    assert made.place == catalog.place("sweden")
    assert made.device.memory_bytes == Fact(
        value=5e10, source="torch total_memory", date="2025-06-01", kind="measured"
    )
    assert made.device.peak_flops["bfloat16"].kind == "published"
    assert made.device.power_w is None


def test_a_machine_file_may_name_a_catalog_device_and_define_a_place(tmp_path: Path) -> None:
    row = '{value = 1.0, source = "own meter", date = "2025"}'
    made = catalog.from_toml(_written(tmp_path, OWN_PLACE.format(row=row)))
    assert made.device == catalog.device("RTX-4090")
    assert made.place is not None
    assert made.place.name == "desk"


OWN_PRICE = """
name = "ours"
device_count = 8
[device]
base = "H100-SXM"
usd_per_hour = {value = 1.85, source = "our contract", date = "2026-11-01"}
peak_flops.bfloat16 = {value = 9e14, source = "our runs", date = "2026-11-01", kind = "measured"}
"""


def test_a_machine_file_may_change_the_price_and_rates_of_a_catalog_device(tmp_path: Path) -> None:
    made, plain = catalog.from_toml(_written(tmp_path, OWN_PRICE)), catalog.machine("8xH100-SXM")
    assert made.device.usd_per_hour == Fact(value=1.85, source="our contract", date="2026-11-01")
    assert made.device.peak_flops["bfloat16"].value == 9e14
    assert made.device.peak_flops["float8"] == plain.device.peak_flops["float8"]
    assert made.host == plain.host
    same = {"usd_per_hour": None, "peak_flops": {}}
    assert dataclasses.replace(made.device, **same) == dataclasses.replace(plain.device, **same)


def test_an_unknown_base_device_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, OWN_PRICE.replace("H100-SXM", "H100-SMX")))
    assert "device: base: " in str(caught.value)
    assert "H100-SXM" in str(caught.value)
    assert "input should" not in str(caught.value)


def test_all_problems_of_a_machine_file_are_listed_in_one_line(tmp_path: Path) -> None:
    text = FULL.replace("device_count", "device_cuont").replace('kind = "cuda"', "power_watts = 3")
    text = text.replace('date = "2024-03"', 'dat = "2024-03"')
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert "device_cuont: unknown key (did you mean 'device_count'?)" in message
    assert "device.power_watts: unknown key" in message
    assert "device.peak_flops.bfloat16.dat: unknown key (did you mean 'date'?)" in message
    assert "device.kind: " in message
    assert "device.peak_flops.bfloat16.date: " in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("device_count = 2", "device_count = 0", "device_count: 0"),
        ('"cuda"', '"tpu"', "device.kind: 'tpu', but one of cpu, cuda, xpu, mps"),
        ("5e10", "-1", "device.memory_bytes: -1"),
        ("1.8e14", "0", "device.peak_flops.bfloat16: 0"),
        (
            'name = "Custom"',
            'name = "Custom"\nusd_per_hour = 2',
            "device.usd_per_hour: 2, but a figure needs",
        ),
        ('"measured"', '"guessed"', "device.memory_bytes"),
        ('"sweden"', '"swedn"', "did you mean sweden"),
        ("5e10", "nan", "device.memory_bytes: nan"),
        ("5e10", '"lots"', "device.memory_bytes.value"),
        (
            'name = "lab box"',
            "name = lab box",
            "in name = lab box; allowed: text in straight quotation",
        ),
        ('name = "lab box"', "name = “lab box”", "in name = “lab box”; allowed: text in straight"),
        ("5e10", "50,000,000,000", "numbers without commas"),
        ('name = "lab box"', "[[device", "is not valid TOML"),
    ],
)
def test_impossible_values_in_a_machine_file_are_refused(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, FULL.replace(old, new)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_machine_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.toml: No such file"):
        catalog.from_toml(tmp_path / "none.toml")


def test_a_pue_ratio_below_1_is_refused(tmp_path: Path) -> None:
    row = '{value = 0.9, source = "own meter", date = "2025"}'
    with pytest.raises(UserError, match=r"place\.pue_ratio"):
        catalog.from_toml(_written(tmp_path, OWN_PLACE.format(row=row)))


CLUSTER = """
name = "lab cluster"
device = "A100-80GB"
hosts = 4
devices_per_host = 8
network = "hdr"
place = "japan"
"""


def test_a_cluster_file_gives_the_catalogs_machine_under_its_own_name(tmp_path: Path) -> None:
    made = catalog.from_toml(_written(tmp_path, CLUSTER))
    spelled = catalog.machine("4x8xA100-80GB-SXM@IB-HDR", "japan")
    assert made == dataclasses.replace(spelled, name="lab cluster")


@pytest.mark.parametrize(
    ("counts", "devices", "each"),
    [
        ("hosts = 4\ndevice_count = 8", 8, 2),
        ("devices_per_host = 2\ndevice_count = 8", 8, 2),
        ("devices_per_host = 4", 4, 0),
        ("device_count = 4", 4, 0),
        ("hosts = 1\ndevice_count = 4", 4, 0),
        ("hosts = 2\ndevices_per_host = 1", 2, 1),
        ("", 1, 0),
    ],
)
def test_missing_device_and_host_counts_are_derived_from_the_given_ones(
    tmp_path: Path, counts: str, devices: int, each: int
) -> None:
    made = catalog.from_toml(_written(tmp_path, CLUSTER.replace("hosts = 4\ndevices_per_host = 8", counts)))
    assert (made.device_count, made.devices_per_host) == (devices, each)
    assert made.host == catalog.host("HGX-A100", each or devices)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("hosts = 4", "hosts = 4\ndevice_count = 30", "device_count: 30, but 4 hosts of 8 devices are 32"),
        ("hosts = 4", "device_count = 30", "device_count: 30 is not a multiple of devices_per_host, 8"),
        ("devices_per_host = 8", "device_count = 6", "device_count: 6 is not a multiple of hosts, 4"),
        ("devices_per_host = 8", "", "hosts: 4, but both devices_per_host and device_count are missing"),
        ("hosts = 4", "hosts = 0", "hosts: 0, but a whole number"),
        ("hosts = 4", 'hosts = "four"', "hosts: 'four', but a whole number"),
        ("hosts = 4", "hosts = true", "hosts: True, but a whole number"),
        ('network = "hdr"', "", "network: missing, but 4 hosts need one; give a [network] table or one of "),
        ('"hdr"', '"IB-NRD"', "network: unknown network: 'IB-NRD'"),
        ('"hdr"', "3", "network: "),
        ('place = "japan"', 'host = "HGX-A10"', "did you mean HGX-A100"),
        ("hosts = 4", "hotss = 4", "hotss: unknown key (did you mean 'hosts'?"),
        ('"A100-80GB"', '"A100"', "device: unknown device: 'A100'"),
    ],
)
def test_an_inconsistent_cluster_file_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, CLUSTER.replace(old, new)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_unknown_names_of_a_cluster_file_are_listed_at_once(tmp_path: Path) -> None:
    text = CLUSTER.replace("hdr", "x").replace("japan", "y").replace("A100-80GB", "z")
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, text))
    message = str(caught.value)
    assert all(message.count(told) == 1 for told in ("unknown network", "unknown place", "unknown device"))
    assert "; place: unknown place" in message


OWN = """
name = "own"
hosts = 2
devices_per_host = 2
[device]
name = "Custom"
kind = "cuda"
architecture = "ada"
link = "PCIe4"
memory_bytes = {value = 5e10, source = "torch total_memory", date = "2025-06-01", kind = "measured"}
efficiency_ratio.matmul = {value = 0.5, source = "own benchmark", date = "2025", kind = "measured"}
[host]
name = "tower"
power_w = {value = 200, source = "own meter", date = "2025", kind = "measured"}
[network]
name = "cable"
bytes_s = {value = 1e9, source = "iperf", date = "2025", kind = "measured"}
"""


def test_a_machine_file_may_define_device_host_and_network_as_tables(tmp_path: Path) -> None:
    made = catalog.from_toml(_written(tmp_path, OWN))
    assert made.device.link == catalog.link("PCIe4")
    ratios = made.device.efficiency_ratio
    assert ratios["matmul"].value == 0.5
    assert ratios["memory"] == catalog.efficiency("ada")["memory"]
    assert made.host is not None
    assert made.host.power_w is not None
    assert made.host.memory_bytes is None
    assert made.network is not None
    assert made.network.latency_s is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"ada"', '"adda"', "device.architecture: unknown architecture"),
        ('"ada"', "3", "device.architecture: 3, but a name"),
        ('"PCIe4"', '"PCI"', "device.link: unknown link"),
        ("= 200", "= 0", "host.power_w: 0, but a positive number"),
        ("1e9", "-1", "network.bytes_s: -1"),
        ("power_w", "power", "host.power: unknown key (did you mean 'power_w'?)"),
        ("bytes_s", "byte_s", "network.bytes_s: "),
        ("= 0.5", "= 0", "device.efficiency_ratio.matmul: 0"),
    ],
)
def test_impossible_values_in_the_tables_of_a_machine_file_are_refused(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        catalog.from_toml(_written(tmp_path, OWN.replace(old, new)))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def _told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return main(("list", "machines", *words)), *capsys.readouterr()


def test_the_machines_command_lists_every_device_network_host_and_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = _told(capsys)
    assert code == 0
    for names in (catalog.device_names, catalog.network_names, catalog.host_names, catalog.place_names):
        assert all(f" {name} " in out for name in names())
    assert "64x8xH100-SXM@IB-NDR" in out


@pytest.mark.parametrize("name", ["H100-SXM", "2x8xB200@IB-XDR", "IB-NDR", "HGX-A100", "japan", "PCIe4"])
def test_the_machines_command_shows_an_entry_with_the_source_of_every_fact(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _told(capsys, name)
    _, as_json, _ = _told(capsys, name, "--json")
    [(kind, noun)] = json.loads(as_json).items()
    assert code == 0
    assert out.startswith(f"{kind} {noun['name']}\n")
    facts = list(_facts(noun))
    assert facts
    assert all(f"{fact['source']} ({fact['kind']}, {fact['date']})" in out for fact in facts)


def _facts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and "source" in value:
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _facts(inner)


def test_the_machines_command_shows_a_machine_file_with_its_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _told(capsys, str(_written(tmp_path, OWN)))
    assert code == 0
    assert out.startswith("machine own\n")
    assert "own meter (measured, 2025)" in out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("IB-NRD", "did you mean IB-NDR"),
        ("HGX-H10", "HGX-H100"),
        ("zzz", "`memfit list machines` lists them"),
        ("2x8xT4", "names no network"),
        ("japn", "did you mean japan"),
        ("8xT4@IB-NRD", "did you mean IB-NDR"),
    ],
)
def test_the_machines_command_answers_an_unknown_name_with_a_hint(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _told(capsys, name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err
