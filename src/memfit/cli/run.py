"""``memfit run``: train one plan in a child process for each rank, and compare measurement and prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.options import (
    MOST,
    DeviceOptions,
    JobOptions,
    JsonOptions,
    PlanOptions,
    RuntimeOptions,
    SearchOptions,
    StoreOptions,
)
from memfit.cli.output import check_choice, emit, refuse_options, set_options
from memfit.cli.progress import Bars
from memfit.cli.request import (
    device_here,
    plan_file,
    print_workload_of,
    recommended_plans,
    request,
    writable,
)
from memfit.files.replace import write_whole
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.launch import RESUMABLE_EXIT, CheckpointSettings
from memfit.types.parsing import parse_duration
from memfit.types.plan import Plan
from memfit.types.result import Measurement, OutcomeKind, Recovery, Run
from memfit.types.sanitize import one_line, replace_controls
from memfit.types.units import format_bytes, format_seconds
from memfit.types.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The memory cap, seed, limits of time and checkpoints of the run, what it does if memory runs out, and
    the file that it is read from or written to; None: the default."""

    capped: Annotated[
        bool | None,
        typer.Option(
            "--capped/--no-capped",
            help="--capped: limit the memory of each training process while it trains to --memory or, "
            "without it, to what the plan is predicted to need. What Python and the libraries hold after a "
            "warm-up step is not counted. A run that needs more fails. With --memory, the limit also holds "
            "during the evaluation after training. Without it, on a CPU, the limit is raised to what "
            "evaluation and saves took in the warm-up; on a GPU, and on a CPU whose warm-up did neither, "
            "the evaluation has no limit. --no-capped: no limit. Default: --capped if --memory is given, "
            "otherwise --no-capped.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=2**31 - 1,
            help="Seed of the initial weights and of the data. With --resume, a seed other than that of the "
            "checkpoint is refused. Default: with --resume, the seed of the checkpoint; otherwise 0.",
        ),
    ] = None
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop the training processes when they have run for this time since their start or restart, "
            "for example 90s, 10m or 72h; the exit code is then 1. The search and the prediction before do "
            "not count. Default: no limit.",
        ),
    ] = None
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for checkpoints: one at the end and, with --save-every, earlier ones. It is "
            "created if it does not exist. It must not hold a checkpoint of a later step than that at which "
            "the run begins. With it, if a process dies or hangs after the first step, all restart from the "
            "newest checkpoint, or if there is none, from where the run began (--restarts). Refused for a "
            "job with Job(ema=...), for engines that cannot save, and for plans whose state cannot be "
            "saved, such as those with expert-parallel or with optimizer state on NVMe. Default: no "
            "checkpoints.",
        ),
    ] = None
    save_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=MOST,
            help="With --save: also write a checkpoint after every N steps. 0 (default): only at the end. "
            "Another number is refused without --save.",
        ),
    ] = 0
    save_async: Annotated[
        bool,
        typer.Option(
            "--save-async",
            help="With --save: training goes on while a checkpoint is written. This needs host memory for a "
            "copy of parameters and optimizer state, whose size is predicted and measured; on a CPU the "
            "copy counts towards --capped. Refused without --save. Default: training waits.",
        ),
    ] = False
    keep_last: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=MOST,
            help="With --save: after each save, delete all complete checkpoints in the folder except the N "
            "newest. With 2 or more, an older one is left if the newest is damaged. 0 (default): delete "
            "none. Another number is refused without --save.",
        ),
    ] = 0
    restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --save: number of restarts in a row, without a new checkpoint between them, after a "
            "process died or hung. An error that comes again in the same step is not tried a third time. An "
            "end before the first step, running out of memory, --timeout and a loss that is not finite "
            "cause no restart. Default: 3. Ignored without --save.",
        ),
    ] = 3
    grace: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="With --save: longest time that the run may take to end after SIGTERM. It then saves at "
            "the end of the step, or with several processes of the step after it, and ends with exit code "
            "75, or with 143 if there is no checkpoint. Processes that have not ended in this time, or at a "
            "second SIGTERM, are killed; before the first step, all are killed at once. Give a little less "
            "than your scheduler allows before it kills. On SIGUSR1, the run saves and goes on. Default: "
            "25s. Ignored without --save.",
        ),
    ] = "25s"
    stall_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="If no process makes progress in a training step for this time, end all and, with --save, "
            "restart them (--restarts). The process that hangs is named on standard error earlier, after "
            "two steps' time, at least 2 s. Default: 20 times the longest of the last 20 steps, or before "
            "the second step ends 100 times the predicted step; at least 5 minutes. Outside steps, as while "
            "loading, saving or evaluating, the limit is this time or 30 minutes, whichever is longer.",
        ),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Checkpoint from which to continue, or a folder of checkpoints, of which the newest "
            "complete one is taken; it may have been saved under another plan. --steps includes the steps "
            "before the checkpoint and must be above their number. Refused for jobs, plans and engines that "
            "--save refuses. Default: start at the first step.",
        ),
    ] = None
    on_oom: Annotated[
        str,
        typer.Option(
            metavar="ACTION",
            help="What to do if memory runs out in training. stop (default): end with exit code 1. "
            "next-plan: continue from the newest checkpoint of --save, or without one from where the run "
            "began, under a plan that is predicted to need less memory for the batch that failed and whose "
            "effect class (how far it may change results, E0 to E3) is not higher: with --recommended one "
            "of the search's frontier; else with more micro-batches if the class is E1 or above, then with "
            "recomputation, then with activation offload; if there is none, end with exit code 1. Not with "
            "--engine replay. Example: memfit run my.py:job --memory 2GiB --save run/ --save-every 50 "
            "--on-oom next-plan",
        ),
    ] = "stop"
    most_recoveries: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --on-oom next-plan, otherwise refused: how often the run continues after memory ran "
            "out. When it runs out once more, the run ends with exit code 1. Default: 2.",
        ),
    ] = None
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write the run with its environment to this file, and not into the store; overwritten if it "
            "exists. `memfit record --add FILE.json` adds it to a store. Not with --store. Default: the run "
            "is stored.",
        ),
    ] = None
    spec: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="With --record, otherwise refused: make exactly the run in this file, which `memfit poc "
            "--executor` writes for each of its runs. Of the other options, only --label and --json can be "
            "given with it.",
        ),
    ] = None
    label: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="With --record: name under which a store keeps the run: up to 80 letters, digits, dots, "
            "hyphens and underscores, the first a letter or a digit. Default: run. Another name is refused "
            "without --record.",
        ),
    ] = "run"


