"""``memfit sweep``: train with several plans, seeds and sizes side by side, here or on a cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JobOptions, JsonOptions, StoreOptions
from memfit.cli.output import console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import warn_of_shadowed_modules
from memfit.types.errors import UserError
from memfit.types.parsing import parse_bytes, parse_duration
from memfit.types.plan import Plan
from memfit.types.sanitize import one_line
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import rich.table

    from memfit.workflows.sweep import Budget, RunSettings, Sweep, SweepTrial, TrialResult

_PLAIN = "plain"
_LINE_EVERY_S = 10.0
_MOST_REASONS = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """The plans, seeds and sizes to train with, where trials run, and the budget."""

    plans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PLANS",
            help="The plans to train with: files as written by `memfit plan --save`, or the word plain for "
            "plain training, which is the default. A plan is called by its file's name without the ending; "
            "two of one name are refused.",
        ),
    ] = None
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=10_000,
            help="Number of seeds: 0 to N-1, each with each plan and size. Default: 1, which is seed 0.",
        ),
    ] = 1
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Several sizes of the job, separated by commas, each with each plan and seed. Not with "
            "--size. Default: one size, that of --size.",
        ),
    ] = None
    executor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Where trials run: local (processes of this machine; the default) or slurm (jobs of a "
            "Slurm cluster; its nodes must share the folder of the store, the current folder and the "
            "installed Python), with settings: local:parallel=4, slurm:partition=a100,time=60. An unknown "
            "setting is refused with the list of those that exist. Repeat the option to run each trial once "
            "with each executor; two are refused if they differ neither in name nor in a setting that "
            "chooses the device, such as partition.",
        ),
    ] = None
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIME|NUSD",
            help="The most that this call may use: device hours as a time, such as 90m or 24h, or US "
            "dollars such as 20USD, which are refused if the price of a device is unknown. Both can be "
            "given. A device hour is one device, or one process on a CPU, for one hour from the start of a "
            "trial to its end. A trial begins only if the rest should suffice, judged by the trials that "
            "have ended; when the budget is used up, running trials are ended. Default: asked for on a "
            "terminal; elsewhere and with --json it must be given, unless all trials have a result.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory cap of each training process of a trial, such as 24GiB, as in `memfit run "
            "--memory`. A trial that runs out of memory under it has a result and is not run again. "
            "Default: no cap.",
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Engine that trains: native (the default) or another that `memfit list engines` lists, "
            "except replay, which trains nothing.",
        ),
    ] = "native"
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="CPU threads of each training process. Default: all that memfit may use on the machine, "
            "divided by the number of training processes of a trial and, with the executor local, by the "
            "number of trials at a time.",
        ),
    ] = None
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Stop a trial whose training runs for longer than this, such as 10m; it then has no "
            "result, and the same command runs it again. Default: no limit.",
        ),
    ] = None
    on: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Device on which a trial trains, of the machine where its executor starts it: this (its "
            "GPU or, without one, its CPU; the default), this:cpu (its CPU) or this:KIND with torch's name "
            "of another kind of device, such as this:cuda. Other machines are refused: --executor says "
            "which machine trains.",
        ),
    ] = "this"


def sweep(job: JobOptions, options: SweepOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Train with each plan, seed and size side by side, here or on a cluster, within a budget.

    Each trial is one `memfit run`; its run is stored as soon as it ends. The same command again runs only
    what has no result yet. Ctrl-C ends all trials. Exits with code 1 if a trial has no result at the end.

    Example: memfit sweep my.py:job plain saved.yaml --seeds 3 --executor local:parallel=2 --budget 1h"""
    budget = parse_budget(options.budget or [])
    quiet_libraries()
    plans = _plans(options.plans or [_PLAIN])
    from memfit.store import Store
    from memfit.workflows.sweep import Sweep

    trials, settings = _trials(job, options, plans)
    with Sweep(trials, settings, Store(store.store)) as running:
        if running.left:
            budget = agreed_budget(budget, running.left, settings, may_ask=not output.json)
            with _display() as show:
                running.run(budget, show)
        results, hours, usd = running.results, running.hours, running.usd
    if output.json:
        emit(_view(results, hours, usd, budget))
    else:
        _print(results, hours, usd)
    if any(result.state.value != "done" for result in results):
        raise typer.Exit(1)


