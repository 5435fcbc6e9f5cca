"""The record of one run: written by `memfit run --record`, added to a store by `memfit record --add`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_fixture

from memfit.cli import main
from memfit.store.database import Store
from memfit.store.exchange.run_record import RUN, parse_run_record, record_of, run_record_text
from memfit.types import serialization
from memfit.types.result import PreparedRun

A_RUN = report_fixture.runs()[1]


def test_a_record_is_added_once_with_the_time_and_environment_of_its_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {"processor": "another one", "accelerators": "none seen"}
    data = json.loads(run_record_text(record_of(A_RUN, "trial-1")))
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data | {"environment": elsewhere, "created": "2026-01-02T03:04:05.000+00:00"}))
    add = ["record", "--add", str(file), "--store", str(tmp_path / "s.sqlite3")]
    assert main(add) == 0
    assert main([*add, "--json"]) == 0
    assert capsys.readouterr().out == 'added trial-1\n{\n  "already_stored": "trial-1"\n}\n'
    store = Store(tmp_path / "s.sqlite3")
    (row,) = store.records("trial-1", RUN)
    assert row.created == "2026-01-02T03:04:05.000+00:00"
    assert store.environment(row.environment) == elsewhere
    assert serialization.loads(type(A_RUN), row.body) == A_RUN


def test_a_run_survives_being_written_and_read() -> None:
    assert parse_run_record(run_record_text(record_of(A_RUN, "run")), what="it").run == A_RUN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "char-lm", "--label", "x"], "--label needs --record"),
        (["run", "char-lm", "--record", "r.json", "--label", "../x"], "--label '../x'"),
        (["run", "char-lm", "--record", "r.json", "--store", "s"], "--store cannot be used with --record"),
        (["run", "--spec", "spec.json"], "--spec needs --record"),
        (
            ["run", "char-lm", "--spec", "spec.json", "--record", "r.json"],
            "memfit: JOB cannot be used with --spec",
        ),
        (["run", "--spec", "none.json", "--record", "r.json"], "cannot read none.json"),
        (["run", "--spec", "wrong.json", "--record", "r.json"], "wrong.json is invalid"),
        (["record", "--add", "wrong.json"], "wrong.json"),
        (["record", "--add", "run.json", "--from", "them"], "--from is for the record of a proof of concept"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "wrong.json").write_text('{"format": "memfit-run", "version": 2}')
    (tmp_path / "run.json").write_text(run_record_text(record_of(A_RUN, "run")))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


@pytest.mark.long
def test_exactly_the_prepared_run_is_made(tmp_path: Path) -> None:
    from memfit.types.job import JobRef
    from memfit.types.launch import RunSpec
    from memfit.types.plan import Plan

    spec = RunSpec(
        name="baseline", role="baseline", job=JobRef(spec="char-lm"), plan=Plan(), seed=3, steps=2, threads=1
    )
    prepared = PreparedRun(spec=spec, estimate=report_fixture.estimate(Plan(), 1e6))
    (tmp_path / "spec.json").write_text(serialization.dumps(prepared))
    record = tmp_path / "run.json"
    assert main(["run", "--spec", str(tmp_path / "spec.json"), "--record", str(record)]) == 0
    run = parse_run_record(record.read_text(), what="it").run
    assert run.spec == spec
    assert len(run.measurement.losses) == 2
