"""The effort of adopting a plan, counted on a fictitious set of packages and a store with known rows."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from memfit.store.database import Store
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan, use
from memfit.types.result import Measurement, OutcomeKind, Run
from memfit.workflows.effort import effort

PACKAGES = {
    "memfit": (["numpy>=1.26", "typer>=0.15", "pytest; extra == 'dev'"], 1),
    "typer": (["click (>=8)", "Rich"], 2),
    "click": ([], 3),
    "rich": (["typer"], 4),  # a dependency cycle
    "bitsandbytes": (["torch", "not-installed"], 100),
    "torch": (["sympy"], 1000),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str] | None:
        if name not in PACKAGES:
            raise importlib.metadata.PackageNotFoundError(name)
        return PACKAGES[name][0] or None

    def files(name: str) -> list[SimpleNamespace] | None:
        mib = PACKAGES[name][1]
        return [SimpleNamespace(size=mib * 2**20), SimpleNamespace(size=None)] if name != "rich" else None

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr(importlib.metadata, "files", files)


def ran(outcome: OutcomeKind) -> Run:
    spec = RunSpec(name="x", role="run", job=JobRef(spec="x"), plan=Plan(), seed=0, steps=1)
    return Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=Measurement(outcome=outcome),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite3")


def test_packages_and_size_cover_dependencies_of_memfit_and_the_plan_except_torch(store: Store) -> None:
    plain = effort(JobRef(spec="protein-ss"), Plan(), (), store)
    assert (plain.packages, plain.installed_mib) == (4, 1 + 2 + 3)
    small = effort(JobRef(spec="protein-ss"), Plan(uses=(use("adamw-8bit"),)), (), store)
    assert (small.packages, small.installed_mib) == (5, 106)


def test_a_built_in_job_counts_no_changed_lines_and_leaves_attended_minutes_unknown(store: Store) -> None:
    found = effort(JobRef(spec="protein-ss"), Plan(), (), store)
    assert (found.commands, found.changed_lines, found.attended_minutes) == (1, 0, None)


def test_changed_lines_are_the_non_blank_lines_of_the_users_job_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("import torch\n\n   \njob = 1\n")
    assert effort(JobRef(spec=f"{path}:job"), Plan(), (), store).changed_lines == 2
    path.write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    assert effort(JobRef(spec=f"{path}:job"), Plan(), (), store).changed_lines == 2
    assert effort(JobRef(spec=f"{tmp_path}/none.py:job"), Plan(), (), store).changed_lines == 0


def test_failed_attempts_are_broken_runs_plus_interrupted_proofs_of_concept(store: Store) -> None:
    for poc_id, kinds in (("a", ("begin", "poc")), ("b", ("begin",)), ("c", ("begin",))):
        for kind in kinds:
            store.append(poc_id, kind, {})
    runs = [ran(kind) for kind in (OutcomeKind.OK, OutcomeKind.OOM, OutcomeKind.FAILED, OutcomeKind.TIMEOUT)]
    # two runs broke (running out of memory counts as an answer) and b was interrupted; c is still under way
    assert effort(JobRef(spec="x"), Plan(), runs, store).failed_attempts == 3
    assert effort(JobRef(spec="x"), Plan(), (), store).failed_attempts == 2