def run(
    job: JobOptions,
    plan_options: PlanOptions,
    search_options: SearchOptions,
    options: RunOptions,
    runtime: RuntimeOptions,
    device: DeviceOptions,
    store: StoreOptions,
    output: JsonOptions,
) -> None:
    """Train one plan, and compare its measured memory and time with the prediction.

    Exits with code 1 if the run does not complete, for example because it reaches the memory cap or the time
    limit; with 3 if --recommended finds no plan that fits; with 75 if SIGTERM ended it and --resume can
    continue it; with 143 if SIGTERM ended it without a checkpoint."""
    timeout_s = parse_duration(options.timeout) if options.timeout is not None else None
    most = most_recoveries(options)
    check_label(options)
    if options.record is not None:
        refuse_options({"--store": store.store}, "cannot be used with --record, which stores nothing")
        writable(options.record)
    if options.spec is not None:
        _finish(
            _run_prepared(job, plan_options, search_options, options, runtime, device), None, options, output
        )
        return
    plan, keep = plan_file(plan_options), checkpoint_settings(options)
    stall_s = parse_duration(options.stall_limit) if options.stall_limit is not None else None
    frontier: tuple[Plan, ...] = ()
    job_request = dataclasses.replace(
        request(job, search_options, runtime, device_here(device), plans=[plan] if plan else []),
        timeout_s=timeout_s,
    )
    from memfit.store import Store

    records = Store(store.store) if options.record is None else None
    if plan is None:  # what the run would refuse is refused before the search
        from memfit.jobs import checkpoints
        from memfit.jobs.registry import load

        checkpoints.resolve_settings(keep, options.seed, job.steps or load(job_request.job_ref).steps)
    workload = print_workload_of(job_request, lang="en", quiet=output.json)
    with Bars("en") as progress:
        from memfit.workflows import proof_of_concept
        from memfit.workflows.recovery import RecoverySettings

        if plan is None:
            plan, frontier = recommended_plans(job_request, progress)
        capped = search_options.memory is not None if options.capped is None else options.capped
        finished_run = proof_of_concept.run_plan(
            job_request,
            plan,
            seed=options.seed,
            steps=job.steps,
            capped=capped,
            progress=progress,
            store=records,
            recovery=RecoverySettings(
                keep=keep,
                most=most,
                frontier=frontier,
                on_recovery=functools.partial(print_recovery, most=most),
                stall_s=stall_s,
                on_notice=functools.partial(print_notice, folder=options.save),
            ),
        )
    _finish(finished_run, workload, options, output)


