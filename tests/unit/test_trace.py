"""The trace of a step on fake tensors: every byte of a network small enough to work out by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import BATCH, LENGTH, VOCABULARY, WIDTH, Block, regression, words
from torch import nn
from torch.nn import functional

from memfit.cost.memory import levels, memory_profile
from memfit.techniques import compiled_regions
from memfit.trace.source_location import library_line, user_place
from memfit.trace.tracer import fake_model, trace
from memfit.trace.truncated_model import with_blocks
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, Use, use
from memfit.types.trace import Allocation, Category, Phase, Trace, rounded

# 8 -> 16 -> 4 in float32: weights 512 and 256 B, biases 64 and 16 B (rounded to 64)
PARAMETER_BYTES = 512 + 64 + 256 + 64


def by_category(found: Trace, step: int | None = None) -> dict[str, int]:
    total = Counter[str]()
    for a in found.allocations:
        if step is None or a.step == step:
            total[a.category] += a.size_bytes
    return dict(total)


@pytest.fixture(scope="module")
def plain() -> Trace:
    return trace(regression(), Plan())


@pytest.mark.parametrize(("device", "input_bytes"), [("cpu", 4 + 64 * 256 * 4), ("cuda", 1024 * 4 + 16 * 4)])
def test_an_expanded_or_sliced_input_takes_on_a_device_what_its_copy_takes(
    device: str, input_bytes: int
) -> None:
    def make_batch(step: int, seed: int) -> Any:
        return {"mask": torch.ones(1).expand(16, 64), "part": torch.zeros(64, 256)[:4, :4]}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["part"]).mean() * batch["mask"].mean()

    job = Job(name="x", build_model=lambda: nn.Linear(4, 4), make_batch=make_batch, loss=loss, batch_size=16)
    found = trace(job, Plan(), device=device)
    sizes = [a.size_bytes for a in found.allocations if a.category == Category.INPUT and a.step == 0]
    assert sum(sizes) == pytest.approx(input_bytes, abs=2 * 512)  # rounded by the allocator


# --- models with few blocks


class Counted(nn.Module):
    """A block that counts how many of its kind have built their contents."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).built += 1
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class TwoStacks(nn.Module):
    """Two stacks of blocks of one class, of which the second is the longer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Counted() for _ in range(2))
        self.blocks = nn.ModuleList(Counted() for _ in range(6))
        self.last = Counted()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.blocks, self.last):
            x = block(x)
        return self.head(x)


def test_blocks_that_a_short_model_drops_are_not_built_beside_others_of_their_class() -> None:
    job = dataclasses.replace(regression(), build_model=TwoStacks)
    fake_model(job)
    Counted.built = 0
    short = trace(with_blocks(job, 3), Plan())
    assert Counted.built == 2 + 3 + 1
    assert short.parameter_count == 6 * (8 * 8 + 8) + 8 * 4 + 4


# --- categories


def test_parameter_gradient_and_optimizer_bytes_match_a_hand_calculation(plain: Trace) -> None:
    assert plain.parameter_count == plain.trainable_count == 8 * 16 + 16 + 16 * 4 + 4
    assert by_category(plain)[Category.PARAMETER] == PARAMETER_BYTES
    assert by_category(plain, 1)[Category.GRADIENT] == PARAMETER_BYTES
    # AdamW: two moments and a step count (4 B, rounded to 64) for each of 4 tensors, made once
    assert by_category(plain, 0)[Category.OPTIMIZER_STATE] == 2 * PARAMETER_BYTES + 4 * 64
    assert Category.OPTIMIZER_STATE not in by_category(plain, 1)


def test_activation_and_input_bytes_match_a_hand_calculation(plain: Trace) -> None:
    # ReLU keeps its output (32 x 16), the loss the prediction (32 x 4); the loss itself lives on, in the
    # storage of its unreduced self (seen with the counting allocator)
    assert by_category(plain, 1)[Category.ACTIVATION] == 32 * 16 * 4 + 2 * (32 * 4 * 4)
    assert by_category(plain, 1)[Category.INPUT] == 32 * 8 * 4 + 32 * 4 * 4


def test_only_parameters_optimizer_state_and_inputs_stay_allocated(plain: Trace) -> None:
    alive = {a.category for a in plain.allocations if a.end is None}
    assert alive <= {Category.PARAMETER, Category.OPTIMIZER_STATE, Category.INPUT}
    _, live = levels(plain)
    inputs = 32 * 8 * 4 + 32 * 4 * 4
    assert live[-1] in (3 * PARAMETER_BYTES + 4 * 64, 3 * PARAMETER_BYTES + 4 * 64 + inputs)


def test_the_setup_peak_holds_only_the_parameters(plain: Trace) -> None:
    assert memory_profile(plain, Calibration()).phase_peak_bytes["setup"] == PARAMETER_BYTES


def test_a_dtype_conversion_below_autograd_is_traced_as_a_copy() -> None:
    """DTensor's own code runs below autograd, where the trace sees ``to`` and the like as they are called."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = functional.mse_loss(model(batch[0]), batch[1])
        with torch._C._AutoDispatchBelowAutograd():
            batch[0].to(torch.float64).reshape(-1)
        return out

    found = trace(dataclasses.replace(regression(), loss=loss), Plan())
    made = [a for a in found.allocations if a.op == "aten._to_copy.default"]
    assert [a.size_bytes for a in made] == [8 * 32 * 8] * 2


