"""A user's script on Accelerate: DDP with the plan's buckets, checkpointing and clipping."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from checks import leave, report
from parts import CLIP, Net, batch, loss

buckets = DistributedDataParallelKwargs(bucket_cap_mb=25, gradient_as_bucket_view=True)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[buckets])
torch.manual_seed(0)
net = Net()
model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
rank = accelerator.process_index


def step(*, clip: bool = True) -> None:
    net.recomputes = clip
    accelerator.backward(loss(model, [t[rank::2] for t in batch(0, 0)]))
    if clip:
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


report(net, optimizer, careless=lambda: step(clip=False), step=step)
accelerator.end_training()
leave()
