"""The record that is shared: what it says, what it refuses, and what two of them may be compared in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_fixture import CAP, METRICS, PEAKS, PLAIN, full_poc

from memfit import shared
from memfit.cli.app import main
from memfit.store import Store
from memfit.types.errors import UserError

Change = Callable[[dict[str, Any]], None]


def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared.text(shared.of_poc(full_poc())))
    return found


def changed(change: Change) -> shared.Shared:
    record = plain()
    change(record)
    return shared.parsed(json.dumps(record), what="it")


def test_a_record_says_what_was_measured() -> None:
    record = shared.of_poc(full_poc())
    assert record.cap_bytes == CAP
    runs = [r for r in full_poc().runs if r.spec.plan == PLAIN and r.measurement.peak_bytes]
    assert record.baseline.measured_peak_bytes == max(r.measurement.peak_bytes or 0 for r in runs)
    assert record.baseline.predicted_peak_bytes == PEAKS[PLAIN]
    assert (record.baseline.under_cap, record.recommended.under_cap) == ("oom", "ok")
    assert set(record.recommended.metric_by_seed) == {"0", "1", "2"}
    assert record.baseline.metric_by_seed["0"] == pytest.approx(METRICS[PLAIN], abs=1)
    assert record.verdict is not None
    assert record.verdict.effect == record.recommended.effect == "E2"


def test_the_schema_that_is_published_is_the_one_that_is_used() -> None:
    path = Path(__file__).parents[2] / "docs" / "record.schema.json"
    assert json.loads(path.read_text()) == shared.schema(), "memfit record --schema > docs/record.schema.json"
    jsonschema.Draft202012Validator.check_schema(dict(shared.schema()))
    jsonschema.validate(plain(), dict(shared.schema()))


def test_out_in_and_out_again_are_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours.sqlite3", tmp_path / "theirs.sqlite3"
    poc = full_poc()
    Store(ours).append(poc.poc_id, "begin", poc)
    Store(ours).append(poc.poc_id, "poc", poc)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert main(["record", "--store", str(ours), "--out", str(first)]) == 0
    assert main(["record", "--store", str(theirs), "--add", str(first)]) == 0
    asked = ["record", "--store", str(theirs), "--poc", poc.poc_id, "--out", str(second)]
    assert main(asked) == 0
    assert first.read_bytes() == second.read_bytes()
    capsys.readouterr()
    assert main(["record", "--store", str(theirs)]) == 2, "a record taken in is not a PoC of ours"
    assert "no proof of concept" in capsys.readouterr().err


BROKEN: dict[str, tuple[Change, str]] = {
    "no baseline": (lambda r: r.pop("baseline"), "baseline"),
    "another format": (lambda r: r.update(format="mlperf"), "format"),
    "a later version": (lambda r: r.update(version=2), "version"),
    "unknown field": (lambda r: r.update(price=3), "price"),
    "negative peak": (lambda r: r["baseline"].update(measured_peak_bytes=-1), "baseline.measured_peak_bytes"),
    "no parameters": (lambda r: r["model"].update(parameters=0), "model.parameters"),
    "a time that is text": (lambda r: r["recommended"].update(step_s="fast"), "recommended.step_s"),
    "energy without boundary": (
        lambda r: r["baseline"].update(energy={"joules": 3.0, "boundary": ""}), "baseline.energy.boundary",
    ),
    "effect class of nobody": (lambda r: r["recommended"].update(effect="E9"), "recommended.effect"),
    "interval upside down": (lambda r: r["verdict"].update(low=2.0, high=1.0), "verdict"),
    "not a number": (lambda r: r["baseline"]["metric_by_seed"].update({"0": float("nan")}), "metric_by_seed"),
    "equivalent outside its margin": (lambda r: r["verdict"].update(low=-50.0), "not inside its margin"),
    "more pairs than seeds": (lambda r: r["verdict"].update(pairs=99), "99 pairs"),
    "a verdict on another class": (lambda r: r["verdict"].update(effect="E0"), "the verdict is on E0"),
    "a technique of nobody": (lambda r: r["recommended"].update(plan={"magic": {}}), "no technique 'magic'"),
    "an ID that is a path": (lambda r: r.update(poc_id="../../x"), "poc_id"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "place"), BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_one_clear_line(
    change: Change, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, path = plain(), tmp_path / "broken.json"
    change(record)
    path.write_text(json.dumps(record))
    assert main(["record", "--store", str(tmp_path / "s"), "--add", str(path)]) == 2
    told = capsys.readouterr().err
    assert place in told
    assert told.count("\n") == 1
    assert not Store(tmp_path / "s").records()


def test_text_that_is_no_json_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{\n nothing")
    with pytest.raises(UserError, match="line 2"):
        shared.read(path)


def test_text_nested_without_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested deeper"):
        shared.read(path)


def rows(a: shared.Shared, b: shared.Shared) -> dict[str, shared.Compared]:
    return {row.quantity: row for row in shared.compare(a, b)}


def test_equal_conditions_are_compared() -> None:
    a = shared.of_poc(full_poc())
    twice = 2 * (a.recommended.measured_peak_bytes or 0)
    found = rows(a, changed(lambda r: r["recommended"].update(measured_peak_bytes=twice)))
    assert found["recommended: peak_bytes"].ratio == 2
    assert found["baseline: peak_bytes"].ratio == 1
    assert {name for name, row in found.items() if row.against} == {"baseline: joules", "recommended: joules"}
    assert found["recommended: joules"].against == ["A has none", "B has none"]


def _other_seeds(r: dict[str, Any]) -> None:
    scores = r["baseline"]["metric_by_seed"]
    r["baseline"]["metric_by_seed"] = {str(int(seed) + 7): score for seed, score in scores.items()}


def _exact(r: dict[str, Any]) -> None:
    for part in ("verdict", "recommended"):
        r[part]["effect"] = "E0"


@pytest.mark.parametrize(
    ("change", "quantity", "why"),
    [
        (lambda r: r["baseline"]["energy"].update(boundary="wall socket"), "baseline: joules", "boundary"),
        (_exact, "verdict", "effect"),
        (lambda r: r["model"].update(size="paper"), "baseline: peak_bytes", "size"),
        (lambda r: r["recommended"].update(ranks=4), "recommended: peak_bytes", "ranks"),
        (lambda r: r["recommended"].update(engine="deepspeed"), "recommended: step_s", "engine"),
        (lambda r: r["software"].update({"env OMP_NUM_THREADS": "1"}), "baseline: step_s", "threads"),
        (_other_seeds, "baseline: Q3", "seeds"),
        (lambda r: r["hardware"].update(processor="another"), "baseline: step_s", "processor"),
        (lambda r: r["data"].update(batch_size=999), "recommended: step_s", "batch_size"),
        (lambda r: r["software"].update(torch="1.0"), "baseline: peak_bytes", "torch"),
        (lambda r: r.update(metric="another"), "baseline: another", "metric"),
    ],
)
def test_unequal_conditions_are_not_compared(change: Change, quantity: str, why: str) -> None:
    record = plain()
    record["baseline"]["energy"] = record["recommended"]["energy"] = {"joules": 5.0, "boundary": "package"}
    a = shared.parsed(json.dumps(record), what="a")
    change(record)
    b = shared.parsed(json.dumps(record), what="b")
    found = {row.quantity: row for row in shared.compare(b, a)}[quantity]
    assert found.ratio is None
    assert any(why in reason for reason in found.against)


def test_other_plans_of_other_effect_classes_are_not_the_same_claim() -> None:
    a = shared.of_poc(full_poc())
    b = changed(lambda r: (r["recommended"].update(effect="E0", plan={}), r["verdict"].update(effect="E0")))
    metric = rows(a, b)[f"recommended: {a.metric}"]
    assert metric.ratio is None
    assert any("effect class E2 and E0" in reason for reason in metric.against)


def test_an_unfinished_poc_has_no_record() -> None:
    with pytest.raises(UserError, match="interrupted"):
        shared.of_poc(dataclasses.replace(full_poc(), finished=False))
