"""``memfit estimate JOB``: show what uses the memory of a plan, or why two plans differ, before they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import (
    JobOptions,
    MachineOptions,
    PlanOptions,
    RuntimeOptions,
    SearchOptions,
)
from memfit.cli.output import console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import plan_file, print_workload_of, recommended_plan, request, writable
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.workload import Workload

if TYPE_CHECKING:
    import memfit.planner.request
    import memfit.report.explain


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceFileOptions:
    """The files to write, None for none, and whether to find the line of the user's code that made each
    allocation."""

    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write an HTML page with a treemap and a timeline of the memory of a training step to "
            "this file, which is overwritten if it exists. Not with two plan files, --engines, --lengths or "
            "--precision.",
        ),
    ] = None
    snapshot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pickle",
            help="Also write the memory of a training step to this file, as a snapshot for PyTorch's "
            "memory viewer (pytorch.org/memory_viz). The file is overwritten if it exists. Not with two "
            "plan files, --engines, --lengths or --precision.",
        ),
    ] = None
    perfetto: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Also write the memory of a training step to this file, as a Chrome trace for "
            "ui.perfetto.dev. The file is overwritten if it exists. Not with two plan files, --engines, "
            "--lengths or --precision.",
        ),
    ] = None
    lines: Annotated[
        bool,
        typer.Option(
            help="--lines (the default): also show the line of your code that made each allocation of "
            "memory; --no-lines: do not look for these lines. No effect with two plan files and with a "
            "COMMAND. --no-lines: not with --engines, --lengths or --precision."
        ),
    ] = True

    @property
    def paths(self) -> list[Path]:
        """The paths of the files to write."""
        return [path for path in (self.html, self.snapshot, self.perfetto) if path is not None]


def estimate_job(  # noqa: PLR0913
    job: JobOptions,
    plan_paths: Sequence[str],
    files: TraceFileOptions,
    plan_options: PlanOptions,
    search_options: SearchOptions,
    on: MachineOptions,
    runtime: RuntimeOptions,
    *,
    lang: str,
    as_json: bool,
) -> None:
    """Print what uses the predicted memory of one plan, or why the memory of two plans differs, and write
    ``files``. ``plan_paths``: the plan files of the command line. Raises UserError as `_plans` and `request`
    do and for a job or a plan that cannot be predicted; with --recommended as `recommended_plan` does."""
    plans = _plans(plan_paths, files, plan_options)
    job_request = request(job, search_options, runtime, on.on, plans=plans)
    workload = print_workload_of(job_request, lang=lang, quiet=as_json)
    with Bars(lang) as progress:
        from memfit.workflows import proof_of_concept

        explanations = proof_of_concept.anatomy(
            job_request, plans or [recommended_plan(job_request, progress)], progress, lines=files.lines
        )
    if len(explanations) == 1:
        _print_explanation(explanations[0], files, workload, job_request, lang=lang, as_json=as_json)
    else:
        _print_difference(explanations[0], explanations[1], workload, lang=lang, as_json=as_json)


def _plans(paths: Sequence[str], files: TraceFileOptions, plan_options: PlanOptions) -> list[Plan]:
    """Return the plans to explain: those in the files ``paths``, in order; without such files that of --plan,
    or plain training if there is no --plan. Return an empty list for --recommended, whose plan must be
    searched. Raises UserError for more than two plan files, an invalid plan file, plan files or --plan
    together with --recommended, plan files together with --plan, an option that writes a file together with
    two plan files, and a file that cannot be written."""
    for path in files.paths:
        writable(path)
    if len(paths) > 2:
        raise UserError(
            f"{len(paths)} plan files are given",
            allowed="one to explain, two to compare, or none: then --plan, --recommended or plain training",
        )
    if paths and (plan_options.plan or plan_options.recommended):
        raise UserError(
            "the plan is given both as a file and by --plan or --recommended",
            hint="leave out the file, or leave out --plan and --recommended",
        )
    if len(paths) == 2 and files.paths:
        raise UserError(
            "--html, --snapshot and --perfetto show one plan, but two plan files are given",
            hint="leave these three options out, or give one plan file",
        )
    selections = [PlanOptions(plan=Path(path)) for path in paths] or [plan_options]
    return [plan for plan in map(plan_file, selections) if plan is not None]


def write_trace_files(
    explanation: memfit.report.explain.TracedEstimate, files: TraceFileOptions, *, lang: str, job: str
) -> None:
    """Write the memory of the traced step to ``files``. ``job``: what the page calls the training. All files
    are rendered before the first is written. Raises UserError if one cannot be written."""
    from memfit.files.replace import write_whole
    from memfit.report import explain_files, explain_html

    outputs: tuple[tuple[Path | None, Callable[[], bytes]], ...] = (
        (files.html, lambda: explain_html.render_explained(explanation, job=job, lang=lang).encode()),
        (files.snapshot, lambda: explain_files.snapshot(explanation)),
        (files.perfetto, lambda: explain_files.chrome_trace(explanation)),
    )
    for path, data in [(path, render()) for path, render in outputs if path]:
        write_whole(path, data)


def _print_explanation(
    explanation: memfit.report.explain.TracedEstimate,
    files: TraceFileOptions,
    workload: Workload,
    job_request: memfit.planner.request.Request,
    *,
    lang: str,
    as_json: bool,
) -> None:
    from memfit.planner.capacity import fits_under, needed_bytes
    from memfit.report.explain import contributors

    write_trace_files(explanation, files, lang=lang, job=job_request.job_ref.spec)
    machine = job_request.machine
    cap_bytes = job_request.cap_bytes or int(machine.device.memory_bytes.value)
    verdict: dict[str, Any] = {
        "needed_bytes": needed_bytes(explanation.estimate, machine),
        "cap_bytes": cap_bytes,
        "fits": fits_under(cap_bytes, machine)(explanation.estimate),
    }
    if job_request.cap_bytes is not None:  # its chance is for all memory of the device
        estimate = dataclasses.replace(explanation.estimate, oom_probability=None)
        explanation = dataclasses.replace(explanation, estimate=estimate)
    if as_json:
        from memfit.cli.views import estimate_view

        emit(
            {
                "workload": workload,
                **estimate_view(explanation.estimate),
                **verdict,
                "contributors": contributors(explanation),
            }
        )
    else:
        from memfit.report.explain_terminal import print_explained
        from memfit.report.terminal import print_verdict
        from memfit.report.words import load_words

        print_verdict(explanation.estimate, **verdict, console=console(), words=load_words(lang))
        print_explained(explanation, console=console(), lang=lang)


def _print_difference(
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
