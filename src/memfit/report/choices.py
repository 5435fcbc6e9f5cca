"""Present a search result as plain rows: frontier, recommended plan with reasons, effects of changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from memfit.report.plan_words import is_plan_label
from memfit.report.provenance import POC, prediction_anchor
from memfit.report.quantities import Figure, Mark, Sentence, assumed, predicted, sourced
from memfit.report.rows import ChoiceRow, SearchView
from memfit.types.plan import Accuracy
from memfit.types.result import Choice, Reason, ReasonKind, SearchExtent, SearchResult, Sensitivity

_NOTABLE_RATIO: Final = 0.0005  # by which the recommended plan is above the best traced one


def search_view(result: SearchResult) -> SearchView:
    """Return a search result as the rows that the report shows: predicted figures with their sources, and
    sentences."""
    best = result.recommended

    def row(choice: Choice) -> ChoiceRow:
        plan = choice.estimate.plan
        choice_row = _choice(choice, recommended=best is not None and plan == best.estimate.plan)
        return sourced(choice_row, prediction_anchor(plan))

    return SearchView(
        goal=result.goal,
        considered=predicted(result.considered, "count", POC),
        cap=assumed(result.cap_bytes, "bytes", POC),
        baseline=row(result.baseline),
        frontier=tuple(row(choice) for choice in result.frontier),
        recommended=row(best) if best else None,
        smallest=row(result.smallest),
        sensitivity=sourced(tuple(map(_sensitivity, result.sensitivity)), POC),
        extent=sourced(tuple(_extent(result.extent)), POC) if result.extent is not None else (),
    )


def _extent(extent: SearchExtent) -> Iterator[Sentence]:
    """Yield the sentences on how far a search got and how much better a plan could still be."""

    def count(number: int) -> Figure:
        return predicted(number, "count")

    counts = {"priced": extent.priced_count, "traced": extent.traced_count, "left": extent.left_count}
    yield Sentence(key="extent.searched", values={name: count(n) for name, n in counts.items()})
    if extent.unpriced_count:
        yield Sentence(key="extent.unpriced", values={"count": count(extent.unpriced_count)})
    if extent.time_up and extent.limit_s == 0:
        yield Sentence(key="extent.kept")
    elif extent.time_up:
        yield Sentence(key="extent.time_up", values={"limit": assumed(extent.limit_s, "s")})
    if extent.gain_ratio is None:
        reason = Sentence(key=f"extent.unknown_{extent.gain_unknown}")
        yield Sentence(key="extent.unknown", values={"reason": reason})
    elif extent.left_count == 0:
        yield Sentence(key="extent.all_traced")
    else:
        ratios = {"low": extent.low_ratio, "high": extent.high_ratio}
        yield Sentence(
            key="extent.gain" if extent.gain_ratio else "extent.no_gain",
            values={
                "gain": predicted(math.ceil(1e4 * extent.gain_ratio) / 100, "percent"),  # never too low
                "contenders": count(extent.contender_count),
                "pairs": count(extent.pairs),
                **{name: predicted(ratio, "ratio") for name, ratio in ratios.items()},
            },
        )
    if extent.chosen_ratio > _NOTABLE_RATIO:
        yield Sentence(key="extent.chosen", values={"ratio": predicted(100 * extent.chosen_ratio, "percent")})


def _sensitivity(change: Sensitivity) -> Sentence:
    time = predicted(change.time_ratio, "ratio")
    if not change.more_bytes and not change.more_devices:
        name = Sentence(key=f"resource.{change.kind}")
        return Sentence(key="sensitivity.resource", values={"name": name, "time": time})
    return Sentence(
        key=f"sensitivity.{change.kind}",
        values={
            "amount": predicted(
                change.more_bytes or change.more_devices, "bytes" if change.more_bytes else "count"
            ),
            "time": time,
            "cost": predicted(change.cost_ratio, "ratio"),
            "carbon": predicted(change.carbon_ratio, "ratio"),
            "plan": change.plan,
        },
    )


def _choice(choice: Choice, *, recommended: bool) -> ChoiceRow:
    estimate = choice.estimate
    peak, device = estimate.allocated_bytes, estimate.device_bytes
    return ChoiceRow(
        plan=estimate.plan.label,
        effect=choice.effect.label,
        fits=choice.fits,
        host_short=not choice.fits and choice.estimate.lacks_host_memory,
        recommended=recommended,
        traced=estimate.traced,
        peak=predicted(peak.value, "bytes"),
        low=predicted(peak.low, "bytes"),
        high=predicted(peak.high, "bytes"),
        needed=predicted(choice.needed_bytes, "bytes"),
        device=None
        if device is None
        else (
            predicted(device.low, "bytes"),
            predicted(device.value, "bytes"),
            predicted(device.high, "bytes"),
        ),
        step=predicted(estimate.step_s.value if estimate.step_s else None, "s"),
        reasons=tuple(map(_reason, choice.reasons)),
    )


def _reason(reason: Reason) -> Sentence:
    """Return the reason why a technique is in a plan or was left out as a sentence. For a technique in the
    plan that raises the peak instead of lowering it, the sentence says how many more bytes it takes."""
    saved = reason.saved_bytes
    costs = reason.kind is ReasonKind.SAVES and saved is not None and saved < 0
    change = Figure(
        value=None if saved is None else -saved, unit="bytes", mark=Mark.PREDICTED, signed=not costs
    )
    key = _reason_key(reason.kind, timed=reason.time_ratio is not None)
    return Sentence(
        key=key.replace("saves", "costs") if costs else key,
        values={
            "technique": reason.technique,
            "saved": predicted(saved, "bytes"),
            "change": change,
            "time": predicted(reason.time_ratio, "ratio"),
            "count": predicted(reason.plan_count, "count"),
            "least": predicted(reason.least_bytes, "bytes"),
            "detail": _detail(reason),
        },
    )


def _detail(reason: Reason) -> Sentence | str:
    """Return the reason's detail: an accuracy or the plan of a comparison as a sentence, else its text."""
    if reason.kind is ReasonKind.LEFT_OUT_ACCURACY and reason.detail in set(Accuracy):
        return Sentence(key=f"accuracy.{reason.detail}")
    if reason.kind.is_comparison and is_plan_label(reason.detail):
        return Sentence(key="reason.rival", values={"plan": reason.detail})
    return reason.detail


def _reason_key(kind: ReasonKind, *, timed: bool) -> str:
    return f"reason.{kind}" if timed or not kind.is_comparison else f"reason.{kind}_untimed"


# Keys of the sentences that say why a technique is in the plan. A technique that costs memory is not among
# them.
SPEAKING_FOR: Final = frozenset(
    _reason_key(kind, timed=timed) for kind in ReasonKind if kind.speaks_for for timed in (True, False)
)
