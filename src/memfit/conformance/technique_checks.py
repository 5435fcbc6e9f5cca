"""Checks of techniques beyond sharding, dtypes and recomputation, mostly one function per technique.

Each compares an effect of the technique with the plan, or records that there is nothing to see.
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
    """Check that saved tensors are offloaded."""
    used = step.plan.get("activation-offload")
    if used is None:
        return
    graph, least = step.graph, int(used.settings["minimum_kib"]) * 1024
    if used.settings["to"] == "host" and graph.device == "cpu":
        step.unseen("activation-offload: the step runs in host memory, there is nowhere to go")
        return
    # Only contiguous tensors go to a file.
    kept = graph.stuck if used.settings["to"] == "disk" else graph.here
    here = [size for size in kept if size >= least]
    if not graph.away + len(here):
        step.unseen(f"activation-offload: no saved tensors of {least // 1024} KiB or more were found")
        return
    stayed, went = sum(here), graph.away_bytes
    if graph.unsized:  # kept by other means than Python's hooks
        stayed, went = len(here), graph.away
    step.differs(
        "activation-offload",
        f"saved tensors of {least // 1024} KiB or more go to {used.settings['to']}",
        f"{graph.away} went, {len(here)} stayed ({sum(here):,} bytes)",
        wrong=stayed > _STAYS_RATIO * (stayed + went),
    )


def dropped_tensors(step: Observation) -> None:
    """Check that tensors are dropped and recomputed in backward."""
    used = step.plan.get("optimal-checkpointing")
    if used is None or used.settings["dropped"] in ("", "none"):
        return
    count = step.graph.packed
    if step.graph.unread:
        step.unseen("optimal-checkpointing: this torch does not show what is saved for backward")
        return
    step.differs("optimal-checkpointing", "tensors that backward makes again", str(count), wrong=not count)


def compiled(step: Observation) -> None:
    """Check that blocks or the model run compiled."""
    used = step.plan.get("compile")
    if used is None:
        return
    graph, shards = step.graph, {id(p): id(s) for p, s in gathered(step.model)}
    fused = {shards.get(i, i) for i in graph.compiled}
    graphed = fused | {shards.get(i, i) for i in graph.eager}
    blocks = [step.model] if used.settings["scope"] == "model" else step.blocks
    wanted, found = [], []
    for index, block in enumerate(blocks):
        own = {id(p): whole(p) for p in block.parameters()}
        if reached := sum(own[i] for i in own.keys() & graphed):
            wanted.append(index)
            found += [index] * (sum(own[i] for i in own.keys() & fused) > reached / 2)  # graphs may break
    if not wanted:
        step.unseen("compile: no parameters of what is to be compiled were found in the graph")
        return
    what = "the whole model" if used.settings["scope"] == "model" else f"blocks {told(wanted)}"
    step.differs("compile", f"{what} run compiled", told(found), wrong=found != wanted)


def chunked_loss(step: Observation) -> None:
    """Check that no logits are kept for backward."""
    used = step.plan.get("chunked-cross-entropy")
    if used is None:
        return
    feature, graph = "chunked-cross-entropy", step.graph
    try:
        head = find_head(step.model, step.head)[1]
    except UserError:
        step.unseen(f"{feature}: no head was found")
        return
    width, rows = head.out_features, graph.rows.get(head.out_features, 0)
    # Of the rows that the head reads.
    part = graph.rows.get(head.in_features, 0) / int(used.settings["chunks"])
    others = (m for m in step.model.modules() if isinstance(m, nn.Linear) and m is not head)
    alike = any(width in (m.in_features, m.out_features) for m in others)
    if alike or not graph.backwards or 0 < rows < part:  # there may be as many tokens as classes
        step.unseen(f"{feature}: logits cannot be told from what other layers make")
    elif not rows and (graph.packed or graph.unread):
        step.unseen(f"{feature}: what is saved for backward is somewhere else")
    else:
        step.differs(
            feature, f"no logits of {width} classes kept for backward", f"{rows} rows of them", wrong=rows > 0
        )


# -- what is trained, and how -----------------------------------------------------------------------------


def adapters(step: Observation) -> None:
    """Check that only adapters of the planned rank are trained in the blocks."""
    used = step.plan.get("lora") or step.plan.get("qlora")
    if used is None:
        return
    feature, rank = used.technique, int(used.settings["rank"])
    matrices = [p for b in step.blocks for p in b.parameters() if len(shape(p)) > 1]
    if not matrices:
        step.unseen(f"{feature}: no blocks with weights were found")
        return
    low = [p for p in matrices if p.requires_grad and min(shape(p)[:2]) <= rank]
    learning = [p for p in matrices if p.requires_grad and min(shape(p)[:2]) > rank]
    step.differs(
        feature,
        f"of the blocks' weights only matrices of rank {rank} learn",
        f"{sum(map(whole, low)):,} elements of such, {sum(map(whole, learning)):,} of others",
        wrong=bool(learning) or not low,
    )
    beside: list[Any] = [m for b in step.blocks for m in b.modules() if _frozen_linear(m)]
    least = sum(rank * (m.in_features + m.out_features) for m in beside)
    found = sum(math.prod(shape(p)) for p in low if rank in shape(p)[:2])
    step.differs(
        f"{feature}: adapters",
        f"{least:,} elements of rank {rank} beside {len(beside)} linear layers",
        f"{found:,} of that rank, matrices of rank {told(sorted({min(shape(p)[:2]) for p in low}))}",
        wrong=bool(low) and found < least,
    )
    if feature == "qlora":
        wide = [p for p in matrices if not p.requires_grad and p.is_floating_point()]
        step.differs(
            "qlora: frozen weights",
            "in 4 bits",
            f"{sum(map(whole, wide)):,} elements that are not",
            wrong=bool(wide),
        )


def eight_bits(step: Observation) -> None:
    """Check that linear layers of the blocks use 8-bit products."""
    if step.plan.get(float8.NAME) is None:
        return
    linears = [m for block in step.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    wanted = [m for m in linears if float8.fits((m.in_features, m.out_features))]
    if not wanted:
        step.unseen(f"{float8.NAME}: no linear layers of such sizes were found in blocks")
        return
    found = [m for m in wanted if type(m).__name__ == "Float8Linear"]  # torchao's class
    step.differs(
        float8.NAME,
        f"{len(wanted)} linear layers of the blocks with products in 8 bits",
        f"{len(found)}",
        wrong=len(found) < len(wanted),
    )


def _frozen_linear(module: Any) -> bool:
    """Return whether a module is a frozen linear layer that this rank holds, in any number of bits."""
    if not isinstance(getattr(module, "in_features", None), int) or next(module.children(), None) is not None:
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    weight = module._parameters.get("weight")
    return bool(own) and hasattr(module, "out_features") and not (weight is not None and weight.requires_grad)


def optimizer_kind(step: Observation) -> None:
    """Check the kind of optimizer by the bytes of state per element of the parameters, and by the width of
    its numbers."""
    used = next((u for u in step.plan.uses if u.technique in _KINDS), None)
    if used is None:
        return
    kind, elements, least, most = used.technique, 0, 0.0, 0.0
    embeddings = (m.weight for m in step.model.modules() if isinstance(m, nn.Embedding) and kind in _CODED)
    apart = set(map(id, embeddings))
    kept = dict[tuple[int, ...], torch.Tensor]()  # tables of code values are shared
    for param, tensors in states(step.optimizer):
        if not isinstance(param, torch.Tensor) or id(param) in apart or not _counts(kind, param):
            continue
        if count := local_bytes(param) // param.element_size():
            elements += count
            low, high = _bounds(kind, param)
            least, most = least + count * low, most + count * high
            kept.update((_address(t), t) for t in tensors if t is not param)  # a master is its own state
    size_bytes = sum(map(local_bytes, kept.values()))
    if not elements or not size_bytes:
        step.unseen(f"{kind}: no state of parameters large enough to tell was found")
        return
    code_bytes = sum(local_bytes(p) for t in kept.values() for p in _parts(t) if p.element_size() == 1)
    enough = code_bytes if kind in _CODED else size_bytes
    planned = f"{least / elements:g} to {most / elements:g}" if least < most else f"{most / elements:g}"
    codes = (", in codes", f", {code_bytes / elements:.2f} in codes") if kind in _CODED else ("", "")
    step.differs(
        kind,
        f"{planned} bytes of state an element{codes[0]}",
        f"{size_bytes / elements:.2f}{codes[1]}",
        wrong=size_bytes > 1.01 * most or enough < 0.99 * least,
    )


def _bounds(kind: str, param: torch.Tensor) -> tuple[float, float]:
    if (bounds := _STATE_BYTES.get(kind)) is not None:
        return bounds
    low, high = _MOMENTS[kind]
    wide = 4 if kind != "sgd" else 0  # moments may be wider than a bf16 parameter
    return low * param.element_size(), high * max(param.element_size(), wide)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(local, "__tensor_flatten__"):
        yield from (getattr(local, name) for name in local.__tensor_flatten__()[0])
    else:
        yield local


def update_kernel(step: Observation) -> None:
    """Check which update torch's optimizer runs. It does what its groups say, or raises."""
    used = step.plan.get("adamw-fused") or step.plan.get("adamw-single")
    if used is None:
        return
    inner = [o for o in layers(step.optimizer) if hasattr(o, "param_groups")][-1:]
    inner = list(getattr(step.optimizer, "optimizers", {}).values()) or inner
    groups = [g for o in inner for g in getattr(o, "param_groups", ())]
    if not groups:
        step.unseen(f"{used.technique}: no optimizer of torch's own was found")
        return
    found = sorted({_kernel(g) for g in groups})
    wanted = used.technique.removeprefix("adamw-")
    step.differs(used.technique, f"a {wanted} update", told(found), wrong=found != [wanted])


