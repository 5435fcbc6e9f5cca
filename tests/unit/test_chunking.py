"""Chunking: which axes are found to be cuttable, and that cutting changes memory and not results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from memfit.catalog import machine
from memfit.cost.memory import memory_profile
from memfit.jobs.builtin.alphafold.evoformer import EvoformerBlock, RowAttention, TriangleAttention, Widths
from memfit.jobs.registry import load
from memfit.jobs.training_step import TrainingStep
from memfit.model.chunk_analysis import find_cuts, first_calls, worth_cutting
from memfit.planner import single_device
from memfit.planner.evaluate import Predictor
from memfit.planner.request import Request, job_facts
from memfit.planner.selection import Objective
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.trace.tracer import trace
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate, ReasonKind
from memfit.types.trace import Phase, Trace

WIDTHS = Widths(
    c_m=24,
    c_z=16,
    msa_heads=2,
    msa_head_width=12,
    pair_heads=2,
    pair_head_width=8,
    triangle=16,
    outer=6,
    transition=2,
    dropout=(0.0, 0.0),
)


def _job(build: Callable[[], nn.Module], *shape: int) -> Job:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(step))}

    return Job(
        name="x",
        build_model=lambda: nn.Sequential(build()),
        make_batch=batch,
        loss=lambda model, given: model(given["x"]).square().mean(),
        batch_size=shape[0],
    )


def _axes(build: Callable[[], nn.Module], *shape: int) -> tuple[tuple[int, ...], int] | None:
    job = _job(build, *shape)
    found = find_cuts(job.build_model(), first_calls(job, job.build_model()), 0)
    return next(((tuple(c.axes.values()), c.out_axis) for n, c in found.items() if n == "0"), None)


class _Of(nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call, self.layer = call, nn.Linear(6, 6)
        nn.init.zeros_(self.layer.weight)  # as the last layers of residual branches are initialised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.call(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("call", "shape", "wanted"),
    [
        (lambda x: x.relu().exp(), (2, 40, 30, 6), ((1,), 1)),  # elementwise: the longest axis
        (lambda x: x.softmax(1).exp(), (2, 40, 30, 6), ((2,), 2)),  # softmax along 1: only axis 2
        (lambda x: x.transpose(1, 2).exp().relu(), (2, 40, 30, 6), ((1,), 2)),  # the axis moves
        (lambda x: x.softmax(1).softmax(2), (4, 40, 30, 6), ((0,), 0)),  # only samples are left
        (lambda x: x.cumsum(1).softmax(0).exp() @ x.transpose(1, 2)[..., :6] @ x[:, :6], (4, 30, 6), None),
        (lambda x: nn.functional.dropout(x.relu()).exp(), (2, 40, 6), None),  # slices draw other numbers
    ],
)
def test_axes_that_can_be_cut_are_found_by_trial(call: Any, shape: Any, wanted: Any) -> None:
    assert _axes(lambda: _Of(call), *shape) == wanted


class _Block(nn.Module):
    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.block = EvoformerBlock(widths)

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        m, z = self.block(given["m"], given["z"], given["rows"], given["pairs"])
        return m.square().mean() + z.square().mean()  # type: ignore[no-any-return]


def _evoformer(residues: int, rows: int, widths: Widths = WIDTHS) -> Job:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        numbers = torch.Generator().manual_seed(step)
        pairs = torch.randn(1, residues, residues, widths.c_z, generator=numbers)
        held = torch.ones(1, residues)
        held[:, -3:] = 0
        return {
            "m": torch.randn(1, rows, residues, widths.c_m, generator=numbers),
            "z": pairs,
            "rows": held.unsqueeze(1).repeat(1, rows, 1),
            "pairs": held.unsqueeze(1) * held.unsqueeze(2),
        }

    return Job(
        name="evoformer",
        build_model=lambda: _Block(widths),
        make_batch=batch,
        loss=lambda model, given: model(given),
        batch_size=1,
    )


@pytest.mark.parametrize("columns", [False, True], ids=["evoformer", "extra MSA"])
def test_gradients_of_a_chunked_evoformer_block_equal_those_of_the_whole_block(columns: bool) -> None:
    job = _evoformer(20, 9, dataclasses.replace(WIDTHS, global_columns=columns))
    found = find_cuts(job.build_model(), first_calls(job, job.build_model()), 20_000)
    names = {n.removeprefix("block.") for n in found}
    assert {"pairs.starting.attention", "pairs.ending.attention", "outer.product"} <= names
    assert found["block.outer.product"].out_axis == 1
    plain, cut = (_gradients(job, Plan(uses=uses)) for uses in ((), (make_use("chunking", {"parts": 32}),)))
    assert plain.keys() == cut.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(cut[name], grad, rtol=1e-4, atol=1e-6)


def _gradients(job: Job, plan: Plan) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    step = TrainingStep(job, plan)
    for parameter in step.model.parameters():  # zero weights would hide differences
        nn.init.normal_(parameter, std=0.3)
    step.job.loss(step.model, job.make_batch(0, 0)).backward()
    return {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("rows", "residues", "width"), [(128, 256, 256), (512, 384, 256), (1024, 256, 64), (5120, 384, 64)]
)
def test_row_attention_is_cut_by_rows_even_if_a_length_equals_the_channel_count(
    rows: int, residues: int, width: int
) -> None:
    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        return {
            "m": torch.zeros(1, rows, residues, width),
            "z": torch.zeros(1, residues, residues, 128),
            "rows": torch.ones(1, rows, residues),
        }

    job = Job(
        name="row",
        make_batch=batch,
        batch_size=1,
        build_model=lambda: RowAttention(Widths(c_m=width, c_z=128, msa_heads=8, msa_head_width=width // 8)),
        loss=lambda model, given: model(given["m"], given["z"], given["rows"]).mean(),
    )
    with FakeTensorMode():
        model = job.build_model()
    found = find_cuts(model, first_calls(job, model), 2**28)
    assert dict(found["attention"].axes) == {0: 1, 1: 1}
    assert found["attention"].out_axis == 1


def test_peak_memory_falls_with_the_number_of_slices() -> None:
    job = _evoformer(64, 8)

    def peak(**settings: int) -> int:
        uses = (make_use("chunking", settings),) if settings else ()
        return memory_profile(trace(job, Plan(uses=uses)), Calibration()).peak_bytes

    peaks = [peak(), peak(parts=4), peak(parts=16)]
    assert peaks[0] > 1.5 * peaks[1] > 1.5 * peaks[2]


def test_chunking_is_refused_for_a_model_without_modules_worth_cutting() -> None:
    assert worth_cutting(_evoformer(64, 8), _evoformer(64, 8).build_model())
    flat = _job(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU()), 8, 40, 6)
    assert not worth_cutting(flat, flat.build_model())
    with pytest.raises(UserError, match="independent slices"):
        TrainingStep(flat, Plan(uses=(make_use("chunking", {"mib": 64}),)))


class _Along(nn.Module):
    """Attention along one of two axes; only a tuple says which."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order, self.qkv = order, nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.permute(self.order)).chunk(3, -1)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).permute(self.order)


