"""In which order a pipeline's stages run forwards and backwards: what tells one schedule from another.

Schedules differ in how many micro-batches are under way at once (forwards whose backward has not run), and in
whether gradients of weights come apart, later (zero-bubble).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import torch.distributed as dist

from memfit.measure.held import from_all
from memfit.measure.looks import told

if TYPE_CHECKING:
    from memfit.measure.conform import Watch
    from memfit.types.plan import Plan

_CALLS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}


class Order:
    """F, B and W (weights' half of a backward) of this rank, between `__enter__` and `__exit__`: ``staged``
    from torch's pipeline stages, ``plain`` from the model's forward passes and calls of backward."""

    def __init__(self, plan: Plan) -> None:
        self._listens = plan.get("pipeline") is not None
        self.staged, self.plain = "", ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._listens:
            kind = importlib.import_module("torch.distributed.pipelining.stage")._PipelineStageBase
            for name, letter in _CALLS.items():
                telling = self._telling(getattr(kind, name), letter)
                self._stack.enter_context(mock.patch.object(kind, name, telling))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_forward(self) -> None:
        self.plain += "F"

    def on_backward(self) -> None:
        self.plain += "B"

    def _telling(self, inner: Callable[..., Any], letter: str) -> Callable[..., Any]:
        @functools.wraps(inner)
        def call(stage: Any, *args: Any, **kwargs: Any) -> Any:
            if stage.has_backward:
                self.staged += letter
            return inner(stage, *args, **kwargs)

        return call


def schedule(watch: Watch) -> None:
    """As many micro-batches under way on each stage as the planned schedule lets through."""
    used = watch.plan.get("pipeline")
    if used is None:
        return
    name, virtual = str(used.settings["schedule"]), int(used.settings["virtual"])
    stages, micros = watch.layout.pipeline, int(used.settings["micro_batches"])
    place = watch.layout.coordinate(dist.get_rank())["pipeline"]
    order = watch.order.staged or watch.order.plain
    every: list[tuple[int, str, bool]] = from_all((place, order, bool(watch.order.staged)))
    if not all({"F", "B"} <= set(o) for _, o, _ in every):
        watch.unseen("pipeline: schedule: no forwards and backwards of stages were heard")
        return
    limits = [_under_way(name, virtual, stages, micros, p) for p in range(stages)]
    found = [max(_most(o) for at, o, _ in every if at == p) for p in range(stages)]
    other = found != limits if name == "gpipe" else any(f > n for f, n in zip(found, limits, strict=True))
    watch.differs(
        "pipeline: schedule",
        f"{name}, {told(limits)} micro-batches under way on its ranks",
        told(found),
        wrong=other,
    )
    if not all(staged for *_, staged in every):
        watch.unseen("pipeline: schedule: whether gradients of weights come apart")
        return
    apart, wanted = any("W" in o for _, o, _ in every), name.startswith("zero-bubble")
    when = {True: "apart, later", False: "with those of inputs"}
    watch.differs(
        "pipeline: schedule: gradients of weights", when[wanted], when[apart], wrong=apart != wanted
    )


def _under_way(name: str, virtual: int, stages: int, micros: int, place: int) -> int:
    """Forwards whose backward has not run, at most, on the rank at ``place`` (Huang et al. 2019; Narayanan et
    al. 2019 and 2021; Qi et al. 2023, whose V holds what 1F1B's first rank does on every rank)."""
    at_once = micros // max(1, micros // stages)  # interleaved: of a stage, before the rank's next one's turn
    after = stages - 1 - place
    found = {
        "gpipe": micros * virtual,
        "1f1b": after + 1,
        "interleaved": (virtual - 1) * at_once + 2 * after + 1,
        "zero-bubble": (virtual - 1) * at_once + after + 1,
        "zero-bubble-v": 2 * stages,
    }
    return min(found[name], micros * virtual)


def _most(order: str) -> int:
    now = most = 0
    for letter in order:
        now += {"F": 1, "B": -1}.get(letter, 0)
        most = max(most, now)
    return most
