"""``memfit report``: write the HTML report of a proof of concept in the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, LanguageOptions, StoreOptions
from memfit.cli.output import check_language, emit
from memfit.cli.request import writable


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """The proof of concept, the file with the user's figures, and the HTML file to write."""

    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file to write, overwritten if it exists. Default: memfit-ID.LANG.html in the current "
            "folder, with the ID of the proof of concept and the value of --lang.",
        ),
    ] = None
    poc: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="ID of the proof of concept in the store to report on; one that was run here, not a record "
            "from others. Default: the one begun last.",
        ),
    ] = None
    case: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Case file: a TOML file with your own figures, such as prices (`memfit decide --template` "
            "prints one to fill in). It is stored with the proof of concept, and later commands for this "
            "proof of concept use it if no other is given. Default: the case file stored last with it, or no "
            "figures of your own if there is none.",
        ),
    ] = None


def report(options: ReportOptions, store: StoreOptions, lang: LanguageOptions, output: JsonOptions) -> None:
    """Write the HTML report of a proof of concept in the store. The report of one that was interrupted shows
    the runs that ended."""
    language_code = check_language(lang.lang)
    path = writable(options.out) if options.out is not None else None
    quiet_libraries()
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    report_path = proof_of_concept.report(
        Store(store.store), poc_id=options.poc, case=options.case, path=path, lang=language_code
    )
    if output.json:
        emit({"report": str(report_path)})
    else:
        print(report_path)
