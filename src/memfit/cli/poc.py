"""``memfit poc``: predict, search, train, verify and report in one command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.options import (
    MOST,
    DeviceOptions,
    ExcludedTechniques,
    JobOptions,
    OutputOptions,
    RuntimeOptions,
    SearchOptions,
    StoreOptions,
)
from memfit.cli.output import check_language, console, emit, refuse_options
from memfit.cli.progress import Bars
from memfit.cli.request import best_so_far, device_here, excluded_techniques, request, writable
from memfit.cli.sweep import agreed_budget, parse_budget
from memfit.types.plan import Bounds
from memfit.types.result import OutcomeKind, Poc

if TYPE_CHECKING:
    import memfit.workflows.proof_of_concept


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PocOptions:
    """The numbers of seeds and processes of the proof of concept, techniques not to use, where its runs are
    made and what they may use, and the file of its report."""

    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Number of seeds: 0, 1 and so on. Default: 3. With each of them, one run trains without "
            "any technique and one with the recommended plan; the verdict, whether their results are "
            "equivalent, is based on these pairs of runs. With fewer than 3 pairs, results can only be "
            "shown to be equivalent if the plan must not change them at all, as with --accuracy exact. All "
            "further runs of a proof of concept have seed 0. Those that show what single techniques do take "
            "about half a minute for each seed, and the repeated run of the recommended plan half a minute; "
            "if all their steps take longer, they are trained for fewer, and show no accuracy.",
        ),
    ] = 3
    nproc: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST,
            help="Train on N processes of this machine, which share the batch; it must have at least N "
            "samples. On GPUs, each process has one: N is at most their number. Default: 1.",
        ),
    ] = 1
    without: ExcludedTechniques = None
    executor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="Make the runs side by side, within --budget, with an executor of `memfit sweep`: "
            "local:parallel=2, or slurm:partition=a100, whose nodes must be like this machine, for which "
            "the plan is searched. A run that an earlier proof of concept with --executor made, finished "
            "or not, is not made again if it is the same, is in --store, and completed or ran out of "
            "memory under the cap. Default: one run after the other, all of them made anew.",
        ),
    ] = None
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TIME|NUSD",
            help="With --executor, otherwise refused: the most that the runs may use: device hours as a "
            "time, such as 90m or 24h, or US dollars such as 20USD, which are refused if the price of a "
            "device is unknown. Both can be given. A device hour is one device, or one process on a CPU, "
            "for one hour. When the budget is used up, running runs are ended and the command fails; the "
            "same command then makes those that are left. Default: asked for on a terminal after the "
            "search; elsewhere and with --json, the command then fails, and says how long the runs are "
            "predicted to take.",
        ),
    ] = None
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
    search_options: SearchOptions,
    options: PocOptions,
    runtime: RuntimeOptions,
    device: DeviceOptions,
    store: StoreOptions,
    output: OutputOptions,
) -> None:
    """Predict, search, train, verify and report on this machine.

    Searches for a plan, trains without any technique and with this plan for each of --seeds seeds, tests
    whether the results are equivalent, and writes an HTML report. Exits with code 1 if no run of the
    recommended plan completes, and with 3 if no plan fits."""
    language_code = check_language(output.lang)
    path = writable(options.out) if options.out is not None else None
    if options.executor is None:
        refuse_options({"--budget": options.budget}, "needs --executor")
    side_by_side = _side_by_side(options, may_ask=not output.json)
    job_request = request(
        job,
        search_options,
        runtime,
        device_here(device),
        ranks=options.nproc,
        bounds=Bounds(without=excluded_techniques(options.without)),
        has_nproc=True,
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
            side_by_side=side_by_side,
        )
    _print(proof, lang=language_code, as_json=output.json)
    if not any(r.measurement.outcome is OutcomeKind.OK for r in proof.runs if r.spec.role == "recommended"):
        raise typer.Exit(1)


def _side_by_side(
    options: PocOptions, *, may_ask: bool
) -> memfit.workflows.proof_of_concept.SideBySide | None:
    """Return where runs are made side by side, and the function that agrees on their budget; None without
    --executor. ``may_ask``: whether that function may ask on the terminal. Raises UserError for a wrong
    --executor or --budget."""
    if options.executor is None:
        return None
    from memfit.launch.executors import parse_executor
    from memfit.workflows.proof_of_concept import SideBySide
    from memfit.workflows.sweep import Placement, RunSettings

    name, settings = parse_executor(options.executor)
    budget = parse_budget(options.budget or [])
    return SideBySide(
        placement=Placement(executor=name, settings=settings),
        agree=lambda trials: agreed_budget(budget, trials, RunSettings(), may_ask=may_ask),
    )


def _print(proof: Poc, *, lang: str, as_json: bool) -> None:
    if as_json:
        from memfit.cli.views import poc_view

        emit(poc_view(proof))
    else:
        from memfit.report.terminal import print_poc

        print_poc(proof, lang=lang, console=console())
