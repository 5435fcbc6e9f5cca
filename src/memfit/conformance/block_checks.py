"""Compare dtypes, recomputation and autocast of repeated blocks with the plan.

Effects that the plan does not request may come from the model, which may recompute or change dtypes by
itself.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch

from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations
from memfit.types.plan import Plan, Use

_T = TypeVar("_T")
_MODEL_WIDE_RATIO = 0.1  # fraction of elements: norms that a model keeps in float32 by itself, and adapters
_AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}


def parameter_dtypes(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether parameters have the planned dtype.

    With bf16-parameters, or with zero in precision bf16, at least 90 % of the elements of the blocks'
    parameters must be bfloat16 (without blocks: of all trained parameters). Else no trained parameter may be
    bfloat16 or float16, unless the model without a plan has parameters of that dtype. If its dtypes are
    unknown, this is no difference, and a `NotChecked` says so. Parameters of modules that are to stay in
    float32, and float64 parameters, do not count.

    Yields nothing with qlora, or if bfloat16 is not planned and no trained parameter is bfloat16 or
    float16."""
    zero = plan.get("zero")
    is_bf16 = plan.get("bf16-parameters") or (zero is not None and zero.settings["precision"] == "bf16")
    if "qlora" in plan:
        return
    feature = "bf16-parameters" if plan.get("bf16-parameters") else "parameter dtype"
    planned_dtype = torch.bfloat16 if is_bf16 else torch.float32
    in_blocks = [p for p in observed.parameters if p.blocks] if is_bf16 else []
    params = [p for p in in_blocks or observed.trained if not p.is_fp32_module]
    float_params = [p for p in params if p.dtype.is_floating_point and p.dtype != torch.float64]
    dtypes = {p.dtype for p in float_params}
    text = _join_sorted(dtypes)
    if is_bf16:
        wide_elements = sum(p.whole_elements for p in float_params if p.dtype != planned_dtype)
        max_elements = _MODEL_WIDE_RATIO * sum(p.whole_elements for p in float_params)
        yield Checked(feature, str(planned_dtype), text, wrong=wide_elements > max_elements)
    elif torch.bfloat16 in dtypes or torch.float16 in dtypes:
        unexpected = yield from _unexpected(feature, text, dtypes - {planned_dtype}, observed.plain_dtypes)
        yield Checked(feature, str(planned_dtype), text, wrong=bool(unexpected))


