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


def risks(poc: Poc, made: Decision) -> tuple[Risk, ...]:
    """Return the risks.

    `loss` is the highest cost of the pilot; None for security, which is not a matter of money.
    """
    loss = next((s.most for s in made.stages if s.name == "pilot"), None)
    found = (
        _accuracy(poc, made),
        _stability(poc),
        _reproducibility(poc),
        _load(poc),
        _maturity(poc, made),
        _supply(made),
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
        for kind, level, key, values, source in found
    )


_Values = dict[str, str | float | None]
_Found = tuple[str, str, str, Mapping[str, str | float | None], str]


def _runs(poc: Poc) -> list[Run]:
    return [r for r in poc.runs if r.spec.role == "recommended"]


def _accuracy(poc: Poc, made: Decision) -> _Found:
    named = next((n.verdict for n in poc.verdicts if n.name == "recommended"), None)
    if named is None:
        return ("accuracy", "unknown", "accuracy.none", {}, "")
    kind = named.kind.value
    level = {"equivalent": "low", "different": "high"}.get(kind, "some")
    untried = made.ways[made.best].untried if made.best is not None else ()
    if untried and level == "low":
        return ("accuracy", "some", "accuracy.untried", {"names": ", ".join(untried)}, "#money")
    if not named.metric:
        bare: _Values = {"verdict": f"verdict.{kind}", "pairs": float(named.pairs)}
        return ("accuracy", level, "accuracy.bare", bare, "#verdicts")
    values: _Values = {"metric": named.metric, "pairs": float(named.pairs)}
    return ("accuracy", level, f"accuracy.{kind}", values, "#verdicts")


def _stability(poc: Poc) -> _Found:
    runs = _runs(poc)
    if not runs:
        return ("stability", "unknown", "stability.none", {}, "")
    fine = [r for r in runs if r.measurement.outcome is OutcomeKind.OK]
    values: _Values = {"runs": float(len(runs)), "fine": float(len(fine))}
    if len(fine) < len(runs):
        return ("stability", "high", "stability.failed", values, "#runs")
    spare = [
        100 * min(r.measurement.headroom_bytes) / r.spec.cap_bytes
        for r in fine
        if r.measurement.headroom_bytes and r.spec.cap_bytes
    ]
    if not spare:
        return ("stability", "low", "stability.fine", values, "#runs")
    values["spare"] = min(spare)
    level = "low" if min(spare) >= _TIGHT_PERCENT else "some"
    return ("stability", level, "stability.spare", values, "#runs")


def _reproducibility(poc: Poc) -> _Found:
    seen = poc.reproducibility.reproducible
    level, key = ("unknown", "none") if seen is None else ("low", "yes") if seen else ("some", "no")
    return ("reproducibility", level, f"reproducibility.{key}", {}, "#reproducible")


def _load(poc: Poc) -> _Found:
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


def _maturity(poc: Poc, made: Decision) -> _Found:
    """Judge the engine and the libraries behind the plans' techniques by the worst of them."""
    engine = next((r.spec.engine for r in _runs(poc)), "native")
    facts = catalog.engine_facts(engine)
    if "status" not in facts:
        return ("maturity", "unknown", "maturity.none", {"engine": engine}, "")
    values: _Values = {"engine": engine, "status": facts["status"][0]}
    for name in ("release", "torch", "licence"):
        values[name] = facts[name][0] if name in facts else "?"
    libraries = {name: catalog.package_facts(name) for name in _libraries(poc, made)}
    upkeep = [facts.get("status"), *(known.get("status") for known in libraries.values())]
    level = "low" if all(found and found[0] == "released regularly" for found in upkeep) else "high"
    if any(found is None for found in upkeep) and level == "high":
        level = "unknown"
    sources = dict.fromkeys(f"{found[1]}, {found[2]}" for found in upkeep if found)
    if not libraries:
        return ("maturity", level, "maturity.known", values, "; ".join(sources))
    values["libraries"] = "; ".join(_told(name, known) for name, known in libraries.items())
    return ("maturity", level, "maturity.known_with", values, "; ".join(sources))


def _told(name: str, facts: Mapping[str, tuple[str, str, str]]) -> str:
    torch = f"torch {facts['torch'][0]}" if "torch" in facts else ""
    release, licence = (facts[k][0] if k in facts else "?" for k in ("release", "licence"))
    return ", ".join(p for p in (f"{name} {release}", torch, licence) if p)


def _libraries(poc: Poc, made: Decision) -> tuple[str, ...]:
    """Return the packages that the techniques of the trained plan and of the best way's plan need."""
    chosen = poc.search.recommended
    labels = [chosen.estimate.plan.label] if chosen else []
    labels += [made.ways[made.best].plan] if made.best is not None and not made.ways[made.best].plain else []
    found: dict[str, None] = {}
    for part in (part for label in labels for part in label.split(" + ")):
        known = TECHNIQUES.get(part.partition("(")[0])
        found |= dict.fromkeys(known.needs if known else ())
        if "rounding=stochastic" in part:
            found["torchao"] = None
    return tuple(found)


def _supply(made: Decision) -> _Found:
    offered = [w for w in made.ways if w.of_catalog and w.kind != "nothing"]
    plain, tight = ({w.machine for w in offered if w.plain is side} for side in (True, False))
    if not offered:
        return ("supply", "unknown", "supply.none", {}, "")
    able = plain | tight
    values = {"machines": float(len(able)), "plain": float(len(plain))}
    level = "low" if len(able) >= _FEW_MACHINES else "some"
    return ("supply", level, "supply.counted", values, "#money")


def _security(poc: Poc) -> _Found:
    packages = float(poc.effort.packages)
    level = "low" if not packages else "some"
    return ("security", level, "security.packages", {"packages": packages}, "#effort")