def _kernel(group: dict[str, Any]) -> str:
    if group.get("fused"):
        return "fused"
    on_host = all(p.device.type == "cpu" for p in group["params"])
    foreach = group.get("foreach")
    return "foreach" if foreach or (foreach is None and not on_host) else "single"


def in_backward_updates(step: Observation) -> None:
    """Check that only a few gradients exist at a time in backward."""
    if step.plan.get("optimizer-in-backward") is None:
        return
    sizes = [whole(p) for p in step.model.parameters() if p.requires_grad]
    most = max(sizes, default=0)
    if not step.arrived or sum(sizes) <= 2 * most:
        step.unseen("optimizer-in-backward: no gradients, or one parameter that is most of the model")
        return
    step.differs(
        "optimizer-in-backward",
        f"at most {most:,} elements of gradients at a time",
        f"{step.waiting:,}",
        wrong=step.waiting > most,
    )


def _counts(kind: str, param: torch.Tensor) -> bool:
    if kind == "adafactor":
        return param.dim() > 1 and min(param.shape[-2:]) >= _LOW_RANK
    own = local_bytes(param) // param.element_size()
    return kind in _MOMENTS or (own >= _SMALL and own % _BLOCK == 0)


def _address(tensor: torch.Tensor) -> tuple[int, ...]:
    if hasattr(tensor, "__tensor_flatten__"):
        return (id(tensor),)
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()._cdata, int(local.storage_offset()), local.numel()


def told(values: Iterable[Any]) -> str:
    """Return the values separated by commas, or "none"."""
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
    "expert-parallel": "sharding, gradients and replicas of what lies beside the experts",
    "selective-checkpointing": "what blocks keep, beyond that they run again",
    "adamw-paged": "whether the host and the device share the state by pages",
    "tensor-parallel": "whether activations are cut, beside parameters",
    "context-parallel": "whether every block's attention reaches all of the other ranks",
    "activation-offload": "whether more than three quarters of the bytes went",
    "float8-linear": "what runs inside of torchao's layers",
    "lora": "whether adapters learn",
    "sgd": "an optimizer with as many bytes of state",
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
    """Yield what is not checked: techniques, parts of techniques, and settings other than the default."""
    for name in (u.technique for u in step.plan.uses):
        if name not in SEEN:
            yield f"{name}: nothing of it is looked at"
        elif name in _BY_A_STEP and not stepped:
            yield f"{name}: no step was watched"
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
    for used in step.plan.uses:
        usual = {k.name: k.default for k in technique(used.technique).knobs}
        for name in _NO_LOOK.get(used.technique, ()):
            if (value := used.settings.get(name)) != usual.get(name):
                yield f"{used.technique}: {name}={value}"
