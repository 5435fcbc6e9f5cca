"""What the tests of alphafold2 put in the place of its parts, and in their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memfit.jobs.builtin.alphafold import model

PUBLISHED = model.published_size(residues=256, rows=128, extra_rows=1024, batch_size=1)


class Gives(nn.Module):
    """The same everywhere, whatever it is given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.full_like(x, self.value)


def drawn(module: Any, std: float = 0.2) -> Any:
    """The module with weights that are not at zero anywhere."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module
