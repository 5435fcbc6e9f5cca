"""Compare dtypes, recomputation and autocast of repeated blocks with the plan.

Effects that the plan does not request may come from the model, which may recompute or change dtypes by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from memfit.conformance.module_hooks import Heard
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import whole

_T = TypeVar("_T")
_OWN_WIDE_RATIO = 0.1  # fraction of elements: norms that a model keeps in float32 by itself, and adapters
_AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}


def parameter_dtypes(step: Observation) -> None:
    """Check the dtypes of the parameters."""
    zero, plan = step.plan.get("zero"), step.plan
    low = plan.get("bf16-parameters") or (zero is not None and zero.settings["precision"] == "bf16")
    if plan.get("qlora") is not None:
        return
    feature = "bf16-parameters" if plan.get("bf16-parameters") else "parameter dtype"
    wanted = torch.bfloat16 if low else torch.float32
    apart = {p for m in step.islands for p in m.parameters(recurse=False)}
    inside = {p for b in step.blocks for p in b.parameters()} if low else set[nn.Parameter]()
    others = (p for p in inside or step.trainable() if p not in apart)
    counted = [p for p in others if p.is_floating_point() and p.dtype != torch.float64]
    found = {p.dtype for p in counted}
    text = _listed(found)
    if low:
        wide = sum(whole(p) for p in counted if p.dtype != wanted)
        step.differs(feature, str(wanted), text, wrong=wide > _OWN_WIDE_RATIO * sum(map(whole, counted)))
    elif torch.bfloat16 in found or torch.float16 in found:
        own = None if step.own is None else step.own.dtypes
        wrong = bool(_beside(step, feature, text, found - {wanted}, own))
        step.differs(feature, str(wanted), text, wrong=wrong)


def recomputation(step: Observation) -> None:
    """Check which blocks run again in backward."""
    used, ran = step.plan.get("activation-checkpointing"), set(step.heard.ran)
    used = used or step.plan.get("selective-checkpointing")
    if not ran:
        if used is not None:
            step.unseen(f"{used.technique}: no repeated blocks were seen running")
        return
    wanted = set[int]()
    if used is not None:
        wanted = {i for i in ran if i % int(used.settings.get("every", 1)) == 0}
    feature = used.technique if used is not None else "activation-checkpointing"
    found = step.heard.recomputed()
    if step.plan.get("chunking") is not None:
        found &= wanted  # slices of the other blocks run again
    planned, text = (_listed(sorted(s)) for s in (wanted, found))
    own = _own_step(step, None) if found - wanted else None
    again = None if own is None else own.recomputed()
    beside = _beside(step, feature, f"that blocks {text} run again", found - wanted, again)
    due = wanted & step.heard.passed  # nothing is recomputed if no gradient passes through
    if used is not None and not due:
        step.unseen(f"{feature}: no gradient goes through the blocks that would run again")
    wrong = bool(due - found or beside)
    step.differs(feature, f"blocks {planned} run again in backward", text, wrong=wrong)


def autocast(step: Observation) -> None:
    """Check whether blocks run under the planned autocast."""
    feature = next((n for n in _AUTOCAST if step.plan.get(n)), "bf16-autocast")
    if not step.heard.autocast:
        if step.plan.get(feature):
            step.unseen(f"{feature}: no layers of repeated blocks were heard")
        return
    found = {kind for _, kind in step.heard.autocast}
    text = _listed(found)
    if step.plan.get(feature) is not None:
        step.differs(feature, str(_AUTOCAST[feature]), text, wrong=_outside(step, feature))
        return
    own = _own_step(step, None) if found - {"off"} else None
    kinds = None if own is None else {kind for _, kind in own.autocast}
    step.differs(feature, "off", text, wrong=bool(_beside(step, feature, text, found - {"off"}, kinds)))


def _outside(step: Observation, feature: str) -> bool:
    """Return whether blocks run outside autocast although the model itself does not cause this."""
    wanted = _AUTOCAST[feature]
    blocks = {index for index, _ in step.heard.autocast}
    outside = blocks - step.heard.narrow(str(wanted))
    own = _own_step(step, wanted) if outside else None
    if own is not None:
        return bool(outside & own.narrow(str(wanted)))
    few = 2 * len(outside) <= len(blocks)
    if outside and few:
        step.unseen(f"{feature}: whether the model itself leaves blocks {_listed(sorted(outside))} out")
    return not few


def fsdp2_precision(step: Observation) -> None:
    """Check the dtype in which FSDP2's layers compute."""
    fsdp, computed = step.plan.get("fsdp2"), step.heard.computed
    if fsdp is None or not computed:
        return
    low = fsdp.settings["precision"] == "bf16"
    held = {p.dtype for block in step.blocks for p in block.parameters() if p.is_floating_point()}
    wide = sum(n for d, n in computed.items() if d != torch.bfloat16)
    planned = {torch.bfloat16} if low else held
    wrong = wide > _OWN_WIDE_RATIO * sum(computed.values()) if low else planned != set(computed)
    step.differs("fsdp2: precision", f"layers in {_listed(planned)}", _listed(computed), wrong=wrong)


def _own_step(step: Observation, narrow: torch.dtype | None) -> Heard | None:
    return None if step.own is None else step.own.step(narrow)


def _beside(
    step: Observation, feature: str, text: str, found: set[_T], own: Collection[_T] | None
) -> set[_T]:
    """Return the part of ``found`` that the model does not cause by itself."""
    if own is not None:
        return found - set(own)
    if found:
        step.unseen(f"{feature}: {text}, which the plan does not say: whether the model does so by itself")
    return set()


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values if isinstance(values, list) else sorted(values, key=str))) or "none"


AFTER_A_STEP: tuple[Callable[[Observation], None], ...] = (recomputation, autocast, fsdp2_precision)
