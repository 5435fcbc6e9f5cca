"""Whether a batch may be split: dependent samples are detected by a trial, and plans say what they change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import dependent_jobs
import pytest
import torch
from torch import nn

import memfit
from memfit import catalog
from memfit.cli import main
from memfit.jobs.registry import add_job, load
from memfit.jobs.training_step import TrainingStep
from memfit.planner.parallelism_grid import Limits, grids, no_grid_error
from memfit.planner.plan_space import dependence_reasons, usable
from memfit.planner.request import Request, make_predictor
from memfit.planner.search import search
from memfit.techniques.base import JobFacts
from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import TECHNIQUES, effect_of, make_use
from memfit.trace import sample_dependence as trials
from memfit.trace.sample_dependence import sample_dependence
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job, JobRef
from memfit.types.plan import Accuracy, Bounds, EffectClass, Plan, use
from memfit.workflows.single_run import explain

SPLIT = Plan(uses=(make_use("gradient-accumulation", {"micro_batches": 4}),))
RANKS = Plan(uses=(make_use("ddp", {}),), ranks=2)
DEPENDENT, INDEPENDENT = dependent_jobs.dependent(), dependent_jobs.independent()
JOBS = {job.name: job for job in (*DEPENDENT, *INDEPENDENT)}
OF_NORMS = SampleDependence(
    kind=DependenceKind.DEPENDENT, cause=DependenceCause.BATCH_NORM, reason="by trial"
)
OF_SYNCED = dataclasses.replace(OF_NORMS, cause=DependenceCause.SYNC_BATCH_NORM, across_ranks=False)
OF_WEIGHTS = dataclasses.replace(OF_NORMS, cause=DependenceCause.WEIGHTS)
UNTESTED = SampleDependence(kind=DependenceKind.NOT_TESTED, reason="the model is too large for a trial")
FACTS = JobFacts(batch_size=8, block_count=2, vocabulary=0, device_kind="cpu")


@pytest.mark.parametrize("job", DEPENDENT, ids=lambda job: job.name)
def test_dependent_samples_are_detected_by_a_trial(job: Job) -> None:
    assert sample_dependence(job).kind is DependenceKind.DEPENDENT


@pytest.mark.parametrize("job", dependent_jobs.set_by_the_first_batch(), ids=lambda job: job.name)
def test_state_that_the_first_batch_sets_makes_samples_dependent(job: Job) -> None:
    result = sample_dependence(job)
    assert (result.kind, result.cause) == (DependenceKind.DEPENDENT, DependenceCause.STATE)
    assert result.reason.startswith("the first forward pass sets state from its batch")


def test_random_samples_keep_their_padding() -> None:
    tokens = torch.tensor([[1, 5, 6, 7, 0, 0], [1, 8, 9, 5, 6, 2]])
    frames = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    with torch.random.fork_rng():
        redrawn = trials._redrawn({"tokens": tokens, "frames": frames})
    assert torch.equal(redrawn["frames"] == 0, frames == 0)
    assert not torch.equal(redrawn["frames"], frames)
    assert redrawn["tokens"][:, [0, -1]].tolist() == [[1, 0], [1, 2]]
    assert redrawn["tokens"][0, 4] == 0
    assert torch.equal(redrawn["tokens"].sort().values, tokens.sort().values)
    assert not torch.equal(redrawn["tokens"], tokens)


def test_a_model_that_is_built_with_other_values_each_time_does_not_depend_on_its_first_batch() -> None:
    generator = torch.Generator().manual_seed(0)

    def build() -> nn.Module:
        model = dependent_jobs.dense()
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        return model

    result = sample_dependence(dataclasses.replace(JOBS["linear"], build_model=build))
    assert result.kind is DependenceKind.NOT_TESTED
    assert result.reason == "the job builds a model with other values each time"


@pytest.mark.parametrize("job", INDEPENDENT, ids=lambda job: job.name)
def test_independent_samples_are_detected_by_a_trial(job: Job) -> None:
    assert sample_dependence(job).kind is DependenceKind.INDEPENDENT


@pytest.mark.parametrize("job", dependent_jobs.dependent_at_size(), ids=lambda job: job.name)
def test_dependence_that_few_samples_do_not_show_is_detected(job: Job) -> None:
    assert sample_dependence(job).kind is DependenceKind.DEPENDENT


@pytest.mark.parametrize("job", dependent_jobs.dependent_at_size()[2:7], ids=lambda job: job.name)
def test_dependence_at_a_size_that_is_too_large_for_a_trial_is_not_tested(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost_of = trials._Cost.reason
    monkeypatch.setattr(trials._Cost, "reason", lambda c, n: "it is large" if n == 64 else cost_of(c, n))
    result = trials._try_job(job)
    assert result.kind is DependenceKind.NOT_TESTED
    assert "a batch of 64 samples uses" in result.reason


@pytest.mark.parametrize("job", dependent_jobs.undecided(), ids=lambda job: job.name)
def test_a_function_of_a_mean_that_may_act_at_other_values_is_not_tested(job: Job) -> None:
    result = sample_dependence(job)
    assert result.kind is DependenceKind.NOT_TESTED
    assert "to a sum or mean over samples" in result.reason


@pytest.mark.parametrize("job", dependent_jobs.independent_at_size(), ids=lambda job: job.name)
def test_independent_samples_of_larger_batches_are_detected(job: Job) -> None:
    assert sample_dependence(job).kind is DependenceKind.INDEPENDENT


def test_a_mean_over_the_targets_in_a_list_weighs_samples_by_their_number() -> None:
    job = dependent_jobs.job(
        "boxes", dependent_jobs.Boxes, dependent_jobs.of_lists, dependent_jobs.per_box, batch_size=16
    )
    assert sample_dependence(job).cause is DependenceCause.WEIGHTS


def test_a_trial_supports_complex_weights() -> None:
    assert sample_dependence(dependent_jobs.spectral()).kind is DependenceKind.INDEPENDENT


@pytest.mark.parametrize(
    ("name", "cause", "modules", "across_ranks"),
    [
        ("BatchNorm1d", DependenceCause.BATCH_NORM, ("1",), True),
        ("SyncBatchNorm", DependenceCause.SYNC_BATCH_NORM, ("1",), False),
        ("InfoNCE", DependenceCause.LOSS, (), True),
        ("a sum", DependenceCause.WEIGHTS, (), True),
        ("a mean over labels that are not counted", DependenceCause.WEIGHTS, (), True),
    ],
)
def test_the_cause_of_a_dependence_is_named(
    name: str, cause: DependenceCause, modules: tuple[str, ...], across_ranks: bool
) -> None:
    found = sample_dependence(JOBS[name])
    assert (found.cause, found.modules, found.across_ranks) == (cause, modules, across_ranks)


def _step_for_the_whole_batch(labels: torch.Tensor) -> Job:
    """A step whose batch holds numbers for all its samples: a mask of pairs, or the number of each sample."""

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        scores = model(batch[0]) @ model(batch[0]).T
        if batch[1].dim() == 2:
            return scores.masked_fill(batch[1], 0.0).square().mean()
        return nn.functional.cross_entropy(scores, batch[1])

    batch = torch.randn(32, 6), labels
    return dependent_jobs.job("whole", lambda: nn.Linear(6, 4), lambda step, seed: batch, loss, batch_size=32)


@pytest.mark.parametrize(
    "labels", [torch.eye(32, dtype=torch.bool), torch.arange(32)], ids=["mask of pairs", "number of sample"]
)
def test_a_step_that_fails_on_parts_of_its_batch_gets_the_plans_that_keep_it_whole(
    labels: torch.Tensor,
) -> None:
    job = _step_for_the_whole_batch(labels)
    found = sample_dependence(job)
    assert (found.kind, found.cause) == (DependenceKind.DEPENDENT, DependenceCause.SIZE)
    add_job("whole", job)
    without = tuple(t for t in TECHNIQUES if t not in ("gradient-accumulation", "adamw-single"))
    for accuracy in (Accuracy.ROUNDING, Accuracy.ANY):
        planning = search(_request("whole", accuracy=accuracy, bounds=Bounds(without=without)), _quiet)
        assert planning.result.recommended is not None
        assert not any("gradient-accumulation" in e.plan for e in planning.sketches)


def test_micro_batches_of_a_contrastive_loss_change_the_loss_and_are_e3() -> None:
    """They used to be classified as E1, which only reorders sums."""
    job = JOBS["InfoNCE"]
    losses = []
    for plan in (Plan(), SPLIT):
        torch.manual_seed(0)
        losses.append(float(TrainingStep(job, plan).run(job.make_batch(0, 0))[0]))
    assert losses[1] < 0.8 * losses[0]
    assert effect_of(SPLIT, sample_dependence(job)) is EffectClass.E3


def test_a_trial_restores_random_state_and_default_dtype() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trials._try_job(JOBS["dropout"])
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_default_dtype() is torch.float32


def test_estimate_does_not_change_the_given_model() -> None:
    model = dependent_jobs.dense(nn.BatchNorm1d(16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = memfit.estimate(model, dependent_jobs.vectors(0, 0)["x"], plan=SPLIT)
    assert "changes BatchNorm's statistics" in str(found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- what cannot be tried ------------------------------------------------------------------------------------


def test_a_model_that_is_too_large_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_BYTES", 1000)
    found = trials._try_job(JOBS["linear"])
    assert (found.kind, found.reason) == (DependenceKind.NOT_TESTED, "the model is too large for a trial")


def test_a_trial_that_takes_too_long_is_reported_as_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_MOST_S", 0.0)
    found = trials._try_job(JOBS["linear"])
    assert found.kind is DependenceKind.NOT_TESTED
    assert found.reason == "the trial takes more processor time than 0 s"


def test_batch_norm_is_found_by_its_layers_where_no_trial_is_possible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "_MOST_BYTES", 1000)
    found = trials._try_job(JOBS["BatchNorm1d"])
    assert (found.cause, found.modules) == (DependenceCause.BATCH_NORM, ("1",))
    assert trials._try_job(JOBS["frozen BatchNorm"]).kind is DependenceKind.NOT_TESTED


def test_a_loss_with_its_own_random_numbers_is_not_tested() -> None:
    import numpy

    def noisy(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        noise = torch.from_numpy(numpy.random.default_rng().standard_normal(len(batch["x"])))
        return (model(batch["x"]).mean(1) + noise.to(batch["x"].dtype)).square().mean()

    found = sample_dependence(dataclasses.replace(JOBS["linear"], loss=noisy))
    assert found.kind is DependenceKind.NOT_TESTED
    assert "random numbers or a state of its own" in found.reason


def test_a_loss_that_keeps_numbers_from_pass_to_pass_is_not_tested() -> None:
    means = [0.0]

    def centered(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = model(batch["x"])
        means.append(0.9 * means[-1] + 0.1 * float(x.detach().mean()))
        return (x - means[-1]).square().mean()

    found = sample_dependence(dataclasses.replace(JOBS["linear"], loss=centered))
    assert found.kind is DependenceKind.NOT_TESTED
    assert "a state of its own" in found.reason


def test_a_loss_that_fails_on_half_of_a_batch_is_not_tested() -> None:
    def whole(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"].view(8, 10)).square().mean()

    found = sample_dependence(dataclasses.replace(JOBS["linear"], loss=whole))
    assert found.kind is DependenceKind.NOT_TESTED
    assert "fails on half of the batch" in found.reason


def test_a_batch_of_one_sample_is_not_tried_even_if_the_reduced_job_has_more() -> None:
    def never(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise AssertionError("nothing is computed")

    linear = JOBS["linear"]
    one = dataclasses.replace(
        linear,
        loss=never,
        batch_size=1,
        make_batch=lambda step, seed: {"x": linear.make_batch(step, seed)["x"][:1]},
        reduced=lambda: linear,
    )
    found = sample_dependence(one)
    assert found.kind is DependenceKind.NOT_TESTED
    assert found.reason == "a batch of one sample cannot be split"


def test_fewer_samples_that_must_be_too_slow_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced_sizes = []
    cost = trials._Cost(needed_bytes=2**20, flops_s=100.0, call_s=1.0)

    def cost_of(job: Job) -> trials._Cost:
        traced_sizes.append(job.batch_size)
        return cost

    monkeypatch.setattr(trials._Cost, "of", cost_of)
    found = sample_dependence(dataclasses.replace(JOBS["linear"], loss_terms=lambda batch: 8))
    assert found.kind is DependenceKind.NOT_TESTED
    assert found.reason == "a trial of 2 samples takes 26 s, more than the limit of 13 s"
    assert traced_sizes == [8]


def test_the_reason_says_why_random_samples_could_not_be_tried() -> None:
    real = torch.cat([JOBS["linear"].make_batch(step, 0)["x"] for step in range(40)])

    def picky(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not torch.isin(batch["x"].float(), real).all():
            raise ValueError("no such sample is known")
        return model(batch["x"]).square().mean()

    found = sample_dependence(dataclasses.replace(JOBS["linear"], loss=picky))
    assert found.kind is DependenceKind.INDEPENDENT
    assert "random samples could not be tried: no such sample is known" in found.reason


def test_each_loss_of_the_same_model_is_tested_by_itself() -> None:
    """A function that was freed can leave its id to the next one."""
    build, found = JOBS["linear"].build_model, []
    for power in range(1, 20):

        def loss(model: nn.Module, batch: dict[str, torch.Tensor], power: int = power) -> torch.Tensor:
            return model(batch["x"]).square().mean() ** (power % 2 + 1)

        job = dataclasses.replace(JOBS["linear"], build_model=build, loss=loss)
        found.append(sample_dependence(job).kind is DependenceKind.DEPENDENT)
        del loss, job
    assert found == [power % 2 == 1 for power in range(1, 20)]


@pytest.mark.parametrize("kinds", [1, 2])
def test_a_large_model_is_tried_with_as_few_blocks_as_have_all_kinds_of_modules(
    kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(nn.Linear):
        pass

    class Deep(nn.Module):
        def __init__(self, depth: int = 24) -> None:
            super().__init__()
            blocks = (Other if kinds == 2 and i % 2 else nn.Linear for i in range(depth))
            self.blocks = nn.ModuleList([block(10, 10) for block in blocks])
            self.head = nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return self.head(x)

    deep = dataclasses.replace(JOBS["linear"], build_model=Deep, blocks="blocks")
    monkeypatch.setattr(trials, "_MOST_BYTES", 50_000)
    assert len(list(trials._affordable(deep)[0].build_model().blocks)) == kinds
    assert trials._try_job(deep).kind is DependenceKind.INDEPENDENT


def test_a_large_model_that_takes_its_blocks_by_number_is_not_tried_with_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(10, 10) for _ in range(24)])
            self.head = nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in reversed(range(24)):
                x = self.blocks[i](x)
            out: torch.Tensor = self.head(x)
            return out

    numbered = dataclasses.replace(JOBS["linear"], build_model=Numbered, blocks="blocks")
    monkeypatch.setattr(trials, "_MOST_BYTES", 50_000)
    # The IndexError of the shortened model says nothing about parts of the batch.
    assert trials._try_job(numbered).kind is DependenceKind.NOT_TESTED


# -- effect classes and searches -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dependence", "split", "shared"),
    [
        (OF_NORMS, EffectClass.E3, EffectClass.E3),
        (OF_SYNCED, EffectClass.E3, EffectClass.E1),
        (UNTESTED, EffectClass.E1, EffectClass.E1),
        (None, EffectClass.E1, EffectClass.E1),
    ],
)
def test_the_effect_class_of_splitting_depends_on_the_job(
    dependence: SampleDependence | None, split: EffectClass, shared: EffectClass
) -> None:
    staged = Plan(uses=(make_use("pipeline", {"stages": 2, "micro_batches": 4}),), ranks=2)
    assert effect_of(SPLIT, dependence) is effect_of(staged, dependence) is split
    assert effect_of(RANKS, dependence) is shared
    assert effect_of(Plan(uses=(use("bf16-autocast"),)), dependence) is EffectClass.E2


@pytest.mark.parametrize(
    ("dependence", "accuracy", "searched"),
    [
        (OF_NORMS, Accuracy.ROUNDING, False),
        (OF_NORMS, Accuracy.ANY, True),
        (OF_WEIGHTS, Accuracy.ANY, False),
        (UNTESTED, Accuracy.ROUNDING, True),
    ],
)
def test_micro_batches_of_dependent_samples_are_outside_the_default_search(
    dependence: SampleDependence, accuracy: Accuracy, searched: bool
) -> None:
    allowed, out = usable(FACTS, accuracy, dependence=dependence)
    assert ("gradient-accumulation" in {t.name for t in allowed}) is searched
    told = {r.technique: r for r in out if r.kind == "left_out_changes"}
    assert searched or told["gradient-accumulation"].detail == dependence.changes


def test_a_splitting_plan_states_its_change_or_that_it_was_not_tested() -> None:
    assert [r.kind for r in dependence_reasons(SPLIT, OF_NORMS)] == ["changes"]
    assert [r.kind for r in dependence_reasons(SPLIT, UNTESTED)] == ["not_tested"]
    assert not dependence_reasons(Plan(), UNTESTED)
    assert [r.technique for r in dependence_reasons(Plan(), OF_NORMS)] == ["splitting the batch"]


def test_grids_respect_limits_on_splitting_and_sharing_a_batch() -> None:
    limits = Limits(ranks=8, per_host=8, batch=16, blocks=8, device="cuda", tensor=(1, 2, 4, 8))
    whole = list(grids(dataclasses.replace(limits, splits=False, shares=False)))
    assert whole
    assert all(g.layout.data == 1 and {count for _, count in g.micro} == {1} for g in whole)
    synced = list(grids(dataclasses.replace(limits, splits=False)))
    assert any(g.layout.data == 8 for g in synced)
    assert all({count for _, count in g.micro} == {1} for g in synced)


def test_an_error_without_plans_for_several_devices_names_why_the_batch_may_not_be_split() -> None:
    limits = Limits(ranks=8, per_host=8, batch=16, blocks=8, device="cuda", splits=False)

    def message(**changed: object) -> str:
        return str(no_grid_error(dataclasses.replace(limits, **changed)))  # type: ignore[arg-type]

    size = dataclasses.replace(OF_NORMS, cause=DependenceCause.SIZE)
    assert "changes BatchNorm's statistics" in message(shares=False, dependence=OF_NORMS)
    assert "computed for the whole batch only" in message(shares=False, dependence=size)
    assert "with one device, or a loss that is a mean" in message(shares=False, dependence=OF_WEIGHTS)
    # With SyncBatchNorm, ranks may divide the batch: something else leaves no plan.
    assert "supports none of the plans" in message(refuses=lambda plan: "not supported")
    assert "leave no plan for 8 devices" in message(micro_batch=1)


FILE = """
import dependent_jobs
found = {job.name: job for job in (*dependent_jobs.dependent(), *dependent_jobs.independent())}
norms, summed = found["BatchNorm1d"], found["a sum"]
images = found["BatchNorm2d without running statistics"]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("jobs") / "own.py"
    path.write_text(FILE)
    return path


