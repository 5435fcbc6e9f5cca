"""The list of public training scripts, the measurement of a script's own peak, and its prediction."""

from __future__ import annotations

import dataclasses
import re
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from child_ranks import run_script
from local_scripts import COUNTED, local_script
from scripts.corpus import PublicScript, ScriptError, check_unmodified, load_scripts
from scripts.measure import measure, predict, prepare
from scripts.page import error_ratio, page, runs_inside, summarize
from scripts.prepare import PREPARE

from memfit.runtime.counting_allocator import available

_SCRIPTS = Path(__file__).parents[1] / "data" / "scripts"
_MIB = 2**20
_counts = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")


def _local(name: str, argument: str = "") -> PublicScript:
    """Return a script of tests/data/scripts as if it were a public one."""
    return local_script(name, f"python -W ignore {{sources}}/{name}.py {argument}")


def test_the_list_has_every_kind_of_script_half_of_them_held_out() -> None:
    scripts = load_scripts().values()
    kinds = " ".join(s.kind for s in scripts)
    assert len(scripts) == 12
    assert sum(s.use == "held_out" for s in scripts) == 6
    for kind in ("GPT", "example of PyTorch,", "Trainer with LoRA", "complete_", "Lightning", "timm"):
        assert kind.rstrip(",") in kinds
    for kind in ("torchvision", "Geometric", "diffusers", "mace_run_train", "Distributed", "FSDP2"):
        assert kind in kinds
    assert [s.ranks for s in scripts if "torchrun" in s.kind] == [2, 2]


@pytest.mark.parametrize("script", load_scripts().values(), ids=lambda s: s.name)
def test_each_listed_script_is_pinned_and_can_be_prepared(script: PublicScript) -> None:
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", script.repository)
    assert re.fullmatch(r"[0-9a-f]{40}", script.commit)
    assert re.fullmatch(r"[0-9a-f]{64}", script.sha256)
    assert script.prepare in PREPARE
    fields = {f for _, f, _, _ in string.Formatter().parse(script.command + script.folder) if f}
    assert fields <= {"sources", "work"}
    assert (f"--nproc-per-node {script.ranks}" in script.command) is (script.ranks > 1)


def test_a_changed_or_missing_script_is_refused(tmp_path: Path) -> None:
    script = dataclasses.replace(load_scripts()["nanogpt"], repository="x/repository", path="train.py")
    with pytest.raises(ScriptError, match="no file"):
        check_unmodified(script, tmp_path)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.py").write_text("print()")
    with pytest.raises(ScriptError, match="differs from x/repository"):
        check_unmodified(script, tmp_path)


@_counts
def test_a_script_is_measured_to_the_end_of_its_second_step(tmp_path: Path) -> None:
    truth = measure(_local("plain_loop", "{work}/mark"), _SCRIPTS, tmp_path, repeats=1)
    parameters = 4 * (1024 * 256 + 256 + 256 * 10 + 10)
    batches = 3 * 64 * 1024 * 4
    needed = batches + 4 * parameters  # weights, gradients and both moments
    assert needed < truth["peak_bytes"] < needed + 3 * parameters  # AdamW's temporary tensors
    assert truth["from_start_bytes"] > 16 * _MIB > truth["peak_bytes"]
    assert not (tmp_path / "mark").exists()


@_counts
def test_a_script_that_takes_no_second_step_is_an_error(tmp_path: Path) -> None:
    script = dataclasses.replace(_local("plain_loop"), command="python -c 'print(1)'")
    with pytest.raises(ScriptError, match="0 of 1 ranks took 2 steps"):
        measure(script, _SCRIPTS, tmp_path, repeats=1)


@_counts
@pytest.mark.parametrize(
    ("name", "package", "argument"),
    [
        ("plain_loop", "torch", "{work}/mark"),
        ("trainer_loop", "transformers", "{work}/out"),
        ("lightning_loop", "lightning", "{work}/out"),
        ("accelerate_loop", "accelerate", ""),
    ],
)
def test_the_peak_of_an_unmodified_script_is_predicted(
    name: str, package: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    script = _local(name, argument)
    if name != "plain_loop":
        monkeypatch.setattr("scripts.measure.subprocess", SimpleNamespace(run=_run_forked))
    record = _compared(script, _SCRIPTS, tmp_path)
    error = error_ratio(record)
    assert error is not None, record["predicted"]
    assert abs(error) < 0.01
    assert runs_inside(record) == (1, 1)


@_counts
@pytest.mark.parametrize("script", [s for s in load_scripts().values() if s.module], ids=lambda s: s.name)
def test_the_peak_of_a_script_that_a_package_installs_is_predicted(
    script: PublicScript, tmp_path: Path
) -> None:
    pytest.importorskip(str(script.module), reason=f"{script.packages[0]} is not installed")
    check_unmodified(script, tmp_path)
    work = prepare(script, tmp_path)
    record = _compared(script, tmp_path, work)
    error = error_ratio(record)
    assert error is not None, record["predicted"]
    assert abs(error) < 0.01


def _compared(script: PublicScript, sources: Path, work: Path) -> dict[str, Any]:
    """Return a record of the script, measured over the steps that the prediction traced."""
    predicted = predict(script, sources, work)
    assert "error" not in predicted, predicted
    steps = predicted["steps"]
    truth = measure(script, sources, work, repeats=1, steps=steps, peak_steps=steps)
    return {"predicted": predicted, "truth": truth}


def _run_forked(
    argv: Sequence[str], *, cwd: str, env: dict[str, str], **_: Any
) -> subprocess.CompletedProcess[str]:
    """Run a script, given as ``python -W ignore SCRIPT ...``, or a command of memfit in a forked process."""
    words = argv[1:] if argv[1] == "-m" else (COUNTED, *argv[3:])
    return run_script(*words, cwd=cwd, env=env | forked.variables("memfit.capture ", "memfit.worker "))


def _record(name: str, predicted: dict[str, Any]) -> dict[str, Any]:
    period = {"peak_bytes": 100, "end_bytes": 0, "end_s": 0.0}
    rank = {"rank": 0, "setup": period, "steps": [period, period]}
    truth = {"peak_bytes": 100, "peaks_bytes": [100], "from_start_bytes": 100, "wall_s": 1.0, "ranks": [rank]}
    return {"script": name, "use": "development", "truth": truth, "predicted": {"wall_s": 1.0, **predicted}}


def test_the_page_counts_scripts_without_an_answer() -> None:
    answer = {"allocated_bytes": {"value": 101, "low": 100, "high": 103}}
    records = [_record("nanogpt", answer), _record("lora", {"error": "exit code 1: no"})]
    text = page(records)
    assert summarize(records).startswith("1 of 2 answered; worst 1.000%")
    assert "| lora | " in text
    assert "not answered" in text
    assert "+1.000%" in text


def test_the_page_keeps_the_first_errors_of_held_out_scripts() -> None:
    answers = [{"allocated_bytes": {"value": v, "low": 0, "high": 200}} for v in (150, 101)]
    records = [_record("mace", a) | {"use": "held_out"} for a in answers]
    text = page(records)
    assert "first run on them: 1 of 1 answered; worst 50.000%" in text
    assert "Held out: 1 of 1 answered; worst 1.000%" in text
