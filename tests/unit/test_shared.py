"""The shared record of a proof of concept: its content, its validation, and the comparison of two records."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_fixture import CAP, METRICS, PEAKS, PLAIN, full_poc

from memfit.cli.app import main
from memfit.store import Store, exchange
from memfit.types.errors import UserError
from memfit.types.result import VerdictKind

Change = Callable[[dict[str, Any]], None]


def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(exchange.text(exchange.of_poc(full_poc())))
    return found


def changed(change: Change) -> exchange.Shared:
    record = plain()
    change(record)
    return exchange.parse_record(json.dumps(record), what="it")


def test_a_record_holds_the_measured_figures() -> None:
    record = exchange.of_poc(full_poc())
    assert record.cap_bytes == CAP
    runs = [r for r in full_poc().runs if r.spec.plan == PLAIN and r.measurement.peak_bytes]
    assert record.baseline.measured_peak_bytes == max(r.measurement.peak_bytes or 0 for r in runs)
    assert record.baseline.predicted_peak_bytes == PEAKS[PLAIN]
    assert (record.baseline.under_cap, record.recommended.under_cap) == ("oom", "ok")
    assert set(record.recommended.metric_by_seed) == {"0", "1", "2"}
    assert record.baseline.metric_by_seed["0"] == pytest.approx(METRICS[PLAIN], abs=1)
    assert record.verdict is not None
    assert record.verdict.effect == record.recommended.effect == "E2"


def test_the_published_schema_is_the_schema_in_use() -> None:
    path = Path(__file__).parents[2] / "docs" / "record.schema.json"
    assert json.loads(path.read_text()) == exchange.schema(), (
        "memfit record --schema > docs/record.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(dict(exchange.schema()))
    jsonschema.validate(plain(), dict(exchange.schema()))


def test_a_record_imported_and_exported_again_has_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        lambda r: r["baseline"].update(energy={"joules": 3.0, "boundary": ""}),
        "baseline.energy.boundary",
    ),
    "effect class of nobody": (lambda r: r["recommended"].update(effect="E9"), "recommended.effect"),
    "interval upside down": (lambda r: r["verdict"].update(low=2.0, high=1.0), "verdict"),
    "not a number": (lambda r: r["baseline"]["metric_by_seed"].update({"0": float("nan")}), "metric_by_seed"),
    "equivalent outside its margin": (lambda r: r["verdict"].update(low=-50.0), "not inside its margin"),
    "more pairs than seeds": (lambda r: r["verdict"].update(pairs=99), "99 pairs"),
    "a verdict on another class": (lambda r: r["verdict"].update(effect="E0"), "verdict.effect is E0"),
    "a technique of nobody": (lambda r: r["recommended"].update(plan={"magic": {}}), "technique 'magic'"),
    "an ID that is a path": (lambda r: r.update(poc_id="../../x"), "poc_id"),
    "a number that is text": (
        lambda r: r.update(cap_bytes="1000"),
        "cap_bytes: it is '1000'; allowed: a valid integer",
    ),
    "a number that is a truth value": (lambda r: r["data"].update(batch_size=True), "data.batch_size"),
    "a version that is a truth value": (lambda r: r.update(version=True), "version True"),
    "a setting that is a fraction": (
        lambda r: r["recommended"].update(plan={"zero": {"stage": 1.5}}),
        "plan.zero.stage: it is",
    ),
    "another effect than its plan's": (
        lambda r: (r["recommended"].update(effect="E0"), r["verdict"].update(effect="E0")),
        "recommended.effect is E0",
    ),
    "techniques that clash": (
        lambda r: r["recommended"]["plan"].update({"bf16-parameters": {}}),
        "recommended.plan",
    ),
    "a setting of nobody": (
        lambda r: r["recommended"]["plan"].update({"bf16-autocast": {"speed": 9}}),
        "unknown setting 'speed'",
    ),
    "a stage of nobody": (
        lambda r: r["recommended"]["plan"].update({"zero": {"stage": 9}}),
        "stage is 9; allowed: 0, 1, 2, 3",
    ),
    "equivalent without margin": (lambda r: r["verdict"].update(margin=None), "verdict.margin is missing"),
    "equivalent without interval": (lambda r: r["verdict"].update(low=None), "verdict.low is null"),
    "equivalent on no pairs": (lambda r: r["verdict"].update(pairs=0), "0 pairs"),
    "equivalent without scores": (
        lambda r: [r[side].update(metric_by_seed={}) for side in ("baseline", "recommended")],
        "the scores are of seeds none",
    ),
    "equivalent with half of the scores": (
        lambda r: r["baseline"].update(metric_by_seed={}),
        "different seeds",
    ),
    "equivalent against its scores": (
        lambda r: r["recommended"].update(metric_by_seed={"0": 10.0, "1": 20.0, "2": 30.0}),
        "verdict.difference is 0.1, but the scores give",
    ),
    "equivalent on other seeds": (
        lambda r: r["baseline"].update(metric_by_seed={"7": 67.2, "8": 67.4, "9": 67.6}),
        "different seeds",
    ),
    "undecided against its scores": (lambda r: r["verdict"].update(kind="undecided"), "is undecided"),
    "bitwise equal with other scores": (lambda r: _bitwise(r, 1.0), "the scores of seed"),
    "an outcome of nobody": (
        lambda r: r["recommended"].update(under_cap="fine"),
        "recommended.under_cap: it is 'fine'; allowed: ",
    ),
    "under the cap with a peak above it": (
        lambda r: r["recommended"].update(measured_peak_bytes=2 * CAP),
        "above the cap",
    ),
    "a day that never was": (
        lambda r: r.update(created="2026-02-31T00:00:00+00:00"),
        "2026-02-31T00:00:00+00:00 does not exist",
    ),
    "a day to come": (lambda r: r.update(created="2999-02-01T00:00:00+00:00"), "is in the future"),
    "a day of no time zone": (lambda r: r.update(created="2026-02-01T00:00:00"), "created"),
    "a peak of nothing": (lambda r: r["baseline"].update(measured_peak_bytes=0), "measured_peak_bytes"),
    "an engine without a name": (lambda r: r["baseline"].update(engine=" "), "baseline.engine"),
    "scores of nothing": (lambda r: r.update(metric=""), "metric has no name"),
    "a blank boundary": (
        lambda r: r["baseline"].update(energy={"joules": 3.0, "boundary": " \t"}),
        "baseline.energy.boundary",
    ),
    "half a character": (lambda r: r.update(command="\ud800"), "command: '\\ud800' has half a character"),
    "half a character in a name": (lambda r: r["hardware"].update({"\ud800": ""}), "hardware"),
    "a step time ratio of other steps": (lambda r: r.update(step_time_ratio=0.01), "step_time_ratio is 0.01"),
    "a baseline that saves memory": (
        lambda r: r["baseline"].update(plan={"activation-checkpointing": {"every": 1}}, effect="E0"),
        "allowed: plain training",
    ),
    "a step time ratio of nothing": (lambda r: r["baseline"].update(step_s=None), "step_time_ratio is given"),
    "a setting without end": (
        lambda r: r["recommended"]["plan"].update({"zero": {"offload": "x" * 10**6}}),
        "offload is 'xxx",
    ),
    "out of memory far below the cap": (
        lambda r: (r["baseline"].update(measured_peak_bytes=CAP), r.update(cap_bytes=10**12)),
        "far below the cap",
    ),
    "one seed as three": (
        lambda r: r["baseline"].update(metric_by_seed={"0": 1.0, "00": 2.0, "000": 3.0}),
        "the seed '00'",
    ),
    "one plan with two peaks": (
        lambda r: r["recommended"].update(plan={}, effect="E0", measured_peak_bytes=CAP // 2),
        "the two plans are the same",
    ),
    "an interval without a margin": (
        lambda r: (_bitwise(r), r["verdict"].update(low=-9.0)),
        "verdict.low is given",
    ),
    "notes that are text": (lambda r: r.update(notes="none"), "notes: it is 'none'; allowed: a list"),
}


def _bitwise(r: dict[str, Any], off: float = 0.0) -> None:
    """Changes the record to a bitwise verdict on a bitwise-exact plan; its scores differ by `off`."""
    r["recommended"].update(plan={"activation-checkpointing": {"every": 1}}, effect="E0")
    r["recommended"]["metric_by_seed"] = {s: v + off for s, v in r["baseline"]["metric_by_seed"].items()}
    r["verdict"].update(effect="E0", margin=None, difference=None, low=None, high=None)


@pytest.mark.parametrize(("change", "place"), BROKEN.values(), ids=BROKEN)
def test_an_invalid_record_is_refused_in_one_line(
    change: Change, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, path = plain(), tmp_path / "broken.json"
    change(record)
    path.write_text(json.dumps(record))
    assert main(["record", "--store", str(tmp_path / "s"), "--add", str(path)]) == 2
    told = capsys.readouterr().err
    assert place in told
    assert told.count("\n") == 1
    assert len(told) < 1000
    assert not Store(tmp_path / "s").records()


def _places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if place:
        yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*place, key))


def test_values_that_the_schema_refuses_are_not_read() -> None:
    """Each field of a record in turn gets a value of every other kind."""
    judge, refused, good = jsonschema.Draft202012Validator(dict(exchange.schema())), 0, plain()
    for place in _places(good):
        for value in (None, "1000", " ", True, 0, -1, 1.5, [], {}, ["x"], {"x": "y"}, 10**30):
            record = copy.deepcopy(good)
            part: Any = functools.reduce(lambda p, key: p[key], place[:-1], record)
            part[place[-1]] = value
            if judge.is_valid(record):
                continue
            refused += 1
            with pytest.raises(UserError):
                exchange.parse_record(json.dumps(record), what=f"{place} as {value!r}")
    assert refused > 500


def test_a_bitwise_verdict_needs_no_margin() -> None:
    found = changed(_bitwise)
    assert found.verdict is not None
    assert (found.verdict.kind, found.verdict.effect) == ("equivalent", "E0")


def test_a_run_out_of_memory_under_the_cap_is_recorded() -> None:
    poc = full_poc()
    oom = next(r for r in poc.runs if r.measurement.outcome.value == "oom").measurement
    last = max(i for i, r in enumerate(poc.runs) if r.spec.name == "recommended")
    broken = dataclasses.replace(poc.runs[last], measurement=oom)
    judged = dataclasses.replace(
        poc.verdicts[0].verdict, kind=VerdictKind.UNDECIDED, margin=None, difference=None, low=None, high=None
    )
    record = exchange.of_poc(
        dataclasses.replace(
            poc,
            runs=(*poc.runs[:last], broken, *poc.runs[last + 1 :]),
            verdicts=(dataclasses.replace(poc.verdicts[0], verdict=judged),),
        )
    )
    assert record.recommended.under_cap == "oom"
    assert record.verdict is not None
    assert record.verdict.pairs == 3


def test_text_that_is_not_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{\n nothing")
    with pytest.raises(UserError, match="line 2"):
        exchange.read(path)


def test_a_number_of_5000_digits_is_refused() -> None:
    raw = json.dumps(plain()).replace(str(CAP), "9" * 5000)
    with pytest.raises(UserError, match="Exceeds the limit"):
        exchange.parse_record(raw, what="it")


def test_deeply_nested_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        exchange.read(path)


def rows(a: exchange.Shared, b: exchange.Shared) -> dict[str, exchange.Compared]:
    return {row.quantity: row for row in exchange.compare(a, b)}


def test_records_of_equal_conditions_are_compared() -> None:
    a = exchange.of_poc(full_poc())
    peak = a.recommended.measured_peak_bytes or 0
    found = rows(a, changed(lambda r: r["recommended"].update(measured_peak_bytes=peak + 1)))
    assert found["recommended: peak_bytes"].ratio == (peak + 1) / peak
    assert found["baseline: peak_bytes"].ratio == 1
    assert {name for name, row in found.items() if row.against} == {"baseline: joules", "recommended: joules"}
    assert found["recommended: joules"].against == ["A has no value", "B has no value"]


def _other_seeds(r: dict[str, Any]) -> None:
    for side in ("baseline", "recommended"):
        scores = r[side]["metric_by_seed"]
        r[side]["metric_by_seed"] = {str(int(seed) + 7): score for seed, score in scores.items()}


@pytest.mark.parametrize(
    ("change", "quantity", "why"),
    [
        (lambda r: r["baseline"]["energy"].update(boundary="wall socket"), "baseline: joules", "boundary"),
        (_bitwise, "verdict", "effect"),
        (_bitwise, "recommended: peak_bytes", "effect class differs: E0 and E2"),
        (_bitwise, "recommended: step_s", "effect class differs: E0 and E2"),
        (_bitwise, "recommended: joules", "effect class differs: E0 and E2"),
        (_bitwise, "recommended: Q3", "effect class differs: E0 and E2"),
        (lambda r: r["model"].update(size="paper"), "baseline: peak_bytes", "size"),
        (lambda r: r["recommended"].update(ranks=4), "recommended: peak_bytes", "ranks"),
        (lambda r: r["recommended"].update(engine="deepspeed"), "recommended: step_s", "engine"),
        (lambda r: r["software"].update({"env OMP_NUM_THREADS": "1"}), "baseline: step_s", "OMP_NUM_THREADS"),
        (lambda r: r["software"].update(threads="32"), "baseline: step_s", "threads"),
        (_other_seeds, "baseline: Q3", "seeds"),
        (lambda r: r["hardware"].update(processor="another"), "baseline: step_s", "processor"),
        (lambda r: r["data"].update(batch_size=999), "recommended: step_s", "batch_size"),
        (lambda r: r["software"].update(torch="1.0"), "baseline: peak_bytes", "torch"),
        (lambda r: r["software"].update(torch="1.0"), "baseline: step_s", "torch"),
        (lambda r: r.update(metric="another"), "baseline: another", "metric"),
    ],
)
def test_records_of_unequal_conditions_are_not_compared(change: Change, quantity: str, why: str) -> None:
    record = plain()
    record["baseline"]["energy"] = record["recommended"]["energy"] = {"joules": 5.0, "boundary": "package"}
    a = exchange.parse_record(json.dumps(record), what="a")
    change(record)
    b = exchange.parse_record(json.dumps(record), what="b")
    found = {row.quantity: row for row in exchange.compare(b, a)}[quantity]
    assert found.ratio is None
    assert any(why in reason for reason in found.against)


def test_different_plans_of_the_same_effect_class_are_compared() -> None:
    a = exchange.of_poc(full_poc())
    b = changed(lambda r: r["recommended"]["plan"].pop("activation-checkpointing"))
    assert rows(a, b)["recommended: peak_bytes"].ratio == 1


def test_an_unfinished_poc_has_no_record() -> None:
    with pytest.raises(UserError, match="was not finished"):
        exchange.of_poc(dataclasses.replace(full_poc(), finished=False))


def test_a_field_that_appears_twice_is_refused() -> None:
    text = exchange.text(exchange.of_poc(full_poc()))
    twice = text.replace('"reproducible":', '"reproducible": false, "reproducible":', 1)
    with pytest.raises(UserError, match="has the field 'reproducible' more than once"):
        exchange.parse_record(twice, what="b")
