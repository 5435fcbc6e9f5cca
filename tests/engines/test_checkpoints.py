"""A checkpoint saved under one plan resumes under another: the next losses are those of the run that was not
interrupted. A run that dies while it saves leaves the last complete one; mistakes are one-line errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_ranks import run_children
from hypothesis import given, strategies

from memfit.cli import main
from memfit.engines.registry import render
from memfit.jobs import checkpoints
from memfit.runtime.checkpoint_layout import boxes
from memfit.runtime.child_process import run
from memfit.types.errors import MemfitError, UserError
from memfit.types.job import OptimizerChoice
from memfit.types.launch import CheckpointSettings
from memfit.types.plan import Plan, use
from memfit.workflows import single_run

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
_spec = importlib.util.spec_from_file_location("checkpoint_ranks", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
ranks: Any = importlib.util.module_from_spec(_spec)
sys.modules["checkpoint_ranks"] = ranks
_spec.loader.exec_module(ranks)

WORST_RATIO = 1e-5
Losses = dict[str, list[float]]


def alone(
    keep: CheckpointSettings, folder: Path, given: Plan | None = None, job: Any = None, **more: Any
) -> Any:
    """One process's training of the plan, plain by default."""
    told = dataclasses.replace(ranks.spec(given or Plan(), keep), **more)
    return ranks.Training(told, job or ranks.small(), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """Every plan's checkpoint, one of a single process among them, and the losses after it."""
    folder = tmp_path_factory.mktemp("saved")
    plain = alone(CheckpointSettings(save=str(folder / "plain")), folder)
    plain.losses(0, ranks.SAVED)
    plain.keeper.save(ranks.SAVED)
    losses = {"plain": plain.losses(ranks.SAVED, ranks.MORE)}
    return folder, losses | two_ranks(folder)


def two_ranks(folder: Path) -> Losses:
    run_children(SCRIPT, [[folder]] * 2, env={"DS_ACCELERATOR": "cpu"})
    found: Losses = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.parametrize("name", ranks.SAVING)
def test_every_plan_has_the_losses_of_plain_training(trained: tuple[Path, Losses], name: str) -> None:
    _, losses = trained
    assert losses[name] == pytest.approx(losses["plain"], rel=WORST_RATIO)


@pytest.mark.parametrize("pair", ranks.PAIRS, ids=" -> ".join)
def test_two_ranks_resume_under_another_plan(trained: tuple[Path, Losses], pair: tuple[str, str]) -> None:
    _, losses = trained
    assert losses[" -> ".join(pair)] == pytest.approx(losses["plain"], rel=WORST_RATIO)


@pytest.mark.parametrize("name", ["plain", *ranks.SAVING])
@pytest.mark.parametrize("target", ["plain", "zero2", "zero3"])
def test_one_process_resumes_a_checkpoint_of_two_ranks(
    trained: tuple[Path, Losses], tmp_path: Path, name: str, target: str
) -> None:
    folder, losses = trained
    path, _, passed = checkpoints.find(folder / name)
    training = alone(CheckpointSettings(resume=str(path)), tmp_path, ranks.plan(target, 1))
    assert training.keeper.restore() == ranks.SAVED
    assert training.losses(ranks.SAVED, ranks.MORE) == pytest.approx(losses["plain"], rel=WORST_RATIO)
    assert not passed
    training.step.close()


def test_losing_the_optimizer_state_changes_the_losses(trained: tuple[Path, Losses]) -> None:
    _, losses = trained
    assert losses["state lost"] != pytest.approx(losses["plain"], rel=100 * WORST_RATIO)


def test_torch_reads_a_checkpoint_without_memfit(trained: tuple[Path, Losses]) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder, _ = trained
    model = ranks.Small()
    state = {"model": get_model_state_dict(model)}
    del state["model"]["head.weight"]  # tied: it is stored once
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=checkpoints.find(folder / "zero3")[0])
    training = alone(CheckpointSettings(resume=str(checkpoints.find(folder / "zero3")[0])), folder)
    training.keeper.restore()
    for name, param in training.step.model.named_parameters():
        assert torch.equal(model.get_parameter(name), param)


# --- what one process does


