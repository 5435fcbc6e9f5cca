"""``memfit estimate JOB --engines``: compare the engines for one job, machine and plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memfit.cli.options import (
    JobOptions,
    MachineOptions,
    PlanOptions,
    RuntimeOptions,
    SearchOptions,
)
from memfit.cli.output import emit, print_table
from memfit.cli.progress import Bars
from memfit.cli.request import plan_file, print_workload_of, recommended_plan, request
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import memfit.workflows.engine_comparison


def compare_engines(
    job: JobOptions,
    plan_options: PlanOptions,
    search_options: SearchOptions,
    on: MachineOptions,
    runtime: RuntimeOptions,
    *,
    as_json: bool,
) -> None:
    """Print for each engine whether it supports the plan of --plan or --recommended, else plain training; its
    predicted peak memory and step time; and facts about its installation and maintenance. Raises UserError as
    `plan_file` and `request` do and for a job that cannot be loaded; with --recommended as `recommended_plan`
    does."""
    plan = plan_file(plan_options)
    job_request = request(job, search_options, runtime, on.on, plans=[plan] if plan else [])
    workload = print_workload_of(job_request, lang="en", quiet=as_json)
    with Bars("en") as progress:
        from memfit.workflows.engine_comparison import choices

        compared_plan = plan or recommended_plan(job_request, progress)
        engine_choices = choices(job_request, compared_plan, progress)
    if as_json:
        views = [view(c) for c in engine_choices]
        emit(
            {
                "workload": workload,
                "plan": compared_plan.to_dict(),
                "ranks": compared_plan.ranks,
                "engines": views,
            }
        )
        return
    print(compared_plan.label)
    print_table(
        ("engine", "this plan", "predicted peak", "step", "here", "configuration", "to install", "upkeep"),
        map(_row, engine_choices),
    )


def view(choice: memfit.workflows.engine_comparison.EngineChoice) -> dict[str, Any]:
    """Return the fields of ``choice`` by name as plain data for ``--json``. "estimate", the prediction with
    peak memory and step time, is null if the engine does not support the plan or the job."""
    from memfit.cli.views import estimate_view
    from memfit.types.serialization import to_plain

    plain = {**to_plain(choice), "estimate": None}
    return plain | ({"estimate": estimate_view(choice.estimate)} if choice.estimate else {})


def _row(choice: memfit.workflows.engine_comparison.EngineChoice) -> tuple[str, ...]:
    estimate, facts = choice.estimate, {name: fact[0] for name, fact in choice.facts.items()}
    step = estimate.step_s if estimate else None
    needs = [
        f"{facts['packages']} packages, {facts['mib']} MiB" if "packages" in facts else "not measured",
        f"builds: {facts.get('builds', 'unknown')}",
    ]
    upkeep = [
        facts.get("release", ""),
        facts.get("status", ""),
        f"torch {facts.get('torch', 'unknown')}",
        facts.get("licence", ""),
    ]
    return (
        choice.engine,
        "; ".join(choice.gaps) or "supported" + "".join(f"; {part} needs CUDA" for part in choice.cuda),
        format_bytes(estimate.allocated_bytes.value) if estimate else "",
        format_seconds(step.value) if step else "",
        "\n".join(
            filter(
                None,
                (
                    choice.problem or choice.version,
                    choice.problem and choice.fix,
                    "" if choice.is_tried else "not tried on a GPU yet",
                ),
            )
        ),
        "" if choice.config_lines is None else f"{choice.config_lines} lines",
        "\n".join(needs),
        "\n".join(filter(None, upkeep)),
    )
