"""For every test: one thread, no network, the same examples each time, types checked at run time."""

from __future__ import annotations

import fnmatch
import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch or memfit is imported: torch reads the first once, beartype hooks imports.
os.environ["OMP_NUM_THREADS"] = "1"
# No test reads a prediction that another one, or the user of this machine, has stored.
os.environ["MEMFIT_CACHE"] = "off"

import forked
import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from hypothesis import settings

# Not the modules that handle tensors: a checking wrapper holds its arguments and so changes what is measured.
_CHECKED = (
    "catalog",
    "engines.base",
    "engines.registry",
    "engines.native",
    "engines.replay",
    "runtime.child_process",
    "runtime.restart",
    "runtime.ranks",
    "runtime.engine_environment",
    "verify",
    "store",
    "report",
    "export",
    "workflows.proof_of_concept",
    "cli",
    "decision",
)
# Checking these makes a search half as long again, so that it is done with --long only.
_CHECKED_WITH_LONG = ("types", "cost", "planner.selection", "planner.plan_space", "planner.parallelism_grid")

settings.register_profile("memfit", deadline=None, derandomize=True)
settings.load_profile("memfit")

# Real runs in child processes and predictions beside them: what they cover, tests of units cover too, and
# counting lines would make them half as long again.
_UNCOUNTED = {Path(__file__).parent / room for room in ("cpu", "engines")}
_OF_CHILDREN = "COVERAGE_PROCESS_CONFIG"  # by which coverage begins in a child process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Before memfit is imported, in this process and in those of xdist."""
    gc.disable()  # until all tests are collected: a sixth of that time is otherwise the collector's
    names = (*_CHECKED, *(_CHECKED_WITH_LONG if config.getoption("--long") else ()))
    beartype_packages(
        tuple(f"memfit.{name}" for name in names),
        conf=BeartypeConf(is_pep484_tower=True),  # an int is a float, as for mypy
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if _is_long(item)]
        _check_quick_cases(items, long)
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


def _check_quick_cases(items: list[pytest.Item], long: list[pytest.Item]) -> None:
    """Refuse a mark ``quick_cases`` whose patterns match no case, so that the test would never run."""
    cases = Counter(item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("quick_cases"))
    left_out = Counter(item.nodeid.partition("[")[0] for item in long)
    for name, count in cases.items():
        if count > 1 and left_out[name] == count:
            raise pytest.UsageError(f"no case of {name} matches its mark quick_cases")


def _is_long(item: pytest.Item) -> bool:
    """Return whether a test, by its mark ``long`` or ``quick_cases``, runs with --long only."""
    quick = item.get_closest_marker("quick_cases")
    if quick is None or not isinstance(item, pytest.Function):
        return item.get_closest_marker("long") is not None
    return not any(fnmatch.fnmatchcase(item.callspec.id, pattern) for pattern in quick.args)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imported modules and collected tests stay until the end: the garbage collector need not walk over them
    again and again, which takes a tenth of the time of tests that trace."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    plugin = item.config.pluginmanager.getplugin("_cov")
    counting = getattr(plugin, "cov_controller", None)
    if counting is None or item.path.parent not in _UNCOUNTED:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(_OF_CHILDREN, raising=False)
        counting.pause()
        try:
            return (yield)
        finally:
            counting.resume()


_connect = socket.socket.connect


def _connect_here_only(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise RuntimeError(f"a test reached for the network: {address}")
    _connect(self, address)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _connect_here_only)
        yield


@pytest.fixture(autouse=True, scope="session")
def _calibration_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For what is made once for several tests."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("calibration") / "calibration.sqlite3"
        patch.setattr("memfit.store.calibration.default_path", lambda: path)
        yield


_PROCESSES = "memfit.runtime.child_process.subprocess"


@pytest.fixture(autouse=True, scope="session")
def _forked_probes() -> Iterator[None]:
    """Operators are probed and timed in forked processes, which need not import torch."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr(_PROCESSES, forked.processes("memfit.worker calibrate"))
        yield


@pytest.fixture(scope="module")
def forked_workers(_forked_probes: None) -> Iterator[None]:
    """The workers of this file's trainings are forked: how they start is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_PROCESSES, forked.processes("memfit.worker "))
        yield


@pytest.fixture(scope="module")
def independent_samples() -> Iterator[None]:
    """The samples of this file's jobs count as independent. The trial that finds this takes longer than a
    prediction for several devices, and is tested elsewhere."""
    from memfit.types.dependence import DependenceKind, SampleDependence

    with pytest.MonkeyPatch.context() as patch:
        independent = SampleDependence(kind=DependenceKind.INDEPENDENT)
        patch.setattr("memfit.planner.evaluate.sample_dependence", lambda job: independent)
        yield


@pytest.fixture(autouse=True)
def _own_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads timings that another one, or the user of this machine, has stored."""
    monkeypatch.setattr("memfit.store.calibration.default_path", lambda: tmp_path / "calibration.sqlite3")
