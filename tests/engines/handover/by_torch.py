"""A user's script on torch alone: FSDP2, checkpointing and clipping, as the list in README.md says."""

from __future__ import annotations

import torch
import torch.distributed as dist
from checks import leave, report
from parts import CLIP, Net, batch, loss
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = Net()
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(*, clip: bool = True) -> None:
    model.recomputes = clip
    loss(model, [t[rank::2] for t in batch(0, 0)]).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


report(model, optimizer, careless=lambda: step(clip=False), step=step)
dist.destroy_process_group()
leave()
