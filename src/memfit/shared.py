"""A PoC's record in the format that is shared, its schema, and what two such records may be compared in.

The schema is JSON Schema (2020-12), made from the classes below; `docs/record.schema.json` is its text.
Units are in the names: bytes, seconds, joules. Memory is the peak of live tensors; a run's energy has the
boundary that it was measured in, without which no two figures are the same quantity.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from memfit.report.pool import ok_runs, peak_bytes, step_s
from memfit.techniques.registry import TECHNIQUES, effect_of
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.result import Poc, Run, Verdict

FORMAT, VERSION = "memfit-record", 1
_MOST_BYTES = 16 * 2**20

Count = Annotated[int, pydantic.Field(ge=0)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Effect = Literal["E0", "E1", "E2", "E3"]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Model(_Part):
    job: Annotated[str, pydantic.Field(min_length=1)]
    size: str
    parameters: Annotated[int, pydantic.Field(gt=0)]


class Data(_Part):
    source: str
    batch_size: Annotated[int, pydantic.Field(gt=0)]
    steps_per_run: Annotated[int, pydantic.Field(gt=0)]


class Energy(_Part):
    """Mean of a run, inside ``boundary``."""

    joules: Positive
    boundary: Annotated[str, pydantic.Field(min_length=1)]


class Side(_Part):
    """One plan: every run of it that finished, and what became of it under the cap ("ok", "oom", ...;
    "" where it was not tried). ``metric_by_seed``: the science's own measure."""

    plan: Mapping[str, Mapping[str, bool | int | str]]
    ranks: Annotated[int, pydantic.Field(gt=0)]
    engine: str
    effect: Effect
    under_cap: str
    predicted_peak_bytes: Count | None
    measured_peak_bytes: Count | None
    peak_source: str
    predicted_step_s: Positive | None
    step_s: Positive | None
    energy: Energy | None
    metric_by_seed: Mapping[str, Finite]


class Judgement(_Part):
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


class Trouble(_Part):
    """What adopting the plan took; ``attended_minutes`` null: nobody counted."""

    commands: Count
    changed_lines: Count
    packages: Count
    installed_mib: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    attended_minutes: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] | None
    failed_attempts: Count


class Shared(_Part):
    """One proof of concept. ``step_time_ratio``: the recommended plan's step by plain training's, median of
    the pairs that ran one after the other; absent from records older than it."""

    format: Literal["memfit-record"]
    version: Literal[1]
    poc_id: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]{1,80}$")]
    created: Annotated[str, pydantic.Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")]
    command: str
    model: Model
    data: Data
    hardware: Mapping[str, str]
    software: Mapping[str, str]
    place: str
    cap_bytes: Annotated[int, pydantic.Field(gt=0)]
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
        """A verdict that its own numbers do not carry is no verdict."""
        for name in ("baseline", "recommended"):
            unknown = [n for n in getattr(self, name).plan if n not in TECHNIQUES]
            if unknown:
                raise ValueError(f"{name}: there is no technique {unknown[0]!r}")
        judged = self.verdict
        if judged is None:
            return self
        if judged.effect != self.recommended.effect:
            raise ValueError(f"the verdict is on {judged.effect}, the plan is {self.recommended.effect}")
        seeds = [len(side.metric_by_seed) for side in (self.baseline, self.recommended)]
        if all(seeds) and judged.pairs > min(seeds):
            raise ValueError(f"the verdict has {judged.pairs} pairs, the runs {min(seeds)} seeds")
        ends = (judged.low, judged.high, judged.margin)
        if judged.kind == "equivalent" and None not in ends:
            low, high, margin = (end or 0.0 for end in ends)
            if not -margin <= low <= high <= margin:
                raise ValueError("the verdict is equivalent, its interval is not inside its margin")
        return self


def schema() -> Mapping[str, Any]:
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{FORMAT} {VERSION}"}
    return {**Shared.model_json_schema(), **head}


def text(record: Shared) -> str:
    """The one way to write it: equal records are equal bytes."""
    told = record.model_dump(mode="json")
    if told["step_time_ratio"] is None:
        del told["step_time_ratio"]  # a record from before it was written stays as it was
    return json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def parsed(raw: str, *, what: str) -> Shared:
    """Raises UserError with the first fault and its place."""
    try:
        found = json.loads(raw)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError:
        raise UserError(f"{what} is nested deeper than a record") from None
    named = isinstance(found, dict) and found.get("format") == FORMAT
    if named and found.get("version") != VERSION:
        raise UserError(f"{what} has version {found.get('version')!r} of the format", allowed=str(VERSION))
    try:
        return Shared.model_validate(found, strict=False)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole record"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{what} is broken at {place}: {message}") from error


