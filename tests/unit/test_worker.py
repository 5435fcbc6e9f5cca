"""The worker: what a run measures and reports, and how it ends. Two tests start a real child process."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memfit.catalog.machine_spec import machine
from memfit.engines import native
from memfit.jobs.registry import load
from memfit.jobs.user_job import source_digest
from memfit.planner.request import Request
from memfit.runtime import counting_allocator, memory, memory_cap
from memfit.runtime.child_process import run
from memfit.store.database import Store
from memfit.techniques.registry import make_use
from memfit.trace.tracer import trace
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import OperatorRequest, RunSpec
from memfit.types.plan import Plan, Use, use
from memfit.types.result import Measurement, OutcomeKind, Run
from memfit.worker import calibrate, train
from memfit.workflows.single_run import run_plan

JOB = '''
"""A network whose largest tensors are megabytes, so that a cap can be told from the noise beside it."""
import torch
from torch import nn
from torch.nn import functional

from memfit.types.job import Job, Metric

METRIC = Metric(name="error", unit="1", higher_is_better=False, margin=0.5, margin_source="a test",
                naive=1.0, naive_name="zero")


def batch(step, seed):
    torch.manual_seed(1000 * seed + step)
    x = torch.randn(64, 32)
    return x, x[:, :4]


def make(explode_at=None, kind=float("nan"), width=256, metric=True):
    calls = [0]

    def loss(model, both):
        calls[0] += 1
        value = functional.mse_loss(model(both[0]), both[1])
        if explode_at is not None and calls[0] == explode_at:
            if isinstance(kind, BaseException):
                raise kind
            return value * kind
        return value

    def evaluate(model):
        with torch.no_grad():
            x, y = batch(10**6, 0)
            return float(functional.mse_loss(model(x), y))

    def build():
        blocks = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)]
        return nn.Sequential(nn.Linear(32, width), nn.Sequential(*blocks), nn.Linear(width, 4))

    return Job(name="own", build_model=build, make_batch=batch, loss=loss, batch_size=64, blocks="1", steps=3,
               evaluate=evaluate if metric else None, metric=METRIC if metric else None)


def job():
    return make()


def large():
    return make(width=1024)


def broken():
    return make(explode_at=4)  # two calls warm up, so this is step 1


def endless():
    return make(explode_at=4, kind=float("inf"))


def full():
    return make(explode_at=4, kind=MemoryError())


def mistaken():
    return make(explode_at=4, kind=RuntimeError("shapes do not fit"))


def unevaluated():
    return make(metric=False)
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(JOB)
    return str(path)


def spec(own: str, attribute: str = "job", **more: Any) -> RunSpec:
    fields = {"plan": Plan(), "seed": 0, "steps": 3, "threads": 1, **more}
    return RunSpec(name="x", role="run", job=JobRef(spec=f"{own}:{attribute}"), **fields)


# --- in this process, with counters of the test's own


class Log:
    """Live bytes above the 100 of before: 0, then 5, 15 and 12."""

    start_bytes, deltas_bytes = 100, (5, 10, -3)


class Counter:
    """Live bytes stand at 100; each reading of the peak is one higher than the last."""

    source = "test"

    def __init__(self, device: object = None) -> None:
        self.reads, self.events = 100, 0

    def live_bytes(self) -> int:
        return 100

    def peak_bytes(self) -> int:
        self.reads += 1
        return self.reads

    def reset_peak(self) -> None:
        """Readings only grow here."""

    def counts(self) -> SimpleNamespace:
        """One event between two readings."""
        self.events += 1
        return SimpleNamespace(allocations=self.events, frees=0)

    def start_log(self) -> None:
        """Called when the last step begins."""

    def stop_log(self) -> Log:
        return Log()


class Limit:
    kind, footprint_bytes = "test", 7

    def __init__(self, cap_bytes: int, **more: object) -> None:
        self.cap_bytes, self.lifted = cap_bytes, False

    def apply(self, *, at_least_data_bytes: int) -> None:
        assert not self.lifted

    def lift(self) -> None:
        self.lifted = True

    def used_bytes(self) -> int:
        return 1000

    def was_raised(self) -> bool:
        return False


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``told(spec)``: (measurement, events) of a run in this process."""
    monkeypatch.setattr(memory, "peak_counter", Counter)
    monkeypatch.setattr(memory_cap, "MemoryLimit", Limit)

    def ask(asked: RunSpec) -> tuple[Measurement, list[dict[str, Any]]]:
        path = tmp_path / "run.json"
        path.write_text(serialization.dumps(asked))
        train.main(path)
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        result = events.pop()
        assert result["event"] == "result"
        return serialization.loads(Measurement, json.dumps(result["measurement"])), events

    return ask