class _Reaching(nn.Module):
    """Each position depends on itself and on the positions ``far`` away."""

    def __init__(self, far: int) -> None:
        super().__init__()
        self.up = nn.Conv1d(8, 80, 3, padding=far, dilation=far)
        self.down = nn.Conv1d(80, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def _cuts(layers: list[nn.Module], shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    model = nn.Sequential(*layers)
    batch = torch.randn(shape)
    job = Job(
        name="it",
        build_model=lambda: model,
        make_batch=lambda step, seed: {"x": batch},
        loss=lambda m, b: m(b["x"]).square().mean(),
        batch_size=shape[0],
    )
    found = find_cuts(model, first_calls(job, model), 0)
    return {name: (cut.axes[cut.first], cut.out_axis) for name, cut in found.items()}


def test_modules_of_one_class_that_differ_only_in_a_tuple_are_tried_separately() -> None:
    found = _cuts([_Along((0, 1, 2, 3)), _Along((0, 2, 1, 3))], (2, 40, 40, 16))
    assert (found["0"], found["1"]) == ((1, 1), (2, 2))


class _Around(nn.Module):
    """Applies a module between two layers; only the class of that module says what it does."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(8, 256), middle, nn.Linear(256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.middle(self.up(x)).exp())  # type: ignore[no-any-return]


class _RunningSum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


class _Squeezed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze()


def test_modules_that_differ_only_in_the_class_of_a_submodule_are_tried_separately() -> None:
    found = _cuts([_Around(nn.Identity()), _Around(_RunningSum())], (2, 40, 8))
    assert found["0"] == (1, 1)
    assert "1" not in found


def test_a_module_that_drops_the_axis_of_a_slice_of_one_element_is_not_cut() -> None:
    assert "0" not in _cuts([_Around(_Squeezed())], (2, 40, 8))


class _Biased(nn.Module):
    """Positions are independent unless the softmax runs along them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 256), nn.Linear(256, 8)

    def forward(self, x: torch.Tensor, bias: torch.Tensor, along: int = 2) -> torch.Tensor:
        return self.down((self.up(x) + bias.mean(-1, keepdim=True)).softmax(along))  # type: ignore[no-any-return]


class _CallsBiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = _Biased()

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(given["x"], given["bias"])  # type: ignore[no-any-return]


def test_calls_that_differ_from_the_first_give_the_results_of_the_whole_module() -> None:
    numbers = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(shape, generator=numbers) for shape in ((2, 40, 8), (40, 16)))
    job = Job(
        name="biased",
        build_model=_CallsBiased,
        make_batch=lambda step, seed: {"x": x, "bias": bias},
        loss=lambda model, given: model(given).square().mean(),
        batch_size=2,
    )
    layer: Any = TrainingStep(job, Plan(uses=(make_use("chunking", {"parts": 16}),))).model.layer
    slices: list[int] = []
    layer.up.register_forward_hook(lambda module, args, out: slices.append(out.shape[1]))
    calls: dict[str, tuple[bool, Callable[[Any], torch.Tensor]]] = {
        "as first": (True, lambda call: call(x, bias)),
        "another batch size": (True, lambda call: call(torch.cat([x, x]), bias)),
        "fewer positions": (True, lambda call: call(x[:, :13], bias[:13])),
        "by keyword": (False, lambda call: call(x, bias=bias)),
        "in another order": (False, lambda call: call(bias=bias, x=x)),
        "along positions": (False, lambda call: call(x, bias, 1)),
        "one bias for all positions": (False, lambda call: call(x, bias[:1])),
        "a bias for each sample": (False, lambda call: call(x, bias.expand(2, 40, 16))),
        "no positions": (False, lambda call: call(x[:, :0], bias[:0])),
    }
    for name, (is_cut, run) in calls.items():
        expected = run(functools.partial(_Biased.forward, layer))
        slices.clear()
        torch.testing.assert_close(run(layer), expected, msg=name)
        assert (len(slices) > 1) == is_cut, name