class Dropped(torch.nn.Module):
    """A model with dropout, and with a running average as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.nn.functional.dropout(self.norm(x)))


def dropped() -> Any:
    batch = lambda step, seed: torch.randn(16, 8, generator=torch.Generator().manual_seed(step))  # noqa: E731
    return ranks.Job(
        name="dropped",
        build_model=Dropped,
        make_batch=batch,
        batch_size=16,
        loss=lambda model, x: model(x).square().mean(),
    )


@pytest.mark.parametrize(
    "uses",
    [
        (),
        (use("sgd"),),
        (use("adafactor"),),
        (use("optimizer-in-backward"),),
        (use("bf16-parameters", rounding="master"),),
    ],
    ids=str,
)
def test_resuming_the_same_plan_is_bitwise_equal(tmp_path: Path, uses: Any) -> None:
    given = Plan(uses=tuple(ranks.make_use(u.technique, u.settings) for u in uses))
    first = alone(CheckpointSettings(save=str(tmp_path)), tmp_path, given, dropped())
    first.losses(0, 3)
    first.keeper.save(3)
    after = first.losses(3, 5)
    again = alone(CheckpointSettings(resume=str(checkpoints.find(tmp_path)[0])), tmp_path, given, dropped())
    assert again.keeper.restore() == 3
    assert again.losses(3, 5) == after
    for mine, other in zip(again.step.model.buffers(), first.step.model.buffers(), strict=True):
        assert torch.equal(mine, other)


class Scheduled(torch.optim.SGD):
    """SGD whose learning rate falls with a counter kept in the parameter group."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        super().step()


def scheduled() -> Any:
    return dataclasses.replace(
        dropped(), optimizer=OptimizerChoice(make=lambda params: Scheduled(params, momentum=0.9))
    )


@pytest.mark.parametrize("uses", [{}, {"zero": {"stage": 2}}, {"zero": {"stage": 3}}], ids=str)
def test_counters_in_optimizer_groups_are_resumed(tmp_path: Path, uses: Any) -> None:
    given = Plan(uses=tuple(ranks.make_use(n, {**k, **ranks.BUCKET}) for n, k in uses.items()))
    first = alone(CheckpointSettings(save=str(tmp_path)), tmp_path, Plan(), scheduled())
    first.losses(0, 3)
    first.keeper.save(3)
    after = first.losses(3, 5)
    again = alone(CheckpointSettings(resume=str(checkpoints.find(tmp_path)[0])), tmp_path, given, scheduled())
    again.keeper.restore()
    assert again.losses(3, 5) == pytest.approx(after, rel=WORST_RATIO)


def test_a_blockwise_optimizer_state_of_a_flat_buffer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    uses = ranks.make_use("zero", {"stage": 2, **ranks.BUCKET}), ranks.make_use("adamw-8bit", {})
    training = alone(CheckpointSettings(save=str(tmp_path)), tmp_path, Plan(uses=uses))
    training.losses(0, 1)
    with pytest.raises(UserError, match="of a flat optimizer state has"):
        training.keeper.check()


@pytest.mark.parametrize("uses", [{}, {"zero": {"stage": 2}}, {"zero": {"stage": 3}}], ids=str)
def test_saving_needs_less_extra_memory_than_one_parameter(tmp_path: Path, uses: Any) -> None:
    from memfit.runtime.counting_allocator import available
    from memfit.runtime.memory import peak_counter

    if (why := available()) is not None:
        pytest.skip(f"no counting allocator: {why}")
    given = Plan(uses=tuple(ranks.make_use(n, {**k, **ranks.BUCKET}) for n, k in uses.items()))
    training, counter = alone(CheckpointSettings(save=str(tmp_path)), tmp_path, given), peak_counter()
    training.losses(0, 1)
    before_bytes = counter.live_bytes()
    counter.reset_peak()
    training.keeper.save(1)
    largest_bytes = max(p.nbytes for p in training.step.model.parameters())
    assert counter.peak_bytes() - before_bytes < max(largest_bytes, 16_384)


def test_saving_expert_parallel_parameters_is_refused(tmp_path: Path) -> None:
    training = alone(CheckpointSettings(), tmp_path)
    training.step.bench.own_parameters.add("blocks.0.mlp.0.weight")
    with pytest.raises(UserError, match="expert-parallel"):
        type(training.keeper)(ranks.spec(Plan(), CheckpointSettings(save="x")), training.step)


def test_saving_under_an_unsupported_engine_is_refused(tmp_path: Path) -> None:
    training = alone(CheckpointSettings(), tmp_path)
    with pytest.raises(UserError, match="engine megatron; allowed: native"):
        type(training.keeper)(ranks.spec(Plan(), CheckpointSettings(save="x"), "megatron"), training.step)


