"""Compare engines for one job, machine and plan: whether each supports the plan, what memory its step needs,
and what must be installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memfit import catalog
from memfit.engines.base import Engine
from memfit.engines.registry import ENGINES, render, trains_on
from memfit.jobs.registry import load
from memfit.planner.machine_calibration import calibrate
from memfit.planner.request import Progress, Request, make_predictor, model_sizes
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration
from memfit.types.plan import Plan
from memfit.types.result import Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What one engine can do with a plan, and what must be installed for it.

    ``gaps``: why the engine does not support the plan; empty if it does. ``cuda``: parts of the plan that it
    runs on NVIDIA GPUs only, in words; the whole training, if it trains on no device of the machine's kind.
    ``version``: of its installed package, "" if there is none. ``problem``: what keeps it from running here,
    "" for nothing; ``fix``: the command that would help. ``tested``: versions of its package that memfit was
    tested with (">=2.0, <3"), or "". ``is_tried``: whether memfit has run it on a device of the machine's
    kind. ``facts``: what the catalog knows about the engine, name -> (value, source, date).

    ``estimate``: the prediction for the plan; ``config_lines``: number of lines of the configuration files
    that memfit would write for the engine. Both are None if it does not support the plan.
    """

    engine: str
    summary: str
    gaps: tuple[str, ...]
    cuda: tuple[str, ...]
    version: str
    problem: str
    fix: str
    tested: str
    is_tried: bool
    estimate: Estimate | None
    config_lines: int | None
    facts: dict[str, tuple[str, str, str]]


def choices(request: Request, plan: Plan, progress: Progress) -> list[EngineChoice]:
    """Return what each engine but "replay" can do with ``plan`` for the request's job and machine: first the
    engines that support it, by predicted peak memory, lowest first; then the others.

    For each of the first, a training step is predicted: the engine's own if that can be traced here, else
    that of native, memfit's own engine. Raises UserError if the job cannot be loaded or the plan's number of
    ranks does not suit its techniques, and RunError if operators cannot be timed here.
    """
    # shared calibration of this machine, so that engines differ by what they run and not by timing noise
    calibrations = [Calibration()]
    load(request.job_ref)  # a job that cannot be loaded is not the fault of an engine
    layout(plan)
    training_engines = (e for e in ENGINES.values() if e.name != "replay")
    engine_choices = [_choice(request, plan, engine, calibrations, progress) for engine in training_engines]
    return sorted(
        engine_choices,
        key=lambda c: (bool(c.gaps), c.estimate.allocated_bytes.value if c.estimate else 0.0),
    )


def _choice(
    request: Request, plan: Plan, engine: Engine, calibrations: list[Calibration], progress: Progress
) -> EngineChoice:
    gaps, probe, kind = engine.refusals(plan), engine.probe(), request.machine.device.kind
    estimate, lines = None, None
    if not gaps:
        progress("trace", 0, 0, engine.name)
        try:
            estimate, lines = _predict(
                dataclasses.replace(request, engine=engine.name), plan, calibrations, progress
            )
        except UserError as error:
            gaps = (str(error),)
    low, high = engine.tested
    return EngineChoice(
        engine=engine.name,
        summary=engine.summary,
        gaps=gaps,
        cuda=engine.asks_cuda(plan) if trains_on(engine, kind) else (f"training on {kind} devices",),
        version=probe.version,
        problem=probe.problem,
        fix=probe.fix,
        tested=f">={low}, <{high}" if low else "",
        is_tried=kind in engine.tried_on,
        estimate=estimate,
        config_lines=lines,
        facts=catalog.engine_facts(engine.name),
    )


def _predict(
    request: Request, plan: Plan, calibrations: list[Calibration], progress: Progress
) -> tuple[Estimate, int]:
    """Return the prediction for the plan and the number of lines of the engine's files. On this machine, the
    last of ``calibrations`` is taken as it is, and completed by one with the plan's operators, which is
    appended."""
    job, predictor = make_predictor(request)
    predictor.whole(plan)
    if request.is_here:
        predictor.recalibrate(calibrations[-1])
        calibrate(predictor, request, progress, plans=[plan])
        calibrations.append(predictor.calibration)
    return predictor.whole(plan), sum(_lines(request, job, plan))


def _lines(request: Request, job: Job, plan: Plan) -> Iterator[int]:
    """Yield the number of lines of each file that memfit writes so that the engine of ``request`` trains the
    plan; memfit's own run.json is left out."""
    spec = RunSpec(
        name="",
        role="",
        job=request.job_ref,
        plan=plan,
        engine=request.engine,
        seed=0,
        steps=job.steps,
        batch_size=job.batch_size,
        clip=job.clip,
        sizes=model_sizes(request.engine, job),
    )
    yield from (len(text.splitlines()) for name, text in render(spec).files.items() if name != "run.json")
