"""Decoders as their sources wrote them: same parameters, and the same tensors kept for backward.

A ``Dialect`` names what differs between code bases: how normalisation upcasts, how rotary positions are
applied, whether keys and values are repeated before attention, where logits turn float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from memfit.techniques.synthetic_kernel import kernel, read_bytes
from published.arch import Arch

MakeLinear = Callable[[str, int, int, bool], nn.Module]  # (role, inputs, outputs, bias)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """``norm``: "whole" (float32 until the weight is applied), "early" (back to the input's type before the
    weight), "fused" (one kernel). ``rope``: "half" (x * cos + rotate_half(x) * sin), "complex" (float32
    pairs), "in-place" (one kernel that overwrites its input). ``attention``: "sdpa", "flash" (the flash-attn
    package: keys and values are not repeated) or "eager" (written out, softmax in float32)."""

    norm: str
    rope: str
    attention: str
    fused_qkv: bool
    fused_mlp: bool = False


LITGPT = Dialect(norm="early", rope="half", attention="sdpa", fused_qkv=True)
TITAN = Dialect(norm="early", rope="complex", attention="sdpa", fused_qkv=False)
TUNE = Dialect(norm="early", rope="complex", attention="sdpa", fused_qkv=False)
HUGGING_FACE = Dialect(norm="early", rope="half", attention="flash", fused_qkv=False)
LIGER = Dialect(norm="fused", rope="in-place", attention="flash", fused_qkv=False, fused_mlp=True)
FOAK = Dialect(norm="fused", rope="in-place", attention="flash", fused_qkv=False)


class RmsNorm(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "fused":
            return FusedRms.apply(x, self.weight)  # type: ignore[no-any-return,no-untyped-call]
        wide = x.float()
        normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)
        if self.kind == "whole":
            return (normed * self.weight.float()).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class FusedRms(torch.autograd.Function):
    """One kernel that keeps its input and one float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        out = torch.empty_like(x)
        kernel([out], read_bytes([x]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        out = torch.empty_like(x)
        kernel([out], read_bytes([x, *grads]))
        return out, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def make_norm(arch: Arch, dialect: Dialect, width: int) -> nn.Module:
    return nn.LayerNorm(width) if arch.norm == "layer" else RmsNorm(width, dialect.norm)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kind: str) -> torch.Tensor:
    """``x`` (batch, heads, length, dim); cos and sin (length, dim), or complex (length, dim / 2)."""
    if kind == "in-place":
        return _InPlace.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    if kind == "complex":
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(x)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (turned * sin)).to(x.dtype)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        kernel([], 2 * read_bytes([x]))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kernel([], 2 * read_bytes(grads))
        return grads[0]


