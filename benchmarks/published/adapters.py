"""Linear layers with low-rank adapters beside them, as litgpt and peft write them; plain or 4-bit base."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.nf4 import Nf4Linear


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """``targets``: roles among q, k, v, o, gate, up, down, head. ``base``: "" or "nf4". ``adapter_dtype``:
    "" is the base's own. ``double``: the scales of the 4-bit base are quantised once more. ``keeps_input``:
    the 4-bit product holds its input until the whole graph is gone (bitsandbytes before 0.43.2). ``stored``:
    the 4-bit base is a parameter of half precision, as ranks share it (bitsandbytes' quant_storage)."""

    rank: int
    targets: frozenset[str]
    dropout: float
    base: str = ""
    double: bool = False
    keeps_input: bool = False
    adapter_dtype: str = ""
    style: str = "peft"  # or "litgpt"
    stored: bool = False


class LinearMaker:
    """Makes each linear layer of a decoder: frozen with an adapter, frozen, or plain."""

    def __init__(self, lora: Lora | None, head_sizes: tuple[int, int]) -> None:
        self.lora = lora
        self.query_size, self.key_size = head_sizes

    def __call__(self, role: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        linear = nn.Linear(inputs, outputs, bias=bias)
        if self.lora is None:
            return linear
        base: nn.Module = linear
        adapted = role in self.lora.targets or (role == "qkv" and self.lora.targets & {"q", "k", "v"})
        # bitsandbytes' users leave the head alone; litgpt's replaces every Linear
        if self.lora.base and (role != "head" or self.lora.style == "litgpt"):
            base = _quantised(linear, self.lora)
        if not adapted:
            return base
        if role == "qkv":
            sizes = {"q": self.query_size, "k": self.key_size, "v": self.key_size}
            return FusedAdapter(base, self.lora, inputs, sizes)
        return Adapter(base, self.lora, inputs, outputs)


def _quantised(linear: nn.Linear, lora: Lora) -> nn.Module:
    """Lightning's layer is quantised from float16 (its bitsandbytes precision plugin), so that a bfloat16
    product widens twice."""
    if lora.style == "litgpt":
        linear.weight = nn.Parameter(linear.weight.detach().half())
    kind = StoredNf4Linear if lora.stored else KeepingNf4Linear if lora.keeps_input else Nf4Linear
    return kind(linear, double=lora.double)  # type: ignore[arg-type]


class StoredNf4Linear(Nf4Linear):
    """Its packed weights are seen as half precision by who shares them out; the scales are not shared out."""

    def __init__(self, linear: nn.Linear, *, double: bool = False) -> None:
        half = linear.weight.dtype
        super().__init__(linear, double=double)
        packed: torch.Tensor = self.packed  # type: ignore[assignment]
        del self.packed
        self.stored = nn.Parameter(packed.flatten().view(half).unsqueeze(-1), requires_grad=False)

    @property
    def packed(self) -> torch.Tensor:
        return self.stored.view(torch.uint8).view(-1, 1)


class KeepingNf4Linear(Nf4Linear):
    """Its input hangs on the graph's node itself: backward does not let go of it, only the last name of the
    loss does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Held.apply(super().forward(x), x)  # type: ignore[no-any-return,no-untyped-call]


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.input = x
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


class Adapter(nn.Module):
    def __init__(self, base: nn.Module, lora: Lora, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.style = base, lora.style
        self.lora_a = nn.Parameter(torch.empty(lora.rank, inputs))
        self.lora_b = nn.Parameter(torch.empty(outputs, lora.rank))
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        narrow = functional.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)
        return out + functional.linear(narrow, self.lora_b) * 0.5  # type: ignore[no-any-return]


class FusedAdapter(nn.Module):
    """litgpt's adapter of a fused query-key-value projection: one product in, a grouped convolution out,
    scattered into place where some of the three are left alone."""

    def __init__(self, base: nn.Module, lora: Lora, inputs: int, sizes: dict[str, int]) -> None:
        super().__init__()
        self.base, self.sizes = base, sizes
        self.enabled = [r for r in ("q", "k", "v") if r in lora.targets]
        self.lora_a = nn.Parameter(torch.empty(lora.rank * len(self.enabled), inputs))
        self.lora_b = nn.Parameter(torch.empty(sum(sizes[r] for r in self.enabled), lora.rank))
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        narrow = functional.linear(self.dropout(x), self.lora_a).transpose(-2, -1)
        wide = self._convolve(narrow, self.lora_b.unsqueeze(-1)).transpose(-2, -1)
        return out + self._placed(wide, out.shape[-1]) * 0.5  # type: ignore[no-any-return]

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len({*self.sizes.values()}) == 1:
            return functional.conv1d(x, weight, groups=len(self.enabled))
        parts = zip(
            x.chunk(len(self.enabled), dim=1),
            weight.split([self.sizes[r] for r in self.enabled]),
            strict=True,
        )
        return torch.cat([functional.conv1d(a, b) for a, b in parts], dim=1)

    def _placed(self, x: torch.Tensor, width: int) -> torch.Tensor:
        if len(self.enabled) == len(self.sizes):
            return x
        flat = x.transpose(0, 1)
        index = torch.empty(x.shape[-1], dtype=torch.int64)
        zeros = flat.new_zeros((*flat.shape[:-1], width)).view(-1, width)
        placed = zeros.index_copy(1, index, flat.reshape(-1, x.shape[-1]))
        return placed.view((*flat.shape[:-1], width)).transpose(0, 1)


def freeze(model: nn.Module, lora: Lora | None) -> nn.Module:
    """Only adapters learn; they may be wider than the base."""
    if lora is None:
        return model
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    if lora.adapter_dtype:
        wide: Any = getattr(torch, lora.adapter_dtype)
        for module in model.modules():
            for name in ("lora_a", "lora_b"):
                if (param := getattr(module, name, None)) is not None:
                    setattr(module, name, nn.Parameter(param.detach().to(wide)))
    return model
