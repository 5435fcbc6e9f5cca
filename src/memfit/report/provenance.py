"""Sources of the report's figures: its runs, predictions, tests and machines.

Each has an anchor, an id in the HTML page, to which its figures link.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence

from memfit import catalog
from memfit.catalog.prices import server_usd
from memfit.report.quantities import Figure, Sentence, assumed
from memfit.types.decision import Decision
from memfit.types.errors import UserError
from memfit.types.machine import Fact
from memfit.types.plan import Plan
from memfit.types.result import Choice, Poc, Run
from memfit.verify.aggregate import by_plan, ok_runs

POC = "record-poc"
GATES = "record-gates"
SAVING = "record-saving"
CASE = "record-case"
MARGIN = "record-margin"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProvenanceRecord:
    """One source of figures. Figures link to its ``anchor``, an id in the HTML page.

    ``label``: short name shown in these links, such as "R1". ``what``: sentence on what it is. ``of``:
    anchors of the records that it is derived from. ``facts``: (statement, source, date) of the catalog.
    ``sources``: texts on where it is from, such as the command line of the PoC. ``date``: "" if it has none.
    """

    anchor: str
    label: str
    what: Sentence
    of: tuple[str, ...] = ()
    facts: tuple[tuple[Sentence, str, str], ...] = ()
    sources: tuple[str, ...] = ()
    date: str = ""


def _hashed_anchor(kind: str, *parts: str) -> str:
    return f"{kind}-{zlib.crc32(chr(0).join(parts).encode()):08x}"


def run_anchor(index: int) -> str:
    """Return the anchor of the run with this index in the PoC's list of runs: "run-1" for index 0."""
    return f"run-{index + 1}"


def group_anchor(role: str, plan: Plan) -> str:
    """Return the anchor of the record for all runs of one plan in one role ("baseline", "recommended" or
    "ablation"). It is derived from those of these runs that completed, or from all if none did."""
    return _hashed_anchor("runs", role, plan.fingerprint)


def prediction_anchor(plan: Plan) -> str:
    """Return the anchor of the predictions for ``plan`` at the size that the PoC ran."""
    return _hashed_anchor("prediction", plan.fingerprint)


def verdict_anchor(name: str) -> str:
    """Return the anchor of the verdict with this name: "recommended", or an ablation's name."""
    return _hashed_anchor("verdict", name)


def paper_anchor(index: int) -> str:
    """Return the anchor of the prediction with this index in the PoC's list of predictions at paper size:
    "paper-1" for index 0."""
    return f"paper-{index + 1}"


def reach_anchor(index: int) -> str:
    """Return the anchor of the entry with this index in the PoC's list of the largest sizes that fit a
    machine: "reach-1" for index 0."""
    return f"reach-{index + 1}"


def interaction_anchor(index: int) -> str:
    """Return the anchor of the table with this index in the PoC's list of interactions of two techniques:
    "interaction-1" for index 0."""
    return f"interaction-{index + 1}"


def way_anchor(index: int) -> str:
    """Return the anchor of the option with this index in the decision's list: "way-0" for index 0."""
    return f"way-{index}"


def stage_anchor(name: str) -> str:
    """Return the anchor of the stage of the roll-out with this name ("poc", "pilot" or "full"):
    "stage-pilot"."""
    return f"stage-{name}"


def term_anchor(name: str) -> str:
    """Return the anchor of the number with this name that the decision is based on: "term-years"."""
    return f"term-{name}"


def machine_anchor(name: str) -> str:
    """Return the anchor of the record for the machine with this name."""
    return _hashed_anchor("machine", name)


# -- of the proof of concept -----------------------------------------------------------------------------


def poc_records(poc: Poc, case_created: str = "") -> tuple[ProvenanceRecord, ...]:
    """Return the records of the PoC, in this order: the PoC itself; each run; the runs of each plan together;
    each predicted plan at its own size; each prediction at paper size; each largest size that fits a machine;
    each verdict; each interaction table; the source of the metric's margin, if it is known; the predictions
    for the job's published sizes, if there are any.

    ``case_created``: when those last predictions were made; "" if there are none.
    """
    records = [_poc(poc), *_runs(poc), *_groups(poc), *_predictions(poc), *_outlook(poc), *_tests(poc)]
    if case_created:
        records.append(
            ProvenanceRecord(
                anchor=CASE, label="C", what=_record_sentence("case", job=poc.job_name), date=case_created
            )
        )
    return tuple(records)


