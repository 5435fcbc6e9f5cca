"""The table of all techniques, which of them can be combined, and the checks of plans."""

from __future__ import annotations

import difflib
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
from memfit.techniques.base import Technique
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
from memfit.types.errors import UserError, named
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
    """Return the technique. Raises UserError with the closest names if there is none of that name."""
    return named("technique", name, TECHNIQUES)


def make_use(name: str, settings: Mapping[str, object]) -> Use:
    """Return a Use with defaults filled in. Raises UserError for unknown knobs and values out of range."""
    found = technique(name)
    knobs = {k.name: k for k in found.knobs}
    for key, value in settings.items():
        if key not in knobs:
            close = difflib.get_close_matches(key, knobs, n=1)
            hint = f"did you mean {close[0]!r}?" if close else ""
            allowed = ", ".join(knobs) or "none"
            raise UserError(f"unknown setting {key!r} of technique {name!r}", allowed=allowed, hint=hint)
        if not knobs[key].accepts(value):
            raise UserError(f"{name}: {key} is {value!r}", allowed=knobs[key].allowed)
    filled: dict[str, KnobValue] = {k.name: k.default for k in found.knobs}
    filled.update({k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)})
    return use(name, **filled)


def plain(ranks: int = 1) -> Plan:
    """Return the plan of plain training, which saves no memory. On several ranks it is DDP, which keeps the
    whole model on each."""
    return Plan(uses=(make_use("ddp", {}),), ranks=ranks) if ranks > 1 else Plan()


def without(plan: Plan, name: str) -> Plan:
    """Return the plan without one technique. Plans of several ranks fall back to DDP, because the ranks must
    share the work. If recomputation has a budget, its choice of tensors is cleared, because it was made for
    other operators."""
    rest = plan.without(name)
    if (budget := rest.get(optimal.NAME)) is not None:
        rest = rest.with_use(make_use(optimal.NAME, {**budget.settings, "dropped": ""}))
    if technique(name).slot != "data-parallel" or plan.ranks == 1:
        return rest
    return rest.with_use(make_use("ddp", {}))


def conflict(plan: Plan) -> str | None:
    """Return why the techniques of a plan cannot be combined, or None."""
    used = [technique(u.technique) for u in plan.uses]
    for i, one in enumerate(used):
        for other in used[i + 1 :]:
            if one.slot and one.slot == other.slot:
                return f"{one.name} and {other.name} both set the {one.slot}"
            if _forbids(one, other) or _forbids(other, one):
                return f"{one.name} cannot be combined with {other.name}"
    return _conflict_of_settings(plan, used)


def _conflict_of_settings(plan: Plan, used: list[Technique]) -> str | None:
    narrow = plan.get("bf16-parameters")
    other = next((one.name for one in used if one.slot == "optimizer"), None)
    if other and narrow is not None and narrow.settings.get("rounding") == "stochastic":
        return f"stochastic rounding of bf16-parameters has an AdamW of its own, not {other}"
    sharded = plan.get("zero")
    if sharded is not None and sharded.settings.get("stage") == 3 and plan.get("compile") is not None:
        return "zero of stage 3 gathers parameters inside of blocks, and compile makes one graph of each"
    recomputes = next(filter(plan.get, ("activation-checkpointing", "selective-checkpointing")), None)
    adapts = next(filter(plan.get, ("lora", "qlora")), None)
    if sharded is not None and sharded.settings.get("stage") == 3 and recomputes and adapts:
        return (
            f"{recomputes} compares weights between forward and recomputation, and zero of stage 3 has freed "
            f"the frozen ones of {adapts} by then (with DeepSpeed itself, use_reentrant=True avoids that)"
        )
    staged = plan.get("pipeline")
    split = staged is not None and str(staged.settings.get("schedule")).startswith("zero-bubble")
    if split and plan.get("selective-checkpointing") is not None:
        return "zero-bubble runs backward in two parts, and selective-checkpointing keeps values for one"
    if split and plan.get("compile") is not None:
        return "zero-bubble runs backward in two parts, and compile makes one graph of it"
    return None


