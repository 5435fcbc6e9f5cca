"""Nine facts that published measurements pin down, each predicted from traces of the model at its real size.

The numbers compared with are other people's measurements (source beside each). A tolerance says what the
source leaves open: a rounded figure, a software version, a kernel that is not expressed. Law 7 is about step
time; what a trace knows of it is its FLOPs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memfit.catalog import machine
from memfit.cost.allocator import replay
from memfit.cost.memory import MemoryProfile, levels, memory_profile, step_ops
from memfit.cost.memory_estimate import footprint
from memfit.techniques.registry import make_use
from memfit.trace.trace_extrapolation import deep_trace
from memfit.trace.tracer import trace
from memfit.trace.truncated_model import with_blocks
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, Use
from memfit.types.result import Interval
from memfit.types.trace import Allocation, Category, Phase, Trace
from memfit.types.units import GIB, MIB

FULL = make_use("activation-checkpointing", {})
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {**LLAMA_3_8B, "vocab_size": 32000, "sliding_window": None}
LLAMA_PARAMETERS = 8.03e9


def in_dtype(dtype: torch.dtype, build: Callable[[], nn.Module]) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def own_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def decoder(model: Callable[[], nn.Module], batch: int, length: int, loss: Any = own_loss) -> Job:
    return Job(
        name="decoder",
        build_model=model,
        loss=loss,
        batch_size=batch,
        make_batch=lambda *_: torch.zeros(batch, length, dtype=torch.int64),
        blocks="model.layers",
        head="lm_head",
    )


def profile(traced: Trace) -> MemoryProfile:
    return memory_profile(traced, Calibration())


def alive_after_forward(traced: Trace, category: Category | None = None) -> int:
    end = next(s.end for s in traced.spans if s.phase is Phase.FORWARD)
    return sum(
        a.size_bytes
        for a in traced.allocations
        if a.start < end and (a.end is None or a.end >= end) and category in (None, a.category)
    )


# 1. fms-acceleration, torch's allocated peak in a Hugging Face Trainer run; beside parameters and their likes
# there are a batch of token numbers and scalars: 0.03 % covers them.
def test_1_foreach_adamw_peaks_at_five_times_the_parameters() -> None:
    model = functools.partial(
        in_dtype, torch.bfloat16, lambda: MistralForCausalLM(MistralConfig(**MISTRAL_7B))
    )
    traced = deep_trace(decoder(model, 4, 4096), Plan(uses=(FULL,)), device="cuda")
    found = profile(traced)
    assert found.peak_phase == "optimizer"
    assert found.peak_bytes == pytest.approx(72_434_837_504, rel=3e-4)
    assert found.peak_bytes == pytest.approx(5 * 2 * traced.parameter_count, rel=1e-4)


@pytest.mark.parametrize(("ranks", "measured_bytes"), [(2, 80_318_097_408), (4, 40_168_839_680)])
def test_1_under_fsdp_it_is_five_times_the_float32_shard(ranks: int, measured_bytes: int) -> None:
    # The runs' own kernels for the loss keep it below this peak; plain torch's does not, so the optimizer's
    # phase alone is compared: it depends on the parameters only, and a short batch will do.
    sharded = make_use("fsdp2", {"precision": "bf16"})
    job = decoder(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B)), ranks, 16)
    traced = deep_trace(job, Plan(uses=(FULL, sharded), ranks=ranks), device="cuda")
    assert profile(traced).phase_peak_bytes["optimizer"] == pytest.approx(measured_bytes, rel=1e-3)


# 2. Hugging Face's gradient checkpointing: what offloading the checkpoints freed, read off to the MiB.
@pytest.mark.parametrize(
    ("layers", "hidden", "length", "freed_mib"),
    [(8, 1024, 8192, 128), (16, 1024, 16384, 512), (28, 2048, 32768, 3584)],
)
def test_2_checkpointed_activations_to_the_mebibyte(
    layers: int, hidden: int, length: int, freed_mib: int
) -> None:
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=1024,
        attn_implementation="sdpa",
    )
    job = decoder(functools.partial(in_dtype, torch.bfloat16, lambda: Qwen3ForCausalLM(config)), 1, length)
    plan, few = Plan(uses=(FULL,)), 2
    deep = deep_trace(job, plan, device="cuda", steps=1, update=False)
    shallow = trace(with_blocks(job, few), plan, device="cuda", steps=1, update=False)
    more = alive_after_forward(deep, Category.ACTIVATION) - alive_after_forward(shallow, Category.ACTIVATION)
    assert more / (layers - few) * layers / MIB == pytest.approx(freed_mib, abs=1)


# 3. fms-acceleration, Llama-3-8B with LoRA, 4 x 4096 tokens, 128256 words: 37.644e9 B with a dense loss in
# one kernel (gradients written over the float32 logits), 24.906e9 B with Liger's fused linear loss.
ROWS, WORDS, HIDDEN = 4 * 4096, 128256, 4096


class _WrittenOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.saved_tensors[0]


def eager(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), words)


def one_kernel(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return _WrittenOver.apply(logits.float())  # type: ignore[no-any-return,no-untyped-call]


class Frozen(nn.Module):
    """A head that is not trained over states that are, as in a LoRA run."""

    def __init__(self) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.empty(ROWS, HIDDEN))
        self.head = nn.Linear(HIDDEN, WORDS, bias=False).requires_grad_(False)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return self.head(self.states * scale)  # type: ignore[no-any-return]


def loss_peak(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *uses: Use) -> int:
    """Highest live bytes less what is there before and after."""
    job = Job(
        name="loss",
        build_model=functools.partial(in_dtype, torch.bfloat16, Frozen),
        make_batch=lambda *_: (torch.ones(1, dtype=torch.bfloat16), torch.zeros(ROWS, dtype=torch.int64)),
        loss=lambda model, batch: loss(model(batch[0]), batch[1]),
        batch_size=ROWS,
        head="head",
    )
    traced = trace(job, Plan(uses=uses), device="cuda", steps=1, update=False)
    return profile(traced).peak_bytes - alive_at(traced, Phase.FORWARD)


def alive_at(traced: Trace, phase: Phase, which: int = 0) -> int:
    """Live bytes when the first such phase begins, or another one."""
    clock, live = levels(traced)
    begin = [s.start for s in traced.spans if s.phase is phase][which]
    return int(live[max(0, int(clock.searchsorted(begin)) - 1)])


def test_3_dense_cross_entropy_costs_six_bytes_a_logit_more_than_a_fused_one() -> None:
    # Liger's chunk is 1/32 of the logits at 6 B each; ours have 10 B each, so that 64 are as small. 6 % are
    # 0.36 B: such a chunk with its gradients, which the fused run's peak has only if it lies at the loss.
    chunked = make_use("chunked-cross-entropy", {"chunks": 64})
    saved = (loss_peak(one_kernel) - loss_peak(eager, chunked)) / (ROWS * WORDS)
    assert saved == pytest.approx((37_644_015_616 - 24_905_936_896) / (ROWS * WORDS), rel=0.06)


def test_3_with_a_float32_copy_a_logit_takes_twelve_bytes_at_the_peak() -> None:
    # And the gradient of the states: 2 B x hidden / vocabulary a logit, 0.06 B.
    assert loss_peak(eager) / (ROWS * WORDS) == pytest.approx(12, rel=0.01)


# 4, 5, 9. torchtitan: Llama-3-8B, FSDP2 with bf16, 8192 tokens, recomputing every second matrix product.
def _every_second() -> Any:
    aten: Any = torch.ops.aten
    seen = {False: 0, True: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator is aten._scaled_dot_product_flash_attention.default
        if operator is aten.mm.default:
            seen[context.is_recompute] += 1
            kept = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _titan_model() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B, attn_implementation="sdpa"))
    for block in model.model.layers:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=_every_second
        )
    return model


def _titan_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


@functools.cache
def titan(ranks: int, batch: int) -> Trace:
    job = decoder(_titan_model, batch * ranks, 8192, _titan_loss)
    plan = Plan(uses=(make_use("fsdp2", {"precision": "bf16"}),), ranks=ranks)
    return deep_trace(job, plan, device="cuda")


def in_training(traced: Trace) -> tuple[Allocation, ...]:
    """Without what building takes: titan builds on the meta device."""
    begin = next(s.start for s in traced.spans if s.phase is Phase.FORWARD)
    return tuple(a for a in traced.allocations if a.end is None or a.end >= begin)


def reserved_gib(traced: Trace) -> float:
    return replay(in_training(traced)).reserved_peak_bytes / GIB


def state_bytes(traced: Trace) -> int:
    """Parameters, gradients and optimizer state of this rank when the last step's optimizer begins."""
    begin = [s.start for s in traced.spans if s.phase is Phase.OPTIMIZER][-1]
    kinds = (Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER_STATE)
    return sum(
        a.size_bytes
        for a in traced.allocations
        if a.category in kinds and a.start <= begin and (a.end is None or a.end > begin)
    )


