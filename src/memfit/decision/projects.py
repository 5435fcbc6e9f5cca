"""What the money is for without a case file: a typical project of the job, the reader's currency and place,
and working hours estimated from what the program counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memfit import catalog
from memfit.catalog import finance
from memfit.catalog.tables import facts, table
from memfit.decision.case import AdoptionEffort, CaseFigure, DecisionCase, Money
from memfit.types.errors import UserError
from memfit.types.machine import Fact
from memfit.types.result import Effort, Offer, Poc
from memfit.types.units import GIB

_WORK: Final = ("steps_per_run", "runs_per_year", "years")
_JAPAN: Final = ("japan", "japan-high-voltage", "JPY")  # place, tariff and currency of a reader of Japanese


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A typical project of a job, from projects.toml. ``work``: name of a number, such as "steps_per_run" ->
    its value and source. ``size``: size of the job that it trains. ``least_bytes``: memory that a device must
    have for the recommended plan; 0 if the predictions say all. ``pilot_ratio``: share of a run that a pilot
    trains.
    """

    name: str
    size: str
    work: Mapping[str, Fact]
    least_bytes: float = 0.0
    pilot_ratio: float = 1.0

    def possible_offers(self, offers: Sequence[Offer]) -> list[Offer]:
        """Return ``offers`` without recommended plans on devices that have less memory than a later phase of
        the project needs. Plain training is kept, as it is only what the plan is compared with, and so are
        plans on machines that the catalog does not have.
        """
        return [o for o in offers if o.plain or _device_bytes(o.machine) >= self.least_bytes]


def project_of(job: str, size: str) -> Project | None:
    """Return the typical project of a built-in job at a size; None if the catalog has none for both."""
    data = table("projects.toml")
    row: Mapping[str, Any] | None = data["projects"].get(job)
    if row is None or row["size"] != size:
        return None
    extras = facts(row, data["sources"], ("least_gib", "pilot_ratio"))
    least, pilot = extras.get("least_gib"), extras.get("pilot_ratio")
    return Project(
        name=job,
        size=size,
        work=facts(row, data["sources"], _WORK),
        least_bytes=least.value * GIB if least is not None else 0.0,
        pilot_ratio=pilot.value if pilot is not None else 1.0,
    )


def default_case(poc: Poc, lang: str) -> DecisionCase:
    """Return the figures that count without a case file: currency, place and tariff by the language, and the
    price of people's working hours, each marked with its source. The hours to adopt the plan are estimated,
    unless a person counted the attended minutes.

    In Japanese the currency is the yen, and the place Japan with the tariff of a high-voltage customer unless
    the proof of concept names another place. In any other language it is the US dollar at the place of the
    proof of concept.
    """
    place = _catalog_place(poc.place)
    japan, tariff, currency = _JAPAN
    in_japan = lang == "ja" and place in ("world", japan)
    code = currency if lang == "ja" else "USD"
    place = japan if in_japan else place
    return DecisionCase(
        currency=code,
        place=place,
        tariff=tariff if in_japan else None,
        money=Money(labour_per_hour=_labour(place, code)),
        effort=AdoptionEffort(
            setup_hours=estimated_hours(poc.effort) if poc.effort.attended_minutes is None else None
        ),
    )


def estimated_hours(effort: Effort) -> CaseFigure:
    """Return how many hours a person needs to adopt the plan, estimated from what the program counted, with a
    range: a number of hours for each command, changed line, added package and failed attempt, and some for
    reading and deciding, see finance.toml.
    """
    data = table("finance.toml")
    hours = facts(data["effort"], data["sources"], tuple(data["effort"]))
    counts = {
        "base_hours": 1,
        "hours_per_command": effort.commands,
        "hours_per_line": effort.changed_lines,
        "hours_per_package": effort.packages,
        "hours_per_failed_attempt": effort.failed_attempts,
    }
    counted = (
        f"{effort.commands} commands, {effort.changed_lines} lines, {effort.packages} packages, "
        f"{effort.failed_attempts} failed attempts"
    )
    value, low, high = (
        sum(count * (getattr(hours[name], end) or 0.0) for name, count in counts.items())
        for end in ("value", "low", "high")
    )
    return CaseFigure(
        value=value,
        low=low,
        high=high,
        source=f"estimated from what the program counted ({counted}); hours for each are an assumption",
        date=hours["base_hours"].date,
    )


def _labour(place: str, currency: str) -> CaseFigure:
    cost, code = finance.labour_cost(place)
    scale = finance.currency(currency).per_usd.value / finance.currency(code).per_usd.value
    return CaseFigure(
        value=cost.value * scale,
        low=(cost.value if cost.low is None else cost.low) * scale,
        high=(cost.value if cost.high is None else cost.high) * scale,
        source=cost.source,
        date=cost.date if len(cost.date) == len("2026-11-29") else "",
    )


def _catalog_place(name: str) -> str:
    return name if name in catalog.place_names() else "world"


def _device_bytes(machine: str) -> float:
    try:
        return catalog.machine(machine).device.memory_bytes.value
    except UserError:
        return math.inf
