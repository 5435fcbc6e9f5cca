"""``memfit plan --diff``: a plan as an edit of the user's own training script."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.output import emit
from memfit.cli.progress import Bars
from memfit.types.errors import UserError
from memfit.types.job import DEFAULT_JOB, STRUCTURE
from memfit.types.sanitize import escape_controls, one_line

_MOST_NAMES = 5

if TYPE_CHECKING:
    import memfit.export.source_edits
    import memfit.planner.request
    from memfit.export.script_diff import ScriptDiff
    from memfit.types.job import Job
    from memfit.types.plan import Plan
    from memfit.types.result import SearchResult


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiffOptions:
    """The script for which the plan is printed as an edit, None for none."""

    diff: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py",
            help="Instead of the comparison: print the edit of this training script that applies the plan, "
            "as a diff for `patch -p0` or `git apply -p0`; if the script cannot be edited, the lines to "
            "insert by hand. A script with the Trainer of transformers gets TrainingArguments, one with "
            "Accelerate arguments of Accelerator, one with Lightning arguments of Trainer, and a loop of "
            "plain PyTorch the lines of memfit.apply. The file is only read. Uses the plan of --plan, and "
            "no other; without --plan, the recommended one or, if the script cannot express that, the "
            "fastest other that fits. Not "
            "with --from, --largest, --corrected-by, --measure or --explain-infeasible, not without JOB, "
            "and with --lang ja only as --json. Example: memfit plan job.py:train --diff train.py | patch "
            "-p0. Without a job of the script, use `memfit estimate --plans --diff`.",
        ),
    ] = None


def script_of(
    options: DiffOptions, plans: list[Path] | None, *, has_job: bool
) -> memfit.export.source_edits.Source | None:
    """Return the script of --diff, None without that option. ``plans``: the files of --plan. Raises UserError
    if there are several plans, if the user named no job, or if the script cannot be read or is not Python."""
    if options.diff is None:
        return None
    if plans is not None and len(plans) > 1:
        raise UserError(
            f"--plan is given {len(plans)} times, but --diff prints one plan", allowed="one --plan"
        )
    if not has_job:
        raise UserError(
            f"--diff {options.diff} without JOB: the plan would be that of {DEFAULT_JOB}",
            allowed=f"`memfit plan JOB --diff {options.diff}`, where JOB is the training of the script",
            hint=f"`memfit estimate --plans --diff -- python {options.diff}` plans for the script itself",
        )
    from memfit.export.script_diff import read_script

    return read_script(options.diff)


def print_diff(
    source: memfit.export.source_edits.Source,
    job_request: memfit.planner.request.Request,
    plans: list[Path] | None,
    *,
    as_json: bool,
) -> Plan:
    """Print the edit of the script ``source`` and return the plan: that of the file in ``plans``, or else the
    best that can be printed as an edit. The diff is on standard output; the plan and what the user should
    know of the edit are on standard error. If the script cannot be edited, standard output has the reason and
    the lines to insert. With ``as_json``, all is on standard output. Raises UserError if the job cannot be
    loaded, if the plan cannot be read, as `script_diff` does, and if the plan would weight the loss wrongly;
    NothingFits if no plan of the search fits."""
    from memfit.cli.export import dependence_of_split
    from memfit.export.script_diff import script_diff
    from memfit.export.script_steps import dependence_caution
    from memfit.jobs.registry import load
    from memfit.techniques.plan_file import read_plan
    from memfit.types.device_kind import device_kind
    from memfit.workflows.plan import find_plan
    from memfit.workflows.single_run import resolve_plan

    job = load(job_request.job_ref)
    defaults = {field.name: field.default for field in dataclasses.fields(job)}
    on_host = device_kind(job_request.machine.device.kind).is_host
    structure = {n: v for n in STRUCTURE if (v := getattr(job, n)) != defaults[n]}
    with Bars("en") as progress:
        if plans:
            plan = resolve_plan(job_request, read_plan(plans[0]), progress)
            edit = script_diff(
                source, plan, batch_size=job.batch_size, structure=structure, job=job, on_host=on_host
            )
        else:
            divides = job_request.ranks == 1 and not job_request.is_here
            ranks = job_request.machine.device_count if divides else job_request.ranks
            without = (*job_request.bounds.without, *excluded_from(source, ranks))
            bounds = dataclasses.replace(job_request.bounds, without=tuple(dict.fromkeys(without)))
            result = find_plan(dataclasses.replace(job_request, bounds=bounds), progress).result
            plan, edit = edit_of(source, result, job.batch_size, structure, job=job, on_host=on_host)
        if (caution := dependence_caution(plan, dependence_of_split(job, plan))) is not None:
            edit = dataclasses.replace(edit, remarks=(caution, *edit.remarks))
    print_edit(source, plan, edit, as_json=as_json)
    return plan


def excluded_from(source: memfit.export.source_edits.Source, ranks: int) -> tuple[str, ...]:
    """Return the names of the techniques that no edit of the script can apply, so that a search must leave
    them out. If there are any, name up to five of them on standard error, with the reason. If the script
    cannot be edited for a plan of ``ranks`` ranks, say so, too, before the search."""
    from memfit.export.script_diff import inexpressible, why_no_edit

    if reason := why_no_edit(source, ranks):
        print(
            f"note: {source.path} cannot be edited safely: {one_line(reason)}. After the search, "
            "memfit prints lines to insert by hand; Ctrl-C ends it",
            file=sys.stderr,
        )
    names, reason = inexpressible(source)
    if names:
        shown = ", ".join(names[:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        print(f"note: left out of the search, as {reason}: {shown}{more}", file=sys.stderr)
    return names


def edit_of(
    source: memfit.export.source_edits.Source,
    result: SearchResult,
    batch_size: int,
    structure: Mapping[str, Any],
    *,
    job: Job | None = None,
    keeps_enabled: bool = False,
    on_host: bool = False,
    own_micro_batches: int = 1,
) -> tuple[Plan, ScriptDiff]:
    """Return (the best plan of the search that can be printed as an edit; the edit): the recommended plan, or
    the fastest other that fits, with a remark on why. Raises the UserError of the recommended plan if there
    is none. The other arguments are as in `export.script_diff`."""
    from memfit.export.script_diff import script_diff
    from memfit.techniques.registry import short_label

    assert result.recommended is not None, "search raises NothingFits otherwise"
    others = [choice for choice in result.frontier if choice.fits]
    others.sort(key=lambda c: (c.estimate.step_s is None, c.estimate.step_s and c.estimate.step_s.value))
    first_error: UserError | None = None
    for choice in (result.recommended, *others):
        plan = choice.estimate.plan
        try:
            edit = script_diff(
                source,
                plan,
                batch_size=batch_size,
                structure=structure,
                job=job,
                keeps_enabled=keeps_enabled,
                on_host=on_host,
                own_micro_batches=own_micro_batches,
            )
        except UserError as error:
            first_error = first_error or error
            continue
        if first_error is None:
            return plan, edit
        remark = f"{short_label(result.recommended.estimate.plan)} is better, but {first_error.given}"
        return plan, dataclasses.replace(edit, remarks=(remark, *edit.remarks))
    assert first_error is not None
    raise first_error


def print_edit(
    source: memfit.export.source_edits.Source, plan: Plan, edit: ScriptDiff, *, as_json: bool
) -> None:
    """Print the edit of a script: the plan and the remarks on standard error, the diff on standard output. If
    the script cannot be edited, the reason and the lines to insert are on standard output instead of the
    diff. ``as_json``: print one JSON object on standard output, with the plan's label and the fields of
    ``edit``."""
    from memfit.techniques.registry import short_label

    if as_json:
        emit({"plan": plan.label, **{f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}})
        return
    print(f"plan: {short_label(plan)}", file=sys.stderr)
    for remark in edit.remarks:
        print(f"note: {one_line(remark)}", file=sys.stderr)
    if edit.reason:
        print(f"{source.path} cannot be edited safely: {one_line(edit.reason)}. Insert by hand:")
        print("\n".join(f"    {escape_controls(line)}" for line in edit.lines))
    elif edit.diff:
        print(edit.diff, end="")
    else:
        print(f"{source.path} needs no edit for this plan.", file=sys.stderr)
