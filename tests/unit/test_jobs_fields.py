"""The built-in jobs on fields and volumes: the solver, the data, and the published networks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from memfit.jobs import registry
from memfit.jobs.builtin import neural_operator, segmentation3d, unet3d, weather
from memfit.jobs.builtin.navier_stokes import Square, advance, coarsen, random_vorticity
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_blocks
from memfit.planner.evaluate import Predictor
from memfit.planner.request import job_facts
from memfit.runtime.local_machine import this_machine
from memfit.trace.trace_extrapolation import find_repeated_blocks
from memfit.trace.tracer import fake_model
from memfit.types.errors import UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Plan, Use, use
from memfit.worker.degraded_training import scores_by_endpoint

needs_volume = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn, of the extra science, is not installed"
)
BOTH = ("weather", pytest.param("segmentation3d", marks=needs_volume))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(spec: str, **options: Any) -> Job:
    return registry.load(JobRef(spec=spec, **options))


# -- the solver -----------------------------------------------------------------------------------------


def mesh(points: int) -> tuple[Any, Any]:
    """Coordinates (y, x)."""
    along = 2 * np.pi * np.arange(points) / points
    return along[:, None], along[None, :]


def test_a_taylor_green_vortex_decays_at_the_exact_rate() -> None:
    y, x = mesh(24)
    square, start = Square(points=24, viscosity=0.03), np.cos(3 * x) * np.cos(2 * y) + np.cos(2 * x + 3 * y)
    exact = np.exp(-0.03 * 13 * 2.0) * start  # of one wavenumber: the advection term is zero
    assert np.abs(advance(square, start, step_s=0.1, steps=20) - exact).max() < 1e-12


def test_a_rossby_wave_travels_west_at_its_own_speed() -> None:
    y, x = mesh(24)
    square = Square(points=24, viscosity=0.01, beta=5.0)
    after = advance(square, np.cos(2 * x + y), step_s=0.05, steps=30)
    turned = -5.0 * 2 / 5 * 1.5
    assert np.abs(after - np.exp(-0.01 * 5 * 1.5) * np.cos(2 * x + y - turned)).max() < 1e-12


def energy(square: Square, vorticity: np.ndarray) -> np.ndarray:
    """Return the mean kinetic energy, per unit area and mass, of each field."""
    u, v = square.velocity(np.fft.rfft2(vorticity))
    return (u**2 + v**2).mean(axis=(-2, -1)) / 2


def enstrophy(vorticity: np.ndarray) -> np.ndarray:
    """Return half the mean squared vorticity of each field."""
    return (vorticity**2).mean(axis=(-2, -1)) / 2


@pytest.mark.parametrize("beta", [0.0, 10.0])
def test_without_viscosity_energy_and_enstrophy_are_conserved_while_the_flow_changes(beta: float) -> None:
    square = Square(points=32, viscosity=0.0, beta=beta)
    start = random_vorticity(np.random.default_rng(1), 2, 32, peak=3)
    after = advance(square, start, step_s=0.02, steps=50)
    assert np.linalg.norm(after - start) > 0.3 * np.linalg.norm(start)
    np.testing.assert_allclose(energy(square, after), energy(square, start), rtol=2e-6)
    np.testing.assert_allclose(enstrophy(after), enstrophy(start), rtol=2e-5)


def test_viscosity_dissipates_energy_at_the_rate_given_by_enstrophy() -> None:
    """dE/dt = -2 nu Z, with Z the enstrophy at the middle of a short step."""
    square = Square(points=32, viscosity=0.02)
    start = random_vorticity(np.random.default_rng(2), 2, 32, peak=4)
    middle, end = (advance(square, start, step_s=0.01, steps=n) for n in (1, 2))
    lost = energy(square, start) - energy(square, end)
    np.testing.assert_allclose(lost, 2 * 0.02 * enstrophy(middle) * 0.02, rtol=1e-4)


def test_time_steps_are_of_fourth_order() -> None:
    square = Square(points=32, viscosity=1e-3, beta=10.0)
    start = random_vorticity(np.random.default_rng(3), 1, 32, peak=4)
    best = advance(square, start, step_s=0.0125, steps=40)
    errors = [np.abs(advance(square, start, step_s=0.5 / n, steps=n) - best).max() for n in (5, 10)]
    assert 10 < errors[0] / errors[1] < 24


def test_coarser_fields_keep_the_waves_they_can_resolve() -> None:
    y, x = mesh(32)
    fine = np.sin(3 * x - 5 * y) + np.cos(12 * x)
    y, x = mesh(16)
    np.testing.assert_allclose(coarsen(fine, 16), np.sin(3 * x - 5 * y), atol=1e-12)


def test_the_stored_fields_follow_from_their_first_frame_by_the_solver() -> None:
    """Within the error of 32 x 32 points: the fields were made on 64 x 64. Persistence is wrong by 66 %."""
    with np.load(Path(weather.__file__).parent / "data" / "vorticity.npz") as kept:
        kept_fields = kept["vorticity"].astype(np.float64)
    square = Square(points=32, viscosity=1e-3, beta=10.0)
    after = advance(square, kept_fields[:, 0], step_s=0.05, steps=10)
    assert np.linalg.norm(after - kept_fields[:, 1]) < 0.15 * np.linalg.norm(kept_fields[:, 1])


# -- the forecaster -------------------------------------------------------------------------------------


def test_shifted_fields_give_shifted_forecasts() -> None:
    """An FNO without positions is equivariant to shifts on the torus."""
    torch.manual_seed(0)
    job = load("weather", batch=2)
    model, fields = job.build_model(), job.make_batch(0, 0)["fields"][:, 0]
    with torch.no_grad():
        shifted = model(fields.roll((3, 5), (2, 3)), 2)[-1]
        torch.testing.assert_close(shifted, model(fields, 2)[-1].roll((3, 5), (2, 3)), atol=1e-4, rtol=1e-4)


def test_a_mode_filter_is_a_matrix_for_each_wavenumber() -> None:
    torch.manual_seed(0)
    size = neural_operator.ForecasterSize(
        layers=1, width=3, channels=1, grid=(8, 8), patch=1, rollout=1, batch_size=1, modes=2
    )
    mixing = neural_operator.SpectralMixing(size)
    place = 2 * torch.pi * torch.arange(8) / 8
    wave = torch.cos(place[:, None] * -2 + place[None, :] * 1)[None, ..., None] * torch.tensor(
        [1.0, 0.0, 0.0]
    )
    weight = torch.view_as_complex(mixing.filter.weight)[2, 1, 0]  # row wavenumbers: 0, 1, -2, -1
    phase = torch.exp(1j * (place[:, None] * -2 + place[None, :]))[None, ..., None]
    torch.testing.assert_close(mixing(wave) - wave, (phase * weight).real, atol=1e-5, rtol=1e-4)
    too_fine = torch.cos(place[None, :] * 3 + 0 * place[:, None])[None, ..., None].expand(1, 8, 8, 3)
    torch.testing.assert_close(mixing(too_fine), too_fine, atol=1e-5, rtol=1e-4)


def test_the_second_forecast_is_made_from_the_first() -> None:
    torch.manual_seed(0)
    job = load("weather", batch=2)
    model, fields = job.build_model(), job.make_batch(0, 0)["fields"][:, 0]
    with torch.no_grad():
        first, second = model(fields, 2)
        torch.testing.assert_close(second, model(first, 1)[0])


def test_fourcastnet_has_its_published_number_of_parameters() -> None:
    """74,691,840 in the authors' code for 720 x 1440 x 20, patches of 8; 1,536 are of an unused norm."""
    with FakeTensorMode():
        model = load("weather", size="paper").build_model()
    assert sum(p.numel() for p in model.parameters()) == 74_691_840 - 1_536


