"""What the tests of alphafold2 put in the place of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Gives(nn.Module):
    """The same everywhere, whatever it is given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.full_like(x, self.value)