def read(path: Path) -> Shared:
    """Raises UserError."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is larger than a record", allowed=f"{_MOST_BYTES} bytes")
        return parsed(path.read_text(encoding="utf-8"), what=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


# -- from a PoC ------------------------------------------------------------------------------------------

_AS_IT_IS = (
    "poc_id", "created", "command", "place", "cap_bytes", "cap_reason", "metric", "metric_unit",
    "metric_naive", "step_time_ratio",
)  # fmt: skip
_OF_HARDWARE = ("processor", "cores", "ram_bytes", "accelerators")


def of_poc(poc: Poc) -> Shared:
    """Raises UserError where the PoC has not been finished: half a record compares with nothing."""
    recommended = poc.search.recommended
    if not poc.finished or recommended is None:
        raise UserError(f"PoC {poc.poc_id} was interrupted", hint="only a finished one has a record")
    judged = next((v.verdict for v in poc.verdicts if v.name == "recommended"), None)
    seen = dict(poc.environment)
    told = {name: getattr(poc, name) for name in _AS_IT_IS}
    return Shared.model_validate(
        told
        | {
            "format": FORMAT,
            "version": VERSION,
            "model": {"job": poc.job_name, "size": poc.job_size, "parameters": poc.parameter_count},
            "data": {
                "source": poc.data_source,
                "batch_size": max(1, poc.runs[0].spec.batch_size),
                "steps_per_run": poc.steps_per_run,
            },
            "hardware": {"machine": poc.machine} | {n: seen.pop(n) for n in _OF_HARDWARE if n in seen},
            "software": seen,
            "baseline": _side(poc.runs, poc.search.baseline.estimate.plan),
            "recommended": _side(poc.runs, recommended.estimate.plan),
            "verdict": judged and _judgement(judged),
            "reproducible": poc.reproducibility.reproducible,
            "effort": dataclasses.asdict(poc.effort),
            "notes": list(poc.notes),
        }
    )


def _judgement(found: Verdict) -> Mapping[str, Any]:
    names = ("test", "margin", "difference", "low", "high", "pairs")
    told = {name: getattr(found, name) for name in names}
    return told | {"kind": found.kind.value, "effect": found.effect.label}


def _side(runs: Sequence[Run], plan: Plan) -> Mapping[str, Any]:
    own = [r for r in runs if r.spec.plan == plan]
    done, capped = ok_runs(own), [r for r in own if r.spec.cap_bytes is not None]
    first = (done or own)[0]
    joules = [r.measurement.energy_j for r in done if r.measurement.energy_j]
    boundary = first.measurement.energy_boundary or "not told"
    scores = {str(r.spec.seed): m for r in done if (m := r.measurement.metric) is not None}
    return {
        "plan": plan.to_dict(),
        "ranks": plan.ranks,
        "engine": first.spec.engine,
        "effect": effect_of(plan).label,
        "under_cap": capped[0].measurement.outcome.value if capped else "",
        "predicted_peak_bytes": first.predicted_peak_bytes,
        "measured_peak_bytes": peak_bytes(own),
        "peak_source": first.measurement.peak_source,
        "predicted_step_s": first.predicted_step_s,
        "step_s": step_s(own),
        "energy": {"joules": statistics.mean(joules), "boundary": boundary} if joules else None,
        "metric_by_seed": scores,
    }


# -- two records -----------------------------------------------------------------------------------------


class Compared(_Part):
    """One quantity of both records. ``ratio`` is b / a where nothing stands ``against`` it."""

    quantity: str
    a: float | str | None
    b: float | str | None
    ratio: float | None
    against: Sequence[str]


def compare(a: Shared, b: Shared) -> tuple[Compared, ...]:
    """What is comparable between two PoCs, and what is not and why."""
    same_model = [*_unlike("model", a.model, b.model)]
    same_work = [*same_model, *_unlike("data", a.data, b.data)]
    where = [*_unlike("hardware", a.hardware, b.hardware)]
    torch = [*_unlike("software: torch", a.software.get("torch"), b.software.get("torch"))]
    limit = "env OMP_NUM_THREADS"
    threads = [*_unlike("threads", a.software.get(limit), b.software.get(limit))]
    found = []
    for name in ("baseline", "recommended"):
        one, other = getattr(a, name), getattr(b, name)
        if name == "recommended":
            found.append(_row(f"{name}: plan", _label(one), _label(other), []))
        plans = list(_unlike("plan", _label(one), _label(other)))
        source = list(_unlike("how peaks were measured", one.peak_source, other.peak_source))
        run = [
            *same_work,
            *_unlike("ranks", one.ranks, other.ranks),
            *_unlike("engine", one.engine, other.engine),
        ]
        found.append(
            _row(f"{name}: peak_bytes", one.measured_peak_bytes, other.measured_peak_bytes,
                 [*run, *source, *torch])
        )  # fmt: skip
        found.append(_row(f"{name}: step_s", one.step_s, other.step_s, [*run, *where, *threads]))
        found.append(_energy(f"{name}: joules", one.energy, other.energy, [*run, *where, *threads]))
        metric = list(_unlike("metric", (a.metric, a.metric_unit), (b.metric, b.metric_unit)))
        classes = list(_unlike("effect class", one.effect, other.effect))
        seeds = list(_unlike("seeds", sorted(one.metric_by_seed), sorted(other.metric_by_seed)))
        scores = [*same_work, *metric, *seeds, *(classes if plans else ())]
        found.append(_row(f"{name}: {a.metric or 'metric'}", _mean(one), _mean(other), scores))
    found.append(_verdicts(a, b, same_work))
    return tuple(found)


def _verdicts(a: Shared, b: Shared, against: list[str]) -> Compared:
    one, other = a.verdict, b.verdict
    for name in ("effect", "test", "margin"):
        against = [
            *against,
            *_unlike(f"verdict's {name}", getattr(one, name, None), getattr(other, name, None)),
        ]
    return _row("verdict", one and one.kind, other and other.kind, against)


def _energy(quantity: str, one: Energy | None, other: Energy | None, against: list[str]) -> Compared:
    if one is not None and other is not None:
        against = [*against, *_unlike("energy boundary", one.boundary, other.boundary)]
    return _row(quantity, one and one.joules, other and other.joules, against)


def _row(quantity: str, a: Any, b: Any, against: Sequence[str]) -> Compared:
    why = [*against, *(f"{side} has none" for side, value in (("A", a), ("B", b)) if value is None)]
    numbers = not why and isinstance(a, int | float) and isinstance(b, int | float) and a
    return Compared(quantity=quantity, a=a, b=b, ratio=b / a if numbers else None, against=why)


def _unlike(what: str, a: Any, b: Any) -> Iterator[str]:
    """Nothing where both are equal."""
    if isinstance(a, pydantic.BaseModel):
        a, b = a.model_dump(), b.model_dump()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from _unlike(f"{what}: {key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{what} {a!s} and {b!s}"


def _label(side: Side) -> str:
    named = (
        f"{name}({', '.join(f'{k}={v}' for k, v in sorted(knobs.items()))})" if knobs else name
        for name, knobs in sorted(side.plan.items())
    )
    return " + ".join(named) or "plain"


def _mean(side: Side) -> float | None:
    scores = list(side.metric_by_seed.values())
    return statistics.mean(scores) if scores else None