def test_a_run_reports_every_step_and_ends_with_its_measurement(own: str, told: Any) -> None:
    found, events = told(spec(own, timeline=True))
    steps = [e for e in events if e["event"] == "step"]
    assert [e["step"] for e in steps] == [0, 1, 2]
    assert [e["loss"] for e in steps] == list(found.losses)
    assert [e["stage"] for e in events if e["event"] == "stage"] == ["warm-up", "evaluate"]
    assert (found.outcome, found.steps_done, found.reason) == (OutcomeKind.OK, 3, "")
    assert len(found.step_s) == len(found.grad_norms) == 3
    assert set(found.phase_peak_bytes) == {"setup", "forward", "backward", "optimizer", "evaluation"}
    assert found.peak_bytes is not None
    assert found.peak_bytes >= max(v for k, v in found.phase_peak_bytes.items() if k != "evaluation")
    # forward saw 5 and 15 above what was alive before the run, backward 15 and 12, the optimizer 12
    thirds = [set(found.timeline_bytes[i : i + 133]) for i in (0, 133, 266)]
    assert thirds == [{5, 15}, {15, 12}, {12}]
    assert found.metric is not None
    assert (found.limit_kind, found.headroom_bytes, found.overhead_ratio) == ("", (), None)


def test_the_same_seed_gives_the_same_bits_and_another_seed_different_ones(own: str, told: Any) -> None:
    one, again, other = (told(spec(own, seed=s))[0] for s in (0, 0, 1))
    assert (one.losses, one.weights_digest, one.metric) == (again.losses, again.weights_digest, again.metric)
    assert one.weights_digest != other.weights_digest


def test_under_a_cap_each_step_reports_its_headroom(own: str, told: Any) -> None:
    found, _ = told(spec(own, cap_bytes=10**6, evaluate=False))
    assert (found.limit_kind, found.footprint_bytes, found.process_peak_bytes) == ("test", 7, 1000)
    assert found.overhead_ratio == pytest.approx(1000 / found.peak_bytes)
    assert len(found.headroom_bytes) == 3
    assert 10**6 - found.peak_bytes <= min(found.headroom_bytes) < 10**6
    assert found.metric is None


@pytest.mark.parametrize(("attribute", "value"), [("broken", "nan"), ("endless", "inf")])
def test_a_non_finite_loss_ends_the_run_and_names_its_step(
    attribute: str, value: str, own: str, told: Any
) -> None:
    found, _ = told(spec(own, attribute))
    assert found.outcome is OutcomeKind.FAILED
    assert found.reason == f"loss is {value} at step 1"
    assert found.steps_done == 2
    assert found.metric is None