@given(shape=strategies.lists(strategies.integers(1, 5), max_size=4), data=strategies.data())
def test_a_range_of_elements_splits_into_few_boxes_in_order(shape: list[int], data: Any) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(strategies.integers(0, whole.numel()))
    end = data.draw(strategies.integers(start, whole.numel()))
    found = list(boxes(tuple(shape), start, end))
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in found
    ]
    assert torch.equal(torch.cat([whole.new_empty(0), *parts]), whole.view(-1)[start:end])
    assert len(found) <= max(1, 2 * len(shape) - 1)


# --- mistakes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1, 2 and 3 of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    training = alone(CheckpointSettings(save=str(folder)), folder)
    for done in (1, 2, 3):
        training.losses(done - 1, 1)
        training.keeper.save(done)
    return folder


def test_a_checkpoint_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    training = alone(CheckpointSettings(resume=str(saved / "step-00000003")), tmp_path, job=dropped())
    with pytest.raises(UserError) as refused:
        training.keeper.restore()
    told = str(refused.value)
    assert "step-00000003 belongs to a different model: 34 of 34 tensors differ: " in told
    assert "blocks.0.attention.out.bias 62 in the checkpoint and missing in this run" in told
    assert "\n" not in told


def test_a_checkpoint_of_another_optimizer_is_refused(saved: Path, tmp_path: Path) -> None:
    given = Plan(uses=(ranks.make_use("sgd", {}),))
    training = alone(CheckpointSettings(resume=str(saved / "step-00000003")), tmp_path, given)
    with pytest.raises(UserError, match=r"AdamW, which keeps exp_avg, exp_avg_sq, step; this .* momentum"):
        training.keeper.restore()


def test_a_full_disk_is_reported_as_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = alone(CheckpointSettings(save=str(tmp_path / "to")), tmp_path)
    monkeypatch.setattr(checkpoints, "publish", _raising(OSError(28, "No space left on device")))
    with pytest.raises(MemfitError, match=r"step 1 was not saved in .*/to: .*No space left on device"):
        training.keeper.save(1)


def test_a_full_disk_that_torch_does_not_name_is_named_and_freed_of_the_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = alone(CheckpointSettings(save=str(tmp_path / "to")), tmp_path)
    monkeypatch.setattr("memfit.worker.checkpoint.save", _raising(OSError("unexpected pos 704 vs 598")))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2000, 1900, 100))
    with pytest.raises(MemfitError, match=r"was not saved in .*/to: the disk has 100 B left, and .* takes "):
        training.keeper.save(1)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported_as_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    training = alone(CheckpointSettings(save=str(tmp_path / "file" / "to")), tmp_path)
    with pytest.raises(MemfitError, match=r"step 1 was not saved in .*/file/to: .*Not a directory"):
        training.keeper.save(1)
    with pytest.raises(MemfitError, match=r"checkpoints cannot be saved in .*/file/to: Not a directory"):
        training.keeper.rehearse()


def _raising(error: Exception) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_missing_or_interrupted_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint in"):
        checkpoints.find(tmp_path / "nowhere")
    (tmp_path / "step-00000007.partial").mkdir()
    with pytest.raises(UserError, match=r"step-00000007\.partial: its save was interrupted"):
        checkpoints.find(tmp_path)
    with pytest.raises(UserError, match="not a complete checkpoint: its save was interrupted"):
        checkpoints.find(tmp_path / "step-00000007.partial")


