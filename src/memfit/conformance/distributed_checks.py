"""Checks of parallel plans beyond sharded elements, mostly one function per technique.

Every rank runs all checks. Whether a check gathers values from all ranks depends only on the plan, so that
all ranks take part in the same gathers.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from memfit.conformance.fingerprints import real
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import (
    from_all,
    fsdp_groups,
    fsdp_params,
    layers,
    local_bytes,
    local_elements,
    own_shard,
    states,
    whole,
)
from memfit.conformance.technique_checks import join_values

_ALL_RATIO = 0.9  # fraction of bytes
_ONCE_RATIO = 0.75  # fraction of elements: shards are padded, and never smaller in total
_REPLICAS_RATIO = 1e-7  # averaged gradients are bitwise equal on every rank
_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")


def shards(step: Observation) -> None:
    """Record, if the plan shards parameters, whether all ranks together hold at least 75 % of the elements of
    one model per replica. Does nothing with expert-parallel, or if the ranks hold no elements."""
    degree, feature = step.sharded("parameters")
    if degree == 1 or step.plan.get("expert-parallel") is not None:
        return
    params = list(step.model.parameters())
    counts: list[tuple[int, int]] = from_all((sum(map(local_elements, params)), step.part(params)))
    held_elements, expected_elements = (sum(column) for column in zip(*counts, strict=True))
    if held_elements:
        step.differs(
            f"{feature}: replicas",
            f"{expected_elements // degree:,} elements on all ranks together",
            f"{held_elements:,}",
            wrong=held_elements < _ONCE_RATIO * expected_elements / degree,
        )


def units(step: Observation) -> None:
    """Record, with fsdp2 and at least two blocks, whether no parameter group has most of the parameters of
    more than one block, so that FSDP2 gathers block by block. Recorded as not checked if no group has most of
    the parameters of a block, or of those outside the blocks."""
    if step.plan.get("fsdp2") is None or len(step.blocks) < 2:
        return
    block_of_module = _block_of(step)
    block_totals = collections.Counter(
        block_of_module.get(p._module_info.module, -1) for p in fsdp_params(step.model)
    )
    group_blocks = []
    for group in fsdp_groups(step.model):
        group_counts = collections.Counter(
            block_of_module.get(p._module_info.module, -1) for p in group.fsdp_params
        )
        group_blocks.append(
            {block for block, count in group_counts.items() if 2 * count > block_totals[block]}
        )
    if not any(group_blocks):
        step.unseen("fsdp2: units: no parameter groups were found")
        return
    largest_group = max((blocks - {-1} for blocks in group_blocks), key=len)
    step.differs(
        "fsdp2: units",
        "each block is gathered separately",
        f"blocks {join_values(sorted(largest_group))} together",
        wrong=len(largest_group) > 1,
    )


def resharded(step: Observation) -> None:
    """Record whether FSDP2 frees gathered blocks after their forward or keeps them, as planned. It counts as
    freeing them if at most half of them are still gathered when backward begins. The last block, which
    backward needs first, is left out. Does nothing with a pipeline, or if parameters are not sharded.
    Recorded as not checked if gathered blocks were not observed, or if there are fewer than two blocks."""
    use = step.plan.get("fsdp2")
    if use is None or step.layout.pipeline > 1 or step.layout.shard * step.layout.context == 1:
        return
    gathered_blocks = step.still_gathered
    if gathered_blocks is None or len(step.blocks) < 2 or not any(True for _ in fsdp_groups(step.model)):
        step.unseen("fsdp2: reshard: gathered blocks could not be observed")
        return
    reshards, last_block = use.settings["reshard"] is not False, len(step.blocks) - 1
    gathered_count = len(set(gathered_blocks) - {last_block})
    step.differs(
        "fsdp2: reshard",
        f"gathered blocks {'freed after' if reshards else 'kept from'} forward",
        f"{gathered_count} of {last_block} still gathered when backward begins",
        wrong=(2 * gathered_count > last_block) == reshards,
    )


def _block_of(step: Observation) -> dict[nn.Module, int]:
    """Return, for each module inside a block, the block's index. Modules are the keys because gathered
    parameters are other tensors than the shards."""
    return {module: i for i, block in enumerate(step.blocks) for module in block.modules()}


def still_gathered(step: Observation) -> list[int]:
    """Return the indices of the blocks of whose elements more than half are gathered by FSDP2 now."""
    block_of_module = _block_of(step)
    gathered_elements, total_elements = [0] * len(step.blocks), [0] * len(step.blocks)
    for param in fsdp_params(step.model):
        if (index := block_of_module.get(param._module_info.module)) is None:
            continue
        total_elements[index] += (elements := param.sharded_param.numel())
        full_param = getattr(param, "_unsharded_param", None)
        local = getattr(full_param, "_local_tensor", full_param)
        gathered_elements[index] += elements if local is not None and local.untyped_storage().nbytes() else 0
    return [
        i
        for i, (block_gathered, block_total) in enumerate(zip(gathered_elements, total_elements, strict=True))
        if block_total and 2 * block_gathered > block_total
    ]


def replicas(step: Observation) -> None:
    """Record whether trained parameters have equal norms on every rank after a step, within a relative 1e-7.
    If not, gradients were not averaged. Does nothing with expert-parallel, or unless all ranks should hold
    the same whole parameters."""
    replica_count = step.layout.data * step.layout.context
    if replica_count == 1 or step.layout.ranks != replica_count or step.sharded("parameters")[0] > 1:
        return
    if step.plan.get("expert-parallel") is not None:
        return
    own_norms = norms(step.trainable())
    deviation = max(
        abs(a - b) / max(abs(a), abs(b), 1e-300)
        for rank_norms in from_all(own_norms)
        for a, b in zip(own_norms, rank_norms, strict=True)
    )
    feature = next((u.technique for u in step.plan.uses if u.technique in _AVERAGING), "replicas")
    step.differs(
        f"{feature}: replicas",
        "equal parameters on every rank after a step",
        f"parameter norms up to {deviation:.1e} apart: gradients are not averaged",
        wrong=deviation > _REPLICAS_RATIO,
    )


def norms(params: Iterable[nn.Parameter]) -> list[float]:
    """Return the norm of this rank's part of each parameter."""
    local_parts = (real(getattr(p, "to_local", lambda p=p: p)().detach()) for p in params)
    values = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in local_parts]
    return torch.stack(values).tolist() if values else []


