"""``memfit engine``: list the engines, and create environments for those that need their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import JsonOptions
from memfit.cli.output import check_choice, emit, print_table
from memfit.cli.progress import Bars
from memfit.types.errors import UserError
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import memfit.engines.base


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Whether to list engines or to install one, the name of the engine to install, and the folder for its
    virtual environment."""

    action: Annotated[
        str,
        typer.Argument(
            metavar="list|install",
            help="list (the default): show all engines and the installed version of each, or what keeps it "
            "from running; install: create a virtual environment with the engine that the next argument, "
            "NAME, names.",
        ),
    ] = "list"
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="For install, which needs it: the engine to install, with a name that `memfit engine list` "
            "shows. Engines that run in memfit's own environment need no other environment and are "
            "refused. Ignored with list.",
        ),
    ] = None
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For install: folder for the virtual environment, which must be new or empty. Default: "
            "memfit/engines/NAME in your data folder (on Linux ~/.local/share). Ignored with list.",
        ),
    ] = None


def engine(options: EngineOptions, output: JsonOptions) -> None:
    """List the engines, the programs that run a training, or create a virtual environment for one whose
    dependencies conflict with memfit's."""
    action = check_choice("action", options.action, ("list", "install"))
    if action == "install":
        _install(options, as_json=output.json)
    else:
        _list(as_json=output.json)


def _list(*, as_json: bool) -> None:
    from memfit.engines.registry import ENGINES

    if as_json:
        emit({"engines": [view(engine_type) for engine_type in ENGINES.values()]})
    else:
        print_table(("engine", "here", "what it is"), map(_row, ENGINES.values()))


def _install(options: EngineOptions, *, as_json: bool) -> None:
    from memfit.engines.registry import engine as named
    from memfit.runtime.engine_environment import install
    from memfit.types.serialization import to_plain

    if options.name is None:
        raise UserError(
            "the name of the engine to install is missing",
            allowed="memfit engine install NAME",
            hint="`memfit engine list` shows the names",
        )
    with Bars("en") as progress:
        environment = install(named(options.name), options.into, lambda line: progress("install", 0, 0, line))
    if as_json:
        emit({"engine": options.name, "environment": to_plain(environment)})
    else:
        size, duration = format_bytes(environment.installed_bytes), format_seconds(environment.took_s)
        print(f"{options.name} is installed in {environment.folder}: {size}, in {duration}")


def view(engine: memfit.engines.base.Engine) -> dict[str, Any]:
    """Return five texts for ``--json``: the engine's "name", its summary ("what"), its installed "version",
    what keeps it from running here ("problem"), and the command that would help ("fix"). The last three are
    "" if there is none."""
    from memfit.types.serialization import to_plain

    return {"name": engine.name, "what": engine.summary, **to_plain(engine.probe())}


def _row(engine: memfit.engines.base.Engine) -> tuple[str, ...]:
    probe = engine.probe()
    installed = probe.problem or probe.version
    return engine.name, f"{installed}\n{probe.fix}" if probe.problem else installed, engine.summary
