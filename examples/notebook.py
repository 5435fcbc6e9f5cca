"""Three lines in a notebook: will this step fit, and where does its memory go? (cells are marked with %%)"""

# %%
import torch
from torch import nn
from torch.nn import functional

import memfit

model = nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
batch = (torch.randn(256, 784), torch.randint(0, 10, (256,)))

# %% nothing runs and nothing is changed: the model is traced without its bytes
here = memfit.estimate(model, batch, loss=functional.cross_entropy, optimizer="adamw")
here  # noqa: B018  (a notebook shows it as a table and a bar)

# %% the same step on a GPU that is not here, with a plan
card = memfit.estimate(
    model, batch, loss=functional.cross_entropy, plan={"bf16-autocast": {}}, machine="H100-SXM"
)
print(card)
print(card.explain())

# %% peaks around the steady step, and what a checkpoint weighs
for peak in card.lifecycle.peaks:
    print(f"{peak.event:16} device {peak.device_bytes:>12,} B  host {peak.host_bytes:>12,} B")
print(dict(card.checkpoint_bytes))

# %% in a test of your own project
memfit.assert_fits(model, "24GiB", batch=batch, loss=functional.cross_entropy)