class Attention(nn.Module):
    def __init__(self, arch: Arch, dialect: Dialect, linear: MakeLinear) -> None:
        super().__init__()
        self.arch, self.dialect = arch, dialect
        self.sizes = [arch.heads * arch.head_dim, *[arch.kv_heads * arch.head_dim] * 2]
        bias = arch.bias or arch.qkv_bias
        roles = ("qkv",) if dialect.fused_qkv else ("q", "k", "v")
        outputs = [sum(self.sizes)] if dialect.fused_qkv else self.sizes
        self.project = nn.ModuleDict(
            {r: linear(r, arch.hidden, n, bias) for r, n in zip(roles, outputs, strict=True)}
        )
        self.out = linear("o", self.sizes[0], arch.hidden, arch.bias)
        if arch.qk_norm:
            self.norm_q = make_norm(arch, dialect, arch.head_dim)
            self.norm_k = make_norm(arch, dialect, arch.head_dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        arch = self.arch
        if self.dialect.fused_qkv:
            parts = self.project["qkv"](x).split(self.sizes, dim=-1)
        else:
            parts = [self.project[r](x) for r in ("q", "k", "v")]
        q, k, v = (p.unflatten(-1, (-1, arch.head_dim)).transpose(1, 2) for p in parts)
        if arch.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if arch.rotary:
            q, k = self._turn(q, cos, sin), self._turn(k, cos, sin)
        y = self._attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = int(self.arch.rotary * self.arch.head_dim) if self.arch.rotary < 1 else self.arch.head_dim
        if self.dialect.rope == "half" and self.dialect.fused_qkv:
            part = rotate(x[..., :turned], cos, sin, "half")
            # Copies even when nothing is left over; compilers of 2024 did not see that it was empty.
            return torch.cat((part, x[..., turned:]), dim=-1).contiguous()
        if turned == self.arch.head_dim:
            return rotate(x, cos, sin, self.dialect.rope)
        return torch.cat((rotate(x[..., :turned], cos, sin, "half"), x[..., turned:]), dim=-1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        arch = self.arch
        if self.dialect.attention == "flash":
            flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, 0.0, True, False)[0]  # type: ignore[no-any-return]
        if arch.kv_heads != arch.heads:
            k, v = (t.repeat_interleave(arch.heads // arch.kv_heads, dim=1) for t in (k, v))
        if arch.softcap or self.dialect.attention == "eager":
            return _written_out(q, k, v, capped=arch.softcap)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, capped: bool) -> torch.Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if capped:
        scores = torch.tanh(scores / 50.0) * 50.0
    mask = torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).triu(diagonal=1)
    return functional.softmax(scores + mask, dim=-1, dtype=torch.float).to(q.dtype) @ v


class Mlp(nn.Module):
    def __init__(self, arch: Arch, linear: MakeLinear, ffn: int) -> None:
        super().__init__()
        self.gated = arch.mlp == "swiglu"
        self.act = functional.relu if arch.mlp == "relu" else functional.gelu
        self.up = linear("up", arch.hidden, ffn, arch.bias)
        if self.gated:
            self.gate = linear("gate", arch.hidden, ffn, arch.bias)
        self.down = linear("down", ffn, arch.hidden, arch.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class LigerMlp(Mlp):
    """SiLU and product in one kernel that keeps its two inputs and reuses them for their gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(_SiluMul.apply(self.gate(x), self.up(x)))  # type: ignore[no-any-return,no-untyped-call]


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        kernel([out], read_bytes([gate, up]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        kernel([], 2 * read_bytes(ctx.saved_tensors) + read_bytes(grads))
        return ctx.saved_tensors


class Block(nn.Module):
    def __init__(self, arch: Arch, dialect: Dialect, linear: MakeLinear, index: int) -> None:
        super().__init__()
        self.arch = arch
        self.norm_1 = make_norm(arch, dialect, arch.hidden)
        self.attention = Attention(arch, dialect, linear)
        if not arch.shared_norm:
            self.norm_2 = make_norm(arch, dialect, arch.hidden)
        sparse = arch.moe is not None and index >= arch.moe.dense_layers
        kind = LigerMlp if dialect.fused_mlp and arch.mlp == "swiglu" else Mlp
        experts = Experts if dialect.fused_qkv or dialect.rope == "complex" else ExpertList
        self.mlp = experts(arch, linear) if sparse else kind(arch, linear, arch.ffn)
        if arch.post_norms:
            self.norm_3 = make_norm(arch, dialect, arch.hidden)
            self.norm_4 = make_norm(arch, dialect, arch.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.norm_1(x)
        attended = self.attention(normed, cos=cos, sin=sin)
        if self.arch.post_norms:
            attended = self.norm_3(attended)
        if self.arch.parallel:
            normed = normed if self.arch.shared_norm else self.norm_2(x)
            x = attended + x
        else:
            x = attended + x
            normed = self.norm_2(x)
        fed = self.mlp(normed)
        return x + (self.norm_4(fed) if self.arch.post_norms else fed)


class Experts(nn.Module):
    """Tokens sorted by expert, each expert a grouped product over an equal share of them."""

    def __init__(self, arch: Arch, linear: MakeLinear) -> None:
        super().__init__()
        assert arch.moe is not None
        self.moe = moe = arch.moe
        self.router = nn.Linear(arch.hidden, moe.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, arch.hidden, 2 * moe.ffn))
        self.down = nn.Parameter(torch.empty(moe.experts, moe.ffn, arch.hidden))
        self.shared = Mlp(arch, linear, moe.shared_ffn) if moe.shared_ffn else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1, dtype=torch.float32).topk(self.moe.top_k, dim=-1)
        order = chosen.flatten().argsort()
        share = -(-order.shape[0] // self.moe.experts) * self.moe.experts - order.shape[0]
        sorted_tokens = functional.pad(tokens[order // self.moe.top_k], (0, 0, 0, share))
        grouped = sorted_tokens.unflatten(0, (self.moe.experts, -1))
        gate, up = torch.bmm(grouped, self.gate_up).chunk(2, dim=-1)
        out = torch.bmm(functional.silu(gate) * up, self.down).flatten(0, 1)[: order.shape[0]]
        out = out * weights.flatten()[order].unsqueeze(-1).to(out.dtype)
        mixed = torch.zeros_like(tokens).index_add(0, order // self.moe.top_k, out).view_as(x)
        return mixed + self.shared(x) if self.shared is not None else mixed


class ExpertList(nn.Module):
    """Hugging Face's mixture before its grouped products: one module an expert, called one by one, here each
    with an equal share of the tokens."""

    def __init__(self, arch: Arch, linear: MakeLinear) -> None:
        super().__init__()
        assert arch.moe is not None
        self.moe = moe = arch.moe
        self.router = nn.Linear(arch.hidden, moe.experts, bias=False)
        self.experts = nn.ModuleList(Mlp(arch, linear, moe.ffn) for _ in range(moe.experts))
        self.shared = Mlp(arch, linear, moe.shared_ffn) if moe.shared_ffn else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1, dtype=torch.float32).topk(self.moe.top_k, dim=-1)
        weights, order = weights.to(x.dtype).flatten(), chosen.flatten().argsort()
        mixed = torch.zeros_like(tokens)
        for expert, places in zip(self.experts, order.chunk(self.moe.experts), strict=False):
            rows = places // self.moe.top_k
            mixed.index_add_(0, rows, expert(tokens[rows]) * weights[places].unsqueeze(-1))
        mixed = mixed.view_as(x)
        return mixed + self.shared(x) if self.shared is not None else mixed


class Decoder(nn.Module):
    """``finish(head, hidden, targets)`` is what the code base does with the last hidden states inside the
    model's own forward: logits, chunks of them, or the loss itself."""

    def __init__(
        self, arch: Arch, dialect: Dialect, linear: MakeLinear, length: int, finish: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.arch, self.finish = arch, finish
        self.embed = nn.Embedding(arch.vocab, arch.hidden)
        if arch.learned_positions:
            self.position = nn.Embedding(length, arch.hidden)
        if arch.embedding_norm:
            self.norm_embed = nn.LayerNorm(arch.hidden)
        self.blocks = nn.ModuleList(Block(arch, dialect, linear, i) for i in range(arch.layers))
        self.norm = make_norm(arch, dialect, arch.hidden)
        self.head = linear("head", arch.hidden, arch.vocab, False)
        if arch.tied:
            self.head.weight = self.embed.weight
        turned = max(2, int(arch.rotary * arch.head_dim) // 2 * 2)
        width = turned // 2 if dialect.rope == "complex" else turned
        self.register_buffer("cos", torch.empty(length, width, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(length, width, dtype=torch.float32), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
        x = self.embed(tokens)
        if self.arch.learned_positions:
            x = x + self.position(torch.arange(tokens.shape[1]))
        if self.arch.embedding_norm:
            x = self.norm_embed(x)
        cos, sin = (t[: tokens.shape[1]] for t in (self.cos, self.sin))  # a rank's part of the sequence
        for block in self.blocks:
            x = block(x, cos=cos, sin=sin)
        return self.finish(self.head, self.norm(x), targets)
