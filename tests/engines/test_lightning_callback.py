"""A real Lightning run with the callback, and the Trainer's arguments of plans."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, Words, words_batch
from torch.nn import functional

from memfit.integrations import lightning as ours
from memfit.techniques.registry import TECHNIQUES
from memfit.types.conformance import NotConforming
from memfit.types.errors import UserError
from memfit.types.plan import Plan

pytestmark = [
    pytest.mark.skipif(not find_spec("lightning"), reason="lightning is an extra of development"),
    pytest.mark.filterwarnings("default"),  # Lightning's own advice
]


def fit(folder: Path, callback: Any, *, collate: Any = None, **arguments: Any) -> None:
    from lightning import pytorch as lightning  # not in each worker that collects the tests

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Words()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            logits = self.net(batch["tokens"])
            loss = functional.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1))
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), foreach=False)

    rows = words_batch(0, 0)
    data = [{k: v[i] for k, v in rows.items()} for _ in range(8) for i in range(8)]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        default_root_dir=folder,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8, collate_fn=collate))


@pytest.mark.parametrize(
    "plan", [{}, {"bf16-autocast": {}, "gradient-accumulation": {"micro_batches": 2}}], ids=["plain", "both"]
)
def test_the_callback_records_a_predicted_peak_near_the_measured_one(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    fit(tmp_path, ours.MemfitCallback(plan), **ours.trainer_arguments(plan))
    told = json.loads((tmp_path / "memfit.json").read_text())
    assert told["steps"] == 3
    assert told["conformance"].startswith("as planned")
    assert told["not_predicted"] == ""
    assert told["predicted_over_measured_ratio"] == pytest.approx(1, abs=0.01)


def test_the_callback_infers_the_plan_from_the_trainer(tmp_path: Path) -> None:
    fit(tmp_path, ours.MemfitCallback(), precision="bf16-mixed", accumulate_grad_batches=2)
    told = json.loads((tmp_path / "memfit.json").read_text())
    assert told["plan"]["techniques"] == {"bf16-autocast": {}, "gradient-accumulation": {"micro_batches": 2}}


def with_a_scalar(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {**torch.utils.data.default_collate(rows), "temperature": torch.tensor(0.5)}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_with_a_scalar_tensor_is_predicted(tmp_path: Path, micro_batches: int) -> None:
    fit(tmp_path, ours.MemfitCallback(), collate=with_a_scalar, accumulate_grad_batches=micro_batches)
    told = json.loads((tmp_path / "memfit.json").read_text())
    assert told["not_predicted"] == ""
    assert told["predicted_over_measured_ratio"] == pytest.approx(1, abs=0.01)


def test_a_plan_that_was_not_applied_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(NotConforming, match=r"bf16-autocast: planned torch\.bfloat16, found off"):
        fit(tmp_path, ours.MemfitCallback({"bf16-autocast": {}}))


def test_trainer_arguments_of_several_ranks_follow_the_plan() -> None:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    ddp = {"ranks": 4, "techniques": {"ddp": {"bucket_mib": 7}}}
    found = ours.trainer_arguments(ddp)
    assert found["devices"] == 4
    assert isinstance(found["strategy"], DDPStrategy)
    assert found["strategy"]._ddp_kwargs == {"bucket_cap_mb": 7, "gradient_as_bucket_view": True}
    sharded = ours.trainer_arguments({"ranks": 4, "techniques": {"fsdp2": {}}})
    assert isinstance(sharded["strategy"], ModelParallelStrategy)
    with pytest.raises(UserError, match=r"for a plan with zero; allowed: .*; for zero, DeepSpeedStrategy"):
        ours.trainer_arguments({"ranks": 4, "techniques": {"zero": {}}})


def test_a_technique_of_the_module_needs_no_trainer_argument() -> None:
    found = ours.trainer_arguments({"techniques": {"chunked-cross-entropy": {"chunks": 4}}})
    assert (found["strategy"], found["precision"], found["accumulate_grad_batches"]) == ("auto", "32-true", 1)
    assert TECHNIQUES.keys() >= ours._OF_THE_MODULE | ours._OF_THE_TRAINER


def test_a_step_of_a_loader_without_batches_is_not_predicted() -> None:
    trainer = SimpleNamespace(train_dataloader=[], accumulate_grad_batches=1)
    with pytest.raises(UserError, match="has no batch"):
        ours.predict_first_batch(trainer, torch.nn.Linear(1, 1), Plan())
