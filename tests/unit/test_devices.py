"""What memfit asks of accelerators that are not here: each call exists in the installed torch, with these
arguments."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from memfit.planner.machine_calibration import calibrated_device
from memfit.planner.request import Request
from memfit.runtime import devices, local_machine
from memfit.runtime.memory_cap import MemoryLimit
from memfit.types.device_kind import DeviceKind, add_device_kind, device_kind
from memfit.types.errors import MemfitError, UserError
from memfit.types.job import JobRef
from memfit.types.machine import Device, Fact, Machine

GIB = 2**30
KINDS = ("cuda", "xpu", "mps")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of device whose functions have torch's own signatures but do nothing. One that torch does not
    have, or that is called with other arguments, is an error."""
    name = request.param
    accelerator = mock.create_autospec(torch.accelerator)
    accelerator.is_available.return_value = True
    accelerator.current_accelerator.return_value = torch.device(name)
    accelerator.device_count.return_value = 2
    accelerator.get_memory_info.return_value = (3 * GIB, 4 * GIB)
    accelerator.memory_stats.return_value = {"num_alloc_retries": 1}
    for read in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        getattr(accelerator, read).return_value = GIB
    module = mock.create_autospec(getattr(torch, name))
    for read in ("recommended_max_memory", "driver_allocated_memory", "current_allocated_memory"):
        if hasattr(module, read):
            getattr(module, read).return_value = GIB
    monkeypatch.setattr(devices, "_sample", lambda counter: None)  # its thread would outlive the test
    monkeypatch.setattr(torch, "accelerator", accelerator)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return name


def test_torch_has_every_call_that_memfit_makes_of_a_device(kind: str) -> None:
    device = devices.use_device(kind, 1 if kind != "mps" else 0)
    assert device.type == kind
    devices.synchronize(device)
    free, total = devices.memory_info(device)
    assert 0 <= free <= total
    assert devices.allocated_bytes(device) == devices.reserved_bytes(device) == GIB
    devices.free_cache(device)
    devices.set_memory_fraction(device, 0.5)
    assert devices.device_name(device)


def test_a_counter_of_a_device_reads_what_torch_keeps(kind: str) -> None:
    counter = devices.accelerator_counter(torch.device(kind, 0))
    counter.reset_peak()
    counter.reset_reserved_peak()
    assert counter.live_bytes() == counter.peak_bytes() == counter.reserved_peak_bytes() == GIB
    assert counter.retries() == (None if kind == "mps" else 1)
    assert ("samples" in counter.source) == (kind == "mps")


def test_the_cap_on_a_device_is_a_memory_fraction_above_the_reserved_bytes(kind: str) -> None:
    device = torch.device(kind, 0)
    module: Any = torch.get_device_module(device)
    limit = MemoryLimit(GIB, device=device, counter=devices.accelerator_counter(device))
    limit.apply()
    assert (limit.kind, limit.footprint_bytes) == ("memory fraction", GIB)
    fraction = 1.0 if kind == "mps" else 0.5  # of 1 and of 4 GiB
    assert module.set_per_process_memory_fraction.call_args.args[0] == pytest.approx(fraction)
    limit.lift()
    lifted = module.set_per_process_memory_fraction.call_args.args[0]
    assert (limit.used_bytes(), lifted) == (0, 1.7 if kind == "mps" else 1.0)  # torch's defaults


def test_a_process_group_has_the_devices_own_backend_and_one_of_the_host() -> None:
    assert devices.collective_backend("cpu") == "gloo"
    assert devices.collective_backend("cuda") == "cpu:gloo,cuda:nccl"
    assert devices.collective_backend("xpu") == "cpu:gloo,xpu:xccl"


def test_a_device_that_torch_does_not_find_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="no device of the kind 'cuda'"):
        devices.use_device("cuda")
    with pytest.raises(UserError, match=r"no device of the kind 'xpu'.*this:cpu"):
        local_machine.this_machine("world", "xpu")