def test_4_between_versions_reserved_memory_is_a_range_and_allocated_is_not() -> None:
    # Versions of torch are not predicted. One nominal run, one sequence and compiled, reserved 47.65 GiB in
    # early 2025 and 30.89 in June; compiling saved half of 82.4 - 77.0 GiB, the figures for two sequences.
    # The prediction is of eager code of the former time, within the 20 % that versions leave; and it says
    # that the allocator adds a range of its own.
    traced = titan(8, 1)
    allocated = float(profile(traced).peak_bytes)
    eager_gib = 47.65 + (82.4 - 77.0) / 2
    assert allocated / GIB < eager_gib
    assert reserved_gib(traced) == pytest.approx(eager_gib, rel=0.20)
    exact = Interval(value=allocated, low=allocated, high=allocated)
    told = footprint(traced, exact, machine("H100-SXM")).reserved_bytes
    assert told is not None
    assert allocated <= told.low < told.high


# 5. torchtitan, 8 GPUs 82.4 GiB, 128 GPUs 67.0: 15.4 GiB of reserved memory. The shards' own arithmetic gives
# 14.0; 10 % are the buffers and the allocator.
def test_5_more_ranks_save_sixteen_bytes_a_parameter() -> None:
    saved = state_bytes(titan(8, 2)) - state_bytes(titan(128, 2))
    assert saved == pytest.approx(16 * LLAMA_PARAMETERS * (1 / 8 - 1 / 128), rel=2e-3)
    assert saved / GIB == pytest.approx(15.4, rel=0.10)


