"""Run the whole model in float32, with the own code of some modules in another precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from memfit.precision.recording import deterministic
from memfit.precision.tensors import is_float, rebuild


@contextlib.contextmanager
def cast_modules(
    model: nn.Module, narrow: nn.Module, paths: Collection[str], low: torch.dtype
) -> Iterator[None]:
    """Within the context, make ``model`` run the own code of the modules at ``paths`` in the dtype ``low``.
    Floating-point inputs of these modules are cast to ``low``, and their outputs back to float32.

    Children of these modules run in float32 unless they are in ``paths`` too. ``narrow`` is a copy of the
    model with its parameters in ``low``. Its modules run in place of those at ``paths``, so that in backward
    its parameters get the gradients, and those of the modules that they replace get none. Raises
    AttributeError if ``model`` has no module at one of the paths."""

    def cast(dtype: torch.dtype) -> Callable[[Any], Any]:
        return lambda value: rebuild(value, lambda t: t.to(dtype) if is_float(t) else t)

    narrow_down, widen = cast(low), cast(torch.float32)

    def between(inner: Callable[..., Any], into: Any, out: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = into((args, kwargs))
            return out(inner(*args, **kwargs))

        return forward

    inner_paths = [
        p for p, _ in model.named_modules() if p and any(not o or p.startswith(f"{o}.") for o in paths)
    ]
    pairs = {p: (model.get_submodule(p), narrow.get_submodule(p)) for p in {*inner_paths, *paths}}
    own_forwards = {p: pairs[p][1].forward for p in paths}
    patched_modules: list[nn.Module] = []
    try:
        for path, (wide_module, narrow_module) in pairs.items():
            if path:
                narrow_module.forward = between(wide_module, widen, narrow_down)
                patched_modules.append(narrow_module)
            if path in own_forwards:
                wide_module.forward = between(own_forwards[path], narrow_down, widen)
                patched_modules.append(wide_module)
        yield
    finally:
        for module in patched_modules:
            del module.forward


def run_step(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], torch.Tensor], *, backward: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Run one forward and, if ``backward``, one backward pass, without dropout and from the same random state
    each time. Return (loss, gradients by name of the parameter). Without ``backward``, the latter are {}. The
    gradients are removed from the model. Errors of the loss are raised as they are."""
    with deterministic(), contextlib.nullcontext() if backward else torch.no_grad():
        loss_value = loss(model, batch)
    if backward:
        loss_value.backward()
    grads = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss_value.detach()), grads


def relative_difference(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], without: Collection[str]
) -> float:
    """Return the norm of the difference of ``first`` and ``second`` over the norm of ``first``; 0 if that
    norm is zero or nothing can be compared.

    Both are gradients by name of the parameter; only names in both count. ``without``: paths of modules whose
    own parameters, but not those of their children, are left out."""
    names = [n for n in first if n in second and n.rpartition(".")[0] not in without]
    if not names:
        return 0.0
    reference_square = sum(float(first[n].double().square().sum()) for n in names)
    change = sum(float((first[n] - second[n]).double().square().sum()) for n in names)
    return float((change / reference_square) ** 0.5) if reference_square else 0.0