def test_the_paper_architecture_has_every_gradient_on_a_smaller_grid() -> None:
    size = neural_operator.ForecasterSize(
        layers=2,
        width=16,
        channels=3,
        grid=(16, 32),
        patch=8,
        rollout=2,
        batch_size=2,
        groups=4,
        positions=True,
    )
    model = neural_operator.Forecaster(size)
    batch = weather.train_batch(weather.read().train, size, 2, step=0, seed=0)
    assert batch["fields"].shape == (2, 3, 3, 16, 32)
    weather.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_naive_error_is_below_1_and_undamped_persistence_above_1() -> None:
    job, fields = load("weather"), weather.read()
    windows = np.concatenate([fields.test[:, a : a + 5] for a in range(0, 10, 3)])
    norm = np.linalg.norm(windows[:, 4], axis=(1, 2))
    persistence = np.mean(np.linalg.norm(windows[:, 4] - windows[:, 0], axis=(1, 2)) / norm)
    assert job.metric is not None
    assert job.metric.naive < 1.0 < persistence


# -- the segmentation -----------------------------------------------------------------------------------


def test_nnunet_has_its_published_number_of_parameters() -> None:
    """31,199,796 as the authors' package dynamic_network_architectures 0.4.4 builds it: six stages, four
    channels, four classes."""
    with FakeTensorMode():
        model = unet3d.UNet(segmentation3d._shape("paper"))
    assert sum(p.numel() for p in model.parameters()) == 31_199_796


