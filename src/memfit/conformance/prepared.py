"""A prepared model, to which a plan should have been applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from memfit.model.blocks import find_blocks
from memfit.techniques import fp32_modules
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError
from memfit.types.plan import Plan


class Prepared:
    """A model to which a plan should have been applied, its optimizer and the plan.

    The arguments ``blocks`` and ``head`` are the module paths of the repeated blocks and of the output layer,
    or None to search for them. The attribute ``blocks`` is the list of the blocks. It is empty if none are
    found, also if a given path has none. ``islands`` are the modules that are to stay in float32.
    ``whole_elements`` is the number of elements of the model's parameters before sharding; None: unknown. The
    attribute ``clip``, which the caller may set, is the largest gradient norm that the update should receive;
    0 means no clipping, and None, as at first, unknown."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        plan: Plan,
        *,
        blocks: str | None = None,
        head: str | None = None,
        whole_elements: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.plan, self.head = model, optimizer, plan, head
        self.layout = layout(plan)
        self.whole_elements = whole_elements
        self.clip: float | None = None  # set by the caller, if known
        try:
            self.blocks = find_blocks(model, blocks)[1]
        except UserError:
            self.blocks = []
        self.islands = frozenset(fp32_modules.island_modules(model))

    def trainable(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)
