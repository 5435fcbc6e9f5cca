"""LoRA, DoRA and QLoRA through peft: the parameters of the blocks are frozen, and two small matrices are
trained for each Linear weight. DoRA also trains the norm of each row of the weights, and QLoRA stores them in
4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from memfit.model.blocks import child_prefix, find_blocks
from memfit.techniques.base import JobFacts, Knob, StepPart, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


def _apply_lora(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    trains_outside, dora = settings.get("outside") != "frozen", bool(settings.get("dora", False))
    _adapt(bench, int(settings["rank"]), trains_outside=trains_outside, dora=dora)


def _apply_qlora(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from peft.tuners.lora import LoraLayer

    from memfit.techniques.nf4 import Nf4Linear

    _adapt(bench, int(settings["rank"]), trains_outside=settings.get("outside") != "frozen")
    for module in bench.model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer = Nf4Linear(module.base_layer)


def _adapt(bench: Workbench, rank: int, *, trains_outside: bool, dora: bool = False) -> None:
    """Add two trained matrices of the inner width ``rank`` to every Linear inside the module that contains
    the repeated blocks, and with ``dora`` the trained norms of the rows of its weight. Freeze all other
    parameters inside that module. Parameters outside it, such as those of the head, are all trained if
    ``trains_outside`` is set and they are floating-point, and frozen otherwise. Raises UserError if no
    repeated blocks, or no Linears there, are found."""
    from peft import LoraConfig, inject_adapter_in_model

    path, _ = find_blocks(bench.model, bench.job.blocks)
    prefix = child_prefix(path)
    # Keep ids, not parameters: the imports below log and keep this frame alive, and would keep parameters
    # that shards replace.
    outside_ids = {id(p) for name, p in bench.model.named_parameters() if not name.startswith(prefix)}
    targets = sorted(name for name, _ in block_linears(bench.model, path))
    if not targets:
        raise UserError(
            "low-rank adapters (lora, qlora) find no linear layers in the repeated blocks of "
            f"{type(bench.model).__name__}",
            allowed="repeated blocks that contain nn.Linear",
            hint="set Job(blocks=...) to the path of the module that contains such blocks; memfit.apply "
            "takes the same argument",
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=dora)
    inject_adapter_in_model(config, bench.model)
    for name, param in bench.model.named_parameters():
        is_outside = trains_outside and id(param) in outside_ids
        param.requires_grad_(param.is_floating_point() and ("lora_" in name or is_outside))


def block_linears(model: torch.nn.Module, path: str) -> Iterable[tuple[str, torch.nn.Linear]]:
    """Yield (path in the model, layer) for every torch.nn.Linear, at any depth, inside the module at
    ``path``, which is the one that contains the model's blocks. The path of the model itself is ""."""
    import torch

    prefix = child_prefix(path)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix):
            yield name, module


def _ranks(facts: JobFacts) -> Iterable[Mapping[str, KnobValue]]:
    return [{"rank": 8, "outside": "trained"}] if facts.block_count and facts.has_linear_layers else []


_RANK = Knob(
    name="rank",
    default=8,
    doc="inner width of the two small matrices whose product, times 2, is added to each Linear weight",
)
_OUTSIDE = Knob(
    name="outside",
    default="trained",
    doc="whether the parameters outside the blocks, such as embeddings and head, are trained",
    choices=("trained", "frozen"),
)
_DORA = Knob(
    name="dora",
    default=False,
    doc="whether the norm of each row of the weights is trained, too (DoRA, Liu et al. 2024)",
    choices=(False, True),
)

LORA = Technique(
    name="lora",
    summary="freeze the blocks and train low-rank updates of their weights (Hu et al. 2021); also DoRA",
    script_call="LoRA adapters of rank {rank}, such as peft.get_peft_model, with all other weights frozen",
    changes=StepPart.BOTH,
    before_engine=True,
    effect=EffectClass.E3,
    freezes_parameters=True,
    apply=_apply_lora,
    settings=lambda facts: [{**settings, "dora": False} for settings in _ranks(facts)],
    order=10,
    slot="adapters",
    knobs=(_RANK, _OUTSIDE, _DORA),
    needs=("peft",),
)
QLORA = Technique(
    name="qlora",
    summary="LoRA on blocks whose frozen weights are stored in 4 bits",
    script_call="4-bit frozen weights with LoRA adapters of rank {rank}",
    changes=StepPart.BOTH,
    loaded_in_pieces=True,
    effect=EffectClass.E3,
    freezes_parameters=True,
    apply=_apply_qlora,
    settings=_ranks,
    order=10,
    slot="adapters",
    knobs=(_RANK, _OUTSIDE),
    needs=("peft", "bitsandbytes"),
    supports=lambda kind: kind.bitsandbytes,
    forbids=("bf16-parameters",),
)
