"""Rows of published runs are read by their schema, checked by their own figures, and scored by the
protocol."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import statistics
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import published.score
import pytest
import torch
from published.alternatives import alternatives
from published.checks import contradictions, parameters
from published.decoder import ExpertList, Experts
from published.evoformer import Fold
from published.held_out import CHOICES
from published.losses import Loss
from published.models import job_of, keeping_gradients
from published.nnscaler import Stack
from published.page import page
from published.predict import plan_of, predict
from published.rows import RULES, setup_of
from published.schema import DATA, GIB, assumed, columns, problems, read
from published.score import (
    Answer,
    Scored,
    errors_of,
    memory,
    order,
    score,
    scored_of,
    statistic,
    sweeps,
    times,
)
from published_rows import MEGATRON, row, setup

from memfit.catalog.load import device
from memfit.cost.device_overhead import nccl_bytes
from memfit.trace.tracer import fake_model
from memfit.types.errors import UserError

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = read(DATA / "published.csv")


# -- the data ---------------------------------------------------------------------------------------------


def test_every_row_of_the_data_keeps_the_schema_and_one_contradicts_itself() -> None:
    assert {r["id"]: problems(r) for r in ROWS if problems(r)} == {}
    wrong = {r["id"]: contradictions(r, setup_of(r)) for r in ROWS}
    assert [name for name, why in wrong.items() if why] == ["litgpt-confighub-0157"]
    assert len(ROWS) == len({r["id"] for r in ROWS}) >= 148
    assert all(r["link"].startswith("https://") for r in ROWS)


def test_no_rule_reads_a_group_notes_or_any_prose() -> None:
    """What rules get of a row is a `Setup`, and it is the same whatever stands in all other columns."""
    assert not {"group", "notes", "source", "link", "software", "model", "house", "state", "assumed"} & {
        *RULES
    }
    others = [c for c in columns() if c not in RULES and c != "id"]
    for r in ROWS:
        assert setup_of(
            {**r, **dict.fromkeys(others, "torchtitan, no checkpointing; Megatron 2021")}
        ) == setup_of(r)
    for source in (_BENCHMARKS / "published").glob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert "import re\n" not in text, source.name
        if source.name not in ("score.py", "schema.py"):
            assert '"notes"' not in text, source.name
            assert '"group"' not in text, source.name


def test_every_column_is_explained_in_the_guide_to_the_data() -> None:
    guide = (DATA / "README.md").read_text(encoding="utf-8")
    assert [c for c in columns() if f"`{c}`" not in guide] == []


def test_what_a_source_does_not_say_is_named_with_a_reason() -> None:
    assert assumed(row(assumed="optimizer: the usual one; gpu: a guess")) == {
        "optimizer": "the usual one",
        "gpu": "a guess",
    }
    assert problems(row(assumed="speed: x")) == ["assumed names 'speed', which is no column"]
    assert problems(row(assumed="gpu:")) == ["assumed gives no reason for gpu"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"layers": "twelve"}, "a whole number above 0"),
        ({"micro_batch": "0"}, "a whole number above 0"),
        ({"mem_gib": "-1"}, "a number above 0"),
        ({"compile": "yes"}, "y or n"),
        ({"software_date": "2024"}, "a month such as"),
        ({"optimizer": "AdamW"}, "allowed: adamw, "),
        ({"optimizer": ""}, "optimizer is empty"),
        ({"offload": "optimizer weights"}, "allowed: optimizer, gradients"),
        ({"lora": "rank=8"}, "targets is missing"),
        ({"lora": "rank=8 targets=q alpha=16"}, "'alpha' is none of"),
        ({"experts": "count=8 top_k=two ffn=64"}, "top_k is a number"),
        ({"block": "bias=yes"}, "bias is a number, or y"),
    ],
)
def test_cells_that_the_schema_does_not_allow_are_named(given: dict[str, str], why: str) -> None:
    (found,) = problems(row(**given))
    assert why in found
    assert score(row(**given)).rejected


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"n_gpus": "8", "dp": "4"}, "4 ranks (dp x tp x pp x cp) on 8 GPUs"),
        ({"grad_accum": "4", "global_batch": "16"}, "8 samples"),
        ({"kv_heads": "3"}, "no multiple of kv_heads"),
        ({"tp": "3", "n_gpus": "3"}, "cannot be cut into tp 3"),
        ({"params_b": "7"}, "params_b is 7"),
        ({"mem_gib": "90", "mem_kind": "allocated"}, "90 GiB on a card of 80"),
        ({"mem_gib": "0.01", "mem_kind": "allocated"}, "more than the 0.01 GiB measured"),
        ({"mem_gib": "1"}, "one of them is empty"),
        ({"tok_s_gpu": "1000", "tok_s_total": "2000"}, "published speeds differ"),
        ({"tok_s_gpu": "1000", "step_time_s": "2"}, "published speeds differ"),
        ({"tok_s_gpu": "1e9"}, "more than the peak of A100-80GB-SXM"),
        ({"low_precision": "float8"}, "A100-80GB-SXM has no products in float8"),
        ({"gpu": "V100-32GB-SXM2", "compute": "float16"}, "has no flash attention"),
        ({"interconnect": "fast"}, "neither a network of the catalog"),
    ],
)
def test_a_row_that_contradicts_itself_is_rejected_before_anything_is_predicted(
    given: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published.score, "predict", None)
    own = row(**given)
    assert problems(own) == []
    assert any(why in line for line in contradictions(own, setup_of(own)))
    found = score(own)
    assert found.rejected
    assert why in found.reason


@pytest.mark.parametrize(
    "name",
    [
        "litgpt-confighub-0140",
        "torchtitan-2024-12-0001",
        "litgpt-resource-0181",
        "llm-foundry-0534",
        "TRL-CP-0869",
    ],
)
def test_the_sizes_of_a_row_make_the_parameters_of_its_model(name: str) -> None:
    own = setup_of(next(r for r in ROWS if r["id"] == name))
    assert own.arch is not None
    plain = dataclasses.replace(own, lora=None, length=own.length)
    built = sum(p.numel() for p in fake_model(job_of(plain)).parameters())
    assert parameters(own.arch, length=own.length) == pytest.approx(built, rel=0.003)  # biases, norms


# -- files ------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns()))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"id,group\n1,2\n", "has no column house, state, blind, link and"),
        (b"\xff\xfe", "cannot read"),
        (",".join(columns()).encode(), "has no rows"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_error(
    content: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["published.py", "--csv", str(path)])
    assert _script().main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert message in shown.err


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("published_script", _BENCHMARKS / "published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_and_statistics_are_printed_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(code="other", mem_gib="2", mem_kind="allocated"), row(id="x-2", dp="3")]
    monkeypatch.setattr(sys, "argv", ["x", "--csv", str(_file(tmp_path, rows)), "--json", "--jobs", "1"])
    assert _script().main() == 0
    found = json.loads(capsys.readouterr().out)
    refused, rejected = found["rows"]
    assert (refused["measured"], refused["predicted"], refused["rejected"]) == (2.0, None, False)
    assert refused["reason"] == "networks of this kind are not expressed"
    assert rejected["rejected"]
    assert (found["memory"][0]["all"]["rows"], found["memory"][0]["rejected"]) == (1, 1)


# -- scores -----------------------------------------------------------------------------------------------


def test_an_odd_row_is_refused_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(own: object) -> None:
        raise RuntimeError("not today\nmore")

    monkeypatch.setattr(published.score, "predict", fail)
    found = score(row(mem_gib="1", mem_kind="allocated"))
    assert (found.reason, found.rejected) == ("failed: RuntimeError: not today", False)


def test_a_run_larger_than_its_card_is_predicted_and_is_a_miss() -> None:
    own = row(layers="2", hidden="64", seq_len="8192", gpu_mem_gb="0.3", mem_gib="0.2", mem_kind="allocated")
    found = score(own)
    assert found.predicted_bytes is not None
    assert found.predicted_bytes > 0.3 * GIB
    assert found.error == pytest.approx(found.predicted_bytes / (0.2 * GIB) - 1)
    assert not found.inside


def _scored(error: float | None, **more: Any) -> Scored:
    predicted = None if error is None else 100 * (1 + error)
    about = {"id": "x", "source": "s", "quality": "A", "kind": "allocated", "ends": (0.99, 1.01), **more}
    return Scored(**about, measured_bytes=100.0, predicted_bytes=predicted)


def test_a_refused_row_is_a_miss_in_the_second_line_only() -> None:
    rows = [
        _scored(0.005),
        _scored(-0.02),
        _scored(None),
        _scored(0.5, source="t"),
        _scored(0.9, quality="B"),
    ]
    found = memory(rows)[0]
    assert (found.predicted.rows, found.all.rows) == (3, 4)
    assert found.predicted.median == pytest.approx(0.02)
    assert found.predicted.median_of_sources == pytest.approx((0.0125 + 0.5) / 2)
    assert found.all.median_of_sources == pytest.approx((0.02 + 0.5) / 2)
    assert (found.predicted.worst, found.all.worst) == (pytest.approx(0.5), None)
    assert found.predicted.inside == pytest.approx((1 / 2 + 0) / 2)
    assert found.all.inside == pytest.approx((1 / 3 + 0) / 2)


def test_medians_and_shares_are_taken_by_source_first() -> None:
    many = [Answer(source="large", error=0.0, inside=True)] * 9
    found = errors_of([*many, Answer(source="small", error=0.4, inside=False)])
    assert (found.median, found.median_of_sources) == (0.0, pytest.approx(0.2))
    assert (found.within, found.within_rows) == (0.5, 0.9)


def test_full_cards_formulas_and_unsure_units_are_not_counted() -> None:
    rows = [
        _scored(0.1, kind="reserved"),
        _scored(0.7, kind="device", full=True),
        _scored(0.2, kind="device", sure=False),
        _scored(0.8, reference=True),
        Scored(id="x", source="s", quality="A", rejected=True, reason="why"),
    ]
    assert [(s.all.rows, s.rejected) for s in memory(rows)][:4] == [(0, 1), (0, 1), (1, 1), (3, 1)]


def test_every_source_is_in_one_half_and_coverage_is_printed_for_both() -> None:
    """The first byte of SHA-256: 0x48 of "fms-acceleration", 0xfd of "thunder-benchmark"."""
    rows = [_scored(0.0, source="fms-acceleration"), _scored(0.5, source="thunder-benchmark")]
    halves = {s.name: s.all for s in memory(rows) if "half" in s.name}
    assert {name: (e.rows, e.inside) for name, e in halves.items()} == {
        "all of the development half": (1, 1.0),
        "all of the test half": (1, 0.0),
    }


def test_an_interval_covers_what_the_row_leaves_open() -> None:
    """Over 100 predicted: 80 and 150 with other values of one column; the unit may be 7.4 % smaller."""
    found = _scored(0.0, others={"recompute full": 80.0, "attention eager": 150.0}, sure=False)
    assert (found.low, found.high) == (pytest.approx(0.8 * 0.99), pytest.approx(1.5 * 1.01 * 2**30 / 1e9))
    assert scored_of(found.as_row()) == found
    (known, *_) = memory([_scored(0.0), dataclasses.replace(found, sure=True)])
    assert known.all.width == pytest.approx(statistics.median([0.02, 1.5 * 1.01 - 0.8 * 0.99]))


def test_only_the_columns_that_a_row_names_as_assumed_have_other_values() -> None:
    given = {"recompute": "full", "attention": "sdpa", "parameters": "float32"}
    own = setup(**given, software_date="")
    assert alternatives(own, (), "backward") == {}
    named = ("recompute", "attention", "parameters", "optimizer_kernels", "seq_len", "grad_dtype")
    assert list(alternatives(own, named, "backward")) == [
        "recompute none",
        "attention eager",
        "parameters bfloat16",
    ]
    assert "attention eager" not in alternatives(setup(**given), named, "backward")
    assert "optimizer_kernels fused" in alternatives(own, named, "optimizer")
    rank = setup(**MEGATRON)
    assert alternatives(rank, ("grad_dtype",), "") == {
        "grad_dtype 16 bits": dataclasses.replace(rank, grad_bytes=2)
    }


def test_a_row_that_leaves_recomputation_open_is_predicted_with_and_without_it() -> None:
    given = {"layers": "4", "mem_gib": "1", "mem_kind": "allocated", "assumed": "recompute: the default"}
    found = score(row(**given), times=False)
    assert found.speed is None
    assert found.predicted_bytes is not None
    assert found.others["recompute full"] < found.predicted_bytes
    again = score(row(**{**given, "assumed": "", "recompute": "full"}))
    assert found.others["recompute full"] == again.predicted_bytes
    assert found.low == pytest.approx(0.99 * found.others["recompute full"] / found.predicted_bytes)


def test_what_would_not_fit_the_card_was_not_what_ran() -> None:
    given = {"attention": "sdpa", "seq_len": "4096", "layers": "2", "software_date": ""}
    given["assumed"] = "attention: the default"
    measured = {"mem_gib": "1", "mem_kind": "unstated"}
    roomy, small = (score(row(**given, **measured, gpu_mem_gb=size), times=False) for size in ("80", "1.2"))
    assert roomy.predicted_bytes is not None
    assert roomy.others["attention eager"] > 1.2 * GIB > roomy.predicted_bytes
    assert small.others == {}
    assert small.high == pytest.approx(1.2 * GIB / roomy.predicted_bytes)


def test_memory_of_an_unstated_kind_is_anything_from_tensors_to_the_device() -> None:
    ranges = predict(setup(mem_gib="1", mem_kind="unstated", loss="plain")).ranges
    whole = predict(setup(mem_gib="1", mem_kind="device", loss="plain"))
    assert whole.device_bytes is not None
    low, high = ranges["unstated"]
    assert low == ranges["allocated"][0]
    assert high * whole.allocated_bytes == pytest.approx(ranges["device"][1] * whole.device_bytes)
    old = predict(setup(mem_gib="1", mem_kind="device", loss="plain", software_date="2022-06"))
    assert old.device_bytes == whole.device_bytes
    more = (old.ranges["device"][1] - whole.ranges["device"][1]) * whole.device_bytes
    assert more == pytest.approx(GIB)


def test_a_rank_of_megatron_has_the_buffers_of_its_communicators() -> None:
    one = predict(setup(**MEGATRON, mem_gib="1", mem_kind="device"))
    two = predict(setup(**{**MEGATRON, "n_gpus": "2"}, dp="2", mem_gib="1", mem_kind="device"))
    assert one.device_bytes is not None
    assert two.device_bytes is not None
    nccl = nccl_bytes(device("A100-80GB-SXM"), 2)
    assert nccl is not None
    assert two.device_bytes - (two.reserved_bytes or 0) == pytest.approx(
        one.device_bytes - (one.reserved_bytes or 0) + nccl.value
    )


def test_with_memory_step_times_are_those_of_the_last_record_and_only_adds_to_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = _script()
    monkeypatch.setattr(script, "RECORDS", tmp_path / "published.jsonl")
    monkeypatch.setattr(script, "PAGE", tmp_path / "published.md")
    rows = [row(mem_gib="1", mem_kind="allocated", step_time_s="1"), row(id="x-2", code="other")]
    asked = ["x", "--csv", str(_file(tmp_path, rows)), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*asked, "--memory"])
    assert script.main() == 2  # there is no record yet
    assert "run without --memory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*asked, "--record", "--resume", str(tmp_path / "rows")])
    assert script.main() == 0
    with monkeypatch.context() as patch:
        patch.setattr(script, "score", lambda *given, **options: pytest.fail("predicted again"))
        assert script.main() == 0  # every row is in the file
    monkeypatch.setattr(published.score, "_timed", None)
    monkeypatch.setattr(sys, "argv", [*asked, "--record", "--memory", "--only", "x-1"])
    assert script.main() == 0
    first, again, second = map(json.loads, script.RECORDS.read_text(encoding="utf-8").splitlines())
    assert first["rows"] == again["rows"] == second["rows"]
    first = again
    assert second["carried"] == {"times": first["created"], "rows": 1, "created": first["created"]}
    assert "1 rows are those of" in script.PAGE.read_text(encoding="utf-8")


def _record(rows: list[Scored]) -> dict[str, Any]:
    return {
        "command": "python it",
        "took_s": 60,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"torch": "2", "cores": "2"},
        "rows": [s.as_row() for s in rows],
        "memory": [dataclasses.asdict(s) for s in memory(rows)],
        "times": [dataclasses.asdict(s) for s in times(rows)],
        "sweeps": [dataclasses.asdict(s) for s in sweeps(rows)],
        "order": dataclasses.asdict(order(sweeps(rows))),
        "first_scores": {s.id: s.as_row() for s in rows if s.blind},
    }


def test_the_page_has_every_row_with_its_error_or_its_reason_and_both_lines() -> None:
    rows = [
        _scored(0.2, id="far-1"),
        _scored(0.001, id="near-1"),
        dataclasses.replace(_scored(None, id="refused-1"), reason="no size | given"),
        Scored(id="rejected-1", source="s", quality="A", rejected=True, reason="contradiction"),
        _scored(0.3, id="full-1", full=True),
    ]
    text = page(_record(rows))
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "+20.0%" in lines["far-1"]
    assert lines["far-1"].endswith("not known |")
    assert "outside" in lines["far-1"]
    assert "outside" not in lines["near-1"]
    assert "an upper bound only" in lines["full-1"]
    assert "no size / given" in lines["refused-1"]
    assert "contradiction" in lines["rejected-1"]
    assert "| allocated, all | predicted rows | 3 |" in text
    assert "| allocated, all | refused rows are misses | 4 | 1 | 25.0% | 25.0% | a miss |" in text


def test_blind_rows_stand_first_with_their_first_scores() -> None:
    """A later revision's score of the row is further down only."""
    record = _record([_scored(0.25, id="new-1", blind="abc")])
    record["rows"] = [_scored(0.01, id="new-1", blind="abc").as_row()]
    text = page(record)
    first, later = text.split("## Targets")
    assert "| new-1 | abc | allocated | 0.00 | 0.00 | +25.0% | no |" in first
    assert "+25.0%" not in later


