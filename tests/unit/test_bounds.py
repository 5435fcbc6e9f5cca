"""Deadline, budget and micro-batch: limits that a search keeps, and its messages where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memfit.catalog import machine
from memfit.cli import main
from memfit.cost.step_time import sketched_s
from memfit.planner.capacity import Cap
from memfit.planner.multi_device_explanations import nothing_fits
from memfit.planner.request import Planning, Request
from memfit.planner.search import search
from memfit.planner.selection import Objective, missed_bounds, respects_micro_batch
from memfit.techniques.registry import TECHNIQUES, make_plain_plan, make_use
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import JobRef
from memfit.types.plan import Bounds, Plan
from memfit.types.result import Estimate, Interval


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of two blocks, too few for the search by layouts."""
    folder: Path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps({**sizes, **rest}))
    return f"hf:{folder}"


def searched(job: str, on: str = "L4", *, goal: Objective = Objective.FASTEST, **asked: float) -> Planning:
    few = frozenset(TECHNIQUES) - {"gradient-accumulation", "bf16-autocast", "ddp", "fsdp2"}
    bounds = Bounds(**asked, without=tuple(sorted(few)))  # type: ignore[arg-type]
    given = JobRef(spec=job, batch=8, steps=1000)
    return search(Request(job_ref=given, machine=machine(on), goal=goal, bounds=bounds), lambda *stage: None)


def test_a_feasible_deadline_is_kept_and_an_infeasible_deadline_or_budget_names_the_best_plan(
    small: str,
) -> None:
    free = searched(small).result.recommended
    assert free is not None
    assert free.estimate.step_s is not None
    takes = free.estimate.step_s.value * 1000
    kept = searched(small, deadline_s=takes * 1.2, goal=Objective.SMALLEST).result.recommended
    assert kept is not None
    assert kept.estimate.step_s is not None
    assert kept.estimate.step_s.value * 1000 <= takes * 1.2
    with pytest.raises(NothingFits, match=r"a deadline of .* \(the quickest that fits takes .* USD, with"):
        searched(small, deadline_s=takes / 10)
    with pytest.raises(NothingFits, match=r"a budget of 1e-06 USD \(the cheapest that fits takes"):
        searched(small, budget_usd=1e-6)


def test_a_requested_micro_batch_is_kept_and_one_that_does_not_divide_is_refused(small: str) -> None:
    for size in (2, 8):
        found = searched(small, micro_batch=size).result
        assert found.recommended is not None
        assert respects_micro_batch(found.recommended.estimate.plan, Bounds(micro_batch=size), 8)
    message = "a micro-batch of 3 does not divide the 8 samples of a rank; allowed: 1, 2, 4, 8"
    with pytest.raises(UserError, match=message):
        searched(small, micro_batch=3)


def test_a_micro_batch_that_no_allowed_plan_has_is_refused(small: str) -> None:
    bounds = Bounds(micro_batch=2, without=tuple(TECHNIQUES))
    request = Request(job_ref=JobRef(spec=small, batch=8), machine=machine("L4"), bounds=bounds)
    with pytest.raises(UserError, match="leave no plan with a micro-batch of 2; relax --without"):
        search(request, lambda *stage: None)


def test_the_fastest_plan_on_two_devices_is_no_slower_than_plain_ddp(small: str) -> None:
    """The sketched plans have step times, so the finalists are the quickest ones and not arbitrary ones."""
    found = searched(small, "2xH100-SXM")
    step = found.result.recommended and found.result.recommended.estimate.step_s
    assert step
    every = [found.predictor.sketch(c.estimate.plan).step_s for c in found.result.frontier]
    assert all(s is not None for s in every)
    ddp = found.predictor.whole(make_plain_plan(2)).step_s
    assert ddp is not None
    assert step.value <= ddp.value


def test_sketched_step_includes_communication_time_and_more_of_it_with_resharding() -> None:
    on = machine("8xL4")
    shards = [Plan(uses=(make_use("fsdp2", {"reshard": r}),), ranks=8) for r in (False, True)]
    once, again = (sketched_s(0.1, p, 10**9, on, micros=4) for p in shards)
    assert once is not None
    assert again is not None
    assert again > once > 0.1
    assert sketched_s(0.1, Plan(), 10**9, on, micros=4) == 0.1
    assert sketched_s(0.1, make_plain_plan(8), 10, on, micros=1) == pytest.approx(0.1, rel=0.01)


