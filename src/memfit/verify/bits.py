"""Bitwise comparison of two runs. Steps are counted from 0, as in ``Measurement.losses``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from memfit.types.result import Measurement, OutcomeKind, Reproducibility, Run


def first_difference(a: Sequence[float], b: Sequence[float]) -> int | None:
    """Return the index of the first entry whose bits differ between ``a`` and ``b``, or that only one of them
    has; None if there is none. All NaN count as equal.
    """
    pairs = zip_longest(map(float.hex, map(float, a)), map(float.hex, map(float, b)))
    return next((i for i, (x, y) in enumerate(pairs) if x != y), None)


def reproducibility(run_a: Run, run_b: Run) -> Reproducibility:
    """Return whether two runs with the same plan and seed are bitwise equal in losses, gradient norms and
    trained weights.

    The result names the first step that differs. If only the weights differ, that is the last step, because
    only its update has no later loss that would show it. ``reproducible`` is None if a run did not complete
    or recorded no losses or no digest of its weights.
    """
    assert run_a.spec.seed == run_b.spec.seed, "both runs must have the same seed"
    assert run_a.spec.plan == run_b.spec.plan, "both runs must have the same plan"
    if reason := _not_comparable(run_a.measurement, run_b.measurement):
        return Reproducibility(reproducible=None, detail=reason)
    difference = _first_differing(run_a.measurement, run_b.measurement)
    if difference is None:
        norms = ", gradient norms" if run_a.measurement.grad_norms else ""
        steps = len(run_a.measurement.losses)
        detail = f"losses{norms} and trained weights bitwise equal over {steps} steps"
        return Reproducibility(reproducible=True, detail=detail)
    step, what = difference
    detail = f"{what} first differs at step {step} (counted from 0)"
    return Reproducibility(reproducible=False, first_differing_step=step, detail=detail)


def _not_comparable(a: Measurement, b: Measurement) -> str:
    for m in (a, b):
        if m.outcome is not OutcomeKind.OK:
            return f"a run ended {m.outcome.value}: {m.reason}"
        if not m.losses or not m.weights_digest:
            return "a run recorded no losses or no digest of its weights"
    return ""


def _first_differing(a: Measurement, b: Measurement) -> tuple[int, str] | None:
    differences = [
        (step, what)
        for what, x, y in (
            ("the loss", a.losses, b.losses),
            ("the gradient norm", a.grad_norms, b.grad_norms),
        )
        if (step := first_difference(x, y)) is not None
    ]
    if not differences and a.weights_digest != b.weights_digest:
        differences = [(len(a.losses) - 1, "the update of the weights")]
    return min(differences, key=lambda f: f[0], default=None)
