"""The shared format of a PoC's record: its schema, reader and writer.

The schema is JSON Schema (2020-12), generated from the classes below; `docs/record.schema.json` is its text.
The classes also read records, strictly: no value is converted to another type. Rules that a schema cannot
express are in `faults` and in the validators of the classes. Names contain units: bytes, seconds, joules.
Memory is the peak of live tensors. The energy of a run comes with the boundary in which it was measured, as
energies of different boundaries are not comparable.
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

from memfit.files.read import parse_json, read_text
from memfit.techniques.registry import conflict, effect_of, make_plain_plan, make_use, splits_batch
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import VerdictKind
from memfit.types.sanitize import escape_controls
from memfit.verify.equivalence import MIN_PAIRS, interval_kind, tost
from memfit.verify.sensitivity import overall

FORMAT, VERSION = "memfit-record", 1
_MOST_BYTES = 16 * 2**20
_LARGEST = 2**63 - 1

Count = Annotated[int, pydantic.Field(ge=0, le=_LARGEST)]
Whole = Annotated[int, pydantic.Field(gt=0, le=_LARGEST)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Effect = Literal["E0", "E1", "E2", "E3"]
Outcome = Literal["", "ok", "oom", "timeout", "interrupted", "failed"]
NotBlank = Annotated[str, pydantic.Field(pattern=r"\S")]

# A score is computed under the plan. Even with bitwise equal weights, a sample near a threshold may therefore
# be scored differently.
_SAME_SCORE: Final = 1e-3
_ROUNDING: Final = 1e-6
_PAIRED: Final = 1.6  # largest factor between two ratios of step times: a machine's speed may change
_SAME_PEAK: Final = 0.05
_SPARE, _SPARE_BYTES = 2, 2**30  # factor and bytes that a process may need in addition to its tensors


def _check_time(date: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"the record's time {date} does not exist: {error}") from error
    if moment > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1):  # clocks may differ
        raise ValueError(
            f"the record's time {date} is in the future, more than a day ahead of this machine's clock"
        )
    return date


_MOMENT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})$"
Moment = Annotated[str, pydantic.Field(pattern=_MOMENT), pydantic.AfterValidator(_check_time)]


# The docstrings of the classes below are the descriptions in docs/record.schema.json.
class Part(pydantic.BaseModel):
    """Base of all parts of a record. They cannot be changed. Unknown fields are refused, and values of
    another type than the field's, except whole numbers for floats."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Part):
    job: NotBlank
    size: str
    parameters: Whole


class Data(Part):
    source: str
    batch_size: Whole
    steps_per_run: Whole


class Energy(Part):
    """Energy of one run, the mean of the plan's finished runs, measured within ``boundary``: what the meter
    includes, such as the processor's package or the board."""

    joules: Positive
    boundary: NotBlank


class Side(Part):
    """One plan and its runs. ``effect``: effect class of the plan. ``under_cap``: "ok" if every run under the
    memory cap succeeded, else the first other outcome, "" without such runs. ``measured_peak_bytes``: largest
    peak of a finished run. ``step_s``: median over the finished runs of the median step time of each. Both
    are null without finished runs. ``metric_by_seed``: value of the job's metric after training with each
    seed, as far as it is known."""

    plan: Mapping[str, Mapping[str, bool | int | str]]
    ranks: Whole
    engine: NotBlank
    effect: Effect
    under_cap: Outcome
    predicted_peak_bytes: Whole | None
    measured_peak_bytes: Whole | None
    peak_source: str
    predicted_step_s: Positive | None
    step_s: Positive | None
    energy: Energy | None
    metric_by_seed: Mapping[str, Finite]


class Endpoint(Part):
    """The difference in an endpoint of the job, in ``unit``: the mean over pairs of runs, and its interval.
    If the interval is inside -``margin`` to ``margin``, the results count as equivalent."""

    name: NotBlank
    unit: str
    margin: Positive
    difference: Finite
    low: Finite
    high: Finite

    @property
    def kind(self) -> VerdictKind:
        return interval_kind(self.low, self.high, margin=self.margin)


class Control(Part):
    """How the test judged the job's negative control, a training that is degraded on purpose, such as
    "half-steps". ``noticed``: whether the control was judged different from plain training. ``source``:
    "study", a power study stored with memfit, made on the day ``date``; "pair", one pair of runs of this
    proof of concept. ``pairs``: number of pairs of runs. ``endpoints``: the control's difference to plain
    training in each endpoint."""

    control: NotBlank
    noticed: bool
    source: Literal["study", "pair"]
    pairs: Count
    endpoints: Sequence[Endpoint]
    date: str


