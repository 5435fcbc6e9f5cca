"""The checks, and which techniques each covers. A new check is added to `CHECKS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from memfit.conformance import (
    block_checks,
    clipping_check,
    distributed_checks,
    gradient_mean_check,
    sample_checks,
    schedule_check,
    shard_checks,
    technique_checks,
    tensor_parallel_check,
    training_checks,
)
from memfit.conformance.findings import CheckFinding, NotChecked
from memfit.conformance.observation import Observations
from memfit.techniques import float8
from memfit.techniques.registry import technique
from memfit.types.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True)
class ConformanceCheck:
    """``function`` compares a plan with what was observed of a model and a step with it, and yields its
    findings. It has no other input and no effect. It yields nothing if the plan has nothing that it checks.

    ``techniques``: the techniques whose effect it checks, empty for a check of something that is no
    technique. Some checks also find effects that the plan does not request. ``needs_step``: whether the check
    is left out if no training step was observed."""

    function: Callable[[Plan, Observations], Iterator[CheckFinding]]
    techniques: tuple[str, ...] = ()
    needs_step: bool = False


_SHARDING = ("fsdp2", "zero", "sharded-ddp")
_DATA_PARALLEL = ("ddp", *_SHARDING)
_SAMPLE_PARALLEL = ("context-parallel", "axial-parallel")

# In the order of the report. Checks without a step come first.
CHECKS = (
    ConformanceCheck(shard_checks.parameters, _DATA_PARALLEL),
    ConformanceCheck(block_checks.parameter_dtypes, ("bf16-parameters", "zero")),
    ConformanceCheck(technique_checks.adapters, ("lora", "qlora")),
    ConformanceCheck(technique_checks.float8_layers, (float8.NAME,)),
    ConformanceCheck(technique_checks.update_kernel, ("adamw-fused", "adamw-single")),
    ConformanceCheck(technique_checks.imported_class, ("optimizer",)),
    ConformanceCheck(tensor_parallel_check.tensor_parallel, ("tensor-parallel",)),
    ConformanceCheck(distributed_checks.shards, _SHARDING),
    ConformanceCheck(distributed_checks.units, ("fsdp2",)),
    ConformanceCheck(distributed_checks.experts, ("expert-parallel",)),
    ConformanceCheck(training_checks.optimizer_parameters),
    ConformanceCheck(schedule_check.micro_batches, ("gradient-accumulation", "pipeline"), needs_step=True),
    ConformanceCheck(shard_checks.gradients, _SHARDING, needs_step=True),
    ConformanceCheck(shard_checks.optimizer_state, _SHARDING, needs_step=True),
    ConformanceCheck(technique_checks.offloaded_activations, ("activation-offload",), needs_step=True),
    ConformanceCheck(technique_checks.dropped_tensors, ("optimal-checkpointing",), needs_step=True),
    ConformanceCheck(technique_checks.compilation, ("compile",), needs_step=True),
    ConformanceCheck(technique_checks.chunked_loss, ("chunked-cross-entropy",), needs_step=True),
    ConformanceCheck(technique_checks.optimizer_kind, technique_checks.OPTIMIZERS, needs_step=True),
    ConformanceCheck(technique_checks.in_backward_updates, ("optimizer-in-backward",), needs_step=True),
    ConformanceCheck(distributed_checks.replicas, (*_DATA_PARALLEL, *_SAMPLE_PARALLEL), needs_step=True),
    ConformanceCheck(distributed_checks.offloaded_states, ("fsdp2", "zero"), needs_step=True),
    ConformanceCheck(distributed_checks.stages, ("pipeline",), needs_step=True),
    ConformanceCheck(distributed_checks.shared_samples, _SAMPLE_PARALLEL, needs_step=True),
    ConformanceCheck(distributed_checks.resharding, ("fsdp2",), needs_step=True),
    ConformanceCheck(
        block_checks.recomputation, ("activation-checkpointing", "selective-checkpointing"), needs_step=True
    ),
    ConformanceCheck(block_checks.autocast, ("bf16-autocast", "fp16-autocast"), needs_step=True),
    ConformanceCheck(block_checks.fsdp2_precision, ("fsdp2",), needs_step=True),
    ConformanceCheck(schedule_check.schedule, ("pipeline",), needs_step=True),
    ConformanceCheck(sample_checks.different_samples, _DATA_PARALLEL, needs_step=True),
    ConformanceCheck(sample_checks.other_parts, _SAMPLE_PARALLEL, needs_step=True),
    ConformanceCheck(
        gradient_mean_check.mean_gradients, (*_DATA_PARALLEL, *_SAMPLE_PARALLEL), needs_step=True
    ),
    ConformanceCheck(tensor_parallel_check.sums_over_ranks, ("tensor-parallel",), needs_step=True),
    ConformanceCheck(clipping_check.gradient_clipping, needs_step=True),
    ConformanceCheck(training_checks.update, needs_step=True),
    ConformanceCheck(training_checks.weights, ("lora", "qlora"), needs_step=True),
    ConformanceCheck(training_checks.block_gradients, needs_step=True),
    ConformanceCheck(training_checks.master_weights, ("bf16-parameters",), needs_step=True),
)

# Techniques that some check covers.
COVERED = frozenset(name for check in CHECKS for name in check.techniques)
# Techniques that are named if no step was observed. Of the others with such checks, the report only says in
# general that gradients and replicas were not checked.
_BY_A_STEP = frozenset(name for check in CHECKS if check.needs_step for name in check.techniques) - {
    *_DATA_PARALLEL,
    "tensor-parallel",
}
_PARTLY = {
    "expert-parallel": "sharding, gradients and replicas of parameters outside the experts are not checked",
    "selective-checkpointing": "which tensors the blocks keep is not checked, only that the blocks run again",
    "adamw-paged": "whether the state is paged between the host and the device is not checked",
    "tensor-parallel": "whether activations are sharded is not checked, only parameters",
    "context-parallel": "whether the attention of every block reaches all other ranks is not checked",
    "activation-offload": "whether more than three quarters of the bytes are offloaded is not checked",
    "float8-linear": "what runs inside torchao's layers is not checked",
    "optimizer": "its settings and parameter groups are not checked",
    "sgd": "another optimizer with the same bytes of state is not detected",
}
# Knobs whose effect is not checked. They are reported if the plan does not use their default.
_UNCHECKED_KNOBS = {
    "ddp": ("bucket_mib", "bucket_view", "sync"),
    "fsdp2": ("units", "prefetch", "sync"),
    "lora": ("dora",),
    "zero": ("overlap", "live_elements", "prefetch_elements"),
}


def findings(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Yield the findings of all checks in the order of `CHECKS`. Checks that need a training step are left
    out if none was observed; a `NotChecked` says so if the plan has techniques. At the end, yield a
    `NotChecked` for each part of the plan that no check covers (`_unchecked`)."""
    for check in CHECKS:
        if observed.has_step or not check.needs_step:
            yield from check.function(plan, observed)
    if plan.uses and not observed.has_step:
        yield NotChecked("gradients, recomputation and replicas: no training step was observed")
    yield from map(NotChecked, _unchecked(plan, has_step=observed.has_step))


def _unchecked(plan: Plan, *, has_step: bool) -> Iterator[str]:
    """Yield a text for each part of the plan that no check covers: a technique, a part of a technique, or a
    setting in `_UNCHECKED_KNOBS` that is not the default. ``has_step``: whether a training step was observed.
    If not, techniques with a check that needs a step are named, too, but for tensor-parallel and those of
    data parallelism."""
    for name in (u.technique for u in plan.uses):
        if name not in COVERED:
            yield f"{name}: not checked"
        elif name in _BY_A_STEP and not has_step:
            yield f"{name}: no training step was observed"
        elif name in _PARTLY:
            yield f"{name}: {_PARTLY[name]}"
    for use in plan.uses:
        defaults = {k.name: k.default for k in technique(use.technique).knobs}
        for name in _UNCHECKED_KNOBS.get(use.technique, ()):
            if (value := use.settings.get(name)) != defaults.get(name):
                yield f"{use.technique}: {name}={value}"
