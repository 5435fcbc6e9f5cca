"""The shared format of a PoC's record: its schema, reader and writer.

The schema is JSON Schema (2020-12), generated from the classes below; `docs/record.schema.json` is its text.
The classes also read records, strictly: no value is converted to another type. Rules that a schema cannot
express are in `faults`. Names contain units: bytes, seconds, joules. Memory is the peak of live tensors. The
energy of a run comes with the boundary in which it was measured, as energies of different boundaries are not
comparable.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic

from memfit.techniques.registry import conflict, effect_of, make_use, plain, splits_batch
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, Plan
from memfit.types.sanitize import escaped
from memfit.verify.equivalence import MIN_PAIRS, tost

FORMAT, VERSION = "memfit-record", 1
_MOST_BYTES = 16 * 2**20

_LARGEST = 2**63 - 1

Count = Annotated[int, pydantic.Field(ge=0, le=_LARGEST)]
Whole = Annotated[int, pydantic.Field(gt=0, le=_LARGEST)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Effect = Literal["E0", "E1", "E2", "E3"]
Outcome = Literal["", "ok", "oom", "timeout", "failed"]
Told = Annotated[str, pydantic.Field(pattern=r"\S")]  # not blank


# A score is computed under the plan. Even with bitwise equal weights, a sample near a threshold may therefore
# be scored differently.
_SAME_SCORE: Final = 1e-3
_ROUNDING: Final = 1e-6
_PAIRED: Final = 1.6  # largest factor between two ratios of step times: a machine's speed may change
_SAME_PEAK: Final = 0.05
_SPARE, _SPARE_BYTES = 2, 2**30  # factor and bytes that a process may need in addition to its tensors


def _dated(given: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(given)
    except ValueError as error:
        raise ValueError(f"{given} is no date: {error}") from error
    if moment > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1):  # clocks may differ
        raise ValueError(f"{given} is in the future")
    return given


_MOMENT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
Moment = Annotated[str, pydantic.Field(pattern=_MOMENT), pydantic.AfterValidator(_dated)]


# The docstrings of the classes below are the descriptions in docs/record.schema.json.
class Part(pydantic.BaseModel):
    """Base of all parts of a record: immutable, without unknown fields, and without conversion of types."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Part):
    job: Told
    size: str
    parameters: Whole


class Data(Part):
    source: str
    batch_size: Whole
    steps_per_run: Whole


class Energy(Part):
    """Mean of a run, inside ``boundary``."""

    joules: Positive
    boundary: Told


class Side(Part):
    """One plan: every run of it that finished, and what became of it under the cap ("ok", "oom", ...;
    "" where it was not tried). ``metric_by_seed``: the science's own measure."""

    plan: Mapping[str, Mapping[str, bool | int | str]]
    ranks: Whole
    engine: Told
    effect: Effect
    under_cap: Outcome
    predicted_peak_bytes: Whole | None
    measured_peak_bytes: Whole | None
    peak_source: str
    predicted_step_s: Positive | None
    step_s: Positive | None
    energy: Energy | None
    metric_by_seed: Mapping[str, Finite]


class Judgement(Part):
    kind: Literal["equivalent", "different", "undecided"]
    effect: Effect
    test: str
    margin: Positive | None
    difference: Finite | None
    low: Finite | None
    high: Finite | None
    pairs: Count

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Judgement:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("low is above high")
        return self


class Trouble(Part):
    """What adopting the plan took; ``attended_minutes`` null: nobody counted."""

    commands: Count
    changed_lines: Count
    packages: Count
    installed_mib: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    attended_minutes: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None
    failed_attempts: Count


class Shared(Part):
    """One proof of concept. ``step_time_ratio``: the recommended plan's step by plain training's, median of
    the pairs that ran one after the other; absent from records older than it."""

    format: Literal["memfit-record"]
    version: Literal[1]
    poc_id: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")]
    created: Moment
    command: str
    model: Model
    data: Data
    hardware: Mapping[str, str]
    software: Mapping[str, str]
    place: str
    cap_bytes: Whole
    cap_reason: str
    metric: str
    metric_unit: str
    metric_naive: Finite | None
    baseline: Side
    recommended: Side
    step_time_ratio: Positive | None = None
    verdict: Judgement | None
    reproducible: bool | None
    effort: Trouble
    notes: Sequence[str]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Shared:
        """Reject a record whose claims do not follow from its own numbers."""
        for fault in faults(self):
            raise ValueError(fault)
        return self


