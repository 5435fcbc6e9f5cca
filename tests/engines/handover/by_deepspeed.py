"""A user's script on DeepSpeed: the exported file configures all but the checkpointing."""

from __future__ import annotations

import argparse

import deepspeed
import torch
from checks import leave, report
from parts import Net, batch, loss

parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
args = parser.parse_args()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that it would compile on a CPU
torch.manual_seed(0)
model = Net()
deepspeed.init_distributed("gloo")
engine, optimizer, _, _ = deepspeed.initialize(
    model=model, config=args.deepspeed_config, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3)
)
rank = torch.distributed.get_rank()


def step(*, recomputes: bool = True) -> None:
    model.recomputes = recomputes
    engine.backward(loss(engine, [t[rank::2] for t in batch(0, 0)]))
    engine.step()


report(engine.module, optimizer, careless=lambda: step(recomputes=False), step=step)
torch.distributed.destroy_process_group()
leave()
