"""The risk register: each risk with its evidence from this PoC. The texts are in the report's word catalogs.

A level follows from the evidence by the rules below. Without evidence the level is "unknown".
"""

from __future__ import annotations

from collections.abc import Mapping

from memfit import catalog
from memfit.techniques.registry import TECHNIQUES
from memfit.types.decision import Decision, Risk
from memfit.types.result import OutcomeKind, Poc, Run

_TIGHT_PERCENT = 2.0  # % of the cap left free at the tightest step: below this, the level is "some"
_FEW_MACHINES = 5


def risks(poc: Poc, decision: Decision) -> tuple[Risk, ...]:
    """Return the risks of a decision whose stages are already set, each with its level and evidence, in this
    order: accuracy, stability, reproducibility, load (the work that people have), maturity, supply and
    security.

    Their `loss` is the highest cost of the pilot, None if unknown; always None for security, which is not a
    matter of money.
    """
    loss = next((s.most for s in decision.stages if s.name == "pilot"), None)
    entries = (
        _accuracy(poc, decision),
        _stability(poc),
        _reproducibility(poc),
        _load(poc),
        _maturity(poc, decision),
        _supply(decision),
        _security(poc),
    )
    return tuple(
        Risk(
            kind=kind,
            level=level,
            evidence=f"evidence.{key}",
            values=values,
            source=source,
            loss=None if kind == "security" else loss,
        )
        for kind, level, key, values, source in entries
    )


_Values = dict[str, str | float | None]
# (kind, level, key of the evidence, values of its placeholders, source)
_Entry = tuple[str, str, str, Mapping[str, str | float | None], str]


def _runs(poc: Poc) -> list[Run]:
    return [r for r in poc.runs if r.spec.role == "recommended"]


def _accuracy(poc: Poc, decision: Decision) -> _Entry:
    verdict = next((n.verdict for n in poc.verdicts if n.name == "recommended"), None)
    if verdict is None:
        return ("accuracy", "unknown", "accuracy.none", {}, "")
    kind = verdict.kind.value
    level = {"equivalent": "low", "different": "high"}.get(kind, "some")
    untried = decision.ways[decision.best].untried if decision.best is not None else ()
    if untried and level == "low":
        return ("accuracy", "some", "accuracy.untried", {"names": ", ".join(untried)}, "#money")
    if not verdict.metric:
        counts: _Values = {"verdict": f"verdict.{kind}", "pairs": float(verdict.pairs)}
        return ("accuracy", level, "accuracy.bare", counts, "#verdicts")
    values: _Values = {"metric": verdict.metric, "pairs": float(verdict.pairs)}
    return ("accuracy", level, f"accuracy.{kind}", values, "#verdicts")


def _stability(poc: Poc) -> _Entry:
    runs = _runs(poc)
    if not runs:
        return ("stability", "unknown", "stability.none", {}, "")
    completed = [r for r in runs if r.measurement.outcome is OutcomeKind.OK]
    values: _Values = {"runs": float(len(runs)), "fine": float(len(completed))}
    if len(completed) < len(runs):
        return ("stability", "high", "stability.failed", values, "#runs")
    headroom_percents = [
        100 * min(r.measurement.headroom_bytes) / r.spec.cap_bytes
        for r in completed
        if r.measurement.headroom_bytes and r.spec.cap_bytes
    ]
    if not headroom_percents:
        return ("stability", "low", "stability.fine", values, "#runs")
    values["spare"] = min(headroom_percents)
    level = "low" if min(headroom_percents) >= _TIGHT_PERCENT else "some"
    return ("stability", level, "stability.spare", values, "#runs")


def _reproducibility(poc: Poc) -> _Entry:
    reproducible = poc.reproducibility.reproducible
    level, key = (
        ("unknown", "none") if reproducible is None else ("low", "yes") if reproducible else ("some", "no")
    )
    return ("reproducibility", level, f"reproducibility.{key}", {}, "#reproducible")


