"""Checks of parallel plans beyond sharded elements, mostly one function per technique.

Whether a gather is made depends only on the plan, so that all ranks make the same gathers.
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
from memfit.conformance.technique_checks import told

_ALL_RATIO = 0.9  # fraction of bytes
_ONCE_RATIO = 0.75  # fraction of elements: shards are padded, and never smaller in total
_REPLICAS_RATIO = 1e-7  # averaged gradients are bitwise equal on every rank
_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")


def shards(step: Observation) -> None:
    """Check that all ranks together hold the model once per replica."""
    degree, feature = step.sharded("parameters")
    if degree == 1 or step.plan.get("expert-parallel") is not None:
        return
    params = list(step.model.parameters())
    every: list[tuple[int, int]] = from_all((sum(map(local_elements, params)), step.part(params)))
    held, part = (sum(of_rank) for of_rank in zip(*every, strict=True))
    if held:
        step.differs(
            f"{feature}: replicas",
            f"{part // degree:,} elements on all ranks together",
            f"{held:,}",
            wrong=held < _ONCE_RATIO * part / degree,
        )


def units(step: Observation) -> None:
    """Check that FSDP2 gathers block by block."""
    if step.plan.get("fsdp2") is None or len(step.blocks) < 2:
        return
    at = _block_of(step)
    whole = collections.Counter(at.get(p._module_info.module, -1) for p in fsdp_params(step.model))
    inside = []
    for group in fsdp_groups(step.model):
        here = collections.Counter(at.get(p._module_info.module, -1) for p in group.fsdp_params)
        inside.append({block for block, count in here.items() if 2 * count > whole[block]})
    if not any(inside):
        step.unseen("fsdp2: units: no groups of parameters could be found")
        return
    most = max((blocks - {-1} for blocks in inside), key=len)
    step.differs(
        "fsdp2: units",
        "each block is gathered apart",
        f"blocks {told(sorted(most))} together",
        wrong=len(most) > 1,
    )


def resharded(step: Observation) -> None:
    """Check that what FSDP2 has gathered is freed after a block's forward, or kept, as planned. The last
    block may stay gathered, because backward needs it first."""
    used = step.plan.get("fsdp2")
    if used is None or step.layout.pipeline > 1 or step.layout.shard * step.layout.context == 1:
        return
    kept = step.still_gathered
    if kept is None or len(step.blocks) < 2 or not any(True for _ in fsdp_groups(step.model)):
        step.unseen("fsdp2: reshard: nothing could be seen of it")
        return
    frees, others = used.settings["reshard"] is not False, len(step.blocks) - 1
    here = len(set(kept) - {others})
    step.differs(
        "fsdp2: reshard",
        f"gathered blocks {'freed after' if frees else 'kept from'} forward",
        f"{here} of {others} still gathered where backward begins",
        wrong=(2 * here > others) == frees,
    )


def _block_of(step: Observation) -> dict[nn.Module, int]:
    """Return the block index of each module. Modules are used because gathered parameters are not the
    shards."""
    return {module: i for i, block in enumerate(step.blocks) for module in block.modules()}


def still_gathered(step: Observation) -> list[int]:
    """Return the indices of blocks most of whose elements are gathered, with fsdp2."""
    at = _block_of(step)
    here, total = [0] * len(step.blocks), [0] * len(step.blocks)
    for param in fsdp_params(step.model):
        if (index := at.get(param._module_info.module)) is None:
            continue
        total[index] += (elements := param.sharded_param.numel())
        whole = getattr(param, "_unsharded_param", None)
        local = getattr(whole, "_local_tensor", whole)
        here[index] += elements if local is not None and local.untyped_storage().nbytes() else 0
    return [i for i, (now, of) in enumerate(zip(here, total, strict=True)) if of and 2 * now > of]


def replicas(step: Observation) -> None:
    """Check that whole parameters are equal on every rank after a step. If not, gradients were not
    averaged."""
    alike = step.layout.data * step.layout.context
    if alike == 1 or step.layout.ranks != alike or step.sharded("parameters")[0] > 1:
        return
    if step.plan.get("expert-parallel") is not None:
        return
    own = norms(step.trainable())
    apart = max(
        abs(a - b) / max(abs(a), abs(b), 1e-300)
        for of_rank in from_all(own)
        for a, b in zip(own, of_rank, strict=True)
    )
    feature = next((u.technique for u in step.plan.uses if u.technique in _AVERAGING), "replicas")
    step.differs(
        f"{feature}: replicas",
        "equal parameters on every rank after a step",
        f"parameter norms up to {apart:.1e} apart: gradients are not averaged",
        wrong=apart > _REPLICAS_RATIO,
    )


def norms(params: Iterable[nn.Parameter]) -> list[float]:
    """Return the norms of this rank's parts of the parameters."""
    local = (real(getattr(p, "to_local", lambda p=p: p)().detach()) for p in params)
    norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in local]
    return torch.stack(norms).tolist() if norms else []


def near(a: list[float], b: list[float]) -> bool:
    """Return whether two lists of norms are equal within `_REPLICAS_RATIO`."""
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=_REPLICAS_RATIO) for x, y in zip(a, b, strict=True)
    )


def offloaded_states(step: Observation) -> None:
    """Check the offload of parameters and optimizer state. If layers compute on an accelerator, the devices
    of tensors are checked, else the object that would move them."""
    used = step.plan.get("fsdp2") or step.plan.get("zero")
    if used is None:
        return
    planned = _planned_on_host(str(used.settings["offload"]))
    found = _by_policy(step) if step.graph.device in ("", "cpu") else _on_devices(step, planned)
    feature = f"{used.technique}: offload"
    if found is None:
        if planned:
            step.unseen(f"{feature}: no object that moves tensors to the host was found")
        return
    step.differs(feature, f"{told(planned)} in host memory", told(sorted(found)), wrong=set(planned) != found)


