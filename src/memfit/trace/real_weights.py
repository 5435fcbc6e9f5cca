"""Real values of the model's weights, for steps whose memory depends on computed values.

A detector keeps as many proposals as its weights find. Where such numbers would have to be assumed, the step
is also computed on real tensors while it is traced, if it is small enough: the weights' values are attached
to the fake parameters, and every operator is followed (`ConcreteValues`). The values are those of one batch
and of the weights before training, so they count as assumed, and the interval still covers the other cases.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.utils import _pytree

from memfit.trace.concrete_values import ConcreteValues
from memfit.types.trace import Trace

Weights = Mapping[str, torch.Tensor]
_REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclasses.dataclass(frozen=True, slots=True)
class WeightsSource:
    """Offers a model's weights to traces. ``load`` returns its tensors by name, as `build_weights` does; the
    caller may write to them. ``max_flops`` and ``max_bytes``: floating-point operations and peak memory of
    the largest trace that may be computed on real tensors."""

    load: Callable[[], Weights]
    max_flops: float
    max_bytes: float

    def allows(self, trace: Trace, peak_bytes: int) -> bool:
        """Return whether the step of ``trace``, whose peak is ``peak_bytes``, is within both limits."""
        return peak_bytes <= self.max_bytes and sum(op.times * op.flops for op in trace.ops) <= self.max_flops


_OFFERED: contextvars.ContextVar[WeightsSource | None] = contextvars.ContextVar("offered", default=None)
_FOLLOWED: contextvars.ContextVar[Weights | None] = contextvars.ContextVar("followed", default=None)


@contextlib.contextmanager
def offer_weights(source: WeightsSource) -> Iterator[None]:
    """Let traces made inside this context also compute the step with the weights of ``source``, if values had
    to be assumed and the step is within its limits (`cover_assumed_cases`)."""
    token = _OFFERED.set(source)
    try:
        yield
    finally:
        _OFFERED.reset(token)


def offered_weights() -> WeightsSource | None:
    """Return the source that `offer_weights` gives in the current context, or None."""
    return _OFFERED.get()


@contextlib.contextmanager
def follow_weights(weights: Weights) -> Iterator[None]:
    """Attach ``weights`` to the model's fake parameters and buffers in traces made inside this context, and
    follow tensors of any size."""
    token = _FOLLOWED.set(weights)
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


def attach_weights(concrete_values: ConcreteValues, model: torch.nn.Module) -> None:
    """Attach the weights of `follow_weights` to the model's tensors of the same names and shapes, marked as
    assumed, and let ``concrete_values`` follow tensors of any size. Other tensors of the model get no values.
    Do nothing outside `follow_weights`."""
    weights = _FOLLOWED.get()
    if weights is None:
        return
    concrete_values.max_elements = math.inf
    for name, tensor in _tensors_of(model).items():
        if name in weights and weights[name].shape == tensor.shape:
            concrete_values.set_assumed(tensor, weights[name])


def are_weights_followed() -> bool:
    """Return whether this runs inside `follow_weights`."""
    return _FOLLOWED.get() is not None


def build_weights(build: Callable[[], torch.nn.Module]) -> Weights:
    """Return the tensors of a model that ``build`` builds, detached from autograd: parameters and buffers by
    name, and tensors in other attributes of its modules, with names such as "encoder.scale[0]". The state of
    torch's random numbers is restored."""
    with torch.random.fork_rng(devices=[]):
        model = build()
    return {name: tensor.detach() for name, tensor in _tensors_of(model).items()}


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTERED:
                leaves = enumerate(_pytree.tree_leaves(value))
                tensors |= {f"{path}.{attribute}[{i}]": t for i, t in leaves if isinstance(t, torch.Tensor)}
    return tensors
