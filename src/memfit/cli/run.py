"""``memfit run``: train one plan in its own process, and compare measurement and prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from memfit.cli.options import (
    GoalOptions,
    HereOptions,
    JobOptions,
    JsonOptions,
    StoreOptions,
    WhichOptions,
)
from memfit.cli.output import emit
from memfit.cli.progress import Bars
from memfit.cli.request import begin_answer, plan_file, recommended_plan, request
from memfit.types.errors import UserError
from memfit.types.launch import Keep
from memfit.types.parsing import parse_duration
from memfit.types.result import OutcomeKind, Run
from memfit.types.sanitize import shown
from memfit.types.units import format_bytes, format_seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The memory cap, seed, time limit and checkpoints of the run."""

    capped: Annotated[
        bool | None,
        typer.Option(
            "--capped/--no-capped",
            help="Train under a hard memory cap: --memory, else what the plan is predicted to need. Default: "
            "capped when --memory is given.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=2**31 - 1,
            help="Of initial weights and data order. Default: the checkpoint's, else 0.",
        ),
    ] = None
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop it after this: 90s, 10m, 72h. Default: never.")
    ] = None
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write checkpoints here; at the end, if not told more.")
    ] = None
    save_every: Annotated[
        int, typer.Option(metavar="N", min=0, help="And after every N steps. 0: at the end only.")
    ] = 0
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on from the newest complete checkpoint here, saved under this plan or another; --steps "
            "counts from the very first.",
        ),
    ] = None


def run(
    job: JobOptions,
    which: WhichOptions,
    goal: GoalOptions,
    own: RunOptions,
    here: HereOptions,
    store: StoreOptions,
    output: JsonOptions,
) -> None:
    """Train one plan, and compare its measured memory and time with the prediction."""
    timeout_s = parse_duration(own.timeout) if own.timeout is not None else None
    plan = plan_file(which)
    asked = dataclasses.replace(request(job, goal, here), timeout_s=timeout_s)
    workload = begin_answer(asked, lang="en", quiet=output.json)
    with Bars("en") as progress:
        from memfit.store import Store
        from memfit.workflows import proof_of_concept

        if plan is None:
            plan = recommended_plan(asked, progress)
        capped = goal.memory is not None if own.capped is None else own.capped
        done = proof_of_concept.run_plan(
            asked,
            plan,
            seed=own.seed,
            steps=job.steps,
            capped=capped,
            progress=progress,
            keep=kept(own),
            store=Store(store.store),
        )
    if output.json:
        from memfit.cli.views import run_view

        emit({"workload": workload, **run_view(done)})
    else:
        print(shown("\n".join(lines(done))))
    if done.measurement.outcome is not OutcomeKind.OK:
        raise typer.Exit(1)


def kept(own: RunOptions) -> Keep:
    """Return the checkpoint settings. Raises UserError for --save-every without --save."""
    if own.save_every and own.save is None:
        raise UserError("--save-every without --save", allowed="--save DIR --save-every N")
    return Keep(save=str(own.save or ""), every_steps=own.save_every, resume=str(own.resume or ""))


def lines(run: Run) -> Iterator[str]:
    """Yield a summary of the run: its outcome, memory and time with their predictions, and the loss."""
    from memfit.cli.views import step_s

    seen, cap_bytes = run.measurement, run.spec.cap_bytes
    cap = f"under {format_bytes(cap_bytes)} ({seen.limit_kind})" if cap_bytes else "without a cap"
    yield ": ".join(filter(None, (run.spec.plan.label, f"{seen.outcome.value} {cap}", seen.reason)))
    if seen.peak_bytes is not None:
        yield f"  peak    {_peak(run, seen.peak_bytes)}, {seen.peak_source}"
    if (step := step_s(seen)) is not None:
        yield f"  step    {_beside(run.predicted_step_s, step, format_seconds)}"
    keep, count = run.spec.keep, len(seen.losses)
    if keep.resume:
        told = f"; passed over {', '.join(keep.passed_over)}" if keep.passed_over else ""
        yield f"  resumed {keep.resume}{told}"
    if run.dependence is not None and run.dependence.sentence:
        yield f"  split   {run.dependence.sentence}"
    if seen.losses:
        more = " more" if keep.resume else ""
        yield f"  loss    {seen.losses[0]:.4g} at first, {seen.losses[-1]:.4g} after {count}{more} steps"
    if keep.save and seen.outcome is OutcomeKind.OK:
        yield f"  saved   {keep.save}"
    if seen.metric is not None:
        yield f"  metric  {seen.metric:.4g} on held-out data"


def _peak(run: Run, peak_bytes: int) -> str:
    """Describe the peak. The error of the prediction is given only if the run reached what was predicted: a
    run that ended early, or before its second step, did not."""
    told, predicted = format_bytes(peak_bytes), run.predicted_peak_bytes
    if run.measurement.outcome is not OutcomeKind.OK:
        more = f", {format_bytes(predicted)} predicted for the whole" if predicted else ""
        return f"{told} when it ended{more}"
    if run.spec.steps == 1 and predicted and predicted > peak_bytes:
        return f"{told} measured, {format_bytes(predicted)} predicted from the second step on"
    return _beside(predicted, peak_bytes, format_bytes)


def _beside(predicted: float | None, measured: float, text: Callable[[float], str]) -> str:
    """Describe a pair of values, such as ``1.5 MiB measured, 1.498 MiB predicted (-0.13 %)``."""
    told = f"{text(measured)} measured"
    if predicted is None or not measured:
        return told
    return f"{told}, {text(predicted)} predicted ({round(100 * (predicted / measured - 1), 2) + 0:+.2f} %)"
