"""``memfit techniques``: list the techniques that plans combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions
from memfit.cli.output import emit, print_table

if TYPE_CHECKING:
    import memfit.techniques.base


def techniques(output: JsonOptions) -> None:
    """List the techniques that plans combine."""
    quiet_libraries()
    from memfit.techniques.registry import TECHNIQUES

    if output.json:
        emit({"techniques": [view(t) for t in TECHNIQUES.values()]})
        return
    print_table(("technique", "effect", "what it does, settings, needs"), map(row, TECHNIQUES.values()))
    print("E0 bitwise equal; E1 sums in another order; E2 other rounding; E3 another algorithm")


def view(technique: memfit.techniques.base.Technique) -> dict[str, Any]:
    """Return what the technique does, its effect on results, its settings with their defaults, the packages
    that it needs, whether all are installed, and what it cannot be combined with, as plain data for
    ``--json``."""
    return {
        "name": technique.name,
        "what": technique.summary,
        "effect": technique.effect.label,
        "knobs": {
            k.name: {"default": k.default, "allowed": k.allowed, "what": k.doc} for k in technique.knobs
        },
        "needs": list(technique.needs),
        "forbids": list(technique.forbids),
        "installed": not technique.missing,
    }


def row(technique: memfit.techniques.base.Technique) -> tuple[str, ...]:
    """Return the technique's row of the table: (its name; its effect on results; what it does and, on a
    second line, its settings and the packages that it needs)."""
    missing = technique.missing
    needs = [f"needs {p}{', which is missing' if p in missing else ''}" for p in technique.needs]
    details = "; ".join([*map(_knob, technique.knobs), *needs])
    return technique.name, technique.effect.label, "\n".join(filter(None, (technique.summary, details)))


def _knob(knob: memfit.techniques.base.Knob) -> str:
    return f"{knob.name}: {knob.allowed}"