def test_cuda_rounds_every_storage_to_512_bytes() -> None:
    found = trace(regression(), Plan(), device="cuda")
    assert all(a.size_bytes % 512 == 0 for a in found.allocations)
    assert by_category(found)[Category.PARAMETER] == 4 * 512
    assert (rounded(1, "cpu"), rounded(64, "cpu"), rounded(513, "cuda")) == (64, 64, 1024)


def test_phases_follow_each_other_without_a_gap(plain: Trace) -> None:
    assert [s.phase for s in plain.spans if s.step == 1 and s.phase is not Phase.SETUP] == [
        Phase.FORWARD,
        Phase.BACKWARD,
        Phase.OPTIMIZER,
    ]
    assert all(one.end == other.start for one, other in zip(plain.spans, plain.spans[1:], strict=False))
    assert all(a.end is None or a.end > a.start for a in plain.allocations)


# --- modules, operators


def test_storages_belong_to_the_module_that_made_them(plain: Trace) -> None:
    forward = {a.op: a.module for a in plain.allocations if a.step == 1 and a.phase is Phase.FORWARD}
    assert forward["aten.relu.default"] == "1"
    gradients = [a for a in plain.allocations if a.category is Category.GRADIENT and a.step == 1]
    owner = {a.size_bytes: a.module for a in gradients}
    assert owner[512] == "0"
    assert owner[256] == "2"


def test_a_matrix_product_counts_two_flops_per_multiplication(plain: Trace) -> None:
    products = [o for o in plain.ops if o.step == 1 and o.flops]
    forward = sum(o.flops for o in products if o.phase is Phase.FORWARD)
    backward = sum(o.flops for o in products if o.phase is Phase.BACKWARD)
    first, second = 2 * 32 * 8 * 16, 2 * 32 * 16 * 4
    assert forward == first + second
    assert backward == first + 2 * second  # the gradient of the input is not needed


def test_moved_bytes_count_inputs_and_outputs_once(plain: Trace) -> None:
    relu = next(o for o in plain.ops if o.op == "aten.relu.default")
    assert (relu.moved_bytes, relu.dtype) == (2 * 32 * 16 * 4, "float32")


def test_code_in_a_folder_that_is_called_torch_is_the_users() -> None:
    code = compile("places = user_place(), library_line()", "/home/me/torch/model.py", "exec")
    names: dict[str, Any] = {"user_place": user_place, "library_line": library_line}
    exec(code, names)
    assert names["places"] == ("/home/me/torch/model.py:1", "model.py:1")


def test_user_lines_are_recorded_only_on_request() -> None:
    found = trace(regression(), Plan(), lines=True)
    assert any(a.line.startswith("tiny.py:") for a in found.allocations)
    assert all(not a.line for a in trace(regression(), Plan()).allocations)
    assert all(a.line for a in found.allocations if a.phase is Phase.FORWARD)
    assert not any(a.line for a in found.allocations if a.phase is Phase.OPTIMIZER)  # not the user's code