def test_logits_come_at_every_resolution_but_the_lowest() -> None:
    size = unet3d.UNetSize(features=(2, 4, 8, 8), channels=2, classes=3, patch=16, batch_size=1)
    logits = unet3d.UNet(size)(torch.randn(1, 2, 16, 16, 16))
    assert [tuple(out.shape) for out in logits] == [(1, 3, n, n, n) for n in (4, 8, 16)]


def test_soft_dice_and_cross_entropy_match_hand_computation() -> None:
    tissue = torch.tensor([0, 1, 1, 2]).reshape(1, 4, 1, 1)
    logits = functional.one_hot(tissue, 3).movedim(-1, 1) * 50.0
    assert float(segmentation3d._output_loss(logits, tissue, 1)) == pytest.approx(-1.0, abs=1e-4)
    even = torch.zeros(1, 3, 4, 1, 1)
    dice = (2 * 2 / 3 / (4 / 3 + 2) + 2 * 1 / 3 / (4 / 3 + 1)) / 2
    assert float(segmentation3d._output_loss(even, tissue, 1)) == pytest.approx(np.log(3) - dice, abs=1e-4)
    found, truth = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 1, 2, 2])
    assert segmentation3d.dice(found, truth) == pytest.approx(50.0)


def test_a_simulated_scan_has_rayleigh_noise_and_a_bias_field_of_20_percent() -> None:
    seen = segmentation3d.simulate_scan(np.zeros((32, 32, 32), np.float32), np.random.default_rng(0))
    assert seen.mean() == pytest.approx(0.09 * np.sqrt(np.pi / 2), rel=0.01), (
        "Rayleigh where there is nothing"
    )
    bright = 100 * np.ones((32, 32, 32), np.float32)
    seen = segmentation3d.simulate_scan(bright, np.random.default_rng(0), 2) / 100
    assert seen.shape == (2, 32, 32, 32)
    assert (seen.min(), seen.max()) == pytest.approx((0.8, 1.2), abs=0.01)


