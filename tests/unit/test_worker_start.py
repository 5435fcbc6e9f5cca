"""What memfit and its workers import, how long a run may take, and the record of a proof of concept."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from report_fixture import PEAKS, PLAIN, full_poc

from memfit.catalog import machine
from memfit.engines.registry import render
from memfit.jobs.user_job import shadowed_modules
from memfit.planner.request import Request
from memfit.runtime.child_process import STOPPED, run
from memfit.runtime.ranks import run_ranks
from memfit.store import exchange
from memfit.techniques.registry import effect_of, make_plain_plan
from memfit.types.errors import UserError
from memfit.types.gc_pause import collect_as_usual, collect_rarely
from memfit.types.job import JobRef
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan
from memfit.types.result import Cause, NamedVerdict, OutcomeKind, Poc, Verdict, VerdictKind
from memfit.worker import train

JOB = """
import random

import torch
from torch import nn

from layers import make_layers
from memfit import Job


def make_batch(step, seed):
    noise = random.Random(1000 * seed + step).random()
    return {"x": torch.full((8, 4), noise), "y": torch.zeros(8, 2)}


def loss(model, batch):
    from penalties import penalty

    return nn.functional.mse_loss(model(batch["x"]), batch["y"]) + penalty(model)


job = Job(name="mine", build_model=make_layers, make_batch=make_batch, loss=loss, batch_size=8, steps=2)
"""
BESIDE = {
    "mine.py": JOB,
    "layers.py": "from torch import nn\n\ndef make_layers():\n    return nn.Linear(4, 2)\n",
    "penalties.py": "def penalty(model):\n    return sum(p.square().sum() for p in model.parameters())\n",
}
# Each of these files ends the process that imports it, with a message.
HIDDEN = ("torch", "random", "numpy", "dataclasses", "typer", "datetime", "tempfile")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in BESIDE.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def hide(folder: Path) -> None:
    for name in HIDDEN:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the wrong {name} was imported')")


def memfit(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """``python -m memfit`` in the folder: exit code, standard output, standard error."""
    return _ended(["-m", "memfit", *arguments], folder)


def _ended(arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "XDG_DATA_HOME": str(folder / "data")},
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_installed_script_imports_modules_beside_a_job_in_another_folder(folder: Path) -> None:
    hide(folder)
    (folder / "elsewhere").mkdir()
    script = folder / "elsewhere" / "memfit"
    script.write_text("import sys\nfrom memfit.__main__ import run\nsys.exit(run())\n")
    code, out, said = _ended([str(script), "run", str(folder / "mine.py:job")], folder / "elsewhere")
    assert (code, "wrong" in said) == (0, False), said
    assert "plain: ok" in out


def test_ranks_do_not_import_local_files_in_place_of_installed_modules(
    folder: Path,
) -> None:
    hide(folder)
    (folder / "ddp.yaml").write_text("ranks: 2\ntechniques:\n  ddp: {}\n")
    code, out, said = memfit("run", "mine.py:job", "--plan", "ddp.yaml", folder=folder)
    assert (code, "wrong" in said) == (0, False), said
    assert "ok without a cap" in out


def test_each_shadowed_module_beside_the_job_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import helper\ndef job():\n    import numpy as np\n    from . import typer\n    import random\n"
    )
    (tmp_path / "helper.py").write_text("from datetime import date\nimport random, logging\n")
    for name in ("random", "datetime", "typer", "json"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("")
    import numpy

    own, hidden = "the standard library's module", tmp_path / "numpy" / "__init__.py"
    taken = {
        "mine.py imports numpy": f"Python loads {numpy.__file__} instead of {hidden}",
        "mine.py imports random": f"Python loads {own} instead of {tmp_path / 'random.py'}",
        "helper.py imports datetime": f"Python loads {own} instead of {tmp_path / 'datetime.py'}",
    }
    lines = list(shadowed_modules(f"{tmp_path / 'mine.py'}:job"))
    assert (
        dict(line.removesuffix("; rename that file if it is meant").split(": ", 1) for line in lines) == taken
    )


@pytest.mark.parametrize(
    "spec", ["protein-ss", "hf:./llama", "nowhere.py:job", "broken.py:job", "notes.txt:job"]
)
def test_no_shadowed_modules_are_reported_without_a_readable_job(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import random import")
    (tmp_path / "random.py").write_text("")
    assert list(shadowed_modules(spec)) == []


def test_another_program_that_imports_memfit_keeps_its_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import memfit\n")
    (tmp_path / "mine" / "__main__.py").write_text("import sys\nprint(sys.path[0])\n")
    assert _ended(["-m", "mine", "memfit"], tmp_path) == (0, f"{tmp_path}\n", "")


@pytest.mark.usefixtures("forked_workers")
def test_the_garbage_collector_runs_as_usual_once_a_job_trains(folder: Path) -> None:
    usual = subprocess.check_output([sys.executable, "-c", "import gc; print(gc.get_threshold())"], text=True)
    asserted = f"    import gc\n    assert gc.get_threshold() == {usual}    noise ="
    (folder / "mine.py").write_text(JOB.replace("    noise =", asserted))
    spec = RunSpec(
        name="test",
        role="run",
        job=JobRef(spec=f"{folder / 'mine.py'}:job"),
        plan=Plan(),
        seed=0,
        steps=1,
        threads=1,
        evaluate=False,
    )
    measured = run(render(spec), on_event=lambda event: None)
    assert measured.outcome is OutcomeKind.OK, measured.reason


def test_the_garbage_collector_runs_rarely_only_between_two_calls() -> None:
    usual = gc.get_threshold()
    collect_as_usual()
    assert gc.get_threshold() == usual
    collect_rarely()
    gc.set_threshold(usual[0] + 1)  # whatever it is meanwhile
    collect_as_usual()
    assert gc.get_threshold() == usual


# --- how long a run may take


def test_a_run_has_a_time_limit_only_on_request(folder: Path) -> None:
    assert Request(job_ref=JobRef(spec="mine.py:job"), machine=machine("H100-SXM")).timeout_s is None
    wait = "    import sys, time\n    time.sleep(10 * (step > 0 and 'memfit.worker' in sys.orig_argv))\n"
    slow = JOB.replace("    noise =", f"{wait}    noise =")  # not while the step is predicted
    (folder / "mine.py").write_text(slow)
    code, out, said = memfit("run", "mine.py:job", "--timeout", "2s", folder=folder)
    assert code == 1, said
    assert "timeout without a cap: stopped at its time limit of 2 s" in out


def test_a_child_without_a_time_limit_runs_to_its_end() -> None:
    result = '{"event": "result", "by": "memfit", "measurement": {"outcome": "ok"}}'
    code = f"import time\ntime.sleep(0.5)\nprint({result!r})"
    assert run(_config(code, ranks=1), on_event=lambda event: None).outcome is OutcomeKind.OK


def test_ranks_waiting_for_a_failed_rank_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfit.runtime.ranks.GRACE_S", 0.2)
    code = "import os, sys, time\nsys.exit('no such data') if os.environ['RANK'] == '1' else time.sleep(100)"
    begun = time.monotonic()
    waiting, failed = run_ranks(_config(code, ranks=2))
    assert time.monotonic() - begun < 30
    assert (waiting.outcome, waiting.reason) == (OutcomeKind.FAILED, STOPPED)
    assert failed.reason == "exit code 1: no such data"


def _config(code: str, *, ranks: int) -> LaunchConfig:
    spec = RunSpec(name="test", role="run", job=JobRef(spec="x"), plan=Plan(ranks=ranks), seed=0, steps=1)
    assert spec.timeout_s is None
    return LaunchConfig(engine="test", argv=(sys.executable, "-c", code), env={}, files={}, spec=spec)


def test_the_process_group_timeout_is_at_least_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    limits = []
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", distributed_c10d.default_pg_timeout)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend: limits.append(distributed_c10d.default_pg_timeout)
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr("memfit.techniques.rank_mesh.make_world", lambda plan, rank, device: None)
    with train.join_world(Plan(ranks=2)):
        pass
    assert limits[0].days >= 1


# --- the record of a proof of concept


def recommending(plan: Plan, *, baseline: Plan, step_time_ratio: float) -> Poc:
    """A finished proof of concept of two plans; a run of either has the measurements of plain training."""
    poc = full_poc()
    sides = {"baseline": baseline, "recommended": plan}
    one = poc.search.baseline
    chosen = {
        n: dataclasses.replace(one, effect=effect_of(p), estimate=dataclasses.replace(one.estimate, plan=p))
        for n, p in sides.items()
    }
    measured = next(r for r in poc.runs if r.spec.name == "baseline")
    runs = [
        dataclasses.replace(measured, spec=dataclasses.replace(r.spec, plan=sides[r.spec.role]))
        for r in poc.runs
        if r.spec.role in sides
    ]
    same = Verdict(
        kind=VerdictKind.EQUIVALENT,
        effect=effect_of(plan),
        test="identity",
        reason="the recommendation is plain training itself",
        cause=Cause(kind="same_plan"),
    )
    return dataclasses.replace(
        poc,
        cap_bytes=2 * PEAKS[PLAIN],
        runs=tuple(runs),
        step_time_ratio=step_time_ratio,
        search=dataclasses.replace(poc.search, **chosen, frontier=(chosen["recommended"],)),
        verdicts=(NamedVerdict(name="recommended", plan=plan, verdict=same),),
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_proof_of_concept_that_recommends_plain_training_has_a_record(ranks: int) -> None:
    record = exchange.of_poc(
        recommending(make_plain_plan(ranks), baseline=make_plain_plan(ranks), step_time_ratio=2.9)
    )
    assert record.recommended == record.baseline
    assert record.baseline.ranks == ranks
    assert record.step_time_ratio is None
    assert record.verdict is not None
    assert (record.verdict.kind, record.verdict.test) == ("equivalent", "identity")


def test_a_record_notes_and_omits_a_step_time_ratio_that_the_medians_contradict() -> None:
    poc = dataclasses.replace(full_poc(), step_time_ratio=2.9)
    record = exchange.of_poc(poc)
    assert record.step_time_ratio is None
    assert "Step times varied too much between runs: the median ratio of the pairs is 2.9" in record.notes[-1]
    assert len(record.notes) == len(poc.notes) + 1
    assert exchange.of_poc(full_poc()).step_time_ratio == 1.31


def test_a_baseline_of_several_ranks_must_be_plain_training() -> None:
    record = exchange.of_poc(
        recommending(make_plain_plan(2), baseline=make_plain_plan(2), step_time_ratio=1.0)
    ).model_dump(mode="json")
    record["baseline"]["plan"] = {"fsdp2": {}}
    with pytest.raises(UserError, match="allowed: plain training"):
        exchange.parse_record(json.dumps(record), what="it")
