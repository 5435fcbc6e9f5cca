"""A user's script of the Hugging Face Trainer with the exported arguments, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checks import leave
from parts import Net
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

from memfit.integrations.transformers import MemfitCallback


class WithLoss(nn.Module):
    """As the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.blocks = self.net.blocks

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.net.recomputes = True

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(x), y)}


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        both = torch.randn(2, 32, generator=torch.Generator().manual_seed(index))
        return {"x": both[0], "y": both[1]}


given = json.loads(Path("training_args.json").read_text())
given |= {"use_cpu": True, "max_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
(args,) = HfArgumentParser(TrainingArguments).parse_dict(given)
torch.manual_seed(0)
trainer = Trainer(model=WithLoss(), args=args, train_dataset=Samples())
callback = MemfitCallback(trainer, plan="plan.yaml", blocks="blocks")
trainer.add_callback(callback)
trainer.train()
print(json.dumps({"event": "handover", "result": callback._recorder.conformance}))
leave()
