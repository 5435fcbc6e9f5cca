"""What the money is for without a case file: a typical project of the job, the reader's currency and place,
and working hours estimated from what the program counted."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from memfit import catalog
from memfit.catalog import finance
from memfit.catalog.tables import facts, table
from memfit.decision.case import AdoptionEffort, CaseFigure, DecisionCase, Money
from memfit.types.errors import UserError
from memfit.types.machine import Fact
from memfit.types.result import Effort, Interval, Offer, Poc

_WORK: Final = ("steps_per_run", "runs_per_year", "years")
_JAPAN: Final = ("japan", "japan-high-voltage", "JPY")  # place, tariff and currency of a reader of Japanese


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A typical project of a job, from projects.toml. ``work``: name of a number, such as "steps_per_run" ->
    its value and source. ``size``: size of the job that it trains. ``phases``: sizes that a run trains one
    after the other -> steps of each; empty if there is only one. ``pilot_ratio``: share of a run that a pilot
    trains.
    """

    name: str
    size: str
    work: Mapping[str, Fact]
    phases: Mapping[str, int]
    pilot_ratio: float = 1.0

    def whole_runs(self, offers: Sequence[Offer]) -> list[Offer]:
        """Return one prediction for each of ``offers`` of the project's size: of the mean step of a whole run
        on that machine with that kind of plan. Its memory is that of the phase that needs most; for plain
        training, that of the project's size. If the step time of a phase is unknown, the prediction is as in
        ``offers``.

        Recommended plans are left out on machines that a phase does not fit. Plain training is kept even so,
        since it is only what plans are compared with. A phase that was not predicted on any machine does not
        count.
        """
        whole_runs = []
        for offer in (o for o in offers if o.size == self.size):
            runs = self._runs(offers, offer)
            if offer.plain or all(run.fits for run in runs):
                whole_runs.append(self._mean(offer, runs))
        return whole_runs

    def time_ratios(self, offers: Sequence[Offer], machine: str, *, plain: bool) -> Mapping[str, float]:
        """Return the share of a run's time of each phase with a known step time; empty if there is one phase,
        or no prediction for the machine."""
        offer = next((o for o in offers if (o.size, o.machine, o.plain) == (self.size, machine, plain)), None)
        runs = self._runs(offers, offer) if offer is not None and self.phases else []
        times_s = {r.size: self.phases[r.size] * r.step_s.value for r in runs if r.step_s is not None}
        return {size: time_s / sum(times_s.values()) for size, time_s in times_s.items()}

    def _runs(self, offers: Sequence[Offer], offer: Offer) -> list[Offer]:
        """Return the predictions of all phases on the machine of ``offer``, with its kind of plan.

        A phase that was not predicted there gets the step time of ``offer`` times the median ratio of the
        two on other machines. It fits if ``offer`` does and the device has at least the lowest peak that the
        phase has on one of these machines. It is left out if no other machine has both step times.
        """
        kind = {(o.machine, o.size): o for o in offers if o.plain is offer.plain}
        runs = [offer]
        for size in self.phases.keys() - {self.size}:
            run = kind.get((offer.machine, size))
            others = [o for o in kind.values() if o.size == size and (o.machine, self.size) in kind]
            pairs = [(o, kind[o.machine, self.size]) for o in others]
            ratios = [a.step_s.value / b.step_s.value for a, b in pairs if a.step_s and b.step_s]
            if run is None and ratios and offer.step_s is not None:
                least_bytes = min(o.memory_bytes.value for o, _ in pairs)
                run = dataclasses.replace(
                    offer,
                    size=size,
                    step_s=offer.step_s.scaled(statistics.median(ratios)),
                    fits=offer.fits and _device_bytes(offer.machine) >= least_bytes,
                )
            runs += [run] if run is not None else []
        return runs

    def _mean(self, offer: Offer, runs: Sequence[Offer]) -> Offer:
        """Return ``offer`` with the mean step time of ``runs``, weighted by their numbers of steps; their
        mean power in watts, None if one is unknown; and the memory of the run that needs most, or of
        ``offer`` for plain training. Return ``offer`` unchanged if it is the only run or a step time is
        unknown."""
        if len(runs) == 1 or any(run.step_s is None for run in runs):
            return offer
        steps = [self.phases[run.size] for run in runs]
        times = [run.step_s for run in runs if run.step_s is not None]

        def mean(values: Iterable[float]) -> float:
            return sum(n * value for n, value in zip(steps, values, strict=True)) / sum(steps)

        step_s = Interval(
            value=mean(t.value for t in times),
            low=mean(t.low for t in times),
            high=mean(t.high for t in times),
        )
        powers_w = [run.power_w for run in runs if run.power_w is not None]
        power_w = None
        if len(powers_w) == len(runs):
            power_w = mean(p * t.value for p, t in zip(powers_w, times, strict=True)) / step_s.value
        largest = offer if offer.plain else max(runs, key=lambda run: run.memory_bytes.value)
        return dataclasses.replace(offer, step_s=step_s, power_w=power_w, memory_bytes=largest.memory_bytes)


def project_of(job: str, size: str) -> Project | None:
    """Return the catalog's typical project of the built-in job ``job`` at the size ``size``; None if there is
    none."""
    data = table("projects.toml")
    row: Mapping[str, Any] | None = data["projects"].get(job)
    if row is None or row["size"] != size:
        return None
    pilot = facts(row, data["sources"], ("pilot_ratio",)).get("pilot_ratio")
    phases = row.get("phases", {})
    steps = facts(phases, data["sources"], tuple(phases))
    return Project(
        name=job,
        size=size,
        work=facts(row, data["sources"], _WORK),
        phases={name: int(fact.value) for name, fact in steps.items()},
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
    place = poc.place if poc.place in catalog.place_names() else "world"
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
    low, high = (bound * scale for bound in cost.bounds)
    return CaseFigure(
        value=cost.value * scale,
        low=low,
        high=high,
        source=cost.source,
        date=cost.date if len(cost.date) == len("2026-11-29") else "",
    )


def _device_bytes(machine: str) -> float:
    try:
        return catalog.machine(machine).device.memory_bytes.value
    except UserError:
        return math.inf
