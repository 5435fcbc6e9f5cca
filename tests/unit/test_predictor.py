"""Sketches are composed from traced parts, and compared with traces of the whole plan."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_machine import fact, processor
from tiny import WIDTH, Block, regression, words
from torch import nn

from memfit.catalog import machine
from memfit.cost.estimate import interval_around
from memfit.cost.memory import step_ops
from memfit.cost.op_time import signatures_by_weight
from memfit.cost.step_time_calibration import merge_calibrations
from memfit.jobs.registry import load
from memfit.planner import capacity, evaluate, machine_calibration, search, single_device
from memfit.planner.block_traces import BlockTracer, Key
from memfit.planner.capacity import Cap, fits_under, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.operator_timer import OperatorTimer
from memfit.planner.plan_space import usable
from memfit.planner.request import Request, job_facts
from memfit.planner.selection import Objective
from memfit.planner.shortlist import finalists, more_finalists
from memfit.planner.stored_predictions import CallOutcome
from memfit.trace import trace_pool
from memfit.trace.sample_dependence import _Trial, sample_dependence
from memfit.trace.tracer import trace
from memfit.trace.unroll import Mismatch
from memfit.types.deadline import Deadline, TimeUp
from memfit.types.errors import NothingFits, UserError
from memfit.types.job import Job, JobRef
from memfit.types.machine import Calibration, Machine
from memfit.types.parts import Parts
from memfit.types.plan import Accuracy, Bounds, Plan, Use, use
from memfit.types.result import Estimate, Interval
from memfit.types.trace import Trace

BLOCKS = 6


CPU = processor(float32=1e10)
CUDA = dataclasses.replace(CPU, device=dataclasses.replace(CPU.device, kind="cuda"))


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Ignores the progress."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    job = words(BLOCKS)
    return Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))


FULL, MIXED = use("activation-checkpointing", every=1), use("bf16-autocast")


def micro(parts: int) -> Use:
    return use("gradient-accumulation", micro_batches=parts)


PLANS = [
    (),
    (FULL,),
    (use("activation-checkpointing", every=2),),
    (MIXED,),
    (micro(8),),
    (micro(2),),
    (micro(4), MIXED),
    (micro(4), FULL),
    (use("sgd"),),
    (use("bf16-parameters", rounding="master"),),
    (use("optimizer-in-backward"),),
    (use("selective-checkpointing", keep="matmul"),),
    (use("chunked-cross-entropy", chunks=8),),
]


@pytest.mark.parametrize("uses", PLANS, ids=lambda u: Plan(uses=u).label)
def test_a_sketch_is_close_to_the_whole_trace_and_never_much_too_low(
    uses: tuple[Use, ...], predictor: Predictor
) -> None:
    plan = Plan(uses=uses)
    sketch, whole = predictor.sketch(plan), predictor.whole(plan)
    ratio = sketch.allocated_bytes.value / whole.allocated_bytes.value
    assert 0.98 <= ratio <= 1.10, ratio
    assert (sketch.traced, whole.traced) == (False, True)
    assert sketch.step_s is not None
    assert whole.step_s is not None
    assert sketch.step_s.value == pytest.approx(whole.step_s.value, rel=0.15)
    assert sketch.flops_per_step == pytest.approx(whole.flops_per_step, rel=0.05)


def test_the_sketch_of_plain_training_is_exact_to_64_bytes(predictor: Predictor) -> None:
    sketch, whole = predictor.sketch(Plan()), predictor.whole(Plan())
    for phase in ("forward", "backward", "optimizer"):
        assert sketch.phase_peak_bytes[phase] == pytest.approx(whole.phase_peak_bytes[phase], abs=64)


@pytest.mark.parametrize(
    ("uses", "least"),
    [
        ((), 0.5),
        ((FULL,), 0.95),
        ((use("selective-checkpointing", keep="matmul"),), 0.95),
        ((micro(4),), 0.8),
    ],
    ids=lambda u: Plan(uses=u).label if isinstance(u, tuple) else None,
)
def test_the_sketch_of_offload_counts_what_is_in_use_and_what_offload_does_not_move(
    uses: tuple[Use, ...], least: float
) -> None:
    """Without other techniques, packed queries, keys and values stay on the device, which no sketch knows."""
    job = load(JobRef(spec="char-lm"))
    found = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    plan = Plan(uses=(*uses, use("activation-offload", to="disk", minimum_kib=64)))
    ratio = found.sketch(plan).allocated_bytes.value / found.whole(plan).allocated_bytes.value
    assert least <= ratio <= 1.05, ratio


def test_activation_offload_lowers_the_forward_peak_and_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_OFFLOADED_BYTES", 1024)  # everything here is smaller than the default
    job = words(BLOCKS)
    found = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    plan = Plan(uses=(use("activation-offload", to="disk", minimum_kib=1),))
    plain, sketch = found.sketch(Plan()), found.sketch(plan)
    assert sketch.phase_peak_bytes["forward"] < plain.phase_peak_bytes["forward"]
    assert sketch.phase_peak_bytes["optimizer"] == plain.phase_peak_bytes["optimizer"]
    assert sketch.step_s is not None
    assert plain.step_s is not None
    assert sketch.step_s.value > plain.step_s.value


def test_parts_are_traced_once_and_shared_between_machines(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.sketch(Plan(uses=(micro(2),)))
    monkeypatch.setattr(evaluate, "trace", lambda *a, **k: pytest.fail("traced again"))
    other = Predictor(
        job=predictor.job,
        job_facts=predictor.job_facts,
        part_digests=predictor.part_digests,
        machine=dataclasses.replace(
            CPU,
            name="faster",
            device=dataclasses.replace(
                CPU.device, peak_flops={"float32": fact(1e13)}, bandwidth_bytes_s=fact(1e12)
            ),
        ),
    )
    slow, fast = predictor.sketch(Plan(uses=(micro(4),))), other.sketch(Plan(uses=(micro(4),)))
    assert fast.allocated_bytes == slow.allocated_bytes
    assert fast.step_s is not None
    assert slow.step_s is not None
    assert fast.step_s.value < slow.step_s.value


def test_a_sketch_of_a_batch_of_one_on_a_device_of_unknown_speed_has_no_step_time() -> None:
    job = dataclasses.replace(regression(), batch_size=1)
    unknown = dataclasses.replace(CPU, device=dataclasses.replace(CPU.device, peak_flops={}))
    found = Predictor(job=job, machine=unknown, job_facts=job_facts(job, "cpu"))
    sketch = found.sketch(Plan(uses=(use("activation-offload", to="disk", minimum_kib=64),)))
    assert sketch.step_s is None
    assert sketch.allocated_bytes.value > 0


@pytest.mark.parametrize("price", [Predictor.whole, Predictor.sketch])
def test_a_new_calibration_prices_the_same_traces_again(
    predictor: Predictor, price: Callable[[Predictor, Plan], Estimate]
) -> None:
    before = price(predictor, Plan())
    some = next(op for op in predictor.seen() if op.op == "aten.addmm.default")
    rates = Calibration(flops_s={"float32": 1e10}, bandwidth_bytes_s=1e9, op_s={some.signature: 100.0})
    try:
        predictor.recalibrate(rates)
        after = price(predictor, Plan())
    finally:
        predictor.recalibrate(Calibration())
    assert after.step_s is not None
    assert after.step_s.value > 100
    assert price(predictor, Plan()) == before


def test_the_heaviest_operators_are_probed_first(predictor: Predictor) -> None:
    ops = step_ops(predictor.trace(Plan()))
    weights = {op.signature: max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6) for op, _ in ops}
    order = signatures_by_weight(ops)
    assert set(order) == set(weights)
    total = {s: sum(weights[s] * n for op, n in ops if op.signature == s) for s in order}
    assert [total[s] for s in order] == sorted(total.values(), reverse=True)


# --- the facts of a job, caps and finalists


def test_the_plan_space_is_derived_from_the_model() -> None:
    facts = job_facts(words(BLOCKS), "cpu")
    assert (facts.block_count, facts.batch_size, facts.vocabulary) == (BLOCKS, 8, 512)
    bare = job_facts(regression(), "cuda")
    assert (bare.block_count, bare.vocabulary, bare.device_kind) == (0, 0, "cuda")


@pytest.mark.parametrize("wrong", [{"blocks": "layers"}, {"head": "projection"}])
def test_a_wrong_path_of_blocks_or_head_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"layers|projection"):
        job_facts(dataclasses.replace(words(), **wrong), "cpu")


def test_a_sketch_needs_about_as_much_of_a_gpu_as_the_whole_trace() -> None:
    on, job = machine("A100-80GB-SXM"), words(BLOCKS)
    predictor = Predictor(job=job, machine=on, job_facts=job_facts(job, "cuda"))
    whole = needed_bytes(predictor.whole(Plan()), on)  # mostly the context, whose upper end counts
    assert needed_bytes(predictor.sketch(Plan()), on) == pytest.approx(whole, rel=0.1)


def test_needed_bytes_include_the_overhead_beside_the_tensors(predictor: Predictor) -> None:
    found = predictor.whole(Plan())
    peak = found.allocated_bytes.value
    assert needed_bytes(found, CPU) == int(peak * 1.05) + 2 * 2**20
    assert needed_bytes(found, CUDA) == int(peak * 1.06) + 2**30
    assert fits_under(needed_bytes(found, CPU), CPU)(found)
    assert not fits_under(needed_bytes(found, CPU) - 1, CPU)(found)


def test_finalists_are_plain_the_best_and_the_smallest_without_repeats(predictor: Predictor) -> None:
    sketches = [predictor.sketch(Plan(uses=uses)) for uses in PLANS]
    smallest = min(sketches, key=lambda e: e.allocated_bytes.value)
    fastest = min(sketches, key=lambda e: e.step_s.value if e.step_s else 0.0)
    chosen = finalists(sketches, lambda e: True, Objective.FASTEST, 8)
    assert chosen[0] == Plan()
    assert {smallest.plan, fastest.plan} <= set(chosen)
    assert len(set(chosen)) == len(chosen) <= 10
    none_fit = finalists(sketches, lambda e: False, Objective.FASTEST, 8)
    assert smallest.plan in none_fit


def test_more_finalists_are_the_next_best_that_fit_after_correction_by_traced_plans(
    predictor: Predictor,
) -> None:
    """A trace of twice its sketch doubles the expected size of all sketches with the same techniques."""
    sketch = predictor.sketch(Plan())

    def made(seconds: float, size: float, *uses: Use) -> Estimate:
        return dataclasses.replace(
            sketch,
            plan=Plan(uses=uses),
            step_s=interval_around(seconds, 0.1),
            allocated_bytes=interval_around(size, 0.1),
        )

    offload, fewer = use("activation-offload", to="disk"), use("gradient-accumulation", micro_batches=2)
    recomputed = use("activation-checkpointing", every=2)
    more = use("gradient-accumulation", micro_batches=4)
    sketches = [
        made(1.0, 60, offload, fewer),
        made(2.0, 55, offload, more),
        made(3.0, 90, recomputed),
        made(4.0, 40, recomputed, more),
        made(5.0, 120),
    ]
    cap = Cap(bytes=100, needs=lambda e: int(e.allocated_bytes.value), refuses=lambda plan: ())
    traced = [made(1.0, 130, offload, fewer), made(5.0, 120)]

    def found(most: int) -> list[Plan]:
        return more_finalists(sketches, traced, cap=cap, goal=Objective.FASTEST, most=most)

    assert found(7) == [Plan(uses=(recomputed,))]
    assert found(12) == [Plan(uses=(recomputed,)), Plan(uses=(recomputed, more))]
    assert found(6) == []


# --- the search as a whole, on a machine that is not here


def asked(monkeypatch: pytest.MonkeyPatch, machine: Machine = CPU, cap_bytes: int | None = None) -> Request:
    monkeypatch.setattr("memfit.planner.request.load", lambda ref: words(2))
    monkeypatch.setattr(single_device, "FINALISTS", 3)
    monkeypatch.setattr(capacity, "CPU_HEADROOM_BYTES", 0)  # larger than the whole job here
    return Request(
        job_ref=JobRef(spec="words"),
        machine=machine,
        cap_bytes=cap_bytes,
        accuracy=Accuracy.EXACT,
        goal=Objective.SMALLEST,
    )


def test_a_search_recommends_a_plan_that_fits_and_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    plain = Predictor(job=words(2), machine=CPU, job_facts=job_facts(words(2), "cpu")).whole(Plan())
    cap = int(plain.allocated_bytes.value * 0.95)
    found = search.search(asked(monkeypatch, cap_bytes=cap), lambda stage, *rest: stages.append(stage))
    assert found.cap_reason == "asked for"
    assert found.result.recommended is not None
    best = found.result.recommended.estimate
    assert best.traced
    assert needed_bytes(best, CPU) <= cap < needed_bytes(plain, CPU)
    assert set(stages) == {"trace", "search", "price", "finalists"}
    assert {r.technique for r in found.result.recommended.reasons if r.kind == "left_out_accuracy"} >= {"sgd"}


def test_a_search_raises_where_nothing_fits_and_caps_a_gpu_at_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NothingFits) as told:
        search.search(asked(monkeypatch, cap_bytes=1), quiet)
    assert 1 == told.value.cap_bytes < told.value.least_bytes
    request = asked(
        monkeypatch,
        dataclasses.replace(CUDA, device=dataclasses.replace(CUDA.device, memory_bytes=fact(2**34))),
    )
    found = search.search(request, quiet)
    assert (found.cap_bytes, found.cap_reason) == (2**34, "the device's memory")


def test_the_demonstration_cap_is_the_jobs_share_of_the_baselines_peak(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, peak = asked(monkeypatch), Interval(value=800, low=800, high=800)
    basis = dataclasses.replace(predictor.sketch(Plan()), allocated_bytes=peak)
    assert search._cap(request, basis, 0.25) == (
        200,
        "demonstration: a quarter of the baseline's predicted peak",
    )
    assert search._cap(request, basis, 0.4) == (
        320,
        "demonstration: 40% of the baseline's predicted peak",
    )
    with pytest.raises(UserError, match="at most 1"):
        search._cap(request, basis, 1.5)


def test_excluded_techniques_are_not_considered(monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(monkeypatch, cap_bytes=2**34)
    unwanted = dataclasses.replace(request, bounds=Bounds(without=("activation-checkpointing",)))
    searches = [search.search(r, quiet).result for r in (request, unwanted)]
    used = [{u.technique for c in found.frontier for u in c.estimate.plan.uses} for found in searches]
    assert "activation-checkpointing" not in used[1]
    assert searches[1].considered < searches[0].considered


def test_optimizers_are_left_out_where_their_states_are_small(predictor: Predictor) -> None:
    offered, _ = usable(predictor.job_facts, Accuracy.ANY)
    fewer, reasons = usable(predictor.job_facts, Accuracy.ANY, negligible_state_bytes=2**20)
    gone = {t.name for t in offered} - {t.name for t in fewer}
    assert {"adafactor", "sgd"} <= gone == {r.technique for r in reasons if r.kind == "left_out_small"}
    assert {r.saved_bytes for r in reasons if r.kind == "left_out_small"} == {2**20}


def test_parts_traced_in_parallel_equal_parts_traced_one_by_one() -> None:
    ready, plain = (
        Predictor(job=words(2), machine=CPU, job_facts=job_facts(words(2), "cpu")) for _ in range(2)
    )
    some = [Plan(uses=uses) for uses in PLANS[:4]]
    ready.prepare(some)
    made = dict(ready.part_digests)
    assert [ready.sketch(plan) for plan in some] == [plain.sketch(plan) for plan in some]
    assert ready.part_digests.keys() == made.keys()
    ready.trace_all(some)
    assert [ready.whole(plan) for plan in some] == [plain.whole(plan) for plan in some]


def _without_clocks(ops: evaluate.Weighted) -> list[object]:
    return [(dataclasses.replace(op, clock=0), count) for op, count in ops]


def _passes(predictor: Predictor) -> dict[object, object]:
    """Return of each part what a sketch takes of its passes, without the clocks of the operators that stand
    for equal ones."""
    of_updates = (evaluate._RESIDENT, evaluate._OPTIMIZER)
    return {
        key: (
            [x for i, x in enumerate(digest.entries) if i not in of_updates],
            _without_clocks(digest.micro_ops),
            digest.micro_batches,
        )
        for key, digest in predictor.part_digests.items()
        if key.steps == 1
    }


RECOMPUTED = [Plan(uses=(use("activation-checkpointing", every=k),)) for k in (1, 2, 3)]


@pytest.mark.parametrize("blocks", [3, 6, 13])
def test_parts_with_some_blocks_recomputed_are_put_together_from_those_with_none_and_all(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = words(blocks)
    fast, slow = (Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu")) for _ in range(2))
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: False)
    plans, traced = [Plan(), *RECOMPUTED, *(p.with_use(MIXED) for p in (Plan(), *RECOMPUTED))], list[Plan]()

    def watched(job: Job, plan: Plan, **options: object) -> Trace:
        traced.append(plan)
        return trace(job, plan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "trace", watched)
    fast.prepare(plans)
    assert not [
        p for p in traced if (use := p.get("activation-checkpointing")) and use.settings["every"] != 1
    ]
    monkeypatch.setattr(Predictor, "_mix_sources", lambda *part: None)
    slow.prepare(plans)
    assert _passes(fast) == _passes(slow)
    assert [fast.sketch(plan) for plan in plans] == [slow.sketch(plan) for plan in plans]


def test_parts_that_cannot_be_put_together_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*traces: object) -> Trace:
        raise Mismatch("refused")

    job = words(3)
    predictor = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    monkeypatch.setattr(trace_pool, "_may_fork", lambda: False)
    monkeypatch.setattr(evaluate, "mix_recomputed", refused)
    predictor.prepare([Plan(), *RECOMPUTED])
    monkeypatch.setattr(evaluate, "trace", lambda *a, **k: pytest.fail("traced again"))
    assert [predictor.sketch(plan).plan for plan in RECOMPUTED] == RECOMPUTED


def test_what_a_search_out_of_time_has_traced_is_put_together_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = words(3)
    predictor, inner = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu")), Predictor._add_parts

    def out_of_time(
        predictor: Predictor, calls: Sequence[Callable[[], CallOutcome]], *args: Any, **deadline: Any
    ) -> None:
        inner(predictor, calls, *args, **deadline)
        if not deadline:
            raise TimeUp

    monkeypatch.setattr(trace_pool, "_may_fork", lambda: False)
    monkeypatch.setattr(Predictor, "_add_parts", out_of_time)
    with pytest.raises(TimeUp):
        predictor.prepare([Plan(), *RECOMPUTED])
    assert predictor.compose() == []
    monkeypatch.setattr(evaluate, "trace", lambda *a, **k: pytest.fail("traced again"))
    assert [predictor.sketch(plan).plan for plan in RECOMPUTED] == RECOMPUTED


def test_whether_samples_depend_on_each_other_is_tested_beside_the_parts_that_do_not_split_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = words(3)
    plans = [Plan(), *RECOMPUTED, Plan(uses=(MIXED,))]
    predictor = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    predictor.test_dependence(plans, Deadline())
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "sample_dependence", lambda job: pytest.fail("tested again"))
        assert predictor.dependence == sample_dependence(words(3))
        predictor.test_dependence(plans, Deadline())
    monkeypatch.setattr(evaluate, "trace", lambda *a, **k: pytest.fail("traced again"))
    assert all(predictor._load_part(plan, 1) for plan in (Plan(), RECOMPUTED[0], Plan(uses=(MIXED,))))


def test_after_the_deadline_the_dependence_is_unknown_and_tested_where_it_is_needed() -> None:
    job = words(3)
    predictor = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    predictor.test_dependence([Plan()], Deadline.after(0.0))
    assert "dependence" not in vars(predictor)
    assert predictor.dependence == sample_dependence(job)


def test_a_trial_that_autograd_refuses_in_a_forked_process_is_made_in_the_original_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(trial: object) -> object:
        if multiprocessing.current_process().daemon:
            raise RuntimeError("Unable to handle autograd's threading with fork-based multiprocessing")
        return run(trial)  # type: ignore[arg-type]

    job, run = words(3), _Trial.run
    expected = sample_dependence(words(3))
    monkeypatch.setattr(trace_pool, "_REFUSED", [])
    monkeypatch.setattr(_Trial, "run", refused)
    predictor = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu"))
    predictor.test_dependence([Plan(), *RECOMPUTED], Deadline())
    assert predictor.dependence == expected


def test_the_optimizer_of_plain_training_is_sketched_from_its_whole_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = dataclasses.replace(words(6), batch_size=1)  # no micro-batches
    predictor, parts = Predictor(job=job, machine=CPU, job_facts=job_facts(job, "cpu")), list[int]()
    whole = predictor.whole(Plan())

    def watched(job: Job, plan: Plan, **options: Any) -> Trace:
        parts.append(options["steps"])
        return trace(job, plan, **options)

    monkeypatch.setattr(evaluate, "trace", watched)
    sketch = predictor.sketch(Plan())
    assert set(parts) == {1}
    assert sketch.phase_peak_bytes["optimizer"] == whole.phase_peak_bytes["optimizer"]


@pytest.mark.parametrize("machine", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "uses",
    [
        (),
        (micro(8),),
        (micro(8), use("bf16-parameters", rounding="master")),
        (use("bf16-parameters", rounding="stochastic"),),
        (use("adamw-8bit"),),
        (use("adafactor"),),
        (use("adamw-single"),),
    ],
    ids=lambda uses: Plan(uses=uses).label,
)
def test_updates_after_gradients_of_zero_need_the_memory_and_the_operators_of_those_after_a_pass(
    uses: tuple[Use, ...], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, plan = words(3), Plan(uses=uses)
    predictor = Predictor(job=job, machine=machine, job_facts=job_facts(job, machine.device.kind))
    assert predictor._updates_need_no_pass(plan)
    updates = predictor._trace_part(job, plan, 2)
    monkeypatch.setattr(Predictor, "_updates_need_no_pass", lambda *plan: False)
    with_passes = predictor._trace_part(job, plan, 2)
    assert len(updates.ops) < len(with_passes.ops)
    fast, slow = (evaluate._digest(traced, plan) for traced in (updates, with_passes))
    used = [evaluate._RESIDENT, evaluate._OPTIMIZER, evaluate._HOST]
    assert [fast.entries[i] for i in used] == [slow.entries[i] for i in used]
    assert _without_clocks(fast.optimizer_ops) == _without_clocks(slow.optimizer_ops)


def test_updates_are_traced_with_their_pass_if_more_than_gradients_is_left_of_it() -> None:
    job = regression()  # the mean of squares keeps the memory of the squares
    predictor = Predictor(job=job, machine=CUDA, job_facts=job_facts(job, "cuda"))
    assert not predictor._updates_need_no_pass(Plan())


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = bare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


def bare() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(5)))


def test_the_parts_of_a_bare_sequential_are_those_of_a_model_that_contains_it() -> None:
    key = Key(tensor=1, sequence=False, vocabulary="whole", context=1, compute="fp32", uses=(), samples=2)

    def parts(build: Callable[[], nn.Module]) -> Parts:
        job = Job(
            name="bare",
            build_model=build,
            make_batch=lambda step, seed: torch.zeros(4, 8, WIDTH),
            loss=lambda model, batch: model(batch * 2).square().mean(),
            batch_size=4,
        )
        return BlockTracer(job, "cuda").parts(key, lambda ops: float(len(ops)))

    found = parts(bare)
    assert found == parts(Wrapped)
    assert min(found.before.forward_s, found.block.forward_s, found.after.forward_s) > 0


# --- measured rivals of the best plan


class TimedPlans:
    """Bytes and seconds of plans that a test sets; measuring the operators changes the seconds."""

    def __init__(self, like: Estimate, told: dict[Plan, tuple[int, float]], then: dict[Plan, float]) -> None:
        self.calibration = Calibration()
        self.like, self.told, self.then, self.measured = like, told, then, set[Plan]()

    def whole(self, plan: Plan) -> Estimate:
        size, seconds = self.told[plan]
        seconds = self.then.get(plan, seconds) if plan in self.measured else seconds
        return dataclasses.replace(
            self.like,
            plan=plan,
            allocated_bytes=interval_around(size, 0.0),
            step_s=interval_around(seconds, 0.0),
        )

    def trace_all(self, plans: Sequence[Plan]) -> None:
        assert all(plan in self.told for plan in plans)


ONE, TWO = use("activation-checkpointing", every=1), use("adamw-8bit")
BOTH, FIRST, SECOND = (Plan(uses=uses) for uses in ((ONE, TWO), (ONE,), (TWO,)))
OTHER = Plan(uses=(use("gradient-accumulation", micro_batches=2),))


@pytest.mark.parametrize(
    ("then", "wanted"),
    [
        ({}, FIRST),  # quicker than both techniques, and it fits
        ({FIRST: 3.0}, BOTH),
        ({FIRST: 3.0, BOTH: 3.2}, OTHER),  # what was only modelled is measured, and another is best
        ({FIRST: 3.0, BOTH: 3.2, OTHER: 4.0}, FIRST),
    ],
)
def test_the_best_plan_is_measured_beside_those_that_lack_one_of_its_techniques(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, then: dict[Plan, float], wanted: Plan
) -> None:
    mib = 2**20
    told = {
        Plan(): (900 * mib, 1.0),
        BOTH: (300 * mib, 1.6),
        FIRST: (400 * mib, 1.5),
        SECOND: (800 * mib, 1.0),
        OTHER: (350 * mib, 2.0),
    }
    timed = TimedPlans(predictor.whole(Plan()), told, then)
    monkeypatch.setattr(single_device, "calibrate", lambda p, r, t, plans, **rest: p.measured.update(plans))
    request = Request(job_ref=JobRef(spec="words"), machine=dataclasses.replace(CPU, is_here=True))
    made = [timed.whole(plan) for plan in (Plan(), BOTH, OTHER)]
    fits = capacity.fits_under(500 * mib, request.machine)
    found = single_device._with_rivals(timed, request, fits, made, quiet)
    fitting = [e for e in found if e.allocated_bytes.value < 450 * mib]
    best = min(fitting, key=lambda e: e.step_s.value if e.step_s else 0.0)
    assert best.plan == wanted
    assert wanted in timed.measured


# --- calibration by a child


def here(monkeypatch: pytest.MonkeyPatch, told: Calibration) -> Request:
    monkeypatch.setattr(OperatorTimer, "measure", lambda *asked: told)
    return asked(monkeypatch, dataclasses.replace(CPU, is_here=True), cap_bytes=2**30)


def test_on_this_machine_the_search_calibrates_and_keeps_the_better_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Calibration(
        flops_s={"float32": 1e9}, bandwidth_bytes_s=1e8, op_s={"s": 1.0}, overhead_s=1e-6, took_s=1.0
    )
    found = search.search(here(monkeypatch, told), quiet).predictor.calibration
    assert found.machine == "this machine"
    assert found.flops_s == {"float32": 1e9}
    assert found.took_s >= 2.0  # calibrated twice: over the search space, and for its best plans
    slower = dataclasses.replace(
        told, flops_s={"float32": 5e8, "bfloat16": 1e9}, op_s={"s": 2.0, "t": 1.0}, overhead_s=2e-6
    )
    both = merge_calibrations(found, slower)
    assert both.flops_s == {"float32": 1e9, "bfloat16": 1e9}
    assert (both.overhead_s, both.op_s) == (1e-6, {"s": 2.0, "t": 1.0})


def test_timings_of_operators_without_rates_leave_the_known_rates_unchanged() -> None:
    """As they are measured when the rates are known but could not be stored."""
    known = Calibration(
        flops_s={"float32": 1e9, "bfloat16": 2e9}, bandwidth_bytes_s=1e8, overhead_s=1e-6, op_s={"s": 1.0}
    )
    both = merge_calibrations(known, Calibration(op_s={"t": 2.0}))
    assert both.flops_s == known.flops_s
    assert (both.bandwidth_bytes_s, both.overhead_s) == (1e8, 1e-6)
    assert both.op_s == {"s": 1.0, "t": 2.0}


def test_representatives_span_batch_and_precision(predictor: Predictor) -> None:
    labels = {p.label for p in machine_calibration._representatives(predictor, [])}
    assert {"plain", "bf16-autocast", "gradient-accumulation(micro_batches=8)"} <= labels
    alone = dataclasses.replace(predictor, job_facts=dataclasses.replace(predictor.job_facts, batch_size=1))
    assert [p.label for p in machine_calibration._representatives(alone, [])] == ["plain", "bf16-autocast"]
    assert [p.label for p in machine_calibration._representatives(alone, ["bf16-autocast"])] == ["plain"]
