"""Checks of techniques beyond sharding, dtypes and recomputation, mostly one function per technique.

Each compares an effect of the technique with the plan, or yields as not checked what cannot be judged, with
the reason. It does nothing if the plan does not have the technique.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from memfit.conformance.findings import Checked, CheckFinding, NotChecked, join_values
from memfit.conformance.observation import Observations, ObservedState
from memfit.techniques import float8
from memfit.techniques.imported_optimizer import optimizer_class
from memfit.types.device_kind import HOST
from memfit.types.plan import Plan

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
OPTIMIZERS = (*_STATE_BYTES, *_MOMENTS)  # that `optimizer_kind` can tell
# Share of what is to be offloaded: the last layers may stay, since they are needed at once.
_STAYS_RATIO = 0.25
_LOW_RANK = 32  # rows and columns from which factored moments are clearly smaller than whole ones


def offloaded_activations(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether activation-offload moves the tensors saved for backward that have at least its minimum
    size: at most a quarter of their bytes may stay, or of their number if the bytes moved are unknown. With
    offload to disk, only contiguous tensors count as staying.

    Yields `NotChecked` if tensors should move to the host and the step runs there, or if it saves no tensors
    of this size. Yields nothing without activation-offload."""
    use = plan.get("activation-offload")
    if use is None:
        return
    saved, minimum_bytes = observed.saved, int(use.settings["minimum_kib"]) * 1024
    if use.settings["to"] == "host" and saved.device == HOST:
        yield NotChecked(
            "activation-offload: the step runs in host memory, so there is no other memory to offload to"
        )
        return
    # Only contiguous tensors go to a file.
    storage_sizes = saved.contiguous_bytes if use.settings["to"] == "disk" else saved.resident_bytes
    large_sizes = [size for size in storage_sizes if size >= minimum_bytes]
    if not saved.offloaded + len(large_sizes):
        yield NotChecked(
            f"activation-offload: no saved tensors of {minimum_bytes // 1024} KiB or more were found"
        )
        return
    kept_amount, moved_amount = sum(large_sizes), saved.offloaded_bytes
    if saved.unsized:  # kept by other means than Python's hooks
        kept_amount, moved_amount = len(large_sizes), saved.offloaded
    yield Checked(
        "activation-offload",
        f"saved tensors of {minimum_bytes // 1024} KiB or more go to {use.settings['to']}",
        f"{saved.offloaded} offloaded, {len(large_sizes)} not offloaded ({sum(large_sizes):,} bytes)",
        wrong=kept_amount > _STAYS_RATIO * (kept_amount + moved_amount),
    )