def _request(spec: str, **more: object) -> Request:
    return Request(job_ref=JobRef(spec=spec), machine=catalog.machine("H100-SXM", "world"), **more)  # type: ignore[arg-type]


def _quiet(*begun: object) -> None:
    """Ignores progress."""


def test_no_micro_batches_are_recommended_for_a_batch_norm_job(own: Path) -> None:
    """Micro-batches of one sample used to be recommended for such jobs, and failed in BatchNorm1d."""
    others = tuple(t for t in TECHNIQUES if t not in ("gradient-accumulation", "adamw-single"))
    found = search(_request(f"{own}:norms", bounds=Bounds(without=others)), _quiet).result
    assert not any(c.estimate.plan.get("gradient-accumulation") for c in found.frontier)
    assert found.recommended is not None
    assert ("left_out_changes", "gradient-accumulation") in {
        (r.kind, r.technique) for r in found.recommended.reasons
    }


def test_ranks_sharing_dependent_samples_are_refused_with_alternatives(own: Path) -> None:
    with pytest.raises(UserError, match=r"changes BatchNorm's statistics.*--accuracy any.*SyncBatchNorm"):
        search(_request(f"{own}:norms", ranks=2), _quiet)


def test_accumulation_is_offered_as_a_way_out_only_if_the_search_with_it_finds_a_plan(own: Path) -> None:
    bounds = Bounds(without=tuple(t for t in TECHNIQUES if t != "gradient-accumulation"))
    gpu = catalog.machine("H100-SXM", "world")
    on = dataclasses.replace(gpu, device=dataclasses.replace(gpu.device, kind="cpu"))

    def asked(cap_bytes: int, accuracy: Accuracy = Accuracy.ROUNDING) -> Request:
        request = _request(f"{own}:images", bounds=bounds, cap_bytes=cap_bytes, accuracy=accuracy)
        return dataclasses.replace(request, machine=on)

    def nothing(request: Request) -> NothingFits:
        with pytest.raises(NothingFits) as caught:
            search(request, _quiet)
        return caught.value

    far = nothing(asked(1))
    assert far.ways == ()
    assert nothing(asked(1, Accuracy.ANY)).ways == ()
    cap_bytes = far.least_bytes - 1
    assert nothing(asked(cap_bytes)).ways == (
        "gradient-accumulation, which changes BatchNorm's statistics, under --accuracy any",
    )
    recommended = search(asked(cap_bytes, Accuracy.ANY), _quiet).result.recommended
    assert recommended is not None
    assert recommended.estimate.plan.get("gradient-accumulation")


