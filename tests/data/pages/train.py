"""A reader's own training loop, alone or under torchrun: python train.py [--batch-size N]"""

import argparse
import os

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=16)
options = parser.parse_args()

model = nn.Sequential(nn.Linear(64, 256), *[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)])
if "WORLD_SIZE" in os.environ:
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
samples = torch.utils.data.TensorDataset(torch.randn(20 * options.batch_size, 64))

for (x,) in torch.utils.data.DataLoader(samples, batch_size=options.batch_size):
    loss = nn.functional.mse_loss(model(x), torch.zeros(len(x), 256))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("loss", loss.item())