class OnlyGrey(torch.nn.Module):
    """Predicts grey matter everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 0.0]))

    def forward(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        return [self.logits[None, :, None, None, None].expand(len(volumes), 4, *volumes.shape[2:])]


@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_only_the_held_out_region_is_scored_at_every_size(size: str) -> None:
    """A third of it is grey matter and a third is white; grey matter everywhere has a Dice of 1/2 and 0."""
    tissue = np.zeros((197, 233, 189), np.uint8)
    region = tissue[tuple(slice(first, end) for first, end in segmentation3d._TEST_REGION)]
    region[:40], region[40:80] = 1, 2
    head = segmentation3d.Head(intensity=np.zeros(tissue.shape, np.float32), tissue=tissue)
    scores = segmentation3d.mean_dice(OnlyGrey(), head, segmentation3d._shape(size))
    grey, white = np.exp(1) / (3 + np.exp(1)), 1 / (3 + np.exp(1))  # probabilities everywhere
    soft = [2 * share / 3 / (share + 1 / 3) for share in (grey, white)]
    assert scores["Dice of grey and white matter"] == pytest.approx(25.0)
    assert scores["soft Dice of grey and white matter"] == pytest.approx(100 * np.mean(soft), rel=1e-5)


def test_a_network_of_six_stages_is_evaluated() -> None:
    size = unet3d.UNetSize(features=(1, 1, 1, 1, 1, 1), channels=4, classes=4, patch=64, batch_size=1)
    tissue = np.random.default_rng(0).integers(0, 3, (197, 233, 189), np.uint8)
    head = segmentation3d.Head(intensity=tissue.astype(np.float32), tissue=tissue)
    torch.manual_seed(0)
    scores = segmentation3d.mean_dice(unet3d.UNet(size), head, size)
    assert all(0 <= score < 60 for score in scores.values())


@needs_volume
def test_training_cubes_stay_away_from_the_held_out_slab() -> None:
    head = segmentation3d.read()
    corners = segmentation3d._training_corners(head, 24, 500, np.random.default_rng(0))
    planes = corners[:, 1:2] + np.arange(24)
    first, end = segmentation3d._HELD_OUT
    assert not ((planes >= first - 8) & (planes < end + 8)).any()
    assert (planes.max(axis=1) < first).any()
    assert (planes.min(axis=1) > end).any()
    assert (corners >= 0).all()
    assert (corners + 24 <= head.tissue.shape).all()


def test_segmentation3d_without_nilearn_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    segmentation3d.read.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nilearn.*memfit\[science\]"):
        load("segmentation3d")


# -- both -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_a_batch_depends_on_step_and_seed_alone(name: str) -> None:
    job = load(name, batch=3)
    first, again = job.make_batch(4, 7), load(name, batch=3).make_batch(4, 7)
    assert all(torch.equal(first[k], again[k]) and len(first[k]) == 3 for k in first)
    for step, seed in ((5, 7), (4, 8)):
        assert any(not torch.equal(first[k], job.make_batch(step, seed)[k]) for k in first)


@pytest.mark.parametrize("name", BOTH)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name: str) -> None:
    torch.manual_seed(0)
    job = load(name, batch=4)
    model, whole = job.build_model(), job.make_batch(0, 0)
    with torch.no_grad():
        parts = [float(job.loss(model, {k: v[i : i + 1] for k, v in whole.items()})) for i in range(4)]
        assert np.mean(parts) == pytest.approx(float(job.loss(model, whole)), rel=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_an_untrained_model_is_no_better_than_naive_and_learns(name: str) -> None:
    torch.manual_seed(0)
    job = load(name, batch=2)
    assert job.evaluate is not None
    assert job.metric is not None
    model = job.build_model()
    value = scores_by_endpoint(job, job.evaluate(model))[job.metric.name]
    assert model.training
    assert (value < job.metric.naive) == job.metric.higher_is_better
    step = TrainingStep(job, Plan())
    losses = [float(step.run(job.make_batch(i, 0))[0]) for i in range(10)]
    assert np.mean(losses[-3:]) < losses[0] - 0.02
    assert all(p.grad is None or torch.isfinite(p).all() for p in step.model.parameters())


@pytest.mark.parametrize("name", BOTH)
def test_data_of_the_user_and_lengths_are_refused(name: str) -> None:
    for options in ({"data": "x.npy"}, {"size": "tiny@64"}):
        with pytest.raises(UserError, match=name):
            load(name, **options)


@pytest.mark.parametrize("used", [use("bf16-autocast"), use("bf16-parameters", rounding="master")])
def test_fourier_space_stays_in_float32(used: Use) -> None:
    job = load("weather", batch=1)
    step = TrainingStep(job, Plan(uses=(used,)))
    seen = []
    block = step.model.blocks[0]  # type: ignore[union-attr,index]
    block.mixing.filter.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    block.mlp[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loss, _ = step.run(job.make_batch(0, 0))
    assert set(seen) == {torch.complex64, torch.bfloat16}
    assert bool(loss.isfinite())
    step.close()


def test_selective_checkpointing_of_a_repeatedly_called_block_keeps_the_loss_under_autocast() -> None:
    job = load("weather", batch=1)
    plan = Plan(uses=(use("bf16-autocast"), use("selective-checkpointing", keep="matmul")))
    losses = []
    for p in (plan, Plan(uses=(use("bf16-autocast"),))):
        torch.manual_seed(0)
        step = TrainingStep(job, p)
        losses.append([float(step.run(job.make_batch(i, 0))[0]) for i in range(2)])
        step.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0][0] == losses[1][0]


@needs_volume
def test_a_model_of_unequal_blocks_has_no_repeated_block_and_still_gets_a_sketch() -> None:
    job = load("segmentation3d", batch=2)
    assert len(find_blocks(fake_model(job), job.blocks)[1]) == 5
    assert find_repeated_blocks(fake_model(job), job) is None
    predictor = Predictor(job=job, machine=this_machine("world"), job_facts=job_facts(job, "cpu"))
    assert predictor.sketch(Plan()).allocated_bytes.value > 0


def test_a_rollout_as_long_as_the_trajectories_is_refused() -> None:
    assert registry.load(JobRef(spec="weather", dimensions={"rollout": 13})).metric is not None
    with pytest.raises(UserError, match=r"14 forecasts in a row \(--dim rollout\); allowed: 1 to 13, "):
        registry.load(JobRef(spec="weather", dimensions={"rollout": 14}))


@pytest.mark.parametrize("crop", [4, 192])
def test_crops_that_the_volume_or_the_network_cannot_have_are_refused_in_one_line(crop: int) -> None:
    pytest.importorskip("nilearn", reason="not installed: nilearn")
    with pytest.raises(UserError, match=r"crops with .*; allowed: multiples of 4 from 8 to 188"):
        registry.load(JobRef(spec="segmentation3d", dimensions={"crop": crop}))