def _record_sentence(kind: str, **values: Figure | str | Sentence) -> Sentence:
    return Sentence(key=f"record.{kind}", values=values)


def _role(role: str) -> Sentence:
    return Sentence(key=f"role.{role}")


def _poc(poc: Poc) -> ProvenanceRecord:
    what = _record_sentence("poc", id=poc.poc_id, machine=poc.machine)
    return ProvenanceRecord(anchor=POC, label="PoC", what=what, sources=(poc.command,), date=poc.created[:10])


def _runs(poc: Poc) -> Iterator[ProvenanceRecord]:
    for i, run in enumerate(poc.runs):
        spec, m = run.spec, run.measurement
        kind = "run" if spec.plan.uses else "run_plain"
        what = _record_sentence(kind, role=_role(spec.role), plan=spec.plan.label, seed=str(spec.seed))
        notes = (f"{poc.poc_id} / {spec.name} / {i + 1}", spec.engine, m.peak_source, m.energy_boundary)
        sources = tuple(n for n in notes if n)
        yield ProvenanceRecord(anchor=run_anchor(i), label=f"R{i + 1}", what=what, of=(POC,), sources=sources)


def _of(poc: Poc, runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run_anchor(i) for i, run in enumerate(poc.runs) if any(run is member for member in runs))


def _groups(poc: Poc) -> Iterator[ProvenanceRecord]:
    for number, runs in enumerate(by_plan(poc.runs), 1):
        spec = runs[0].spec
        yield ProvenanceRecord(
            anchor=group_anchor(spec.role, spec.plan),
            label=f"G{number}",
            what=_record_sentence(
                "group" if spec.plan.uses else "group_plain", role=_role(spec.role), plan=spec.plan.label
            ),
            of=_of(poc, ok_runs(runs) or runs),
        )


def choices(poc: Poc) -> tuple[Choice, ...]:
    """Return the plans of the search that the report shows, in this order and each only once: plain training,
    the recommended plan if there is one, the frontier (plans that fit and that no other plan beats in peak,
    time and effect on results at once), and the plan with the lowest peak."""
    search = poc.search
    best = [search.recommended] if search.recommended else []
    candidates = (search.baseline, *best, *search.frontier, search.smallest)
    return tuple({c.estimate.plan.fingerprint: c for c in candidates}.values())


def _predictions(poc: Poc) -> Iterator[ProvenanceRecord]:
    for number, choice in enumerate(choices(poc), 1):
        plan = choice.estimate.plan
        what = _record_sentence("prediction", plan=plan.label, size=poc.job_size, machine=poc.machine)
        yield ProvenanceRecord(anchor=prediction_anchor(plan), label=f"P{number}", what=what, of=(POC,))


def _outlook(poc: Poc) -> Iterator[ProvenanceRecord]:
    for i, row in enumerate(poc.paper):
        what = _record_sentence("paper", size=row.size, machine=row.machine)
        origins = (POC, machine_anchor(row.machine))
        yield ProvenanceRecord(anchor=paper_anchor(i), label=f"Q{i + 1}", what=what, of=origins)
    for i, reach in enumerate(poc.reach):
        quantity = Sentence(key=f"quantity.{reach.quantity}")
        what = _record_sentence("reach", machine=reach.machine, quantity=quantity)
        origins = (POC, machine_anchor(reach.machine))
        yield ProvenanceRecord(anchor=reach_anchor(i), label=f"L{i + 1}", what=what, of=origins)


def _tests(poc: Poc) -> Iterator[ProvenanceRecord]:
    plain_runs = [r for r in ok_runs(poc.runs) if r.spec.role == "baseline"]
    for i, named_verdict in enumerate(poc.verdicts):
        plan_runs = [r for r in ok_runs(poc.runs) if r.spec.plan == named_verdict.plan]
        yield ProvenanceRecord(
            anchor=verdict_anchor(named_verdict.name),
            label=f"V{i + 1}",
            what=_record_sentence("verdict", plan=named_verdict.plan.label),
            of=_of(poc, [*plain_runs, *plan_runs]),
            sources=(named_verdict.verdict.test,),
        )
    for i, table in enumerate(poc.interactions):
        what = _record_sentence("interaction", first=table.first, second=table.second)
        origins = _of(poc, [r for r in ok_runs(poc.runs) if r.spec.role in ("baseline", "ablation")])
        yield ProvenanceRecord(anchor=interaction_anchor(i), label=f"I{i + 1}", what=what, of=origins)
    if poc.metric_margin_source:
        what = _record_sentence("margin", metric=poc.metric)
        yield ProvenanceRecord(anchor=MARGIN, label="D", what=what, sources=(poc.metric_margin_source,))


