"""``memfit report``: write the HTML report of a proof of concept in the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import OutputOptions, StoreOptions
from memfit.cli.output import check_language, emit
from memfit.cli.request import writable
from memfit.types.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """The proof of concept, the watched training, the file with the user's figures, and the HTML file to
    write."""

    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file to write, overwritten if it exists. Default: memfit-ID.LANG.html in the current "
            "folder, with the ID of the proof of concept and the value of --lang; with --watch FILE.jsonl "
            "and without --poc, FILE.LANG.html.",
        ),
    ] = None
    poc: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="ID of the proof of concept in the store to report on; one that was run here, not a record "
            "from others. Default: the one begun last; with --watch, the report is of the watched "
            "training alone.",
        ),
    ] = None
    case: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Case file: a TOML file with your own figures, such as prices (`memfit decide --template` "
            "prints one to fill in). It is stored with the proof of concept, and later commands for this "
            "proof of concept use it if no other is given. Not with --watch alone. Default: the case file "
            "stored last with it, or no figures of your own if there is none.",
        ),
    ] = None
    watch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Record of a training that `memfit watch` or memfit.watch wrote, the file of rank 0; those "
            "of other ranks beside it are read as well. The report shows memory against its prediction, "
            "free memory, step time, loss and alarms, per step and rank. With --poc: as a chapter of the "
            "report of that proof of concept. Without: as a page of its own, by default FILE.LANG.html in "
            "the current folder. Example: memfit report --watch run.jsonl.",
        ),
    ] = None


def report(options: ReportOptions, store: StoreOptions, output: OutputOptions) -> None:
    """Write the HTML report of a proof of concept in the store, of a watched training, or of both. The report
    of a proof of concept that was interrupted shows the runs that ended."""
    language_code = check_language(output.lang)
    path = writable(options.out) if options.out is not None else None
    quiet_libraries()
    watch = None
    if options.watch is not None:
        from memfit.monitoring.record import read_records

        watch = read_records(options.watch)
    if options.watch is not None and watch is not None and options.poc is None:
        if options.case is not None:
            raise UserError(
                "--case is for the report of a proof of concept, but --watch without --poc reports on a "
                "watched training alone",
                allowed="--poc ID with --watch and --case",
            )
        from memfit.report.html import write_watch_html

        own_path = path or Path(f"{options.watch.stem}.{language_code}.html")
        report_path = write_watch_html(watch, own_path, lang=language_code)
    else:
        from memfit.store import Store
        from memfit.workflows import proof_of_concept

        report_path = proof_of_concept.report(
            Store(store.store),
            poc_id=options.poc,
            case=options.case,
            path=path,
            lang=language_code,
            watch=watch,
        )
    if output.json:
        emit({"report": str(report_path)})
    else:
        print(report_path)
