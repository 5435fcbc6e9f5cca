"""Checks of parallel plans beyond sharded elements, mostly one function per technique."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence

from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations
from memfit.conformance.planned_shards import persists, shard_degree
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_ALL_RATIO = 0.9  # fraction of bytes
_ONCE_RATIO = 0.75  # fraction of elements: shards are padded, and never smaller in total
_REPLICAS_RATIO = 1e-7  # averaged gradients are bitwise equal on every rank
_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")


def shards(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, if the plan shards parameters, whether all ranks together hold at least 75 % of the elements of
    one model per replica. Does nothing with expert-parallel, or if the ranks hold no elements."""
    degree, feature = shard_degree(plan, "parameters")
    if degree == 1 or plan.get("expert-parallel") is not None:
        return
    held_elements = sum(r.held_elements for r in observed.ranks)
    expected_elements = sum(r.part_elements for r in observed.ranks)
    if held_elements:
        yield Checked(
            f"{feature}: replicas",
            f"{expected_elements // degree:,} elements on all ranks together",
            f"{held_elements:,}",
            wrong=held_elements < _ONCE_RATIO * expected_elements / degree,
        )


def units(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with fsdp2 and at least two blocks, whether no parameter group has most of the parameters of
    more than one block, so that FSDP2 gathers block by block. Not checked if no group has most of the
    parameters of a block, or of those outside the blocks."""
    if plan.get("fsdp2") is None or observed.block_count < 2:
        return
    block_totals = collections.Counter[int]()
    for counts in observed.fsdp_groups:
        block_totals.update(counts)
    group_blocks = [
        {block for block, count in counts.items() if 2 * count > block_totals[block]}
        for counts in observed.fsdp_groups
    ]
    if not any(group_blocks):
        yield NotChecked("fsdp2: units: no parameter groups were found")
        return
    largest_group = max((blocks - {-1} for blocks in group_blocks), key=len)
    yield Checked(
        "fsdp2: units",
        "each block is gathered separately",
        f"blocks {join_values(sorted(largest_group))} together",
        wrong=len(largest_group) > 1,
    )


def resharded(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether FSDP2 frees gathered blocks after their forward or keeps them, as planned. It counts as
    freeing them if at most half of them are still gathered when backward begins. The last block, which
    backward needs first, is left out. Does nothing with a pipeline, or if parameters are not sharded. Not
    checked if gathered blocks were not observed, or if there are fewer than two blocks."""
    use, mesh = plan.get("fsdp2"), layout(plan)
    if use is None or mesh.pipeline > 1 or mesh.shard * mesh.context == 1:
        return
    gathered_blocks = observed.gathered_blocks
    if gathered_blocks is None or observed.block_count < 2 or not observed.fsdp_groups:
        yield NotChecked("fsdp2: reshard: gathered blocks could not be observed")
        return
    reshards, last_block = use.settings["reshard"] is not False, observed.block_count - 1
    gathered_count = len(set(gathered_blocks) - {last_block})
    yield Checked(
        "fsdp2: reshard",
        f"gathered blocks {'freed after' if reshards else 'kept from'} forward",
        f"{gathered_count} of {last_block} still gathered when backward begins",
        wrong=(2 * gathered_count > last_block) == reshards,
    )


def replicas(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether trained parameters have equal norms on every rank after a step, within a relative 1e-7.
    If not, gradients were not averaged. Does nothing with expert-parallel, or unless all ranks should hold
    the same whole parameters."""
    mesh = layout(plan)
    replica_count = mesh.data * mesh.context
    if replica_count == 1 or mesh.ranks != replica_count or shard_degree(plan, "parameters")[0] > 1:
        return
    if plan.get("expert-parallel") is not None:
        return
    norms = observed.this_rank.norms.values()
    deviation = max(
        abs(a - b) / max(abs(a), abs(b), 1e-300)
        for rank in observed.ranks
        for a, b in zip(norms, rank.norms.values(), strict=True)
    )
    feature = next((u.technique for u in plan.uses if u.technique in _AVERAGING), "replicas")
    yield Checked(
        f"{feature}: replicas",
        "equal parameters on every rank after a step",
        f"parameter norms up to {deviation:.1e} apart: gradients are not averaged",
        wrong=deviation > _REPLICAS_RATIO,
    )


def near(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether two lists of norms have equal lengths and values, within a relative error of
    `_REPLICAS_RATIO`."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_REPLICAS_RATIO) for x, y in zip(a, b, strict=True)
    )


def offloaded_states(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with fsdp2 or zero, whether parameters and optimizer state are offloaded to the host exactly as
    planned. If the loss is on an accelerator, the devices of tensors show it, else the settings of the object
    that would move the tensors. Not checked if an offload is planned and there is no such object."""
    use = plan.get("fsdp2") or plan.get("zero")
    if use is None:
        return
    planned_names = _planned_on_host(str(use.settings["offload"]))
    on_host = observed.saved.device in ("", "cpu")
    found_names = observed.offload_policy if on_host else _on_devices(plan, observed, planned_names)
    feature = f"{use.technique}: offload"
    if found_names is None:
        if planned_names:
            yield NotChecked(f"{feature}: no object that moves tensors to the host was found")
        return
    yield Checked(
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


def _on_devices(plan: Plan, observed: Observations, planned_names: Sequence[str]) -> frozenset[str]:
    """Return which of "parameters" and "optimizer" (its state) are on the host: with over 90 % of their bytes
    if they are in ``planned_names``, else with over half. What has no bytes on this rank counts as planned.
    If parameters are to be on the host, the small ones that ZeRO leaves in place do not count."""
    keeps_small = "parameters" in planned_names and plan.get("zero") is not None
    params = (p for p in observed.parameters if not (keeps_small and persists(plan, p.whole_elements)))
    bytes_by_name = {
        "parameters": [(p.shard_bytes, p.shard_device) for p in params],
        "optimizer": [(t.size_bytes, t.device) for state in observed.states for t in state.tensors],
    }
    return frozenset(name for name, sizes in bytes_by_name.items() if _on_host(sizes, name in planned_names))


def _on_host(bytes_and_devices: Sequence[tuple[int, str]], is_planned: bool) -> bool:
    all_bytes = sum(size for size, _ in bytes_and_devices)
    host_bytes = sum(size for size, device in bytes_and_devices if device == "cpu")
    return host_bytes > all_bytes * (_ALL_RATIO if is_planned else 0.5) if all_bytes else is_planned


def stages(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with a pipeline, whether this rank holds no more blocks than its stages should have, and whether
    it holds no parameters that only other ranks' stages train. If all ranks train the same parameters with
    the same values, this is the difference instead of the second. The first is not checked if the size of the
    whole model is unknown, the second if a rank had no gradients."""
    use = plan.get("pipeline")
    if use is None:
        return
    virtual, this_rank = int(use.settings["virtual"]), observed.this_rank
    held_blocks = [
        i for i, params in enumerate(observed.block_parameters) if any(p.whole_elements for p in params)
    ]
    max_blocks = virtual * math.ceil(observed.block_count / (layout(plan).pipeline * virtual))
    if observed.model_elements:
        yield Checked(
            "pipeline: blocks",
            f"at most {max_blocks} of {observed.block_count} on a rank",
            f"{len(held_blocks)} ({join_values(held_blocks)})",
            wrong=len(held_blocks) > max_blocks,
        )
    else:
        yield NotChecked("pipeline: how many blocks a rank holds: the size of the whole model is unknown")
    if not all(r.learned for r in observed.ranks):
        yield NotChecked("pipeline: parameters: no gradients were seen")
        return
    norms = list(this_rank.norms.values())
    if all(r.learned == this_rank.learned and near(list(r.norms.values()), norms) for r in observed.ranks):
        yield Checked(
            "pipeline: stages",
            "parameters that no other stage trains",
            "every rank trains the same ones",
            wrong=True,
        )
        return
    stage = this_rank.coordinate["pipeline"]
    learned_elsewhere = frozenset[str]().union(
        *(r.learned for r in observed.ranks if r.coordinate["pipeline"] != stage)
    )
    trained_elements = {p.name: p.whole_elements for p in observed.trained}
    idle_names = sorted((learned_elsewhere - this_rank.learned) & trained_elements.keys())
    yield Checked(
        "pipeline: parameters",
        "only those that this rank's stages use",
        f"{sum(trained_elements[n] for n in idle_names):,} elements that other stages train "
        f"({join_values(idle_names[:3])})",
        wrong=bool(idle_names),
    )


def shared_samples(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with context or axial parallelism, whether the ranks that each hold a part of the same samples
    work on different parts, by the inputs of their blocks. Only if all of these ranks work on the same part
    is this a difference. Not checked if the inputs were not observed on some rank."""
    use, degree = plan.get("context-parallel") or plan.get("axial-parallel"), layout(plan).context
    if use is None or degree == 1:
        return
    feature = f"{use.technique}: parts of a sample"
    group = observed.this_rank.other_coordinates("context")
    partners = [r for r in observed.ranks if r.other_coordinates("context") == group]
    if not all(r.block_inputs for r in observed.ranks):  # the same on every rank
        yield NotChecked(f"{feature}: the inputs of the blocks could not be compared")
        return
    yield Checked(
        feature,
        f"a different part on each of {degree} ranks",
        "the same part on every rank",
        wrong=all(r.block_inputs == partners[0].block_inputs for r in partners),
    )


def experts(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with expert-parallel, whether this rank holds fewer elements than the whole model. Not checked
    if the size of the whole model is unknown."""
    use = plan.get("expert-parallel")
    if use is None:
        return
    held_elements = sum(p.whole_elements for p in observed.parameters)
    if not observed.model_elements:
        yield NotChecked(
            "expert-parallel: how many experts a rank holds: the size of the whole model is unknown"
        )
        return
    yield Checked(
        "expert-parallel",
        f"experts distributed over {use.settings['degree']} ranks",
        f"{held_elements:,} of {observed.model_elements:,} elements on a rank",
        wrong=held_elements >= observed.model_elements,
    )
