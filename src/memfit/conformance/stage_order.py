"""Record the order in which a rank runs the forwards and backwards of its pipeline stages."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, Self
from unittest import mock

from memfit.conformance.observation import PassOrder
from memfit.types.plan import Plan

_CALLS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}


class OrderProbe:
    """Records this rank's order of forwards (F), backwards (B) and the weights' parts of backwards (W), as
    strings of these letters, for example "FFBB".

    ``staged`` is the order of torch's pipeline stages between `__enter__` and `__exit__`; "" if the plan has
    no pipeline. Stages that run without a backward are left out. ``plain`` is the order of the calls of
    `on_forward` and `on_backward`."""

    def __init__(self, plan: Plan) -> None:
        self._listens = "pipeline" in plan
        self.staged, self.plain = "", ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._listens:
            stage_class = importlib.import_module("torch.distributed.pipelining.stage")._PipelineStageBase
            for name, letter in _CALLS.items():
                wrapper = self._recording(getattr(stage_class, name), letter)
                self._stack.enter_context(mock.patch.object(stage_class, name, wrapper))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_forward(self) -> None:
        """Record a forward pass of the model: append "F" to ``plain``."""
        self.plain += "F"

    def on_backward(self) -> None:
        """Record a backward pass: append "B" to ``plain``."""
        self.plain += "B"

    def observed(self) -> PassOrder:
        """Return ``staged``, or ``plain`` if ``staged`` is empty."""
        return PassOrder(letters=self.staged or self.plain, is_staged=bool(self.staged))

    def _recording(self, inner: Callable[..., Any], letter: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def call(stage: Any, *args: Any, **kwargs: Any) -> Any:
            if stage.has_backward:
                self.staged += letter
            return inner(stage, *args, **kwargs)

        return call
