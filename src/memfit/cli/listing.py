"""``memfit list``: list the built-in jobs, the techniques, the machines of the catalog, and the engines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.machines import print_machines
from memfit.cli.options import JsonOptions
from memfit.cli.output import check_choice, emit, print_table
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import memfit.engines.base
    import memfit.techniques.base


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions:
    """What to list, and the name of one machine or entry of the catalog, None for all."""

    what: Annotated[
        str,
        typer.Argument(
            metavar="jobs|techniques|machines|engines",
            help="jobs: the built-in jobs, what each trains on what data, and its sizes, the default size "
            "first; techniques: those of which plans are made, with their effects on results and their "
            "settings; machines: the devices, networks, hosts and places of the catalog; engines: the "
            "programs that run a training, and the installed version of each, or what keeps it from running.",
        ),
    ]
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="For machines: show every figure of one entry with its source: a machine of the catalog or "
            "FILE.toml as in --on of `memfit plan`, or a network, host, link or place of the catalog; not "
            "this, the machine that memfit runs on. Default: all entries, the links only with --json.",
        ),
    ] = None


def list_known(options: ListOptions, output: JsonOptions) -> None:
    """List the built-in jobs, the techniques, the machines of the catalog, or the engines."""
    listings = {"jobs": _jobs, "techniques": _techniques, "engines": _engines}
    what = check_choice("list", options.what, (*listings, "machines"))
    if what == "machines":
        print_machines(options.name, as_json=output.json)
        return
    if options.name is not None:
        raise UserError(f"`memfit list {what}` takes no name, but {options.name!r} is given")
    quiet_libraries()
    listings[what](as_json=output.json)


def _jobs(*, as_json: bool) -> None:
    from memfit.jobs.registry import DEFAULT, describe

    descriptions = describe()
    if as_json:
        keys = ("name", "title", "sizes", "data_source")
        emit({"default": DEFAULT, "jobs": [{key: getattr(job, key) for key in keys} for job in descriptions]})
        return
    print_table(
        ("job", "sizes", "what is trained, on what"),
        ((job.name, ", ".join(job.sizes), f"{job.title}\n{job.data_source}") for job in descriptions),
    )
    print("Your own: FILE.py:NAME, a Job in a Python file, or hf:PATH_OR_NAME, a Hugging Face configuration.")


def _techniques(*, as_json: bool) -> None:
    from memfit.techniques.registry import TECHNIQUES

    if as_json:
        emit({"techniques": [_technique_view(t) for t in TECHNIQUES.values()]})
        return
    print_table(
        ("technique", "effect", "what it does, settings, needs"), map(_technique_row, TECHNIQUES.values())
    )
    print("E0 bitwise equal; E1 sums in another order; E2 other rounding; E3 another algorithm")


def _technique_view(technique: memfit.techniques.base.Technique) -> dict[str, Any]:
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


def _technique_row(technique: memfit.techniques.base.Technique) -> tuple[str, ...]:
    """Return the technique's row of the table: (its name; its effect class, "E0" to "E3"; what it does and,
    on a second line, its settings with their allowed values and the packages that it needs). There is no
    second line without settings and packages."""
    missing = technique.missing
    knobs = [f"{knob.name}: {knob.allowed}" for knob in technique.knobs]
    needs = [f"needs {p}{', which is missing' if p in missing else ''}" for p in technique.needs]
    details = "; ".join(knobs + needs)
    return technique.name, technique.effect.label, "\n".join(filter(None, (technique.summary, details)))


def _engines(*, as_json: bool) -> None:
    from memfit.engines.registry import ENGINES
    from memfit.types.serialization import to_plain

    if as_json:
        # Of each engine: its "version", what keeps it from running here ("problem"), and the command that
        # would help ("fix"); "" if there is none.
        views = [{"name": e.name, "what": e.summary, **to_plain(e.probe())} for e in ENGINES.values()]
        emit({"engines": views})
    else:
        print_table(("engine", "here", "what it is"), map(_engine_row, ENGINES.values()))


def _engine_row(engine: memfit.engines.base.Engine) -> tuple[str, ...]:
    probe = engine.probe()
    installed = probe.problem or probe.version
    return engine.name, f"{installed}\n{probe.fix}" if probe.problem else installed, engine.summary