def test_axes_coupled_by_near_or_far_positions_are_not_cut() -> None:
    near, far = _Reaching(1), _Reaching(32)
    assert _cuts([nn.Sequential(nn.Conv1d(8, 80, 1), nn.Conv1d(80, 8, 1))], (2, 8, 300))["0"] == (2, 2)
    for layers in ([near], [far], [far, near]):
        assert all(axis == 0 for axis, _ in _cuts([*layers], (2, 8, 300)).values())


class _Shifted(nn.Module):
    """Each position depends only on the one that lies ``far`` before it."""

    def __init__(self, width: int, far: int) -> None:
        super().__init__()
        self.up, self.down, self.far = nn.Linear(8, width), nn.Linear(width, 8), far

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.up(x).exp()
        return self.down(functional.pad(wide, (0, 0, self.far, 0))[:, : x.shape[1]])


def test_an_axis_whose_distant_dependence_no_trial_can_rule_out_is_not_cut() -> None:
    wide = nn.Sequential(
        nn.Conv1d(16, 256, 1), nn.Conv1d(256, 256, 3, padding=32, dilation=32), nn.Conv1d(256, 16, 1)
    )
    assert all(axis != 2 for name, (axis, _) in _cuts([wide], (2, 16, 4096)).items() if name in ("0", "0.1"))
    assert "0" not in _cuts([_Shifted(512, 48)], (2, 4096, 8))
    assert _cuts([_Shifted(512, 0)], (2, 4096, 8))["0"] == (1, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_of_one_sample_are_cut_too(ranks: int) -> None:
    """What a module allocates inside is then cut to the budget, as in a batch of one sample."""
    shape = (4, 40, 40, 6)
    job = _job(lambda: _Of(lambda x: x[..., None].expand(*x.shape, 64).exp().sum(-1)), *shape)
    uses = [make_use("gradient-accumulation", {"micro_batches": 4 // ranks}), make_use("chunking", {})]
    uses += [make_use("ddp", {})] * (ranks > 1)

    def largest(traced: Trace) -> int:
        return max(a.size_bytes for a in traced.allocations if a.phase is Phase.FORWARD)

    alone = _job(job.build_model, 1, *shape[1:])
    single = largest(trace(alone, Plan(uses=(make_use("chunking", {}),))))
    assert largest(trace(job, Plan(uses=tuple(uses), ranks=ranks))) == single
    assert 4 * single < largest(trace(alone, Plan()))


class _Head(nn.Module):
    """Its output is larger than what it allocates inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 512), nn.Linear(512, 3000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def test_chunking_lowers_the_peak_of_a_wide_head_and_its_trials_count_as_setup_memory() -> None:
    job = _job(_Head, 4, 256, 32)
    plan = Plan(uses=(make_use("chunking", {}),))
    traced = trace(job, plan)
    profile = memory_profile(traced, Calibration())
    plain = memory_profile(trace(job, Plan()), Calibration())
    assert profile.peak_bytes < plain.peak_bytes
    assert profile.phase_peak_bytes[Phase.SETUP] > plain.phase_peak_bytes[Phase.SETUP]


class _Triangle(nn.Module):
    """Triangle attention on pairs that an earlier layer computes, as in a block, so no copy is held."""

    def __init__(self) -> None:
        super().__init__()
        widths = Widths(c_m=256, c_z=128, msa_heads=8, msa_head_width=32)
        self.embed, self.attention = nn.Linear(1, 128), TriangleAttention(widths, starting=True)

    def forward(self, distances: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        return self.attention(self.embed(distances), pairs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("crop", [256, 384])
def test_chunked_triangle_attention_peaks_below_an_eighth_at_published_crops(crop: int) -> None:
    job = Job(
        name="triangle",
        build_model=_Triangle,
        batch_size=1,
        make_batch=lambda step, seed: (torch.zeros(1, crop, crop, 1), torch.ones(1, crop, crop)),
        loss=lambda model, given: model(*given).mean(),
    )
    peaks = [
        memory_profile(trace(job, Plan(uses=uses)), Calibration()).peak_bytes
        for uses in ((), (make_use("chunking", {}),))
    ]
    assert peaks[0] > 8 * peaks[1], [p / 2**20 for p in peaks]


@pytest.mark.parametrize("by_number", [False, True], ids=["in a loop", "by number, so that all must run"])
def test_calls_of_equal_blocks_are_those_of_the_second_without_running_all(by_number: bool) -> None:
    ran: list[int] = []

    class Block(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.inner, self.number = nn.Linear(8, 8), number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(self.number)
            return self.inner(x).exp()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(i) for i in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (self.blocks[i] for i in range(5)) if by_number else self.blocks:
                x = block(x)
            return x

    job = Job(
        name="stack",
        build_model=Stack,
        make_batch=lambda step, seed: torch.zeros(2, 4, 8),
        loss=lambda model, batch: model(batch).sum(),
        batch_size=2,
    )
    model = Stack()
    calls = first_calls(job, model)
    assert [*calls] == [f"blocks.{i}{rest}" for i in range(5) for rest in (".inner", "")]
    assert {c.inside_bytes for name, c in calls.items() if not name.endswith("inner")} == {2 * 4 * 8 * 4}
    assert set(ran) == (set(range(5)) if by_number else {0, 1})
    assert [*model.blocks._modules] == [*"01234"]


@pytest.mark.parametrize("technique", ["chunking", "gradient-accumulation"])
@pytest.mark.parametrize(
    ("goal", "fits", "skipped"),
    [
        (Objective.FASTEST, lambda e, technique: True, True),
        (Objective.FASTEST, lambda e, technique: technique in e.plan, False),
        # sketches fit, but no trace does, or not that of plain training
        (Objective.FASTEST, lambda e, technique: technique in e.plan or not e.traced, False),
        (Objective.FASTEST, lambda e, technique: e.plan != Plan() or not e.traced, False),
        (Objective.SMALLEST, lambda e, technique: True, False),
    ],
)
def test_a_search_for_another_device_skips_what_only_saves_memory_where_plans_fit_without_it(
    goal: Objective,
    fits: Callable[[Estimate, str], bool],
    skipped: bool,
    technique: str,
) -> None:
    job = _evoformer(16, 4) if technique == "chunking" else load(JobRef(spec="protein-lm"))
    gpu, sketches = machine("RTX-4090"), list[Estimate]()
    predictor = Predictor(job=job, machine=gpu, job_facts=job_facts(job, "cuda"))
    only_these = {technique, "activation-checkpointing"}
    bounds = Bounds(without=tuple(name for name in TECHNIQUES if name not in only_these))
    estimated = single_device.estimate_plans(
        predictor,
        Request(job_ref=JobRef(spec="evoformer"), machine=gpu, goal=goal, bounds=bounds),
        2**40,
        progress=lambda *state: None,
        meets_limits=lambda e: fits(e, technique),
        negligible_state_bytes=None,
        sketches=sketches,
    )
    assert sketches
    assert any(technique in e.plan for e in sketches) != skipped
    kinds = [reason.kind for reason in estimated.left_out if reason.technique == technique]
    assert kinds == [ReasonKind.LEFT_OUT_ONLY_SAVES] * skipped
    assert estimated.unsketched_count == 0
    if not skipped:  # what the reason says
        times = {e.plan: e.step_s.value for e in sketches if e.step_s is not None}
        saving = [plan for plan in times if technique in plan]
        assert saving
        assert all(times[plan] > times[plan.without(technique)] for plan in saving)
