"""``memfit baseline``: store predicted peaks of memory in a file to commit, and fail when they grow."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions
from memfit.cli.output import check_choice, emit
from memfit.cli.progress import Bars
from memfit.cli.request import warn_of_shadowed_modules, writable
from memfit.types.baseline import PLAIN, BaselineComparison, BaselineTarget, MemoryDrift
from memfit.types.errors import UserError
from memfit.types.parsing import parse_percent
from memfit.types.units import format_bytes

if TYPE_CHECKING:
    import memfit.report.sarif
    import memfit.workflows.baseline

_TOLERANCE = "2%"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaselineOptions:
    """Whether to write or to check; the jobs to write with their plans, machine, size, batch and length; the
    baseline file; the tolerance of the check, and the file for its findings. None: not given."""

    action: Annotated[
        str,
        typer.Argument(
            metavar="write|check",
            help="write: predict the jobs and store their peaks of memory in --file, in place of those of "
            "the same jobs with the same options; other entries stay. check: predict all jobs of --file "
            "again, and exit with code 1 if memory grew by more than --tolerance.",
        ),
    ]
    jobs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[JOB...]",
            help="For write: built-in jobs (`memfit list jobs` lists them), FILE.py:NAME or "
            "hf:PATH_OR_NAME. Default: predict the jobs of --file again, each with its own options; refused "
            "if it has none. Refused with check.",
        ),
    ] = None
    plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="For write with a JOB, otherwise refused: plan of the jobs: a file as written by `memfit "
            "plan --save`; the name of a technique, with its default settings and, if it is for several "
            "processes, one for each device of --on; or plain (the default), which is training without any "
            "technique. Repeat the option to predict each job under several plans.",
        ),
    ] = None
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="For write with a JOB, otherwise refused: machine to predict for, such as H100-SXM, "
            "8xH100-SXM or FILE.toml (`memfit list machines` lists the names). The word "
            "this, in other commands the machine that memfit runs on, is refused: the prediction must be the "
            "same on every computer. Default: H100-SXM.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For write with a JOB, otherwise refused: size of the jobs, as in `memfit plan`. Default: "
            "the default of each job.",
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For write with a JOB, otherwise refused: samples per optimizer step of the jobs, of all "
            "processes together. Refused by a memfit.Job in FILE.py:NAME. Default: each job's own number.",
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For write with a JOB, otherwise refused: length of a sample of the jobs, as in `memfit "
            "plan`. Default: the length of each job's size.",
        ),
    ] = None
    file: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The baseline: a TOML file to commit. Paths in it are relative to its folder. If it does "
            "not exist, write creates it, and check fails with exit code 2. Default: memfit-baseline.toml.",
        ),
    ] = Path("memfit-baseline.toml")
    tolerance: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="For check, otherwise refused: growth in percent, such as 5%, that is not an error. It "
            "applies to the peak of each phase, to each module that holds at least 1 % of the peak, and to "
            f"reserved memory, of which growth by at most 20 MiB is never an error. Default: {_TOLERANCE}.",
        ),
    ] = None
    sarif: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For check, otherwise refused: also write what grew to this file as SARIF 2.1.0, for code "
            "hosts and editors. It is overwritten if it exists. Default: no file.",
        ),
    ] = None


def baseline(options: BaselineOptions, output: JsonOptions) -> None:
    """Store the predicted peaks of memory of your jobs in a file to commit (write), and compare new
    predictions with it (check).

    Needs no GPU and measures nothing, so with the same versions of memfit and torch the result is the same on
    every computer. check exits with code 1 if the peak of a phase, a module's memory in it, or reserved
    memory grew by more than the tolerance, and names the modules and lines that grew. Example: memfit
    baseline write train.py:job; then in CI: memfit baseline check"""
    action = check_choice("action", options.action, ("write", "check"))
    _check_options(options, action)
    if action == "write":
        _write(options, as_json=output.json)
    else:
        _check(options, as_json=output.json)


def _check_options(options: BaselineOptions, action: str) -> None:
    """Raise UserError for options of the other action, for options of jobs without a job, and for a file to
    write that cannot be written."""
    of_jobs = ("plan", "on", "size", "batch", "length")
    refused = {"write": ("tolerance", "sarif"), "check": ("jobs", *of_jobs)}[action]
    for name in refused:
        if getattr(options, name):
            what = "JOB" if name == "jobs" else f"--{name}"
            raise UserError(
                f"{what} is not an argument of `memfit baseline {action}`",
                hint="leave it out: check predicts the jobs of the file with their own options"
                if action == "check"
                else "leave it out: it is for `memfit baseline check`",
            )
    if action == "write":
        writable(options.file)
        for name in of_jobs:
            if getattr(options, name) and not options.jobs:
                raise UserError(
                    f"--{name} is given without a JOB",
                    hint=f"name a JOB, or leave out --{name}: without a JOB, the jobs of the file are "
                    "predicted again, each with its own options",
                )
    elif options.sarif is not None:
        writable(options.sarif)


def _write(options: BaselineOptions, *, as_json: bool) -> None:
    quiet_libraries()
    with Bars("en") as progress:
        from memfit.report.baseline_file import read_baseline
        from memfit.workflows.baseline import MACHINE, target_in, write_baseline

        if options.file.exists():
            read_baseline(options.file)  # before jobs are predicted for minutes
        targets = [
            target_in(
                options.file.parent,
                BaselineTarget(
                    job=job,
                    size=options.size,
                    batch=options.batch,
                    length=options.length,
                    plan=plan,
                    machine=options.on or MACHINE,
                ),
            )
            for job in options.jobs or ()
            for plan in options.plan or (PLAIN,)
        ]
        predictions = write_baseline(options.file, targets, _show_target(options.file.parent, progress))
    if as_json:
        emit({"file": options.file.as_posix(), "jobs": predictions})
        return
    for prediction in predictions:
        peak = format_bytes(prediction.allocated_bytes)
        print(f"{prediction.title}: {peak} of tensors at the peak, in {prediction.peak_phase}")
    print(f"{options.file} is written; commit it, and run `memfit baseline check` in CI")


def _check(options: BaselineOptions, *, as_json: bool) -> None:
    tolerance_ratio = parse_percent(options.tolerance or _TOLERANCE)
    quiet_libraries()
    with Bars("en") as progress:
        from memfit.workflows.baseline import check_baseline

        comparisons = check_baseline(
            options.file, tolerance_ratio, _show_target(options.file.parent, progress)
        )
    if options.sarif is not None:
        _write_sarif(options.sarif, options.file, comparisons)
    if as_json:
        emit({"file": options.file.as_posix(), "jobs": comparisons})
    else:
        _print(comparisons, options)
    if any(comparison.drifts for comparison in comparisons):
        raise typer.Exit(1)


def _show_target(folder: Path, progress: Bars) -> memfit.workflows.baseline.OnTarget:
    def show(done: int, total: int, target: BaselineTarget) -> None:
        from memfit.workflows.baseline import job_path

        progress("trace", done, total, target.title)
        warn_of_shadowed_modules(job_path(target, folder))

    return show


def _print(comparisons: Sequence[BaselineComparison], options: BaselineOptions) -> None:
    from memfit.report.baseline_drift import drift_text

    tolerance, command = options.tolerance or _TOLERANCE, _write_command(options.file)
    for comparison in comparisons:
        for drift in comparison.drifts:
            print(f"{comparison.title}, {drift_text(drift)}")
        if not comparison.drifts:
            print(f"{comparison.title}: no growth above {tolerance}")
        for note in comparison.notes:
            print(f"    {note}")
    if any(comparison.drifts for comparison in comparisons):
        print(f"If this is intended, store the new peaks: `{command}`")
    elif any(comparison.fell for comparison in comparisons):
        print(f"To keep what was saved, store the lower peaks: `{command}`")


def _write_command(file: Path) -> str:
    is_default = file == BaselineOptions(action="write").file
    return "memfit baseline write" + ("" if is_default else f" --file {shlex.quote(str(file))}")


def _write_sarif(path: Path, file: Path, comparisons: Sequence[BaselineComparison]) -> None:
    from memfit import __version__
    from memfit.files.replace import write_whole
    from memfit.report.sarif import sarif_text

    results = [
        _sarif_result(comparison.title, drift, file)
        for comparison in comparisons
        for drift in comparison.drifts
    ]
    write_whole(path, sarif_text(results, version=__version__).encode())


def _sarif_result(title: str, drift: MemoryDrift, file: Path) -> memfit.report.sarif.SarifResult:
    """Return the drift as a SARIF result. Its place is the line of the first module of the drift whose line
    is in a file that exists; if there is none, the baseline file, without a line."""
    from memfit.report.baseline_drift import drift_text
    from memfit.report.sarif import SarifResult

    places = (module.line.rpartition(":") for module in drift.modules if module.line)
    known = [(file.parent / name, int(line)) for name, _, line in places if (file.parent / name).is_file()]
    place, line = known[0] if known else (file, None)
    return SarifResult(
        rule="memory-growth",
        level="error",
        text=f"The predicted memory grew: {title}, {drift_text(drift)}.",
        advice=f"If this is intended, store the new peaks with `{_write_command(file)}`.",
        file=place,
        line=line,
    )
