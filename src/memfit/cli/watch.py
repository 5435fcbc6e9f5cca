"""``memfit watch``: watch a training that a command runs, or show what one has recorded."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from memfit.cli.options import JsonOptions
from memfit.cli.output import console, emit
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import memfit.monitoring.summary

_PERIOD_S: Final = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """The record to show or the command to watch, and where and how it is watched."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE | -- COMMAND...",
            help="FILE.jsonl: show this record of a training, while it runs or afterwards; also a file with "
            "another name that cannot be executed. -- COMMAND: run this command, as you would type it, and "
            "record the steps of each Python process in it that trains with torch, for example: -- torchrun "
            "--nproc-per-node 8 train.py",
        ),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Record to which the steps of COMMAND are appended; its name must have a suffix. Ranks "
            "other than 0 write to files beside it, such as run.1.jsonl. Default: run.jsonl. Refused if a "
            "record is shown.",
        ),
    ] = None
    prediction: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Predicted memory with which COMMAND is compared: the output of `memfit estimate --json -- "
            'COMMAND` in a file, or an object such as {"allocated_bytes": 8000000000}. Default: none. '
            "Refused if a record is shown.",
        ),
    ] = None
    restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Start COMMAND again, at most N times, when it ran out of memory and its "
            "memfit.watch(on_oom=memfit.next_plan(...)) has written a safer plan. Default: 0, never. "
            "Another number is refused if a record is shown.",
        ),
    ] = 0
    limits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Thresholds of the alarms of COMMAND: a TOML file such as `headroom_ratio = 0.1`, or a "
            "plan file (.yaml, .yml) with them under the key watch. Default: those of docs/watch.md. "
            "Refused if a record is shown.",
        ),
    ] = None


def watch(options: WatchOptions, output: JsonOptions) -> None:
    """Watch a training: memory, time, loss and alarms of each step and rank.

    With a command, runs it unchanged and records the training in it. With a file, shows a record, live in a
    terminal. The exit code is that of the command, or 128 plus the number of the signal that ended it.

    Example: memfit watch -- python train.py --epochs 3
    """
    words = options.words or []
    if not words:
        raise UserError(
            "memfit watch has nothing to watch",
            allowed="a record, as in `memfit watch run.jsonl`, or a command, as in `memfit watch -- python "
            "train.py`",
        )
    if _is_record(words):
        unused = [n for n in ("file", "prediction", "limits", "restarts") if getattr(options, n)]
        if unused:
            raise UserError(
                f"--{unused[0]} is for a command, but {words[0]} is a record",
                allowed="with a record, only --json",
            )
        _show(words[0], as_json=output.json)
    else:
        if output.json:
            raise UserError(
                "--json is for a record, but a command is given",
                hint="run the command, then `memfit watch --json run.jsonl`",
            )
        _run(words, options)


def _is_record(words: list[str]) -> bool:
    path = Path(words[0])
    return len(words) == 1 and (path.suffix == ".jsonl" or (path.is_file() and not os.access(path, os.X_OK)))


def _show(path: str, *, as_json: bool) -> None:
    from memfit.monitoring.record import RecordReader, read_records
    from memfit.monitoring.summary import summarize
    from memfit.report.watch_terminal import print_watch, watch_text

    summary = summarize(read_records(path))
    screen = console()
    if as_json:
        emit(summary)
    elif summary.is_over or not screen.is_terminal:
        print_watch(summary, console=screen)
    else:
        from rich.live import Live

        reader = RecordReader(path)
        try:
            with Live(watch_text(summary), console=screen, auto_refresh=False) as live:
                while not summary.is_over:
                    time.sleep(_PERIOD_S)
                    summary = summarize(reader.update())
                    live.update(watch_text(summary), refresh=True)
        except KeyboardInterrupt:  # the usual way to leave a training that goes on
            pass


def _run(command: list[str], options: WatchOptions) -> None:
    from memfit.monitoring.command import run_watched
    from memfit.monitoring.limits import limits_of
    from memfit.monitoring.prediction import predicted_intervals
    from memfit.monitoring.record import read_records
    from memfit.monitoring.summary import summarize

    file = options.file or Path("run.jsonl")
    if not file.suffix or file.is_dir():
        raise UserError(
            f"--file {file} is not a file name with a suffix, or is a folder",
            allowed="a name with a suffix, such as run.jsonl",
        )
    prediction, limits = predicted_intervals(options.prediction), limits_of(options.limits)
    for restart in range(options.restarts + 1):
        end = run_watched(command, file, prediction=prediction, limits=dataclasses.asdict(limits))
        recoveries = [r.end.recovery for r in read_records(file).ranks if r.end and r.end.recovery]
        if not end.code or not recoveries or restart == options.restarts:
            break
        print(
            f"memfit: out of memory; start {restart + 1} of {options.restarts} with {recoveries[0]}",
            file=sys.stderr,
        )
    print(f"memfit: {_summary_line(summarize(read_records(file)), file)}", file=sys.stderr)
    if end.code:
        from memfit.cli.autopsy import in_one_line
        from memfit.monitoring.autopsy import diagnose_record

        record = read_records(file)
        diagnosis = diagnose_record(record)
        if diagnosis.is_out_of_memory or end.is_killed or record.lost_ranks:
            print(f"memfit: why it ended: {in_one_line(diagnosis)}", file=sys.stderr)
        raise typer.Exit(end.code if end.code > 0 else 128 - end.code)


def _summary_line(summary: memfit.monitoring.summary.WatchSummary, file: Path) -> str:
    from memfit.types.units import format_bytes

    trained = [r for r in summary.ranks if r.recorded_steps]
    if not trained:
        return f"no process of the command trained with torch; {file} has the end of the command only"
    name = (
        "peak_allocated_bytes"
        if any("peak_allocated_bytes" in r.peaks for r in trained)
        else "peak_host_bytes"
    )
    what = "of tensors" if name == "peak_allocated_bytes" else "of resident memory"
    peak = max(r.peaks.get(name, 0) for r in trained)
    count, kinds = len(summary.alarms), sorted({a.kind for a in summary.alarms})
    return (
        f"{max(r.recorded_steps for r in trained)} steps of {len(trained)} "
        f"{'rank' if len(trained) == 1 else 'ranks'} recorded in {file}; peak {what} {format_bytes(peak)}; "
        f"{count} {'alarm' if count == 1 else 'alarms'}{': ' if kinds else ''}{', '.join(kinds)}"
    )