def _run_prepared(
    job: JobOptions,
    plan: PlanOptions,
    search_options: SearchOptions,
    options: RunOptions,
    runtime: RuntimeOptions,
    device: DeviceOptions,
) -> Run:
    """Make the run in the file of --spec and return it. Raises UserError for options other than --record and
    --label, which the file decides; without --record; and for a file that cannot be read or is not of a
    run."""
    from memfit.files.read import read_text
    from memfit.types import serialization
    from memfit.types.result import PreparedRun
    from memfit.workflows.single_run import run_spec

    assert options.spec is not None
    options_set = set_options(job, plan, search_options, options, runtime, device)
    options_set["JOB"] = options_set.pop("--job")
    allowed = ("--spec", "--record", "--label")
    refuse_options(
        {name: is_set for name, is_set in options_set.items() if name not in allowed},
        "cannot be used with --spec, which decides all of the run",
    )
    if options.record is None:
        raise UserError("--spec needs --record", allowed="--spec FILE.json --record FILE.json")
    prepared = serialization.loads(PreparedRun, read_text(options.spec), what=str(options.spec))
    with Bars("en") as progress:
        return run_spec(prepared.spec, prepared.estimate, progress, prepared.spec.name)


def _finish(run: Run, workload: Workload | None, options: RunOptions, output: JsonOptions) -> None:
    """Write the record, with --record, and print the result. Ends the command with the exit code of the run.
    Raises UserError if the record cannot be written."""
    if options.record is not None:
        from memfit.store.exchange.run_record import record_of, run_record_text

        write_whole(options.record, run_record_text(record_of(run, options.label)).encode())
    if output.json:
        from memfit.cli.views import run_view

        emit({"workload": workload, **run_view(run)})
    else:
        print(replace_controls("\n".join(lines(run))))
    if (code := exit_code(run)) != 0:
        raise typer.Exit(code)


def check_label(options: RunOptions) -> None:
    """Raise UserError if --label is not a name that a store can keep, or given without --record."""
    if options.label != "run" and options.record is None:
        raise UserError("--label needs --record", allowed="--record FILE.json --label NAME")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", options.label):
        raise UserError(
            f"--label {options.label[:90]!r} is not a name under which a store can keep a run",
            allowed="up to 80 letters, digits, dots, hyphens and underscores, the first a letter or a digit",
        )


_TERMINATED = 143  # what a shell reports of a process that SIGTERM ended


def exit_code(run: Run) -> int:
    """Return the exit status of the command: 0 if the run completed; 75 if SIGTERM ended it and there is a
    checkpoint to resume from; 143 if SIGTERM ended it and there is none; else 1."""
    outcome = run.measurement.outcome
    if outcome is OutcomeKind.INTERRUPTED:
        from memfit.runtime.restart import resume_newest

        return RESUMABLE_EXIT if resume_newest(run.spec.keep).resume else _TERMINATED
    return 0 if outcome is OutcomeKind.OK else 1


def checkpoint_settings(options: RunOptions) -> CheckpointSettings:
    """Return the settings of --save, --save-every, --save-async, --keep-last, --restarts, --grace and
    --resume. "" as the folder to save to, or as the checkpoint to resume, means none. Raises UserError for
    --save-every, --keep-last and --save-async without --save, and for a --grace that is no duration."""
    for name, value in (
        ("--save-every N", options.save_every),
        ("--keep-last N", options.keep_last),
        ("--save-async", options.save_async),
    ):
        if value and options.save is None:
            raise UserError(f"{name.split()[0]} needs --save", allowed=f"--save DIR {name}")
    return CheckpointSettings(
        save=str(options.save or ""),
        every_steps=options.save_every,
        resume=str(options.resume or ""),
        keep_last=options.keep_last,
        restarts=options.restarts,
        grace_s=parse_duration(options.grace),
        asynchronous=options.save_async,
    )


