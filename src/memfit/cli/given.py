"""``memfit plan JOB --from FILE``: a set-up that exists, predicted, linted, and what would be better."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfit.cli.lint import findings_view, print_findings
from memfit.cli.options import GoalOptions, HereOptions, JobOptions
from memfit.cli.output import console, emit
from memfit.cli.progress import Bars
from memfit.cli.request import machine_of, request
from memfit.types.errors import UserError
from memfit.types.plan import Plan

if TYPE_CHECKING:
    import memfit.beside
    import memfit.configs.carry
    import memfit.configs.lint
    import memfit.planning
    import memfit.types.result


def plan_given(
    files: Sequence[Path], job: JobOptions, goal: GoalOptions, here: HereOptions, on: str, *,
    lang: str, as_json: bool,
) -> Plan:  # fmt: skip
    """The plan that the files come to. Raises UserError for files of no known kind, and for plans that the
    job cannot take."""
    from memfit.configs import carry, lint, read

    setup = read.read(files)
    count = machine_of(on, here.place).device_count
    if setup.ranks is None and count > 1:
        setup = dataclasses.replace(setup, ranks=count)
    carried = carry.over(setup)
    if carried.plan.ranks > count:
        told = carry.LeftOut(
            option=f"{carried.plan.ranks} processes on {count} devices",
            reason="predicted as if each had its own",
        )
        carried = dataclasses.replace(carried, left_out=(*carried.left_out, told))
    job, carried = _published(carried, job)
    asked, size, carried = _sized(carried, job, goal, here, on)
    from memfit import beside

    found = lint.check(dataclasses.replace(setup, parameters=size), lang=lang)
    if not as_json:  # before the prediction, which may say that the plan is impossible
        _print_carried(carried, lang)
        print_findings(found, lang=lang)
    with Bars(lang) as progress:
        result = beside.beside(asked, carried.plan, progress, parameters=size)
    if as_json:
        emit(_view(carried, found, result))
    else:
        _print(result, lang)
    return carried.plan


def _published(
    carried: memfit.configs.carry.Carried, job: JobOptions
) -> tuple[JobOptions, memfit.configs.carry.Carried]:
    """At the size of the job that the files are about. Raises UserError where they are about another job."""
    from memfit.configs.carry import LeftOut
    from memfit.configs.openfold import JOB

    if not carried.size:
        return job, carried
    if job.job != JOB:
        raise UserError(f"OpenFold's settings for the job {job.job}", allowed=f"memfit plan {JOB} --from ...")
    if job.size is None:
        return dataclasses.replace(job, size=carried.size), carried
    if job.size == carried.size:
        return job, carried
    told = LeftOut(option=f"crop of size {carried.size}", reason=f"--size {job.size} was asked for")
    return job, dataclasses.replace(carried, left_out=(*carried.left_out, told))


def _sized(
    carried: memfit.configs.carry.Carried, job: JobOptions, goal: GoalOptions, here: HereOptions, on: str
) -> tuple[memfit.planning.Request, int, memfit.configs.carry.Carried]:
    """With the job's parameters; of the files' batch, unless another is asked for or the job has its own."""
    from memfit.configs.carry import LeftOut

    plain = request(job, goal, here, on)
    from memfit import beside

    if job.batch is not None or carried.batch is None:
        return plain, beside.parameters(plain), carried
    asked = request(dataclasses.replace(job, batch=carried.batch), goal, here, on)
    try:
        return asked, beside.parameters(asked), carried
    except UserError as error:
        size = beside.parameters(plain)  # what is wrong without the batch too is told as it is
        left = LeftOut(option=f"batch {carried.batch}", reason=str(error))
        return plain, size, dataclasses.replace(carried, batch=None, left_out=(*carried.left_out, left))


def _view(
    carried: memfit.configs.carry.Carried,
    found: Sequence[memfit.configs.lint.Finding],
    result: memfit.beside.Beside,
) -> dict[str, Any]:
    from memfit.cli.views import choice_view, estimate_view

    return {
        "given": estimate_view(result.given),
        "fits": result.fits,
        "engine": carried.engine,
        "micro_batch": carried.micro_batch,
        "batch": carried.batch,
        "left_out": [dataclasses.asdict(left) for left in carried.left_out],
        "findings": findings_view(found),
        "better": [estimate_view(e) for e in result.better],
        "recommended": choice_view(result.recommended) if result.recommended is not None else None,
        "nothing_fits": result.nothing,
    }


def _print_carried(carried: memfit.configs.carry.Carried, lang: str) -> None:
    from rich.text import Text

    from memfit.report.words import load_words

    words, out = load_words(lang), console()
    title = words.get(
        "lint.carried", engine=carried.engine, plan=carried.plan.label, batch=carried.batch or "-"
    )
    out.print(Text(title, style="bold"))
    for left in carried.left_out:
        out.print(Text(words.get("lint.left_out", option=left.option, reason=left.reason), style="dim"))


def _print(result: memfit.beside.Beside, lang: str) -> None:
    from rich.text import Text

    from memfit.report.terminal import print_estimate
    from memfit.report.words import load_words

    words, out = load_words(lang), console()
    print_estimate(result.given, console=out, lang=lang)
    if result.fits is not None:
        out.print(Text(words.get("lint.fits" if result.fits else "lint.too_much"), style="bold"))
    choice = result.recommended
    others = [choice.estimate] if choice is not None else list(result.better)
    if result.nothing is not None:
        out.print(Text(result.nothing, style="bold"))
        return
    out.print(Text(words.get("lint.better" if others else "lint.nothing_better"), style="bold"))
    for other in others:
        out.print(Text(words.get("lint.instead", **_compared(result.given, other))))


def _compared(given: memfit.types.result.Estimate, other: memfit.types.result.Estimate) -> dict[str, str]:
    from memfit.types.units import format_bytes

    peak = other.allocated_bytes.value
    change = peak - given.allocated_bytes.value
    return {
        "plan": other.plan.label,
        "peak": format_bytes(int(peak)),
        "change": f"{'+' if change > 0 else '-'}{format_bytes(int(abs(change)))}",
    }
