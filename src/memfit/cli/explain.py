"""``memfit explain``: show what uses the memory of a plan, or why two plans differ, before running them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import (
    GoalOptions,
    HereOptions,
    JobOptions,
    JsonOptions,
    LanguageOptions,
    MachineOptions,
    WhichOptions,
)
from memfit.cli.output import console, emit, language
from memfit.cli.progress import Bars
from memfit.cli.request import begin_answer, plan_file, recommended_plan, request, writable
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.workload import Workload

if TYPE_CHECKING:
    import memfit.report.explain


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    """The plans to compare, and the files to write."""

    plans: Annotated[
        list[str] | None, typer.Argument(metavar="[A.yaml B.yaml]", help="Why do these two plans differ?")
    ] = None
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A treemap and a timeline, in one HTML file.")
    ] = None
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE.pickle", help="For PyTorch's memory viewer.")
    ] = None
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A Chrome trace, for ui.perfetto.dev.")
    ] = None
    lines: Annotated[bool, typer.Option(help="Find the line of your code that made each allocation.")] = True


def explain(
    job: JobOptions,
    more: ExplainOptions,
    which: WhichOptions,
    goal: GoalOptions,
    on: MachineOptions,
    here: HereOptions,
    lang: LanguageOptions,
    output: JsonOptions,
) -> None:
    """Show what uses the memory of a plan, or why two plans differ, before running."""
    words = language(lang.lang)
    job, files = _plan_files(job, more)
    plans = _plans(files, more, which)
    asked = request(job, goal, here, on.on)
    workload = begin_answer(asked, lang=words, quiet=output.json)
    with Bars(words) as progress:
        from memfit.workflows import proof_of_concept

        found = proof_of_concept.anatomy(
            asked, plans or [recommended_plan(asked, progress)], progress, lines=more.lines
        )
    if len(found) == 1:
        _one(found[0], more, workload, lang=words, job=job.spec, as_json=output.json)
    else:
        _two(found[0], found[1], workload, lang=words, as_json=output.json)


def _plan_files(job: JobOptions, more: ExplainOptions) -> tuple[JobOptions, list[str]]:
    """Separate the job from the plan files: ``explain A.yaml B.yaml`` names no job."""
    files = list(more.plans or ())
    if job.job is not None and job.job.endswith((".yaml", ".yml")):
        return dataclasses.replace(job, job=None), [job.job, *files]
    return job, files


def _plans(files: list[str], more: ExplainOptions, which: WhichOptions) -> list[Plan]:
    """Return the plans to explain; empty for the recommended plan. Raises UserError for contradictory
    options."""
    written = [path for path in (more.html, more.snapshot, more.perfetto) if path]
    for path in written:
        writable(path)
    if len(files) > 2:
        raise UserError(f"{len(files)} plan files", allowed="one, or two to compare")
    if files and (which.plan or which.recommended):
        raise UserError("plan files are given twice", hint="leave out --plan and --recommended")
    if len(files) == 2 and written:
        raise UserError(
            "--html, --snapshot and --perfetto show one plan", hint="leave them out to compare two"
        )
    chosen = [WhichOptions(plan=Path(file)) for file in files] or [which]
    return [plan for plan in map(plan_file, chosen) if plan is not None]


def _one(
    found: memfit.report.explain.Explained,
    more: ExplainOptions,
    workload: Workload,
    *,
    lang: str,
    job: str,
    as_json: bool,
) -> None:
    from memfit.report import explain_files, explain_html
    from memfit.report.explain import contributors
    from memfit.report.files import write_whole

    wanted: tuple[tuple[Path | None, Callable[[], bytes]], ...] = (
        (more.html, lambda: explain_html.render_explained(found, job=job, lang=lang).encode()),
        (more.snapshot, lambda: explain_files.snapshot(found)),
        (more.perfetto, lambda: explain_files.chrome_trace(found)),
    )
    # All files are rendered before the first is written.
    for path, data in [(path, make()) for path, make in wanted if path]:
        write_whole(path, data)
    if as_json:
        from memfit.cli.views import estimate_view

        emit({"workload": workload, **estimate_view(found.estimate), "contributors": contributors(found)})
    else:
        from memfit.report.explain_terminal import print_explained

        print_explained(found, console=console(), lang=lang)


def _two(
    first: memfit.report.explain.Explained,
    second: memfit.report.explain.Explained,
    workload: Workload,
    *,
    lang: str,
    as_json: bool,
) -> None:
    from memfit.report.explain import difference

    found = difference(first, second)
    if as_json:
        emit({"workload": workload, **_difference_view(found, lang)})
    else:
        from memfit.report.explain_terminal import print_difference

        print_difference(found, console=console(), lang=lang)


def _difference_view(found: memfit.report.explain.PlanDifference, lang: str) -> dict[str, Any]:
    from memfit.cli.views import estimate_view
    from memfit.report.quantities import sentence_text
    from memfit.report.words import load_words
    from memfit.types.serialization import to_plain

    words = load_words(lang)
    return {
        "first": estimate_view(found.first),
        "second": estimate_view(found.second),
        "change_bytes": found.change_bytes,
        "by_category_bytes": found.by_category_bytes,
        "by_phase_bytes": found.by_phase_bytes,
        "movers": [{**to_plain(m), "change_bytes": m.change_bytes} for m in found.movers],
        "sentences": [sentence_text(s, words) for s in found.sentences],
    }
