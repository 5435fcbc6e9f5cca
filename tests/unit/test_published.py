"""Rows of published runs are read by what they say; models have the parameters their names promise."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import published.score
import pytest
import torch
from published.arch import arch_of, family_of, public
from published.decoder import ExpertList, Experts
from published.evoformer import Fold
from published.losses import Loss
from published.models import job_of, keeping_gradients
from published.nnscaler import Stack
from published.page import page
from published.predict import plan_of, predict
from published.rows import COLUMNS, GIB, before_torch_2, read, setup_of
from published.score import Scored, summaries

from memfit.trace.tracer import fake_model
from memfit.types.errors import UserError

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _row(**given: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), "id": "x-1", "scope": "train_step", "quality": "A", **given}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama-2-7B", 6.738),
        ("Llama-3-8B", 8.030),
        ("Mistral-7B-v0.1", 7.242),
        ("TinyLlama-1.1B", 1.100),
        ("Qwen2.5-7B", 7.616),
        ("Falcon-7B", 6.922),
        ("phi-2", 2.780),
        ("Gemma-2B", 2.506),
        ("gpt2-xl", 1.558),
    ],
)
def test_named_models_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    row = _row(model=name, seq_len="1024", micro_batch="1", precision="bf16-true", method="full_ft")
    model = fake_model(job_of(setup_of(row)))
    found = sum(p.numel() for p in model.parameters()) / 1e9
    assert found == pytest.approx(billions, rel=0.005)  # heads' biases, learned positions of other lengths


def test_columns_come_before_the_public_configuration() -> None:
    arch = arch_of(_row(model="Llama-2-7B", layers="2"))
    assert arch is not None
    assert (arch.layers, arch.hidden) == (2, 4096)
    assert arch_of(_row(model="something new")) is None
    assert public("Meta-Llama-3.1-8B-Instruct") == public("llama 3.1 8b")
    assert family_of("pythia-1b")["parallel"]
    assert not family_of("Llama-3-8B")


def test_experts_are_read_from_free_text() -> None:
    arch = arch_of(_row(model="Qwen3-30B-A3B", moe="128 experts top-8, expert ffn 768"))
    assert arch is not None
    assert arch.moe is not None
    assert (arch.moe.experts, arch.moe.top_k, arch.moe.ffn) == (128, 8, 768)


@pytest.mark.parametrize(
    ("text", "sharding"),
    [
        ("FSDP1 FULL_SHARD, BACKWARD_PRE prefetch", "fsdp1"),
        ("FSDP2 full shard", "fsdp2"),
        ("FSDP2 zero2", "fsdp2"),
        ("DeepSpeed ZeRO-2", "zero2"),
        ("distributed optimizer (ZeRO-1)", "zero1"),
        ("DDP", "ddp"),
        ("", ""),
    ],
)
def test_sharding_is_read_from_free_text(text: str, sharding: str) -> None:
    assert setup_of(_row(zero_fsdp=text, model="Llama-2-7B")).sharding == sharding


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("pure bf16 (params, grads, AdamW states)", ("bfloat16", "bfloat16")),
        ("fp32", ("float32", "float32")),
        ("bf16 AMP (fp32 params)", ("float32", "bfloat16")),
        ("fp16 AMP", ("float32", "float16")),
    ],
)
def test_precision_is_read_from_free_text(text: str, dtypes: tuple[str, str]) -> None:
    setup = setup_of(_row(precision=text, model="Llama-2-7B"))
    assert (setup.parameters, setup.compute) == dtypes


def test_units_and_metrics() -> None:
    sure = setup_of(
        _row(model="x", mem_value="2", mem_unit="GiB", mem_gib="2", mem_metric="max_reserved")
    ).measured
    assert sure is not None
    assert (sure.sure, sure.kind, sure.size_bytes) == (True, "reserved", 2 * GIB)
    unsure = setup_of(_row(model="x", mem_value="2", mem_unit="GB(base?)", mem_metric="nvidia-smi")).measured
    assert unsure is not None
    assert (unsure.sure, unsure.kind) == (False, "device")
    assert setup_of(_row(model="x")).measured is None


def test_a_run_becomes_a_plan() -> None:
    row = _row(
        model="Llama-2-7B",
        method="lora",
        lora="r8 on query,value",
        seq_len="64",
        micro_batch="1",
        precision="bf16-true",
        software="litgpt 2024",
        global_batch="4",
        n_gpus="1",
        dp="1",
        optimizer="AdamW",
        act_ckpt="none",
    )
    setup = setup_of(row)
    assert setup.lora is not None
    assert (setup.lora.targets, setup.lora.rank) == ({"q", "v"}, 8)
    assert plan_of(setup).label == "gradient-accumulation(micro_batches=4)"
    assert setup_of({**row, "compile": "y", "optimizer": "fused AdamW"}).compiled


def test_pure_bf16_adamw_peaks_at_five_times_the_parameters() -> None:
    """Fact 1 of the measurements: parameters, gradients, two moments and foreach's one temporary."""
    row = _row(
        model="Llama-2-7B",
        layers="3",
        hidden="512",
        heads="8",
        kv_heads="8",
        head_dim="64",
        ffn="1536",
        vocab="8000",
        seq_len="8",
        micro_batch="1",
        precision="pure bf16",
        optimizer="AdamW",
        software="transformers 4.48",
    )
    setup = setup_of(row)
    parameters = 2 * sum(p.numel() for p in fake_model(job_of(setup)).parameters())
    found = predict(setup)
    assert found.phase == "optimizer"
    assert found.allocated_bytes == pytest.approx(5 * parameters, rel=0.02)


