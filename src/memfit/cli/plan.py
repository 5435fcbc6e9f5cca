"""``memfit plan``: recommend a plan and compare it with its rivals, with reasons. Nothing is trained, except
for a few steps with --measure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.largest import LargestOptions, print_largest, refuse_without_largest
from memfit.cli.options import (
    MOST,
    BoundsOptions,
    JobOptions,
    MachineOptions,
    OutputOptions,
    RuntimeOptions,
    SearchOptions,
)
from memfit.cli.output import check_language, english_only, refuse_options
from memfit.cli.plan_diff import DiffOptions, print_diff, script_of
from memfit.cli.progress import Bars
from memfit.cli.request import (
    best_so_far,
    excluded_techniques,
    is_here,
    print_workload_of,
    request,
    show_search,
    writable,
)
from memfit.types.errors import NothingFits, UserError
from memfit.types.parsing import parse_duration
from memfit.types.plan import Bounds, Plan

if TYPE_CHECKING:
    import memfit.export.source_edits
    import memfit.planner.request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRunOptions:
    """The number of processes, and whether to measure the fastest plans before one is recommended, and for
    how long."""

    nproc: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST,
            help="Plan for N processes of this machine that share the batch, which must have at least N "
            "samples. Default: 1. On GPUs, each process has one: N is at most the number of this machine's "
            "GPUs. With --on another machine of GPUs, N must be 1 or the number of its GPUs; both mean "
            "that all of them can be used. Not with --from.",
        ),
    ] = 1
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Before recommending, train the best plans by prediction and similar ones on this machine "
            "for a few steps each, under the memory limit of the search (--memory): the measured step "
            "times then decide. Needs --goal fastest, cheapest or greenest. With --largest: run the values "
            "that are found, and the next ones, under a cap of --memory, with any --goal; the job must not "
            "be a memfit.Job, and on a CPU --memory must be given, below the machine's memory. Not with "
            "--from, --diff or --on another machine.",
        ),
    ] = False
    measure_time: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="With --measure: start no further run after this time, for example 90s, counted from the "
            "first run, unless fewer than two plans have run successfully. Default: 5m. Ignored without "
            "--measure, and with --largest, which makes at most 16 runs for each answer.",
        ),
    ] = "5m"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """The file to write the plan to, and whether it may be overwritten."""

    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Write the recommended plan to this YAML file, which you can read and edit and which other "
            "commands take as --plan. With --from: write the plan of your set-up instead of the recommended "
            "one; with --diff: that of the edit. An existing file is refused without --force. Default: the "
            "plan is only printed. Not with --largest.",
        ),
    ] = None
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With --save, or with --largest and --out: overwrite the file if it exists. Otherwise "
            "ignored.",
        ),
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FromOptions:
    """The files of the user's existing set-up, and the proof of concept whose measurements correct predicted
    step times, with the store that holds it."""

    from_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Configuration file of your own for DeepSpeed, Accelerate, Trainer, Megatron-LM, "
            "torchtitan, OpenFold, Axolotl, LLaMA-Factory, Lightning or MACE. Can be given several times: "
            "all files together are one set-up, with at most one file of each kind. The set-up is predicted "
            "and linted, and compared with better plans. If neither it nor another plan fits, the exit code "
            "is 3. Not with --nproc, --measure, --corrected-by, --deadline, --budget, --micro-batch, "
            "--without, --explain-infeasible, --largest or --diff.",
        ),
    ] = None
    corrected_by: Annotated[
        str | None,
        typer.Option(
            metavar="ID|last",
            help="Correct the predicted step times by the measured ones of the proof of concept with this "
            "ID; last: of the one begun last. It must have run the same job, of any size, on this machine, "
            "with the same kind of device, processor, number of cores, torch version and OMP_NUM_THREADS, "
            "and one of its runs must have completed. Default: no correction. Not with --from, --largest, "
            "--diff or --on another machine.",
        ),
    ] = None
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Store: the file with the proof of concept of --corrected-by. Default: "
            "memfit/memfit.sqlite3 in your data folder (on Linux ~/.local/share); `memfit doctor` "
            "prints the path. Ignored without --corrected-by.",
        ),
    ] = None


def _refuse_options_with(
    mode: str,
    limits: BoundsOptions,
    from_options: FromOptions,
    run: PlanRunOptions,
    save: SaveOptions,
    largest: LargestOptions,
) -> None:
    """Raise UserError if an option is given that cannot be used with the option ``mode``: "--from",
    "--largest" or "--diff"."""
    options = {
        "--from": from_options.from_files,
        "--corrected-by": from_options.corrected_by,
        "--nproc": run.nproc != 1,
        "--measure": run.measure,
        "--save": save.save,
        "--largest": largest.largest,
        "--values": largest.values,
        "--buckets": largest.buckets,
        "--step": largest.step,
        "--out": largest.out,
        "--deadline": limits.deadline,
        "--budget": limits.budget,
        "--micro-batch": limits.micro_batch,
        "--without": limits.without,
        "--explain-infeasible": limits.explain_infeasible,
    }
    names, allowed = _REFUSED[mode]
    refuse_options(
        {name: value for name, value in options.items() if name in names},
        f"cannot be used with {mode}",
        allowed=allowed,
    )


_LIMITS = ("--corrected-by", "--deadline", "--budget", "--micro-batch", "--explain-infeasible")
_OF_LARGEST = ("--largest", "--values", "--buckets", "--step", "--out")
# Option -> (options that cannot be used with it, what is allowed).
_REFUSED = {
    "--from": (
        (*_LIMITS, "--nproc", "--without"),
        "--from without these options: the set-up is predicted exactly as its files describe it",
    ),
    "--largest": ((*_LIMITS, "--from", "--save"), "--largest without these options"),
    "--diff": (
        (*_OF_LARGEST, "--from", "--corrected-by", "--measure", "--explain-infeasible"),
        "--diff without these options",
    ),
}


def _print_diff_or_largest(
    script: memfit.export.source_edits.Source | None,
    job_request: memfit.planner.request.Request,
    largest: LargestOptions,
    run: PlanRunOptions,
    save: SaveOptions,
    output: OutputOptions,
) -> None:
    """Print the edit of ``script`` and, with --save, write its plan; if ``script`` is None, print the answer
    to --largest. Raises UserError if the file of --save exists and --force is not given, or if it cannot be
    written; otherwise as `print_diff` and `print_largest` do."""
    if script is None:
        print_largest(job_request, largest, as_json=output.json, force=save.force, measure=run.measure)
        return
    if save.save is not None:
        writable(save.save, overwrite=save.force)
    chosen_plan = print_diff(script, job_request, largest.plans, as_json=output.json)
    if save.save is not None:
        write_plan(
            save.save, chosen_plan, note=f"for {job_request.job_ref.spec}, of the edit of {script.path}"
        )


def plan(  # noqa: PLR0913
    job: JobOptions,
    search_options: SearchOptions,
    on: MachineOptions,
    limits: BoundsOptions,
    runtime: RuntimeOptions,
    from_options: FromOptions,
    run: PlanRunOptions,
    save: SaveOptions,
    largest: LargestOptions,
    diff: DiffOptions,
    output: OutputOptions,
) -> None:
    """Recommend a plan that fits the memory. Nothing is trained, except for a few steps with --measure.

    Prints the recommended plan and its best alternatives, what each technique in it saves (memory) and costs
    (time), and why other plans were left out. With --from, predicts and lints an existing set-up and shows
    better plans, if there are any. With --largest, finds the largest batch or other size that fits. With
    --diff, prints the edit of your own script that applies the plan."""
    language_code = check_language(output.lang)
    if diff.diff is not None or largest.largest is not None:
        mode = "--diff" if diff.diff is not None else "--largest"
        _refuse_options_with(mode, limits, from_options, run, save, largest)
        english_only(output, mode)
        script = script_of(diff, largest.plans, has_job=job.job is not None)
        job_request = _read_request(job, search_options, runtime, on, run, limits)
        _print_diff_or_largest(script, job_request, largest, run, save, output)
        return
    refuse_without_largest(largest)
    if save.save is not None:
        writable(save.save, overwrite=save.force)
    if from_options.from_files:
        _refuse_options_with("--from", limits, from_options, run, save, largest)
    if run.measure and (from_options.from_files or not is_here(on.on)):
        raise UserError(
            "--measure runs plans on this machine, so it cannot be used with another machine in --on or with "
            "--from",
            allowed="--measure without --from, and without --on or with --on this, this:cpu or this:KIND",
        )
    measure_s = parse_duration(run.measure_time)
    if from_options.from_files:
        from memfit.cli.plan_from_config import review_files

        files, as_json = from_options.from_files, output.json
        read_plan, fits = review_files(
            files, job, search_options, runtime, on.on, lang=language_code, as_json=as_json
        )
        if save.save is not None:
            read_from = ", ".join(str(p) for p in files)
            write_plan(save.save, read_plan, note=f"for {job.spec}, read from {read_from}")
        raise typer.Exit(0 if fits else 3)
    job_request = _read_request(job, search_options, runtime, on, run, limits)
    if from_options.corrected_by is not None:
        job_request = _correct(job_request, from_options)
    workload = print_workload_of(job_request, lang=language_code, quiet=output.json)
    with (
        best_so_far(lang=language_code, as_json=output.json, workload=workload),
        Bars(language_code) as progress,
    ):
        from memfit.workflows.plan import find_plan

        try:
            result = find_plan(job_request, progress, measure_s=measure_s if run.measure else None).result
        except NothingFits as error:
            raise error.add_ways() if limits.explain_infeasible else error from None
    if save.save is not None and result.recommended is not None:
        write_plan(save.save, result.recommended.estimate.plan, note=f"for {job.spec}, found by memfit plan")
    show_search(
        result, lang=language_code, as_json=output.json, correction=job_request.correction, workload=workload
    )


def _read_request(
    job: JobOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    on: MachineOptions,
    run: PlanRunOptions,
    limits: BoundsOptions,
) -> memfit.planner.request.Request:
    """Return the options as a request to the planner. Raises UserError as `bounds_of` and `request` do."""
    bounds = bounds_of(job, limits, on.on)
    return request(job, search_options, runtime, on.on, ranks=run.nproc, bounds=bounds, has_nproc=True)


def _correct(
    job_request: memfit.planner.request.Request, options: FromOptions
) -> memfit.planner.request.Request:
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    poc_id = None if options.corrected_by == "last" else options.corrected_by
    return proof_of_concept.correct_step_times(job_request, Store(options.store), poc_id)


def bounds_of(job: JobOptions, options: BoundsOptions, on: str) -> Bounds:
    """Return the limits on a plan besides memory and accuracy. Those that are not given are None, 0 or empty.
    ``on``: the machine to plan for, as in --on. Raises UserError for a deadline or a budget (in USD) without
    a number of steps; for a deadline, a budget or a micro-batch if ``on`` is this machine; for a
    deadline that is not a time; and for an unknown technique."""
    limits_training = options.deadline is not None or options.budget is not None
    if limits_training and job.steps is None:
        raise UserError(
            "--deadline and --budget limit the whole training and need its number of steps",
            hint="give --steps N" + (" and, with --on, another machine than this one" if is_here(on) else ""),
        )
    if is_here(on) and (limits_training or options.micro_batch):
        raise UserError(
            "none of --deadline, --budget and --micro-batch can be used if the plan is for this machine, as "
            "it is without --on and with --on this or this:KIND",
            hint="name another machine with --on, such as --on 8xH100-SXM",
        )
    return Bounds(
        steps=job.steps or 0,
        deadline_s=parse_duration(options.deadline) if options.deadline is not None else None,
        budget_usd=options.budget,
        micro_batch=options.micro_batch or 0,
        without=excluded_techniques(options.without),
    )


def write_plan(path: Path, plan: Plan, *, note: str) -> None:
    """Write ``plan`` to ``path`` as YAML, with ``note`` as its first entry. An existing file is overwritten.
    Raises UserError if it cannot be written."""
    from memfit.files.replace import write_whole
    from memfit.techniques.plan_file import plan_text

    write_whole(path, plan_text(plan, note=note).encode())