def print_notice(event: Mapping[str, object], *, folder: Path | None) -> None:
    """Print to standard error that ranks stall or have been restarted. ``event``: "event", which is
    "restarted" or "stalled"; of a restart "why" and its number "restart"; otherwise "text", "stacks" (rank ->
    stack trace), and "final", true if the run ends because it stalls. The stacks of a final event are written
    to a file in ``folder``, where the run saves, or printed if there is no such folder or it cannot be
    written."""
    if event["event"] == "restarted":
        print(
            f"memfit: {one_line(str(event['why']))}; restart {event['restart']}", file=sys.stderr, flush=True
        )
        return
    print(f"memfit: {one_line(str(event['text']))}", file=sys.stderr)
    stacks = event["stacks"]
    if event["final"] and isinstance(stacks, Mapping):
        text = "\n".join(f"rank {rank}\n{stack or 'no answer'}" for rank, stack in stacks.items())
        if folder is not None and folder.is_dir():
            file = folder / f"stacks-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.txt"
            with contextlib.suppress(UserError):  # a full disk must not end the run
                write_whole(file, text.encode())
                text = f"memfit: stack traces of all ranks are in {file}"
        print(replace_controls(text), file=sys.stderr)
    sys.stderr.flush()


def most_recoveries(options: RunOptions) -> int:
    """Return how often the run may continue after memory ran out: 0, never, for --on-oom stop; for next-plan
    the number of --most-recoveries, by default 2. Raises UserError for an unknown --on-oom, and for
    --most-recoveries without --on-oom next-plan."""
    action = check_choice("--on-oom", options.on_oom, ("stop", "next-plan"))
    if action == "next-plan":
        return options.most_recoveries or _MOST_RECOVERIES
    if options.most_recoveries is not None:
        raise UserError(
            "--most-recoveries needs --on-oom next-plan", allowed="--on-oom next-plan --most-recoveries N"
        )
    return 0


_MOST_RECOVERIES = 2


def print_recovery(recovery: Recovery, count: int, *, most: int) -> None:
    """Print to standard error what failed and how the run continues: recovery ``count`` of at most
    ``most``."""
    print(f"memfit: {one_line(recovery.reason)}, under {recovery.failed_plan.label}", file=sys.stderr)
    print(
        f"memfit: recovery {count} of at most {most}: {one_line(_continuation_text(recovery))}",
        file=sys.stderr,
        flush=True,
    )


def _continuation_text(recovery: Recovery) -> str:
    """Return a text that says from which checkpoint and step, and under which plan, a run continued after it
    ran out of memory; and what this plan and the failed one are predicted to need, of which limit."""
    steps = f"{recovery.first_step} step{'s' * (recovery.first_step != 1)}"
    checkpoint = recovery.checkpoint
    start = f"from {checkpoint}, after {steps}" if checkpoint else "from step 0, as there is no checkpoint"
    return (
        f"{start}, under {recovery.plan.label} (at most {recovery.effect.label}), predicted to need "
        f"{format_bytes(recovery.needed_bytes)} of {format_bytes(recovery.limit_bytes)} for the batch of "
        f"step {recovery.step}, instead of {format_bytes(recovery.failed_bytes)}"
    )


def _recovery_lines(run: Run) -> Iterator[str]:
    """Yield two lines for each recovery, what failed and how the run went on, and a third with the verdict on
    the repeated steps, or that there were none to repeat; no third if the run did not reach these steps
    again. If memory ran out and the run ended without a further recovery, a last line says why."""
    for recovery in run.recoveries:
        yield f"  failed  {recovery.reason}, under {recovery.failed_plan.label}"
        yield f"  went on {_continuation_text(recovery)}"
        if (verdict := recovery.verdict) is not None:
            yield f"  verdict {verdict.effect.label} {verdict.kind.value}: {verdict.reason}"
        elif recovery.first_step == recovery.step:
            yield (
                "  verdict none: the checkpoint is of the failed step, so that no step was trained twice; "
                f"the plan changes results at most by its class, {recovery.effect.label}"
            )
    if run.recovery_stop:
        yield f"  ended   without recovery: {run.recovery_stop}"


