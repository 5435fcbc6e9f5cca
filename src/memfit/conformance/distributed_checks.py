"""Checks of parallel plans beyond sharded elements, mostly one function per technique."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence

from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations
from memfit.conformance.planned_shards import averaging_technique, persists, shard_degree
from memfit.techniques.rank_mesh import layout
from memfit.types.device_kind import HOST
from memfit.types.plan import Plan

_ALL_RATIO = 0.9  # fraction of bytes
_ONCE_RATIO = 0.75  # fraction of elements: shards are padded, and never smaller in total
_REPLICAS_RATIO = 1e-7  # averaged gradients are bitwise equal on every rank


def shards(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the elements of parameters that all ranks hold together are at least 75 % of one whole
    model for each group of ranks that shards one. Yields nothing if the plan does not shard parameters, with
    expert-parallel, or if the ranks hold no elements."""
    degree, feature = shard_degree(plan, "parameters")
    if degree == 1 or "expert-parallel" in plan:
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
    """Check, with fsdp2, whether FSDP2 gathers each block separately: no parameter group may have more than
    half of the parameters of more than one block. Yields `NotChecked` if no group has more than half of the
    parameters of any block, or of those outside the blocks. Yields nothing without fsdp2, or with fewer than
    two blocks."""
    if "fsdp2" not in plan or observed.block_count < 2:
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


def resharding(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with fsdp2, whether the gathered parameters of the blocks are freed after forward, or kept if
    the setting ``reshard`` is False. They count as freed if at most half of the blocks but the last, which
    backward needs first, are still gathered when the first backward begins.

    Yields `NotChecked` if it was not observed which blocks are gathered, if FSDP2 has no parameter groups, or
    with fewer than two blocks. Yields nothing without fsdp2, with a pipeline, or if parameters are not
    sharded."""
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
    """Check whether each trained parameter has the same norm on every rank after a step, within a relative
    1e-7. If not, gradients were not averaged. Yields nothing with one rank, with expert-parallel, if the plan
    does not let all ranks hold the same whole parameters, or if the model has no trained parameters."""
    mesh = layout(plan)
    replica_count = mesh.data * mesh.context
    if replica_count == 1 or mesh.ranks != replica_count or shard_degree(plan, "parameters")[0] > 1:
        return
    if "expert-parallel" in plan:
        return
    norms = observed.this_rank.norms
    if not norms:
        return
    deviation = max(
        abs(a - b) / max(abs(a), abs(b), 1e-300)
        for rank in observed.ranks
        for a, b in zip(norms.values(), rank.norms.values(), strict=True)
    )
    yield Checked(
        f"{averaging_technique(plan)}: replicas",
        "equal parameters on every rank after a step",
        f"parameter norms up to {deviation:.1e} apart: gradients are not averaged",
        wrong=deviation > _REPLICAS_RATIO,
    )


def near(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether ``a`` and ``b``, norms, have the same length and pairwise equal values, within a
    relative error of 1e-7 (`_REPLICAS_RATIO`)."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_REPLICAS_RATIO) for x, y in zip(a, b, strict=True)
    )


def offloaded_states(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with fsdp2 or zero, whether exactly what the setting ``offload`` names is in host memory:
    parameters and optimizer state, optimizer state alone, or nothing.

    If the loss is on an accelerator, this is read from the devices of the tensors, else from the settings of
    FSDP2 or of the ZeRO optimizer. If neither is found in the second case, yields `NotChecked` if an offload
    is planned, else nothing. Also yields `NotChecked` if zero's setting ``nvme`` is not "none". Yields
    nothing without fsdp2 and zero."""
    use = plan.get("fsdp2") or plan.get("zero")
    if use is None:
        return
    planned_names = _planned_on_host(str(use.settings["offload"]))
    on_host = observed.saved.device in ("", HOST)
    found_names = observed.offload_policy if on_host else _on_devices(plan, observed, planned_names)
    feature = f"{use.technique}: offload"
    if use.settings.get("nvme", "none") != "none":
        yield NotChecked("zero: nvme: whether state is on local storage is not checked")
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
    if they are in ``planned_names``, else with over half. What has no bytes on this rank is returned if it is
    in ``planned_names``. If parameters are planned on the host with zero, those that ZeRO 3 keeps whole on
    every rank because they are small (`persists`) do not count."""
    keeps_small = "parameters" in planned_names and "zero" in plan
    params = (p for p in observed.parameters if not (keeps_small and persists(plan, p.whole_elements)))
    bytes_by_name = {
        "parameters": [(p.shard_bytes, p.shard_device) for p in params],
        "optimizer": [(t.size_bytes, t.device) for state in observed.states for t in state.tensors],
    }
    return frozenset(name for name, sizes in bytes_by_name.items() if _on_host(sizes, name in planned_names))


def _on_host(bytes_and_devices: Sequence[tuple[int, str]], is_planned: bool) -> bool:
    all_bytes = sum(size for size, _ in bytes_and_devices)
    host_bytes = sum(size for size, device in bytes_and_devices if device == HOST)
    return host_bytes > all_bytes * (_ALL_RATIO if is_planned else 0.5) if all_bytes else is_planned


def stages(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with a pipeline, how many blocks and which parameters this rank holds. Yields nothing without a
    pipeline.

    Blocks: at most ``virtual`` * ceil(number of blocks / number of stages), where ``virtual`` is the number
    of stages per rank; blocks that the first and last stage have fewer by choice are added to the blocks.
    Yields `NotChecked` if the size of the whole model is unknown.

    Parameters: none that get no gradient here, but on ranks of other stages. If all ranks train the same
    parameters with equal norms, this is the difference yielded instead. Yields `NotChecked` if on some rank
    no parameter got a gradient."""
    use = plan.get("pipeline")
    if use is None:
        return
    virtual, this_rank = int(use.settings["virtual"]), observed.this_rank
    held_blocks = [
        i for i, params in enumerate(observed.block_parameters) if any(p.whole_elements for p in params)
    ]
    fewer = int(use.settings["first_fewer"]) + int(use.settings["last_fewer"])
    max_blocks = virtual * math.ceil((observed.block_count + fewer) / (layout(plan).pipeline * virtual))
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
    """Check, with context-parallel or axial-parallel, whether the ranks that share samples work on different
    parts of them, by the inputs of their first blocks. It is a difference only if all of these ranks have the
    same inputs. Yields `NotChecked` if the inputs were not observed on some rank. Yields nothing if samples
    are not divided among ranks."""
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
    """Check, with expert-parallel, whether this rank holds fewer elements of parameters than the whole model
    has. Yields `NotChecked` if the size of the whole model is unknown. Yields nothing without
    expert-parallel."""
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