def parse_budget(texts: Sequence[str]) -> Budget:
    """Return the budget of --budget, without limits if there are no ``texts``. Raises UserError for a text
    that is neither a time nor an amount in US dollars above 0, and for two of one kind."""
    from memfit.workflows.sweep import Budget

    amounts: dict[str, float] = {}
    for text in texts:
        number = text.lower().removesuffix("usd").strip()
        try:
            name, amount = (
                ("usd", float(number))
                if text.lower().endswith("usd")
                else ("hours", parse_duration(text) / 3600)
            )
        except (UserError, ValueError):
            amount = 0.0
        if not 0 < amount < float("inf"):
            raise UserError(
                f"--budget {text} is neither a time nor an amount in US dollars",
                allowed="above 0: device hours as a time with s, m, h, d or w, such as 90m, or US dollars, "
                "such as 20USD",
            )
        if name in amounts:
            raise UserError(
                f"--budget is given twice {'in USD' if name == 'usd' else 'as a time'}",
                allowed="one time, one amount in USD, or both",
            )
        amounts[name] = amount
    return Budget(**amounts)


def _plans(words: Sequence[str]) -> dict[str, Plan]:
    """Return the plans by name: ``plain``, or the file's name without its suffix. Raises UserError for a file
    without a valid plan, and for two of the same name."""
    from memfit.techniques.plan_file import read_plan

    plans: dict[str, Plan] = {}
    for word in words:
        name = word if word == _PLAIN else Path(word).stem
        if name in plans:
            raise UserError(
                f"two plans are called {name}: a plan has the name of its file without the ending",
                hint="give each plan once, or rename one of the files",
            )
        plans[name] = Plan() if word == _PLAIN else read_plan(Path(word))
    return plans


def _trials(
    job: JobOptions, options: SweepOptions, plans: Mapping[str, Plan]
) -> tuple[tuple[SweepTrial, ...], RunSettings]:
    from memfit.cli.request import is_here
    from memfit.engines.registry import engine
    from memfit.launch.executors import parse_executor
    from memfit.workflows.sweep import Placement, RunSettings, make_trials

    if options.sizes is not None and job.size is not None:
        raise UserError("--size and --sizes exclude each other", allowed="one of them")
    if not is_here(options.on):
        raise UserError(
            f"--on {options.on} is not a device of the machine that an executor starts a trial on",
            allowed="this, this:cpu or this:KIND",
            hint="--executor says which machine trains",
        )
    if engine(options.engine).name == "replay":
        raise UserError(
            "the engine replay trains nothing", allowed="another engine that `memfit list engines` lists"
        )
    if options.timeout is not None:
        parse_duration(options.timeout)
    placements = [
        Placement(executor=name, settings=settings)
        for name, settings in map(parse_executor, options.executor or ["local"])
    ]
    settings = RunSettings(
        engine=engine(options.engine).name,
        cap_bytes=parse_bytes(options.memory) if options.memory is not None else None,
        threads=options.threads or 0,
        timeout=options.timeout or "",
        on=options.on,
    )
    warn_of_shadowed_modules(job.spec)
    sizes = [size for part in (options.sizes or "").split(",") if (size := part.strip())]
    if options.sizes is not None and not sizes:
        raise UserError("--sizes names no size", allowed="names with commas, such as tiny,small")
    return make_trials(job.ref, plans, placements, settings, seeds=options.seeds, sizes=sizes), settings