def recomputation(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check which blocks run again in backward. Those that the plan's activation-checkpointing or
    selective-checkpointing covers must, if gradients pass through them. Others must not, unless the model
    without a plan recomputes them, too; if that is unknown, they are no difference, and a `NotChecked` names
    them.

    Also yields `NotChecked` if the plan has checkpointing and no block ran, if gradients pass through none of
    the covered blocks, and for covered blocks that contain no modules, whose second run cannot be observed.
    Yields nothing if the plan has no checkpointing and no block ran. With chunking, only covered blocks are
    judged."""
    use = _checkpointing(plan)
    if not observed.activity.ran:
        if use is not None:
            yield NotChecked(f"{use.technique}: no repeated blocks were observed running")
        return
    feature = use.technique if use is not None else "activation-checkpointing"
    planned_blocks, recomputed_blocks = _recomputed(plan, observed)
    planned_text, text = (join_values(sorted(s)) for s in (planned_blocks, recomputed_blocks))
    plain = observed.plain_runs.get(None)
    unexpected_blocks = yield from _unexpected(
        feature,
        f"blocks {text} run again",
        recomputed_blocks - planned_blocks,
        None if plain is None else plain.recomputed(),
    )
    # Nothing is recomputed if no gradient passes through.
    due_blocks = planned_blocks & observed.activity.passed
    if use is not None and not due_blocks:
        yield NotChecked(f"{feature}: no gradient passes through the blocks that would run again")
    missing_blocks = due_blocks - recomputed_blocks
    unseen_blocks = missing_blocks & observed.activity.undivided
    if unseen_blocks:
        unseen_text = join_values(sorted(unseen_blocks))
        yield NotChecked(f"{feature}: blocks {unseen_text} contain no modules, so a second run is not seen")
    wrong = bool(missing_blocks - unseen_blocks or unexpected_blocks)
    if unseen_blocks and unseen_blocks == due_blocks and not wrong:
        return
    yield Checked(feature, f"blocks {planned_text} run again in backward", text, wrong=wrong)


def _checkpointing(plan: Plan) -> Use | None:
    return plan.get("activation-checkpointing") or plan.get("selective-checkpointing")


def _recomputed(plan: Plan, observed: Observations) -> tuple[set[int], set[int]]:
    """Return (the observed blocks that the plan's checkpointing covers, the blocks that ran again in
    backward). With chunking, the second has only covered blocks."""
    use, planned_blocks = _checkpointing(plan), set[int]()
    if use is not None:
        planned_blocks = {i for i in observed.activity.ran if i % int(use.settings.get("every", 1)) == 0}
    recomputed_blocks = observed.activity.recomputed()
    if "chunking" in plan:
        recomputed_blocks &= planned_blocks  # slices of the other blocks run again
    return planned_blocks, recomputed_blocks


def autocast(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether each block has at least one layer that runs under the planned autocast or, if none is
    planned, whether all layers of the blocks run without autocast. What the model without a plan does by
    itself is no difference. If that is unknown, `NotChecked` is yielded for what it might explain
    (`_outside`, `_unexpected`).

    Also yields `NotChecked` if autocast is planned and no layers of blocks were observed. Yields nothing if
    neither is the case."""
    feature = _planned_autocast(plan) or "bf16-autocast"
    if not observed.activity.autocast:
        if plan.get(feature):
            yield NotChecked(f"{feature}: no layers of repeated blocks were observed")
        return
    kinds = {kind for _, kind in observed.activity.autocast}
    text = _join_sorted(kinds)
    if feature in plan:
        is_wrong = yield from _outside(feature, observed)
        yield Checked(feature, str(_AUTOCAST[feature]), text, wrong=is_wrong)
        return
    plain = observed.plain_runs.get(None)
    plain_kinds = None if plain is None else {kind for _, kind in plain.autocast}
    unexpected_kinds = yield from _unexpected(feature, text, kinds - {"off"}, plain_kinds)
    yield Checked(feature, "off", text, wrong=bool(unexpected_kinds))


def _planned_autocast(plan: Plan) -> str | None:
    return next((n for n in _AUTOCAST if plan.get(n)), None)


def _outside(feature: str, observed: Observations) -> Generator[CheckFinding, None, bool]:
    """Return whether some block has no layer under the autocast of ``feature`` ("bf16-autocast" or
    "fp16-autocast"), although it has one when the model without a plan runs under that autocast. If no such
    run is known, return whether this holds for more than half of the blocks; if it holds for fewer, but some,
    yield a `NotChecked` that names them."""
    planned_dtype = _AUTOCAST[feature]
    outside_blocks = _outside_blocks(observed, planned_dtype)
    plain = observed.plain_runs.get(planned_dtype)
    if plain is not None:
        return bool(outside_blocks & plain.under_autocast(planned_dtype))
    blocks = {index for index, _ in observed.activity.autocast}
    is_minority = 2 * len(outside_blocks) <= len(blocks)
    if outside_blocks and is_minority:
        yield NotChecked(
            f"{feature}: blocks {join_values(sorted(outside_blocks))} run outside autocast; "
            "whether the model itself causes this is unknown"
        )
    return not is_minority


def _outside_blocks(observed: Observations, dtype: torch.dtype) -> set[int]:
    return {index for index, _ in observed.activity.autocast} - observed.activity.under_autocast(dtype)


def plain_runs(plan: Plan, observed: Observations) -> set[torch.dtype | None]:
    """Return which runs of the model without a plan `recomputation` and `autocast` need to judge, as a set of
    autocast dtypes. None stands for a run without autocast.

    None is in the set if blocks run again that the plan does not cover, or if layers run under autocast and
    none is planned. The planned autocast dtype is in it if some block has no layer under it. Else the set is
    empty."""
    planned_blocks, recomputed_blocks = _recomputed(plan, observed)
    runs: set[torch.dtype | None] = {None} if recomputed_blocks - planned_blocks else set()
    if (feature := _planned_autocast(plan)) is None:
        return runs | {None for _, kind in observed.activity.autocast if kind != "off"}
    return runs | ({_AUTOCAST[feature]} if _outside_blocks(observed, _AUTOCAST[feature]) else set())


def fsdp2_precision(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with fsdp2, the dtypes of the parameters with which the layers of the blocks compute. With
    precision bf16, at least 90 % of the elements must be bfloat16. Else the dtypes must be exactly those in
    which the blocks' floating-point parameters are kept. Yields nothing without fsdp2, or if no layer of the
    blocks was observed."""
    fsdp, elements_by_dtype = plan.get("fsdp2"), observed.activity.computed
    if fsdp is None or not elements_by_dtype:
        return
    is_bf16 = fsdp.settings["precision"] == "bf16"
    param_dtypes = {p.dtype for p in observed.parameters if p.blocks and p.dtype.is_floating_point}
    wide_elements = sum(n for d, n in elements_by_dtype.items() if d != torch.bfloat16)
    planned_dtypes = {torch.bfloat16} if is_bf16 else param_dtypes
    wrong = (
        wide_elements > _MODEL_WIDE_RATIO * sum(elements_by_dtype.values())
        if is_bf16
        else planned_dtypes != set(elements_by_dtype)
    )
    planned_text, text = f"layers in {_join_sorted(planned_dtypes)}", _join_sorted(elements_by_dtype)
    yield Checked("fsdp2: precision", planned_text, text, wrong=wrong)


def _unexpected(
    feature: str, text: str, effects: set[_T], plain_effects: Collection[_T] | None
) -> Generator[CheckFinding, None, set[_T]]:
    """Return the ``effects`` that are not in ``plain_effects``, those of the model without a plan. If
    ``plain_effects`` is None (unknown), return an empty set, and, if there are any ``effects``, yield a
    `NotChecked` with ``text``, which describes them."""
    if plain_effects is not None:
        return effects - set(plain_effects)
    if effects:
        yield NotChecked(
            f"{feature}: {text}, which the plan does not request; "
            "whether the model itself causes this is unknown"
        )
    return set()


def _join_sorted(values: Iterable[Any]) -> str:
    return join_values(sorted(values, key=str))
