"""Commands and steps on the simulated accelerator, in child processes that have it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from child_ranks import run_script

import simulated_accelerator

MISSING = simulated_accelerator.missing()
_LIMIT_S = 280.0
_ON_DEVICE = Path(__file__).with_name("on_the_device.py")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and MISSING is not None:
            item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def device_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Variables of child processes that have so many devices of this capacity."""
    simulated_accelerator.build()

    def of(*, devices: int = 1, capacity_bytes: int = 2**30) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("device")
        own = {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"), "OMP_NUM_THREADS": "1"}
        own |= forked.variables("memfit.worker ", by=_ON_DEVICE)
        return own | simulated_accelerator.environment(folder, devices=devices, capacity_bytes=capacity_bytes)

    return of


@pytest.fixture(scope="session")
def memfit_on_device(device_environment: Callable[..., dict[str, str]]) -> Command:
    """Run a command of memfit where torch finds simulated accelerators."""

    def run(
        *arguments: str | Path, devices: int = 1, capacity_bytes: int = 2**30
    ) -> subprocess.CompletedProcess[str]:
        environment = device_environment(devices=devices, capacity_bytes=capacity_bytes)
        return run_script(_ON_DEVICE, "-m", "memfit", *arguments, env=environment, limit_s=_LIMIT_S)

    return run