def dropped_tensors(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether optimal-checkpointing replaces at least one tensor saved for backward by something else,
    from which backward recomputes it. Yields `NotChecked` if this version of torch does not expose saved
    tensors. Yields nothing without optimal-checkpointing, or if it drops no tensor."""
    use = plan.get("optimal-checkpointing")
    if use is None or use.settings["dropped"] in ("", "none"):
        return
    count = observed.saved.packed
    if observed.saved.unread:
        yield NotChecked(
            "optimal-checkpointing: this version of torch does not expose the tensors saved for backward"
        )
        return
    yield Checked("optimal-checkpointing", "tensors that backward recomputes", str(count), wrong=not count)


def compilation(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the modules that compile covers, each block or the whole model, run compiled: of the
    elements of a module's parameters that get gradients, over half get them from compiled graphs. A module
    without such parameters is left out. Yields `NotChecked` if no module has any. Yields nothing without
    compile."""
    use = plan.get("compile")
    if use is None:
        return
    is_whole = use.settings["scope"] == "model"
    planned_blocks, compiled_blocks = [], []
    for index, params in enumerate([observed.parameters] if is_whole else observed.block_parameters):
        if graph_elements := sum(p.whole_elements for p in params if p.in_graph):
            planned_blocks.append(index)
            # Graphs may break.
            if sum(p.whole_elements for p in params if p.in_compiled_graph) > graph_elements / 2:
                compiled_blocks.append(index)
    if not planned_blocks:
        yield NotChecked("compile: the graph contains no parameters of the modules to be compiled")
        return
    scope_text = "the whole model" if is_whole else f"blocks {join_values(planned_blocks)}"
    yield Checked(
        "compile",
        f"{scope_text} compiled",
        join_values(compiled_blocks),
        wrong=compiled_blocks != planned_blocks,
    )


def chunked_loss(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether no logits are kept for backward, as chunked-cross-entropy promises. Logits are recognised
    by their last dimension, the number of classes.

    Yields `NotChecked` if the model's output layer (head) is not found, if another linear layer has this
    size, if no backward was observed, if the tensors of this size have too few rows to be a chunk's logits,
    or if saved tensors cannot be inspected. Yields nothing without chunked-cross-entropy."""
    use = plan.get("chunked-cross-entropy")
    if use is None:
        return
    feature, saved, head = "chunked-cross-entropy", observed.saved, observed.head
    if head is None:
        yield NotChecked(f"{feature}: no head was found")
        return
    width, rows = head.out_features, saved.rows.get(head.out_features, 0)
    # Of the rows that the head reads.
    rows_per_chunk = saved.rows.get(head.in_features, 0) / int(use.settings["chunks"])
    ambiguous = any(width in (m.in_features, m.out_features) for m in observed.other_linears)
    # There may be as many tokens as classes.
    if ambiguous or not saved.backwards or 0 < rows < rows_per_chunk:
        yield NotChecked(f"{feature}: logits cannot be distinguished from the outputs of other layers")
    elif not rows and (saved.packed or saved.unread):
        yield NotChecked(f"{feature}: the tensors saved for backward cannot be inspected")
    else:
        yield Checked(
            feature,
            f"no logits of {width} classes kept for backward",
            f"{rows} rows of logits",
            wrong=rows > 0,
        )


# -- what is trained, and how -----------------------------------------------------------------------------


def adapters(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with lora or qlora, the matrices (parameters with at least two dimensions) of the model's
    repeated blocks:

    - Some are trained, and only those whose smaller size is at most the planned rank.
    - Trained ones of exactly this rank have at least as many elements as adapters for all frozen linear
      layers (not judged if none are trained).
    - With qlora, no frozen one is in floating point.

    Yields `NotChecked` if the blocks have no matrices. Yields nothing without lora and qlora.
    """
    use = plan.get("lora") or plan.get("qlora")
    if use is None:
        return
    feature, rank = use.technique, int(use.settings["rank"])
    matrices = [p for params in observed.block_parameters for p in params if len(p.shape) > 1]
    if not matrices:
        yield NotChecked(f"{feature}: no blocks with weights were found")
        return
    adapter_matrices = [p for p in matrices if p.is_trained and min(p.shape[:2]) <= rank]
    full_matrices = [p for p in matrices if p.is_trained and min(p.shape[:2]) > rank]
    yield Checked(
        feature,
        f"in the blocks, only matrices of rank {rank} are trained",
        f"{sum(p.whole_elements for p in adapter_matrices):,} trained elements in them, "
        f"{sum(p.whole_elements for p in full_matrices):,} in other matrices",
        wrong=bool(full_matrices) or not adapter_matrices,
    )
    frozen_linears = observed.frozen_linears
    expected_elements = sum(rank * (m.in_features + m.out_features) for m in frozen_linears)
    adapter_elements = sum(math.prod(p.shape) for p in adapter_matrices if rank in p.shape[:2])
    yield Checked(
        f"{feature}: adapters",
        f"{expected_elements:,} elements of rank {rank} for {len(frozen_linears)} linear layers",
        f"{adapter_elements:,} of that rank; ranks of the matrices: "
        f"{join_values(sorted({min(p.shape[:2]) for p in adapter_matrices}))}",
        wrong=bool(adapter_matrices) and adapter_elements < expected_elements,
    )
    if feature == "qlora":
        wide_weights = [p for p in matrices if not p.is_trained and p.dtype.is_floating_point]
        yield Checked(
            "qlora: frozen weights",
            "in 4 bits",
            f"{sum(p.whole_elements for p in wide_weights):,} elements in floating point",
            wrong=bool(wide_weights),
        )


def float8_layers(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with float8-linear, whether all linear layers of the blocks whose sizes it supports are
    torchao's Float8Linear. Yields `NotChecked` if there are no layers of such sizes. Yields nothing without
    float8-linear."""
    if float8.NAME not in plan:
        return
    eligible_linears = [m for m in observed.block_linears if float8.fits((m.in_features, m.out_features))]
    if not eligible_linears:
        yield NotChecked(f"{float8.NAME}: the blocks have no linear layers of supported sizes")
        return
    float8_linears = [m for m in eligible_linears if m.class_name == "Float8Linear"]  # torchao's class
    yield Checked(
        float8.NAME,
        f"{len(eligible_linears)} linear layers of the blocks with 8-bit products",
        f"{len(float8_linears)}",
        wrong=len(float8_linears) < len(eligible_linears),
    )


def optimizer_kind(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the optimizer is of the planned kind, by its bytes of state per element of the
    parameters, within 1 %. For 8-bit and 4-bit optimizers, the minimum must be reached by state with elements
    of one byte alone.

    Yields `NotChecked` if there is no state of parameters that are large enough to tell. Yields nothing if
    the plan names no optimizer that can be told this way (`OPTIMIZERS`)."""
    use = next((u for u in plan.uses if u.technique in OPTIMIZERS), None)
    if use is None:
        return
    kind, elements, min_bytes, max_bytes = use.technique, 0, 0.0, 0.0
    counted_states = [s for s in observed.states if _counts(kind, s)]
    for state in counted_states:
        count = state.size_bytes // state.element_bytes
        low_bound, high_bound = _bounds(kind, state)
        elements += count
        min_bytes, max_bytes = min_bytes + count * low_bound, max_bytes + count * high_bound
    # Tables of code values are shared; a master is its own state.
    tensors = {t.address: t for s in counted_states for t in s.tensors if not t.is_parameter}
    size_bytes = sum(t.size_bytes for t in tensors.values())
    if not elements or not size_bytes:
        yield NotChecked(
            f"{kind}: no optimizer state was found for parameters that are large enough to check"
        )
        return
    code_bytes = sum(t.code_bytes for t in tensors.values())
    counted_bytes = code_bytes if kind in _CODED else size_bytes
    planned_text = (
        f"{min_bytes / elements:g} to {max_bytes / elements:g}"
        if min_bytes < max_bytes
        else f"{max_bytes / elements:g}"
    )
    code_texts = (", in codes", f", {code_bytes / elements:.2f} in codes") if kind in _CODED else ("", "")
    yield Checked(
        kind,
        f"{planned_text} bytes of state per element{code_texts[0]}",
        f"{size_bytes / elements:.2f}{code_texts[1]}",
        wrong=size_bytes > 1.01 * max_bytes or counted_bytes < 0.99 * min_bytes,
    )


def _counts(kind: str, state: ObservedState) -> bool:
    """Return whether the parameter of ``state`` is large enough on this rank for its bytes of state to tell
    whether the optimizer is of ``kind``. Embeddings do not count for 8-bit and 4-bit optimizers."""
    if state.shape is None or not state.size_bytes or (kind in _CODED and state.is_embedding):
        return False
    if kind == "adafactor":
        return len(state.shape) > 1 and min(state.shape[-2:]) >= _LOW_RANK
    local_count = state.size_bytes // state.element_bytes
    return kind in _MOMENTS or (local_count >= _SMALL and local_count % _BLOCK == 0)


def _bounds(kind: str, state: ObservedState) -> tuple[float, float]:
    if (bounds := _STATE_BYTES.get(kind)) is not None:
        return bounds
    low, high = _MOMENTS[kind]
    moment_bytes = 4 if kind != "sgd" else 0  # moments may be wider than a bf16 parameter
    return low * state.element_bytes, high * max(state.element_bytes, moment_bytes)


def update_kernel(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, with adamw-fused or adamw-single, whether torch's AdamW runs the planned update for all
    parameter groups, fused or one parameter at a time. Yields `NotChecked` if there is no torch optimizer.
    Yields nothing without these techniques."""
    use = plan.get("adamw-fused") or plan.get("adamw-single")
    if use is None:
        return
    if not observed.update_kernels:
        yield NotChecked(f"{use.technique}: no torch optimizer was found")
        return
    kernels = sorted(observed.update_kernels)
    planned_kernel = use.technique.removeprefix("adamw-")
    yield Checked(
        use.technique, f"a {planned_kernel} update", join_values(kernels), wrong=kernels != [planned_kernel]
    )


def imported_class(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the class at the path of the technique optimizer is among those of the optimizers that
    run. Yields nothing without this technique. Raises UserError if there is no such class."""
    use = plan.get("optimizer")
    if use is None:
        return
    kind = optimizer_class(str(use.settings["path"]))
    planned, classes = f"{kind.__module__}:{kind.__qualname__}", observed.optimizer_classes
    yield Checked("optimizer", planned, join_values(sorted(classes)), wrong=planned not in classes)


def in_backward_updates(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether optimizer-in-backward frees gradients: at no time during backward do all gradients
    together have more elements than the largest parameter. Yields `NotChecked` if no gradient was observed,
    or if one parameter has at least half of the trained elements. Yields nothing without
    optimizer-in-backward."""
    if "optimizer-in-backward" not in plan:
        return
    sizes = [p.whole_elements for p in observed.trained]
    largest = max(sizes, default=0)
    if not observed.arrived_gradients or sum(sizes) <= 2 * largest:
        yield NotChecked(
            "optimizer-in-backward: no gradients were seen, or one parameter is half of the model"
        )
        return
    yield Checked(
        "optimizer-in-backward",
        f"at most {largest:,} elements of gradients at a time",
        f"{observed.backward_gradient_elements:,}",
        wrong=observed.backward_gradient_elements > largest,
    )
