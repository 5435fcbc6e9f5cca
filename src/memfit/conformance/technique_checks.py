"""Checks of techniques beyond sharding, dtypes and recomputation, mostly one function per technique.

Each compares an effect of the technique with the plan and records the result in the observation, or records
as not checked what cannot be judged, with the reason. It does nothing if the plan does not have the
technique.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from memfit.conformance.autograd_graph import gathered
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import layers, local_bytes, shape, states, whole
from memfit.model.blocks import find_head
from memfit.techniques import float8
from memfit.techniques.registry import technique
from memfit.types.errors import UserError

# Elements. bitsandbytes and torchao keep states of smaller parameters in float32. torchao also does so if a
# parameter is not a multiple of its block, and users who follow bitsandbytes' advice do so for embeddings.
_SMALL, _BLOCK = 4096, 256
# Minimum and maximum bytes of optimizer state per element of a parameter, including scales. For the
# optimizers in _MOMENTS, the number of moments of the parameter's own dtype.
_STATE_BYTES = {
    "adamw-8bit": (2.0, 3.0),
    "adamw-paged": (2.0, 3.0),
    "adamw-4bit": (1.0, 2.0),
    "adafactor": (0.0, 1.0),
}
_CODED = ("adamw-8bit", "adamw-paged", "adamw-4bit")  # their minimum counts only bytes of codes
_MOMENTS = {"sgd": (1, 1), "adamw-fused": (2, 3), "adamw-single": (2, 3)}  # AMSGrad adds a third moment
_KINDS = (*_STATE_BYTES, *_MOMENTS)
# Share of what is to be offloaded: the last layers may stay, since they are needed at once.
_STAYS_RATIO = 0.25
_LOW_RANK = 32  # rows and columns from which factored moments are clearly smaller than whole ones


def offloaded_activations(step: Observation) -> None:
    """Record whether activation-offload moves the tensors saved for backward that have at least its minimum
    size: at most a quarter of their bytes may stay (of their number, if the bytes moved are unknown).
    Recorded as not checked if the step runs in the memory to offload to, or saves no such tensors."""
    use = step.plan.get("activation-offload")
    if use is None:
        return
    graph, minimum_bytes = step.graph, int(use.settings["minimum_kib"]) * 1024
    if use.settings["to"] == "host" and graph.device == "cpu":
        step.unseen(
            "activation-offload: the step runs in host memory, so there is no other memory to offload to"
        )
        return
    # Only contiguous tensors go to a file.
    storage_sizes = graph.stuck if use.settings["to"] == "disk" else graph.here
    large_sizes = [size for size in storage_sizes if size >= minimum_bytes]
    if not graph.away + len(large_sizes):
        step.unseen(f"activation-offload: no saved tensors of {minimum_bytes // 1024} KiB or more were found")
        return
    kept_amount, moved_amount = sum(large_sizes), graph.away_bytes
    if graph.unsized:  # kept by other means than Python's hooks
        kept_amount, moved_amount = len(large_sizes), graph.away
    step.differs(
        "activation-offload",
        f"saved tensors of {minimum_bytes // 1024} KiB or more go to {use.settings['to']}",
        f"{graph.away} offloaded, {len(large_sizes)} not offloaded ({sum(large_sizes):,} bytes)",
        wrong=kept_amount > _STAYS_RATIO * (kept_amount + moved_amount),
    )


def dropped_tensors(step: Observation) -> None:
    """Record whether optimal-checkpointing replaces at least one tensor saved for backward by something from
    which backward recomputes it. Does nothing if the plan drops no tensor. Recorded as not checked if this
    version of torch does not expose saved tensors."""
    use = step.plan.get("optimal-checkpointing")
    if use is None or use.settings["dropped"] in ("", "none"):
        return
    count = step.graph.packed
    if step.graph.unread:
        step.unseen(
            "optimal-checkpointing: this version of torch does not expose the tensors saved for backward"
        )
        return
    step.differs("optimal-checkpointing", "tensors that backward recomputes", str(count), wrong=not count)


def compiled(step: Observation) -> None:
    """Record whether the modules that compile covers, each block or the whole model, run compiled: of the
    elements of a module's parameters that get gradients, over half get them from compiled graphs. Recorded as
    not checked if no parameter of these modules gets a gradient."""
    use = step.plan.get("compile")
    if use is None:
        return
    graph, shards = step.graph, {id(p): id(s) for p, s in gathered(step.model)}
    compiled_ids = {shards.get(i, i) for i in graph.compiled}
    graph_ids = compiled_ids | {shards.get(i, i) for i in graph.eager}
    blocks = [step.model] if use.settings["scope"] == "model" else step.blocks
    planned_blocks, compiled_blocks = [], []
    for index, block in enumerate(blocks):
        elements = {id(p): whole(p) for p in block.parameters()}
        if graph_elements := sum(elements[i] for i in elements.keys() & graph_ids):
            planned_blocks.append(index)
            # Graphs may break.
            compiled_blocks += [index] * (
                sum(elements[i] for i in elements.keys() & compiled_ids) > graph_elements / 2
            )
    if not planned_blocks:
        step.unseen("compile: the graph contains no parameters of the modules to be compiled")
        return
    scope_text = (
        "the whole model" if use.settings["scope"] == "model" else f"blocks {join_values(planned_blocks)}"
    )
    step.differs(
        "compile",
        f"{scope_text} compiled",
        join_values(compiled_blocks),
        wrong=compiled_blocks != planned_blocks,
    )


def chunked_loss(step: Observation) -> None:
    """Record whether no logits are kept for backward, as chunked-cross-entropy promises. Recorded as not
    checked if the model's output layer (head) is not found, if logits cannot be told from the outputs of
    other layers by their last dimension, if no backward was observed, or if the tensors saved for it cannot
    be inspected."""
    use = step.plan.get("chunked-cross-entropy")
    if use is None:
        return
    feature, graph = "chunked-cross-entropy", step.graph
    try:
        head = find_head(step.model, step.head)[1]
    except UserError:
        step.unseen(f"{feature}: no head was found")
        return
    width, rows = head.out_features, graph.rows.get(head.out_features, 0)
    # Of the rows that the head reads.
    rows_per_chunk = graph.rows.get(head.in_features, 0) / int(use.settings["chunks"])
    other_linears = (m for m in step.model.modules() if isinstance(m, nn.Linear) and m is not head)
    ambiguous = any(width in (m.in_features, m.out_features) for m in other_linears)
    # There may be as many tokens as classes.
    if ambiguous or not graph.backwards or 0 < rows < rows_per_chunk:
        step.unseen(f"{feature}: logits cannot be distinguished from the outputs of other layers")
    elif not rows and (graph.packed or graph.unread):
        step.unseen(f"{feature}: the tensors saved for backward cannot be inspected")
    else:
        step.differs(
            feature,
            f"no logits of {width} classes kept for backward",
            f"{rows} rows of logits",
            wrong=rows > 0,
        )


# -- what is trained, and how -----------------------------------------------------------------------------


def adapters(step: Observation) -> None:
    """Record, with lora or qlora, for the model's repeated blocks: whether matrices are trained, and only
    those of at most the planned rank; whether the trained matrices have as many elements as adapters of that
    rank for all frozen linear layers; and, with qlora, whether no frozen matrix is in floating point.
    Recorded as not checked if there are no blocks with matrices."""
    use = step.plan.get("lora") or step.plan.get("qlora")
    if use is None:
        return
    feature, rank = use.technique, int(use.settings["rank"])
    matrices = [p for b in step.blocks for p in b.parameters() if len(shape(p)) > 1]
    if not matrices:
        step.unseen(f"{feature}: no blocks with weights were found")
        return
    adapter_matrices = [p for p in matrices if p.requires_grad and min(shape(p)[:2]) <= rank]
    full_matrices = [p for p in matrices if p.requires_grad and min(shape(p)[:2]) > rank]
    step.differs(
        feature,
        f"in the blocks, only matrices of rank {rank} are trained",
        f"{sum(map(whole, adapter_matrices)):,} trained elements in them, "
        f"{sum(map(whole, full_matrices)):,} in other matrices",
        wrong=bool(full_matrices) or not adapter_matrices,
    )
    frozen_linears: list[Any] = [m for b in step.blocks for m in b.modules() if _frozen_linear(m)]
    expected_elements = sum(rank * (m.in_features + m.out_features) for m in frozen_linears)
    adapter_elements = sum(math.prod(shape(p)) for p in adapter_matrices if rank in shape(p)[:2])
    step.differs(
        f"{feature}: adapters",
        f"{expected_elements:,} elements of rank {rank} for {len(frozen_linears)} linear layers",
        f"{adapter_elements:,} of that rank; ranks of the matrices: "
        f"{join_values(sorted({min(shape(p)[:2]) for p in adapter_matrices}))}",
        wrong=bool(adapter_matrices) and adapter_elements < expected_elements,
    )
    if feature == "qlora":
        wide_weights = [p for p in matrices if not p.requires_grad and p.is_floating_point()]
        step.differs(
            "qlora: frozen weights",
            "in 4 bits",
            f"{sum(map(whole, wide_weights)):,} elements in floating point",
            wrong=bool(wide_weights),
        )


def eight_bits(step: Observation) -> None:
    """Record, with float8-linear, whether all linear layers of the blocks whose sizes it supports are
    torchao's Float8Linear. Recorded as not checked if there are no layers of such sizes."""
    if step.plan.get(float8.NAME) is None:
        return
    linears = [m for block in step.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    eligible_linears = [m for m in linears if float8.fits((m.in_features, m.out_features))]
    if not eligible_linears:
        step.unseen(f"{float8.NAME}: the blocks have no linear layers of supported sizes")
        return
    float8_linears = [m for m in eligible_linears if type(m).__name__ == "Float8Linear"]  # torchao's class
    step.differs(
        float8.NAME,
        f"{len(eligible_linears)} linear layers of the blocks with 8-bit products",
        f"{len(float8_linears)}",
        wrong=len(float8_linears) < len(eligible_linears),
    )


def _frozen_linear(module: Any) -> bool:
    """Return whether a module is a linear layer whose weight is not trained, whatever its number of bits, and
    has parameters or buffers on this rank. False for a module with children."""
    if not isinstance(getattr(module, "in_features", None), int) or next(module.children(), None) is not None:
        return False
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = module._parameters.get("weight")
    return (
        bool(tensors)
        and hasattr(module, "out_features")
        and not (weight is not None and weight.requires_grad)
    )


def optimizer_kind(step: Observation) -> None:
    """Record whether the optimizer is of the planned kind, by its bytes of state per element of the
    parameters. Of these, 8-bit and 4-bit optimizers must keep a minimum in tensors with elements of one byte.
    Does nothing if the plan names no optimizer. Recorded as not checked if there is no state of parameters
    that are large enough to tell."""
    use = next((u for u in step.plan.uses if u.technique in _KINDS), None)
    if use is None:
        return
    kind, elements, min_bytes, max_bytes = use.technique, 0, 0.0, 0.0
    embeddings = (m.weight for m in step.model.modules() if isinstance(m, nn.Embedding) and kind in _CODED)
    excluded_ids = set(map(id, embeddings))
    state_tensors = dict[tuple[int, ...], torch.Tensor]()  # tables of code values are shared
    for param, tensors in states(step.optimizer):
        if not isinstance(param, torch.Tensor) or id(param) in excluded_ids or not _counts(kind, param):
            continue
        if count := local_bytes(param) // param.element_size():
            elements += count
            low_bound, high_bound = _bounds(kind, param)
            min_bytes, max_bytes = min_bytes + count * low_bound, max_bytes + count * high_bound
            # A master is its own state.
            state_tensors.update((_address(t), t) for t in tensors if t is not param)
    size_bytes = sum(map(local_bytes, state_tensors.values()))
    if not elements or not size_bytes:
        step.unseen(f"{kind}: no optimizer state was found for parameters that are large enough to check")
        return
    code_bytes = sum(
        local_bytes(p) for t in state_tensors.values() for p in _parts(t) if p.element_size() == 1
    )
    counted_bytes = code_bytes if kind in _CODED else size_bytes
    planned_text = (
        f"{min_bytes / elements:g} to {max_bytes / elements:g}"
        if min_bytes < max_bytes
        else f"{max_bytes / elements:g}"
    )
    code_texts = (", in codes", f", {code_bytes / elements:.2f} in codes") if kind in _CODED else ("", "")
    step.differs(
        kind,
        f"{planned_text} bytes of state per element{code_texts[0]}",
        f"{size_bytes / elements:.2f}{code_texts[1]}",
        wrong=size_bytes > 1.01 * max_bytes or counted_bytes < 0.99 * min_bytes,
    )


def _bounds(kind: str, param: torch.Tensor) -> tuple[float, float]:
    if (bounds := _STATE_BYTES.get(kind)) is not None:
        return bounds
    low, high = _MOMENTS[kind]
    moment_bytes = 4 if kind != "sgd" else 0  # moments may be wider than a bf16 parameter
    return low * param.element_size(), high * max(param.element_size(), moment_bytes)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(local, "__tensor_flatten__"):
        yield from (getattr(local, name) for name in local.__tensor_flatten__()[0])
    else:
        yield local


def update_kernel(step: Observation) -> None:
    """Record, with adamw-fused or adamw-single, whether torch's AdamW runs the planned update, fused or one
    parameter at a time, by the flags of its parameter groups; torch obeys them or raises an error. Recorded
    as not checked if there is no torch optimizer."""
    use = step.plan.get("adamw-fused") or step.plan.get("adamw-single")
    if use is None:
        return
    inner_optimizers = [o for o in layers(step.optimizer) if hasattr(o, "param_groups")][-1:]
    inner_optimizers = list(getattr(step.optimizer, "optimizers", {}).values()) or inner_optimizers
    groups = [g for o in inner_optimizers for g in getattr(o, "param_groups", ())]
    if not groups:
        step.unseen(f"{use.technique}: no torch optimizer was found")
        return
    kernels = sorted({_kernel(g) for g in groups})
    planned_kernel = use.technique.removeprefix("adamw-")
    step.differs(
        use.technique, f"a {planned_kernel} update", join_values(kernels), wrong=kernels != [planned_kernel]
    )


def _kernel(group: dict[str, Any]) -> str:
    if group.get("fused"):
        return "fused"
    on_host = all(p.device.type == "cpu" for p in group["params"])
    foreach = group.get("foreach")
    return "foreach" if foreach or (foreach is None and not on_host) else "single"


def in_backward_updates(step: Observation) -> None:
    """Record whether optimizer-in-backward frees gradients: during backward, they never have more elements
    in all than the largest parameter. Recorded as not checked if no gradient was observed, or if one
    parameter has at least half of the trained elements."""
    if step.plan.get("optimizer-in-backward") is None:
        return
    sizes = [whole(p) for p in step.model.parameters() if p.requires_grad]
    largest = max(sizes, default=0)
    if not step.arrived or sum(sizes) <= 2 * largest:
        step.unseen("optimizer-in-backward: no gradients were seen, or one parameter is half of the model")
        return
    step.differs(
        "optimizer-in-backward",
        f"at most {largest:,} elements of gradients at a time",
        f"{step.waiting:,}",
        wrong=step.waiting > largest,
    )


def _counts(kind: str, param: torch.Tensor) -> bool:
    if kind == "adafactor":
        return param.dim() > 1 and min(param.shape[-2:]) >= _LOW_RANK
    local_count = local_bytes(param) // param.element_size()
    return kind in _MOMENTS or (local_count >= _SMALL and local_count % _BLOCK == 0)


def _address(tensor: torch.Tensor) -> tuple[int, ...]:
    if hasattr(tensor, "__tensor_flatten__"):
        return (id(tensor),)
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()._cdata, int(local.storage_offset()), local.numel()


def join_values(values: Iterable[Any]) -> str:
    """Return the values separated by commas, or "none" if there are no values."""
    return ", ".join(map(str, values)) or "none"


AT_REST: tuple[Callable[[Observation], None], ...] = (adapters, eight_bits, update_kernel)
AFTER_A_STEP: tuple[Callable[[Observation], None], ...] = (
    offloaded_activations,
    dropped_tensors,
    compiled,
    chunked_loss,
    optimizer_kind,
    in_backward_updates,
)

_BY_A_STEP = frozenset(
    {
        "activation-offload",
        "optimal-checkpointing",
        "compile",
        "chunked-cross-entropy",
        "pipeline",
        "context-parallel",
        "axial-parallel",
        "optimizer-in-backward",
        "gradient-accumulation",
        "activation-checkpointing",
        "selective-checkpointing",
        "bf16-autocast",
        "fp16-autocast",
        *_KINDS,
    }
)
_PARTLY = {
    "expert-parallel": "sharding, gradients and replicas of parameters outside the experts are not checked",
    "selective-checkpointing": "which tensors the blocks keep is not checked, only that the blocks run again",
    "adamw-paged": "whether the state is paged between the host and the device is not checked",
    "tensor-parallel": "whether activations are sharded is not checked, only parameters",
    "context-parallel": "whether the attention of every block reaches all other ranks is not checked",
    "activation-offload": "whether more than three quarters of the bytes are offloaded is not checked",
    "float8-linear": "what runs inside torchao's layers is not checked",
    "lora": "whether the adapters are updated is not checked",
    "sgd": "another optimizer with the same bytes of state is not detected",
}
# Techniques that a check, here or in `Monitor`, covers.
SEEN = _BY_A_STEP | {
    "ddp",
    "fsdp2",
    "zero",
    "sharded-ddp",
    "tensor-parallel",
    "bf16-parameters",
    "expert-parallel",
    "lora",
    "qlora",
    "adamw-fused",
    "adamw-single",
    "float8-linear",
}


def not_looked_at(step: Observation, *, stepped: bool) -> Iterator[str]:
    """Yield a text for each part of the plan that no check covers: a technique, a part of a technique, or a
    setting of ddp, fsdp2 or zero (`_NO_LOOK`) that is not the default. ``stepped``: whether a training step
    was observed; without one, the techniques that only a step shows are among them."""
    for name in (u.technique for u in step.plan.uses):
        if name not in SEEN:
            yield f"{name}: not checked"
        elif name in _BY_A_STEP and not stepped:
            yield f"{name}: no training step was observed"
        elif name in _PARTLY:
            yield f"{name}: {_PARTLY[name]}"
    yield from _other_settings(step)


# Knobs whose effect is not checked. They are reported if the plan does not use their default.
_NO_LOOK = {
    "ddp": ("bucket_mib", "bucket_view", "sync"),
    "fsdp2": ("units", "prefetch", "sync"),
    "zero": ("overlap", "live_elements", "prefetch_elements"),
}


def _other_settings(step: Observation) -> Iterator[str]:
    for use in step.plan.uses:
        defaults = {k.name: k.default for k in technique(use.technique).knobs}
        for name in _NO_LOOK.get(use.technique, ()):
            if (value := use.settings.get(name)) != defaults.get(name):
                yield f"{use.technique}: {name}={value}"
