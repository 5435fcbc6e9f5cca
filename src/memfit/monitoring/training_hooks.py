"""See the steps, losses and gradient norms of a training without a change of its code."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

Observer = Callable[[Any, Any], object]  # takes the first argument of a call and its result


class StepHook:
    """Calls ``on_step(optimizer)`` after each step of ``optimizer``. None: of the optimizer that steps first,
    while it exists; others, as of a GAN's second network, are part of its steps. Steps on fake tensors, such
    as those of a prediction, and optimizers that are compiled are not seen."""

    def __init__(self, on_step: Callable[[Any], None], optimizer: Any = None) -> None:
        self._on_step = on_step
        self._optimizer: Callable[[], Any] = weakref.ref(optimizer) if optimizer is not None else lambda: None
        self._is_fixed = optimizer is not None
        self._handle = register_optimizer_step_post_hook(self._after)

    def remove(self) -> None:
        self._handle.remove()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        watched = self._optimizer()
        if watched is None and not self._is_fixed and not _is_fake(optimizer):
            self._optimizer = weakref.ref(optimizer)
            watched = optimizer
        if watched is optimizer:
            self._on_step(optimizer)


def _is_fake(optimizer: Any) -> bool:
    from torch._subclasses import FakeTensor

    return any(isinstance(p, FakeTensor) for group in optimizer.param_groups for p in group["params"][:1])


def device_of_optimizer(optimizer: Any) -> torch.device | None:
    """Return the device of the optimizer's first parameter, or None if it has none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return parameter.device  # type: ignore[no-any-return]
    return None


def observe_backward(before: Observer) -> Callable[[], None]:
    """Call ``before(tensors, None)`` at the beginning of each backward pass, with the tensors on which
    ``backward`` was called. Return a function that ends this."""
    return _observe(torch.autograd, "backward", before=before)


def observe_clipping(after: Observer) -> Callable[[], None]:
    """Call ``after(parameters, norm)`` after each call of ``torch.nn.utils.clip_grad_norm_``. Return a
    function that ends this."""
    return _observe(torch.nn.utils, "clip_grad_norm_", after=after)


def _observe(
    owner: Any, name: str, *, before: Observer | None = None, after: Observer | None = None
) -> Callable[[], None]:
    """Call the observers before and after each call of the function ``name`` of the module ``owner``. Return
    a function that ends this. Code that torch compiles calls the function without observers."""
    observed = getattr(owner, name)
    if not hasattr(observed, "memfit_observers"):
        observed = _wrap(observed)
        setattr(owner, name, observed)
    observer = (before, after)
    observed.memfit_observers.append(observer)

    def remove() -> None:
        if observer in observed.memfit_observers:
            observed.memfit_observers.remove(observer)
        if not observed.memfit_observers and getattr(owner, name) is observed:
            setattr(owner, name, observed.__wrapped__)

    return remove


def _wrap(function: Any) -> Any:
    observers: list[tuple[Observer | None, Observer | None]] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        first = args[0] if args else None
        for before, _ in tuple(observers):
            if before is not None:
                before(first, None)
        result = function(*args, **kwargs)
        for _, after in tuple(observers):
            if after is not None:
                after(first, result)
        return result

    wrapper.memfit_observers = observers  # type: ignore[attr-defined]
    return wrapper
