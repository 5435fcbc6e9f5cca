"""Precision islands: modules of a job that compute in float32, whatever the plan does around them."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Workbench
from memfit.types.errors import UserError
from memfit.types.plan import Plan

if TYPE_CHECKING:
    import torch


def find(model: torch.nn.Module, patterns: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """Return, by path, the modules that match a pattern, without those inside another match.

    Raises UserError if a pattern matches no module, unless the model keeps only the first of its blocks.
    """
    named = dict(model.named_modules()) if patterns else {}
    found: dict[str, torch.nn.Module] = {}
    for pattern in patterns:
        matched = {n: m for n, m in named.items() if fnmatch.fnmatchcase(n, pattern)}
        if not matched and not getattr(model, "has_few_blocks", False):
            close = difflib.get_close_matches(pattern, named, n=1)
            raise UserError(
                f"Job(islands=...): {pattern!r} matches no module of the model",
                allowed="module paths as named_modules() gives them, with * and ?",
                hint=f"did you mean {close[0]!r}?" if close else "",
            )
        found |= matched
    return {n: m for n, m in found.items() if not any(n != o and _inside(n, o) for o in found)}


def _inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def keep(bench: Workbench, plan: Plan, carried: frozenset[str]) -> None:
    """Make the job's islands compute in float32. ``carried`` holds techniques that an engine applies itself.

    Raises UserError if the plan stores or gathers all parameters, including theirs, in bfloat16.
    """
    bench.islands = find(bench.model, bench.job.islands)
    outside = surroundings(plan)
    for name, module in bench.islands.items():
        lost = _lost(plan, carried)
        if lost and next(module.parameters(), None) is not None:
            raise UserError(
                f"{lost} has one dtype for all parameters, and the job's island {name!r} must stay float32",
                hint="bf16-autocast, bf16-parameters or memfit's own fsdp2 keep it",
            )
        _wrap(module, outside if name else None)  # the whole model has no surroundings


def surroundings(plan: Plan) -> torch.dtype | None:
    """Return the dtype of tensors between modules if the plan changes it, else None."""
    import torch

    halved = any(u.settings.get("precision") == "bf16" for u in plan.uses if u.technique != "fsdp2")
    gathered = plan.ranks > 1 and (used := plan.get("fsdp2")) and used.settings["precision"] == "bf16"
    return torch.bfloat16 if halved or gathered or plan.get("bf16-parameters") else None


def _lost(plan: Plan, carried: frozenset[str]) -> str:
    for used in plan.uses:
        shared = used.technique == "zero" or used.technique in carried
        if shared and used.settings.get("precision") == "bf16":
            return f"{used.technique} with precision bf16"
    return ""


def _wrap(module: torch.nn.Module, outside: torch.dtype | None) -> None:
    """Run the module in float32. ``outside`` is the dtype of the surroundings, used if no input shows it
    (None: float32)."""
    import torch
    from torch.utils import _pytree

    inner: Callable[..., Any] = module.forward
    narrow = (torch.bfloat16, torch.float16)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves = _pytree.tree_leaves((args, kwargs))
        given = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
        kind = given[0].device.type if given else "cpu"
        under_autocast = torch.is_autocast_enabled(kind)
        args, kwargs = _pytree.tree_map(
            lambda t: t.float() if isinstance(t, torch.Tensor) and t.dtype in narrow else t, (args, kwargs)
        )
        with torch.autocast(kind, enabled=False):
            made = inner(*args, **kwargs)
        if under_autocast:
            return made  # as the float32 operators of autocast do
        dtype = next((t.dtype for t in given if t.dtype in narrow), None if given else outside)
        return made if dtype is None else _pytree.tree_map(functools.partial(_narrowed, dtype=dtype), made)

    forward.island = True  # type: ignore[attr-defined]
    module.forward = forward


def _narrowed(value: Any, *, dtype: torch.dtype) -> Any:
    import torch

    wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.to(dtype) if wide else value


def members(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield all modules that are islands or inside one. Call `keep` first."""
    for module in model.modules():
        if getattr(module.forward, "island", False):
            yield from module.modules()


def narrow_others(model: torch.nn.Module, islands: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Do ``model.to(dtype)`` but leave the parameters and buffers of islands, including shared ones,
    unchanged."""
    import torch

    kept = {t for m in islands.values() for t in (*m.parameters(), *m.buffers())}
    if not kept:
        model.to(dtype)
        return
    model._apply(lambda t: t if t in kept or not torch.is_floating_point(t) else t.to(dtype))
