"""A plain training loop, with data that is freed before training: `python plain_loop.py MARK`.

The file MARK is written after the third step.
"""

import sys
from pathlib import Path

import torch
from torch import nn


def read_batches() -> list[torch.Tensor]:
    everything = torch.randn(4096, 1024)  # 16 MiB, of which three batches stay
    return [everything[i * 64 : (i + 1) * 64].clone() for i in range(3)]


torch.manual_seed(0)
batches = read_batches()
model = nn.Sequential(nn.Linear(1024, 256), nn.GELU(), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for batch in batches:
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
Path(sys.argv[1]).touch()
