"""``memfit techniques``: list the techniques that plans combine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions
from memfit.cli.output import emit, print_table

if TYPE_CHECKING:
    import memfit.techniques.base


def techniques(output: JsonOptions) -> None:
    """List the techniques of which plans are made, with their effects on results and their settings."""
    quiet_libraries()
    from memfit.techniques.registry import TECHNIQUES

    if output.json:
        emit({"techniques": [view(t) for t in TECHNIQUES.values()]})
        return
    print_table(("technique", "effect", "what it does, settings, needs"), map(row, TECHNIQUES.values()))
    print("E0 bitwise equal; E1 sums in another order; E2 other rounding; E3 another algorithm")


def view(technique: memfit.techniques.base.Technique) -> dict[str, Any]:
    """Return plain data for ``--json``: the technique's "name"; "what" it does; its "effect" class, "E0" to
    "E3"; its settings ("knobs": name -> "default", "allowed", "what"); the packages that it "needs", and
    whether all are "installed"; and the techniques or kinds of technique that it "forbids" in the same
    plan."""
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
    """Return the technique's row of the table: (its name; its effect class, "E0" to "E3"; what it does and,
    on a second line, its settings with their allowed values and the packages that it needs). There is no
    second line without settings and packages."""
    missing = technique.missing
    needs = [f"needs {p}{', which is missing' if p in missing else ''}" for p in technique.needs]
    details = "; ".join([*map(_knob, technique.knobs), *needs])
    return technique.name, technique.effect.label, "\n".join(filter(None, (technique.summary, details)))


def _knob(knob: memfit.techniques.base.Knob) -> str:
    return f"{knob.name}: {knob.allowed}"