class Judgement(Part):
    """The verdict on the recommended plan. "not_sensitive": the results are inside the margin, but the test
    would not have noticed the negative control. ``surrogates``: endpoints beside the metric, absent if there
    are none; the plan is equivalent only if it is in each. ``control``: absent if the verdict does not depend
    on the metric, and in older records."""

    kind: Literal["equivalent", "different", "undecided", "not_sensitive"]
    effect: Effect
    test: str
    margin: Positive | None
    difference: Finite | None
    low: Finite | None
    high: Finite | None
    pairs: Count
    surrogates: Sequence[Endpoint] = ()
    control: Control | None = None

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Judgement:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(
                "in the record's interval of the metric's difference between the two plans, "
                f"low ({self.low}) is above high ({self.high})"
            )
        return self


class UserEffort(Part):
    """The work of adopting the plan. ``commands``: number of commands typed. ``changed_lines``: lines of the
    user's job file that are not blank. ``packages``, ``installed_mib``: number and size in MiB of the
    packages that memfit and the plan need beside torch and numpy. ``attended_minutes``: minutes that people
    spent, null if nobody counted. ``failed_attempts``: runs that failed or timed out, and PoCs that were
    begun and not finished."""

    commands: Count
    changed_lines: Count
    packages: Count
    installed_mib: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    attended_minutes: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None
    failed_attempts: Count


class Shared(Part):
    """One proof of concept. ``baseline``: plain training. ``step_time_ratio``: the recommended plan's step
    time divided by plain training's, median of the pairs of runs that ran one after the other; null or absent
    if unknown."""

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
    effort: UserEffort
    notes: Sequence[str]

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Shared:
        """Return the record itself. Raises ValueError with the first of `faults`, if any: a record whose
        claims do not follow from its numbers is rejected."""
        for fault in faults(self):
            raise ValueError(fault)
        return self


def schema() -> Mapping[str, Any]:
    """Return the JSON Schema (2020-12) of a record."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{FORMAT} {VERSION}"}
    return {**Shared.model_json_schema(), **head}


def text(record: Shared) -> str:
    """Return the canonical JSON text of a record, with sorted keys and a line break at the end: equal records
    have equal bytes. A ``step_time_ratio`` of None, and no surrogates and no control of the verdict, are left
    out. Characters that a terminal would interpret are escaped."""
    data = record.model_dump(mode="json")
    # The text of a record that is older than these fields stays the same.
    if data["step_time_ratio"] is None:
        del data["step_time_ratio"]
    for name in ("surrogates", "control"):
        if data["verdict"] is not None and not data["verdict"][name]:
            del data["verdict"][name]
    return escape_controls(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)) + "\n"


def _refuse_repeated_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of one JSON object, pairs of (name, value), as a mapping. Raises ValueError if a name
    is repeated, because readers differ in which of its values they use."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated_name = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"an object in the JSON has the field {repeated_name!r} more than once")
    return mapping


def parse_record(raw: str, *, what: str) -> Shared:
    """Parse the JSON text of a record. ``what`` names the text in messages. Raises UserError if the text is
    not JSON, if an object in it repeats a field, if it has too many values or levels (`bounded`), if it is of
    another version of the format, and as `validate_record` does."""
    data = parse_json(raw, what=what, pairs_hook=_refuse_repeated_fields)
    if isinstance(data, dict) and data.get("format") == FORMAT:
        version = data.get("version")
        if isinstance(version, bool) or version != VERSION:
            shown_version = ascii(version)[:40]
            raise UserError(
                f"{what} has version {shown_version} of the record format", allowed=f"version {VERSION}"
            )
    return validate_record(data, what=what)


def validate_record(data: object, *, what: str) -> Shared:
    """Return the record that ``data`` contains, a mapping as JSON text of a record gives. Raises UserError
    with the first fault: its place, such as "effort.commands", what was given, and what is allowed. Numbers
    that contradict each other (`faults`) are a fault, too. ``what`` names the data in messages."""
    try:
        record = Shared.model_validate(data)
    except pydantic.ValidationError as error:
        raise serialization.to_user_error(error, what) from error
    for place, value in _texts(record.model_dump(mode="python")):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{what} is invalid at {place}: {value!a} has half a character (a lone surrogate, "
                "U+D800 to U+DFFF, which no UTF-8 text contains)"
            )
    return record


def _texts(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, text) for every text in ``value``, which is itself at ``place``. Places are such as
    "notes.0" or "hardware.cores"; a key of a mapping is yielded with the place of the mapping."""
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
    """Read a record from a JSON file in UTF-8. Raises UserError if the file is larger than 16 MiB, unreadable
    or not a valid record."""
    return parse_record(read_text(path, most_bytes=_MOST_BYTES), what=str(path))