def test_a_micro_batch_of_dependent_samples_is_refused_with_alternatives(own: Path) -> None:
    others = tuple(t for t in TECHNIQUES if t not in ("gradient-accumulation", "adamw-single"))
    bounds = Bounds(micro_batch=2, without=others)
    with pytest.raises(UserError, match=r"changes BatchNorm's statistics.*allowed: --accuracy any"):
        search(_request(f"{own}:norms", bounds=bounds), _quiet)
    with pytest.raises(UserError, match=r"weights the terms.*allowed: a loss that is a mean over the terms"):
        search(_request(f"{own}:summed", bounds=bounds, accuracy=Accuracy.ANY), _quiet)


def test_accumulation_that_weighs_the_loss_wrongly_is_refused(own: Path) -> None:
    with pytest.raises(UserError, match=r"a sum that weighs 2 parts of the batch by 1, 1.*loss_terms"):
        explain(_request(f"{own}:summed"), SPLIT, _quiet)


def test_an_exported_folder_says_that_its_plan_changes_the_training(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(SPLIT))
    words = ("export", f"{own}:norms", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"))
    assert main([*words, "--to", "torchrun"]) == 0
    said = "E3: splitting the batch changes BatchNorm's statistics"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_an_estimate_of_a_splitting_plan_names_the_dependence(own: Path) -> None:
    found = explain(_request(f"{own}:norms"), SPLIT, _quiet)
    assert found.dependence is not None
    assert found.dependence.cause is DependenceCause.BATCH_NORM
    assert make_predictor(_request(f"{own}:norms"))[1].whole(Plan()).dependence is None


def test_terminal_estimates_state_the_dependence_in_every_language(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from memfit.report.terminal import print_estimate

    found = memfit.estimate(JOBS["BatchNorm1d"], plan=SPLIT).estimate
    for lang, told in (("en", "changes BatchNorm's statistics"), ("ja", "BatchNorm の統計量が変わります")):
        print_estimate(found, console=Console(width=300), lang=lang)
        assert told in capsys.readouterr().out
    untested = dataclasses.replace(found, dependence=UNTESTED)
    for lang, told in (("en", "was not tested"), ("ja", "未検証")):
        print_estimate(untested, console=Console(width=300), lang=lang)
        assert told in capsys.readouterr().out


def test_samples_of_the_default_job_do_not_depend_on_each_other() -> None:
    assert sample_dependence(load(JobRef(spec="protein-ss"))).kind is DependenceKind.INDEPENDENT