def test_backward_allocations_have_the_module_and_line_of_their_forward() -> None:
    found = trace(words(blocks=1), Plan(), lines=True)
    first = [a for a in found.allocations if a.phase is Phase.BACKWARD and a.step == 1][:5]
    assert [(a.op.split(".")[1], a.module) for a in first] == [
        ("ones_like", ""),
        ("nll_loss_backward", ""),
        ("_log_softmax_backward_data", ""),
        ("mm", "head"),
        ("mm", "head"),
    ]
    forward = {a.line for a in found.allocations if a.phase is Phase.FORWARD and a.module == "head"}
    assert {a.line for a in first[3:]} == forward


def test_parameters_gradients_and_state_belong_to_the_module_that_holds_the_parameter() -> None:
    found = trace(words(blocks=1), Plan())
    for category, copies in ((Category.PARAMETER, 1), (Category.GRADIENT, 1), (Category.OPTIMIZER_STATE, 2)):
        sizes = [
            a.size_bytes
            for a in found.allocations
            if a.category is category and a.module == "head" and a.step == 0 and a.size_bytes > 64
        ]
        assert sorted(sizes) == sorted([VOCABULARY * WIDTH * 4, VOCABULARY * 4] * copies)


# --- micro-batches


def test_only_three_of_many_equal_micro_steps_are_traced() -> None:
    found = trace(words(), Plan(uses=(use("gradient-accumulation", micro_batches=8),)))
    forwards = [s for s in found.spans if s.step == 1 and s.phase is Phase.FORWARD]
    assert (len(forwards), found.repeated_micro_steps) == (3, 5)


def test_a_trace_without_update_has_no_optimizer_state() -> None:
    found = trace(words(), Plan(), steps=1, update=False)
    assert Category.OPTIMIZER_STATE not in by_category(found)


# --- the same step, whatever the plan


def peaks(job: Job, *uses: Use) -> dict[str, int]:
    profile = memory_profile(trace(job, Plan(uses=uses)), Calibration())
    return {**profile.phase_peak_bytes, "peak": profile.peak_bytes}


@pytest.mark.parametrize(
    "uses",
    [(), (use("activation-checkpointing", every=1),), (use("bf16-autocast"),)],
    ids=lambda u: Plan(uses=u).label,
)
def test_phase_peaks_grow_linearly_with_the_number_of_blocks(uses: tuple[Use, ...]) -> None:
    two, three, five = (peaks(with_blocks(words(5), n), *uses) for n in (2, 3, 5))
    for phase in ("forward", "backward", "optimizer"):
        assert two[phase] + 3 * (three[phase] - two[phase]) == five[phase], phase


def test_a_model_can_be_cut_to_fewer_blocks() -> None:
    assert len(fake_model(with_blocks(words(5), 2)).blocks) == 2
    assert peaks(with_blocks(words(5), 5)) == peaks(words(5))


def test_initialisers_that_redraw_until_in_range_end_on_fake_tensors() -> None:
    def build() -> torch.nn.Module:
        model = words(5).build_model()
        for param in model.parameters():
            torch.nn.init.trunc_normal_(param)
        return model

    job = dataclasses.replace(words(5), build_model=build)
    assert len(fake_model(job).blocks) == 5
    assert peaks(with_blocks(job, 2)) == peaks(with_blocks(words(5), 2))


def test_a_recomputed_block_keeps_a_generator_state_but_no_inner_activations() -> None:
    plain, found = (
        trace(words(), Plan()),
        trace(words(), Plan(uses=(use("activation-checkpointing", every=1),))),
    )
    states = [a for a in found.allocations if a.op == "get_rng_state" and a.step == 1]
    states = [a for a in states if a.phase is Phase.FORWARD]  # backward makes its own as well
    assert [a.size_bytes for a in states] == [5056] * 3
    wide = BATCH * LENGTH * 4 * WIDTH * 4  # inside a block, 4 x WIDTH

    def kept_wide(t: Trace) -> int:
        return sum(a.category is Category.ACTIVATION and a.size_bytes == wide for a in t.allocations)

    assert kept_wide(plain) > 0
    assert kept_wide(found) == 0