def test_more_ranks_than_devices_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match="rank 2 on this machine, counted from 0, has no"):
        devices.use_device(kind, 2)


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A machine with CUDA devices, as a child process would describe them."""
    found: list[Any] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(
            returncode=0 if found else 1, stdout=json.dumps(found), stderr="driver is old\n"
        )

    monkeypatch.setattr(devices, "accelerator_kind", lambda: "cuda")
    monkeypatch.setattr(subprocess, "run", run)
    devices.accelerators.cache_clear()
    yield found
    devices.accelerators.cache_clear()


def test_this_machine_is_its_accelerator_with_the_catalogs_figures(accelerated: list[Any]) -> None:
    name = "NVIDIA H100 80GB HBM3"
    accelerated += [
        {
            "device": f"cuda:{i}",
            "name": name,
            "total_bytes": 79 * GIB,
            "free_bytes": 70 * GIB,
            "context_bytes": GIB,
        }
        for i in range(2)
    ]
    machine = local_machine.this_machine("world")
    assert (machine.name, machine.device.name) == (f"{name} of this machine", name)
    assert (machine.device_count, machine.is_here, machine.device.is_host) == (2, True, False)
    assert machine.device.memory_bytes.value == 79 * GIB
    assert machine.device.peak_flops["bfloat16"].value > 9e14  # of the catalog's H100-SXM
    assert machine.device.trace_kind == "cuda:sm_90"
    assert machine.host is not None
    assert local_machine.free_device_bytes("cuda") == 69 * GIB
    processor = local_machine.this_machine("world", "cpu")
    assert (processor.name, processor.device.is_host) == ("this machine's processor", True)


def test_an_accelerator_that_the_catalog_does_not_know_has_its_memory_only(accelerated: list[Any]) -> None:
    accelerated += [
        {"device": "cuda:0", "name": "Acme Z9", "total_bytes": GIB, "free_bytes": GIB, "context_bytes": 0}
    ]
    device = local_machine.this_machine("world").device
    assert (device.name, device.kind, device.memory_bytes.value) == ("Acme Z9", "cuda", GIB)
    assert (device.trace_kind, dict(device.peak_flops)) == ("cuda", {})


def test_a_trace_for_this_machine_has_the_kernels_of_its_accelerator(accelerated: list[Any]) -> None:
    accelerated += [{"device": "cuda:0", "name": "Acme Z9", "total_bytes": GIB, "free_bytes": GIB}]
    accelerated[0]["gpu_target"] = "sm_61"
    assert local_machine.this_machine("world").device.trace_kind == "cuda:sm_61"


@pytest.mark.parametrize(("hip", "target"), [(None, "sm_86"), ("6.4", "gfx942")])
def test_an_accelerator_is_described_with_the_target_of_its_kernels(
    hip: str | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(
        get_device_capability=lambda device: (8, 6),
        get_device_properties=lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"),
    )
    monkeypatch.setattr(devices, "_module", lambda device: module)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert devices._gpu_target(torch.device("cuda", 0)) == target
    assert hip or devices._gpu_target(torch.device("mps")) == ""


def test_an_accelerator_that_does_not_work_is_an_error_that_says_what_to_do(accelerated: list[Any]) -> None:
    with pytest.raises(MemfitError, match="could not be used: driver is old; `--on this:cpu` uses"):
        local_machine.this_machine("world")


def test_a_kind_that_nobody_added_counts_as_unchecked_with_cudas_kernels() -> None:
    kind = device_kind("hpu")
    assert (kind.kernels, kind.block_bytes, kind.checked) == ("cuda", 512, False)
    add_device_kind(DeviceKind(name="hpu", block_bytes=128))
    try:
        assert device_kind("hpu").block_bytes == 128
        assert device_kind("hpu:v3").block_bytes == 128
        assert device_kind("hpu:v3") is device_kind("hpu:v3"), "asked for every allocation of a trace"
    finally:
        add_device_kind(DeviceKind(name="hpu"))


def test_timings_of_a_device_are_kept_by_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    device = Device(name="Card", kind="cuda", memory_bytes=Fact(value=GIB, source="", date=""))
    here = Machine(name="Card of this machine", device=device, is_here=True)
    request = Request(job_ref=JobRef(spec="char-lm"), machine=here)
    monkeypatch.setattr(
        devices, "_DRIVERS", {"NVIDIA": (version, version), "AMD": (tmp_path / "no", version)}
    )
    assert calibrated_device(request) == "Card, NVIDIA driver 550.54.15"
    card = devices.Accelerator(device="xpu:0", name="Card", total_bytes=1, free_bytes=1, driver="1.6.32567")
    monkeypatch.setattr("memfit.planner.machine_calibration.accelerators", lambda: (card, card))
    monkeypatch.setattr(devices, "_DRIVERS", {})
    assert calibrated_device(request) == "Card, driver 1.6.32567"
    assert (
        calibrated_device(dataclasses.replace(request, machine=dataclasses.replace(here, is_here=False)))
        == ""
    )
