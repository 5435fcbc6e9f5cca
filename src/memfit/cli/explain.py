"""``memfit explain``: show what uses the memory of a plan, or why two plans differ, before running them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import (
    GoalOptions,
    JobOptions,
    JsonOptions,
    LanguageOptions,
    MachineOptions,
    PlanOptions,
    RuntimeOptions,
)
from memfit.cli.output import check_language, console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import plan_file, print_workload_of, recommended_plan, request, writable
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.workload import Workload

if TYPE_CHECKING:
    import memfit.report.explain


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    """The files of the plan to explain or of the two plans to compare, the files to write, and whether to
    find the line of the user's code that made each allocation."""

    plans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[A.yaml B.yaml]",
            help="Plan file (YAML) to explain, or two plan files to show why their memory differs. The first "
            "argument of the command is one of them, instead of JOB, if it ends in .yaml or .yml. Default: "
            "the plan of --plan or --recommended, otherwise plain training. Not with --plan or "
            "--recommended.",
        ),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write an HTML page with a treemap and a timeline of the memory of a training step "
            "with the plan to this file, which is overwritten if it exists. Refused with two plan "
            "files.",
        ),
    ] = None
    snapshot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pickle",
            help="Also write the memory of a training step with the plan to this file, as a snapshot for "
            "PyTorch's memory viewer. The file is overwritten if it exists. Refused with two plan "
            "files.",
        ),
    ] = None
    perfetto: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Also write the memory of a training step with the plan to this file, as a Chrome trace "
            "for ui.perfetto.dev. The file is overwritten if it exists. Refused with two plan files.",
        ),
    ] = None
    lines: Annotated[
        bool,
        typer.Option(
            help="--lines (the default): also show the line of your code that made each allocation of "
            "memory; --no-lines: do not look for these lines. No effect with two plan files."
        ),
    ] = True


def explain(
    job: JobOptions,
    options: ExplainOptions,
    plan_options: PlanOptions,
    goal: GoalOptions,
    on: MachineOptions,
    runtime: RuntimeOptions,
    lang: LanguageOptions,
    output: JsonOptions,
) -> None:
    """Show what uses the predicted memory of a plan, or why the memory of two plans differs, without running
    them."""
    language_code = check_language(lang.lang)
    job, files = _plan_files(job, options)
    plans = _plans(files, options, plan_options)
    job_request = request(job, goal, runtime, on.on)
    workload = print_workload_of(job_request, lang=language_code, quiet=output.json)
    with Bars(language_code) as progress:
        from memfit.workflows import proof_of_concept

        explanations = proof_of_concept.anatomy(
            job_request, plans or [recommended_plan(job_request, progress)], progress, lines=options.lines
        )
    if len(explanations) == 1:
        _one(explanations[0], options, workload, lang=language_code, job=job.spec, as_json=output.json)
    else:
        _two(explanations[0], explanations[1], workload, lang=language_code, as_json=output.json)


def _plan_files(job: JobOptions, options: ExplainOptions) -> tuple[JobOptions, list[str]]:
    """Return (the job options, the paths of the plan files on the command line, in order). The first argument
    of the command is read as the job. If it ends in .yaml or .yml, it is a plan file instead, and the job is
    the default: ``explain A.yaml B.yaml`` compares two plans of the default job."""
    files = list(options.plans or ())
    if job.job is not None and job.job.endswith((".yaml", ".yml")):
        return dataclasses.replace(job, job=None), [job.job, *files]
    return job, files


def _plans(files: list[str], options: ExplainOptions, plan_options: PlanOptions) -> list[Plan]:
    """Return the plans to explain: those in ``files``, in order; without files that of --plan, or plain
    training if there is no --plan. Return an empty list for --recommended, whose plan must be searched.
    Raises UserError for more than two files, an invalid plan file, files or --plan together with
    --recommended, files together with --plan, an option that writes a file together with two plan files, and
    a file that cannot be written."""
    output_paths = [path for path in (options.html, options.snapshot, options.perfetto) if path]
    for path in output_paths:
        writable(path)
    if len(files) > 2:
        raise UserError(
            f"{len(files)} plan files are given",
            allowed="one to explain, two to compare, or none: then --plan, --recommended or plain training",
        )
    if files and (plan_options.plan or plan_options.recommended):
        raise UserError(
            "the plan is given both as a file and by --plan or --recommended",
            hint="leave out the file, or leave out --plan and --recommended",
        )
    if len(files) == 2 and output_paths:
        raise UserError(
            "--html, --snapshot and --perfetto show one plan, but two plan files are given",
            hint="leave these three options out, or give one plan file",
        )
    selections = [PlanOptions(plan=Path(file)) for file in files] or [plan_options]
    return [plan for plan in map(plan_file, selections) if plan is not None]


def _one(
    explanation: memfit.report.explain.TracedEstimate,
    options: ExplainOptions,
    workload: Workload,
    *,
    lang: str,
    job: str,
    as_json: bool,
) -> None:
    from memfit.report import explain_files, explain_html
    from memfit.report.explain import contributors
    from memfit.report.files import write_whole

    outputs: tuple[tuple[Path | None, Callable[[], bytes]], ...] = (
        (options.html, lambda: explain_html.render_explained(explanation, job=job, lang=lang).encode()),
        (options.snapshot, lambda: explain_files.snapshot(explanation)),
        (options.perfetto, lambda: explain_files.chrome_trace(explanation)),
    )
    # All files are rendered before the first is written.
    for path, data in [(path, render()) for path, render in outputs if path]:
        write_whole(path, data)
    if as_json:
        from memfit.cli.views import estimate_view

        emit(
            {
                "workload": workload,
                **estimate_view(explanation.estimate),
                "contributors": contributors(explanation),
            }
        )
    else:
        from memfit.report.explain_terminal import print_explained

        print_explained(explanation, console=console(), lang=lang)


def _two(
    first: memfit.report.explain.TracedEstimate,
    second: memfit.report.explain.TracedEstimate,
    workload: Workload,
    *,
    lang: str,
    as_json: bool,
) -> None:
    from memfit.report.explain import difference

    plan_difference = difference(first, second)
    if as_json:
        emit({"workload": workload, **_difference_view(plan_difference, lang)})
    else:
        from memfit.report.explain_terminal import print_difference

        print_difference(plan_difference, console=console(), lang=lang)


def _difference_view(plan_difference: memfit.report.explain.PlanDifference, lang: str) -> dict[str, Any]:
    from memfit.cli.views import estimate_view
    from memfit.report.quantities import sentence_text
    from memfit.report.words import load_words
    from memfit.types.serialization import to_plain

    words = load_words(lang)
    return {
        "first": estimate_view(plan_difference.first),
        "second": estimate_view(plan_difference.second),
        "change_bytes": plan_difference.change_bytes,
        "by_category_bytes": plan_difference.by_category_bytes,
        "by_phase_bytes": plan_difference.by_phase_bytes,
        "movers": [{**to_plain(m), "change_bytes": m.change_bytes} for m in plan_difference.movers],
        "sentences": [sentence_text(s, words) for s in plan_difference.sentences],
    }
