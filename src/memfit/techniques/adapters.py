"""LoRA and QLoRA through peft: the base weights are frozen (and kept in 4 bits), small matrices learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from memfit.techniques.base import Knob, Space, Technique, Workbench
from memfit.techniques.blocks import find_blocks
from memfit.types.plan import EffectClass, KnobValue

def _apply_lora(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    _adapt(bench, int(settings["rank"]))


def _apply_qlora(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from peft.tuners.lora import LoraLayer

    _adapt(bench, int(settings["rank"]))
    for module in bench.model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer = Nf4Linear(module.base_layer)


def _adapt(bench: Workbench, rank: int) -> None:
    """Adapters on every Linear of the repeated blocks; what lies outside the blocks (input projection,
    head) stays trainable, since a new task's head must learn."""
    from peft import LoraConfig, inject_adapter_in_model

    path, _ = find_blocks(bench.model, bench.job.blocks)
    outside = [p for name, p in bench.model.named_parameters() if not name.startswith(path + ".")]
    targets = sorted(name for name, _ in _block_linears(bench.model, path))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), bench.model)
    kept = {id(p) for p in outside}
    for name, param in bench.model.named_parameters():
        param.requires_grad_(param.is_floating_point() and ("lora_" in name or id(param) in kept))


def _block_linears(model: torch.nn.Module, path: str) -> Iterable[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(path + "."):
            yield name, module


class Nf4Linear(torch.nn.Module):
    """A frozen Linear whose weight is stored in 4-bit NormalFloat with one float32 scale per 64 weights,
    and widened for each product, in forward and again in backward.

    Not bitsandbytes' own layer: its parameter class cannot exist on fake tensors; its kernels can.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        import bitsandbytes as bnb

        super().__init__()
        packed, self.state = bnb.functional.quantize_4bit(linear.weight.detach(), quant_type="nf4")
        self.register_buffer("packed", packed)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes (..., in_features) -> (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: torch.Tensor = _Nf4Product.apply(x, self.packed, self.state)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.packed, ctx.state = packed, state
        return torch.nn.functional.linear(x, _widen(packed, state, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ _widen(ctx.packed, ctx.state, grads[0].dtype), None, None


def _widen(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]


def _ranks(space: Space) -> Iterable[Mapping[str, KnobValue]]:
    return [{"rank": 8}] if space.block_count else []


_RANK = Knob(name="rank", default=8, doc="width of the two small matrices beside each weight")

LORA = Technique(
    name="lora",
    summary="freeze the blocks and train low-rank updates beside their weights (Hu et al. 2021)",
    effect=EffectClass.E3,
    apply=_apply_lora,
    settings=_ranks,
    order=10,
    slot="adapters",
    knobs=(_RANK,),
    needs=("peft",),
)
QLORA = Technique(
    name="qlora",
    summary="LoRA on blocks whose frozen weights are stored in 4 bits",
    effect=EffectClass.E3,
    apply=_apply_qlora,
    settings=_ranks,
    order=10,
    slot="adapters",
    knobs=(_RANK,),
    needs=("peft", "bitsandbytes"),
    forbids=("bf16-parameters",),
)