def test_missed_limits_name_the_best_plan_and_are_empty_without_limits_or_fitting_plans() -> None:
    exactly = Interval(value=1.0, low=1.0, high=1.0)
    fitting = Estimate(
        plan=Plan(),
        allocated_bytes=exactly,
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=exactly,
        flops_per_step=0,
        traced=True,
        usd=0.5,
    )
    assert (
        missed_bounds(Bounds(steps=10), [fitting])
        == missed_bounds(Bounds(steps=10, deadline_s=1.0), [])
        == ""
    )
    both = missed_bounds(Bounds(steps=10, deadline_s=5.0, budget_usd=2.0), [fitting])
    assert both == (
        "no allowed plan keeps to a deadline of 5 s (the quickest that fits takes 10 s and 5 USD, "
        "with plain) and a budget of 2 USD (the cheapest that fits takes 10 s and 5 USD, with plain), "
        "for 10 steps"
    )


def test_more_processes_than_devices_are_refused_before_anything_is_traced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "char-lm", "--on", "A100-80GB-SXM", "--nproc", "2"]) == 2
    told = capsys.readouterr().err
    assert "--nproc 2 does not suit A100-80GB-SXM, which has 1 device;" in told
    assert "2xA100-80GB-SXM" in told


def _traced(technique: str, step_s: float, usd: float) -> Estimate:
    exactly = Interval(value=1.0, low=1.0, high=1.0)
    return Estimate(
        plan=Plan(uses=(make_use(technique, {}),)),
        allocated_bytes=exactly,
        phase_peak_bytes={},
        at_peak_bytes={},
        by_module_bytes={},
        step_s=Interval(value=step_s, low=step_s, high=step_s),
        flops_per_step=0,
        traced=True,
        usd=usd,
    )


QUICK, CHEAP = _traced("adafactor", 36.0, 1.0), _traced("sgd", 72.0, 0.1)  # 10 h, 1000 USD; 20 h, 100 USD


def ways_out(needs_bytes: int = 0, *, planned: int = 1, **limits: float) -> tuple[str, ...]:
    """Return what is suggested if neither QUICK nor CHEAP keeps to a cap of 1 GiB and ``limits``, in 1,000
    steps, and there is no plan for more than ``planned`` devices."""

    def estimates(ranks: int) -> list[Estimate]:
        if ranks > planned:
            raise UserError("no plan")
        return []

    cap = Cap(bytes=2**30, needs=lambda e: needs_bytes, refuses=lambda plan: ())
    many: Any = SimpleNamespace(
        request=SimpleNamespace(goal=Objective.FASTEST, cap=cap),
        bounds=Bounds(steps=1000, **limits),  # type: ignore[arg-type]
        estimates=estimates,
        needs=cap.needs,
        fits_memory=cap.holds,
    )
    return nothing_fits(many, [QUICK, CHEAP], 1).ways


def test_each_suggested_deadline_or_budget_is_enough_alone() -> None:
    assert ways_out(deadline_s=3600.0) == ("a deadline of 10.00 h, with adafactor",)
    assert ways_out(deadline_s=15 * 3600.0, budget_usd=500.0) == (
        "a deadline of 20.00 h, with sgd",
        "a budget of 1000.00 USD, with adafactor",
    )
    assert ways_out(deadline_s=3600.0, budget_usd=10.0) == (
        "a deadline of 10.00 h and a budget of 1000.00 USD, with adafactor",
        "a deadline of 20.00 h and a budget of 100.00 USD, with sgd",
    )


def test_more_memory_is_suggested_only_for_plans_that_keep_to_the_deadline() -> None:
    assert ways_out(2**30 + 1, deadline_s=15 * 3600.0) == ("0.1 GiB more on each device",)
    assert ways_out(2**30 + 1, deadline_s=3600.0) == ()


def test_more_memory_is_suggested_too_if_no_plan_uses_as_many_devices_as_were_asked_for() -> None:
    assert ways_out(2**30 + 1, planned=0) == ("0.1 GiB more on each device",)


def test_a_device_that_only_a_machine_file_describes_is_not_suggested_as_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lab.toml"
    memory = '{value = 48e9, source = "torch", date = "2026-01-01", kind = "measured"}'
    device = f'name = "this machine"\nkind = "cuda"\nmemory_bytes = {memory}\n'
    file.write_text(f'name = "lab"\nplace = "world"\n[device]\n{device}')
    assert main(["plan", "char-lm", "--on", str(file), "--nproc", "2"]) == 2
    told = capsys.readouterr().err
    assert "--nproc 2 does not suit lab, which has 1 device;" in told
    assert "xthis machine" not in told