def lines(run: Run) -> Iterator[str]:
    """Yield the lines of a summary of the run. The first has the plan and the outcome. The restarts, and the
    recoveries from running out of memory, follow, and lines for what is known of: why memory ran out, peak
    memory with its prediction, resident memory and a raised cap, the copy for saves, step time with its
    prediction, slow data, the ranks, alarms, the checkpoint that was resumed, an objection to splitting the
    batch, the first and the last loss, the checkpoint to resume, and the metric."""
    from memfit.verify.aggregate import median_step_s

    measurement = run.measurement
    cap_bytes = measurement.cap_bytes or run.spec.cap_bytes
    limit = f" ({measurement.limit_kind})" * bool(measurement.limit_kind)  # "" if it ended before the limit
    cap = f"under {format_bytes(cap_bytes)}{limit}" if cap_bytes else "without a cap"
    yield ": ".join(
        filter(None, (run.spec.plan.label, f"{measurement.outcome.value} {cap}", measurement.reason))
    )
    for restart in measurement.restarts:
        rank = f"rank {restart.rank}: " if run.spec.plan.ranks > 1 else ""
        start = restart.checkpoint or "where the run began, as there was no checkpoint"
        yield f"  restart after {rank}{restart.reason}, in step {restart.step}; from {start}"
    yield from _recovery_lines(run)
    if measurement.outcome is OutcomeKind.OOM:
        from memfit.cli.autopsy import in_one_line
        from memfit.monitoring.autopsy import diagnose_run

        diagnosis = diagnose_run(
            measurement.reason,
            measurement.steps_done,
            message=measurement.oom_message,
            device=run.spec.device,
        )
        yield f"  why     {in_one_line(diagnosis)}"
    if measurement.peak_bytes is not None:
        yield f"  peak    {_peak(run, measurement.peak_bytes)}, {measurement.peak_source}"
    yield from _resident_lines(run)
    if measurement.save_copy_bytes:
        where = "beside the peak, within a cap" if run.spec.device == HOST else "in the host's memory"
        yield (
            f"  copy    {format_bytes(measurement.save_copy_bytes)} measured, at most "
            f"{format_bytes(run.spec.save_copy_bytes)} predicted, {where}, while a save is written"
        )
    if (step := median_step_s(measurement)) is not None:
        yield f"  step    {_predicted_and_measured(run.predicted_step_s, step, format_seconds)}"
    yield from _data_line(measurement)
    yield from _rank_lines(measurement)
    yield from (f"  alarm   {text}" for text in run.alarms)
    keep, count = run.spec.keep, len(measurement.losses)
    if keep.resume:
        skipped = f"; skipped {', '.join(keep.passed_over)}" if keep.passed_over else ""
        yield f"  resumed {keep.resume}{skipped}"
    if run.dependence is not None and run.dependence.sentence:
        yield f"  split   {run.dependence.sentence}"
    if measurement.losses:
        additional = " more" if keep.resume else ""
        yield (
            f"  loss    {measurement.losses[0]:.4g} at first, {measurement.losses[-1]:.4g} after "
            f"{count}{additional} steps"
        )
    yield from _saved_line(run)
    if measurement.metric is not None:
        yield f"  metric  {measurement.metric:.4g} on held-out data"


def _saved_line(run: Run) -> Iterator[str]:
    """Yield a line with the folder of the checkpoints if the run completed and saved, or with the newest
    checkpoint if a signal ended the run; nothing for another outcome."""
    from memfit.runtime.restart import resume_newest

    outcome, keep = run.measurement.outcome, run.spec.keep
    if keep.save and outcome is OutcomeKind.OK:
        yield f"  saved   {keep.save}"
    elif outcome is OutcomeKind.INTERRUPTED and (path := resume_newest(keep).resume):
        yield f"  saved   {path}; --resume {keep.save or path} goes on"


