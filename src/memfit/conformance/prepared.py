"""A prepared model, to which a plan should have been applied: what a rank should hold of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from memfit.conformance.sharding import lets_go, whole
from memfit.model.blocks import find_blocks
from memfit.techniques import fp32_modules
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError
from memfit.types.plan import Plan


class Prepared:
    """A model to which a plan should have been applied, its optimizer and the plan.

    The arguments ``blocks`` and ``head`` are the module paths of the repeated blocks and of the output layer,
    or None to search for them. The attribute ``blocks`` is the list of the blocks, which is empty if none are
    found; ``islands`` are the modules that are to stay in float32. ``whole_elements`` is the number of
    elements of the model's parameters before sharding, if the caller knows it. The attribute ``clip``, which
    the caller may set, is the largest gradient norm that the update should receive; 0 means no clipping, and
    None means unknown.
    """

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
        self.islands = frozenset(fp32_modules.members(model))

    def other_coordinates(self, *dimensions: str) -> tuple[int, ...]:
        """Return this rank's coordinates along all dimensions of the plan's mesh except ``dimensions``: equal
        for the ranks that differ from this one only along these. It needs a process group."""
        coordinate = self.layout.coordinate(dist.get_rank())
        return tuple(v for name, v in coordinate.items() if name not in dimensions)

    def trainable(self) -> Iterator[nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)

    def part(self, params: list[nn.Parameter]) -> int:
        """Return the number of elements of ``params`` before data-parallel sharding. If some of them are
        freed and their sizes are unknown (those of ZeRO 3 are known), return at least ``whole_elements`` if
        that is known."""
        elements = sum(map(whole, params))
        is_freed = any(not p.numel() and not lets_go(p) for p in params)
        return max(elements, self.whole_elements or 0) if is_freed else elements

    def persists(self, param: nn.Parameter) -> bool:
        """Return whether the plan has ZeRO, of any stage, and the parameter is so small
        (``persist_elements``) that stage 3 keeps it whole on every rank."""
        use = self.plan.get("zero")
        return use is not None and whole(param) <= int(use.settings["persist_elements"])

    def sharded(self, what: str) -> tuple[int, str]:
        """Return (number of ranks over which the plan shards ``what``, 1 if it does not; the name of that
        feature). ``what`` is "parameters", "gradients" or "optimizer state"."""
        shard = self.layout.shard * self.layout.context if self.plan.get("fsdp2") else self.layout.shard
        if self.plan.get("fsdp2") is not None:
            return shard, f"fsdp2: {what}"
        if (use := self.plan.get("zero")) is not None:
            stage = int(use.settings["stage"])
            required_stage = {"optimizer state": 1, "gradients": 2, "parameters": 3}[what]
            return (shard if stage >= required_stage else 1), f"zero stage {stage}: {what}"
        if self.plan.get("sharded-ddp") is not None and what != "parameters":
            return shard, f"sharded-ddp: {what}"
        return 1, what