def _planned_on_host(offload: str) -> list[str]:
    return {
        "True": ["optimizer", "parameters"],
        "parameters": ["optimizer", "parameters"],
        "optimizer": ["optimizer"],
    }.get(offload, [])


def _on_devices(step: Observation, planned: Sequence[str]) -> set[str]:
    """Return what has its bytes on the host: nearly all of its bytes if that is the plan, else most of them.
    ZeRO leaves small parameters in place."""
    stay = "parameters" in planned and step.plan.get("zero") is not None
    moved = (p for p in step.model.parameters() if not (stay and step.persists(p)))
    state = (t for _, tensors in states(step.optimizer) for t in tensors)
    found = {"parameters": [own_shard(p) for p in moved], "optimizer": list(state)}
    return {name for name, tensors in found.items() if _on_host(tensors, name in planned)}


def _on_host(tensors: list[torch.Tensor], planned: bool) -> bool:
    all_bytes = sum(map(local_bytes, tensors))
    host_bytes = sum(local_bytes(t) for t in tensors if t.device.type == "cpu")
    return host_bytes > all_bytes * (_ALL_RATIO if planned else 0.5) if all_bytes else planned


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


def _named(**said: bool) -> set[str]:
    return {name for name, so in said.items() if so}


@dataclasses.dataclass(frozen=True, slots=True)
class _Stage:
    """What one rank holds of a pipeline. ``held`` maps the names of trained parameters to their elements,
    ``learned`` holds the names of those that got a gradient, and ``norms`` the norms of the trained
    parameters."""

    place: int
    held: dict[str, int]
    learned: set[str]
    norms: list[float]


def stages(step: Observation) -> None:
    """Check that each rank holds its own stages and nothing else."""
    used = step.plan.get("pipeline")
    if used is None:
        return
    virtual = int(used.settings["virtual"])
    held = [i for i, b in enumerate(step.blocks) if any(map(whole, b.parameters()))]
    most = virtual * math.ceil(len(step.blocks) / (step.layout.pipeline * virtual))
    if step.whole_elements:
        step.differs(
            "pipeline: blocks",
            f"at most {most} of {len(step.blocks)} on a rank",
            f"{len(held)} ({told(held)})",
            wrong=len(held) > most,
        )
    else:
        step.unseen("pipeline: how many blocks a rank holds: the whole model is not known")
    named = {n: p for n, p in step.model.named_parameters() if p.requires_grad}
    learned = {n for n, p in named.items() if id(p) in step.learned}
    own = _Stage(
        step.layout.coordinate(dist.get_rank())["pipeline"],
        {n: whole(p) for n, p in named.items()},
        learned,
        norms(named.values()),
    )
    everyone: list[_Stage] = from_all(own)
    elsewhere = set[str]().union(*(s.learned for s in everyone if s.place != own.place))
    if not all(s.learned for s in everyone):
        step.unseen("pipeline: parameters: no gradients were seen")
        return
    if all(s.learned == own.learned and near(s.norms, own.norms) for s in everyone):
        step.differs(
            "pipeline: stages",
            "parameters that no other stage trains",
            "every rank trains the same ones",
            wrong=True,
        )
        return
    idle = sorted((elsewhere - own.learned) & own.held.keys())
    step.differs(
        "pipeline: parameters",
        "only those that this rank's stages use",
        f"{sum(own.held[n] for n in idle):,} elements that other stages train ({told(idle[:3])})",
        wrong=bool(idle),
    )


def shared_samples(step: Observation) -> None:
    """Check that ranks that share a sample work on different parts of it."""
    used = step.plan.get("context-parallel") or step.plan.get("axial-parallel")
    if used is None or step.layout.context == 1:
        return
    feature = f"{used.technique}: parts of a sample"
    group = step.beside("context")
    every: list[tuple[Any, list[float]]] = from_all((group, step.entered))
    partners = [entered for other, entered in every if other == group]
    if not all(entered for _, entered in every):  # the same on every rank
        step.unseen(f"{feature}: nothing that blocks are given could be compared")
        return
    step.differs(
        feature,
        f"another one on each of {step.layout.context} ranks",
        "the same",
        wrong=all(p == partners[0] for p in partners),
    )


def entering(args: Iterable[Any]) -> Iterator[float]:
    """Yield figures that are equal if two ranks receive the same tensors. Constant tensors are skipped."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            local = getattr(value, "_local_tensor", value).detach()
            if local.numel() and local.min() != local.max():
                yield from (float(local.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(local)))


def experts(step: Observation) -> None:
    """Check that a rank holds only its part of the experts."""
    used = step.plan.get("expert-parallel")
    if used is None:
        return
    held = sum(map(whole, step.model.parameters()))
    if not step.whole_elements:
        step.unseen("expert-parallel: how many experts a rank holds: the whole model is not known")
        return
    total = step.whole_elements
    step.differs(
        "expert-parallel",
        f"experts dealt to {used.settings['degree']} ranks",
        f"{held:,} of {total:,} elements on a rank",
        wrong=held >= total,
    )


AT_REST: tuple[Callable[[Observation], None], ...] = (shards, units, experts)
AFTER_A_STEP: tuple[Callable[[Observation], None], ...] = (
    replicas,
    offloaded_states,
    stages,
    shared_samples,
    resharded,
)