# -- of the decision -------------------------------------------------------------------------------------


def decision_records(decision: Decision) -> tuple[ProvenanceRecord, ...]:
    """Return the records of the decision: one for each option, one for the saving, and, if there are stages,
    one for each of them and one for the gates."""
    return (*_ways(decision), *_saving(decision), *_stages(decision))


def _ways(decision: Decision) -> Iterator[ProvenanceRecord]:
    for i, way in enumerate(decision.ways):
        name = Sentence(key=f"way.{way.kind}", values={"machine": way.machine})
        hours = "hours" if way.predicted else "own_hours"
        plan: Sentence | str = Sentence(key="way.plain") if way.plain else way.plan
        what = (
            _record_sentence("nothing")
            if way.kind == "nothing"
            else _record_sentence(hours, way=name, way_plan=plan)
        )
        origins = (machine_anchor(way.machine),) if way.machine else ()
        yield ProvenanceRecord(anchor=way_anchor(i), label=f"W{i}", what=what, of=origins)


def _saving(decision: Decision) -> Iterator[ProvenanceRecord]:
    origins = tuple(way_anchor(i) for i in (decision.best, decision.reference) if i is not None)
    yield ProvenanceRecord(anchor=SAVING, label="S", what=_record_sentence("saving"), of=origins)


def _stages(decision: Decision) -> Iterator[ProvenanceRecord]:
    for number, stage in enumerate(decision.stages, 1):
        what = _record_sentence(
            "stage", stage=Sentence(key=f"stages.{stage.name}"), machine=stage.machine or "–"
        )
        origins = _way_of(decision, stage.machine)
        yield ProvenanceRecord(anchor=stage_anchor(stage.name), label=f"K{number}", what=what, of=origins)
    if decision.stages:
        yield ProvenanceRecord(anchor=GATES, label="T", what=_record_sentence("gates"))


def _way_of(decision: Decision, machine: str) -> tuple[str, ...]:
    anchors = (way_anchor(i) for i, way in enumerate(decision.ways) if machine and way.machine == machine)
    return tuple(anchors)[:1]


def report_records(
    poc: Poc, decision: Decision | None, case_created: str = ""
) -> tuple[ProvenanceRecord, ...]:
    """Return all records of a page: those of the PoC, of the decision (if it is not None) and of machines.
    The numbers that the decision is based on have no records; the page lists them in a table of their own, to
    which figures link too. ``case_created``: see `poc_records`."""
    of_decision = decision_records(decision) if decision is not None else ()
    return (*poc_records(poc, case_created), *of_decision, *machine_records(poc, decision))


# -- of the catalog --------------------------------------------------------------------------------------


def machine_records(poc: Poc, decision: Decision | None) -> tuple[ProvenanceRecord, ...]:
    """Return one record for each machine of the PoC's predictions at paper size and of largest sizes, and of
    the decision's options, in this order. It has the catalog's known facts on the machine, each with source
    and date, and none if the machine is not in the catalog."""
    names = [*(row.machine for row in poc.paper), *(row.machine for row in poc.reach)]
    names += [way.machine for way in decision.ways if way.machine] if decision is not None else []
    return tuple(_machine(name, f"M{i}") for i, name in enumerate(dict.fromkeys(names), 1))


def _machine(name: str, label: str) -> ProvenanceRecord:
    what = _record_sentence("machine", machine=name)
    return ProvenanceRecord(anchor=machine_anchor(name), label=label, what=what, facts=tuple(_facts(name)))


def _facts(name: str) -> Iterator[tuple[Sentence, str, str]]:
    try:
        device = catalog.machine(name).device
    except UserError:
        return
    host = catalog.host_of(device.name)
    facts: Mapping[str, tuple[Fact | None, str]] = {
        "memory": (device.memory_bytes, "bytes"),
        "price": (device.usd_to_buy, "usd"),
        "host": (server_usd(host), "usd"),
        "rent": (device.usd_per_hour, "usd"),
        "power": (device.power_w, "W"),
        "embodied": (device.embodied_kg, "kg"),
    }
    for kind, (fact, unit) in facts.items():
        if fact is not None:
            value = assumed(fact.value, unit, machine_anchor(name))
            yield Sentence(key=f"record.fact_{kind}", values={"value": value}), fact.source, fact.date
