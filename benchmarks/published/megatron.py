"""One rank of a Megatron-LM run: its own slice of the weights, the tensors that Transformer Engine's (or, for
fp16 runs before it, Megatron's own) modules keep, and the buffers of Megatron's optimizer.

Weights are buffers and their gradients go straight into the float32 gradient buffer (gradient accumulation
fusion), so autograd sees activations only. Read from megatron/core (transformer, tensor_parallel,
distributed, optimizer) and transformer_engine/pytorch (module/layernorm_linear.py, attention).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfit.types.errors import UserError
from memfit.types.job import Job
from published.arch import Arch, Moe
from published.calls import (
    AttentionCall,
    EmbedCall,
    ExpertsCall,
    GeluCall,
    LinearCall,
    NormedCall,
    ReceivedCall,
    SentCall,
    Shape,
    SplitCall,
    SwigluCall,
    VocabularyCall,
    Weight,
)
from published.rows import Setup


class Layer(nn.Module):
    def __init__(self, arch: Arch, shape: Shape, sparse: bool, scraps: dict[Any, Any]) -> None:
        super().__init__()
        self.arch, self.shape = arch, shape
        tensor = shape.tensor
        self.query = arch.heads * arch.head_dim // tensor
        self.key = max(1, arch.kv_heads // tensor) * arch.head_dim
        self.gates = 2 if arch.mlp == "swiglu" else 1
        make: Any = lambda o, i, **k: Weight(o, i, scraps=scraps, **k)  # noqa: E731
        if arch.mla:
            self._latent(make)
        else:
            self.qkv = make(self.query + 2 * self.key, arch.hidden, norm=True)
            self.out = make(arch.hidden, self.query)
        self.moe: Moe | None = arch.moe if sparse else None
        if self.moe is None:
            self.up = make(self.gates * arch.ffn // tensor, arch.hidden, norm=True)
            self.down = make(arch.hidden, arch.ffn // tensor)
            return
        self.norm = make(1, arch.hidden)
        self.router = make(self.moe.experts, arch.hidden)
        self.experts_up = nn.ModuleList(
            make(2 * self.moe.ffn, arch.hidden) for _ in range(shape.experts_here)
        )
        self.experts_down = nn.ModuleList(make(arch.hidden, self.moe.ffn) for _ in range(shape.experts_here))
        if self.moe.shared_ffn:
            self.up = make(2 * self.moe.shared_ffn // tensor, arch.hidden)
            self.down = make(arch.hidden, self.moe.shared_ffn // tensor)

    def _latent(self, make: Any) -> None:
        mla, arch, heads = self.arch.mla, self.arch, self.arch.heads // self.shape.tensor
        assert mla is not None
        self.norm_in = make(1, arch.hidden)
        self.query_down = make(mla.q_rank, arch.hidden)
        self.query_up = make(heads * (mla.nope + mla.rope), mla.q_rank, norm=True)
        self.key_down = make(mla.kv_rank + mla.rope, arch.hidden)
        self.key_up = make(heads * (mla.nope + mla.value), mla.kv_rank, norm=True)
        self.out = make(arch.hidden, heads * mla.value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self._dropped(self._attend_latent(x) if self.arch.mla else self._attend(x))
        x = x + attended
        return x + self._dropped(self._feed(x))

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """One byte an element is kept: what was dropped."""
        return torch.native_dropout(x, self.arch.dropout, True)[0] if self.arch.dropout else x

    def _linear(
        self, x: torch.Tensor, layer: Weight, *, gather: bool = False, scatter: bool = False
    ) -> torch.Tensor:
        parallel = self.shape.sequence_parallel and self.shape.tensor > 1
        out: torch.Tensor = LinearCall.apply(x, layer, self.shape, gather and parallel, scatter and parallel)
        return out

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self._linear(x, self.qkv, gather=True)
        q, k, v = SplitCall.apply(mixed, self.query, self.key, self.key)
        del mixed
        return self._linear(self._core(q, k, v, self.query), self.out, scatter=True)

    def _core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, width: int) -> torch.Tensor:
        heads = self.arch.heads // self.shape.tensor
        if self.shape.flash:
            out: torch.Tensor = AttentionCall.apply(
                q, k, v, heads, width, self.shape.context > 1, self.shape.recompute
            )
            return out
        if self.shape.recompute:
            return checkpoint(_unfused, q, k, v, heads, self.shape, use_reentrant=False)  # type: ignore[no-any-return]
        return _unfused(q, k, v, heads, self.shape)

    def _attend_latent(self, x: torch.Tensor) -> torch.Tensor:
        mla, heads = self.arch.mla, self.arch.heads // self.shape.tensor
        assert mla is not None
        normed = NormedCall.apply(x)
        query = self._linear(self._linear(normed, self.query_down), self.query_up, gather=True)
        latent = self._linear(normed, self.key_down)
        pair = self._linear(latent[:, : mla.kv_rank].contiguous(), self.key_up, gather=True)
        q = SplitCall.apply(query, heads * (mla.nope + mla.rope))[0]
        k, v = SplitCall.apply(pair, heads * (mla.nope + mla.rope), heads * mla.value)
        del query, pair, latent, normed
        return self._linear(self._core(q, k, v, heads * mla.value), self.out, scatter=True)

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        if self.moe is None:
            return self._dense(x)
        normed = NormedCall.apply(x)
        scores = normed.float()  # the router's input, in float32
        routed = math.ceil(self.shape.rows * self.moe.top_k)
        out: torch.Tensor = ExpertsCall.apply(
            normed, self._joined("experts_up"), self._joined("experts_down"), routed
        )
        del scores
        return out + self._dense(normed) if self.moe.shared_ffn else out

    def _joined(self, name: str) -> Weight:
        return getattr(self, name)[0]  # type: ignore[no-any-return]

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        wide = self._linear(x, self.up, gather=True)
        act = (SwigluCall if self.gates == 2 else GeluCall).apply(wide, self.shape.plain)
        del wide
        return self._linear(act, self.down, scatter=True)


def _unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, shape: Shape) -> torch.Tensor:
    """Scores, softmax and dropout as tensors: two of half precision and a mask a score are kept."""

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(shape.length, shape.batch * heads, -1).transpose(0, 1)

    scores = split(q) @ split(k).transpose(1, 2)
    weights = torch.softmax(scores, dim=-1)
    del scores
    dropped = torch.native_dropout(weights, 0.1, True)[0]
    return (dropped @ split(v)).transpose(0, 1).reshape(q.shape[0], -1)


class Rank(nn.Module):
    """A pipeline stage of one rank; parameters, gradients and state as Megatron lays them out."""

    def __init__(self, arch: Arch, shape: Shape, stage: Stage) -> None:
        super().__init__()
        self.shape, self.stage, self.width = shape, stage, arch.hidden
        scraps: dict[Any, Any] = {}
        self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        vocab = -(-arch.vocab // (128 * shape.tensor)) * 128
        if stage.first:
            self.embed = Weight(vocab, arch.hidden, scraps=scraps)
            if arch.learned_positions:
                self.position = Weight(shape.length, arch.hidden, scraps=scraps)
        dense = arch.moe.dense_layers if arch.moe else arch.layers
        self.blocks = nn.ModuleList(
            Layer(arch, shape, index >= dense and arch.moe is not None, scraps) for index in stage.layers
        )
        if stage.last:
            shared = arch.tied and stage.first
            self.head = self.embed if shared else Weight(vocab, arch.hidden, scraps=scraps)
        stage.claim(self)

    def forward(self, head: bool = True) -> torch.Tensor:
        """Without its head where another chunk of an interleaved schedule has it."""
        x = (
            EmbedCall.apply(self.anchor, self.embed, self.shape)
            if self.stage.first
            else ReceivedCall.apply(self.anchor, self.shape, self.width)
        )
        for block in self.blocks:
            x = block(x)
        if not (self.stage.last and head):
            return SentCall.apply(x)  # type: ignore[no-any-return]
        return VocabularyCall.apply(NormedCall.apply(x), self.head, self.shape, self.stage.fused_loss)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """``layers`` of one chunk; ``chunks`` on this rank, of which ``in_flight`` micro-batches wait for their
    backward. ``shards``, ``expert_shards``: over how many ranks the optimizer's state is split."""

    layers: range
    chunks: int
    in_flight: int
    first: bool
    last: bool
    fused_loss: bool
    shards: int
    expert_shards: int
    grad_bytes: int
    copy_bytes: int = 0  # of a weight of a block, kept in float8 beside it from one micro-batch to the next

    def claim(self, model: Rank) -> None:
        """Gradient buffer, float32 master and the two moments."""
        dense = expert = 0
        for name, buffer in list(model.named_buffers()):
            if "experts_" in name:
                expert += buffer.numel()
            else:
                dense += buffer.numel()
        blocks = sum(b.numel() for n, b in model.named_buffers() if n.startswith("blocks"))
        more = (self.chunks - 1) * blocks  # the other chunks of an interleaved schedule
        model.register_buffer("other_chunks", torch.empty(more))
        grads = torch.empty((dense + more + expert) * self.grad_bytes, dtype=torch.uint8)
        model.register_buffer("gradients", grads)
        copies = torch.empty((blocks + more) * self.copy_bytes, dtype=torch.uint8)
        model.register_buffer("float8_copies", copies)
        own = -(-(dense + more) // self.shards) + -(-expert // self.expert_shards)
        model.register_buffer("optimizer_state", torch.empty(3 * own, dtype=torch.float32))


def stages_of(setup: Setup, arch: Arch) -> list[Stage]:
    """First and last pipeline stage; one where there is no pipeline."""
    degree, virtual = setup.ranks["pp"], setup.ranks["vp"]
    each = -(-arch.layers // (degree * virtual))
    data = setup.ranks["dp"] * setup.ranks["cp"]
    zero = setup.sharding in ("zero1", "zero2")
    copies = setup.float8 and setup.low_precision_weights != "only"
    found = []
    for rank in sorted({0, degree - 1}):
        warmup = (degree - rank - 1) * 2 + (virtual - 1) * degree if virtual > 1 else degree - rank - 1
        found.append(
            Stage(
                layers=range(rank * each, min(arch.layers, (rank + 1) * each)),
                chunks=virtual,
                in_flight=min(warmup + 1, setup.micro_batches * virtual),
                first=rank == 0,
                last=rank == degree - 1,
                fused_loss=setup.loss == "fused",
                shards=data if zero else 1,
                expert_shards=max(1, data // setup.ranks["ep"]) if zero else 1,
                grad_bytes=setup.grad_bytes,
                copy_bytes=2 if copies else 0,
            )
        )
    return found


def rank_jobs(setup: Setup, arch: Arch) -> list[Job]:
    """A job for each rank that differs. Raises UserError where ranks share more than the optimizer's
    state."""
    if setup.sharding not in ("", "ddp", "zero1", "zero2"):
        raise UserError(f"{setup.sharding} of layers that Megatron cuts is not expressed")
    dtype = getattr(torch, setup.compute)
    shape = Shape(
        length=setup.length // setup.ranks["cp"],
        batch=setup.micro_batch,
        tensor=setup.ranks["tp"],
        sequence_parallel=setup.sequence_parallel,
        context=setup.ranks["cp"],
        experts_here=max(1, arch.moe.experts // setup.ranks["ep"]) if arch.moe else 0,
        flash=setup.attention not in ("unfused", "eager"),
        dtype=dtype,
        float8=setup.float8,
        recompute=setup.recompute.startswith("attention"),
        plain=setup.code != "megatron",
    )
    return [_job(setup, arch, shape, stage) for stage in stages_of(setup, arch)]


def _job(setup: Setup, arch: Arch, shape: Shape, stage: Stage) -> Job:
    waiting: list[torch.Tensor] = []

    def build() -> nn.Module:
        from published.models import default_dtype

        with default_dtype(str(shape.dtype).removeprefix("torch.")):
            return Rank(arch, shape, stage)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        waiting.clear()
        ends = stage.chunks == 1  # else the micro-batches that wait are in the chunks before the last
        waiting.extend(model(head=ends) for _ in range(stage.in_flight - 1))
        out: torch.Tensor = model()
        return out

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=lambda step, seed: torch.zeros(1, 1, dtype=torch.int64),
        loss=loss,
        batch_size=1,
        blocks="blocks",
    )
