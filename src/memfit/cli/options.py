"""Options that several commands share. typer reads the fields of these dataclasses as parameters."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from memfit.types.errors import UserError
from memfit.types.job import DEFAULT_JOB, JobRef

# Larger numbers are mistakes: they would only fill the memory.
MOST, MOST_SAMPLES = 2**31 - 1, 2**24
# Time limit of a search for plans. With start and end, a command answers within a minute.
DEFAULT_WITHIN = "55s"
_REFUSED = (
    "Refused by `memfit estimate` with a COMMAND, --lengths or --precision, and by `memfit decide` without "
    "--pilot and --full."
)
_NOT_FOR_COMMAND = "Refused by a memfit.Job in FILE.py:NAME, and by `memfit estimate` with a COMMAND."
_NOT_FOR_LENGTHS = (
    "Refused by a memfit.Job in FILE.py:NAME, and by `memfit estimate` with a COMMAND or --lengths."
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SizeOptions:
    """What replaces a job's default size, data, initial weights, steps, batch, length and other sizes; None:
    not replaced."""

    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Size of the job. Built-in jobs: a name that `memfit list jobs` lists (default: the first "
            "of the job). hf: jobs: tiny (default; samples of 128 tokens) or paper (samples of 2,048 "
            "tokens), or of fewer if the model is made for fewer; the model is the same. FILE.py:NAME: a "
            "text, which the function gets as its argument size (default: its own). For built-in and hf: "
            "jobs, SIZE@N also sets --length N; another --length is then refused. Default with `memfit "
            "plan --from` and OpenFold's settings: the size in these. Not with `memfit sweep --sizes`. "
            f"{_NOT_FOR_COMMAND}",
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File with your own data, in place of the job's. Text files are UTF-8, also with .gz. "
            "char-lm: any text. protein-lm: FASTA of proteins; genome: of DNA. protein-ss: for each "
            "protein three lines: >name, the sequence, and one letter H, E or C (helix, strand, coil) for "
            "each residue. molecules: a line SMILES,number for each molecule. potential: a NumPy file .npz "
            "with M molecules of at most A atoms and F frames: numbers (M, A), atomic numbers, 0 as "
            "padding; molecule (F), the row of each frame's molecule in numbers, from 0; energy (F) in eV; "
            "positions (F, A, 3) in angstrom and forces (F, A, 3) in eV/angstrom; train_molecules, one "
            "number N: frames of the molecules below N are for training and come first, the others for "
            "testing. The other jobs test on the last tenth of the data (protein-lm: at most 128 "
            "sequences), protein-ss on the last fifth, molecules on those with the rarest ring skeletons, "
            "at least a fifth. A function FILE.py:NAME gets the path as its argument data. Default: the "
            "data of the job. Refused by alphafold2, weather, segmentation3d and hf: jobs. "
            f"{_NOT_FOR_LENGTHS}",
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder with safetensors files (*.safetensors) of a model of the same architecture and "
            "size, from which to take the initial weights. They must have each parameter of the model, "
            "except the input layer and head of protein-ss and the head of an hf: classifier. A function "
            "FILE.py:NAME gets the folder as its argument weights. A prediction only checks that the "
            "folder has such files. Default: the weights as the job initializes them, usually at random. "
            f"Refused by alphafold2. {_NOT_FOR_LENGTHS}",
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST,
            help="Number of optimizer steps of the training; with `memfit run --resume`, the steps before "
            "the checkpoint count. In `memfit plan` and `memfit estimate` it matters only for --deadline "
            "and --budget. Default: the job's number. Refused by `memfit estimate` with a COMMAND or "
            "--lengths.",
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST_SAMPLES,
            help="Samples per optimizer step, of all processes together. Default: the job's number; with "
            "--from, that of the files if they state one that the job accepts. `memfit poc` halves it "
            "until plain training fits the free memory of this machine or each process has one sample. "
            f"{_NOT_FOR_COMMAND}",
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST,
            help="Length of a sample: tokens, residues, bases or, for char-lm, bytes. For hf: models with "
            "encoder and decoder: tokens of the source, and of the target without --dim target=N; for hf: "
            "models of speech: tokens of the transcript. Built-in jobs take 16 to 262144; they crop "
            "longer proteins, and leave out longer molecules. hf: jobs take what the model has positions "
            "for. A function FILE.py:NAME gets it as its argument length. Default: the length of the "
            "job's size; for `memfit plan --from`, that of the files if they state one that the job "
            "accepts. Refused by weather, potential, segmentation3d and hf: models of images, whose "
            f"samples have no length. {_NOT_FOR_LENGTHS}",
        ),
    ] = None

    dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Another size of the job, such as crop=96, atoms=2000, rollout=8, layers=6 or hidden=512; "
            "repeat the option for further sizes. A built-in or hf: job lists its sizes in the error if "
            "you name one that it lacks; a function FILE.py:NAME gets the number as its argument NAME. "
            f"Default: the job's own sizes. {_NOT_FOR_LENGTHS}",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions(SizeOptions):
    """The job to train, None if the user named none, and what replaces its default sizes, data, initial
    weights and steps."""

    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB",
            help="What to train: a built-in job (`memfit list jobs` lists them), FILE.py:NAME for a job of "
            "your own, or hf:PATH_OR_NAME for a Hugging Face configuration: a folder with config.json, or "
            "a name such as hf:meta-llama/Llama-3.1-8B (`memfit list models`). The NAME of FILE.py:NAME is "
            "a memfit.Job, which refuses --size, --data, --weights, --batch, --length and --dim, or a "
            "function that returns one and gets those of these options that are given as keyword "
            "arguments. Default: protein-ss; but if the files of `memfit plan --from` describe a model, "
            "the job that builds it, or an error if none does.",
        ),
    ] = None

    @property
    def spec(self) -> str:
        """The job as the user named it, or the default job, "protein-ss"."""
        return self.job or DEFAULT_JOB

    @property
    def ref(self) -> JobRef:
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("job", "dim")]
        options = {name: getattr(self, name) for name in names}
        dimensions = _dimensions(self.dim or [])
        for name in dimensions.keys() & options.keys():
            if options[name] is not None or name in ("size", "data", "weights"):
                raise UserError(
                    f"--dim {name}={dimensions[name]} cannot be used: --{name} sets the {name} of the job",
                    allowed=f"--{name} without --dim {name}",
                )
        return JobRef(spec=self.spec, **options, dimensions=dimensions)


_MOST_DIGITS = 12


def _dimensions(texts: list[str]) -> dict[str, int]:
    """Return name -> number for the ``texts`` of --dim. Raises UserError for a text that is not NAME=N, with
    a whole number N of at most 12 digits, and for a name that is given twice."""
    dimensions: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        name = name.strip()
        if not (name and number.isdecimal() and len(number) <= _MOST_DIGITS):
            raise UserError(
                f"--dim {text[:80]} is not a size",
                allowed=f"NAME=N with the name of a size and a whole number of at most {_MOST_DIGITS} "
                "digits, such as crop=96",
            )
        if name in dimensions:
            raise UserError(f"--dim {name} is given twice", allowed="each size once")
        dimensions[name] = int(number)
    return dimensions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a recommended plan minimizes, the limits on its memory and on its effect on results (accuracy),
    and the engine that trains."""

    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of one device that the training may use, for example 24GiB. More than a GPU has "
            "is reduced to what it has, with a warning. On a CPU, each process counts as a device. "
            "Searches for a plan, `memfit plan --largest` and `memfit estimate --lengths` keep to it; "
            "`memfit plan --from` and, except with two plan files or --engines, `memfit estimate` say "
            "whether the training fits it; `memfit run` limits the training to it (see --capped). Default "
            "on a GPU: all its memory, but on this machine's GPU what is free now; there, `memfit "
            "estimate` nevertheless checks against all, and `memfit poc` searches under the limit of a "
            "demonstration. Default on a CPU: for a search, the limit of a demonstration; for `memfit plan "
            "--largest` and the checks of `memfit estimate`, all memory of the machine; `memfit plan "
            "--from` then checks nothing, and better plans must need no more than the plan of the files. "
            "The limit of a demonstration is a quarter of the peak memory of plain training (the job may "
            "set another share) or, if no plan fits that, 10 % more than the smallest plan needs. Refused "
            "by `memfit estimate --precision` and by `memfit decide` without --pilot and --full.",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of each host of the machine, apart from that of its devices, for example 512GiB. "
            "A plan fits only if what it needs there fits, too. Default: on this machine, all that memfit "
            "may use; on another, the value in the catalog or the machine file; if there is none, plans "
            "that keep tensors in host memory do not fit, and no other plan is checked. Refused if the "
            f"device is a CPU, as with --on this:cpu or on this machine without a GPU. {_REFUSED}",
        ),
    ] = None
    goal: Annotated[
        str,
        typer.Option(
            metavar="fastest|smallest|cheapest|greenest|fewest",
            help="What the recommended plan minimizes. fastest (the default): the time of a step; "
            "smallest: the peak memory of the tensors of one device; cheapest: the cost of a step: rent, "
            "if its price is known, and electricity; greenest: the CO2 of a step; fewest: the number of "
            "devices. Of plans that differ little in this, that is recommended which changes the training "
            "least and has the fewest techniques. Without a search for a plan it has no effect. Refused by "
            "`memfit estimate` with --lengths or --precision and by `memfit decide` without --pilot and "
            "--full.",
        ),
    ] = "fastest"
    accuracy: Annotated[
        str,
        typer.Option(
            metavar="exact|rounding|any",
            help="How a recommended plan may change the numbers that training computes. exact: not at all, "
            "they stay equal bit for bit; rounding (the default): by sums in another order or other "
            "rounding, as in lower precision; any: also by another algorithm, such as another optimizer, "
            "LoRA or BatchNorm over parts of the batch. Without a search for a plan it has no effect. "
            "Refused by `memfit estimate` with --lengths or --precision and by `memfit decide` without "
            "--pilot and --full.",
        ),
    ] = "rounding"
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Engine that runs the training; `memfit list engines` lists them. replay trains nothing: "
            "`memfit run` then shows a stored run again; `memfit poc`, --measure and `memfit export` "
            "refuse it. A search considers only plans that the engine supports; in `memfit poc`, runs for "
            "comparison that it does not support use native. Default: native, which is memfit itself; with "
            "--from, the engine of those files, but `memfit plan --from` predicts with native if their "
            "engine, as memfit runs it, does not support the plan or the model. An engine given here that "
            f"does not support a given plan or the model is refused. {_REFUSED}",
        ),
    ] = None