def _forbids(one: Technique, other: Technique) -> bool:
    return other.name in one.forbids or bool(other.slot and other.slot in one.forbids)


def proposable(plan: Plan) -> bool:
    """Return whether the search may propose this combination: it has no conflict, and none that only users
    ask for."""
    names = {u.technique for u in plan.uses}
    return conflict(plan) is None and all(names.isdisjoint(technique(n).unsearched) for n in names)


def unable(machine: Machine) -> frozenset[str]:
    """Return the techniques that the machine's devices do not support."""
    device = machine.device
    low = device.kind == "cpu" or "float8" in device.peak_flops  # a CPU emulates float8
    return frozenset() if low else frozenset({float8.NAME})


def check(plan: Plan, machine: Machine | None = None) -> Plan:
    """Return the plan unchanged. Raises UserError if techniques conflict, a package is missing, or the
    machine's devices do not support a technique."""
    if machine is not None and not unable(machine).isdisjoint(u.technique for u in plan.uses):
        raise UserError(
            f"{float8.NAME} on {machine.device.name}, which has no matrix units for 8-bit floats",
            allowed="H100, L4, L40S, RTX 40 and later; MI300 and later",
            hint="`memfit machines` lists peaks",
        )
    if (clash := conflict(plan)) is not None:
        raise UserError(f"impossible plan: {clash}", hint="take one of them out")
    for u in plan.uses:
        if missing := technique(u.technique).lacks(u.settings):
            raise UserError(
                f"{Plan(uses=(u,)).label} needs {', '.join(missing)}, which is not installed",
                hint=f"pip install {' '.join(missing)}",
            )
    return plan


def effect_of(plan: Plan, dependence: SampleDependence | None = None) -> EffectClass:
    """Return the strongest effect that a technique of the plan has on the numbers; E0 for the plain plan.
    ``dependence`` describes the job's samples: a plan that splits a batch of dependent samples is E3."""
    if dependence is not None and changes_training(plan, dependence):
        return EffectClass.E3
    return max(map(_effect, plan.uses), default=EffectClass.E0)


def changes_training(plan: Plan, dependence: SampleDependence) -> bool:
    """Return whether the plan splits a batch that must not be split."""
    if dependence.kind is not DependenceKind.DEPENDENT:
        return False
    return in_micro_batches(plan) or (dependence.across_ranks and plan.ranks > 1 and layout(plan).data > 1)


def splits_batch(plan: Plan) -> bool:
    """Return whether samples of one batch are trained separately, in micro-batches or on data-parallel
    ranks."""
    return in_micro_batches(plan) or (plan.ranks > 1 and layout(plan).data > 1)


def in_micro_batches(plan: Plan) -> bool:
    """Return whether the plan trains a batch in micro-batches."""
    return any(int(u.settings.get("micro_batches", 1)) > 1 for u in plan.uses)


def refuse_wrong_weights(plan: Plan, dependence: SampleDependence) -> None:
    """Raise UserError if the step would weight the loss terms of the batch's parts wrongly."""
    if dependence.cause is DependenceCause.WEIGHTS and changes_training(plan, dependence):
        raise UserError(
            f"{plan.label}: {dependence.reason}",
            allowed=dependence.way_out,
            hint="or a plan that does not split the batch",
        )


def _effect(used: Use) -> EffectClass:
    lower = used.settings.get("precision") == "bf16"
    return max(technique(used.technique).effect, EffectClass.E2 if lower else EffectClass.E0)


def brief(plan: Plan) -> str:
    """Return the plan's label without settings that have their default value."""

    def short(used: Use) -> Use:
        usual = {k.name: k.default for k in technique(used.technique).knobs}
        return Use(technique=used.technique, knobs=tuple(k for k in used.knobs if usual.get(k[0]) != k[1]))

    return Plan(uses=tuple(map(short, plan.uses)), ranks=plan.ranks).label


def in_order(plan: Plan) -> list[tuple[Technique, Use]]:
    """Return the techniques of the plan in the order in which they are applied."""
    return sorted(((technique(u.technique), u) for u in plan.uses), key=lambda pair: pair[0].order)
