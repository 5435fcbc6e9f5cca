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
            metavar="[JOB]", help="A built-in job, FILE.py:NAME, or hf:PATH_OR_NAME. Default: protein-ss."
        ),
    ] = None
    size: Annotated[
        str | None, typer.Option(metavar="NAME", help="The job's size; `memfit jobs` lists them.")
    ] = None
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Your data in the job's format.")] = None
    weights: Annotated[str | None, typer.Option(metavar="DIR", help="Start from these safetensors.")] = None
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Optimizer steps of one run.")] = None
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Samples per optimizer step.")] = None
    length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens, residues or bases of a sample.")
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
            help="The memory to fit, for example 24GiB. Default on a CPU, as a demonstration: a quarter of "
            "what plain training needs, or the least that a plan fits.",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of each host of --on. Default: the catalog's or file's."),
    ] = None
    goal: Annotated[
        str,
        typer.Option(
            metavar="fastest|smallest|cheapest|greenest|fewest",
            help="Which plan is best; fewest: devices.",
        ),
    ] = "fastest"
    accuracy: Annotated[
        str,
        typer.Option(
            metavar="exact|rounding|any",
            help="What a plan may do to the numbers: nothing, other rounding, or another algorithm too.",
        ),
    ] = "rounding"
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="What trains; `memfit engines` shows which can.")
    ] = "native"


ExcludedTechniques = Annotated[
    list[str] | None,
    typer.Option("--without", metavar="TECHNIQUE", help="Not to use this one. May be given several times."),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoundsOptions:
    """Limits of the whole training, on the devices of --on."""

    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Done by then: 90m, 72h, 3d; with --steps.")
    ] = None
    budget: Annotated[
        float | None, typer.Option(metavar="USD", min=0.01, help="For no more than this; with --steps.")
    ] = None
    micro_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Samples that go through at once.")
    ] = None
    without: ExcludedTechniques = None
    explain_infeasible: Annotated[
        bool,
        typer.Option("--explain-infeasible", help="If nothing fits: the least changes that would help."),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HereOptions:
    """The origin of the electricity, and how this machine is used."""

    place: Annotated[str, typer.Option(metavar="PLACE", help="Whose power: a country, or world.")] = "world"
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads. Default: all.")] = None
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate", help="Time this machine's operators again; else stored timings are used."
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """The machine for which a plan is made."""

    on: Annotated[
        str,
        typer.Option(
            metavar="MACHINE",
            help="this, H100-SXM, 8xH100-SXM, 64x8xH100-SXM@IB-NDR or FILE.toml; see `memfit machines`.",
        ),
    ] = "this"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WhichOptions:
    """The plan; plain training if neither option is given."""

    plan: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="A plan file, as `memfit plan --save` writes it.")
    ] = None
    recommended: Annotated[
        bool, typer.Option("--recommended", help="The plan that `memfit plan` recommends.")
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """The location of the records."""

    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The store. Default: in your data folder.")
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EffortOptions:
    """Effort of a proof of concept that cannot be measured and must be entered."""

    attended_minutes: Annotated[
        float | None,
        typer.Option(metavar="MIN", help="Minutes that people sat beside it, kept with the proof."),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LanguageOptions:
    """The language of the result."""

    lang: Annotated[str, typer.Option(metavar="en|ja", help="Language of the result.")] = "en"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JsonOptions:
    """Whether to print the result as JSON."""

    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """The language and format of the result."""

    lang: Annotated[str, typer.Option(metavar="en|ja", help="Language of the result.")] = "en"
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap `function`, which takes option dataclasses, for typer: the wrapper has one parameter for each of
    their fields."""
    nouns = {n: t for n, t in typing.get_type_hints(function).items() if n != "return"}
    shown = [parameter for noun in nouns.values() for parameter in _parameters(noun)]

    def command(**given: Any) -> None:
        function(**{n: t(**{f.name: given[f.name] for f in dataclasses.fields(t)}) for n, t in nouns.items()})

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in shown}
    return command


def _parameters(noun: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(noun, include_extras=True)
    needed = inspect.Parameter.empty
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[f.name],
            default=needed if f.default is dataclasses.MISSING else f.default,
        )
        for f in dataclasses.fields(noun)
    ]