ExcludedTechniques = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        metavar="TECHNIQUE",
        help="Technique that no recommended plan may use; `memfit list techniques` lists the names. Repeat "
        "the option for further techniques. Default: all techniques may be used. Not with `memfit plan "
        "--from`.",
    ),
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoundsOptions:
    """Limits on a recommended plan besides memory and accuracy: the time and cost of the whole training, the
    size of a micro-batch, and techniques not to use. Also whether an error that no plan fits names the
    changes that would help."""

    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Longest time that the whole training of --steps steps may take, for example 90m, 72h or "
            "3d. A plan whose step time is unknown misses it. Needs --steps, and --on with another machine "
            "than this one. Not with --from or --largest. Default: no limit.",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="USD",
            min=0.01,
            help="Most that the whole training of --steps steps may cost, in USD: the rent of the devices "
            "and the electricity, or the electricity alone if memfit has no rental price of the device. A "
            "plan whose cost is unknown is over the budget. Needs --steps, and --on with another machine "
            "than this one. Not with --from or --largest. Default: no limit.",
        ),
    ] = None
    micro_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST_SAMPLES,
            help="Samples in one micro-batch of one device; with tensor, context or pipeline parallelism, "
            "of the devices that hold one copy of the model. It must divide the number of samples that "
            "these train in a step. Needs --on with another machine than this one. Not with --from or "
            "--largest. Default: memfit chooses the number.",
        ),
    ] = None
    without: ExcludedTechniques = None
    explain_infeasible: Annotated[
        bool,
        typer.Option(
            "--explain-infeasible",
            help="If no plan fits, add to the error the changes that memfit finds, each of which alone would "
            "make a plan fit. With --on a machine of several devices and a model of at least 3 equal "
            "blocks: more memory on each device or host, 2, 4, 8 or 16 times as many devices, a later "
            "deadline or a higher budget. Otherwise: only gradient accumulation, if the search left it out "
            "because splitting the batch changes what is trained. Default: the error names no changes. Not "
            "with --from, --largest or --diff.",
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """The place of the electricity, the CPU threads of each process, whether the stored timings of this
    machine's operators are replaced by new ones, and the time limit of a search for plans."""

    place: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="Place of the electricity, for its price and CO2: world (the average of the world; the "
            "default) or another name that `memfit list machines` lists. Ignored with --on FILE.toml: the "
            f"machine file says the place. {_REFUSED}",
        ),
    ] = "world"
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Number of CPU threads of each training process, and number with which operators are timed "
            "on this machine. Default: all that memfit may use, which several training processes on this "
            f"machine share; the files of `memfit export` then set no number. {_REFUSED}",
        ),
    ] = None
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Delete all stored timings of operators on the device of this machine that is planned for, "
            "made with the same number of threads and version of torch, and time operators again. This "
            "happens when a search for plans for this machine begins: in `memfit poc`; without --on or with "
            "--on this or this:KIND, in `memfit plan` (with --from only for files of one process) and in "
            "other commands with --recommended; in `memfit decide` with --pilot or --full of this or "
            f"this:KIND. Ignored without such a search. {_REFUSED}",
        ),
    ] = False
    within: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit of a search for plans, for example 30 or 30s (seconds) or 2min, counted from "
            "when the libraries are loaded. The answer then rests on what was estimated and traced until "
            "then, and says how much better a plan could still be. The trace of plain training and that of "
            "one plan that fits are finished even after the limit; `memfit poc` then also trains the best "
            "plans for about a minute (not with --goal smallest or fewest). A search that ends earlier "
            "gives the same answer with any limit. Default: 55s, for an answer within a minute; but if a "
            "limit has cut an earlier search for the same plans of the job on such a device, and it has "
            "kept a plan that fits, the answer is that of the earlier search, at once. Any TIME continues "
            "the earlier search. Ignored without a search for a plan, but refused by `memfit estimate` "
            "with --lengths, --precision, or a COMMAND without --plans, and by `memfit decide` without "
            "--pilot and --full.",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """The machine for which a plan is made."""

    on: Annotated[
        str,
        typer.Option(
            metavar="MACHINE",
            help="Machine to plan for: this (the GPU of this machine or, without one, its CPU; the "
            "default), this:cpu (its CPU) or this:KIND (its device of that kind, such as cuda; refused if "
            "it has none), H100-SXM (one device), 8xH100-SXM (devices of one host), 64x8xH100-SXM@IB-NDR "
            "(hosts x devices of each @ network between the hosts) or FILE.toml (a file that describes your "
            "machine). `memfit list machines` lists the names of devices and networks. Refused by `memfit "
            "estimate --precision`.",
        ),
    ] = "this"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """The device of this machine on which a command trains."""

    on: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where to train, on this machine only: this (its GPU or, without one, its CPU; the "
            "default), this:cpu (its CPU, even if there is a GPU) or this:KIND with torch's name of another "
            "kind of device that it has, such as this:cuda.",
        ),
    ] = "this"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The plan that a command uses: that of a file, or the one that a search recommends. With neither option
    it is plain training, or in ``memfit export`` with --from the plan of those files."""

    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Use the plan in this file, as written by `memfit plan --save`; it also says the number "
            "of processes. Default, without --recommended: plain training; in `memfit export` with --from, "
            "the plan of those files. Not with --recommended; in `memfit estimate` also not with plan "
            "files as arguments, a COMMAND or --precision.",
        ),
    ] = None
    recommended: Annotated[
        bool,
        typer.Option(
            "--recommended",
            help="Search for a plan as `memfit plan` does with the same options, and use the one that it "
            "recommends. Commands without --on search for this machine. If no plan fits, the exit code is "
            "3. Not with --plan; in `memfit estimate` also not with plan files as arguments, a COMMAND, "
            "--lengths or --precision.",
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """The path of the store, the file that holds proofs of concept, runs and records of others; None: the
    default path."""

    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Store: the file in which memfit keeps proofs of concept, runs and records of others; "
            "created, with its folder, if it does not exist. Default: memfit/memfit.sqlite3 in your data "
            "folder (on Linux ~/.local/share); `memfit doctor` prints the path. Refused by `memfit run "
            "--record` and `memfit decide --template`.",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EffortOptions:
    """The minutes that people spent attending to a proof of concept; memfit cannot measure them. None: not
    given."""

    attended_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MIN",
            help="Minutes, 0 or more, during which people attended to the proof of concept. They count as "
            "work in its costs and in the gates of --gates. They are stored with it, in place of minutes "
            "given earlier. Refused for a record from others and with --template. Default: minutes given "
            "earlier are kept.",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JsonOptions:
    """Whether to print the result or the error as JSON."""

    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the result or the error as one JSON object on standard output. Default: the result "
            "as text. An error is printed as text on standard error in any case. Refused by `memfit watch` "
            "with a COMMAND.",
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions(JsonOptions):
    """The language of the result, "en" or "ja", and whether to print the result or the error as JSON."""

    lang: Annotated[
        str,
        typer.Option(
            metavar="en|ja",
            help="Language of the result: en (English, the default) or ja (Japanese). Errors are in "
            "English. Without --json, ja is refused by `memfit plan` with --largest or --diff and `memfit "
            "estimate` with --lengths or --engines, whose answers are in English only.",
        ),
    ] = "en"


def group_options(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that typer can register as a command: typer reads options from a signature. Its
    parameters are the fields of the option dataclasses that `function` takes, all keyword-only. It fills
    these dataclasses and calls `function` with them. Its name and docstring are those of `function`."""
    option_types = {n: t for n, t in typing.get_type_hints(function).items() if n != "return"}
    parameters = [
        parameter for option_type in option_types.values() for parameter in _parameters(option_type)
    ]

    def command(**values: Any) -> None:
        function(
            **{
                n: t(**{f.name: values[f.name] for f in dataclasses.fields(t)})
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
