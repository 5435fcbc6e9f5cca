"""``memfit plan``: recommend a plan and compare it with its rivals, with reasons, without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.options import (
    BoundsOptions,
    GoalOptions,
    HereOptions,
    JobOptions,
    MachineOptions,
    OutputOptions,
)
from memfit.cli.output import language
from memfit.cli.progress import Bars
from memfit.cli.request import (
    begin_answer,
    best_so_far,
    excluded_techniques,
    request,
    show_search,
    writable,
)
from memfit.types.errors import NothingFits, UserError
from memfit.types.parsing import parse_duration
from memfit.types.plan import Bounds, Plan

if TYPE_CHECKING:
    import memfit.planner.single_device


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """The number of processes, whether to measure rivals first, and where to write the plan."""

    nproc: Annotated[
        int, typer.Option(metavar="N", min=1, help="Plan for N processes that share the batch.")
    ] = 1
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="On this machine: run the plans whose predicted times lie within the error of the best for "
            "a few steps in turn, and recommend by what was measured.",
        ),
    ] = False
    measure_time: Annotated[
        str, typer.Option(metavar="TIME", help="With --measure: begin no run after this time: 90s, 5m.")
    ] = "5m"
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
    """The user's own set-up, and the proof of concept that corrects step times."""

    given: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A set-up you have, of DeepSpeed, Accelerate, Trainer, Megatron-LM or torchtitan: predict "
            "and lint it, and tell what would be better. May be given several times.",
        ),
    ] = None
    corrected_by: Annotated[
        str | None,
        typer.Option(
            metavar="ID|last", help="Correct step times by what this proof of concept measured here."
        ),
    ] = None
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The store it is in. Default: in your data folder.")
    ] = None


def plan(
    job: JobOptions,
    goal: GoalOptions,
    on: MachineOptions,
    limits: BoundsOptions,
    here: HereOptions,
    yours: FromOptions,
    save: SaveOptions,
    output: OutputOptions,
) -> None:
    """Recommend a plan that fits the memory, without training.

    Prints the recommended plan and its rivals, what each technique saves and costs, and why other plans were
    left out.
    """
    words = language(output.lang)
    if save.save is not None:
        writable(save.save, overwrite=save.force)
    if yours.given and yours.corrected_by is not None:
        raise UserError("--corrected-by with --from", allowed="one of them")
    if save.measure and (yours.given or on.on != "this"):
        raise UserError("--measure runs plans on this machine", allowed="neither --on nor --from with it")
    budget_s = parse_duration(save.measure_time)
    if yours.given:
        from memfit.cli.plan_from_config import plan_given

        carried = plan_given(yours.given, job, goal, here, on.on, lang=words, as_json=output.json)
        if save.save is not None:
            read_from = ", ".join(str(p) for p in yours.given)
            write_plan(save.save, carried, note=f"for {job.spec}, read from {read_from}")
        return
    asked = request(job, goal, here, on.on, ranks=save.nproc, bounds=bounds_of(job, limits, on.on))
    if yours.corrected_by is not None:
        asked = _corrected(asked, yours)
    workload = begin_answer(asked, lang=words, quiet=output.json)
    with best_so_far(lang=words, as_json=output.json, workload=workload), Bars(words) as progress:
        from memfit.workflows import proof_of_concept

        try:
            result = proof_of_concept.search(
                asked, progress, measure_s=budget_s if save.measure else None
            ).result
        except NothingFits as error:
            raise error.explained() if limits.explain_infeasible else error from None
    if save.save is not None and result.recommended is not None:
        write_plan(save.save, result.recommended.estimate.plan, note=f"for {job.spec}, found by memfit plan")
    show_search(result, lang=words, as_json=output.json, correction=asked.correction, workload=workload)


def _corrected(
    asked: memfit.planner.single_device.Request, yours: FromOptions
) -> memfit.planner.single_device.Request:
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    which = None if yours.corrected_by == "last" else yours.corrected_by
    return proof_of_concept.corrected_by(asked, Store(yours.store), which)


def bounds_of(job: JobOptions, given: BoundsOptions, on: str) -> Bounds:
    """Return the limits of the training. Raises UserError if a limit of the whole training is given without
    the number of steps, or if a limit is given that applies only to the devices of --on."""
    total = given.deadline is not None or given.budget is not None
    if total and job.steps is None:
        raise UserError("--deadline and --budget are of the whole training", hint="give --steps")
    if on == "this" and (total or given.micro_batch):
        raise UserError("--deadline, --budget and --micro-batch are for the devices of --on")
    return Bounds(
        steps=job.steps or 0,
        deadline_s=parse_duration(given.deadline) if given.deadline is not None else None,
        budget_usd=given.budget,
        micro_batch=given.micro_batch or 0,
        without=excluded_techniques(given.without),
    )


def write_plan(path: Path, plan: Plan, *, note: str) -> None:
    """Write ``plan`` to ``path`` as YAML, with ``note`` as a comment."""
    from memfit.techniques.plan_file import plan_text

    path.write_text(plan_text(plan, note=note), encoding="utf-8")