# -- what a record claims beyond its types must follow from its own numbers ---------------------------------


def faults(record: Shared) -> Iterator[str]:
    """Yield the inconsistencies of the record, each as a text that names the fields concerned; nothing for a
    consistent record. After the first invalid plan, nothing else is checked."""
    plans = []
    for name, side in (("baseline", record.baseline), ("recommended", record.recommended)):
        try:
            plan = _plan(side)
        except UserError as error:
            yield f"{name}.plan: {error}"
            return
        plans.append(plan)
        yield from _side_faults(name, side, plan, record.cap_bytes)
    peaks = [s.measured_peak_bytes for s in (record.baseline, record.recommended)]
    if plans[0] == plans[1] and None not in peaks and not math.isclose(*peaks, rel_tol=_SAME_PEAK):  # type: ignore[arg-type]
        yield f"the two plans are the same, but their measured peaks differ: {peaks[0]} B and {peaks[1]} B"
    if not record.metric.strip() and (record.baseline.metric_by_seed or record.recommended.metric_by_seed):
        yield "metric has no name, but metric_by_seed has scores"
    if plans[0] != make_plain_plan(plans[0].ranks):
        yield f"baseline.plan is {plans[0].label}, allowed: plain training"
    if record.step_time_ratio is not None:
        yield from _ratio_faults(record.step_time_ratio, record.baseline.step_s, record.recommended.step_s)
    if record.verdict is not None:
        yield from _verdict_faults(record, record.verdict, same=plans[0] == plans[1])


def _side_faults(name: str, side: Side, plan: Plan, cap_bytes: int) -> Iterator[str]:
    effect, peak = effect_of(plan).label, side.measured_peak_bytes
    dependent = (
        splits_batch(plan) and side.effect == EffectClass.E3.label
    )  # splitting a batch whose samples depend on each other has the effect E3
    if side.effect != effect and not dependent:
        yield f"{name}.effect is {side.effect}, but its plan {plan.label} has the effect class {effect}"
    if side.under_cap == "ok" and peak is not None and peak > cap_bytes:
        yield f"{name}.under_cap is ok, but its peak of {peak} B is above the cap of {cap_bytes} B"
    if side.under_cap == "oom" and peak is not None and cap_bytes > _SPARE * peak + _SPARE_BYTES:
        yield f"{name}.under_cap is oom, but its peak of {peak} B is far below the cap of {cap_bytes} B"
    if invalid_seeds := [seed for seed in side.metric_by_seed if not re.fullmatch(r"0|[1-9]\d*", seed)]:
        yield (
            f"{name}.metric_by_seed has the seed {invalid_seeds[0]!r}, allowed: whole numbers, "
            "each written once"
        )


def _ratio_faults(ratio: float, plain_s: float | None, recommended_s: float | None) -> Iterator[str]:
    if plain_s is None or recommended_s is None:
        yield "step_time_ratio is given, but step_s of a plan is missing"
    elif not agrees_with_medians(ratio, plain_s, recommended_s):
        yield f"step_time_ratio is {ratio:g}, but the step_s of the plans give {recommended_s / plain_s:g}"


def agrees_with_medians(step_time_ratio: float, plain_s: float, chosen_s: float) -> bool:
    """Return whether ``step_time_ratio``, the median ratio of pairs of runs, lies between 1/1.6 and 1.6 times
    ``chosen_s / plain_s``, the ratio of the plans' median step times."""
    return 1 / _PAIRED <= step_time_ratio * plain_s / chosen_s <= _PAIRED


def _plan(side: Side) -> Plan:
    plan = Plan(uses=tuple(make_use(n, knobs) for n, knobs in side.plan.items()), ranks=side.ranks)
    if (clash := conflict(plan)) is not None:
        raise UserError(clash)
    return plan


def _verdict_faults(record: Shared, verdict: Judgement, *, same: bool) -> Iterator[str]:
    """Yield the inconsistencies of the verdict. ``same``: the record's two plans are equal, so that the
    verdict "equivalent" needs no proof."""
    baseline_scores, recommended_scores = record.baseline.metric_by_seed, record.recommended.metric_by_seed
    equivalent = verdict.kind in ("equivalent", "not_sensitive")
    yield from _control_faults(verdict)
    if verdict.effect != record.recommended.effect:
        yield f"verdict.effect is {verdict.effect}, but recommended.effect is {record.recommended.effect}"
    if equivalent and not same:
        yield from _equivalence_faults(verdict, baseline_scores, recommended_scores)
    fields = [n for n in ("difference", "low", "high") if getattr(verdict, n) is not None]
    if verdict.margin is None and fields:
        yield f"verdict.{fields[0]} is given, but verdict.margin is missing"
    if verdict.margin is not None:
        yield from _metric_faults(verdict, verdict.margin, baseline_scores, recommended_scores)
    elif equivalent:
        for seed in baseline_scores.keys() & recommended_scores.keys():
            if not math.isclose(baseline_scores[seed], recommended_scores[seed], rel_tol=_SAME_SCORE):
                yield (
                    "the verdict is equivalent without a margin, so bitwise equal, "
                    f"but the scores of seed {seed} differ"
                )