def test_what_a_row_leaves_out_is_named() -> None:
    with pytest.raises(UserError, match="the row gives no seq_len"):
        predict(setup_of(_row(model="Llama-2-7B", micro_batch="1", precision="bf16-true")))


# -- files -------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_are_read_with_any_further_columns(tmp_path: Path) -> None:
    path = _file(tmp_path, [_row(model=" Llama-2-7B "), _row(model="x", id="x-2")])
    text = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([text[0] + ",more", text[1] + ",1", text[2]]), encoding="utf-8")
    assert [r["model"] for r in read(path)] == ["Llama-2-7B", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"id,group\n1,2\n", "has no column scope, quality"),
        (b"\xff\xfe", "cannot read"),
        (",".join(COLUMNS).encode(), "has no rows"),
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


def test_rows_and_summary_are_printed_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, [_row(model="something new", mem_gib="2", mem_metric="peak allocated")])
    monkeypatch.setattr(sys, "argv", ["published.py", "--csv", str(path), "--json", "--jobs", "1"])
    assert _script().main() == 0
    found = json.loads(capsys.readouterr().out)
    row = found["rows"][0]
    assert (row["id"], row["quality"], row["mem_metric"]) == ("x-1", "A", "peak allocated")
    assert (row["measured"], row["predicted"], row["error"]) == (2.0, None, None)
    assert "no layers and no hidden" in row["reason"]
    assert found["summary"][0]["rows"] == 1


# -- scores ------------------------------------------------------------------------------------------------


def test_an_odd_row_is_refused_and_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: object) -> None:
        raise RuntimeError("not today\nmore")

    monkeypatch.setattr(published.score, "predict", fail)
    found = published.score.score(_row(model="Llama-2-7B", mem_gib="1", mem_metric="peak allocated"))
    assert found.reason == "failed: RuntimeError: not today"
    assert published.score.score(_row(model="x", mem_gib="much")).reason == "mem_gib is no number: 'much'"


def _scored(error: float | None, **more: Any) -> Scored:
    predicted = None if error is None else 100 * (1 + error)
    about = {"id": "x", "source": "s", "quality": "A", "metric": "peak allocated", **more}
    return Scored(**about, measured_bytes=100.0, predicted_bytes=predicted)


def test_a_refusal_counts_as_a_row_and_not_as_a_prediction() -> None:
    rows = [_scored(0.01), _scored(-0.02), _scored(None), _scored(0.5, source="t"), _scored(0.9, quality="B")]
    found = summaries(rows)[0]
    assert (found.rows, found.predicted) == (4, 3)
    assert found.median == pytest.approx(0.02)
    assert found.median_of_sources == pytest.approx((0.015 + 0.5) / 2)
    assert found.worst == pytest.approx(0.5)


def test_full_cards_and_formulas_are_not_counted() -> None:
    kept = _scored(0.1, metric="max_reserved")
    rows = [kept, _scored(0.7, metric="nvidia-smi", full=True), _scored(0.8, reference=True)]
    assert [s.rows for s in summaries(rows)] == [0, 0, 1, 2]


def test_the_page_has_every_row_with_its_error_or_its_reason() -> None:
    refused = dataclasses.replace(_scored(None, id="refused-1"), reason="no size | given")
    rows = [
        _scored(0.2, id="far-1"),
        _scored(0.001, id="near-1"),
        refused,
        _scored(0.3, id="full-1", full=True),
    ]
    record = {
        "command": "python it",
        "took_s": 60,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": {"torch": "2", "cores": "2"},
        "rows": [s.as_row() for s in rows],
        "summary": [dataclasses.asdict(s) for s in summaries(rows)],
    }
    text = page(record)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "+20.0%" in lines["far-1"]
    assert lines["far-1"].endswith("not known |")
    assert lines["near-1"].endswith("+0.1% |  |")
    assert "an upper bound only" in lines["full-1"]
    assert "no size / given" in lines["refused-1"]
    assert text.index("No GPU was") < text.index("| rows | measured |")


