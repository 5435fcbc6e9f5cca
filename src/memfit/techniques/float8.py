"""Matrix products of the blocks' linear layers in 8-bit floats, through torchao.

Both operands of a layer's three products (output, gradient of the input, gradient of the weight) are scaled
by their largest value and rounded to 8 bits: to e4m3, and with tensor-wise scaling gradients to e5m2
(Micikevicius et al. 2022). Sums, weights and the values between layers keep their dtype. The technique is
meant to be combined with a 16-bit precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from memfit.model.blocks import find_blocks
from memfit.techniques.adapters import block_linears
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

NAME = "float8-linear"
_STEP = 16  # tensor cores load 8-bit rows in multiples of this many elements


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    path, _ = find_blocks(bench.model, bench.job.blocks)
    names = {name for name, linear in block_linears(bench.model, path) if fits(linear.weight.shape)}
    if not names:
        raise UserError(
            "float8-linear finds no suitable linear layers in the repeated blocks of "
            f"{type(bench.model).__name__}",
            allowed=f"blocks with an nn.Linear whose input and output sizes are multiples of {_STEP}",
            hint="leave out float8-linear, or set Job(blocks=...) to the path of the module that contains "
            "such blocks; memfit.apply takes the same argument",
        )
    config = Float8LinearConfig.from_recipe_name(str(settings["scaling"]))
    config = dataclasses.replace(config, emulate=bench.device.is_host)  # the CPU's own kernel takes minutes
    convert_to_float8_training(
        bench.model, config=config, module_filter_fn=lambda module, name: name in names
    )


def fits(shape: Iterable[int]) -> bool:
    """Return whether a Linear whose weight has this shape supports 8-bit products: whether all its sizes are
    multiples of 16."""
    return all(size % _STEP == 0 for size in shape)


TECHNIQUE = Technique(
    name=NAME,
    summary="matrix products of the blocks' linear layers in 8-bit floats (Micikevicius et al. 2022)",
    script_call="torchao.float8.convert_to_float8_training(model), scaling: {scaling}",
    changes=StepPart.PASSES,
    effect=EffectClass.E3,
    apply=_apply,
    # Not searched: only together with compile, which fuses the casts (planner/parallelism_grid.py).
    order=12,  # before layers are sharded, split or compiled
    knobs=(
        Knob(
            name="scaling",
            default="tensorwise",
            doc="tensorwise: one scale for each tensor; rowwise: one scale for each row of a tensor",
            choices=("tensorwise", "rowwise"),
        ),
    ),
    needs=("torchao",),
    forbids=("lora", "qlora", "fp16-autocast", "tensor-parallel", "axial-parallel", "expert-parallel"),
)
