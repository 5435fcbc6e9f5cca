"""Read what a prepared model and its optimizer are on this rank, as values of observation.py."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memfit.conformance.autograd_graph import GraphProbe, gathered_parameters
from memfit.conformance.fingerprints import as_real
from memfit.conformance.observation import ObservedLinear, ObservedParameter, ObservedState, StateTensor
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import (
    count_whole_elements,
    fsdp_groups,
    fsdp_params,
    is_freed_between_uses,
    layers,
    local_bytes,
    local_elements,
    mesh_placements,
    own_shard,
    shape,
    states,
)
from memfit.model.blocks import find_head
from memfit.techniques.optimizers import innermost
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError


def parameters(
    prepared: Prepared, graph: GraphProbe, learned_ids: Collection[int], *, measures_norms: bool
) -> Iterator[ObservedParameter]:
    """Yield the model's parameters, in its order. ``learned_ids``: ids of those that got a gradient.
    ``measures_norms``: whether to measure the norms of trained parameters and, under tensor parallelism, of
    all matrices; else norms are None."""
    shards = {id(param): id(shard) for param, shard in gathered_parameters(prepared.model)}
    compiled_ids = {shards.get(i, i) for i in graph.compiled}
    graph_ids = compiled_ids | {shards.get(i, i) for i in graph.eager}
    fp32_ids = {id(p) for m in prepared.islands for p in m.parameters(recurse=False)}
    blocks = collections.defaultdict[int, list[int]](list)
    for index, block in enumerate(prepared.blocks):
        for param in block.parameters():
            blocks[id(param)].append(index)
    for name, param in prepared.model.named_parameters():
        shard = own_shard(param)
        is_compared = param.requires_grad or (prepared.layout.tensor > 1 and param.dim() > 1)
        yield ObservedParameter(
            name=name,
            shape=shape(param),
            dtype=param.dtype,
            is_trained=param.requires_grad,
            elements=param.numel(),
            whole_elements=count_whole_elements(param),
            local_elements=local_elements(param),
            shard_bytes=local_bytes(shard),
            shard_device=shard.device.type,
            blocks=tuple(blocks[id(param)]),
            is_fp32_module=id(param) in fp32_ids,
            has_mesh=bool(mesh_placements(param)),
            is_tensor_sharded=_is_tensor_sharded(param),
            is_freed_between_uses=is_freed_between_uses(param),
            has_gradient=id(param) in learned_ids,
            in_graph=id(param) in graph_ids,
            in_compiled_graph=id(param) in compiled_ids,
            norm=_norm(param) if measures_norms and is_compared else None,
        )


def _is_tensor_sharded(param: nn.Parameter) -> bool | None:
    placements = mesh_placements(param)
    if not placements and not hasattr(param, "tensor_model_parallel"):
        return None
    by_mesh = any(p.is_shard() for p, tensor_parallel in placements if tensor_parallel)
    return by_mesh or bool(getattr(param, "tensor_model_parallel", False))  # the attribute is Megatron's


def _norm(param: nn.Parameter) -> float | None:
    local = as_real(getattr(param, "to_local", lambda: param)().detach())
    return float(torch.linalg.vector_norm(local, dtype=torch.float64)) if local.is_floating_point() else None


# -- modules ----------------------------------------------------------------------------------------------


def head(prepared: Prepared) -> nn.Linear | None:
    """Return the output layer: the one that ``prepared.head`` names, or else one found in the model. Return
    None if it is not found."""
    try:
        return find_head(prepared.model, prepared.head)[1]
    except UserError:
        return None


def linear(module: Any) -> ObservedLinear:
    """Return the sizes and the class name of a linear layer."""
    return ObservedLinear(
        in_features=module.in_features, out_features=module.out_features, class_name=type(module).__name__
    )


def linears(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """Yield those of ``modules`` that are instances of nn.Linear."""
    return (m for m in modules if isinstance(m, nn.Linear))


def is_frozen_linear(module: Any) -> bool:
    """Return whether a module is a linear layer (with ``in_features`` and ``out_features``) whose weight is
    not trained, whatever its number of bits, and has parameters or buffers on this rank. False for a module
    with children."""
    if not isinstance(getattr(module, "in_features", None), int) or next(module.children(), None) is not None:
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return (
        bool(tensors)
        and hasattr(module, "out_features")
        and not (weight is not None and weight.requires_grad)
    )


def drops_values(module: nn.Module) -> bool:
    """Return whether a module is in training and drops values at random: its attribute ``p`` is a float above
    0."""
    return bool(module.training and isinstance(p := getattr(module, "p", 0.0), float) and p > 0)


# -- FSDP2 ------------------------------------------------------------------------------------------------


def fsdp_group_blocks(prepared: Prepared) -> Iterator[dict[int, int]]:
    """Yield a mapping for each parameter group of FSDP2: index of a block -> number of the group's parameters
    in it. The key -1 is for parameters outside the blocks."""
    block_of_module = _block_of(prepared)
    for group in fsdp_groups(prepared.model):
        indices = (block_of_module.get(p._module_info.module, -1) for p in group.fsdp_params)
        yield dict(collections.Counter(indices))


def gathered_blocks(prepared: Prepared) -> tuple[int, ...]:
    """Return the indices of the blocks of which FSDP2 now has more than half of the elements that it shards
    gathered."""
    block_of_module, block_count = _block_of(prepared), len(prepared.blocks)
    gathered_elements, total_elements = [0] * block_count, [0] * block_count
    for param in fsdp_params(prepared.model):
        if (index := block_of_module.get(param._module_info.module)) is None:
            continue
        total_elements[index] += (elements := param.sharded_param.numel())
        full_param = getattr(param, "_unsharded_param", None)
        local = getattr(full_param, "_local_tensor", full_param)
        gathered_elements[index] += elements if local is not None and local.untyped_storage().nbytes() else 0
    return tuple(
        i
        for i, (block_gathered, block_total) in enumerate(zip(gathered_elements, total_elements, strict=True))
        if block_total and 2 * block_gathered > block_total
    )


def _block_of(prepared: Prepared) -> dict[nn.Module, int]:
    """Return, for each module of a block, the block itself included, the block's index. The keys are modules,
    not parameters, because the parameters that FSDP2 has gathered are other tensors than the shards."""
    return {module: i for i, block in enumerate(prepared.blocks) for module in block.modules()}


# -- the optimizer ----------------------------------------------------------------------------------------


def optimizer_states(prepared: Prepared) -> Iterator[ObservedState]:
    """Yield what the innermost wrapped optimizer that has any state keeps, one `ObservedState` for each key
    of its state (mostly a parameter). Yield nothing if none has state."""
    embedding_ids = {id(m.weight) for m in prepared.model.modules() if isinstance(m, nn.Embedding)}
    for param, tensors in states(prepared.optimizer):
        is_tensor = isinstance(param, torch.Tensor)
        yield ObservedState(
            shape=tuple(param.shape) if is_tensor else None,
            element_bytes=param.element_size() if is_tensor else 0,
            size_bytes=local_bytes(param) if is_tensor else 0,
            is_embedding=id(param) in embedding_ids,
            tensors=tuple(_state_tensor(t, param) for t in tensors),
        )


def _state_tensor(tensor: torch.Tensor, param: Any) -> StateTensor:
    return StateTensor(
        address=_address(tensor),
        elements=local_elements(tensor),
        size_bytes=local_bytes(tensor),
        code_bytes=sum(local_bytes(t) for t in _parts(tensor) if t.element_size() == 1),
        device=tensor.device.type,
        is_parameter=tensor is param,
    )


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(local, "__tensor_flatten__"):
        yield from (getattr(local, name) for name in local.__tensor_flatten__()[0])
    else:
        yield local


def _address(tensor: torch.Tensor) -> tuple[int, ...]:
    if hasattr(tensor, "__tensor_flatten__"):
        return (id(tensor),)
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()._cdata, int(local.storage_offset()), local.numel()


def update_kernels(optimizer: Any) -> frozenset[str]:
    """Return which updates torch's AdamW runs, "fused", "foreach" or "single", as the set over the parameter
    groups. It is read from their flags: torch obeys them or raises an error. Without flags, it is "foreach",
    or "single" if all parameters are on the CPU. The set is empty if no optimizer has parameter groups."""
    inner_optimizers = [o for o in layers(optimizer) if hasattr(o, "param_groups")][-1:]
    several = getattr(optimizer, "optimizers", ())
    inner_optimizers = list(several.values() if isinstance(several, Mapping) else several) or inner_optimizers
    return frozenset(_kernel(group) for o in inner_optimizers for group in getattr(o, "param_groups", ()))


def optimizer_classes(optimizer: Any) -> frozenset[str]:
    """Return the classes of the innermost optimizers, each as MODULE:CLASS. The set is empty for None."""
    kinds = () if optimizer is None else map(type, innermost(optimizer))
    return frozenset(f"{kind.__module__}:{kind.__qualname__}" for kind in kinds)


def _kernel(group: dict[str, Any]) -> str:
    if group.get("fused"):
        return "fused"
    on_host = all(p.device.type == HOST for p in group["params"])
    foreach = group.get("foreach")
    return "foreach" if foreach or (foreach is None and not on_host) else "single"


def offload_policy(prepared: Prepared) -> frozenset[str] | None:
    """Return which of "parameters" and "optimizer" (its state) the settings of FSDP2 or of the ZeRO optimizer
    move to the host. With FSDP2, it is both or, unless all parameter groups offload, none. Return None if the
    model has no parameter groups of FSDP2 and no ZeRO optimizer."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    if policies := [isinstance(g.offload_policy, CPUOffloadPolicy) for g in fsdp_groups(prepared.model)]:
        return frozenset({"optimizer", "parameters"}) if all(policies) else frozenset()
    for layer in layers(prepared.optimizer):
        if hasattr(layer, "state_on"):  # memfit's ZeRO
            parameters = getattr(getattr(layer, "shards", None), "offload", False)
            return _enabled(optimizer=layer.state_on == "host", parameters=parameters)
        if hasattr(layer, "cpu_offload") or hasattr(layer, "offload_optimizer"):  # DeepSpeed's ZeRO
            flags = [getattr(layer, name, False) for name in ("cpu_offload", "offload_optimizer")]
            return _enabled(optimizer=any(flags), parameters=getattr(layer, "offload_param", False))
    return None


def _enabled(**flags: bool) -> frozenset[str]:
    return frozenset(name for name, enabled in flags.items() if enabled)