def schema() -> Mapping[str, Any]:
    """Return the JSON Schema of a record."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{FORMAT} {VERSION}"}
    return {**Shared.model_json_schema(), **head}


def text(record: Shared) -> str:
    """Return the canonical text of a record: equal records have equal bytes."""
    told = record.model_dump(mode="json")
    if told["step_time_ratio"] is None:
        del told["step_time_ratio"]  # the text of a record that is older than this field stays the same
    return escaped(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False)) + "\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a mapping. Raises ValueError for a repeated field, as readers differ in which of its values they
    use."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def parsed(raw: str, *, what: str) -> Shared:
    """Parse the text of a record. Raises UserError with the first fault: its place, what was given, and what
    is allowed. ``what`` names the text in messages."""
    try:
        found = json.loads(raw, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError:
        raise UserError(f"{what} is nested deeper than a record") from None
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{what} is no record: {error}") from error
    if isinstance(found, dict) and found.get("format") == FORMAT:
        version = found.get("version")
        if isinstance(version, bool) or version != VERSION:
            told = ascii(version)[:40]
            raise UserError(f"{what} has version {told} of the format", allowed=str(VERSION))
    return checked(found, what=what)


def checked(found: object, *, what: str) -> Shared:
    """Return the record in plain data. Raises UserError as `parsed` does."""
    try:
        record = Shared.model_validate(found)
    except pydantic.ValidationError as error:
        raise serialization.fault(error, what) from error
    for place, told in _texts(record.model_dump(mode="python")):
        if any("\ud800" <= c <= "\udfff" for c in told):
            raise UserError(f"{what} is broken at {place}: {told!a} has half a character (a lone surrogate)")
    return record


def _texts(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text, including keys, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield place, key
            yield from _texts(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{place}.{index}")


def read(path: Path) -> Shared:
    """Read a record from a file. Raises UserError if the file is too large, unreadable or not a valid
    record."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than a record", allowed=f"{_MOST_BYTES} bytes")
        return parsed(path.read_text(encoding="utf-8"), what=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


# -- what a record claims beyond its types must follow from its own numbers ---------------------------------


def faults(record: Shared) -> Iterator[str]:
    """Yield every inconsistency in the record with its place; nothing for a consistent record."""
    plans = []
    for name, side in (("baseline", record.baseline), ("recommended", record.recommended)):
        try:
            plan = _plan(side)
        except UserError as error:
            yield f"{name}.plan: {error}"
            return
        plans.append(plan)
        yield from _of_side(name, side, plan, record.cap_bytes)
    peaks = [s.measured_peak_bytes for s in (record.baseline, record.recommended)]
    if plans[0] == plans[1] and None not in peaks and not math.isclose(*peaks, rel_tol=_SAME_PEAK):  # type: ignore[arg-type]
        yield f"the plans are one, with peaks of {peaks[0]} B and {peaks[1]} B"
    if not record.metric.strip() and (record.baseline.metric_by_seed or record.recommended.metric_by_seed):
        yield "metric has no name, and plans have scores by it"
    if plans[0] != plain(plans[0].ranks):
        yield f"baseline.plan is {plans[0].label}, allowed: plain training"
    if record.step_time_ratio is not None:
        yield from _of_ratio(record.step_time_ratio, record.baseline.step_s, record.recommended.step_s)
    if record.verdict is not None:
        yield from _of_verdict(record, record.verdict, same=plans[0] == plans[1])


def _of_side(name: str, side: Side, plan: Plan, cap_bytes: int) -> Iterator[str]:
    effect, peak = effect_of(plan).label, side.measured_peak_bytes
    dependent = (
        splits_batch(plan) and side.effect == EffectClass.E3.label
    )  # splitting a batch whose samples depend on each other has the effect E3
    if side.effect != effect and not dependent:
        yield f"{name}.effect is {side.effect}, that of its plan {plan.label} is {effect}"
    if side.under_cap == "ok" and peak is not None and peak > cap_bytes:
        yield f"{name}.under_cap is ok with a peak of {peak} B above the cap of {cap_bytes} B"
    if side.under_cap == "oom" and peak is not None and cap_bytes > _SPARE * peak + _SPARE_BYTES:
        yield f"{name}.under_cap is oom with a peak of {peak} B far below the cap of {cap_bytes} B"
    if odd := [seed for seed in side.metric_by_seed if not re.fullmatch(r"0|[1-9]\d*", seed)]:
        yield f"{name}.metric_by_seed has the seed {odd[0]!r}, allowed: whole numbers, each written once"


def _of_ratio(told: float, plain_s: float | None, chosen_s: float | None) -> Iterator[str]:
    if plain_s is None or chosen_s is None:
        yield "step_time_ratio is given, and step_s of a plan is not"
    elif not agrees_with_medians(told, plain_s, chosen_s):
        yield f"step_time_ratio is {told:g}, step_s of the plans give {chosen_s / plain_s:g}"


def agrees_with_medians(step_time_ratio: float, plain_s: float, chosen_s: float) -> bool:
    """Return whether the median ratio of the pairs is near the ratio of the plans' median step times."""
    return 1 / _PAIRED <= step_time_ratio * plain_s / chosen_s <= _PAIRED


def _plan(side: Side) -> Plan:
    plan = Plan(uses=tuple(make_use(n, knobs) for n, knobs in side.plan.items()), ranks=side.ranks)
    if (clash := conflict(plan)) is not None:
        raise UserError(clash)
    return plan


def _of_verdict(record: Shared, judged: Judgement, *, same: bool) -> Iterator[str]:
    """Yield inconsistencies of the verdict. `same`: both plans are equal, so their equivalence needs no
    proof."""
    base, chosen = record.baseline.metric_by_seed, record.recommended.metric_by_seed
    equivalent = judged.kind == "equivalent"
    if judged.effect != record.recommended.effect:
        yield f"the verdict is on {judged.effect}, the plan is {record.recommended.effect}"
    if equivalent and not same:
        yield from _of_equivalence(judged, base, chosen)
    told = [n for n in ("difference", "low", "high") if getattr(judged, n) is not None]
    if judged.margin is None and told:
        yield f"verdict.{told[0]} is given, and verdict.margin is not"
    if judged.margin is not None:
        yield from _of_metric(judged, judged.margin, base, chosen)
    elif equivalent:
        for seed in base.keys() & chosen.keys():
            if not math.isclose(base[seed], chosen[seed], rel_tol=_SAME_SCORE):
                yield f"the verdict is bitwise equal, the scores of seed {seed} are not"


def _of_equivalence(
    judged: Judgement, base: Mapping[str, float], chosen: Mapping[str, float]
) -> Iterator[str]:
    """Yield inconsistencies of the equivalence of two plans. It needs pairs of runs, and a margin unless the
    plan is bitwise equal."""
    if judged.pairs == 0:
        yield "the verdict is equivalent on 0 pairs"
    if judged.margin is None and judged.effect != "E0":
        yield f"the verdict on {judged.effect} is equivalent without a margin"
    if base.keys() != chosen.keys():
        yield f"the verdict is equivalent on other seeds: {_seeds(base)} and {_seeds(chosen)}"
    if base and judged.pairs != len(base):
        yield f"the verdict has {judged.pairs} pairs, the runs {len(base)} seeds"


def _of_metric(
    judged: Judgement, margin: float, base: Mapping[str, float], chosen: Mapping[str, float]
) -> Iterator[str]:
    """Yield inconsistencies of a verdict with a margin, which must be the result of the paired test of the
    scores."""
    told = {"difference": judged.difference, "low": judged.low, "high": judged.high}
    for name, value in told.items():
        if value is None:
            yield f"verdict.{name} is null beside a margin"
            return
    low, high = judged.low or 0.0, judged.high or 0.0
    if judged.kind == "equivalent" and not -margin < low <= high < margin:
        yield f"the verdict is equivalent, its interval {low:g} to {high:g} not inside its margin {margin:g}"
    if base.keys() != chosen.keys() or judged.pairs != len(base) or judged.pairs < MIN_PAIRS:
        yield (
            f"the verdict has an interval of {judged.pairs} pairs, the scores are of seeds {_seeds(base)} "
            f"and {_seeds(chosen)}; allowed: the same seeds, at least {MIN_PAIRS}"
        )
        return
    found = tost([chosen[seed] - base[seed] for seed in base], margin=margin)
    for name, value in told.items():
        expected = getattr(found, name)
        if value is None or not math.isclose(value, expected, rel_tol=_ROUNDING, abs_tol=_ROUNDING * margin):
            yield f"verdict.{name} is {value:g}, the scores give {expected:g}"
    if judged.kind != found.kind.value:
        yield f"the verdict is {judged.kind}, the scores give {found.kind.value}"


def _seeds(scores: Mapping[str, float]) -> str:
    return ", ".join(sorted(scores)) or "none"
