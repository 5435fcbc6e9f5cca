"""Axial parallelism: each rank holds a part of the rows or residues of an Evoformer's representations.

This is FastFold's dynamic axial parallelism (Cheng et al. 2022, arXiv 2203.00854, section 4.2). Attention
along one axis needs no other rank if the tensor is cut along another axis, so an all-to-all changes the cut
between them. Pair biases and one operand of products over residues are gathered, and gathered again in
backward. All ranks see the same samples and draw the same dropout. Modules outside the stacks run whole on
every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

    from memfit.techniques.axial import Axial


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    mesh = bench.world.sub("context")
    if mesh is None:
        return
    from memfit.techniques.axial import Cut
    from memfit.techniques.parallel.sample_parallel_collectives import GroupCollectives, average_gradients

    modules = axial_modules(bench.model)
    if not modules:
        raise UserError(
            f"axial-parallel finds nothing to cut in {type(bench.model).__name__}",
            allowed="a model whose modules derive from memfit.techniques.axial.Axial, as those of alphafold2",
            hint="for other models, context-parallel divides the sequence, and tensor-parallel the layers",
        )
    together = GroupCollectives(
        group=mesh.get_group().group_name, rank=bench.world.index("context"), ranks=mesh.size()
    )
    for module in modules:
        module.across = Cut(together)
    bench.before_micro_batch.append(average_gradients(bench, together))


def axial_modules(model: torch.nn.Module) -> list[Axial]:
    """Return the modules of the model, itself included, whose inputs may be cut across ranks: those of
    classes derived from `Axial`."""
    from memfit.techniques.axial import Axial

    return [module for module in model.modules() if isinstance(module, Axial)]


TECHNIQUE = Technique(
    name="axial-parallel",
    summary="each rank holds a part of the rows or residues of an Evoformer's representations (FastFold)",
    script_call="split each sample along its axes over {degree} ranks; memfit's own worker does this",
    changes=StepPart.PASSES,
    effect=EffectClass.E1,
    apply=_apply,
    order=49,  # chunking runs modules whole
    knobs=(Knob(name="degree", default=2, doc="number of ranks that share each sample"),),
    # context-parallel and tensor-parallel also share the memory of a sample; zero and sharded-ddp average
    # over data-parallel ranks only; the others have not been tried together with it.
    forbids=(
        "context-parallel",
        "tensor-parallel",
        "zero",
        "sharded-ddp",
        "expert-parallel",
        "pipeline",
        "compile",
        "optimal-checkpointing",
    ),
)
