"""Data for the page's sliders: their ranges, and the numbers from which decision.js computes the costs
again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memfit.types.decision import OFFERS, OWN, Decision
from memfit.types.serialization import to_plain

_MOVED: Final = ("energy", "hardware", "labour", "setup", "runs", "utilisation")


def sliders(decision: Decision) -> Mapping[str, Mapping[str, float]]:
    """Return the sliders of the page, each with its "start", "low" end, "high" end and "step": energy (price
    of a kWh with its levy), hardware (factor on purchase prices), labour (price of a working hour), setup
    (working hours to adopt the plan), runs (per year) and utilisation (0.05 to 1). Prices are in the
    currency of the decision."""
    t = decision.terms
    energy = t.energy_per_kwh.at(t.per_usd) + t.levy_per_kwh.at(t.per_usd)
    usual_energy = energy or 0.2 * t.per_usd
    labour_price = t.labour_per_hour or 50 * t.per_usd
    hours = next((n.value for n in decision.numbers if n.name == "setup_hours"), None) or 0.0
    spans = {
        "energy": (energy, 0.0, 4 * usual_energy, usual_energy / 100),
        "hardware": (1.0, 0.2, 3.0, 0.01),
        "labour": (t.labour_per_hour, 0.0, 4 * labour_price, labour_price / 100),
        "setup": (hours, 0.0, max(200.0, 2 * hours), 0.5),
        "runs": (t.runs_per_year, 1.0, max(200.0, 4 * t.runs_per_year), 1.0),
        "utilisation": (t.utilisation_ratio, 0.05, 1.0, 0.01),
    }
    return {name: _slider(*spans[name]) for name in _MOVED}


def _slider(start: float, low: float, high: float, step: float) -> Mapping[str, float]:
    """Return a slider's "start", "low" end, "high" end and "step". The low end is raised by less than a step,
    or lowered to the start if it is above, so that the start is on a step counted from it; it is at least 0.
    The high end is raised to the start if it is below.

    A browser keeps a slider within its ends and on such steps.
    """
    low = start - math.floor((start - low) / step + 1e-9) * step if start > low else start
    return {"start": start, "low": max(0.0, low), "high": max(high, start), "step": step}


def _stages(decision: Decision) -> Mapping[str, Any]:
    """Return what decision.js needs to compute the money of the stages again: "poc" (energy in joules and
    hours of work), "pilot" and "full" (indices of their options, which keep their machines when sliders
    move), each None if unknown; "pilot_ratio", the share of a run that the pilot trains; and "ends", at which
    end of its range each number makes the pilot most expensive."""
    stages = {stage.name: stage for stage in decision.stages}
    poc, pilot, full = (stages.get(name) for name in ("poc", "pilot", "full"))
    return {
        "poc": {"energy_j": poc.energy_j, "hours": poc.hours} if poc and poc.energy_j is not None else None,
        "pilot": pilot.way if pilot else None,
        "full": full.way if full else None,
        "ends": pilot.ends if pilot else {},
        "pilot_ratio": decision.pilot_ratio,
    }


def slider_inputs(decision: Decision, slots: Sequence[tuple[str, int]]) -> Mapping[str, Any]:
    """Return what decision.js needs to compute the costs of all options again, ready for JSON.

    The keys: "ways" (the options), "terms" (numbers common to all), "own" (kind "purchase" or "cloud" ->
    whether the user has given such an option), "own_terms" (the user's numbers for them), "offers" (which
    terms they replace), "slots" (which option is in which column; from ``slots``, (column, index of the
    option)), "sliders", "stages", "symbol" and "decimals" (of the currency), and "swings" (ranges of
    numbers).
    """
    own_kinds = {w.kind for w in decision.ways if not w.of_catalog}
    names = {swing.name for swing in decision.swings}
    return {
        "ways": to_plain(decision.ways),
        "terms": to_plain(decision.terms),
        "own": {kind: kind in own_kinds for kind in ("purchase", "cloud")},
        "own_terms": {t.name: t.value for t in decision.numbers if t.name in OWN and t.value is not None},
        "offers": OFFERS,
        "slots": [{"slot": slot, "index": index} for slot, index in slots],
        "sliders": to_plain(sliders(decision)),
        "stages": _stages(decision),
        "symbol": decision.symbol,
        "decimals": decision.decimals,
        "swings": [
            {"name": t.name, "low": t.low, "high": t.high} for t in decision.numbers if t.name in names
        ],
    }