def test_stepping_in_backward_keeps_few_gradients_alive_at_once() -> None:
    def most_at_once(t: Trace) -> int:
        grads = [a for a in t.allocations if a.category is Category.GRADIENT and a.step == 1]
        return max(sum(_alive(a, at.start) for a in grads) for at in grads)

    assert most_at_once(trace(words(), Plan())) == len(list(fake_model(words()).parameters()))
    assert most_at_once(trace(words(), Plan(uses=(use("optimizer-in-backward"),)))) <= 4


def _alive(a: Allocation, at: int) -> bool:
    return a.start <= at and (a.end is None or a.end > at)


def test_offloaded_and_restored_bytes_are_counted() -> None:
    found = trace(words(), Plan(uses=(use("activation-offload", to="disk", minimum_kib=1),)))
    wide = BATCH * LENGTH * 4 * WIDTH * 4
    assert found.offloaded_bytes >= 3 * 2 * wide  # before and after GELU in each of three blocks
    assert found.restored_bytes > found.offloaded_bytes  # one norm's output is kept by several layers
    assert trace(words(), Plan()).offloaded_bytes == 0


@pytest.mark.parametrize("precision", [(), (use("bf16-parameters", rounding="master"),)])
def test_tied_weights_are_one_storage_before_and_after_a_change_of_dtype(precision: tuple[Use, ...]) -> None:
    tied, free = trace(words(tied=True), Plan(uses=precision)), trace(words(), Plan(uses=precision))
    assert free.parameter_count - tied.parameter_count == VOCABULARY * WIDTH
    size = VOCABULARY * WIDTH * (2 if precision else 4)

    def tables(t: Trace) -> int:
        kept = (a for a in t.allocations if a.category is Category.PARAMETER and a.end is None)
        return sum(a.size_bytes == size for a in kept)

    assert (tables(tied), tables(free)) == (1, 2)


def test_buffers_change_their_dtype_with_the_model() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).double().float()

    found = trace(regression(build), Plan())
    kept = [a for a in found.allocations if a.category is Category.PARAMETER and a.end is None]
    # two Linears as before, weight and bias of the norm, running mean, variance and the count of batches
    assert sum(a.size_bytes for a in kept) == PARAMETER_BYTES + 5 * 64


# --- what a trace cannot know


def test_values_that_item_returns_are_recorded_as_assumptions() -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        difference = model(batch[0]) - batch[1]
        scale = difference.detach().abs().max().item()
        count = int(torch.ones(3, dtype=torch.long).sum().item())
        return difference.square().mean() * scale / count if (batch[0] > 0).any() else difference.sum()

    found = trace(dataclasses.replace(regression(), loss=loss), Plan())
    assert len(found.assumptions) == 3
    answers = " ".join(found.assumptions)
    for said in (
        "torch.float32 answered 1.0 at test_trace.py:",
        "int64 answered 3, as in the batch",
        "bool answered True",
    ):
        assert said in answers


def test_a_plan_that_does_not_suit_the_job_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no repeated blocks"):
        trace(
            regression(lambda: nn.Sequential(nn.Linear(8, 4))),
            Plan(uses=(use("activation-checkpointing", every=1),)),
        )


def test_a_trace_restores_the_torch_functions_it_patches() -> None:
    before = nn.Module._apply, torch.get_rng_state
    trace(regression(), Plan())
    assert (nn.Module._apply, torch.get_rng_state) == before
    assert type(torch.ones(1)) is torch.Tensor


# --- traces for another device

HEADS, QUERIES, DIM = 2, 128, 16


class Attention(nn.Module):
    def __init__(self, mask: torch.Tensor | None, kv_heads: int, dim: int = DIM) -> None:
        super().__init__()
        self.mask, self.kv_heads = mask, kv_heads
        self.inner = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        keys = x[:, : self.kv_heads]
        return functional.scaled_dot_product_attention(
            x, keys, keys, attn_mask=self.mask, enable_gqa=self.kv_heads != HEADS
        )


def attention(mask: torch.Tensor | None = None, kv_heads: int = HEADS) -> Job:
    return Job(
        name="attention",
        build_model=lambda: Attention(mask, kv_heads),
        make_batch=lambda step, seed: torch.ones(1, HEADS, QUERIES, DIM),
        loss=lambda model, x: model(x).float().square().mean(),
        batch_size=1,
    )


