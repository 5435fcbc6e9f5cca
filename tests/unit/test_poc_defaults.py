"""Defaults of `memfit poc` and `memfit plan` on this machine: the cap, and training on the CPU."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_machine import processor
from tiny import words

from memfit.cli.options import BoundsOptions, JobOptions, RuntimeOptions, SearchOptions
from memfit.cli.plan import bounds_of
from memfit.cli.request import request as request_of
from memfit.planner import capacity, search, single_device
from memfit.planner.capacity import needed_bytes
from memfit.planner.request import Planning, Request
from memfit.report.words import load_words
from memfit.runtime import devices
from memfit.store.database import Store
from memfit.techniques.registry import effect_of
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Accuracy, Bounds, EffectClass
from memfit.workflows import proof_of_concept

Ask = Callable[..., Planning]


PROCESSOR = processor(float32=1e10)


def quiet(*begun: Any) -> None:
    pass


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """A search for a job of a few kilobytes on a CPU."""

    def asked(job: Job | None = None, **more: Any) -> Planning:
        monkeypatch.setattr("memfit.planner.request.load", lambda ref: job or words(2))
        monkeypatch.setattr(single_device, "FINALISTS", 3)
        request = Request(
            job_ref=JobRef(spec="words"),
            machine=PROCESSOR,
            accuracy=Accuracy.EXACT,
            **more,
        )
        return search.search(request, quiet)

    return asked


def test_a_proof_of_concept_in_an_unknown_language_is_refused_before_any_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(proof_of_concept, "find_plan", lambda *_, **__: pytest.fail("a plan was searched"))
    with pytest.raises(UserError, match="no such language: 'xx'"):
        proof_of_concept.poc(
            Request(job_ref=JobRef(spec="words"), machine=PROCESSOR),
            store=Store(tmp_path / "s"),
            seeds=1,
            steps=None,
            report_path=None,
            lang="xx",
            command="",
            progress=quiet,
        )


# --- the cap of a demonstration


def test_a_demonstration_cap_that_no_plan_fits_is_raised_to_fit_the_smallest_plan(ask: Ask) -> None:
    found = ask()
    recommended = found.result.recommended
    assert recommended is not None
    assert recommended.fits
    assert effect_of(recommended.estimate.plan) is EffectClass.E0
    assert needed_bytes(recommended.estimate, PROCESSOR) <= found.cap_bytes == found.result.cap_bytes
    least = min(needed_bytes(c.estimate, PROCESSOR) for c in found.result.frontier)
    assert found.cap_bytes == pytest.approx(1.1 * least, rel=1e-3)
    assert found.cap_reason == found.result.cap_reason
    assert found.cap_reason == (
        "demonstration: what the smallest plan needs plus 10 %, because no plan fits 25% of the baseline's "
        "predicted peak"
    )
    assert "25% に収まるプランがないため" in load_words("ja").of(found.cap_reason)


def test_a_demonstration_whose_search_had_no_time_does_not_say_that_no_plan_fits(ask: Ask) -> None:
    found = ask(within_s=1e-6)
    assert "because no plan that was looked at in time fits 25% of" in found.cap_reason
    assert "時間内に調べた範囲" in load_words("ja").of(found.cap_reason)


def test_a_demonstration_cap_that_a_plan_fits_keeps_the_jobs_own_ratio(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)
    found = ask(dataclasses.replace(words(2), demonstration_ratio=0.95))
    assert found.cap_reason == "demonstration: 95% of the baseline's predicted peak"
    assert found.cap_bytes == int(0.95 * found.result.baseline.estimate.allocated_bytes.value)


def test_a_cap_given_by_the_user_is_not_changed(ask: Ask) -> None:
    with pytest.raises(NothingFits) as told:
        ask(cap_bytes=1000)
    assert told.value.cap_bytes == 1000


# --- techniques that are excluded


def test_an_excluded_technique_is_in_no_plan_and_in_no_run_of_a_proof_of_concept(
    ask: Ask, tmp_path: Path
) -> None:
    excluded = ("bf16-autocast", "activation-checkpointing")
    found = ask(bounds=Bounds(without=excluded))
    shown = [c.estimate.plan for c in found.result.frontier]
    assert not [p for p in shown if any(map(p.get, excluded))]
    poc_runner = proof_of_concept._PocRunner(found, Store(tmp_path / "s.sqlite3"), 1, 2, "memfit poc", quiet)
    ran = [s.plan for s in poc_runner.specs()]
    assert ran
    assert not [p for p in ran if any(map(p.get, excluded))]


def test_plan_on_this_machine_accepts_excluded_techniques_and_corrects_misspellings() -> None:
    bounds = bounds_of(JobOptions(), BoundsOptions(without=["adamw-8bit"]), "this")
    assert bounds.without == ("adamw-8bit",)
    with pytest.raises(UserError, match="did you mean 'adamw-8bit'"):
        bounds_of(JobOptions(), BoundsOptions(without=["adam-8bit"]), "this")


# --- a machine with a GPU


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, as a child process would describe them."""
    found = tuple(
        devices.Accelerator(device=f"cuda:{i}", name="Acme Z9", total_bytes=2**34, free_bytes=2**33)
        for i in range(2)
    )
    monkeypatch.setattr(devices, "accelerator_kind", lambda: "cuda")
    monkeypatch.setattr(devices, "accelerators", lambda: found)


@pytest.mark.usefixtures("gpus")
def test_on_a_machine_with_gpus_one_line_says_which_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    request = request_of(JobOptions(), SearchOptions(), RuntimeOptions())
    assert (
        capsys.readouterr().err == "memfit: device: Acme Z9 (cuda); `memfit plan --nproc 2` plans for all 2\n"
    )
    assert (request.device_kind, request.machine.device.name) == ("cuda", "Acme Z9")
    request_of(JobOptions(), SearchOptions(), RuntimeOptions(), ranks=2)
    assert capsys.readouterr().err == "memfit: device: Acme Z9 (cuda)\n"
    with pytest.raises(UserError, match="--nproc 3 is more than the 2 devices of this machine"):
        request_of(JobOptions(), SearchOptions(), RuntimeOptions(), ranks=3, has_nproc=True)
    with pytest.raises(UserError, match="a plan of 3 ranks is more than the 2 devices of this machine"):
        request_of(JobOptions(), SearchOptions(), RuntimeOptions(), ranks=3)
    request_of(JobOptions(), SearchOptions(), RuntimeOptions(), "H100-SXM")
    assert capsys.readouterr().err == ""
    assert request_of(JobOptions(), SearchOptions(), RuntimeOptions(), "this:cpu").device_kind == "cpu"
    assert capsys.readouterr().err == ""


def test_on_a_machine_without_a_gpu_no_warning_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    request_of(JobOptions(), SearchOptions(), RuntimeOptions())
    assert capsys.readouterr().err == ""


def test_help_of_poc_loads_no_torch() -> None:
    code = (
        "import sys\nfrom memfit.cli import main\nmain(['poc', '--help'])\nsys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, "--without TECHNIQUE" in ended.stdout) == (0, True)