def _rank_lines(measurement: Measurement) -> Iterator[str]:
    """Yield a line with the nodes, the ranks and their collectives, one that names the fullest rank, and, if
    all ranks were timed, one that names the slowest; nothing for a run of one process."""
    if (ranks := measurement.ranks) is None:
        return
    nodes = f"{ranks.nodes} node{'s' * (ranks.nodes > 1)}"
    library = ranks.collectives or "an unknown library"
    yield f"  ranks   {ranks.per_node} on each of {nodes}, connected by {library}"
    peaks, times = ranks.peak_bytes, ranks.before_backward_s
    others_bytes = max(peak for rank, peak in enumerate(peaks) if rank != ranks.fullest)
    yield (
        f"          fullest rank {ranks.fullest}: peak {format_bytes(peaks[ranks.fullest])}, "
        f"of the others at most {format_bytes(others_bytes)}"
    )
    if ranks.slowest is not None:
        others_s = statistics.median(t for rank, t in enumerate(times) if rank != ranks.slowest)
        yield (
            f"          slowest rank {ranks.slowest}: {format_seconds(times[ranks.slowest])} for data and "
            f"forward pass, of the others {format_seconds(others_s)}"
        )


def _resident_lines(run: Run) -> Iterator[str]:
    """Yield a line with the resident memory of the process, and one with the bound that evaluation or saves
    have raised. On the processor, a cap counts only a part of the resident memory; on an accelerator, where
    the cap is on the device's own memory, it counts nothing of it."""
    measurement, resident = run.measurement, run.measurement.resident
    if resident is not None:
        on_host = run.spec.device == HOST
        yield (
            ("  memory  " if on_host else "  host    ")
            + f"{format_bytes(resident.peak_bytes)} {'' if on_host else 'of host memory '}resident at most, "
            f"{format_bytes(resident.start_bytes)} of them before the job was loaded; "
            + ("not in a cap: " if on_host else "a cap is on the device's memory; of these, ")
            + f"{format_bytes(resident.loaded_bytes)} of data and caches from before training, "
            f"{format_bytes(resident.shared_bytes)} shared, {format_bytes(resident.mapped_bytes)} of files"
        )
    if measurement.cap_bytes and run.spec.cap_bytes:
        yield (
            f"  cap     {format_bytes(run.spec.cap_bytes)} for training alone; evaluation or saves need up "
            f"to {format_bytes(measurement.cap_bytes)}, as measured in the warm-up"
        )


_SLOW_DATA_RATIO = 0.1


def _data_line(measurement: Measurement) -> Iterator[str]:
    """Yield a line with the median time to make a batch if it is at least a tenth of the median time of a
    step; otherwise nothing."""
    if not measurement.batch_s or not measurement.step_s:
        return
    batch_s, step_s = statistics.median(measurement.batch_s), statistics.median(measurement.step_s)
    if batch_s >= _SLOW_DATA_RATIO * step_s:
        yield (
            f"  data    {format_seconds(batch_s)} to make a batch, {batch_s / step_s:.2g} times the step, "
            "which waits for it and does not include it"
        )


def _peak(run: Run, peak_bytes: int) -> str:
    """Describe the measured and the predicted peak memory, such as ``1.5 MiB measured, 1.498 MiB predicted
    (-0.13 %)``. The percentage, predicted relative to measured, is left out in three cases, which the text
    then names: if the run did not complete; if it had only one step and stayed below the predicted peak,
    which is reached from the second step on; and if it saved asynchronously on a processor, where the
    measured peak includes the copy."""
    measured, predicted = format_bytes(peak_bytes), run.predicted_peak_bytes
    if run.measurement.outcome is not OutcomeKind.OK:
        prediction = f", {format_bytes(predicted)} predicted for the whole run" if predicted else ""
        return f"{measured} when it ended{prediction}"
    if run.spec.steps == 1 and predicted and predicted > peak_bytes:
        return f"{measured} measured, {format_bytes(predicted)} predicted from the second step on"
    if run.spec.save_copy_bytes and predicted and run.spec.device == HOST:
        return f"{measured} measured, {format_bytes(predicted)} predicted without the copy for saves"
    return _predicted_and_measured(predicted, peak_bytes, format_bytes)


def _predicted_and_measured(predicted: float | None, measured: float, text: Callable[[float], str]) -> str:
    """Describe a pair of values, such as ``1.5 MiB measured, 1.498 MiB predicted (-0.13 %)``. The percentage
    says how far the predicted value is above (+) or below (-) the measured one. Without a prediction, or if 0
    was measured, the text is only ``1.5 MiB measured``. ``text`` converts a value to text with its unit."""
    measured_text = f"{text(measured)} measured"
    if predicted is None or not measured:
        return measured_text
    return (
        f"{measured_text}, {text(predicted)} predicted "
        f"({round(100 * (predicted / measured - 1), 2) + 0:+.2f} %)"
    )
