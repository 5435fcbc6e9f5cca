"""Options that several commands share. typer reads the fields of these dataclasses as parameters."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from memfit.types.job import JobRef

_DEFAULT_JOB = "protein-ss"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The job to train."""

    job: Annotated[
        str | None,
        typer.Argument(
            metavar="[JOB]",
            help="What to train: a built-in job (`memfit jobs` lists them), FILE.py:NAME for a job of your "
            "own, or hf:PATH_OR_NAME for a Hugging Face configuration. Default: protein-ss.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Size of the job; `memfit jobs` lists the sizes of each job."),
    ] = None
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with your own data, in the job's format.")
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder with safetensors files to take the initial weights from."),
    ] = None
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of optimizer steps in one run.")
    ] = None
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Samples per optimizer step.")] = None
    length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Length of a sample: tokens, residues or bases.")
    ] = None

    @property
    def spec(self) -> str:
        """The given job, or the default one."""
        return self.job or _DEFAULT_JOB

    @property
    def ref(self) -> JobRef:
        names = [f.name for f in dataclasses.fields(self) if f.name != "job"]
        return JobRef(spec=self.spec, **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GoalOptions:
    """The goal of a plan, its limits, and the engine."""

    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that the training must fit in, for example 24GiB. Default: the memory of the "
            "device; on a CPU, as a "
            "demonstration, a quarter of what plain training needs, or the least that any plan needs.",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each host of the --on machine. Default: the value in the catalog or the machine "
            "file.",
        ),
    ] = None
    goal: Annotated[
        str,
        typer.Option(
            metavar="fastest|smallest|cheapest|greenest|fewest",
            help="What the recommended plan optimizes. fewest: the number of devices.",
        ),
    ] = "fastest"
    accuracy: Annotated[
        str,
        typer.Option(
            metavar="exact|rounding|any",
            help="How a plan may change the numbers that training computes. exact: not at all; rounding: "
            "also sums in another order and other rounding; any: also another algorithm.",
        ),
    ] = "rounding"
    engine: Annotated[
        str,
        typer.Option(metavar="NAME", help="Engine that runs the training; `memfit engines` compares them."),
    ] = "native"


ExcludedTechniques = Annotated[
    list[str] | None,
    typer.Option(
        "--without", metavar="TECHNIQUE", help="Do not use this technique. Can be given several times."
    ),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoundsOptions:
    """Limits of the whole training, on the devices of --on."""

    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Longest time that the whole training may take, for example 90m, 72h or 3d. Needs --steps.",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="USD", min=0.01, help="Most that the whole training may cost, in USD. Needs --steps."
        ),
    ] = None
    micro_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Samples in one micro-batch. Default: chosen by memfit."),
    ] = None
    without: ExcludedTechniques = None
    explain_infeasible: Annotated[
        bool,
        typer.Option(
            "--explain-infeasible", help="If no plan fits, show the smallest changes that would make one fit."
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HereOptions:
    """The origin of the electricity, and how this machine is used."""

    place: Annotated[
        str,
        typer.Option(
            metavar="PLACE", help="Origin of the electricity, for its price and CO2: a country, or world."
        ),
    ] = "world"
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of CPU threads. Default: all.")
    ] = None
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate", help="Time this machine's operators again instead of using the stored timings."
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """The machine for which a plan is made."""

    on: Annotated[
        str,
        typer.Option(
            metavar="MACHINE",
            help="Machine to plan for: this, H100-SXM, 8xH100-SXM, 64x8xH100-SXM@IB-NDR or FILE.toml; "
            "`memfit machines` lists the names.",
        ),
    ] = "this"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhichOptions:
    """The plan; plain training if neither option is given."""

    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="Use the plan in this file, as written by `memfit plan --save`."
        ),
    ] = None
    recommended: Annotated[
        bool, typer.Option("--recommended", help="Use the plan that `memfit plan` recommends.")
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """The location of the records."""

    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Store: the file that keeps the records of runs. Default: in your data folder.",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EffortOptions:
    """Effort of a proof of concept that cannot be measured and must be entered."""

    attended_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MIN", help="Minutes that people spent attending to the proof of concept; stored with it."
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageOptions:
    """The language of the result."""

    lang: Annotated[str, typer.Option(metavar="en|ja", help="Language of the result.")] = "en"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JsonOptions:
    """Whether to print the result as JSON."""

    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """The language and format of the result."""

    lang: Annotated[str, typer.Option(metavar="en|ja", help="Language of the result.")] = "en"
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap `function`, which takes option dataclasses, for typer: the wrapper has one parameter for each of
    their fields."""
    option_types = {n: t for n, t in typing.get_type_hints(function).items() if n != "return"}
    parameters = [
        parameter for option_type in option_types.values() for parameter in _parameters(option_type)
    ]

    def command(**given: Any) -> None:
        function(
            **{
                n: t(**{f.name: given[f.name] for f in dataclasses.fields(t)})
                for n, t in option_types.items()
            }
        )

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters(option_type: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(option_type, include_extras=True)
    required = inspect.Parameter.empty
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[f.name],
            default=required if f.default is dataclasses.MISSING else f.default,
        )
        for f in dataclasses.fields(option_type)
    ]
