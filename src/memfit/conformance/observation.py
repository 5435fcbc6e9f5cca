"""What listeners observed in one training step of a model with a plan, and what checks found."""

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
    """The observations of one training step of a model with a plan, and the findings of checks. A check is a
    function that reads the observations and calls `differs` or `unseen`.

    ``micro_batches`` is the number of micro-batches that the observed step runs, if it differs from the
    plan's. ``own``, which the caller may set, says what the model does without a plan. If it is None, effects
    that the plan does not request, and that the model may cause by itself, are recorded as not checked
    instead of as differences.
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
        self.own: Own | None = None  # set by the caller, if known
        self.micro_batches = micro_batches
        self.forwards = 0
        self.heard = Heard()
        self.entered: list[float] = []  # fingerprints of the first inputs of the first block's modules
        self.order, self.reach, self.samples = Order(plan), reach_of(self), Samples()
        self.averages, self.clipping = Averages(self), Clipping(self)
        offloads = plan.get("activation-offload") is not None
        self.graph = Graph(model, self._on_backward, weighs=offloads)
        # Indices of blocks that are gathered when backward begins, with fsdp2.
        self.still_gathered: list[int] | None = None
        self.left: list[tuple[float, float]] = []  # fingerprints of the last block's outputs
        self.learned: set[int] = set()  # addresses of parameters that got a gradient
        self.passes: list[int] = []  # numbers of backward passes, for each optimizer step
        # Elements of gradients on this rank before the first update; None if none was observed.
        self.gradients: int | None = None
        self.arrived, self.waiting = 0, 0  # gradients that arrived in backward; most elements held there
        self.differences: list[Difference] = []
        self.checked: list[str] = []
        self.not_seen: list[str] = []

    def _on_backward(self) -> None:
        """Called when a backward pass begins. A monitor overrides it."""

    def unseen(self, what: str) -> None:
        """Record ``what``, a text that names a part of the plan that was not checked, and the reason."""
        self.not_seen.append(what)

    def differs(self, feature: str, planned: str, found: str, *, wrong: bool) -> None:
        """Record that ``feature`` was checked and, if ``wrong``, the difference between what was ``planned``
        and what was ``found``."""
        if feature not in self.checked:
            self.checked.append(feature)
        if wrong:
            self.differences.append(Difference(feature=feature, planned=planned, found=found))