def test_a_technique_missing_after_the_warm_up_fails_the_run(
    own: str, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memfit.jobs.training_step import TrainingStep

    class Sometimes(TrainingStep):
        """The technique is left out of every step but the first."""

        made = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            Sometimes.carried = frozenset({"bf16-parameters"}) if Sometimes.made else frozenset()
            Sometimes.made += 1
            super().__init__(*args, **kwargs)

    plan = Plan(uses=(make_use("bf16-parameters", {}),))
    assert told(spec(own, plan=plan))[0].outcome is OutcomeKind.OK
    monkeypatch.setattr(train, "step_maker", lambda *_: Sometimes)
    found, _ = told(spec(own, plan=plan))
    assert found.outcome is OutcomeKind.FAILED
    assert "bf16-parameters: planned" in found.reason


def test_replay_refuses_a_job_that_has_changed(own: str, tmp_path: Path, told: Any) -> None:
    store, asked = Store(tmp_path / "s.db"), spec(own, source_digest=source_digest(f"{own}:job"))
    request = Request(job_ref=asked.job, machine=machine("RTX-4090"), engine="replay")

    def replayed(*uses: Use) -> Run:
        return run_plan(
            request, Plan(uses=uses), seed=0, steps=1, capped=False, progress=lambda *_: None, store=store
        )

    with pytest.raises(UserError, match="has no stored run to replay of this job with this seed"):
        replayed()
    done = Run(
        spec=asked,
        predicted_peak_bytes=1,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=told(asked)[0],
    )
    store.append("run", "run", done)
    assert replayed().measurement == done.measurement
    before_dora = dataclasses.replace(asked, plan=Plan(uses=(use("lora", rank=8, outside="trained"),)))
    store.append("run", "run", dataclasses.replace(done, spec=before_dora))
    assert replayed(make_use("lora", {})).spec.plan == before_dora.plan
    with pytest.raises(
        UserError, match="no stored run of this job with this seed and these sizes has the plan"
    ):
        replayed(make_use("bf16-autocast", {}))
    Path(own).write_text(JOB.replace("width=256", "width=128"))
    with pytest.raises(UserError, match=r"own\.py:job has changed since the stored run"):
        replayed()


def test_out_of_memory_is_reported_with_phase_and_step(own: str, told: Any) -> None:
    found, _ = told(spec(own, "full"))
    assert found.outcome is OutcomeKind.OOM
    assert found.reason == "out of memory in forward of step 1"
    assert len(found.losses) == 1


def test_an_error_in_the_users_loss_fails_the_run_and_names_its_file(own: str, told: Any) -> None:
    found, _ = told(spec(own, "mistaken"))
    assert found.outcome is OutcomeKind.FAILED
    assert "RuntimeError: shapes do not fit" in found.reason
    assert ".py:" in found.reason


def test_a_user_error_fails_the_run_with_its_reason(own: str, told: Any) -> None:
    found, events = told(spec(own, "nothing"))
    assert found.outcome is OutcomeKind.FAILED
    assert "has no attribute 'nothing'" in found.reason
    _, refused = events
    assert refused["event"] == "refused"
    assert f"{refused['given']}; allowed: {refused['allowed']}" == found.reason


def test_a_job_without_a_metric_is_not_evaluated(own: str, told: Any) -> None:
    found, events = told(spec(own, "unevaluated", threads=0))
    assert found.metric is None
    assert [e["stage"] for e in events if e["event"] == "stage"] == ["warm-up"]


def test_calibration_reports_its_rates_and_a_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from memfit.runtime import op_benchmark

    monkeypatch.setattr(memory, "peak_counter", Counter)
    monkeypatch.setattr(op_benchmark, "_MATMUL_SIZE", 64)
    monkeypatch.setattr(op_benchmark, "_COPY_BYTES", 2**16)
    path = tmp_path / "settings.json"
    request = OperatorRequest(signatures=(), timing_s=1.0, packages=("math",))
    for threads in (0, 1):
        path.write_text(json.dumps({"threads": threads, "device": "cpu"}))
        monkeypatch.setattr(sys, "stdin", io.StringIO(serialization.dumps(request) + "\n"))
        calibrate.main(path)
        rates, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert rates["calibration"]["flops_s"]["float32"] > 0
        assert result["measurement"]["outcome"] == "ok"


# --- as a child, with the real counters


def ended(asked: RunSpec) -> Measurement:
    return run(native.render(asked), on_event=lambda event: None)


@pytest.mark.skipif(counting_allocator.available() is not None, reason="no counting allocator")
def test_the_measured_peak_of_a_real_child_is_the_predicted_one(own: str) -> None:
    from memfit.cost.memory import memory_profile
    from memfit.types.machine import Calibration

    plan = Plan(uses=(use("activation-checkpointing", every=1),))
    asked = spec(own, plan=plan)
    found = ended(asked)
    predicted = memory_profile(trace(load(asked.job), plan), Calibration()).peak_bytes
    assert (found.outcome, found.reason) == (OutcomeKind.OK, "")
    assert found.peak_bytes == pytest.approx(predicted, rel=0.005)
    assert found.peak_source == "counting allocator"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a memory cap")
def test_a_cap_below_the_peak_ends_a_real_child_out_of_memory(own: str) -> None:
    # three blocks of 1024 x 1024 in float32 with gradients and two moments: 48 MiB and more
    found = ended(dataclasses.replace(spec(own, "large"), cap_bytes=24 * 2**20))
    assert found.outcome is OutcomeKind.OOM
    assert "out of memory" in found.reason
