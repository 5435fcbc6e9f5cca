"""What one training step of a prepared model did, as its listeners saw it, and what the checks find in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from memfit.conformance.autograd_graph import Graph
from memfit.conformance.batch_digest import Samples
from memfit.conformance.clipping_probe import Clipping
from memfit.conformance.cross_rank_dependence import reach_of
from memfit.conformance.gradient_probes import Averages
from memfit.conformance.module_hooks import Heard, Own
from memfit.conformance.prepared import Prepared
from memfit.conformance.stage_order import Order
from memfit.types.conformance import Difference
from memfit.types.plan import Plan


class Observation(Prepared):
    """``micro_batches``: forward passes of the step, where not the plan's. ``own``: what the model does
    without a plan; where nobody knows, what a plan does not ask for is listed as not seen.

    A check reads the observation and calls `differs` or `unseen`.
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
        micro_batches: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, plan, blocks=blocks, head=head, whole_elements=whole_elements)
        self.own: Own | None = None  # set by who knows
        self.micro_batches = micro_batches
        self.forwards = 0
        self.heard = Heard()
        self.entered: list[float] = []  # figures of what the first block's modules were given first
        self.order, self.reach, self.samples = Order(plan), reach_of(self), Samples()
        self.averages, self.clipping = Averages(self), Clipping(self)
        offloads = plan.get("activation-offload") is not None
        self.graph = Graph(model, self._on_backward, weighs=offloads)
        self.still_gathered: list[int] | None = None  # blocks, where backward begins, with fsdp2
        self.left: list[tuple[float, float]] = []  # of what the last block gives out
        self.learned: set[int] = set()  # parameters that got a gradient, by address
        self.passes: list[int] = []  # of backward, for each step of the optimizer
        self.gradients: int | None = None
        self.arrived, self.waiting = 0, 0  # gradients in backward; most elements held there
        self.differences: list[Difference] = []
        self.checked: list[str] = []
        self.not_seen: list[str] = []

    def _on_backward(self) -> None:
        """A monitor listens here."""

    def unseen(self, what: str) -> None:
        """Of the plan, and not looked at, with why."""
        self.not_seen.append(what)

    def differs(self, feature: str, planned: str, found: str, *, wrong: bool) -> None:
        if feature not in self.checked:
            self.checked.append(feature)
        if wrong:
            self.differences.append(Difference(feature=feature, planned=planned, found=found))
