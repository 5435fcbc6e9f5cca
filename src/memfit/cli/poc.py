"""``memfit poc``: predict, search, train, verify and report in one command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.options import (
    MOST,
    DeviceOptions,
    ExcludedTechniques,
    GoalOptions,
    JobOptions,
    OutputOptions,
    RuntimeOptions,
    StoreOptions,
)
from memfit.cli.output import check_language, console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import best_so_far, device_here, excluded_techniques, request, writable
from memfit.types.plan import Bounds
from memfit.types.result import OutcomeKind, Poc


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PocOptions:
    """The numbers of seeds and processes of the proof of concept, techniques not to use, and the file of its
    report."""

    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Number of seeds: 0, 1 and so on; by default 3. With each of them, plain training and the "
            "recommended plan are trained; the verdict, whether their results are equivalent, is based on "
            "these pairs of runs. With fewer than 3 pairs, results can only be shown to be equivalent if "
            "the plan must not change them at all, as with --accuracy exact.",
        ),
    ] = 3
    nproc: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST,
            help="Train on N processes of this machine, which share the batch; it must have at least N "
            "samples. Default: 1.",
        ),
    ] = 1
    without: ExcludedTechniques = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for the HTML report, overwritten if it exists. Default: reports/ID.LANG.html in the "
            "folder of the store, with the ID of the proof of concept and the value of --lang.",
        ),
    ] = None


def poc(
    job: JobOptions,
    goal: GoalOptions,
    options: PocOptions,
    runtime: RuntimeOptions,
    device: DeviceOptions,
    store: StoreOptions,
    output: OutputOptions,
) -> None:
    """Predict, search, train, verify and report on this machine.

    Searches a plan, trains plain training and this plan with each of --seeds seeds, tests whether their
    results are equivalent, and writes an HTML report. Exits with code 1 if no run of the recommended plan
    succeeds."""
    language_code = check_language(output.lang)
    path = writable(options.out) if options.out is not None else None
    job_request = request(
        job,
        goal,
        runtime,
        device_here(device),
        ranks=options.nproc,
        bounds=Bounds(without=excluded_techniques(options.without)),
    )
    from memfit.store import Store

    records = Store(store.store)
    with best_so_far(lang=language_code, as_json=output.json), Bars(language_code) as progress:
        from memfit.workflows import proof_of_concept

        proof = proof_of_concept.poc(
            job_request,
            store=records,
            seeds=options.seeds,
            steps=job.steps,
            report_path=path,
            lang=language_code,
            command=shlex.join(["memfit", *sys.argv[1:]]),
            progress=progress,
        )
    _tell(proof, lang=language_code, as_json=output.json)
    if not any(r.measurement.outcome is OutcomeKind.OK for r in proof.runs if r.spec.role == "recommended"):
        raise typer.Exit(1)


def _tell(proof: Poc, *, lang: str, as_json: bool) -> None:
    if as_json:
        from memfit.cli.views import poc_view

        emit(poc_view(proof))
    else:
        from memfit.report.terminal import print_poc

        print_poc(proof, lang=lang, console=console())
