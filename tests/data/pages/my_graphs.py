"""A job whose batch has two sizes."""

import torch
from torch import nn

from memfit import Job


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(1024, 1024), nn.Linear(1024, 1024)

    def forward(self, x, ends):
        messages = self.message(x[ends[0]]).relu()
        return self.update(torch.zeros_like(x).index_add(0, ends[1], messages))


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.head = nn.Linear(8, 1024), nn.Linear(1024, 1)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x, ends):
        x = self.start(x)
        for layer in self.layers:
            x = layer(x, ends)
        return self.head(x)


def job(nodes=1000, edges=4000):
    def make_batch(step, seed):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(nodes, 8, generator=generator)
        return {"x": x, "ends": torch.randint(0, nodes, (2, edges), generator=generator)}

    def loss(model, batch):
        return model(batch["x"], batch["ends"]).square().mean()

    return Job(name="graphs", build_model=Graphs, make_batch=make_batch, loss=loss, batch_size=1)