def test_resume_and_save_options_are_checked_before_a_run_starts(saved: Path) -> None:
    keep, seed = checkpoints.resolve_settings(CheckpointSettings(resume=str(saved), save=str(saved)), None, 5)
    assert (keep.resume, seed) == (str(saved / "step-00000003"), 0)
    with pytest.raises(UserError, match="seed 4 differs from the seed of the run to resume, 0"):
        checkpoints.resolve_settings(CheckpointSettings(resume=str(saved)), 4, 5)
    with pytest.raises(
        UserError,
        match="has done 3 steps, so nothing remains to be done of 3 steps in all; allowed: --steps above 3",
    ):
        checkpoints.resolve_settings(CheckpointSettings(resume=str(saved)), 0, 3)
    with pytest.raises(UserError, match="already contains step-00000003 of another run"):
        checkpoints.resolve_settings(CheckpointSettings(save=str(saved)), 0, 3)
    with pytest.raises(UserError, match="already contains step-00000003 of another run"):
        checkpoints.resolve_settings(
            CheckpointSettings(resume=str(saved / "step-00000001"), save=str(saved)), 0, 3
        )


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: (p / "memfit.json").unlink(), "no memfit.json"),
        (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
        (lambda p: os.truncate(p / "__0_0.distcp", 1000), "__0_0.distcp has 1000 bytes of"),
        (lambda p: (p / "memfit.json").write_text("{"), "memfit.json is invalid"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_and_reported(
    tmp_path: Path, saved: Path, damage: Callable[[Path], object], why: str
) -> None:
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy" / "step-00000003")
    path, about, passed = checkpoints.find(tmp_path / "copy")
    assert (path.name, about.step) == ("step-00000002", 2)
    (told,) = passed
    assert "step-00000003" in told
    assert why in told


# --- death


class Died(BaseException):
    """Simulates SIGKILL: nothing is done after it."""


def _dying(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Raises Died after ``at`` of the file operations that make a save durable."""
    done: list[str] = []

    def mortal(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) > at:
                raise Died
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, names in ((os, ("fsync",)), (Path, ("rename", "replace", "mkdir"))):
        for name in names:
            mortal(owner, name)
    return done


def test_a_save_that_dies_at_any_moment_leaves_a_complete_checkpoint(saved: Path, tmp_path: Path) -> None:
    import shutil

    found = set()
    for at in range(100):
        folder = tmp_path / f"at{at}"
        shutil.copytree(saved, folder)
        training = alone(CheckpointSettings(save=str(folder), resume=str(folder / "step-00000003")), tmp_path)
        training.keeper.restore()
        training.losses(3, 1)
        with pytest.MonkeyPatch.context() as patch:
            _dying(patch, at)
            try:
                training.keeper.save(4)
                died = False
            except (Died, MemfitError):
                died = True
        path, about, passed = checkpoints.find(folder)
        found.add(about.step)
        assert about.step in {3, 4}
        assert not checkpoints.why_incomplete(path)
        assert all("interrupted" in p for p in passed)
        assert (folder / (folder / "latest").read_text().strip()).is_dir()
        if not died:
            break
    assert not died
    assert at > 5
    assert found == {3, 4}


JOB = """
import os, signal
import torch
from memfit import Job
from torch.nn import functional

fsync, saving = os.fsync, []


def killed(descriptor):
    saving.append(descriptor)
    if len(saving) > 8 and KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)


os.fsync = killed


def batch(step, seed):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


job = Job(name="own", build_model=lambda: torch.nn.Linear(4, 1), make_batch=batch, batch_size=8,
          loss=lambda model, x: model(x).square().mean())
"""


@pytest.fixture
def no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators are not timed, as no step time is tested here."""
    monkeypatch.setattr(single_run, "calibrate", lambda *args, **options: None)


@pytest.mark.usefixtures("no_timings", "forked_workers")
def test_a_run_killed_while_saving_can_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, to = tmp_path / "own.py", tmp_path / "to"
    path.write_text(f"KILL = True\n{JOB}")
    keep = CheckpointSettings(save=str(to), every_steps=1)
    killed = run(render(ranks.spec(Plan(), keep, job=f"{path}:job")), on_event=lambda event: None)
    assert killed.reason.startswith(f"killed by {signal.Signals.SIGKILL.name}")
    good = checkpoints.find(to)[0].name
    path.write_text(f"KILL = False\n{JOB}")
    given = ["run", f"{path}:job", "--threads", "1", "--steps", "4", "--save", str(to)]
    assert main(given) == 2
    assert f"already contains {good} of another run" in capsys.readouterr().err
    assert main([*given, "--resume", str(to)]) == 0
    told = capsys.readouterr().out
    assert f"resumed {to / good}; skipped step-00000002.partial: its save was interrupted" in told
    assert (to / "latest").read_text() == "step-00000004\n"


@pytest.mark.usefixtures("no_timings", "forked_workers")
def test_resuming_a_checkpoint_of_another_model_is_a_user_error(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = saved / "own.py"
    job.write_text(f"KILL = False\n{JOB}")
    given = ["run", f"{job}:job", "--threads", "1", "--steps", "4", "--resume", str(saved)]
    assert main(given) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "different model" in x]
    assert "tensors differ" in line


def test_save_every_without_save_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--save-every", "2"]) == 2
    assert "--save-every needs --save" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
