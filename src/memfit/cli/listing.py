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
from memfit.types.job import DEFAULT_JOB

if TYPE_CHECKING:
    import memfit.catalog.published_models
    import memfit.engines.base
    import memfit.techniques.base


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions:
    """What to list, and the name of one machine, other entry of the catalog, or model; None: all."""

    what: Annotated[
        str,
        typer.Argument(
            metavar="jobs|models|techniques|machines|engines",
            help="jobs: the built-in jobs, what each trains on what data, and its sizes, the default size "
            "first; models: those that hf:NAME builds without a folder and without a network; techniques: "
            "those of which plans are made, with their effects on results and their settings; machines: the "
            "devices, networks, hosts and places of the catalog; engines: the programs that run a training, "
            "and the installed version of each, or what keeps it from running.",
        ),
    ]
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="For machines: show every figure of one entry with its source: a machine of the catalog or "
            "FILE.toml as in --on of `memfit plan`, or a network, host, link or place of the catalog; not "
            "this, the machine that memfit runs on. For models: show one model and its settings, with their "
            "sources. Default: all entries, the links only with --json. Refused for jobs, techniques and "
            "engines.",
        ),
    ] = None


def list_known(options: ListOptions, output: JsonOptions) -> None:
    """List the built-in jobs, models that hf:NAME builds, the techniques, the machines of the catalog, or the
    engines."""
    listings = {"jobs": _jobs, "techniques": _techniques, "engines": _engines}
    of_catalog = {"models": _models, "machines": print_machines}
    what = check_choice("list", options.what, (*listings, *of_catalog))
    if what in of_catalog:
        of_catalog[what](options.name, as_json=output.json)
        return
    if options.name is not None:
        raise UserError(
            f"`memfit list {what}` takes no name, but {options.name!r} is given",
            hint=f"`memfit list {what}` lists all",
        )
    quiet_libraries()
    listings[what](as_json=output.json)


def _jobs(*, as_json: bool) -> None:
    from memfit.jobs.registry import describe

    descriptions = describe()
    if as_json:
        keys = ("name", "title", "sizes", "data_source")
        emit(
            {
                "default": DEFAULT_JOB,
                "jobs": [{key: getattr(job, key) for key in keys} for job in descriptions],
            }
        )
        return
    print_table(
        ("job", "sizes", "what is trained, on what"),
        ((job.name, ", ".join(job.sizes), f"{job.title}\n{job.data_source}") for job in descriptions),
    )
    print("Your own: FILE.py:NAME, a Job in a Python file, or hf:PATH_OR_NAME, a Hugging Face configuration.")
    print("`memfit list models` lists the models that hf:NAME builds without a folder.")


def _models(name: str | None, *, as_json: bool) -> None:
    """Print the models of the table of published configurations; if ``name`` is given, that model with its
    settings. Raises UserError for a name that the table does not have."""
    from memfit.catalog.published_models import find_published, published_models, similar_names
    from memfit.report.quantities import number_text

    if name is None:
        models = published_models()
    elif match := find_published(name.removeprefix("hf:")):
        models = (match[1],)
    else:
        similar = similar_names(name)
        raise UserError(
            f"memfit's table of models has no {name!r}",
            hint=f"did you mean {' or '.join(similar)}?" if similar else "`memfit list models` lists all",
        )
    if as_json:
        emit({"models": [_model_view(model) for model in models]})
        return
    print_table(
        ("model", "type", "published parameters", "the same shapes"),
        (
            (m.name, m.model_type, number_text(m.parameters.value, "parameters"), ", ".join(m.same))
            for m in models
        ),
    )
    if name is None:
        print("`memfit plan hf:NAME` plans for one. Case does not matter, and the owner may be left out.")
        print("`memfit list models NAME` shows the settings of one model and their source.")
        return
    print_table(("setting", "value"), ((key, str(value)) for key, value in models[0].settings.items()))
    print(f"Settings: {models[0].source} ({models[0].date})")
    print(f"Parameters: {models[0].parameters.source} ({models[0].parameters.date})")
    if models[0].note:
        print(f"memfit builds it {models[0].note}.")


def _model_view(model: memfit.catalog.published_models.PublishedModel) -> dict[str, Any]:
    """Return plain data for ``--json``: the model's "name"; "same", the names of the same shapes; its "type"
    in transformers; its "settings"; its "parameters", a Fact; "note": how the model that is built differs;
    the "source" and the "date" of the settings."""
    from memfit.types.serialization import to_plain

    return {
        "name": model.name,
        "same": list(model.same),
        "type": model.model_type,
        "settings": dict(model.settings),
        "parameters": to_plain(model.parameters),
        "note": model.note,
        "source": model.source,
        "date": model.date,
    }


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