def kernels(found: Trace) -> set[str]:
    return {o.op.split(".")[1] for o in found.ops if "scaled_dot_product" in o.op}


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_half_precision_attention_on_cuda_uses_flash_without_a_square_matrix(kv_heads: int) -> None:
    found = trace(attention(kv_heads=kv_heads), Plan(uses=(use("bf16-autocast"),)), device="cuda")
    assert kernels(found) == {
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    }
    assert all(a.size_bytes < HEADS * QUERIES * QUERIES * 2 for a in found.allocations)


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, QUERIES, QUERIES, dtype=torch.bool), torch.zeros(QUERIES, QUERIES)]
)
def test_masked_attention_on_cuda_uses_the_memory_efficient_kernel(mask: torch.Tensor) -> None:
    found = trace(attention(mask), Plan(), device="cuda")
    assert kernels(found) == {
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    }


@pytest.mark.parametrize(
    ("technique", "kernel"),
    [
        (None, "_scaled_dot_product_efficient_attention"),
        ("bf16-autocast", "_scaled_dot_product_flash_attention"),
    ],
)
def test_attention_inside_torchs_own_encoder_layer_uses_the_kernel_of_cuda(
    technique: str | None, kernel: str
) -> None:
    """Its insides are hidden from modes of torch functions."""
    job = dataclasses.replace(
        attention(),
        build_model=lambda: nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True),
        make_batch=lambda step, seed: torch.ones(1, QUERIES, DIM),
    )
    found = trace(job, Plan(uses=(use(technique),) if technique else ()), device="cuda")
    assert kernel in kernels(found)
    assert {o.op for o in found.ops if "softmax" in o.op or "bernoulli" in o.op} == set()


@pytest.mark.parametrize("technique", [None, "bf16-autocast"])
def test_attention_with_a_head_dim_that_no_fused_kernel_takes_keeps_its_scores(technique: str | None) -> None:
    odd = attention(torch.zeros(QUERIES, QUERIES))
    job = dataclasses.replace(
        odd,
        build_model=lambda: nn.Sequential(
            nn.Linear(DIM, 6), Attention(torch.zeros(QUERIES, QUERIES), HEADS, 6)
        ),
    )
    found = trace(job, Plan(uses=(use(technique),) if technique else ()), device="cuda")
    assert kernels(found) == set()
    assert max(a.size_bytes for a in found.allocations) >= HEADS * QUERIES * QUERIES * 4


def test_a_kernel_of_attention_that_the_job_disables_is_not_used() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return model(x).square().mean()

    assert kernels(trace(dataclasses.replace(attention(), loss=loss), Plan(), device="cuda")) == set()


def test_values_of_another_head_dim_than_the_queries_use_the_memory_efficient_kernel() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = model.inner(x)
        return functional.scaled_dot_product_attention(x, x, x[..., :8]).float().square().mean()

    found = trace(
        dataclasses.replace(attention(), loss=loss), Plan(uses=(use("bf16-autocast"),)), device="cuda"
    )
    assert "_scaled_dot_product_efficient_attention" in kernels(found)


def test_single_precision_attention_on_cuda_uses_the_memory_efficient_kernel() -> None:
    assert "_scaled_dot_product_efficient_attention" in kernels(trace(attention(), Plan(), device="cuda"))


def test_cpu_attention_uses_the_cpu_kernel_and_its_flops_are_counted() -> None:
    found = trace(attention(), Plan())
    assert kernels(found) == {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    }
    work = {o.op: o.flops for o in found.ops if "flash" in o.op}
    forward = 2 * 2 * HEADS * QUERIES * QUERIES * DIM  # two products
    assert sorted(work.values()) == [forward, forward * 5 // 2]


def test_a_compiled_model_calls_the_cpu_kernel_of_attention_as_it_is() -> None:
    """Inductor does not fuse the kernels of attention (torch/_inductor/lowering.py)."""
    plan = Plan(uses=(use("compile", scope="model"),))
    assert kernels(trace(attention(), plan)) == kernels(trace(attention(), Plan()))


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids="-then-".join)
def test_a_compiled_model_runs_the_kernels_of_its_device_whatever_was_traced_before(devices: Any) -> None:
    kernel = {
        "cpu": "_scaled_dot_product_flash_attention_for_cpu",
        "cuda": "_scaled_dot_product_flash_attention",
    }
    plan = Plan(uses=(use("bf16-autocast"), use("compile", scope="model")))
    for device in devices:
        found = kernels(trace(attention(), plan, device=device))
        assert found == {kernel[device], f"{kernel[device]}_backward"}


