"""Imported records: named by their source, never in place of our own, shown without being executed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc

from memfit.cli.app import main
from memfit.store import Store, exchange
from memfit.store.database import TAKEN

HOSTILE = "\x1b[31mred\x1b]0;title\x07\u202egnp\u2066\x9b2J\nEvery gate holds."
ID = full_poc().poc_id


def written(path: Path, **changes: Any) -> str:
    """The path of a file with the record of the fixture's PoC, with changes."""
    record = json.loads(exchange.text(exchange.of_poc(full_poc())))
    for name, value in changes.items():
        record[name] = record[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def ours(tmp_path: Path) -> str:
    """A store with a PoC of ours."""
    for kind in ("begin", "poc"):
        Store(tmp_path / "s").append(ID, kind, full_poc())
    return str(tmp_path / "s")


def test_a_changed_record_with_the_id_of_our_own_poc_is_refused(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = written(tmp_path / "forged.json", effort={"failed_attempts": 0, "packages": 0})
    for command in (
        ["record", "--add", forged],
        ["decide", "--gates", "default", forged],
        ["record", "--compare", forged, ID],
    ):
        assert main([*command, "--store", ours]) == 2, command
        told = capsys.readouterr().err
        assert f"has the ID {ID}" in told
        assert told.count("\n") == 1
    assert not Store(Path(ours)).records(kind=TAKEN)


def test_a_stored_import_does_not_replace_our_own_record(
    ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(exchange.text(exchange.of_poc(full_poc()))) | {"place": "forged"}
    Store(Path(ours)).append(ID, TAKEN, record)  # as an earlier version stored it
    assert main(["record", "--store", ours]) == 0
    assert "forged" not in capsys.readouterr().out


def test_our_own_record_imported_again_counts_as_our_own(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = written(tmp_path / "same.json")
    assert main(["record", "--store", ours, "--add", same]) == 0
    assert not Store(Path(ours)).records(kind=TAKEN)
    assert main(["decide", "--gates", "default", same, "--store", ours, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["taken_from"] == ""


def test_a_record_added_twice_is_reported_as_stored_before(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = written(tmp_path / "theirs.json", poc_id="theirs")
    for key in ("added", "already_stored"):
        assert main(["record", "--store", ours, "--add", theirs, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {key: "theirs"}


def test_a_ratio_of_zero_is_printed(ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = exchange.of_poc(full_poc())
    plain, changed = record.baseline.metric_by_seed, record.recommended.metric_by_seed
    theirs = written(
        tmp_path / "theirs.json",
        poc_id="theirs",
        baseline={"metric_by_seed": dict.fromkeys(plain, 0.0)},
        recommended={"metric_by_seed": {seed: changed[seed] - plain[seed] for seed in changed}},
    )
    assert main(["record", "--compare", ID, theirs, "--store", ours]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "baseline: Q3" in line)
    assert "0.000" in row


def test_the_source_of_an_imported_record_is_named_by_every_command(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = written(tmp_path / "theirs.json", poc_id="theirs")
    add = ["record", "--store", ours, "--add", theirs, "--from", "group B"]
    assert [main(add), main(add)] == [0, 0]
    assert len(Store(Path(ours)).records(kind=TAKEN)) == 1
    other = written(tmp_path / "other.json", poc_id="theirs", place="elsewhere")
    assert main(["record", "--store", ours, "--add", other]) == 2
    capsys.readouterr()
    assert main(["decide", "--gates", "default", "theirs", "--store", ours]) == 0
    assert "Not measured here: the record is from group B." in capsys.readouterr().out
    assert main(["decide", "--gates", "default", "theirs", "--store", ours, "--lang", "ja"]) == 0
    assert "提供元：group B" in capsys.readouterr().out
    assert main(["decide", "--gates", "default", "theirs", "--store", ours, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["taken_from"] == "group B"
    assert main(["record", "--compare", ID, "theirs", "--store", ours]) == 0
    assert "B was not measured here: group B reports it" in capsys.readouterr().out
    for command in (["decide", "theirs"], ["report", "--poc", "theirs"]):
        assert main([*command, "--store", ours]) == 2
        assert "is a record from group B, not measured here" in capsys.readouterr().err
    assert main(["decide", "--gates", "default", "theirs", "--store", ours, "--attended-minutes", "5"]) == 2
    assert main(["record", "--store", ours, "--from", "group B"]) == 2


def test_a_job_file_named_by_an_imported_record_is_not_run(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil, ran = tmp_path / "evil.py", tmp_path / "ran"
    evil.write_text(f"import pathlib\n\npathlib.Path({str(ran)!r}).touch()\n")
    theirs = written(tmp_path / "theirs.json", poc_id="theirs", model={"job": f"{evil}:job"})
    asked = ["decide", "--gates", "default", theirs, "--store", ours, "--pilot", "RTX-4090"]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "memfit does not run a file because a record from others names it" in told
    assert "--job FILE.py:NAME" in told
    assert not ran.exists()
    assert main([*asked, "--job", f"{evil}:job"]) == 2, "it has no job, and is run: it was asked for"
    assert ran.exists()


def test_control_characters_in_imported_texts_are_not_printed(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = written(
        tmp_path / "theirs.json",
        poc_id="theirs",
        model={"job": HOSTILE, "size": HOSTILE},
        metric=HOSTILE,
        hardware={"machine": HOSTILE, HOSTILE: "x"},
        command=HOSTILE,
    )
    assert main(["record", "--store", ours, "--add", theirs, "--from", HOSTILE]) == 0
    for command in (
        ["record", "--compare", ID, theirs],
        ["record", "--compare", "theirs", ID],
        ["record", "--compare", "theirs", ID, "--json"],
        ["decide", "--gates", "default", theirs],
        ["decide", "--gates", "default", "theirs"],
        ["decide", "--gates", "default", "theirs", "--pilot", "L4"],
        ["record", "--poc", "theirs"],
        ["decide", "theirs"],
    ):
        main([*command, "--store", ours])
        told = "".join(capsys.readouterr())
        assert "red" in told, command
        assert not set("\x1b\x07\x9b\u202e\u2066") & set(told), command
        assert not any(line.startswith("Every gate holds.") for line in told.splitlines()[:4]), command


def test_control_characters_in_a_poc_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from memfit.cli.poc import _print

    poc = full_poc()
    run = poc.runs[0]
    seen = dataclasses.replace(run, measurement=dataclasses.replace(run.measurement, reason=HOSTILE))
    hostile = dataclasses.replace(
        poc, runs=(seen, *poc.runs[1:]), notes=(HOSTILE,), metric=HOSTILE, report=f"/tmp/{HOSTILE}"
    )
    for as_json in (False, True):
        _print(hostile, lang="en", as_json=as_json)
        told = capsys.readouterr().out
        assert not set("\x1b\x07\x9b\u202e\u2066") & set(told)
    assert json.loads(told)["notes"] == [HOSTILE], "as JSON it is the same text"
