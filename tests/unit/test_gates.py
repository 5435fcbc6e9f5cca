"""Gates of a roll-out: which hold, which fail, and that a looser limit never fails a gate that held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import full_poc

from memfit.cli.app import main
from memfit.decision import rollout_gates
from memfit.report.decision_answers import gate_words
from memfit.report.quantities import value_text
from memfit.report.words import load_words
from memfit.store import Store, exchange
from memfit.types.errors import UserError

RECORD = exchange.of_poc(full_poc())
UNDECIDED = {"kind": "undecided"} | dict.fromkeys(("margin", "difference", "low", "high"))
NO_PEAKS = dict.fromkeys(("predicted_peak_bytes", "measured_peak_bytes"))


def changed(**sides: Any) -> exchange.Shared:
    found: dict[str, Any] = json.loads(exchange.text(RECORD))
    for name, values in sides.items():
        found[name] = found[name] | values if isinstance(values, dict) else values
    return exchange.parse_record(json.dumps(found), what="it")


def failing(record: exchange.Shared, limits: rollout_gates.Gates | None = None) -> set[str]:
    return {g.name for g in rollout_gates.evaluate(record, limits or rollout_gates.Gates()) if not g.holds}


def test_a_good_poc_passes_every_gate() -> None:
    assert failing(RECORD) == set()


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (changed(recommended={"under_cap": "oom"}), "memory: trained under the cap"),
        (changed(recommended={"under_cap": ""}), "memory: trained under the cap"),
        (changed(recommended={"predicted_peak_bytes": 1}), "memory: prediction error"),
        (changed(recommended=NO_PEAKS), "memory: prediction error"),
        (changed(recommended={"measured_peak_bytes": None}), "memory: prediction error"),
        (changed(baseline={"predicted_peak_bytes": None}), "memory: prediction error"),
        (changed(step_time_ratio=2.01), "time: step by plain's"),
        (changed(step_time_ratio=None, recommended={"step_s": 99.0}), "time: step by plain's"),
        (changed(step_time_ratio=None, recommended={"step_s": None}), "time: step by plain's"),
        (changed(verdict=UNDECIDED), "accuracy: verdict"),
        (changed(effort={"failed_attempts": 4}), "effort: failed attempts"),
    ],
)
def test_a_violated_limit_fails_exactly_its_own_gate(record: exchange.Shared, name: str) -> None:
    assert failing(record) == {name}


def test_missing_peaks_of_plain_training_fail_no_gate() -> None:
    assert failing(changed(baseline=NO_PEAKS)) == set()


def test_the_time_gate_uses_the_reports_step_ratio_and_falls_back_to_the_ratio_of_medians() -> None:
    """1.31 is the median over the pairs; records without it use the ratio of both medians, 1.30."""
    found = {g.name: g.found for g in rollout_gates.evaluate(RECORD, rollout_gates.Gates())}
    assert found["time: step by plain's"] == full_poc().step_time_ratio == 1.31
    old = changed(step_time_ratio=None)
    assert "step_time_ratio" not in exchange.text(old)
    found = {g.name: g.found for g in rollout_gates.evaluate(old, rollout_gates.Gates())}
    assert found["time: step by plain's"] == pytest.approx(1.30)


def test_a_value_just_over_its_limit_is_printed_with_enough_digits_to_differ() -> None:
    near = next(
        g
        for g in rollout_gates.evaluate(changed(step_time_ratio=2.003), rollout_gates.Gates())
        if not g.holds
    )
    name, found, limit = (value_text(part, load_words("en")) for part in gate_words(near.words))
    assert (name, found, limit) == ("step time relative to plain training", "2.0030", "at most 2.00×")


def test_the_energy_gate_fails_when_the_runs_were_measured_at_different_boundaries() -> None:
    limits = rollout_gates.Gates(energy=rollout_gates.EnergyLimits(ratio=10))
    one, other = {"joules": 3.0, "boundary": "package"}, {"joules": 4.0, "boundary": "wall"}
    assert failing(changed(baseline={"energy": one}, recommended={"energy": one}), limits) == set()
    record = changed(baseline={"energy": one}, recommended={"energy": other})
    assert failing(record, limits) == {"energy: run by plain's"}


limit = st.floats(0, 5)


@given(tight=st.tuples(limit, limit, limit), more=st.tuples(limit, limit, limit), step=st.floats(0.01, 5))
def test_a_looser_limit_never_fails_a_gate_that_the_tighter_one_passed(
    tight: tuple[float, ...], more: tuple[float, ...], step: float
) -> None:
    def limits(error: float, ratio: float, attempts: float) -> rollout_gates.Gates:
        return rollout_gates.Gates(
            memory=rollout_gates.MemoryLimits(prediction_error=error),
            time=rollout_gates.TimeLimits(step_ratio=ratio),
            effort=rollout_gates.EffortLimits(failed_attempts=attempts),
        )

    record = changed(step_time_ratio=None, recommended={"step_s": step}, effort={"failed_attempts": 2})
    loose = limits(*(a + b for a, b in zip(tight, more, strict=True)))
    assert failing(record, loose) <= failing(record, limits(*tight))


def test_gates_without_limits_pass_any_record() -> None:
    nothing = rollout_gates.Gates(
        memory=rollout_gates.MemoryLimits(prediction_error=None, under_cap=False),
        time=rollout_gates.TimeLimits(step_ratio=None),
        accuracy=rollout_gates.AccuracyLimits(verdicts=None),
        reproducibility=rollout_gates.ReproducibilityLimits(same_again=False),
        effort=rollout_gates.EffortLimits(failed_attempts=None),
    )
    record = changed(
        step_time_ratio=None, recommended={"under_cap": "oom", "step_s": None}, verdict=UNDECIDED
    )
    assert failing(record, nothing) == set()


def stored(folder: Path) -> str:
    poc = full_poc()
    for kind in ("begin", "poc"):
        Store(folder / "s").append(poc.poc_id, kind, poc)
    return str(folder / "s")


def test_decide_exits_with_1_and_names_the_failed_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, limits = stored(tmp_path), tmp_path / "gates.toml"
    assert main(["decide", "--gates", "default", "--store", store]) == 0
    text = capsys.readouterr().out
    assert all(t in text for t in ("Every gate holds", "--pilot MACHINE", "engine: native", "spent: "))
    assert main(["decide", "--gates", "default", "--store", store, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["stages"]
    assert list(whole) == ["poc", "pilot", "full"]
    assert (whole["poc"]["state"], whole["poc"]["engine"]) == ("done", "native")
    assert whole["poc"]["spent"] is not None
    limits.write_text("[time]\nstep_ratio = 0.5\n")
    asked = ["decide", "--store", store, "--gates", str(limits), "--pilot", "H100-SXM", "--json"]
    assert main(asked) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["holds"], told["stages"]) == (False, {})
    assert [g["name"] for g in told["gates"] if not g["holds"]] == ["time: step by plain's"]
    assert main(asked[:-3]) == 1
    assert "Stopped before the next stage: step time relative to plain training:" in capsys.readouterr().out


def test_stored_limits_are_checked_again_before_a_stage_and_default_resets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, limits = stored(tmp_path), tmp_path / "gates.toml"
    limits.write_text("[time]\nstep_ratio = 0.5\n")
    assert main(["decide", "--store", store, "--gates", str(limits)]) == 1
    capsys.readouterr()
    later = ["decide", "--store", store, "--pilot", "H100-SXM", "--json"]
    for _ in range(2):  # the first call leaves the limits as they are
        assert main(later) == 1
        assert json.loads(capsys.readouterr().out)["limits"]["time"]["step_ratio"] == 0.5
    assert main(["decide", "--store", store, "--gates", "default", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"]["time"]["step_ratio"] == 2.0


def test_attended_minutes_given_on_the_command_line_are_stored_with_the_poc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, limits = stored(tmp_path), tmp_path / "gates.toml"
    limits.write_text("[effort]\nattended_minutes = 60\n")
    asked = ["decide", "--store", store, "--gates", str(limits)]
    assert main(asked) == 1
    told = capsys.readouterr().out
    assert "attended minutes: not measured" in told
    assert "--attended-minutes MIN" in told
    assert main([*asked, "--attended-minutes", "90"]) == 1
    assert "attended minutes: 90" in capsys.readouterr().out
    assert main([*asked, "--attended-minutes", "45"]) == 0
    assert main(asked) == 0, "they are kept"
    for wrong in ("-1", "nan", "inf"):
        assert main([*asked, "--attended-minutes", wrong]) == 2
    capsys.readouterr()
    assert main(["record", "--store", store]) == 0
    assert json.loads(capsys.readouterr().out)["effort"]["attended_minutes"] == 45
    assert main(["decide", "--store", store, "--json", "--attended-minutes", "30"]) == 0
    numbers = json.loads(capsys.readouterr().out)["decision"]["numbers"]
    assert [n["value"] for n in numbers if n["name"] == "setup_hours"] == [0.5]


def test_a_gates_file_with_bad_limits_is_refused_and_false_means_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    for text, place in (("[time]\nratio = 1", "time.ratio"), ("[memory]\nprediction_error = -1", "memory")):
        path.write_text(text)
        with pytest.raises(UserError, match=place):
            rollout_gates.read(path)
    path.write_text(
        "[time]\nstep_ratio = false\n[effort]\nattended_minutes = 30\n[accuracy]\nverdicts = false\n"
    )
    found = rollout_gates.read(path)
    assert (found.time.step_ratio, found.effort.attended_minutes) == (None, 30)
    assert found.accuracy.verdicts is None
    path.write_text("[time")
    with pytest.raises(UserError, match="is not valid TOML"):
        rollout_gates.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "[time]\nstep_ratio = true",
        "[time]\nstep_ratio = '2'",
        "[time]\nstep_ratio = nan",
        "[effort]\nfailed_attempts = [1]",
        "[memory]\nunder_cap = 1",
        "[memory]\nunder_cap = 'yes'",
        "[accuracy]\nverdicts = true",
        "[accuracy]\nverdicts = []",
        "[accuracy]\nverdicts = 'equivalent'",
        "[accuracy]\nverdicts = ['fine']",
        "time = 3",
    ],
)
def test_a_limit_of_the_wrong_type_raises_an_error_that_names_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(text)
    place = ".".join(w for w in text.replace("[", "").replace("]", " ").split()[:2] if w != "=")
    with pytest.raises(UserError, match=place) as told:
        rollout_gates.read(path)
    assert told.value.allowed


def test_an_unknown_limit_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"did you mean 'time\.step_ratio'\?"):
        rollout_gates.parse_gates("[time]\nstep_ration = 2", "gates.toml")


def test_decide_reports_an_unknown_pilot_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decide", "--store", stored(tmp_path), "--pilot", "H900"]) == 2
    assert "H900" in capsys.readouterr().err
