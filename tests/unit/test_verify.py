"""Verdicts: laws of the equivalence test, known t values, and a case for every kind of verdict."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Q3

from memfit.types.job import JobRef, Metric
from memfit.types.launch import RunSpec
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Measurement, OutcomeKind, Run, Verdict, VerdictKind
from memfit.verify import float32, reproducibility, verdict
from memfit.verify.equivalence import critical_t, pairs_needed, tost, tost_power

E0, E1, E2, E3 = EffectClass
EQUIVALENT, DIFFERENT, UNDECIDED, _ = VerdictKind


def make_run(seed: int = 0, *, name: str = "baseline", **measured: Any) -> Run:
    defaults: dict[str, Any] = {
        "outcome": OutcomeKind.OK,
        "losses": (2.0, 1.5, 1.0),
        "grad_norms": (1.0, 1.0, 1.0),
        "weights_digest": "aa",
        "metric": 70.0,
    }
    spec = RunSpec(name=name, role=name, job=JobRef(spec="protein-ss"), plan=Plan(), seed=seed, steps=3)
    return Run(
        spec=spec,
        predicted_peak_bytes=None,
        predicted_phase_peak_bytes={},
        predicted_step_s=None,
        measurement=Measurement(**defaults | measured),
    )


def runs(metrics: Sequence[float], **measured: Any) -> list[Run]:
    return [make_run(seed, metric=m, **measured) for seed, m in enumerate(metrics)]


def judge(differences: Sequence[float], *, effect: EffectClass = E2, metric: Metric = Q3) -> Verdict:
    base = [50.0 + seed for seed in range(len(differences))]
    moved = [b + d for b, d in zip(base, differences, strict=True)]
    return verdict(runs(base), runs(moved), effect=effect, metric=metric)


# --- Student's t against printed tables (one-sided 5 %) and closed forms


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (9, 1.833), (10, 1.812), (30, 1.697), (120, 1.658)],
)
def test_critical_t_matches_the_printed_table(freedom: int, table: float) -> None:
    assert critical_t(freedom, alpha=0.05) == pytest.approx(table, abs=5e-4)


@pytest.mark.parametrize(("pairs", "sd"), [(2, 0.5), (3, 1.0), (4, 1.0), (10, 2.0), (40, 4.0)])
def test_power_matches_the_share_of_simulated_runs_that_are_equivalent(pairs: int, sd: float) -> None:
    rng, trials, margin = random.Random(pairs), 4_000, 2.0
    t = critical_t(pairs - 1, alpha=0.05)
    hits = 0
    for _ in range(trials):
        sample = [rng.gauss(0, sd) for _ in range(pairs)]
        half = t * statistics.stdev(sample) / math.sqrt(pairs)
        hits += abs(statistics.fmean(sample)) + half < margin
    assert tost_power(margin=margin, sd=sd, pairs=pairs, alpha=0.05) == pytest.approx(hits / trials, abs=0.03)


@pytest.mark.parametrize(
    ("pairs", "sd", "expected"), [(3, 1.0, 0.12733843), (5, 1.0, 0.29385307), (10, 1.0, 0.79520727)]
)
def test_power_matches_the_integral_of_scipy(pairs: int, sd: float, expected: float) -> None:
    # scipy 1.17: quad of chi.pdf(c sqrt(v), v) sqrt(v) (2 norm.cdf(z - t c) - 1) from 0 to z / t
    assert tost_power(margin=1.0, sd=sd, pairs=pairs, alpha=0.05) == pytest.approx(expected, abs=1e-7)


def test_power_is_one_or_zero_at_extreme_spreads() -> None:
    assert tost_power(margin=1.0, sd=0.0, pairs=3, alpha=0.05) == 1.0
    assert tost_power(margin=1.0, sd=1e-3, pairs=3, alpha=0.05) == pytest.approx(1.0, abs=1e-4)
    assert tost_power(margin=1.0, sd=1e6, pairs=300, alpha=0.05) == 0.0
    assert pairs_needed(margin=1.0, sd=0.0) == 3
    assert pairs_needed(margin=1.0, sd=100.0) is None


# --- the interval, by hand: differences 0, 1, 2 have mean 1, sd 1; 2.919986 / sqrt(3) = 1.685854


def test_the_interval_and_verdict_match_a_hand_calculation() -> None:
    t = tost([0.0, 1.0, 2.0], margin=2.0)
    assert (t.difference, t.sd, t.pairs) == (1.0, 1.0, 3)
    assert t.low == pytest.approx(1 - 1.685854, abs=1e-6)
    assert t.high == pytest.approx(1 + 1.685854, abs=1e-6)
    assert t.kind is UNDECIDED
    assert tost([0.0, 1.0, 2.0], margin=2.69).kind is EQUIVALENT
    assert tost([10.0, 11.0, 12.0], margin=9.31).kind is DIFFERENT


DIFFERENCES = st.lists(st.floats(-50, 50), min_size=3, max_size=8)
MARGINS = st.floats(1e-3, 100)


@given(DIFFERENCES, MARGINS)
def test_law_reversing_all_signs_mirrors_the_interval(differences: list[float], margin: float) -> None:
    a, b = tost(differences, margin=margin), tost([-d for d in differences], margin=margin)
    assert a.kind is b.kind
    assert (a.low, a.high) == pytest.approx((-b.high, -b.low))


@given(DIFFERENCES, MARGINS, st.floats(1, 10))
def test_law_a_wider_margin_never_undoes_equivalence(
    differences: list[float], margin: float, factor: float
) -> None:
    narrow, wide = tost(differences, margin=margin), tost(differences, margin=margin * factor)
    assert narrow.kind is not EQUIVALENT or wide.kind is EQUIVALENT
    assert wide.kind is not DIFFERENT or narrow.kind is DIFFERENT
    assert wide.power >= narrow.power - 1e-6


@given(
    st.permutations(range(5)), st.permutations(range(5)), st.lists(st.floats(0, 100), min_size=5, max_size=5)
)
def test_law_order_of_seeds_does_not_matter(left: list[int], right: list[int], metrics: list[float]) -> None:
    base, candidate = runs(metrics), runs(metrics[::-1])
    shuffled = verdict([base[i] for i in left], [candidate[i] for i in right], effect=E2, metric=Q3)
    assert shuffled == verdict(base, candidate, effect=E2, metric=Q3)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.sampled_from(EffectClass))
def test_law_identical_runs_are_equivalent_from_three_pairs(
    metrics: list[float], effect: EffectClass
) -> None:
    judged = verdict(runs(metrics), runs(metrics), effect=effect, metric=Q3)
    assert (judged.kind is EQUIVALENT) == (len(metrics) >= 3 or effect is E0)


@given(DIFFERENCES, MARGINS)
def test_law_the_interval_contains_the_mean_and_the_verdict_agrees(
    differences: list[float], margin: float
) -> None:
    t = tost(differences, margin=margin)
    assert t.low <= t.difference <= t.high
    assert t.kind is not EQUIVALENT or abs(t.difference) < margin
    assert t.kind is not DIFFERENT or abs(t.difference) >= margin


# --- E2, E3


def test_small_differences_are_equivalent_with_the_power_stated() -> None:
    judged = judge([0.1, -0.2, 0.1, 0.0])
    assert judged.kind is EQUIVALENT
    assert judged.power is not None
    assert judged.power > 0.99
    assert judged.margin == 2.0
    assert "power 100%" in judged.reason


def test_two_pairs_are_undecided_even_when_identical() -> None:
    judged = judge([0.0, 0.0])
    assert (judged.kind, judged.pairs) == (UNDECIDED, 2)
    assert "at least 3" in judged.reason


def test_a_wide_spread_is_undecided_and_names_the_pairs_needed() -> None:
    judged = judge([-3.0, 0.0, 3.0])
    assert judged.kind is UNDECIDED
    needed = pairs_needed(margin=2.0, sd=3.0)
    assert needed is not None
    assert f"about {needed} pairs" in judged.reason
    assert "no sensible number" in judge([-300.0, 0.0, 300.0]).reason


def test_a_difference_near_the_margin_is_named_in_the_reason() -> None:
    assert "near the margin" in judge([1.9, 2.0, 2.1]).reason


@pytest.mark.parametrize(
    ("shift", "higher", "word"), [(-5, True, "worse"), (5, True, "better"), (5, False, "worse")]
)
def test_a_difference_beyond_the_margin_is_reported_with_its_direction(
    shift: float, higher: bool, word: str
) -> None:
    metric = dataclasses.replace(Q3, higher_is_better=higher)
    judged = judge([shift, shift + 0.1, shift - 0.1], metric=metric)
    assert judged.kind is DIFFERENT
    assert word in judged.reason


def test_a_large_mean_with_a_wide_interval_is_not_called_different() -> None:
    assert judge([1.0, 5.0, 9.0]).kind is UNDECIDED


def test_changed_algorithms_are_judged_by_metric_but_not_ranked() -> None:
    judged = judge([0.0, 0.1, -0.1], effect=E3)
    assert judged.kind is EQUIVALENT
    assert "not ranked with E0 to E2" in judged.reason


# --- what is undecided before any test


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"outcome": OutcomeKind.OOM, "reason": "no memory at step 0"}, "ended oom: no memory at step 0"),
        ({"metric": None}, "no finite Q3"),
        ({"metric": math.nan}, "no finite Q3"),
        ({"metric": math.inf}, "no finite Q3"),
        ({"losses": ()}, "no finite losses"),
        ({"losses": (1.0, math.nan, 1.0)}, "no finite losses"),
        ({"losses": (1.0, 1.0)}, "took 3 steps and baseline (seed 3) 2"),
    ],
)
def test_unusable_runs_are_undecided(measured: dict[str, Any], words: str) -> None:
    candidate = [*runs([70.0] * 3), make_run(3, **measured)]
    judged = verdict(runs([70.0] * 4), candidate, effect=E2, metric=Q3)
    assert judged.kind is UNDECIDED
    assert words in judged.reason


@pytest.mark.parametrize("candidate", [[0, 1, 3], [0, 1], [0, 1, 2, 2], []])
def test_seeds_that_do_not_pair_are_undecided(candidate: list[int]) -> None:
    for effect in EffectClass:
        judged = verdict(runs([70.0] * 3), [make_run(s) for s in candidate], effect=effect, metric=Q3)
        assert judged.kind is UNDECIDED


def test_without_a_metric_only_e0_can_be_equivalent() -> None:
    assert verdict(runs([70.0] * 3), runs([70.0] * 3), effect=E2, metric=None).kind is UNDECIDED
    assert verdict(runs([70.0] * 3), runs([70.0] * 3), effect=E0, metric=None).kind is EQUIVALENT


# --- E0


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"losses": (2.0, math.nextafter(1.5, 2), 1.0)}, "seed 1: the loss first differs at step 1"),
        ({"losses": (2.0, 1.5, 1.0), "weights_digest": "bb"}, "the weights differ after step 2"),
    ],
)
def test_a_single_differing_bit_makes_e0_different(measured: dict[str, Any], words: str) -> None:
    judged = verdict(runs([70.0] * 2), [make_run(0), make_run(1, **measured)], effect=E0, metric=Q3)
    assert judged.kind is DIFFERENT
    assert words in judged.reason


def test_e0_without_a_digest_is_undecided() -> None:
    bare = runs([70.0] * 3, weights_digest="")
    assert verdict(bare, bare, effect=E0, metric=Q3).kind is UNDECIDED


# --- E1


def test_the_float32_tolerance_matches_a_hand_calculation() -> None:
    # 4 sqrt(2^15) 2^-24 = 4.3158e-05, doubling with each step
    assert float32.tolerance(0) == pytest.approx(4.3158e-05, rel=1e-4)
    assert float32.tolerance(3) == 8 * float32.tolerance(0)


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ((2.0 * (1 + 2**-22), 1.5 * (1 + 1e-6), 1.0), EQUIVALENT),
        ((2.0 * (1 + 2**-9), 1.5, 1.0), DIFFERENT),  # bfloat16's unit roundoff is no reordering
        ((2.0, 1.5 * (1 + 1e-3), 1.0), DIFFERENT),
    ],
)
def test_e1_accepts_reordering_and_rejects_lower_precision(
    losses: tuple[float, ...], kind: VerdictKind
) -> None:
    judged = verdict(runs([70.0] * 3), runs([70.0] * 3, losses=losses), effect=E1, metric=Q3)
    assert judged.kind is kind


def test_e1_judges_drifting_late_losses_by_the_metric() -> None:
    early = (2.0,) * float32.STEPS
    base = runs([70.0, 71.0, 72.0], losses=(*early, 1.0))
    drifted = runs([70.1, 71.0, 71.9], losses=(*early, 1.1))
    assert verdict(base, drifted, effect=E1, metric=Q3).kind is EQUIVALENT
    assert verdict(base, drifted[:2], effect=E1, metric=Q3).kind is UNDECIDED
    worse = runs([60.0, 61.0, 62.0], losses=(*early, 1.1))
    assert verdict(base, worse, effect=E1, metric=Q3).kind is DIFFERENT


# --- reproducibility


def test_the_same_run_twice_is_reproducible() -> None:
    found = reproducibility(make_run(), make_run())
    assert found.reproducible
    assert found.first_differing_step is None


@pytest.mark.parametrize(
    ("measured", "step", "words"),
    [
        ({"losses": (2.0, 1.5, 1.25)}, 2, "the loss"),
        ({"losses": (2.0, 1.5)}, 2, "the loss"),
        ({"losses": (2.0, 1.5, 1.25), "grad_norms": (1.0, 1.1, 1.0)}, 1, "the gradient norm"),
        ({"weights_digest": "bb"}, 2, "the update of the weights"),
    ],
)
def test_the_first_differing_step_is_named(measured: dict[str, Any], step: int, words: str) -> None:
    found = reproducibility(make_run(), make_run(**measured))
    assert found.reproducible is False
    assert found.first_differing_step == step
    assert words in found.detail


@pytest.mark.parametrize(
    "measured", [{"outcome": OutcomeKind.TIMEOUT}, {"weights_digest": ""}, {"losses": ()}]
)
def test_reproducibility_is_not_claimed_without_evidence(measured: dict[str, Any]) -> None:
    assert reproducibility(make_run(), make_run(**measured)).reproducible is None


@pytest.mark.parametrize(
    ("losses", "grad_norms", "reproducible", "step"),
    [
        ((2.0, 1.5), (1.0, 1.0), True, None),
        ((2.0, 1.25), (1.0, 1.0), False, 1),
        ((2.0, 1.5), (1.5, 1.0), False, 0),
        ((2.0,), (1.0, 1.0), False, 1),
    ],
)
def test_a_repeated_run_of_fewer_steps_is_compared_over_its_steps(
    losses: tuple[float, ...], grad_norms: tuple[float, ...], reproducible: bool, step: int | None
) -> None:
    shorter = make_run(losses=losses, grad_norms=grad_norms, weights_digest="of two steps")
    shorter = dataclasses.replace(shorter, spec=dataclasses.replace(shorter.spec, steps=2))
    found = reproducibility(make_run(), shorter)
    assert (found.reproducible, found.first_differing_step, found.steps) == (reproducible, step, 2)
    if reproducible:
        assert found.detail == "losses and gradient norms bitwise equal over 2 steps"


def test_signed_zeros_are_different_bits() -> None:
    found = reproducibility(make_run(losses=(0.0,)), make_run(losses=(-0.0,)))
    assert found.first_differing_step == 0