def near(a: list[float], b: list[float]) -> bool:
    """Return whether two lists of norms have equal lengths and values, within a relative error of
    `_REPLICAS_RATIO`."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_REPLICAS_RATIO) for x, y in zip(a, b, strict=True)
    )


def offloaded_states(step: Observation) -> None:
    """Record, with fsdp2 or zero, whether parameters and optimizer state are offloaded to the host exactly as
    planned. If the loss is on an accelerator, the devices of tensors show it, else the settings of the object
    that would move the tensors. Recorded as not checked if an offload is planned and there is no such
    object."""
    use = step.plan.get("fsdp2") or step.plan.get("zero")
    if use is None:
        return
    planned_names = _planned_on_host(str(use.settings["offload"]))
    found_names = _by_policy(step) if step.graph.device in ("", "cpu") else _on_devices(step, planned_names)
    feature = f"{use.technique}: offload"
    if found_names is None:
        if planned_names:
            step.unseen(f"{feature}: no object that moves tensors to the host was found")
        return
    step.differs(
        feature,
        f"{join_values(planned_names)} in host memory",
        join_values(sorted(found_names)),
        wrong=set(planned_names) != found_names,
    )


def _planned_on_host(offload: str) -> list[str]:
    return {
        "True": ["optimizer", "parameters"],
        "parameters": ["optimizer", "parameters"],
        "optimizer": ["optimizer"],
    }.get(offload, [])


def _on_devices(step: Observation, planned_names: Sequence[str]) -> set[str]:
    """Return which of "parameters" and "optimizer" (its state) are on the host: with over 90 % of their bytes
    if they are in ``planned_names``, else with over half. What has no bytes on this rank counts as planned.
    If parameters are to be on the host, the small ones that ZeRO leaves in place do not count."""
    keeps_small = "parameters" in planned_names and step.plan.get("zero") is not None
    params = (p for p in step.model.parameters() if not (keeps_small and step.persists(p)))
    state_tensors = (t for _, tensors in states(step.optimizer) for t in tensors)
    tensors_by_name = {"parameters": [own_shard(p) for p in params], "optimizer": list(state_tensors)}
    return {name for name, tensors in tensors_by_name.items() if _on_host(tensors, name in planned_names)}


def _on_host(tensors: list[torch.Tensor], is_planned: bool) -> bool:
    all_bytes = sum(map(local_bytes, tensors))
    host_bytes = sum(local_bytes(t) for t in tensors if t.device.type == "cpu")
    return host_bytes > all_bytes * (_ALL_RATIO if is_planned else 0.5) if all_bytes else is_planned


def _by_policy(step: Observation) -> set[str] | None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    if policies := [isinstance(g.offload_policy, CPUOffloadPolicy) for g in fsdp_groups(step.model)]:
        return {"optimizer", "parameters"} if all(policies) else set()
    for layer in layers(step.optimizer):
        if hasattr(layer, "state_on"):  # memfit's ZeRO
            parameters = getattr(getattr(layer, "shards", None), "offload", False)
            return _named(optimizer=layer.state_on == "host", parameters=parameters)
        if hasattr(layer, "cpu_offload") or hasattr(layer, "offload_optimizer"):  # DeepSpeed's ZeRO
            flags = [getattr(layer, name, False) for name in ("cpu_offload", "offload_optimizer")]
            return _named(optimizer=any(flags), parameters=getattr(layer, "offload_param", False))
    return None


def _named(**flags: bool) -> set[str]:
    return {name for name, enabled in flags.items() if enabled}


@dataclasses.dataclass(frozen=True, slots=True)
class _Stage:
    """What one rank of a pipeline holds. ``place``: its index along the pipeline. ``held`` maps the names of
    trained parameters to their number of elements, ``learned`` holds the names of those that got a gradient,
    and ``norms`` the norms of the trained parameters."""

    place: int
    held: dict[str, int]
    learned: set[str]
    norms: list[float]


def stages(step: Observation) -> None:
    """Record, with a pipeline, whether this rank holds no more blocks than its stages should have, and
    whether it holds no parameters that only other ranks' stages train. If all ranks train the same parameters
    with the same values, record this as the difference instead of the second. The first is recorded as not
    checked if the size of the whole model is unknown, the second if a rank had no gradients."""
    use = step.plan.get("pipeline")
    if use is None:
        return
    virtual = int(use.settings["virtual"])
    held_blocks = [i for i, b in enumerate(step.blocks) if any(map(whole, b.parameters()))]
    max_blocks = virtual * math.ceil(len(step.blocks) / (step.layout.pipeline * virtual))
    if step.whole_elements:
        step.differs(
            "pipeline: blocks",
            f"at most {max_blocks} of {len(step.blocks)} on a rank",
            f"{len(held_blocks)} ({join_values(held_blocks)})",
            wrong=len(held_blocks) > max_blocks,
        )
    else:
        step.unseen("pipeline: how many blocks a rank holds: the size of the whole model is unknown")
    trained_params = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    learned_names = {n for n, p in trained_params.items() if id(p) in step.learned}
    own_stage = _Stage(
        step.layout.coordinate(dist.get_rank())["pipeline"],
        {n: whole(p) for n, p in trained_params.items()},
        learned_names,
        norms(trained_params.values()),
    )
    all_stages: list[_Stage] = from_all(own_stage)
    names_elsewhere = set[str]().union(*(s.learned for s in all_stages if s.place != own_stage.place))
    if not all(s.learned for s in all_stages):
        step.unseen("pipeline: parameters: no gradients were seen")
        return
    if all(s.learned == own_stage.learned and near(s.norms, own_stage.norms) for s in all_stages):
        step.differs(
            "pipeline: stages",
            "parameters that no other stage trains",
            "every rank trains the same ones",
            wrong=True,
        )
        return
    idle_names = sorted((names_elsewhere - own_stage.learned) & own_stage.held.keys())
    step.differs(
        "pipeline: parameters",
        "only those that this rank's stages use",
        f"{sum(own_stage.held[n] for n in idle_names):,} elements that other stages train "
        f"({join_values(idle_names[:3])})",
        wrong=bool(idle_names),
    )


def shared_samples(step: Observation) -> None:
    """Record, with context or axial parallelism, whether the ranks that each hold a part of the same samples
    work on different parts, by the inputs of their blocks. Only if all of these ranks work on the same part
    is this a difference. Recorded as not checked if the inputs were not observed on some rank."""
    use = step.plan.get("context-parallel") or step.plan.get("axial-parallel")
    if use is None or step.layout.context == 1:
        return
    feature = f"{use.technique}: parts of a sample"
    group = step.other_coordinates("context")
    entries: list[tuple[Any, list[float]]] = from_all((group, step.entered))
    partner_fingerprints = [fingerprints for entry_group, fingerprints in entries if entry_group == group]
    if not all(fingerprints for _, fingerprints in entries):  # the same on every rank
        step.unseen(f"{feature}: the inputs of the blocks could not be compared")
        return
    step.differs(
        feature,
        f"a different part on each of {step.layout.context} ranks",
        "the same part on every rank",
        wrong=all(p == partner_fingerprints[0] for p in partner_fingerprints),
    )


def entering(args: Iterable[Any]) -> Iterator[float]:
    """Yield numbers that are equal if two ranks receive the same tensors: sum and norm of this rank's part of
    each floating-point tensor in ``args`` that has at least two dimensions and elements that differ."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            local = getattr(value, "_local_tensor", value).detach()
            if local.numel() and local.min() != local.max():
                yield from (float(local.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(local)))


def experts(step: Observation) -> None:
    """Record, with expert-parallel, whether this rank holds fewer elements than the whole model. Recorded as
    not checked if the size of the whole model is unknown."""
    use = step.plan.get("expert-parallel")
    if use is None:
        return
    held_elements = sum(map(whole, step.model.parameters()))
    if not step.whole_elements:
        step.unseen("expert-parallel: how many experts a rank holds: the size of the whole model is unknown")
        return
    total = step.whole_elements
    step.differs(
        "expert-parallel",
        f"experts distributed over {use.settings['degree']} ranks",
        f"{held_elements:,} of {total:,} elements on a rank",
        wrong=held_elements >= total,
    )


AT_REST: tuple[Callable[[Observation], None], ...] = (shards, units, experts)
AFTER_A_STEP: tuple[Callable[[Observation], None], ...] = (
    replicas,
    offloaded_states,
    stages,
    shared_samples,
    resharded,
)
