"""Closed forms from papers and code of others, each worked out here from shapes alone and compared with what
a trace of a model says. None of them is used by a prediction.

12 bytes a logit; five times the parameters for AdamW; (10 + 24) s b h a layer; p - r micro-batches in flight.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from memfit.catalog import machine
from memfit.cost.allocator import replay
from memfit.cost.device_overhead import with_workspaces
from memfit.cost.memory import levels
from memfit.jobs.builtin.gpt import Gpt, GptSize
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types.job import Job, OptimizerChoice
from memfit.types.plan import Plan, Use
from memfit.types.trace import Allocation, Category, Phase, Trace
from memfit.types.units import MIB

BF16 = torch.bfloat16
STATE = (Category.PARAMETER, Category.GRADIENT, Category.OPTIMIZER_STATE)


def typed(dtype: torch.dtype, build: Callable[[], nn.Module]) -> nn.Module:
    return build().to(dtype)


def live(traced: Trace, clock: int, *kinds: Category) -> int:
    """Bytes alive just before a clock tick."""
    return sum(
        a.size_bytes
        for a in traced.allocations
        if a.start < clock and (a.end is None or a.end >= clock) and (not kinds or a.category in kinds)
    )


def span(traced: Trace, phase: Phase, which: int = -1) -> range:
    found = [s for s in traced.spans if s.phase is phase][which]
    return range(found.start, found.end)


def peak(traced: Trace, phase: Phase, which: int = -1) -> int:
    clock, bytes_ = levels(traced)
    within = span(traced, phase, which)
    first, last = clock.searchsorted((within.start, within.stop))
    return int(bytes_[first:last].max())


def most(allocations: Iterable[Allocation]) -> int:
    """Most of them at once."""
    found = list(allocations)
    edges = sorted(
        [(a.start, 1) for a in found] + [(math.inf if a.end is None else a.end, -1) for a in found]
    )
    count = best = 0
    for _, change in edges:
        count += change
        best = max(best, count)
    return best


# --- the loss: T tokens, V words (12 T V with a float32 copy, 6 without)
TOKENS, WORDS, HIDDEN = 256, 4096, 8


class States(nn.Module):
    """States that learn under a head that does not: nothing but the loss takes memory of T V."""

    def __init__(self) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.empty(TOKENS, HIDDEN))
        self.head = nn.Linear(HIDDEN, WORDS, bias=False).requires_grad_(False)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.states * scale)
        return logits


def of_logits(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: Any, *uses: Use) -> Trace:
    job = Job(
        name="loss",
        build_model=functools.partial(typed, dtype, States),
        batch_size=TOKENS,
        head="head",
        make_batch=lambda *_: (torch.ones(1, dtype=dtype), torch.zeros(TOKENS, dtype=torch.int64)),
        loss=lambda model, batch: loss(model(batch[0]), batch[1]),
    )
    return trace(job, Plan(uses=uses), device="cuda", steps=1, update=False)


def a_logit(traced: Trace) -> float:
    before = live(traced, span(traced, Phase.FORWARD).start)
    return (max(peak(traced, p) for p in (Phase.FORWARD, Phase.BACKWARD)) - before) / (TOKENS * WORDS)


def wide(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels)


def keeping_half(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept.append(logits)
    return wide(logits, labels)


def keeping_float(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kept.append(logits.float())
    return functional.cross_entropy(kept[-1], labels)


kept: list[torch.Tensor] = []


@pytest.mark.parametrize(
    ("loss", "dtype", "bytes_"),
    [
        (wide, BF16, 12),  # log-probabilities, their gradient and the logits' gradient, all float32
        (functional.cross_entropy, BF16, 6),
        (functional.cross_entropy, torch.float32, 12),
        (keeping_half, BF16, 14),
        (keeping_float, BF16, 16),
    ],
)
def test_bytes_of_a_logit_at_the_peak_of_the_loss(loss: Any, dtype: torch.dtype, bytes_: int) -> None:
    kept.clear()
    found = a_logit(of_logits(loss, dtype))
    kept.clear()
    assert found == pytest.approx(bytes_, rel=0.01)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_a_chunked_loss_takes_its_share_of_the_logits(chunks: int) -> None:
    """12 T V / n; 10 here, as the gradient is written over the probabilities: half-precision logits, their
    float32 copy and the probabilities. And the gradient of the states."""
    found = a_logit(of_logits(wide, BF16, make_use("chunked-cross-entropy", {"chunks": chunks})))
    assert 10 / chunks <= found <= 12 / chunks
    assert found == pytest.approx(10 / chunks + 2 * HIDDEN / WORDS, rel=0.01)


# --- the optimizer: bytes of a parameter
WIDTHS = (64, 512, 512, 512, 512, 64)


class Mlp(nn.Module):
    def __init__(self, widths: tuple[int, ...] = WIDTHS, *, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def mlp(dtype: torch.dtype = torch.float32, rows: int = 4, **options: Any) -> Job:
    return Job(
        name="mlp",
        build_model=functools.partial(typed, dtype, functools.partial(Mlp, **options)),
        make_batch=lambda *_: torch.zeros(rows, WIDTHS[0], dtype=dtype),
        loss=lambda model, x: model(x).float().sum(),
        batch_size=rows,
        blocks="layers",
        optimizer=OptimizerChoice(learning_rate=1e-3),
    )


PARAMETERS = sum(a * b + b for a, b in itertools.pairwise(WIDTHS))
LARGEST = 512 * 512


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_adamw_over_lists_peaks_at_five_times_the_parameters(dtype: torch.dtype) -> None:
    """Parameters, gradients, two moments, and one list of temporaries as large."""
    traced = trace(mlp(dtype), Plan(), device="cuda")
    assert peak(traced, Phase.OPTIMIZER) == pytest.approx(5 * PARAMETERS * dtype.itemsize, rel=0.02)


@pytest.mark.parametrize(("name", "more"), [("adamw-fused", 0), ("adamw-single", 2 * LARGEST)])
def test_other_adamws_take_four_times_and_their_temporaries(name: str, more: int) -> None:
    """The fused kernel none, the loop two of the largest parameter (a root, and what it is divided to)."""
    traced = trace(mlp(), Plan(uses=(make_use(name, {}),)), device="cuda")
    assert peak(traced, Phase.OPTIMIZER) == pytest.approx(4 * (4 * PARAMETERS + more), rel=0.02)


@pytest.mark.parametrize(
    ("uses", "bytes_"),
    [
        ((), 8),  # two float32 moments
        ((("sgd", {}),), 4),  # with momentum
        ((("bf16-parameters", {"rounding": "stochastic"}),), 4),  # two bf16 moments
        ((("bf16-parameters", {"rounding": "master"}),), 12),  # a float32 copy as well
        ((("adamw-8bit", {}),), 2 * (1 + 4 / 256)),  # a scale for every 256 elements
    ],
)
def test_bytes_of_optimizer_state_a_parameter(uses: Any, bytes_: float) -> None:
    traced = trace(mlp(), Plan(uses=tuple(make_use(*use) for use in uses)), device="cuda")
    found = live(traced, traced.spans[-1].end, Category.OPTIMIZER_STATE)
    assert found == pytest.approx(bytes_ * PARAMETERS, rel=0.05, abs=20_000)


def test_stepping_in_backward_holds_one_layers_gradients() -> None:
    plan = Plan(uses=(make_use("optimizer-in-backward", {}),))
    sizes = 4 * LARGEST, 4 * PARAMETERS
    found = [most_bytes(trace(mlp(), p, device="cuda"), Category.GRADIENT) for p in (plan, Plan())]
    assert found[0] <= 2.1 * sizes[0]
    assert found[1] == pytest.approx(sizes[1], rel=0.02)


def most_bytes(traced: Trace, kind: Category) -> int:
    found = [a for a in traced.allocations if a.category is kind]
    edges = sorted(
        [(a.start, a.size_bytes) for a in found]
        + [(math.inf if a.end is None else a.end, -a.size_bytes) for a in found]
    )
    now = best = 0
    for _, change in edges:
        now += change
        best = max(best, now)
    return best


@pytest.mark.parametrize("rank", [1, 4])
def test_adapters_learn_rank_times_both_widths(rank: int) -> None:
    pytest.importorskip("peft")
    traced = trace(mlp(), Plan(uses=(make_use("lora", {"rank": rank}),)), device="cuda")
    learned = rank * sum(a + b for a, b in itertools.pairwise(WIDTHS))
    assert traced.trainable_count == learned
    assert live(traced, traced.spans[-1].end, Category.OPTIMIZER_STATE) == pytest.approx(
        8 * learned, rel=0.02, abs=512 * 30
    )


# --- activations of a transformer layer: s b h (10 + 24) + 5 a s^2 b in half precision
class MegatronLayer(nn.Module):
    """The layer of Korthikanti et al. 2022, figure 2, in plain PyTorch."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()
            for t in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scale = (width // self.heads) ** -0.5
            weights = functional.softmax(torch.matmul(q, k.mT).mul_(scale), -1)
            mixed = torch.matmul(functional.dropout(weights, 0.1), v)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        x = x + functional.dropout(self.out(mixed), 0.1)
        hidden = functional.gelu(self.up(self.norm_2(x)))
        return x + functional.dropout(self.down(hidden), 0.1)


def kept_by_a_layer(batch: int, length: int, width: int, heads: int, *, fused: bool, uses: Any = ()) -> int:
    """Bytes that a layer more keeps after forward."""

    def kept_by(layers: int) -> int:
        job = Job(
            name="layers",
            batch_size=batch,
            blocks="0",
            build_model=functools.partial(
                typed,
                BF16,
                lambda: nn.Sequential(
                    nn.Sequential(*(MegatronLayer(width, heads, fused=fused) for _ in range(layers)))
                ),
            ),
            make_batch=lambda *_: torch.zeros(batch, length, width, dtype=BF16, requires_grad=True),
            loss=lambda model, x: model(x * 1).float().sum(),
        )
        traced = trace(job, Plan(uses=uses), device="cuda", steps=1, update=False)
        return live(traced, span(traced, Phase.BACKWARD).start, Category.ACTIVATION)

    return kept_by(3) - kept_by(2)


SIZES = [(2, 128, 64, 4), (1, 256, 128, 8)]


@pytest.mark.parametrize(("batch", "length", "width", "heads"), SIZES)
def test_a_transformer_layer_keeps_34_sbh_and_5_ass(batch: int, length: int, width: int, heads: int) -> None:
    """And 16 B a token: mean and deviation of both normalisations."""
    found = kept_by_a_layer(batch, length, width, heads, fused=False)
    sbh = batch * length * width
    assert found == pytest.approx(34 * sbh + 5 * batch * heads * length**2 + 16 * batch * length, rel=2e-3)


@pytest.mark.parametrize(("batch", "length", "width", "heads"), SIZES)
def test_with_fused_attention_it_keeps_34_sbh(batch: int, length: int, width: int, heads: int) -> None:
    """Also the kernel's log-sum-exp, 4 B a head and token; its output takes the place of the mask over
    the weights' product: 34 - 2 (the projection's input is that output)."""
    found = kept_by_a_layer(batch, length, width, heads, fused=True)
    tokens = batch * length
    assert found == pytest.approx(34 * tokens * width + 4 * heads * tokens + 16 * tokens, rel=0.07)


@pytest.mark.parametrize(("batch", "length", "width", "heads"), SIZES)
def test_a_recomputed_layer_keeps_its_input(batch: int, length: int, width: int, heads: int) -> None:
    """2 s b h, and the state of the random generator: 5,056 B."""
    full = (make_use("activation-checkpointing", {}),)
    found = kept_by_a_layer(batch, length, width, heads, fused=False, uses=full)
    assert found == pytest.approx(2 * batch * length * width, abs=6144)


def test_autocast_keeps_two_bytes_a_weight_until_it_ends() -> None:
    """Half-precision copies of every weight, once for the micro-batch."""
    traced = trace(mlp(bias=False), Plan(uses=(make_use("bf16-autocast", {}),)), device="cuda", steps=1)
    weights = [a * b for a, b in itertools.pairwise(WIDTHS)]
    copies = [a for a in traced.allocations if a.phase is Phase.FORWARD and "_to_copy" in a.op]
    copies = [a for a in copies if a.size_bytes in [2 * w for w in weights]]
    assert sorted(a.size_bytes for a in copies) == sorted(2 * w for w in weights)
    assert most(copies) == len(weights)


# --- data parallel
def states(*uses: Use, ranks: int, dtype: torch.dtype = torch.float32) -> tuple[Trace, int]:
    """(trace, parameters, gradients and optimizer state when the last optimizer step begins)."""
    traced = trace(mlp(dtype, rows=4 * ranks), Plan(uses=uses, ranks=ranks), device="cuda")
    return traced, live(traced, span(traced, Phase.OPTIMIZER).start, *STATE)


def test_ddps_buckets_double_the_gradients_unless_they_are_views() -> None:
    peaks = [
        peak(states(make_use("ddp", {"bucket_view": view}), ranks=2)[0], Phase.OPTIMIZER)
        for view in (False, True)
    ]
    assert peaks[0] - peaks[1] == pytest.approx(4 * PARAMETERS, rel=0.02)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("stage", "whole", "shared"),
    [(1, 2, 14), (2, 2, 14), (3, 0, 16)],
)
def test_zero_keeps_what_its_paper_says(ranks: int, stage: int, whole: int, shared: int) -> None:
    """Bytes a parameter in mixed precision (Rajbhandari et al. 2020) when the optimizer begins. DeepSpeed's
    stage 1 has let go of other ranks' gradients by then, as stage 2 does while they come."""
    small = {"persist_elements": 1, "reduce_bucket_elements": 1}  # no buffers
    _, found = states(make_use("zero", {"stage": stage, "precision": "bf16", **small}), ranks=ranks)
    assert found == pytest.approx((whole + shared / ranks) * PARAMETERS, rel=0.12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_fsdp_keeps_sixteen_bytes_over_ranks(ranks: int) -> None:
    _, found = states(make_use("fsdp2", {}), ranks=ranks)
    assert found == pytest.approx(16 * PARAMETERS / ranks, rel=0.02, abs=512 * 60)


def test_without_synchronisation_fsdp_keeps_whole_gradients() -> None:
    """Sum of U between micro-batches instead of shards (26B parameters: 3.25 against 52 GB a rank)."""
    ranks, micro = 4, make_use("gradient-accumulation", {"micro_batches": 2})
    found = []
    for sync in ("every", "last"):
        traced, _ = states(make_use("fsdp2", {"sync": sync}), micro, ranks=ranks)
        between = span(traced, Phase.FORWARD).start
        found.append(live(traced, between, Category.GRADIENT, Category.TEMPORARY, Category.ACTIVATION))
    assert found[1] - found[0] == pytest.approx(4 * PARAMETERS * (1 - 1 / ranks), rel=0.10)


def test_without_resharding_all_groups_stay_whole_after_forward() -> None:
    found = []
    for reshard in (True, False):
        traced, _ = states(make_use("fsdp2", {"reshard": reshard}), ranks=4)
        found.append(live(traced, span(traced, Phase.BACKWARD).start))
    assert found[1] - found[0] == pytest.approx(4 * PARAMETERS, rel=0.25)


# --- pipelines: p stages, m micro-batches
STAGES, MICRO = 4, 8


def gpt(size: GptSize) -> Job:
    shape = (size.batch_size, size.length)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    return Job(
        name="gpt",
        build_model=lambda: Gpt(size),
        loss=loss,
        make_batch=lambda *_: torch.zeros(shape, dtype=torch.int64),
        batch_size=size.batch_size,
        blocks="blocks",
        head="head",
    )


@functools.cache
def staged(schedule: str, rank: int, stages: int = STAGES, virtual: int = 1, device: str = "cuda") -> Trace:
    size = GptSize(layers=4, width=32, heads=2, length=16, vocabulary=64, batch_size=MICRO)
    settings = {"stages": stages, "schedule": schedule, "virtual": virtual, "micro_batches": MICRO}
    plan = Plan(uses=(make_use("pipeline", settings),), ranks=stages)
    return trace(gpt(size), plan, device=device, rank=rank, steps=1)


def in_flight(traced: Trace) -> int:
    """What one operator of a block keeps once a micro-batch, most at once."""
    made = [
        a
        for a in traced.allocations
        if a.category is Category.ACTIVATION and a.op == "aten.gelu.default" and a.phase is Phase.FORWARD
    ]
    block = made[0].module
    return most(a for a in made if a.module == block)


@pytest.mark.parametrize("rank", range(STAGES))
def test_1f1b_has_p_minus_r_micro_batches_in_flight(rank: int) -> None:
    assert in_flight(staged("1f1b", rank)) == min(MICRO, STAGES - rank)


@pytest.mark.parametrize("rank", [0, STAGES - 1])
def test_gpipe_has_all_micro_batches_in_flight(rank: int) -> None:
    assert in_flight(staged("gpipe", rank)) == MICRO


def test_interleaving_costs_a_part_of_a_stage_more() -> None:
    """p (1 + (p - 1) / (p v)) of a rank's micro-batches, in chunks of 1 / v (Narayanan et al. 2021)."""
    p, v = 2, 2
    traced = staged("interleaved", 0, stages=p, virtual=v)
    made = [
        a for a in traced.allocations if a.category is Category.ACTIVATION and a.op == "aten.gelu.default"
    ]
    assert most(made) / v == p * (1 + (p - 1) / (p * v))


@pytest.mark.parametrize(("rank", "blocks"), [(0, {0, 3}), (1, {1, 2})])
def test_a_v_turns_back_on_the_last_rank(rank: int, blocks: set[int]) -> None:
    """The first and the last stage are one rank's (Qi et al. 2024)."""
    made = {a.module for a in staged("zero-bubble-v", rank, 2, 2).allocations if a.phase is Phase.SETUP}
    assert {int(m.split(".")[1]) for m in made if m.startswith("blocks.")} == blocks
    assert {"embed", "head"} <= made if rank == 0 else not {"embed", "head"} & made


def test_gloo_holds_what_is_sent_until_the_schedule_waits() -> None:
    """GPipe waits for all its sends at the end; with NCCL one of the gradients sent back is there at once."""
    held = {
        device: most(
            a
            for a in staged("gpipe", 1, 2, 1, device).allocations
            if a.phase is Phase.BACKWARD and a.requested_bytes == 16 * 32 * 4
        )
        for device in ("cpu", "cuda")
    }
    assert held["cpu"] - held["cuda"] == MICRO - 1


# --- other cuts
@functools.cache
def cut(name: str, degree: int, layers: int = 2, **settings: Any) -> Trace:
    size = GptSize(layers=layers, width=64, heads=4, length=32, vocabulary=512, batch_size=4)
    uses = (make_use(name, {"degree": degree, **settings}),) if degree > 1 else ()
    return trace(gpt(size), Plan(uses=uses, ranks=degree), device="cuda", steps=1)


@pytest.mark.parametrize("degree", [2, 4])
def test_a_vocabulary_in_parallel_cuts_the_logits(degree: int) -> None:
    whole = 4 * 32 * 512 * 4
    traced = cut("tensor-parallel", degree, vocabulary="parallel-loss")
    sizes = [a.requested_bytes for a in traced.allocations if a.phase is not Phase.SETUP]
    assert whole in [a.requested_bytes for a in cut("tensor-parallel", 1).allocations]
    assert whole // degree in sizes
    assert whole not in sizes


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize(("sequence", "whole", "shared"), [(False, 4, 12), (True, 2, 14)])
def test_tensor_parallelism_leaves_the_inputs_of_norms_and_products_whole(
    degree: int, sequence: bool, whole: int, shared: int
) -> None:
    """s b h (10 + 24 / t) without the dropout that this layer has not and in float32: (4 + 12 / t) elements.
    In sequence parallel PyTorch keeps the two gathered inputs that Megatron gathers again. Beside them 16 B a
    token of statistics, 4 B a head and token of the attention, 1 KiB of its random state."""
    kept_by = [
        live(traced, span(traced, Phase.BACKWARD).start, Category.ACTIVATION)
        for layers in (3, 2)
        for traced in [cut("tensor-parallel", degree, layers, sequence=sequence)]
    ]
    tokens, share = 4 * 32, 1 / degree if sequence else 1
    elements = 4 * 64 * (whole + shared / degree)
    expected = tokens * (elements + 16 * share + 4 * 4 / degree) + 1024
    assert kept_by[0] - kept_by[1] == pytest.approx(expected, abs=4 * 512)  # four small ones are rounded


@pytest.mark.parametrize("degree", [2, 4])
def test_context_parallelism_cuts_the_tokens(degree: int) -> None:
    traced, whole = cut("context-parallel", degree), 4 * 32 * 512 * 4
    made = {a.requested_bytes for a in traced.allocations if a.phase is not Phase.SETUP}
    assert whole // degree in made
    assert whole not in made


# --- the device
@pytest.mark.parametrize(
    ("bytes_", "reserved"),
    [
        (1, 2 * MIB),
        (1 * MIB, 2 * MIB),
        (1 * MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_segment_of_the_caching_allocator(bytes_: int, reserved: int) -> None:
    one = Allocation(
        start=0,
        end=None,
        size_bytes=-(-bytes_ // 512) * 512,
        category=Category.TEMPORARY,
        phase=Phase.FORWARD,
        step=0,
        module="",
        op="",
        requested_bytes=bytes_,
    )
    assert replay((one,)).reserved_peak_bytes == reserved


@pytest.mark.parametrize(("card", "bytes_"), [("A100-80GB-SXM", 8.125 * MIB), ("H100-SXM", 32 * MIB)])
def test_the_workspace_of_cublas(card: str, bytes_: float) -> None:
    """2 x 4096 KiB and 8 x 16 KiB before Hopper, 32 MiB on it; one for the caller's thread, one for
    autograd's."""
    plain = trace(mlp(), Plan(), device="cuda")
    device = machine(card).device
    more = with_workspaces(plain, device).allocations[len(plain.allocations) :]
    assert [a.size_bytes for a in more] == [bytes_, bytes_]