def test_the_test_block_has_a_hidden_layer_of_four_times_its_width() -> None:
    assert Block().inner[1].out_features == 4 * WIDTH


def test_pinning_host_memory_adds_no_allocation(plain: Trace) -> None:
    """FSDP2 pins offloaded parameters where an engine's own step asks for it."""
    pinning = dataclasses.replace(
        regression(), loss=lambda model, b: functional.mse_loss(model(b[0].pin_memory()), b[1])
    )
    assert by_category(trace(pinning, Plan())) == by_category(plain)
    assert torch.Tensor.pin_memory is torch._C.TensorBase.pin_memory


def test_a_compiled_block_that_ends_in_a_view_makes_no_copy() -> None:
    """A linear layer's result of three dimensions is a view of a matrix: no copy is made of it."""

    def build() -> nn.Module:
        blocks = (nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3))
        return nn.Sequential(*blocks)

    def batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(4, 16, 8), torch.zeros(4, 16, 8)

    job = dataclasses.replace(regression(), build_model=build, make_batch=batch, batch_size=4)
    compiled = trace(job, Plan(uses=(use("compile", scope="blocks"),)), device="cuda")
    assert not [a for a in compiled.allocations if "clone" in a.op]
    eager = trace(job, Plan(), device="cuda")
    peaks = [memory_profile(t, Calibration()).peak_bytes for t in (compiled, eager)]
    assert peaks[0] <= peaks[1]


class _Product(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T @ x


class _Squared(nn.Module):
    """A layer, and two products if the submodule, the flag or the argument says so."""

    def __init__(self, flag: bool, submodule: bool) -> None:
        super().__init__()
        self.layer, self.flag = nn.Linear(8, 8), flag
        self.last = _Product() if submodule else nn.Identity()

    def forward(self, x: torch.Tensor, argument: bool) -> torch.Tensor:
        x = self.last(self.layer(x))
        return x @ x.T @ x if self.flag or argument else x


class _Alternating(nn.Module):
    """Four blocks of which the second and the fourth compute products."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.blocks = nn.ModuleList(
            _Squared(self._applies("flag", i), self._applies("submodule", i)) for i in range(4)
        )

    def _applies(self, reason: str, index: int) -> bool:
        return self.reason == reason and index % 2 == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if self._applies("changed flag", i):
                block.flag = True
            x = block(x, self._applies("argument", i))
        return x


@pytest.mark.parametrize("reason", ["flag", "submodule", "argument", "changed flag"])
def test_compiled_blocks_that_are_alike_in_shapes_only_run_their_own_operators(reason: str) -> None:
    job = dataclasses.replace(
        regression(),
        build_model=lambda: _Alternating(reason),
        make_batch=lambda step, seed: (torch.zeros(32, 8), torch.zeros(32, 8)),
    )
    eager, compiled = (
        sum(o.op in ("aten.mm.default", "aten.addmm.default") for o in trace(job, Plan(uses=uses)).ops)
        for uses in ((), (use("compile", scope="blocks"),))
    )
    assert compiled == eager


def test_compiled_blocks_that_differ_only_in_their_number_share_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    inner = compiled_regions.GraphPair.__init__
    monkeypatch.setattr(compiled_regions.GraphPair, "__init__", lambda *args: made.append(inner(*args)))

    class Numbered(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.layer, self.index = nn.Linear(8, 8), index

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()  # type: ignore[no-any-return]

    job = dataclasses.replace(
        regression(),
        build_model=lambda: nn.Sequential(*(Numbered(i) for i in range(6))),
        make_batch=lambda step, seed: (torch.zeros(32, 8), torch.zeros(32, 8)),
    )
    trace(job, Plan(uses=(use("compile", scope="blocks"),)))
    assert len(made) == 2  # only the first has an input without a gradient
