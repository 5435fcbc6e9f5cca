"""``memfit explain``: where every MiB of a plan goes, before running it."""

from __future__ import annotations

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
from memfit.cli.request import plan_file, recommended_plan, request


def explain(
    job: JobOptions, which: WhichOptions, goal: GoalOptions, on: MachineOptions, here: HereOptions,
    lang: LanguageOptions, output: JsonOptions,
) -> None:  # fmt: skip
    """Show where every MiB goes, before running it."""
    words = language(lang.lang)
    plan = plan_file(which)
    asked = request(job, goal, here, on.on)
    with Bars(words) as progress:
        from memfit import pipeline

        if plan is None:
            plan = recommended_plan(asked, progress)
        estimate = pipeline.explain(asked, plan, progress)
    if output.json:
        from memfit.cli.views import estimate_view

        emit(estimate_view(estimate))
    else:
        from memfit.report.terminal import print_estimate

        print_estimate(estimate, lang=words, console=console())
