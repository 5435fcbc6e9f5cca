"""What the Python of a page takes from its reader: a model, batches, a loss and functions.

``page`` is the page, which has the model under the plan that it names."""

import os

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memfit

page = globals().get("page", "")
under_plan = page in (
    "docs/engines.md",
    "docs/site/en/symptoms/no-effect.md",
    "docs/site/ja/symptoms/no-effect.md",
)


class Model(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.start = nn.Linear(64, 256)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(layers))
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = self.start(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if under_plan else block(x)
        return self.head(x)


def batch_of(samples):
    return torch.randn(samples, 64), torch.randint(0, 10, (samples,))


class Net(Model):
    """Few weights and large activations: not many layers fit a card."""

    def forward(self, x):
        x = self.start(x).repeat(64, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[::64])


model = Net() if page == "docs/largest.md" else Model()
batch, longer_batch = batch_of(4096), batch_of(8192)
loader = [batch] * 4
loss = functional.cross_entropy
optimizer = torch.optim.AdamW(model.parameters())


# devices.md
tokens = torch.zeros(2, 16, dtype=torch.long)


# configurations.md
if page == "docs/configurations.md":
    from hf_trainer import make_trainer

    trainer = make_trainer("trained")


# handover.md, watch.md
plan = {}
prediction = memfit.estimate(model, batch, loss=loss)


def step(batch):
    value = loss(model(batch[0]), batch[1])
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value


def train(fit):
    for batch in loader:
        for x, y in fit.split(batch):
            with fit.forward():
                value = loss(fit.model(x), y)
            fit.backward(value)
        fit.step()


def load_last_checkpoint(fit):
    """There is none yet."""


# engines.md, the page on plans without an effect
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    for part in (*model.blocks, model):
        torch.distributed.fsdp.fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters())


def one_training_step():
    step(batch)


# science-jobs.md
def build_model():
    return Model()


def make_batch(step, seed):
    return {"x": torch.randn(8, 64), "y": torch.zeros(8, dtype=torch.long)}


def mean_loss(model, batch):
    return loss(model(batch["x"]), batch["y"])
