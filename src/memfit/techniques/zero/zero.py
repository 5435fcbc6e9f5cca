"""ZeRO with DeepSpeed's layout (Rajbhandari et al. 2020): which part of the model state each rank keeps.

Stage 0 only averages gradients. Stage 1 shards the optimizer state, stage 2 also the gradients, and stage 3
also the parameters. The layouts are those of DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py: one
flat buffer of parameters, an fp32 master of this rank's part, and gradients reduced in a contiguous bucket of
fixed size. A single rank has the same buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

    from memfit.techniques.zero.base import ZeroOptimizer


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch

    from memfit.techniques.precision import Bf16Inputs
    from memfit.techniques.zero.base import shard_group
    from memfit.techniques.zero.zero_stage3 import ZeroThree
    from memfit.techniques.zero.zero_stage12 import ZeroNone, ZeroTwo

    stage, offload = int(settings["stage"]), str(settings["offload"])
    if stage == 0 and (offload != "none" or settings["precision"] != "fp32"):
        raise UserError(
            'zero with stage=0 supports neither offload nor precision="bf16"',
            allowed='stage=1, 2 or 3 (3 for offload="parameters"); or offload="none" and precision="fp32"',
        )
    if offload == "parameters" and stage < 3:
        raise UserError(
            f"zero with stage={stage} cannot offload parameters, which it keeps whole on the device",
            allowed='offload="none" or offload="optimizer"; offload="parameters" only with stage=3',
        )
    if settings["nvme"] != "none" and (stage < 3 or offload == "none"):
        raise UserError(
            f"zero with stage={stage}, offload={offload!r} and nvme={settings['nvme']!r}: only stage 3 keeps "
            "optimizer state on NVMe, and only state that is offloaded",
            allowed='nvme="none"; or stage=3 and offload="optimizer" or "parameters"',
        )
    bench.parameters_on = "host" if offload == "parameters" else ""
    bench.model.to(torch.bfloat16 if settings["precision"] == "bf16" else torch.float32)
    if settings["precision"] == "bf16":
        bench.forward_contexts.append(lambda: Bf16Inputs(bench.model))
    make, group = bench.make_optimizer, shard_group(bench)
    zero_class = (ZeroNone, ZeroTwo, ZeroTwo, ZeroThree)[stage]

    def make_zero(params: list[torch.nn.Parameter]) -> ZeroOptimizer:
        return zero_class(bench, params, settings, make, group)

    bench.make_optimizer = make_zero


TECHNIQUE = Technique(
    name="zero",
    summary="optimizer state, then gradients, then parameters sharded, as DeepSpeed lays them out",
    script_call="ZeRO stage {stage}",
    changes=StepPart.BOTH,
    excluded=lambda facts: facts.needs_parameter_names,
    pins_host_memory=True,
    # Stage 3 pins the fp32 gradient in sub-groups (initialize_optimizer_states of deepspeed's stage3.py),
    # which a trace has in one tensor unless the gradient is on NVMe.
    pins_traced_blocks=lambda settings: int(settings["stage"]) < 3 or settings["nvme"] != "none",
    effect=EffectClass.E1,
    apply=_apply,
    order=90,
    slot="data-parallel",
    knobs=(
        Knob(
            name="stage",
            default=2,
            doc="what is sharded; 0: nothing, gradients are averaged; 1: optimizer state; 2: also gradients; "
            "3: also parameters",
            choices=(0, 1, 2, 3),
        ),
        Knob(
            name="precision",
            default="fp32",
            doc="dtype of parameters and gradients; the master copy of stages 1 to 3 is always fp32; stage 0 "
            "supports only fp32",
            choices=("fp32", "bf16"),
        ),
        Knob(
            name="reduce_bucket_elements",
            default=500_000_000,
            doc="stages 1 to 3: largest number of gradient elements that are reduced together; a larger "
            "gradient is reduced alone",
        ),
        Knob(
            name="overlap",
            default=False,
            doc="stages 1 and 2: a second bucket of gradients fills while one is reduced; stage 1 then "
            "reduces during backward and not after it",
            choices=(True, False),
        ),
        Knob(
            name="offload",
            default="none",
            doc="what is kept in host memory; optimizer: fp32 master copy, its gradient and optimizer state, "
            "all updated there; parameters (stage 3 only): also this rank's pieces of parameters",
            choices=("none", "optimizer", "parameters"),
        ),
        Knob(
            name="nvme",
            default="none",
            doc="stage 3 with offload: what of it is on local storage instead of in host memory; optimizer: "
            "fp32 master copy, its gradient and optimizer state, which pass through host memory to be "
            "updated (ZeRO-Infinity)",
            choices=("none", "optimizer"),
        ),
        Knob(
            name="sub_group_elements",
            default=100_000_000,
            doc="with nvme: least number of elements that are read, updated and written back at a time; host "
            "memory holds 16 bytes for each of them",
        ),
        Knob(
            name="persist_elements",
            default=100_000,
            doc="stage 3: parameters of at most this many elements stay whole on every rank",
        ),
        Knob(
            name="live_elements",
            default=1_000_000_000,
            doc="stage 3: limit of gathered elements, beyond which parameters are neither gathered ahead nor "
            "kept for reuse",
        ),
        Knob(
            name="prefetch_elements",
            default=50_000_000,
            doc="stage 3: limit of elements that are gathered ahead of their use at a time",
        ),
        Knob(
            name="memory_efficient_linear",
            default=True,
            doc="stage 3; True: linear layers keep no gathered weight for backward; False: torch's linear "
            "layers, which do; on one rank, losses are then bitwise those of plain training",
            choices=(True, False),
        ),
    ),
    forbids=(
        "optimizer-in-backward",
        "bf16-autocast",
        "bf16-parameters",
        "tensor-parallel",
        "context-parallel",
        "pipeline",
    ),
)
