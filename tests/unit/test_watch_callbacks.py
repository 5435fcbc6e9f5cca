"""The watch in the training loops of Hugging Face, Lightning and Accelerate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.integrations import watch as callbacks
from memfit.monitoring.record import read_records

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), float(i)), "labels": torch.zeros(4)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.linear(x)
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def test_a_hugging_face_trainer_is_watched(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=Model(), args=args, train_dataset=Rows())
    trainer.add_callback(callbacks.TrainerWatch(trainer))
    trainer.train()
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert [s.step for s in rank.steps] == [1, 2, 3, 4]
    assert all(s.loss is not None and s.grad_norm is not None for s in rank.steps)
    assert rank.end is not None


def test_a_training_after_one_that_failed_is_watched_once(tmp_path: Path) -> None:
    handler = SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)), callback_handler=handler)
    hooks = callbacks._TrainerHooks(trainer)
    for _ in range(2):
        hooks.on_train_begin(None, None, None)
    hooks.on_train_end(None, None, None)
    assert not hasattr(torch.autograd.backward, "memfit_observers")


def test_a_lightning_trainer_is_watched_and_its_logger_used(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    logged: list[dict[str, float]] = []

    class Logger:
        def log_metrics(self, values: dict[str, float], step: int) -> None:
            logged.append(values)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(**batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[callbacks.LightningWatch(logger=Logger())],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=2))
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert [s.step for s in rank.steps] == [1, 2, 3, 4]
    assert all(s.loss is not None for s in rank.steps)
    assert "memfit/host_bytes" in logged[0]


def test_a_loop_with_accelerate_is_watched(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with memfit.watch(file=tmp_path / "run.jsonl", logger=accelerator):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    (rank,) = read_records(tmp_path / "run.jsonl").ranks
    assert [s.step for s in rank.steps] == [1, 2, 3, 4]
    assert all(s.loss is not None and s.grad_norm is not None for s in rank.steps)
