"""The record of an exported folder, from what its ranks have written to the launcher's logs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_export import TINY, handover

from memfit.cli import main
from memfit.engines.registry import render
from memfit.export.targets import bundle
from memfit.export.write import write
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import CheckpointSettings
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind
from memfit.workflows.exported_run import LOST, read_exported_run

# As torch prints it on a rank.
LOST_PEER = """\
[W1130 socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3
[rank0]: Traceback (most recent call last):
[rank0]:     return engine.run_backward(
[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:7896: Connection reset by peer.
"""


def measured(rank: int, **more: Any) -> Measurement:
    return Measurement(
        outcome=OutcomeKind.OK,
        steps_done=2,
        losses=(1.0, 2.0),
        **{
            "peak_bytes": 100 + rank,
            "node": rank,
            "collectives": "gloo",
            "before_backward_s": 0.1 + rank,
            **more,
        },
    )


def folder_of(tmp_path: Path) -> Path:
    given = handover(nodes=2)
    keep = CheckpointSettings(save="kept", every_steps=1, resume="kept")
    given = dataclasses.replace(given, config=render(dataclasses.replace(given.config.spec, keep=keep)))
    write(tmp_path / "out", bundle("torchrun", given))
    return tmp_path / "out"


def add_output(
    folder: Path,
    rank: int,
    attempt: int,
    steps: range,
    result: Measurement | None = None,
    *,
    error: str = "",
    run: str = "memfit",
) -> None:
    """Write what one rank prints under torchrun, each on a node of its own. Its loss is 10 rank + step."""
    log = folder / "logs" / run / f"{run}_node{rank}" / f"attempt_{attempt}" / "0" / "stdout.log"
    log.parent.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"event": "started", "rank": rank, "attempt": f"{run}{attempt}", "time_s": 60.0 * attempt + rank}
    ]
    if steps.start:
        events.append({"event": "resumed", "path": f"kept/{steps.start}", "step": steps.start})
    events += [{"event": "step", "step": step, "loss": 10.0 * rank + step} for step in steps]
    lines = [json.dumps({"event": event.pop("event"), "by": "memfit", **event}) for event in events]
    if result is not None:
        lines.append(serialization.dumps({"event": "result", "by": "memfit", "measurement": result}))
    log.write_text("\n".join([*lines, '{"event": "st']))
    log.with_name("stderr.log").write_text(error)


def test_a_node_that_was_lost_is_the_reason_of_the_restart_and_losses_are_joined(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    add_output(folder, 0, 0, range(3), error=LOST_PEER)
    add_output(folder, 1, 0, range(3))
    for rank in (0, 1):
        add_output(folder, rank, 1, range(2, 4), measured(rank))
    m = read_exported_run(folder).run.measurement
    assert m.outcome is OutcomeKind.OK
    assert m.losses == (5.0, 6.0, 7.0, 8.0)
    (restart,) = m.restarts
    assert (restart.rank, restart.reason) == (1, LOST)
    assert (restart.step, restart.first_step, restart.checkpoint) == (3, 2, "kept/2")


def test_the_fullest_and_the_slowest_rank_and_the_nodes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    add_output(folder, 0, 0, range(4), measured(0, peak_bytes=2**20))
    add_output(folder, 1, 0, range(4), measured(1))
    store = ["--store", str(tmp_path / "store.db")]
    assert main(["record", "--add", str(folder), *store]) == 0
    shown = capsys.readouterr().out
    assert "1 on each of 2 nodes, connected by gloo" in shown
    assert "fullest rank 0: peak 1 MiB" in shown
    assert "slowest rank 1: 1.1 s for data and forward pass, of the others 100 ms" in shown
    assert main(["record", "--add", str(folder), *store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"]["fullest"] == 0


def test_memory_that_slurm_says_ran_out_is_the_outcome(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    add_output(folder, 0, 0, range(2), error=LOST_PEER, run="12-0")
    add_output(folder, 1, 0, range(2), run="12-0")
    text = (
        "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been ..."
    )
    (folder / "memfit-x-12.log").write_text(f"[default0]: hello\n{text}\n")
    m = read_exported_run(folder).run.measurement
    assert (m.outcome, m.reason) == (OutcomeKind.OOM, text)
    (folder / "memfit-x-12.log").rename(folder / "memfit-x-13.log")  # that of another job
    m = read_exported_run(folder).run.measurement
    assert (m.outcome, m.reason) == (OutcomeKind.FAILED, f"rank 1: {LOST}")


def test_what_was_started_after_a_complete_training_is_another_run(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for attempt in (0, 1):
        for rank in (0, 1):
            add_output(folder, rank, attempt, range(4), measured(rank))
    assert read_exported_run(folder).run.measurement.restarts == ()


def test_a_rank_without_output_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(UserError, match=r"no rank of .* has started"):
        read_exported_run(folder)
    add_output(folder, 0, 0, range(4), measured(0))
    with pytest.raises(UserError, match="has no output of rank 1, of 2 ranks"):
        read_exported_run(folder)
    with pytest.raises(UserError, match=r"has no run\.json"):
        read_exported_run(tmp_path)


def test_a_worker_of_another_launcher_exits_with_1_unless_its_outcome_is_ok(tmp_path: Path) -> None:
    source = "bad = lambda: dataclasses.replace(words(), loss=lambda m, b: words_loss(m, b) * float('nan'))"
    (tmp_path / "tiny.py").write_text(f"{TINY.read_text()}\n\nimport dataclasses\n{source}\n")
    spec = dataclasses.replace(handover(Plan()).config.spec, job=JobRef(spec="tiny.py:bad"), steps=1)
    (tmp_path / "run.json").write_text(render(spec).files["run.json"])
    ended = subprocess.run(
        [sys.executable, "-m", "memfit.worker", "run", "run.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert '"outcome": "failed"' in ended.stdout, ended.stderr[-500:]
    assert ended.returncode == 1