def test_5_the_peak_falls_by_what_is_there_at_the_peak() -> None:
    # It lies at the loss, before this step's gradients: 12 of the 16 bytes.
    saved = profile(titan(8, 2)).peak_bytes - profile(titan(128, 2)).peak_bytes
    assert saved == pytest.approx(12 * LLAMA_PARAMETERS * (1 / 8 - 1 / 128), rel=5e-3)


# 6. BLOOM's prelude, 181B on TP 8 x PP 12 x DP 4: nvidia-smi 72 GB with ZeRO-0, 37 with ZeRO-1.
class _FirstStage(nn.Module):
    """What the first of 12 stages keeps on one of 8 tensor-parallel ranks: 6 of 72 layers, 1/8 of each
    product and of the embedding."""

    def __init__(self, width: int = 14336, tensor: int = 8, words: int = 250880) -> None:
        super().__init__()
        self.embed = nn.Embedding(words // tensor, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, 8 * width // tensor), nn.Linear(4 * width // tensor, width)])
            for _ in range(6)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for wide, narrow in self.blocks:  # type: ignore[misc]
            x = x + narrow(wide(x)[..., : narrow.in_features])
        return x.float().mean()


def stage_memory(*uses: Use) -> tuple[int, int, int]:
    """(peak, live bytes when the last step's optimizer begins, parameters) of one of four data-parallel
    ranks. The batch is tiny, so that nothing but state counts."""
    job = Job(
        name="stage",
        build_model=_FirstStage,
        make_batch=lambda *_: torch.zeros(4, 8, dtype=torch.int64),
        loss=lambda model, tokens: model(tokens),
        batch_size=4,
    )
    traced = trace(job, Plan(uses=uses, ranks=4), device="cuda")
    return profile(traced).peak_bytes, alive_at(traced, Phase.OPTIMIZER, -1), traced.parameter_count


def test_6_the_first_stage_of_zero() -> None:
    masters = make_use("bf16-parameters", {"rounding": "master"})
    whole_peak, whole, parameters = stage_memory(make_use("ddp", {}), masters)
    cut_peak, cut, _ = stage_memory(make_use("zero", {"stage": 1, "precision": "bf16"}))
    assert parameters == pytest.approx(6 * 12 * 14336**2 / 8 + 250880 / 8 * 14336, rel=1e-3)
    # 2 B parameters, 2 B gradients, 12 B master and moments; the last two in quarters once they are reduced,
    # but for the parameter cut between two ranks, whose gradient stays whole (1.3 %).
    assert whole == pytest.approx(16 * parameters, rel=1e-3)
    assert cut == pytest.approx((2 + 14 / 4) * parameters, rel=0.02)
    # Without activations, context and communication both lie below what nvidia-smi said. The source warns
    # that ZeRO-0 ran on another branch: states explain 24 of the 35 GB between them.
    assert whole_peak < 72e9
    assert cut_peak < 37e9
    assert 0.6 * 35e9 < whole - cut < 35e9


# 7. Korthikanti et al. 2022, table 5: seconds with full and with selective recomputation. A trace knows
# FLOPs, not seconds: products bound these runs, and the optimizer, communication and the core attention that
# selective runs recompute make the measured ratios up to 3 % smaller.
class _Gpt(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(51200, width)
        self.blocks = nn.ModuleList(_GptBlock(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 51200, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))  # type: ignore[no-any-return]


def _whole_again(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Megatron recomputes a block to its end; torch stops where backward has what it needs."""
    with set_checkpoint_early_stop(False):
        logits = net(tokens)
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def step_flops(layers: int, width: int, heads: int, batch: int, *uses: Use) -> int:
    """Of all layers: each adds as much as the third to two."""

    def flops(few: int) -> int:
        job = Job(
            name="gpt",
            build_model=lambda: in_dtype(torch.bfloat16, lambda: _Gpt(width, heads, few)),
            make_batch=lambda *_: torch.zeros(batch, 2048, dtype=torch.int64),
            loss=_whole_again,
            batch_size=batch,
            blocks="blocks",
            head="head",
        )
        traced = trace(job, Plan(uses=uses), device="cuda", steps=1, update=False)
        return sum(op.flops * times for op, times in step_ops(traced))

    two, three = flops(2), flops(3)
    return two + (layers - 2) * (three - two)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "batch", "full_s", "selective_s"),
    [
        (48, 6144, 64, 4, 1.42, 1.10),
        (96, 12288, 96, 1, 18.13, 13.75),
        (105, 20480, 128, 1, 49.05, 37.83),
        (128, 25600, 160, 1, 94.42, 71.49),
    ],
)
def test_7_recomputing_everything_costs_a_third_more_work(
    layers: int, width: int, heads: int, batch: int, full_s: float, selective_s: float
) -> None:
    sizes = (layers, width, heads, batch)
    kept = make_use("selective-checkpointing", {"keep": "matmul"})
    ratio = step_flops(*sizes, FULL) / step_flops(*sizes, kept)
    assert 1.32 < ratio < 4 / 3
    assert ratio == pytest.approx(full_s / selective_s, rel=0.03)


# 9. torchtitan, 8 GPUs, two sequences: 82.4 GiB reserved.
def test_9_beside_the_shards_there_are_buffers_and_logits() -> None:
    traced = titan(8, 2)
    shards = 16 * LLAMA_PARAMETERS / 8
    peak = profile(traced).peak_bytes
    at = profile(traced).peak_clock
    alive = [a for a in traced.allocations if a.start <= at and (a.end is None or a.end > at)]
    logits = [a for a in alive if a.requested_bytes == 2 * 8192 * WORDS * 4]
    assert len(logits) == 3, "log-probabilities, their gradient, the gradient of the logits"
    gathered = [a for a in traced.allocations if a.requested_bytes == _block_bytes(2)]
    assert most_at_once(gathered) >= 2, "all-gather buffers of two groups"
    assert any(a.requested_bytes == _block_bytes(4) for a in traced.allocations), "reduce-scatter input"
    assert peak > 2 * shards
    # Reserved within 10 %: at 82.4 of its 96 GB the measured one may have been filled by the allocator
    # (128 GPUs, where it had room: 67.0).
    assert reserved_gib(traced) == pytest.approx(82.4, rel=0.10)
    assert reserved_gib(titan(128, 2)) == pytest.approx(67.0, rel=0.10)


def _block_bytes(each: int) -> int:
    """All parameters of one block, flat."""
    return each * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096)


def most_at_once(lives: list[Allocation]) -> int:
    edges = sorted(
        [(a.start, 1) for a in lives] + [(math.inf if a.end is None else a.end, -1) for a in lives]
    )
    best = count = 0
    for _, change in edges:
        count += change
        best = max(best, count)
    return best
