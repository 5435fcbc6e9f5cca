"""Precision islands: modules of a job that compute in float32, whatever the plan does around them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Workbench
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError, suggest
from memfit.types.plan import Plan

if TYPE_CHECKING:
    import torch


def find(model: torch.nn.Module, patterns: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """Return, by path, the modules whose path matches one of ``patterns`` (* stands for any text, ? for one
    character). Modules inside another matching module are left out.

    Raises UserError if a pattern matches no module. If the model has a true attribute ``has_few_blocks``,
    which marks a shortened copy with fewer blocks, such a pattern is ignored instead.
    """
    modules = dict(model.named_modules()) if patterns else {}
    islands: dict[str, torch.nn.Module] = {}
    for pattern in patterns:
        matches = {n: m for n, m in modules.items() if fnmatch.fnmatchcase(n, pattern)}
        if not matches and not getattr(model, "has_few_blocks", False):
            raise UserError(
                f"Job(islands=...): {pattern!r} matches no module of the model",
                allowed="module paths as named_modules() gives them, where * stands for any text and ? for "
                "one character",
                hint=suggest(pattern, modules),
            )
        islands |= matches
    return {
        n: m
        for n, m in islands.items()
        if not any(n != outer and (not outer or n.startswith(f"{outer}.")) for outer in islands)
    }


def keep_in_float32(bench: Workbench, plan: Plan, carried: frozenset[str]) -> None:
    """Make the job's islands, the modules that match ``Job(islands=...)``, compute in float32, and set
    ``bench.islands`` to them, by path. ``carried`` holds the names of techniques that an engine applies
    itself.

    Raises UserError if a pattern of the job matches no module (see `find`). Raises UserError, too, if an
    island has parameters and the plan has the setting precision=bf16 in zero or in a technique in
    ``carried``, because these cast all parameters.
    """
    bench.islands = find(bench.model, bench.job.islands)
    outer_dtype = dtype_between_modules(plan)
    for name, module in bench.islands.items():
        technique_with_precision_bf16 = _casts_all_parameters(plan, carried)
        if technique_with_precision_bf16 and next(module.parameters(), None) is not None:
            raise UserError(
                f"{technique_with_precision_bf16} has one dtype for all parameters, but the module "
                f"{name!r} of Job(islands=...) must stay float32",
                hint="set another precision of that technique, or use bf16-autocast, bf16-parameters or "
                "memfit's own fsdp2 in its place, which keep such modules in float32",
            )
        _wrap(module, outer_dtype if name else None)  # the whole model has no surroundings


def dtype_between_modules(plan: Plan) -> torch.dtype | None:
    """Return bfloat16 if tensors between modules have that dtype without autocast: if the plan has
    bf16-parameters, or a technique with the setting precision=bf16. (For fsdp2, the setting counts only if
    the plan has several ranks.) Otherwise return None."""
    import torch

    uses = (u for u in plan.uses if u.technique != "fsdp2" or plan.ranks > 1)
    is_bf16 = "bf16-parameters" in plan or any(u.settings.get("precision") == "bf16" for u in uses)
    return torch.bfloat16 if is_bf16 else None


def _casts_all_parameters(plan: Plan, carried: frozenset[str]) -> str:
    """Return the first technique of the plan that casts all parameters to bfloat16, as text such as "zero
    with precision bf16"; "" if there is none. Such a technique has the setting precision=bf16 and is zero or
    in ``carried``, the techniques that an engine applies itself."""
    for technique_use in plan.uses:
        is_shared = technique_use.technique == "zero" or technique_use.technique in carried
        if is_shared and technique_use.settings.get("precision") == "bf16":
            return f"{technique_use.technique} with precision bf16"
    return ""


def _wrap(module: torch.nn.Module, outer_dtype: torch.dtype | None) -> None:
    """Make the module run in float32, without autocast: its 16-bit inputs are cast to float32.

    If it is called under autocast, its outputs stay as they are. Otherwise its float32 outputs are cast to
    the dtype of its first 16-bit input. They stay float32 if it has floating-point inputs but none of 16
    bits. If it has no floating-point input, they are cast to ``outer_dtype``, the dtype of tensors outside
    the module, or stay float32 if that is None.
    """
    import torch
    from torch.utils import _pytree

    inner: Callable[..., Any] = module.forward
    narrow_dtypes = (torch.bfloat16, torch.float16)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves = _pytree.tree_leaves((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
        device_type = inputs[0].device.type if inputs else HOST
        under_autocast = torch.is_autocast_enabled(device_type)
        args, kwargs = _pytree.tree_map(
            lambda t: t.float() if isinstance(t, torch.Tensor) and t.dtype in narrow_dtypes else t,
            (args, kwargs),
        )
        with torch.autocast(device_type, enabled=False):
            output = inner(*args, **kwargs)
        if under_autocast:
            return output  # as the float32 operators of autocast do
        dtype = next((t.dtype for t in inputs if t.dtype in narrow_dtypes), None if inputs else outer_dtype)
        return (
            output if dtype is None else _pytree.tree_map(functools.partial(_narrowed, dtype=dtype), output)
        )

    forward.island = True  # type: ignore[attr-defined]
    module.forward = forward


def _narrowed(value: Any, *, dtype: torch.dtype) -> Any:
    import torch

    is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.to(dtype) if is_wide else value


def island_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield each island of the model, a module that is kept in float32, and all modules inside it. Islands
    are known only after `keep_in_float32`, which marks them; before, yield nothing."""
    for module in model.modules():
        if getattr(module.forward, "island", False):
            yield from module.modules()


def cast_others(model: torch.nn.Module, islands: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Cast the floating-point parameters and buffers of the model to ``dtype``, except those of the modules
    in ``islands``. A parameter that an island shares with another module stays unchanged in both."""
    import torch

    island_tensors = {t for m in islands.values() for t in (*m.parameters(), *m.buffers())}
    if not island_tensors:
        model.to(dtype)
        return
    model._apply(lambda t: t if t in island_tensors or not torch.is_floating_point(t) else t.to(dtype))
