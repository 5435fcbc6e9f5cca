"""Bitwise comparison of two runs. Steps are counted from 0, as in ``Measurement.losses``."""

from __future__ import annotations

import dataclasses
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
    trained weights. ``run_b`` may have fewer steps than ``run_a``; then only its losses and gradient norms
    are compared.

    The result names the first step that differs. If only the weights differ, that is the last step, because
    only its update has no later loss that would show it. ``reproducible`` is None if a run did not complete
    or recorded no losses or no digest of its weights.
    """
    assert run_a.spec.seed == run_b.spec.seed, "both runs must have the same seed"
    assert run_a.spec.plan == run_b.spec.plan, "both runs must have the same plan"
    if reason := _not_comparable(run_a.measurement, run_b.measurement):
        return Reproducibility(reproducible=None, detail=reason)
    measured, steps = run_a.measurement, run_b.spec.steps
    is_shorter = steps < run_a.spec.steps
    if is_shorter:
        measured = dataclasses.replace(
            measured,
            losses=measured.losses[:steps],
            grad_norms=measured.grad_norms[:steps],
            weights_digest=run_b.measurement.weights_digest,
        )
    shorter_steps = steps if is_shorter else None
    difference = _first_differing(measured, run_b.measurement)
    if difference is None:
        norms = ["gradient norms"] if measured.grad_norms else []
        equal = ["losses", *norms, *([] if is_shorter else ["trained weights"])]
        texts = " and ".join(filter(None, [", ".join(equal[:-1]), equal[-1]]))
        detail = f"{texts} bitwise equal over {len(measured.losses)} steps"
        return Reproducibility(reproducible=True, steps=shorter_steps, detail=detail)
    step, what = difference
    detail = f"{what} first differs at step {step} (counted from 0)"
    return Reproducibility(reproducible=False, first_differing_step=step, steps=shorter_steps, detail=detail)


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
