"""Sketches are composed from parts: held against traces of the whole plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from tiny import regression, words

from memfit.cost.estimate import around
from memfit.cost.memory import step_ops
from memfit.cost.op_time import signatures_by_weight
from memfit.cost.step_time_calibration import merged
from memfit.planner import evaluate, single_device
from memfit.planner.evaluate import Pricer
from memfit.planner.plan_space import usable
from memfit.planner.recompute_budget import Cap
from memfit.planner.selection import Objective
from memfit.planner.shortlist import finalists, more_finalists
from memfit.planner.single_device import Request, fits_under, needed_bytes, space_of
from memfit.types.errors import NothingFits, RunError, UserError
from memfit.types.job import JobRef
from memfit.types.machine import Calibration, Device, Fact, Machine
from memfit.types.plan import Accuracy, Bounds, Plan, Use, use
from memfit.types.result import Estimate, Interval, Measurement, OutcomeKind

BLOCKS = 6


def fact(value: float) -> Fact:
    return Fact(value=value, source="a test", date="2026-01-01", kind="assumed")


CPU = Machine(
    name="test",
    device=Device(
        name="test",
        kind="cpu",
        memory_bytes=fact(2**30),
        bandwidth_bytes_s=fact(1e9),
        peak_flops={"float32": fact(1e10)},
        power_w=fact(10.0),
    ),
)
CUDA = dataclasses.replace(CPU, device=dataclasses.replace(CPU.device, kind="cuda"))


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def pricer() -> Pricer:
    job = words(BLOCKS)
    return Pricer(job=job, machine=CPU, space=space_of(job, "cpu"))


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
def test_a_sketch_is_close_and_never_much_too_low(uses: tuple[Use, ...], pricer: Pricer) -> None:
    plan = Plan(uses=uses)
    sketch, whole = pricer.sketch(plan), pricer.whole(plan)
    ratio = sketch.allocated_bytes.value / whole.allocated_bytes.value
    assert 0.98 <= ratio <= 1.10, ratio
    assert (sketch.traced, whole.traced) == (False, True)
    assert sketch.step_s is not None
    assert whole.step_s is not None
    assert sketch.step_s.value == pytest.approx(whole.step_s.value, rel=0.15)
    assert sketch.flops_per_step == pytest.approx(whole.flops_per_step, rel=0.05)


def test_plain_training_is_sketched_to_one_storage(pricer: Pricer) -> None:
    sketch, whole = pricer.sketch(Plan()), pricer.whole(Plan())
    for phase in ("forward", "backward", "optimizer"):
        assert sketch.phase_peak_bytes[phase] == pytest.approx(whole.phase_peak_bytes[phase], abs=64)


def test_offload_takes_what_is_saved_out_and_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_OFFLOADED_BYTES", 1024)  # everything here is smaller than the default
    job = words(BLOCKS)
    found = Pricer(job=job, machine=CPU, space=space_of(job, "cpu"))
    plan = Plan(uses=(use("activation-offload", to="disk", minimum_kib=1),))
    plain, sketch = found.sketch(Plan()), found.sketch(plan)
    assert sketch.phase_peak_bytes["forward"] < plain.phase_peak_bytes["forward"]
    assert sketch.phase_peak_bytes["optimizer"] == plain.phase_peak_bytes["optimizer"]
    assert sketch.step_s is not None
    assert plain.step_s is not None
    assert sketch.step_s.value > plain.step_s.value


def test_parts_are_traced_once_and_shared_between_machines(
    pricer: Pricer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pricer.sketch(Plan(uses=(micro(2),)))
    monkeypatch.setattr(evaluate, "trace", lambda *a, **k: pytest.fail("traced again"))
    other = Pricer(
        job=pricer.job,
        space=pricer.space,
        parts=pricer.parts,
        machine=dataclasses.replace(
            CPU,
            name="faster",
            device=dataclasses.replace(
                CPU.device, peak_flops={"float32": fact(1e13)}, bandwidth_bytes_s=fact(1e12)
            ),
        ),
    )
    slow, fast = pricer.sketch(Plan(uses=(micro(4),))), other.sketch(Plan(uses=(micro(4),)))
    assert fast.allocated_bytes == slow.allocated_bytes
    assert fast.step_s is not None
    assert slow.step_s is not None
    assert fast.step_s.value < slow.step_s.value


def test_a_batch_of_one_and_an_unknown_speed() -> None:
    job = dataclasses.replace(regression(), batch_size=1)
    unknown = dataclasses.replace(CPU, device=dataclasses.replace(CPU.device, peak_flops={}))
    found = Pricer(job=job, machine=unknown, space=space_of(job, "cpu"))
    sketch = found.sketch(Plan(uses=(use("activation-offload", to="disk", minimum_kib=64),)))
    assert sketch.step_s is None
    assert sketch.allocated_bytes.value > 0


def test_a_new_calibration_prices_the_same_traces_again(pricer: Pricer) -> None:
    before = pricer.whole(Plan())
    some = next(op for op in pricer.seen() if op.op == "aten.addmm.default")
    rates = Calibration(flops_s={"float32": 1e10}, bandwidth_bytes_s=1e9, op_s={some.signature: 100.0})
    try:
        pricer.recalibrate(rates)
        after = pricer.whole(Plan())
    finally:
        pricer.recalibrate(Calibration())
    assert after.step_s is not None
    assert after.step_s.value > 100
    assert pricer.whole(Plan()) == before


def test_the_heaviest_operators_are_probed_first(pricer: Pricer) -> None:
    ops = step_ops(pricer.trace(Plan()))
    weights = {op.signature: max(op.flops / 1e11, op.moved_bytes / 1e10, 2e-6) for op, _ in ops}
    order = signatures_by_weight(ops)
    assert set(order) == set(weights)
    total = {s: sum(weights[s] * n for op, n in ops if op.signature == s) for s in order}
    assert [total[s] for s in order] == sorted(total.values(), reverse=True)


# --- the space, caps and finalists


def test_the_space_is_read_off_the_model() -> None:
    space = space_of(words(BLOCKS), "cpu")
    assert (space.block_count, space.batch_size, space.vocabulary, space.has_head) == (BLOCKS, 8, 512, True)
    bare = space_of(regression(), "cuda")
    assert (bare.block_count, bare.has_head, bare.device) == (0, False, "cuda")


@pytest.mark.parametrize("wrong", [{"blocks": "layers"}, {"head": "projection"}])
def test_a_wrong_path_in_the_job_is_told(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"layers|projection"):
        space_of(dataclasses.replace(words(), **wrong), "cpu")


def test_a_cap_must_hold_what_lies_beside_the_tensors(pricer: Pricer) -> None:
    found = pricer.whole(Plan())
    peak = found.allocated_bytes.value
    assert needed_bytes(found, CPU) == int(peak * 1.05) + 2 * 2**20
    assert needed_bytes(found, CUDA) == int(peak * 1.06) + 2**30
    assert fits_under(needed_bytes(found, CPU), CPU)(found)
    assert not fits_under(needed_bytes(found, CPU) - 1, CPU)(found)


def test_finalists_are_plain_the_best_and_the_smallest_without_repeats(pricer: Pricer) -> None:
    sketches = [pricer.sketch(Plan(uses=uses)) for uses in PLANS]
    smallest = min(sketches, key=lambda e: e.allocated_bytes.value)
    fastest = min(sketches, key=lambda e: e.step_s.value if e.step_s else 0.0)
    chosen = finalists(sketches, lambda e: True, Objective.FASTEST, 8)
    assert chosen[0] == Plan()
    assert {smallest.plan, fastest.plan} <= set(chosen)
    assert len(set(chosen)) == len(chosen) <= 10
    none_fit = finalists(sketches, lambda e: False, Objective.FASTEST, 8)
    assert smallest.plan in none_fit


def test_more_finalists_are_the_next_best_that_fit_as_the_traced_did(pricer: Pricer) -> None:
    """A trace that is twice its sketch says so of all sketches with the same techniques."""
    sketch = pricer.sketch(Plan())

    def made(seconds: float, size: float, *uses: Use) -> Estimate:
        return dataclasses.replace(
            sketch, plan=Plan(uses=uses), step_s=around(seconds, 0.1), allocated_bytes=around(size, 0.1)
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
    monkeypatch.setattr(single_device, "load", lambda ref: words(2))
    monkeypatch.setattr(single_device, "FINALISTS", 3)
    monkeypatch.setattr(single_device, "CPU_HEADROOM_BYTES", 0)  # larger than the whole job here
    return Request(
        job=JobRef(spec="words"),
        machine=machine,
        cap_bytes=cap_bytes,
        accuracy=Accuracy.EXACT,
        goal=Objective.SMALLEST,
    )


def test_a_search_recommends_a_plan_that_fits_and_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    plain = Pricer(job=words(2), machine=CPU, space=space_of(words(2), "cpu")).whole(Plan())
    cap = int(plain.allocated_bytes.value * 0.95)
    found = single_device.search(asked(monkeypatch, cap_bytes=cap), lambda stage, *rest: stages.append(stage))
    assert found.cap_reason == "asked for"
    assert found.result.recommended is not None
    best = found.result.recommended.estimate
    assert best.traced
    assert needed_bytes(best, CPU) <= cap < needed_bytes(plain, CPU)
    assert set(stages) == {"trace", "search", "price", "finalists"}
    assert {r.technique for r in found.result.recommended.reasons if r.kind == "left_out_accuracy"} >= {"sgd"}


def test_nothing_fits_is_told_and_a_device_without_a_cap_has_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NothingFits) as told:
        single_device.search(asked(monkeypatch, cap_bytes=1), quiet)
    assert 1 == told.value.cap_bytes < told.value.least_bytes
    request = asked(
        monkeypatch,
        dataclasses.replace(CUDA, device=dataclasses.replace(CUDA.device, memory_bytes=fact(2**34))),
    )
    found = single_device.search(request, quiet)
    assert (found.cap_bytes, found.cap_reason) == (2**34, "the device's memory")


def test_a_job_says_what_part_of_plain_training_is_shown(
    pricer: Pricer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, peak = asked(monkeypatch), Interval(value=800, low=800, high=800)
    basis = dataclasses.replace(pricer.sketch(Plan()), allocated_bytes=peak)
    assert single_device._cap(request, basis, 0.25) == (
        200,
        "demonstration: a quarter of the baseline's predicted peak",
    )
    assert single_device._cap(request, basis, 0.4) == (
        320,
        "demonstration: 40% of the baseline's predicted peak",
    )
    with pytest.raises(UserError, match="at most 1"):
        single_device._cap(request, basis, 1.5)


def test_techniques_that_nobody_wants_are_not_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(monkeypatch, cap_bytes=2**34)
    unwanted = dataclasses.replace(request, bounds=Bounds(without=("activation-checkpointing",)))
    searches = [single_device.search(r, quiet).result for r in (request, unwanted)]
    used = [{u.technique for c in found.frontier for u in c.estimate.plan.uses} for found in searches]
    assert "activation-checkpointing" not in used[1]
    assert searches[1].considered < searches[0].considered


def test_optimizers_are_left_out_where_their_states_are_small(pricer: Pricer) -> None:
    offered, _ = usable(pricer.space, Accuracy.ANY)
    fewer, reasons = usable(pricer.space, Accuracy.ANY, small_states_bytes=2**20)
    gone = {t.name for t in offered} - {t.name for t in fewer}
    assert {"adafactor", "sgd"} <= gone == {r.technique for r in reasons if r.kind == "left_out_small"}
    assert {r.saved_bytes for r in reasons if r.kind == "left_out_small"} == {2**20}


def test_parts_made_side_by_side_are_those_made_one_by_one() -> None:
    ready, plain = (Pricer(job=words(2), machine=CPU, space=space_of(words(2), "cpu")) for _ in range(2))
    some = [Plan(uses=uses) for uses in PLANS[:4]]
    ready.prepare(some)
    made = dict(ready.parts)
    assert [ready.sketch(plan) for plan in some] == [plain.sketch(plan) for plan in some]
    assert ready.parts.keys() == made.keys()
    ready.trace_all(some)
    assert [ready.whole(plan) for plan in some] == [plain.whole(plan) for plan in some]


# --- what a sketch thought too large, and what was measured last


class Prices:
    """Bytes and seconds of plans as a test has them; measured operators change the seconds."""

    def __init__(self, like: Estimate, told: dict[Plan, tuple[int, float]], then: dict[Plan, float]) -> None:
        self.calibration = Calibration()
        self.like, self.told, self.then, self.measured = like, told, then, set[Plan]()

    def whole(self, plan: Plan) -> Estimate:
        size, seconds = self.told[plan]
        seconds = self.then.get(plan, seconds) if plan in self.measured else seconds
        return dataclasses.replace(
            self.like, plan=plan, allocated_bytes=around(size, 0.0), step_s=around(seconds, 0.0)
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
    pricer: Pricer, monkeypatch: pytest.MonkeyPatch, then: dict[Plan, float], wanted: Plan
) -> None:
    mib = 2**20
    told = {
        Plan(): (900 * mib, 1.0),
        BOTH: (300 * mib, 1.6),
        FIRST: (400 * mib, 1.5),
        SECOND: (800 * mib, 1.0),
        OTHER: (350 * mib, 2.0),
    }
    prices = Prices(pricer.whole(Plan()), told, then)
    monkeypatch.setattr(single_device, "calibrate", lambda p, r, t, plans, **rest: p.measured.update(plans))
    device = dataclasses.replace(CPU.device, name="this machine")
    request = Request(job=JobRef(spec="words"), machine=dataclasses.replace(CPU, device=device))
    made = [prices.whole(plan) for plan in (Plan(), BOTH, OTHER)]
    fits = single_device.fits_under(500 * mib, request.machine)
    found = single_device._with_rivals(prices, request, fits, made, quiet)
    fitting = [e for e in found if e.allocated_bytes.value < 450 * mib]
    best = min(fitting, key=lambda e: e.step_s.value if e.step_s else 0.0)
    assert best.plan == wanted
    assert wanted in prices.measured


# --- calibration by a child


def here(monkeypatch: pytest.MonkeyPatch, told: Calibration | None) -> Request:
    def child(config: object, *, on_event: object) -> Measurement:
        if told is None:
            return Measurement(outcome=OutcomeKind.FAILED, reason="it broke")
        assert callable(on_event)
        on_event({"event": "stage", "stage": "other"})
        on_event({"event": "calibration", "calibration": told})
        return Measurement(outcome=OutcomeKind.OK)

    monkeypatch.setattr(single_device, "run", child)
    device = dataclasses.replace(CPU.device, name="this machine")
    return asked(monkeypatch, dataclasses.replace(CPU, device=device), cap_bytes=2**30)


def test_on_this_machine_the_search_calibrates_and_keeps_the_better_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Calibration(
        flops_s={"float32": 1e9}, bandwidth_bytes_s=1e8, op_s={"s": 1.0}, overhead_s=1e-6, took_s=1.0
    )
    found = single_device.search(here(monkeypatch, told), quiet).pricer.calibration
    assert found.machine == "this machine"
    assert found.flops_s == {"float32": 1e9}
    assert found.took_s >= 2.0  # asked of what spans the search, and of what its best plans need
    slower = dataclasses.replace(
        told, flops_s={"float32": 5e8, "bfloat16": 1e9}, op_s={"s": 2.0, "t": 1.0}, overhead_s=2e-6
    )
    both = merged(found, slower)
    assert both.flops_s == {"float32": 1e9, "bfloat16": 1e9}
    assert (both.overhead_s, both.op_s) == (1e-6, {"s": 2.0, "t": 1.0})


def test_a_calibration_that_breaks_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="it broke"):
        single_device.search(here(monkeypatch, None), quiet)


def test_representatives_span_batch_and_precision(pricer: Pricer) -> None:
    labels = {p.label for p in single_device._representatives(pricer, [])}
    assert {"plain", "bf16-autocast", "gradient-accumulation(micro_batches=8)"} <= labels
    alone = dataclasses.replace(pricer, space=dataclasses.replace(pricer.space, batch_size=1))
    assert [p.label for p in single_device._representatives(alone, [])] == ["plain", "bf16-autocast"]
    assert [p.label for p in single_device._representatives(alone, ["bf16-autocast"])] == ["plain"]