def _control_faults(verdict: Judgement) -> Iterator[str]:
    """Yield the inconsistencies of the negative control: the verdict "not_sensitive" needs a control that was
    not noticed, and a control counts as noticed exactly if one of its endpoints is judged different."""
    control = verdict.control
    if verdict.kind == "not_sensitive" and (control is None or control.noticed):
        yield "the verdict is not_sensitive, but verdict.control does not say that the control was missed"
    if control is not None:
        kinds = [endpoint.kind for endpoint in control.endpoints]
        if control.noticed != (VerdictKind.DIFFERENT in kinds):
            result = ", ".join(kinds) or "none"
            yield f"verdict.control.noticed is {control.noticed}, but its endpoints are judged: {result}"


def _equivalence_faults(
    verdict: Judgement, baseline_scores: Mapping[str, float], recommended_scores: Mapping[str, float]
) -> Iterator[str]:
    """Yield a text for each thing that ``verdict`` lacks. The verdict says that two different plans are
    equivalent, or would be if the test were sensitive; the caller has checked this. It needs at least one
    pair of runs; a margin, unless its effect class is E0; and, if there are scores, the same seeds in both
    plans and as many pairs as seeds."""
    if verdict.pairs == 0:
        yield "the verdict is equivalent on 0 pairs of runs"
    if verdict.margin is None and verdict.effect != "E0":
        yield f"the verdict of effect class {verdict.effect} is equivalent, but verdict.margin is missing"
    if baseline_scores.keys() != recommended_scores.keys():
        yield (
            f"the verdict is equivalent, but the plans have different seeds: {_seeds(baseline_scores)} "
            f"and {_seeds(recommended_scores)}"
        )
    if baseline_scores and verdict.pairs != len(baseline_scores):
        yield f"the verdict has {verdict.pairs} pairs, but the scores have {len(baseline_scores)} seeds"


def _metric_faults(
    verdict: Judgement,
    margin: float,
    baseline_scores: Mapping[str, float],
    recommended_scores: Mapping[str, float],
) -> Iterator[str]:
    """Yield the inconsistencies of a verdict with a margin. Its difference, interval and kind must be what
    the paired equivalence test (`tost`) of the scores by seed gives. After one of the difference, low and
    high is missing, nothing else is checked; the same holds after scores that are of different seeds in the
    two plans, that are not as many as the pairs, or that are fewer than `MIN_PAIRS`."""
    values = {"difference": verdict.difference, "low": verdict.low, "high": verdict.high}
    for name, value in values.items():
        if value is None:
            yield f"verdict.{name} is null, but verdict.margin is given"
            return
    low, high = verdict.low or 0.0, verdict.high or 0.0
    if verdict.kind in ("equivalent", "not_sensitive") and not -margin < low <= high < margin:
        yield (
            f"the verdict is {verdict.kind}, but its interval {low:g} to {high:g} is not inside its margin "
            f"{margin:g}"
        )
    if (
        baseline_scores.keys() != recommended_scores.keys()
        or verdict.pairs != len(baseline_scores)
        or verdict.pairs < MIN_PAIRS
    ):
        yield (
            f"the verdict has an interval of {verdict.pairs} pairs, but the scores are of seeds "
            f"{_seeds(baseline_scores)} and {_seeds(recommended_scores)}; allowed: the same seeds, "
            f"at least {MIN_PAIRS}"
        )
        return
    result = tost(
        [recommended_scores[seed] - baseline_scores[seed] for seed in baseline_scores], margin=margin
    )
    for name, value in values.items():
        expected = getattr(result, name)
        if value is None or not math.isclose(value, expected, rel_tol=_ROUNDING, abs_tol=_ROUNDING * margin):
            yield f"verdict.{name} is {value:g}, but the scores give {expected:g}"
    kind = overall([result.kind, *(s.kind for s in verdict.surrogates)])
    if kind is VerdictKind.EQUIVALENT and verdict.control is not None and not verdict.control.noticed:
        kind = VerdictKind.NOT_SENSITIVE
    if verdict.kind != kind.value:
        yield f"the verdict is {verdict.kind}, but the scores give {kind.value}"


def _seeds(scores: Mapping[str, float]) -> str:
    return ", ".join(sorted(scores)) or "none"
