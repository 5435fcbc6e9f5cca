"""Chunking: run a module slice by slice where slices are independent, and recompute each slice in backward.

Attention over the rows of a pair representation makes tensors of residues^3 elements, though its rows are
independent. Such modules are found by trial, not by name: a small copy with random parameters runs on random
inputs, whole and on a slice of them. If the slice of the output is the same, that axis can be cut. Modules
are cut so finely that one slice allocates at most a budget of memory inside. Each slice is checkpointed, so
that only one slice's inner tensors exist at a time. A call runs whole if it differs from the module's first
call in the first micro-batch, on which the trial rests, in more than lengths. By default, the budget is half
of the output of that module which allocates the most inside, but at most half of what it allocates. That
output exists anyway, so smaller slices would save little more. (The idea of FastFold's AutoChunk, Cheng et
al. 2022, arXiv 2203.00854.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue
from memfit.types.units import MIB

if TYPE_CHECKING:
    import torch

    from memfit.model.chunk_analysis import ChunkCut


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch

    from memfit.model.chunk_analysis import ChunkTrials, budget_bytes, find_cuts, first_calls

    parts = bench.world.layout.data * bench.micro_batches  # a pass works on one of these
    calls, trials = first_calls(bench.job, bench.model, parts), ChunkTrials()
    requested_bytes = int(settings["mib"]) * MIB
    budget = requested_bytes or budget_bytes(bench.model, calls, int(settings["parts"]), trials)
    cuts = find_cuts(bench.model, calls, budget, trials)
    with bench.memory_pool("host"):  # stands for the memory of the trials in a prediction
        torch.empty(trials.peak_bytes, dtype=torch.uint8)
    if not cuts:
        raise UserError(
            f"chunking finds nothing to cut in {type(bench.model).__name__}",
            allowed="a module that can run on independent slices of its input one after the other, and that "
            "allocates more memory inside than the budget of one slice, which the settings mib and parts set",
            hint="set a smaller budget, such as mib=1, or leave chunking out",
        )
    for name, cut in cuts.items():
        _wrap(bench.model.get_submodule(name), cut, budget, bench.run_slices)


def _wrap(module: torch.nn.Module, cut: ChunkCut, budget: int, run_slices: Callable[..., list[Any]]) -> None:
    inner: Callable[..., Any] = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        import torch
        from torch.utils import _pytree
        from torch.utils.checkpoint import checkpoint

        leaves, spec = _pytree.tree_flatten((args, kwargs))
        length = cut.length(leaves, spec)
        if not length:
            return inner(*args, **kwargs)
        inside_bytes = cut.inside_bytes * leaves[cut.first].numel() / cut.first_count
        size = math.ceil(length / min(length, max(1, math.ceil(inside_bytes / max(1, budget)))))
        if size == length:
            return inner(*args, **kwargs)
        parts = {leaf_index: leaves[leaf_index].split(size, axis) for leaf_index, axis in cut.axes.items()}

        def part(*tensors: torch.Tensor) -> Any:
            part_leaves = list(leaves)
            for leaf_index, tensor in zip(parts, tensors, strict=True):
                part_leaves[leaf_index] = tensor
            part_args, part_kwargs = _pytree.tree_unflatten(part_leaves, spec)
            return inner(*part_args, **part_kwargs)

        checkpointed = functools.partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        slices = list(zip(*parts.values(), strict=True))
        return torch.cat(
            run_slices(checkpointed if torch.is_grad_enabled() else part, slices), dim=cut.out_axis
        )

    module.forward = forward


TECHNIQUE = Technique(
    name="chunking",
    summary="run modules that work on independent slices, such as triangle attention, slice by slice",
    script_call="run independent slices of modules one after another; memfit's own worker does this",
    changes=StepPart.PASSES,
    effect=EffectClass.E1,
    apply=_apply,
    settings=lambda facts: [{"parts": 0, "mib": 0}] if facts.has_slices else [],
    order=48,
    knobs=(
        Knob(
            name="parts",
            default=0,
            minimum=0,
            doc="budget of what one slice may allocate inside: the most that a module that can be cut "
            "allocates inside, divided by this number; ignored if 0 or if mib is not 0",
        ),
        Knob(
            name="mib",
            default=0,
            minimum=0,
            doc="budget of what one slice may allocate inside, in MiB; if this and parts are 0, half of the "
            "output of the module that allocates the most inside",
        ),
    ),
    forbids=(
        "optimal-checkpointing",
        "compile",
        "tensor-parallel",
        "context-parallel",
        "pipeline",
        "activation-offload",
        "selective-checkpointing",
    ),
)