def test_a_target_that_a_miss_decides_is_not_reached() -> None:
    text = page(_record([_scored(0.01), _scored(None)]))
    target = next(line for line in text.splitlines() if "worst row at most 10 %" in line)
    assert target.endswith("| 1.0% | yes | a miss | no |")
    assert statistic("x", [], 0).predicted.median is None


def test_the_page_is_made_of_the_last_record() -> None:
    """A page that someone edited, or a record without its page, fails here."""
    record = json.loads(
        (_BENCHMARKS / "records" / "published.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    )
    assert page(record) == (_BENCHMARKS / "published.md").read_text(encoding="utf-8")
    known = {r["id"] for r in record["rows"]}
    assert known <= {r["id"] for r in ROWS}


def test_reasons_explain_and_hold_no_numbers_for_the_prediction() -> None:
    why = tomllib.loads((_BENCHMARKS / "published" / "why.toml").read_text(encoding="utf-8"))
    assert set(why) == {"caveats", "intervals", "rows", "time", "blind"}
    assert all(isinstance(text, str) for text in why["rows"].values())
    for source in (_BENCHMARKS / "published").glob("*.py"):
        if source.name != "page.py":
            assert "why.toml" not in source.read_text(encoding="utf-8")


def test_every_constant_of_step_time_has_its_source_and_what_it_has_seen() -> None:
    """The table in constants.toml has each constant that is chosen again, with the value in use."""
    table = tomllib.loads((_BENCHMARKS / "published" / "constants.toml").read_text(encoding="utf-8"))
    assert {k: v["value"] for k, v in table.items() if v.get("chosen_again")} == {
        c.name: c.used for c in CHOICES
    }
    for name, constant in table.items():
        assert {*constant} >= {"value", "unit", "source", "date", "kind", "seen"}, name
        assert constant["kind"] in ("published", "assumed", "fitted"), name


# -- mechanisms -------------------------------------------------------------------------------------------


def test_what_other_parallelism_leaves_are_data_ranks() -> None:
    own = setup(n_gpus="32", tp="4", cp="2", sharding="fsdp2", parameters="float32")
    assert own.ranks["dp"] == 4
    plan = plan_of(own)
    assert plan.ranks == 32
    assert {u.technique for u in plan.uses} >= {"fsdp2", "tensor-parallel", "context-parallel"}


def test_deepspeed_before_0_18_3_copies_no_part_on_the_card_to_offload_its_state() -> None:
    def reserved(date: str) -> int:
        own = setup(
            sharding="zero2",
            engine="deepspeed",
            master_weights="y",
            offload="optimizer",
            software_date=date,
            hidden="2048",
            ffn="8192",
            seq_len="8",
            layers="4",
        )
        return predict(own).reserved_bytes or 0

    part_bytes = 2 * 4 * (2 * 2048**2 + 3 * 2048 * 8192)  # at least
    assert reserved("2025-12") - reserved("2025-11") > 0.5 * part_bytes


def test_zero_keeps_a_float32_copy_on_one_device_too() -> None:
    master = {"sharding": "zero2", "engine": "deepspeed", "master_weights": "y", "optimizer_kernels": "fused"}

    def peak(offload: str) -> int:
        return predict(
            setup(**master, hidden="512", vocab="8192", seq_len="8", offload=offload)
        ).allocated_bytes

    arch = setup(hidden="512", vocab="8192").arch
    assert arch is not None
    moments_and_copy = peak("") - peak("optimizer gradients")
    assert moments_and_copy == pytest.approx(12 * parameters(arch), rel=0.2)
    used = plan_of(setup(n_gpus="8", **master, offload="optimizer parameters")).get("zero")
    assert used is not None
    assert (used.settings["stage"], used.settings["offload"], used.settings["precision"]) == (
        2,
        "parameters",
        "bf16",
    )


def test_what_is_not_expressed_is_refused_with_its_reason() -> None:
    for given, why in (
        ({"optimizer": "muon"}, "muon"),
        ({"low_precision": "nvfp4", "gpu": "B200"}, "products in nvfp4"),
        ({"scope": "loss_only"}, "a loss alone is no step"),
        ({"layers": ""}, "no layers"),
        ({"ffn": ""}, "no ffn"),
        ({"seq_len": ""}, "no seq_len"),
        ({"micro_batch": "", "code": "titan"}, "no micro_batch"),
        ({"pp": "2", "sharding": "fsdp2", "n_gpus": "4"}, "pp 2"),
        ({"code": "megatron", "sharding": "fsdp2", "n_gpus": "4"}, "fsdp2 of layers that Megatron cuts"),
    ):
        with pytest.raises(UserError, match=why):
            predict(setup(**given))


def test_pure_bf16_adamw_peaks_at_five_times_the_parameters() -> None:
    """Parameters, gradients, two moments and foreach's one temporary."""
    own = setup(gpu="", layers="3", hidden="512", kv_heads="4", ffn="1536", vocab="8000", seq_len="8")
    held = 2 * sum(p.numel() for p in fake_model(job_of(own)).parameters())
    found = predict(own)
    assert found.phase == "optimizer"
    assert found.allocated_bytes == pytest.approx(5 * held, rel=0.02)


def test_fabric_gives_float32_logits_and_they_are_held_until_the_next_step() -> None:
    loss = Loss("chunked")
    logits = torch.zeros(2, 256, 5, dtype=torch.bfloat16)
    batch = {"tokens": torch.zeros(2, 256), "targets": torch.zeros(2, 256, dtype=torch.int64)}
    loss(lambda tokens, targets: list(logits.split(128, dim=1)), batch)
    chunks, _ = loss.held
    assert [c.dtype for c in chunks] == [torch.float32] * 2


def test_old_versions_keep_gradients_after_the_step() -> None:
    model = keeping_gradients(torch.nn.Linear(3, 2))
    model(torch.ones(1, 3)).sum().backward()
    kept = weakref.ref(model.weight.grad)
    model.zero_grad(set_to_none=True)
    assert kept() is not None


@pytest.mark.parametrize("kind", [Experts, ExpertList])
def test_both_mixtures_have_the_same_parameters_and_shapes(kind: type[torch.nn.Module]) -> None:
    sizes = {"hidden": "16", "layers": "1", "heads": "2", "head_dim": "8", "ffn": "32", "vocab": "64"}
    arch = setup(**sizes, experts="count=4 top_k=2 ffn=32").arch
    assert arch is not None
    experts = kind(arch, lambda role, inputs, outputs, bias: torch.nn.Linear(inputs, outputs, bias=bias))
    assert sum(p.numel() for p in experts.parameters()) == 4 * 16 + 4 * 3 * 16 * 32
    x = torch.ones(2, 6, 16)
    assert experts(x).shape == x.shape


@pytest.mark.parametrize("columns", [False, True], ids=["evoformer", "extra MSA"])
def test_what_nnscaler_recomputes_changes_no_gradient(columns: bool) -> None:
    fold = Fold(
        sequences=8,
        residues=6,
        c_m=64,
        c_z=32,
        msa_heads=8,
        pair_heads=1,
        outer=4,
        blocks=2,
        fused=False,
        global_columns=columns,
    )
    torch.manual_seed(0)
    models = [Stack(fold, policy).double() for policy in ("", "extra" if columns else "parts")]
    for parameter in models[0].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    models[1].load_state_dict(models[0].state_dict())
    given = torch.randn(1, 8, 6, 64).double(), torch.randn(1, 6, 6, 32).double()
    for model in models:
        model(*given).backward()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert all(p.grad is not None for p in models[0].parameters())


_STACK = {
    "code": "nnscaler",
    "scope": "stack",
    "layers": "48",
    "hidden": "",
    "fold": "sequences=128 residues=256 c_m=256 c_z=128",
    "lengths": "none",
    "seq_len": "",
    "micro_batch": "1",
    "parameters": "float16",
    "compute": "float16",
    "optimizer": "sgd",
}


def test_nnscalers_rows_say_what_is_recomputed_and_train_with_sgd() -> None:
    for recompute, policy in (("full", ""), ("parts", "parts")):
        own = setup(**_STACK, recompute=recompute)
        used = [u.technique for u in plan_of(own).uses if u.technique != "activation-checkpointing"]
        assert used == ["sgd"]
        blocks = fake_model(job_of(own)).get_submodule("blocks")
        assert len(list(blocks.children())) == 48
        assert all(block.policy == policy for block in blocks.children())
    with pytest.raises(UserError, match="4 devices"):
        job_of(setup(**_STACK, n_gpus="4", dp="1"))


def test_devices_that_share_a_sample_hold_parts_of_its_shapes() -> None:
    fold = Fold(
        sequences=8, residues=6, c_m=64, c_z=32, msa_heads=8, pair_heads=1, outer=4, blocks=2, fused=False
    )
    given = torch.randn(1, 8, 6, 64), torch.randn(1, 6, 6, 32)
    model = Stack(fold, "parts", devices=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shapes: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda m, args, out: shapes.append([tuple(t.shape) for t in (*args, *out)])
        )
    model(*given).backward()
    assert shapes == [[(1, 8, 3, 64), (1, 3, 6, 32)] * 2] * 2  # residues of the MSA, first ones of pairs
    assert all(p.grad is not None for p in model.parameters())
