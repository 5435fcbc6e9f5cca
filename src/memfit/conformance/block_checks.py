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
    """Record whether parameters have the planned dtype: with bf16-parameters, or ZeRO in bf16, at least 90 %
    of the elements of the blocks (without blocks: of all trained parameters) are bfloat16; else no trained
    parameter is bfloat16 or float16 unless the model is so by itself. Modules that are to stay in float32 and
    float64 parameters do not count. Does nothing with qlora."""
    zero, plan = step.plan.get("zero"), step.plan
    is_bf16 = plan.get("bf16-parameters") or (zero is not None and zero.settings["precision"] == "bf16")
    if plan.get("qlora") is not None:
        return
    feature = "bf16-parameters" if plan.get("bf16-parameters") else "parameter dtype"
    planned_dtype = torch.bfloat16 if is_bf16 else torch.float32
    island_params = {p for m in step.islands for p in m.parameters(recurse=False)}
    block_params = {p for b in step.blocks for p in b.parameters()} if is_bf16 else set[nn.Parameter]()
    params = (p for p in block_params or step.trainable() if p not in island_params)
    float_params = [p for p in params if p.is_floating_point() and p.dtype != torch.float64]
    dtypes = {p.dtype for p in float_params}
    text = _listed(dtypes)
    if is_bf16:
        wide_elements = sum(whole(p) for p in float_params if p.dtype != planned_dtype)
        step.differs(
            feature,
            str(planned_dtype),
            text,
            wrong=wide_elements > _OWN_WIDE_RATIO * sum(map(whole, float_params)),
        )
    elif torch.bfloat16 in dtypes or torch.float16 in dtypes:
        own_dtypes = None if step.own is None else step.own.dtypes
        wrong = bool(_unexpected_blocks(step, feature, text, dtypes - {planned_dtype}, own_dtypes))
        step.differs(feature, str(planned_dtype), text, wrong=wrong)


def recomputation(step: Observation) -> None:
    """Record whether exactly those blocks run again in backward that the plan's activation or selective
    checkpointing covers and through which gradients pass, apart from blocks that the model recomputes by
    itself. Recorded as not checked if the plan has checkpointing and no such blocks ran."""
    use, run_blocks = step.plan.get("activation-checkpointing"), set(step.heard.ran)
    use = use or step.plan.get("selective-checkpointing")
    if not run_blocks:
        if use is not None:
            step.unseen(f"{use.technique}: no repeated blocks were observed running")
        return
    planned_blocks = set[int]()
    if use is not None:
        planned_blocks = {i for i in run_blocks if i % int(use.settings.get("every", 1)) == 0}
    feature = use.technique if use is not None else "activation-checkpointing"
    recomputed_blocks = step.heard.recomputed()
    if step.plan.get("chunking") is not None:
        recomputed_blocks &= planned_blocks  # slices of the other blocks run again
    planned_text, text = (_listed(sorted(s)) for s in (planned_blocks, recomputed_blocks))
    own_step = _own_step(step, None) if recomputed_blocks - planned_blocks else None
    own_blocks = None if own_step is None else own_step.recomputed()
    extra_blocks = _unexpected_blocks(
        step, feature, f"blocks {text} run again", recomputed_blocks - planned_blocks, own_blocks
    )
    due_blocks = planned_blocks & step.heard.passed  # nothing is recomputed if no gradient passes through
    if use is not None and not due_blocks:
        step.unseen(f"{feature}: no gradient passes through the blocks that would run again")
    wrong = bool(due_blocks - recomputed_blocks or extra_blocks)
    step.differs(feature, f"blocks {planned_text} run again in backward", text, wrong=wrong)


def autocast(step: Observation) -> None:
    """Record whether each block has layers that run under the planned autocast, or, if none is planned,
    whether all layers of the blocks run without autocast, apart from what the model does by itself. Recorded
    as not checked if autocast is planned and no layers of blocks were observed."""
    feature = next((n for n in _AUTOCAST if step.plan.get(n)), "bf16-autocast")
    if not step.heard.autocast:
        if step.plan.get(feature):
            step.unseen(f"{feature}: no layers of repeated blocks were observed")
        return
    kinds = {kind for _, kind in step.heard.autocast}
    text = _listed(kinds)
    if step.plan.get(feature) is not None:
        step.differs(feature, str(_AUTOCAST[feature]), text, wrong=_outside(step, feature))
        return
    own_step = _own_step(step, None) if kinds - {"off"} else None
    own_kinds = None if own_step is None else {kind for _, kind in own_step.autocast}
    step.differs(
        feature, "off", text, wrong=bool(_unexpected_blocks(step, feature, text, kinds - {"off"}, own_kinds))
    )


def _outside(step: Observation, feature: str) -> bool:
    """Return whether some block has no layer under the autocast planned by ``feature``, although the model
    itself does not cause this. If it is unknown what the model does by itself, return whether these are more
    than half of the blocks, and record fewer as not checked."""
    planned_dtype = _AUTOCAST[feature]
    blocks = {index for index, _ in step.heard.autocast}
    outside_blocks = blocks - step.heard.narrow(str(planned_dtype))
    own_step = _own_step(step, planned_dtype) if outside_blocks else None
    if own_step is not None:
        return bool(outside_blocks & own_step.narrow(str(planned_dtype)))
    is_minority = 2 * len(outside_blocks) <= len(blocks)
    if outside_blocks and is_minority:
        step.unseen(
            f"{feature}: blocks {_listed(sorted(outside_blocks))} run outside autocast; "
            "whether the model itself causes this is unknown"
        )
    return not is_minority


def fsdp2_precision(step: Observation) -> None:
    """Record, with fsdp2, whether the layers of the blocks compute with parameters of the planned dtype: with
    precision bf16, at least 90 % of the elements in bfloat16; else exactly the dtypes in which the blocks'
    parameters are kept. Does nothing if no layer of the blocks was observed."""
    fsdp, elements_by_dtype = step.plan.get("fsdp2"), step.heard.computed
    if fsdp is None or not elements_by_dtype:
        return
    is_bf16 = fsdp.settings["precision"] == "bf16"
    param_dtypes = {p.dtype for block in step.blocks for p in block.parameters() if p.is_floating_point()}
    wide_elements = sum(n for d, n in elements_by_dtype.items() if d != torch.bfloat16)
    planned_dtypes = {torch.bfloat16} if is_bf16 else param_dtypes
    wrong = (
        wide_elements > _OWN_WIDE_RATIO * sum(elements_by_dtype.values())
        if is_bf16
        else planned_dtypes != set(elements_by_dtype)
    )
    step.differs(
        "fsdp2: precision", f"layers in {_listed(planned_dtypes)}", _listed(elements_by_dtype), wrong=wrong
    )


def _own_step(step: Observation, dtype: torch.dtype | None) -> Heard | None:
    return None if step.own is None else step.own.step(dtype)


def _unexpected_blocks(
    step: Observation, feature: str, text: str, effects: set[_T], own_effects: Collection[_T] | None
) -> set[_T]:
    """Return those of ``effects`` that are not in ``own_effects``, the ones that the model causes by itself.
    If these are unknown (None), record ``text``, which describes the effects, as not checked, and return an
    empty set."""
    if own_effects is not None:
        return effects - set(own_effects)
    if effects:
        step.unseen(
            f"{feature}: {text}, which the plan does not request; "
            "whether the model itself causes this is unknown"
        )
    return set()


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values if isinstance(values, list) else sorted(values, key=str))) or "none"


AFTER_A_STEP: tuple[Callable[[Observation], None], ...] = (recomputation, autocast, fsdp2_precision)
