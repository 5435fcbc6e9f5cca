"""The workflow of `memfit plan`: search the best plan and, if asked, choose it by measured step times."""

from __future__ import annotations

import dataclasses

from memfit.engines.registry import must_train
from memfit.planner import trials
from memfit.planner.request import Planning, Progress, Request
from memfit.planner.search import SearchInterrupted, search
from memfit.types.errors import UserError


def find_plan(
    request: Request, progress: Progress, *, must_run: bool = False, measure_s: float | None = None
) -> Planning:
    """Search the best plan for the request, as `planner.search.search` does, and return what it found.

    If ``measure_s`` is given, the best plans are then run for about that many seconds, and the recommendation
    is chosen by the measured step times. This is only possible for the goals "fastest", "cheapest" and
    "greenest", which depend on step time. For any other goal, nothing is run if ``must_run``, and otherwise
    UserError is raised.

    ``must_run``: whether plain training must be able to run; if the request is for this machine, the batch is
    then halved until plain training fits its free memory or has one sample per rank.

    With either of the two, raises UserError for the engine replay, which trains nothing. Also raises what
    `planner.search.search` raises, such as NothingFits if no plan fits. Ctrl-C while plans are run raises
    SearchInterrupted with the result so far.
    """
    if measure_s is not None and not must_run and request.goal not in trials.BY_TIME:
        raise UserError(
            f"--measure needs a --goal that is calculated from step time, not {request.goal.value}",
            allowed=", ".join(trials.BY_TIME),
        )
    if measure_s is not None or must_run:
        must_train(request.engine)
    planning = search(request, progress, must_run=must_run)
    try:
        if measure_s is not None and request.goal in trials.BY_TIME:
            planning = trials.choose_by_trials(planning, progress, measure_s=measure_s)
    except KeyboardInterrupt:
        partial_result = dataclasses.replace(planning.result, unfinished=True)
        raise SearchInterrupted(partial_result) from None
    finally:
        planning.predictor.end_workers()
    return planning
