"""A real Trainer run with the callback: predicted, checked for conformance, measured and recorded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from memfit.integrations.record import Recorder
from memfit.integrations.transformers import MemfitCallback, plan_of_arguments
from memfit.types.conformance import NotConforming
from memfit.types.plan import Plan


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        )
    return Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=Tokens())


CASES: list[dict[str, Any]] = [
    {},
    {"bf16": True, "gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True, "optim": "adamw_torch"},
]


@pytest.mark.parametrize("arguments", CASES, ids=["plain", "bf16", "checkpointing"])
def test_the_callback_records_a_predicted_peak_near_the_measured_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict[str, Any]
) -> None:
    trainer = make_trainer(tmp_path, **arguments)
    trainer.add_callback(MemfitCallback(trainer))
    trainer.train()
    told = json.loads((tmp_path / "memfit.json").read_text())
    assert told["steps"] == 3
    assert told["conformance"].startswith("as planned")
    assert told["predicted_over_measured_ratio"] == pytest.approx(1, abs=0.005)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("memfit: peak"))
    assert "measured over 3 steps" in line


def test_a_plan_that_was_not_applied_ends_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(MemfitCallback(trainer, plan={"activation-checkpointing": {}}))
    with pytest.raises(NotConforming, match="activation-checkpointing: planned blocks 0, 1, 2 run again"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callback_that_is_not_strict_only_records_differences(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    path = tmp_path / "elsewhere" / "record.json"
    trainer.add_callback(MemfitCallback(trainer, plan={"bf16-autocast": {}}, strict=False, path=path))
    trainer.train()
    told = json.loads(path.read_text())
    assert "bf16-autocast: planned torch.bfloat16, found off" in told["conformance"]
    assert told["plan"] == {"techniques": {"bf16-autocast": {}}, "ranks": 1}


def test_a_training_that_cannot_be_predicted_is_still_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer.args), "world_size", 2)
        callback = MemfitCallback(trainer, plan={})
    trainer.add_callback(callback)
    trainer.train()
    told = json.loads((tmp_path / "memfit.json").read_text())
    assert "several ranks" in told["not_predicted"]
    assert told["predicted_peak_bytes"] is None
    assert told["measured_peak_bytes"] > 0


def test_deepspeeds_configuration_is_in_the_derived_plan_and_not_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    config = {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": "auto"}
    monkeypatch.setattr(trainer.args, "deepspeed_plugin", SimpleNamespace(deepspeed_config=config))
    callback = MemfitCallback(trainer)
    assert "with DeepSpeed" in callback._recorder.why_not
    assert callback._recorder.clip is None
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    plan = plan_of_arguments(trainer.args)
    zero, accumulation = plan.get("zero"), plan.get("gradient-accumulation")
    assert zero is not None
    assert accumulation is not None
    assert (plan.ranks, zero.settings["stage"], accumulation.settings["micro_batches"]) == (2, 3, 2)
    assert plan.get("ddp") is None


def test_the_file_of_another_rank_has_the_rank_before_its_suffix(tmp_path: Path) -> None:
    recorder = Recorder(plan=Plan(), prediction=None, model=torch.nn.Linear(1, 1), strict=False, blocks=None)
    for name, own in (("memfit.json", "memfit.2.json"), ("run.txt", "run.2.txt"), ("run", "run.2")):
        recorder.write(tmp_path / name, 2)
        assert (tmp_path / own).is_file()
