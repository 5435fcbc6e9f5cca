"""The table of all techniques, which of them can be combined, and the checks of plans.

A new technique is entered in `TECHNIQUES`. The search for one device then finds it through its ``settings``.
CONTRIBUTING.md lists what else belongs to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.techniques import (
    adapters,
    chunked_loss,
    chunking,
    compiled,
    float8,
    gradient_accumulation,
    offload,
    optimizers,
    precision,
)
from memfit.techniques.base import JobFacts, Technique
from memfit.techniques.parallel import (
    axial_parallel,
    context_parallel,
    data_parallel,
    expert_parallel,
    pipeline,
    tensor_parallel,
)
from memfit.techniques.rank_mesh import layout
from memfit.techniques.recompute import checkpointing, optimal
from memfit.techniques.zero import sharded_ddp, zero
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import UserError, look_up, suggest
from memfit.types.machine import Machine
from memfit.types.plan import EffectClass, KnobValue, Plan, Use, use

TECHNIQUES: Mapping[str, Technique] = {
    t.name: t
    for t in (
        gradient_accumulation.TECHNIQUE,
        precision.AUTOCAST,
        precision.FP16,
        precision.PARAMETERS,
        float8.TECHNIQUE,
        checkpointing.FULL,
        checkpointing.SELECTIVE,
        optimal.TECHNIQUE,
        chunked_loss.TECHNIQUE,
        chunking.TECHNIQUE,
        compiled.TECHNIQUE,
        optimizers.ADAMW_8BIT,
        optimizers.ADAMW_4BIT,
        optimizers.ADAMW_PAGED,
        optimizers.ADAMW_FUSED,
        optimizers.ADAMW_SINGLE,
        optimizers.ADAFACTOR,
        optimizers.SGD,
        optimizers.IMPORTED,
        optimizers.IN_BACKWARD,
        adapters.LORA,
        adapters.QLORA,
        offload.TECHNIQUE,
        data_parallel.DDP,
        data_parallel.FSDP2,
        sharded_ddp.TECHNIQUE,
        zero.TECHNIQUE,
        tensor_parallel.TECHNIQUE,
        context_parallel.TECHNIQUE,
        axial_parallel.TECHNIQUE,
        expert_parallel.TECHNIQUE,
        pipeline.TECHNIQUE,
    )
}


def technique(name: str) -> Technique:
    """Return the technique called ``name``. If there is none, raises UserError, whose message lists all names
    and suggests the most similar one, if one is similar."""
    return look_up("technique", name, TECHNIQUES)


def make_use(name: str, settings: Mapping[str, object]) -> Use:
    """Return a use of the technique ``name`` with the given settings and the default values of its other
    knobs. Raises UserError for an unknown technique or setting, and for a value that is not allowed."""
    definition = technique(name)
    knobs = {k.name: k for k in definition.knobs}
    for key, value in settings.items():
        if key not in knobs:
            raise UserError(
                f"unknown setting {key!r} of technique {name!r}",
                allowed=", ".join(knobs) or "none",
                hint=suggest(key, knobs),
            )
        if not knobs[key].accepts(value):
            raise UserError(f"technique {name}: the setting {key} is {value!r}", allowed=knobs[key].allowed)
    values: dict[str, KnobValue] = {k.name: k.default for k in definition.knobs}
    values.update({k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)})
    return use(name, **values)


def with_defaults(plan: Plan) -> Plan:
    """Return ``plan`` with the default value of each setting that its techniques lack, such as one that a
    technique did not have yet when the plan was stored. Techniques and settings that do not exist any more
    stay as they are."""
    uses = []
    for plan_use in plan.uses:
        definition = TECHNIQUES.get(plan_use.technique)
        defaults = {k.name: k.default for k in definition.knobs} if definition is not None else {}
        uses.append(use(plan_use.technique, **{**defaults, **plan_use.settings}))
    return dataclasses.replace(plan, uses=tuple(uses))


def make_plain_plan(ranks: int = 1) -> Plan:
    """Return the plan of plain training on ``ranks`` ranks, which saves no memory. On one rank it has no
    techniques. On several ranks it has ddp with default settings, which keeps the whole model on each."""
    return Plan(uses=(make_use("ddp", {}),), ranks=ranks) if ranks > 1 else Plan()


def without(plan: Plan, name: str) -> Plan:
    """Return the plan without the technique ``name``. A plan that does not have it is returned unchanged.

    If ``name`` is a data-parallel technique, even ddp itself, and the plan has several ranks, ddp with
    default settings takes its place, because the ranks must still divide each batch and average gradients. If
    optimal-checkpointing remains, its list of tensors to recompute (``dropped``) is emptied, because it was
    made for the operators of the old plan. Raises UserError if no technique is called ``name``.
    """
    slot = technique(name).slot
    if plan.get(name) is None:
        return plan
    reduced_plan = plan.without(name)
    if (budget := reduced_plan.get(optimal.OPTIMAL_CHECKPOINTING)) is not None:
        reduced_plan = reduced_plan.with_use(
            make_use(optimal.OPTIMAL_CHECKPOINTING, {**budget.settings, "dropped": ""})
        )
    if slot != "data-parallel" or plan.ranks == 1:
        return reduced_plan
    return reduced_plan.with_use(make_use("ddp", {}))


def freezes_parameters(plan: Plan) -> bool:
    """Return whether a technique of the plan freezes parameters of the job's model. Raises UserError for an
    unknown technique."""
    return any(technique(u.technique).freezes_parameters for u in plan.uses)


def conflict(plan: Plan) -> str | None:
    """Return the reason, as text, why techniques of the plan or their settings cannot be combined; None if
    they can. If there are several reasons, return the first: pairs of techniques are checked in the plan's
    order, then settings. Only combinations of techniques are looked at: what a technique refuses when it is
    applied to a model is not. Raises UserError for an unknown technique."""
    techniques = [technique(u.technique) for u in plan.uses]
    for i, left in enumerate(techniques):
        for right in techniques[i + 1 :]:
            if left.slot and left.slot == right.slot:
                return f"{left.name} and {right.name} exclude each other: both are of the kind {left.slot}"
            if _forbids(left, right) or _forbids(right, left):
                return f"{left.name} cannot be combined with {right.name}"
    return _conflict_of_settings(plan, techniques)


def _conflict_of_settings(plan: Plan, techniques: list[Technique]) -> str | None:
    bf16_use = plan.get("bf16-parameters")
    optimizer = next((t.name for t in techniques if t.slot == "optimizer"), None)
    if optimizer and bf16_use is not None and bf16_use.settings.get("rounding") == "stochastic":
        return f"bf16-parameters with stochastic rounding uses its own AdamW and cannot use {optimizer}"
    zero_use = plan.get("zero")
    if zero_use is not None and zero_use.settings.get("stage") == 3 and plan.get("compile") is not None:
        return "zero of stage 3 gathers parameters inside blocks, but compile makes one graph of whole blocks"
    recompute_name = next(filter(plan.get, ("activation-checkpointing", "selective-checkpointing")), None)
    adapter_name = next((t.name for t in techniques if t.freezes_parameters), None)
    if zero_use is not None and zero_use.settings.get("stage") == 3 and recompute_name and adapter_name:
        return (
            f"{recompute_name} compares weights between forward and recomputation, but zero of stage 3 has "
            f"freed the frozen weights of {adapter_name} by then (with DeepSpeed itself, use_reentrant=True "
            "avoids that)"
        )
    tensor_use = plan.get("tensor-parallel")
    splits_head = tensor_use is not None and tensor_use.settings.get("vocabulary", "whole") != "whole"
    if splits_head and plan.get("chunked-cross-entropy") is not None:
        return (
            "chunked-cross-entropy needs the whole head on every rank, but tensor-parallel splits it unless "
            "its vocabulary is whole"
        )
    pipeline_use = plan.get("pipeline")
    is_zero_bubble = pipeline_use is not None and str(pipeline_use.settings.get("schedule")).startswith(
        "zero-bubble"
    )
    if is_zero_bubble and plan.get("selective-checkpointing") is not None:
        return (
            "zero-bubble schedules run backward in two parts, but selective-checkpointing keeps "
            "values for only one"
        )
    if is_zero_bubble and plan.get("compile") is not None:
        return "zero-bubble schedules run backward in two parts, but compile makes one graph of it"
    return None


def _forbids(left: Technique, right: Technique) -> bool:
    return right.name in left.forbids or bool(right.slot and right.slot in left.forbids)


def proposable(plan: Plan) -> bool:
    """Return whether the search may propose the plan: it has no `conflict`, and none of its techniques names
    another one in its ``unsearched``, combinations that only users choose."""
    names = plan.techniques
    return conflict(plan) is None and all(names.isdisjoint(technique(n).unsearched) for n in names)


def excluded_techniques(facts: JobFacts) -> frozenset[str]:
    """Return the names of the techniques that the search must not propose for the job."""
    return frozenset(t.name for t in TECHNIQUES.values() if t.excluded(facts))


def unsupported_techniques(machine: Machine) -> frozenset[str]:
    """Return the names of the techniques that the machine's devices do not support: float8-linear if the
    devices are not CPUs, which emulate 8-bit floats, and the machine's data has no peak rate for these; else
    none."""
    device = machine.device
    has_float8 = device.is_host or "float8" in device.peak_flops  # a CPU emulates float8
    return frozenset() if has_float8 else frozenset({float8.NAME})


def check(plan: Plan, machine: Machine | None = None) -> Plan:
    """Return the plan unchanged. Raises UserError if the devices of ``machine`` do not support a technique,
    if a technique is unknown, if techniques or settings conflict, or if a package that they need is not
    installed. If ``machine`` is None, devices are not checked."""
    if machine is not None and not unsupported_techniques(machine).isdisjoint(plan.techniques):
        raise UserError(
            f"float8-linear is not supported on {machine.device.name}, for which no peak rate of 8-bit "
            "floats is known",
            allowed="CPUs, which emulate them, and devices with a peak rate for float8, such as H100, L4, "
            "L40S, RTX 4090, B200 and MI300X",
            hint="`memfit list machines` lists the peak rates of devices",
        )
    if (why_techniques_or_settings_conflict := conflict(plan)) is not None:
        raise UserError(
            f"impossible plan: {why_techniques_or_settings_conflict}",
            hint="take one of these techniques out, or change their settings",
        )
    for u in plan.uses:
        if missing := technique(u.technique).lacks(u.settings):
            raise UserError(
                f"{Plan(uses=(u,)).label} needs {', '.join(missing)}, which is not installed",
                hint=f"pip install {' '.join(missing)}",
            )
    return plan


def effect_of(plan: Plan, dependence: SampleDependence | None = None) -> EffectClass:
    """Return how far the plan may change the numbers of training: E0 not at all, E1 by the order of sums, E2
    by precision, E3 by another algorithm. It is the strongest effect of the plan's techniques, where one with
    the setting precision=bf16 counts as E2 at least, and one with dropless=true as E1. Return E0 for a plan
    without techniques. If ``dependence``, which describes the job's samples, is given and `changes_training`
    is true for it, return E3. Raises UserError for an unknown technique."""
    if dependence is not None and changes_training(plan, dependence):
        return EffectClass.E3
    return max(map(_effect, plan.uses), default=EffectClass.E0)


def changes_training(plan: Plan, dependence: SampleDependence) -> bool:
    """Return whether the samples of a batch are known to depend on each other (``dependence.kind``) and the
    plan splits a batch in a way that matters: into several micro-batches, or over several data-parallel
    ranks. The latter counts only if ``dependence.across_ranks`` is true. Raises UserError if the plan's
    degrees do not fit its ranks."""
    if dependence.kind is not DependenceKind.DEPENDENT:
        return False
    return in_micro_batches(plan) or (dependence.across_ranks and plan.ranks > 1 and layout(plan).data > 1)


def splits_batch(plan: Plan) -> bool:
    """Return whether samples of one batch are trained separately, in several micro-batches or on several
    data-parallel ranks. Raises UserError if the plan's degrees do not fit its ranks."""
    return in_micro_batches(plan) or (plan.ranks > 1 and layout(plan).data > 1)


