"""The gate between two stages of a roll-out: what a proof of concept must show before the next stage.

A gate compares a figure of the PoC's record with a limit that the user may set in a TOML file. A figure that
was not measured fails its gate, unless the limit is disabled. Relaxing a limit never makes a passed gate
fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from memfit.files.read import MOST_TOML_BYTES, parse_toml, read_text
from memfit.store.exchange import Shared, Side
from memfit.types import serialization
from memfit.types.errors import UserError, suggest

_Number = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Kind = Literal["equivalent", "undecided", "different", "not_sensitive"]


def _none_if_false(value: Any) -> Any:
    """Return None if ``value`` is False, which disables a limit as TOML has no null; else ``value``."""
    return None if value is False else value


Limit = Annotated[_Number | None, pydantic.BeforeValidator(_none_if_false)]
Kinds = Annotated[Sequence[Kind], pydantic.Field(min_length=1)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class MemoryLimits(_Strict):
    """Limits on memory.

    ``prediction_error``: largest allowed |predicted / measured - 1| of the peak memory, by default 0.02. It
    applies to the recommended plan, and to plain training if that could run. ``under_cap``: whether the
    recommended plan must have been trained under the memory cap; by default yes.
    """

    prediction_error: Limit = 0.02
    under_cap: bool = True


class TimeLimits(_Strict):
    """Limit on the recommended plan's step time divided by plain training's, by default 2.

    The figure is the record's ratio, a median over pairs of runs, if it has one, else the ratio of both
    median step times.
    """

    step_ratio: Limit = 2.0


class AccuracyLimits(_Strict):
    """Limit on the verdict on the recommended plan's results. ``verdicts``: those that are accepted, of
    "equivalent", "undecided", "different" and "not_sensitive"; by default only "equivalent". None disables
    the gate.
    """

    verdicts: Annotated[Kinds | None, pydantic.BeforeValidator(_none_if_false)] = ("equivalent",)


class ReproducibilityLimits(_Strict):
    """Limit on reproducibility. ``same_again``: whether a repeated run of the recommended plan must have
    given the same result bit for bit, by default yes; the gate then fails also if no run was repeated. False
    disables it.
    """

    same_again: bool = True


class EnergyLimits(_Strict):
    """Limit on the energy of a run of the recommended plan divided by that of plain training; by default
    there is none.

    The figure is unknown unless both were measured within the same boundary, such as the processor's package.
    """

    ratio: Limit = None


class EffortLimits(_Strict):
    """Limits on failed attempts, by default 3, and on the minutes that people attended to the proof of
    concept, by default without limit.
    """

    failed_attempts: Limit = 3
    attended_minutes: Limit = None


class Gates(_Strict):
    """All limits of the gate. In the TOML file, false disables a limit."""

    memory: MemoryLimits = MemoryLimits()
    time: TimeLimits = TimeLimits()
    accuracy: AccuracyLimits = AccuracyLimits()
    reproducibility: ReproducibilityLimits = ReproducibilityLimits()
    energy: EnergyLimits = EnergyLimits()
    effort: EffortLimits = EffortLimits()


class Gate(_Strict):
    """One figure of the record of a proof of concept, compared with its limit. ``found``: the figure, None if
    it was not measured; the gate does not hold then.
    """

    name: str
    found: float | bool | str | None
    limit: str
    holds: bool

    @property
    def words(self) -> tuple[str, str, str, bool]:
        """(name, figure as text, limit, whether the gate holds), for reports. The figure is "" if it was not
        measured.
        """
        figure = self.found
        if isinstance(figure, bool):
            text = "yes" if figure else "no"
        else:
            text = f"{figure:.4g}" if isinstance(figure, float) else figure or ""
        return self.name, text, self.limit, self.holds


def read(path: Path) -> Gates:
    """Read a TOML file of limits. Raises UserError if it cannot be read or is not TOML, and if a limit or key
    is wrong; the error then has the location of the first fault.
    """
    return parse_gates(read_text(path, most_bytes=MOST_TOML_BYTES), str(path))


def parse_gates(text: str, path: str) -> Gates:
    """Parse the text of a TOML file of limits; `path` names it in errors.

    Raises UserError if it is not TOML, and if a limit or key is wrong; the error then has the location of the
    first fault.
    """
    data = parse_toml(text, what=path)
    try:
        return Gates.model_validate(data)
    except pydantic.ValidationError as error:
        if error.errors()[0]["type"] != "extra_forbidden":
            raise serialization.to_user_error(error, path) from error
        location = ".".join(map(str, error.errors()[0]["loc"]))
        keys = [f"{n}.{k}" for n, part in Gates().model_dump().items() for k in part]
        raise UserError(
            f"{path} has a key that is no limit of `memfit decide --gates`: {location}",
            allowed=", ".join(keys),
            hint=suggest(location, keys),
        ) from error


def evaluate(record: Shared, gates: Gates) -> tuple[Gate, ...]:
    """Return the gates whose limit is not disabled, with the record's figures, in this order: memory, time,
    accuracy, reproducibility, energy, effort.
    """
    plain, recommended, effort = record.baseline, record.recommended, record.effort
    capped = recommended.under_cap == "ok" if recommended.under_cap else None
    results = [
        _limit_gate(
            "memory: prediction error", _prediction_error(plain, recommended), gates.memory.prediction_error
        ),
        _required_gate("memory: trained under the cap", capped, gates.memory.under_cap),
        _limit_gate("time: step by plain's", _step_ratio(record), gates.time.step_ratio),
        _verdict_gate(record, gates.accuracy.verdicts),
        _required_gate(
            "reproducibility: the same again", record.reproducible, gates.reproducibility.same_again
        ),
        _limit_gate("energy: run by plain's", _energy_ratio(plain, recommended), gates.energy.ratio),
        _limit_gate("effort: failed attempts", float(effort.failed_attempts), gates.effort.failed_attempts),
        _limit_gate("effort: attended minutes", effort.attended_minutes, gates.effort.attended_minutes),
    ]
    return tuple(gate for gate in results if gate is not None)


def _limit_gate(name: str, value: float | None, limit: float | None) -> Gate | None:
    if limit is None:
        return None
    return Gate(
        name=name, found=value, limit=f"at most {limit:g}", holds=value is not None and value <= limit
    )


def _required_gate(name: str, value: bool | None, required: bool) -> Gate | None:
    return Gate(name=name, found=value, limit="yes", holds=value is True) if required else None


def _verdict_gate(record: Shared, allowed: Sequence[Kind] | None) -> Gate | None:
    if allowed is None:
        return None
    kind = record.verdict.kind if record.verdict is not None else None
    return Gate(name="accuracy: verdict", found=kind, limit=" or ".join(allowed), holds=kind in allowed)


def _prediction_error(plain: Side, recommended: Side) -> float | None:
    """Return |predicted / measured - 1| of the peak memory, the larger one of the recommended plan's and, if
    that ran, plain training's. None if a predicted or measured peak that it needs is unknown.
    """
    sides = [recommended, *([plain] if plain.measured_peak_bytes else [])]
    errors = [
        abs(side.predicted_peak_bytes / side.measured_peak_bytes - 1)
        for side in sides
        if side.predicted_peak_bytes is not None and side.measured_peak_bytes
    ]
    return max(errors) if len(errors) == len(sides) else None


def _step_ratio(record: Shared) -> float | None:
    """Return the recommended plan's step time divided by plain training's: the record's ratio or, if the
    record has none, the ratio of both median step times. None if one of these times is unknown or plain
    training's is 0.
    """
    if record.step_time_ratio is not None:
        return record.step_time_ratio
    step_s, plain_s = record.recommended.step_s, record.baseline.step_s
    return step_s / plain_s if step_s is not None and plain_s else None


def _energy_ratio(plain: Side, recommended: Side) -> float | None:
    recommended_energy, plain_energy = recommended.energy, plain.energy
    if (
        recommended_energy is None
        or plain_energy is None
        or recommended_energy.boundary != plain_energy.boundary
    ):
        return None
    return recommended_energy.joules / plain_energy.joules
