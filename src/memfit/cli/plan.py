"""``memfit plan``: the recommended plan and its rivals, with reasons; trains nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.options import (
    GoalOptions,
    HereOptions,
    JobOptions,
    JsonOptions,
    LanguageOptions,
    MachineOptions,
)
from memfit.cli.output import console, emit, language
from memfit.cli.progress import Bars
from memfit.cli.request import request, writable
from memfit.types.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """On how many processes, and where the plan is written."""

    nproc: Annotated[
        int, typer.Option(metavar="N", min=1, help="Plan for N processes that share the batch.")
    ] = 1
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Write the recommended plan here, to read and edit; with --from, the plan read.",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FromOptions:
    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A set-up you have, of DeepSpeed, Accelerate, Trainer, Megatron-LM or torchtitan: predict "
            "and lint it, and tell what would be better. May be given several times.",
        ),
    ] = None


def plan(
    job: JobOptions, goal: GoalOptions, on: MachineOptions, here: HereOptions, yours: FromOptions,
    save: SaveOptions, lang: LanguageOptions, output: JsonOptions,
) -> None:  # fmt: skip
    """Recommend a plan that fits the memory; train nothing.

    The recommended plan and its rivals, each technique with what it saves and costs, and why others
    were left out.
    """
    words = language(lang.lang)
    if save.save is not None:
        writable(save.save, overwrite=save.force)
    if yours.given:
        from memfit.cli.given import plan_given

        carried = plan_given(yours.given, job, goal, here, on.on, lang=words, as_json=output.json)
        if save.save is not None:
            read_from = ", ".join(str(p) for p in yours.given)
            write_plan(save.save, carried, note=f"for {job.job}, read from {read_from}")
        return
    asked = request(job, goal, here, on.on, ranks=save.nproc)
    with Bars(words) as progress:
        from memfit import pipeline

        result = pipeline.search(asked, progress).result
    if save.save is not None and result.recommended is not None:
        write_plan(save.save, result.recommended.estimate.plan, note=f"for {job.job}, found by memfit plan")
    if output.json:
        from memfit.cli.views import search_view

        emit(search_view(result))
    else:
        from memfit.report.terminal import print_search

        print_search(result, lang=words, console=console())


def write_plan(path: Path, plan: Plan, *, note: str) -> None:
    from memfit.techniques.planfile import plan_text

    path.write_text(plan_text(plan, note=note), encoding="utf-8")