def agreed_budget(
    budget: Budget, trials: Sequence[SweepTrial], settings: RunSettings, *, may_ask: bool
) -> Budget:
    """Return ``budget`` or, if it is empty, the one that the user enters on the terminal. Raises UserError if
    it is empty and there is no terminal or ``may_ask`` is False; for input that is no budget; and for a
    budget in US dollars, given or entered, if the price of a device of ``trials`` is unknown."""
    if (budget.hours, budget.usd) == (None, None):
        need = _need_text(trials, settings)
        if not (may_ask and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UserError(
                f"--budget is missing: {need}",
                allowed="--budget TIME, such as 2h, or --budget NUSD, such as 20USD, or both",
            )
        print(f"memfit: {need}", file=sys.stderr)
        budget = parse_budget([typer.prompt("Budget (such as 2h of device hours, or 20USD)", err=True)])
    if budget.usd is not None:
        placements = {trial.placement.kind: trial.placement for trial in trials}
        unknown = [kind for kind, placement in placements.items() if placement.usd_per_hour() is None]
        if unknown:
            raise UserError(
                f"--budget in USD cannot be kept: the price of {', '.join(sorted(unknown))} is unknown",
                allowed="a budget as a time, such as 24h",
                hint="give the price with --executor NAME:usd_per_hour=1.5 or NAME:device=H100-SXM",
            )
    return budget


def _need_text(trials: Sequence[SweepTrial], settings: RunSettings) -> str:
    """Return a text that says how many trials there are to run, and the device time that their training steps
    are predicted to take, or that it is not predicted because the device is unknown."""
    from memfit.workflows.sweep import predicted_hours

    with Bars("en") as progress:
        hours = predicted_hours(trials, settings, progress)
    count = f"{len(trials)} trial{'s' * (len(trials) != 1)} to run"
    if hours is None:
        return (
            f"{count}; their time is not predicted, as memfit does not know the device (device=NAME names it)"
        )
    return (
        f"{count}; their training steps are predicted to take {format_seconds(hours * 3600)} of device time "
        "in all, to which the start of each trial is added"
    )


# --- what the user sees


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Sweep], None]]:
    """Yield a function that shows how the trials are: a live table if standard error is a terminal, else a
    line when something has changed, at most every 10 s."""
    from rich.live import Live

    from memfit.cli.safe_console import SafeConsole

    screen = SafeConsole(stderr=True, highlight=False)
    if screen.is_terminal:
        with Live(console=screen, auto_refresh=False, transient=True) as live:

            def update(sweep: Sweep) -> None:
                table = _table(sweep.results)
                used = _used_text(sweep.hours, sweep.usd)
                table.caption = f"{_count_text(sweep.results)}; {used}"
                live.update(table, refresh=True)

            yield update
        return
    last = ("", time.monotonic())

    def show(sweep: Sweep) -> None:
        nonlocal last
        line = _count_text(sweep.results)
        if line != last[0] and time.monotonic() - last[1] >= _LINE_EVERY_S:
            last = (line, time.monotonic())
            print(f"memfit: {line}, {_used_text(sweep.hours, sweep.usd)}", file=sys.stderr, flush=True)

    yield show


def _count_text(results: Sequence[TrialResult]) -> str:
    counts = [
        (state, sum(r.state.value == state for r in results)) for state in ("done", "running", "failed")
    ]
    texts = ", ".join(f"{count} {state}" for state, count in counts if count or state == "done")
    return f"{len(results)} trial{'s' * (len(results) != 1)}: {texts}"


def _used_text(hours: float, usd: float | None) -> str:
    cost = "" if usd is None else f", ${usd:.4g}"
    return f"{format_seconds(hours * 3600) if hours else '0 s'} of device time{cost}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The trials of one plan, size, place and device, which differ only in their seeds."""

    plan: str
    size: str
    place: str
    device: str
    results: tuple[TrialResult, ...]

    def values(self, value: Callable[[Any], float | None]) -> list[float]:
        """Return ``value(run)`` of each run that completed, without those for which it is None."""
        runs = [r.run for r in self.results if r.run is not None and r.run.measurement.outcome.value == "ok"]
        return [v for run in runs if (v := value(run)) is not None]


def _rows(results: Sequence[TrialResult]) -> list[_Row]:
    devices: dict[tuple[str, str, str], str] = {}
    groups: dict[tuple[str, str, str], list[TrialResult]] = {}
    for result in results:
        trial = result.trial
        key = (trial.plan_name, trial.job.size or "", trial.placement.kind)
        groups.setdefault(key, []).append(result)
        devices[key] = devices.get(key) or result.device
    return [
        _Row(plan=key[0], size=key[1], place=key[2], device=devices[key], results=tuple(members))
        for key, members in groups.items()
    ]