def test_reasons_explain_and_hold_no_numbers_for_the_prediction() -> None:
    why = tomllib.loads((_BENCHMARKS / "published" / "why.toml").read_text(encoding="utf-8"))
    assert set(why) == {"caveats", "rows", "time"}
    assert all(isinstance(text, str) for text in why["rows"].values())
    for source in (_BENCHMARKS / "published").glob("*.py"):
        if source.name != "page.py":
            assert "why.toml" not in source.read_text(encoding="utf-8")


# -- mechanisms --------------------------------------------------------------------------------------------


def test_what_other_parallelism_leaves_are_data_ranks() -> None:
    setup = setup_of(_row(model="Llama-3-8B", n_gpus="32", tp="4", cp="2", zero_fsdp="FSDP2 full shard"))
    assert setup.ranks["dp"] == 4
    plan = plan_of(setup)
    assert plan.ranks == 32
    assert {u.technique for u in plan.uses} >= {"fsdp2", "tensor-parallel", "context-parallel"}


def test_zero_has_a_precision_of_its_own() -> None:
    row = _row(
        model="Llama-2-7B",
        n_gpus="8",
        zero_fsdp="DeepSpeed ZeRO-3",
        precision="bf16 + fp32 master",
        offload="optimizer->CPU params->CPU",
        optimizer="AdamW",
    )
    used = plan_of(setup_of(row)).get("zero")
    assert used is not None
    assert (used.settings["stage"], used.settings["offload"]) == (3, "parameters")
    assert used.settings["precision"] == "bf16"
    assert plan_of(setup_of(row)).get("bf16-autocast") is None


def test_optimizers_that_are_not_expressed_are_refused() -> None:
    with pytest.raises(UserError, match="muon"):
        plan_of(setup_of(_row(model="Llama-2-7B", optimizer="Muon")))
    used = plan_of(setup_of(_row(model="Llama-2-7B", optimizer="AdamW, optimizer_in_bwd")))
    assert used.get("optimizer-in-backward") is not None


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
    assert before_torch_2(setup_of(_row(model="x", software="transformers ~4.2x (2022)")))
    assert not before_torch_2(setup_of(_row(model="x", software="torch 2.1, 2023")))


@pytest.mark.parametrize("kind", [Experts, ExpertList])
def test_both_mixtures_have_the_same_parameters_and_shapes(kind: type[torch.nn.Module]) -> None:
    arch = arch_of(
        _row(
            model="Mixtral-8x7B",
            hidden="16",
            layers="1",
            heads="2",
            head_dim="8",
            ffn="32",
            vocab="64",
            moe="4 experts top-2",
        )
    )
    assert arch is not None
    experts = kind(arch, lambda role, inputs, outputs, bias: torch.nn.Linear(inputs, outputs, bias=bias))
    assert sum(p.numel() for p in experts.parameters()) == 4 * 16 + 4 * 3 * 16 * 32
    x = torch.ones(2, 6, 16)
    assert experts(x).shape == x.shape


def test_a_run_larger_than_its_card_contradicts_itself() -> None:
    row = _row(
        model="Llama-2-7B",
        layers="2",
        seq_len="8",
        micro_batch="1",
        precision="pure bf16",
        optimizer="AdamW",
        gpu_mem_gb="1",
    )
    with pytest.raises(UserError, match="more than its card"):
        predict(setup_of(row))


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


def test_nnscalers_rows_say_what_is_recomputed_and_train_with_sgd() -> None:
    row = _row(
        group="AF2-Evoformer-nnscaler",
        model="AlphaFold-2 Evoformer stack",
        layers="48",
        precision="fp16",
        extra_arch="c_m 256, c_z 128, 8 MSA heads, 4 pair heads",
        seq_len="N_seq 128 x N_res 256",
        micro_batch="1",
        n_gpus="1",
        scope="stack",
    )
    for text, policy, recompute in (
        ("per-Evoformer-block recompute", "", "full"),
        ("finer-grained", "parts", "inside"),
    ):
        setup = setup_of({**row, "act_ckpt": text})
        assert (setup.code, setup.recompute) == ("nnscaler", recompute)
        assert [u.technique for u in plan_of(setup).uses if u.technique != "activation-checkpointing"] == [
            "sgd"
        ]
        blocks = fake_model(job_of(setup)).get_submodule("blocks")
        assert len(list(blocks.children())) == 48
        assert all(block.policy == policy for block in blocks.children())
    with pytest.raises(UserError, match="4 devices"):
        job_of(setup_of({**row, "act_ckpt": "per-Evoformer-block recompute", "n_gpus": "4", "dp": "1"}))


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