def in_micro_batches(plan: Plan) -> bool:
    """Return whether a technique of the plan, gradient-accumulation or pipeline, trains a batch in more than
    one micro-batch."""
    return any(int(u.settings.get("micro_batches", 1)) > 1 for u in plan.uses)


def refuse_wrong_weights(plan: Plan, dependence: SampleDependence) -> None:
    """Raise UserError if `changes_training` is true because the loss terms of each micro-batch or rank would
    get wrong weights (``dependence.cause`` is `DependenceCause.WEIGHTS`). Samples that depend on each other
    for another reason raise nothing."""
    if dependence.cause is DependenceCause.WEIGHTS and changes_training(plan, dependence):
        how_this_is_known, mean_over_counted_terms = dependence.reason, dependence.way_out
        raise UserError(
            f"{plan.label} splits the batch into micro-batches or over ranks, and would thus weight its loss "
            f"terms wrongly: {how_this_is_known}",
            allowed=f"a loss that is {mean_over_counted_terms}",
            hint="or a plan that does not split the batch",
        )


def _effect(technique_use: Use) -> EffectClass:
    if technique_use.settings.get("dropless") is True:
        return EffectClass.E1
    is_bf16 = technique_use.settings.get("precision") == "bf16"
    return max(technique(technique_use.technique).effect, EffectClass.E2 if is_bf16 else EffectClass.E0)


def short_label(plan: Plan) -> str:
    """Return the plan's label, in which settings that have their default value are left out. Raises UserError
    for an unknown technique."""

    def short(used: Use) -> Use:
        defaults = {k.name: k.default for k in technique(used.technique).knobs}
        return Use(technique=used.technique, knobs=tuple(k for k in used.knobs if defaults.get(k[0]) != k[1]))

    return Plan(uses=tuple(map(short, plan.uses)), ranks=plan.ranks).label


def ordered_uses(plan: Plan) -> list[tuple[Technique, Use]]:
    """Return (technique, its use in the plan) for each technique of the plan, in the order in which they are
    applied: by ``Technique.order``, and in the plan's order where that is equal. Raises UserError for an
    unknown technique."""
    return sorted(((technique(u.technique), u) for u in plan.uses), key=lambda pair: pair[0].order)