def _table(results: Sequence[TrialResult]) -> rich.table.Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = _rows(results)
    columns = [
        "Plan",
        "Size",
        "Place",
        "Device",
        "Trials",
        "Peak",
        "Predicted",
        "Step",
        "Last loss",
        "Metric",
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, _cells(row)))
    return table


def _cells(row: _Row) -> list[str]:
    from memfit.verify.aggregate import median_step_s

    peaks = row.values(lambda run: run.measurement.peak_bytes)
    predicted = row.values(lambda run: run.predicted_peak_bytes)
    steps = row.values(lambda run: median_step_s(run.measurement))
    losses = row.values(lambda run: run.measurement.losses[-1] if run.measurement.losses else None)
    metrics = row.values(lambda run: run.measurement.metric)
    return [
        row.plan,
        row.size or "-",
        row.place,
        row.device or "-",
        _states_text(row.results),
        format_bytes(int(max(peaks))) if peaks else "-",
        format_bytes(int(max(predicted))) if predicted else "-",
        format_seconds(statistics.median(steps)) if steps else "-",
        f"{statistics.fmean(losses):.4g}" if losses else "-",
        f"{statistics.fmean(metrics):.4g}" if metrics else "-",
    ]


def _states_text(results: Sequence[TrialResult]) -> str:
    """Return how many trials are in each state, such as "3 ok, 1 out of memory, 2 running"."""
    counts: dict[str, int] = {}
    for result in results:
        counts[_state_text(result)] = counts.get(_state_text(result), 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


_OUTCOMES = {
    "ok": "ok",
    "oom": "out of memory",
    "timeout": "timed out",
    "failed": "failed",
    "interrupted": "interrupted",
}


def _state_text(result: TrialResult) -> str:
    is_over = result.state.value in ("done", "failed")
    return _OUTCOMES[result.run.measurement.outcome.value] if is_over and result.run else result.state.value


def _print(results: Sequence[TrialResult], hours: float, usd: float | None) -> None:
    console().print(_table(results))
    earlier = sum(result.before for result in results)
    known = f"; {earlier} were run by other calls" if earlier else ""
    print(f"{_count_text(results)}{known}; this call used {_used_text(hours, usd)}")
    for result in [r for r in results if r.starts > 1]:
        print(f"  {_trial_text(result)}: started {result.starts} times, as it was preempted")
    reasons = [r for r in results if r.reason]
    for result in reasons[:_MOST_REASONS]:
        print(f"  {_trial_text(result)}: {_state_text(result)}: {one_line(result.reason)}")
    if len(reasons) > _MOST_REASONS:
        print(f"  and {len(reasons) - _MOST_REASONS} more; --json lists all")
    if any(result.state.value != "done" for result in results):
        print("The same command again runs only the trials that have no result yet.")


def _trial_text(result: TrialResult) -> str:
    trial = result.trial
    size = f", size {trial.job.size}" if trial.job.size else ""
    return one_line(f"{trial.plan_name}, seed {trial.seed}{size}, {trial.placement.kind}")


def _view(
    results: Sequence[TrialResult], hours: float, usd: float | None, budget: Budget
) -> Mapping[str, Any]:
    """Return the object of --json. "trials" has one entry for each trial; "run" is null if it has reported
    none, else as of `memfit run --json`. "outcome" is that of the run, or null."""
    from memfit.cli.views import run_view

    return {
        "complete": all(result.state.value == "done" for result in results),
        "device_hours": hours,
        "usd": usd,
        "budget": {"device_hours": budget.hours, "usd": budget.usd},
        "trials": [
            {
                "trial_id": result.trial.trial_id,
                "plan_name": result.trial.plan_name,
                "seed": result.trial.seed,
                "size": result.trial.job.size,
                "executor": result.trial.placement.kind,
                "state": result.state.value,
                "before": result.before,
                "outcome": result.run.measurement.outcome.value if result.run else None,
                "reason": result.reason,
                "device": result.device,
                "run_s": result.run_s,
                "starts": result.starts,
                "run": run_view(result.run) if result.run else None,
            }
            for result in results
        ],
    }