def _load(poc: Poc) -> _Entry:
    effort = poc.effort
    values = {
        "commands": float(effort.commands),
        "lines": float(effort.changed_lines),
        "packages": float(effort.packages),
        "failed": float(effort.failed_attempts),
        "minutes": effort.attended_minutes,
    }
    counted = effort.attended_minutes is not None
    level = "some" if effort.failed_attempts or effort.packages or not counted else "low"
    return ("load", level, "load.counted" if counted else "load.uncounted", values, "#effort")


def _maturity(poc: Poc, decision: Decision) -> _Entry:
    """Return the entry of the risk "maturity": how well the engine that ran the recommended plan is
    maintained, and the packages that this plan and the plan of the best option need.

    The risk is "low" if the catalog says of all of them that they are released regularly, "unknown" if it
    does not know the status of one of them, else "high".
    """
    engine = next((r.spec.engine for r in _runs(poc)), "native")
    facts = catalog.engine_facts(engine)
    if "status" not in facts:
        return ("maturity", "unknown", "maturity.none", {"engine": engine}, "")
    values: _Values = {"engine": engine, "status": facts["status"][0]}
    for name in ("release", "torch", "licence"):
        values[name] = facts[name][0] if name in facts else "?"
    libraries = {name: catalog.package_facts(name) for name in _libraries(poc, decision)}
    upkeep = [facts.get("status"), *(package_facts.get("status") for package_facts in libraries.values())]
    level = "low" if all(fact and fact[0] == "released regularly" for fact in upkeep) else "high"
    if any(fact is None for fact in upkeep) and level == "high":
        level = "unknown"
    sources = dict.fromkeys(f"{fact[1]}, {fact[2]}" for fact in upkeep if fact)
    if not libraries:
        return ("maturity", level, "maturity.known", values, "; ".join(sources))
    values["libraries"] = "; ".join(
        _library_text(name, package_facts) for name, package_facts in libraries.items()
    )
    return ("maturity", level, "maturity.known_with", values, "; ".join(sources))


def _library_text(name: str, facts: Mapping[str, tuple[str, str, str]]) -> str:
    torch = f"torch {facts['torch'][0]}" if "torch" in facts else ""
    release, licence = (facts[k][0] if k in facts else "?" for k in ("release", "licence"))
    return ", ".join(p for p in (f"{name} {release}", torch, licence) if p)


def _libraries(poc: Poc, decision: Decision) -> tuple[str, ...]:
    """Return the names of the packages that the techniques of the PoC's recommended plan and of the best
    option's plan need, each once. For bf16-parameters with stochastic rounding, torchao is added.
    """
    recommended = poc.search.recommended
    labels = [recommended.estimate.plan.label] if recommended else []
    labels += (
        [decision.ways[decision.best].plan]
        if decision.best is not None and not decision.ways[decision.best].plain
        else []
    )
    packages: dict[str, None] = {}
    for part in (part for label in labels for part in label.split(" + ")):
        technique = TECHNIQUES.get(part.partition("(")[0])
        packages |= dict.fromkeys(technique.needs if technique else ())
        if "rounding=stochastic" in part:
            packages["torchao"] = None
    return tuple(packages)


def _supply(decision: Decision) -> _Entry:
    offers = [w for w in decision.ways if w.of_catalog and w.kind != "nothing"]
    plain, tight = ({w.machine for w in offers if w.plain is side} for side in (True, False))
    if not offers:
        return ("supply", "unknown", "supply.none", {}, "")
    machines = plain | tight
    values = {"machines": float(len(machines)), "plain": float(len(plain))}
    level = "low" if len(machines) >= _FEW_MACHINES else "some"
    return ("supply", level, "supply.counted", values, "#money")


def _security(poc: Poc) -> _Entry:
    packages = float(poc.effort.packages)
    level = "low" if not packages else "some"
    return ("security", level, "security.packages", {"packages": packages}, "#effort")
