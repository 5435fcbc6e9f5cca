"""``memfit autopsy``: say why a training ran out of memory. Without --job it does not load torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import GoalOptions, JobOptions, JsonOptions, RuntimeOptions
from memfit.cli.output import emit
from memfit.cli.progress import Bars
from memfit.files.read import open_regular
from memfit.monitoring.diagnosis import Certainty, Diagnosis
from memfit.types.errors import UserError
from memfit.types.sanitize import replace_controls
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import memfit.workflows.autopsy_comparison

_MOST_TEXT_BYTES = 8 * 2**20  # of the end of a log


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions:
    """The files with evidence, and the job, plan and machine with which it is compared."""

    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Evidence of one death, each a file or - for standard input: the log of the training or its "
            "error message; a memory snapshot of torch (torch.cuda.memory._dump_snapshot), of which no code "
            "is run, or its content as JSON; the file of `memfit watch`; the kernel's log, as `dmesg -T` "
            "prints it; the output of a scheduler. Of a log, the last 8 MiB are read.",
        ),
    ]
    job: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Predict this job, compare the prediction with the evidence, and find the nearest plan that "
            "would have fitted, with its price in step time: a built-in job, FILE.py:NAME or "
            "hf:PATH_OR_NAME, as in `memfit plan`. Default: no comparison.",
        ),
    ] = None
    size: Annotated[
        str | None, typer.Option(metavar="NAME", help="Size of the job, as in `memfit plan`. Needs --job.")
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples per optimizer step of all processes together. Default: the job's. Needs --job.",
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Length of a sample. Default: the job's. Needs --job."),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Plan under which it trained, as written by `memfit plan --save`. Default: plain training. "
            "Needs --job.",
        ),
    ] = None
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="Machine on which it trained, as in `memfit plan`. Default: this machine. Needs --job.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that the training could use on each device. Default: what the evidence says, or "
            "else the memory of the device. Needs --job.",
        ),
    ] = None


def autopsy(options: EvidenceOptions, output: JsonOptions) -> None:
    """Say why a training ran out of memory, with the evidence for it and what to do.

    Names one of: tensors too large, fragmentation, a leak, a longer sample, evaluation, the optimizer's step,
    a checkpoint, memory outside torch, a killed process, shared memory; or that memory was not the reason.
    If the evidence allows several causes, it names them all, and what to record next time.

    Example: memfit autopsy train.log oom.pickle"""
    from memfit.monitoring.autopsy import combine

    _check(options)
    diagnosis = combine([_diagnosis_of(name) for name in options.files])
    comparison = _compare(diagnosis, options) if options.job is not None else None
    if output.json:
        emit(_view(diagnosis, comparison))
    else:
        more = _comparison_lines(comparison) if comparison is not None else ()
        print(replace_controls("\n".join([*lines(diagnosis), *more])))


def _view(
    diagnosis: Diagnosis, comparison: memfit.workflows.autopsy_comparison.DeathComparison | None
) -> dict[str, Any]:
    """Return the diagnosis by field, and "comparison", null without --job, for --json."""
    from memfit.types.serialization import to_plain

    compared = None
    if comparison is not None:
        ratios = {"excess_ratio": comparison.excess_ratio, "step_ratio": comparison.step_ratio}
        compared = to_plain(comparison) | ratios
    return {**to_plain(diagnosis), "comparison": compared}


def _check(options: EvidenceOptions) -> None:
    """Raise UserError if options for the comparison are given without --job, or - several times."""
    names = ("size", "batch", "length", "plan", "on", "memory")
    if options.job is None and (unused := [f"--{n}" for n in names if getattr(options, n) is not None]):
        raise UserError(f"{', '.join(unused)} without --job", hint="--job JOB names what trained")
    if options.files.count("-") > 1:
        raise UserError("standard input can be read once", allowed="- once, and files")


def _diagnosis_of(name: str) -> Diagnosis:
    """Return the diagnosis of one piece of evidence. What kind it is, its content decides."""
    from memfit.monitoring import autopsy as rules
    from memfit.monitoring.memory_snapshot import is_snapshot, parse_snapshot, read_snapshot
    from memfit.monitoring.plain_pickle import LARGEST_BYTES
    from memfit.monitoring.record import read_records

    if name == "-":
        data = sys.stdin.buffer.read(LARGEST_BYTES)
        if is_snapshot(data[:4096]):
            return rules.diagnose_snapshot(parse_snapshot(data, what="standard input"))
        return rules.diagnose_log(data[-_MOST_TEXT_BYTES:].decode("utf-8", "replace"))
    path = Path(name)
    with open_regular(path) as file:
        head = file.read(4096)
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - _MOST_TEXT_BYTES))
        text = b"" if is_snapshot(head) else file.read(_MOST_TEXT_BYTES)
    if is_snapshot(head):
        return rules.diagnose_snapshot(read_snapshot(path))
    if rules.is_record(head):
        return rules.diagnose_record(read_records(path))
    return rules.diagnose_log(text.decode("utf-8", "replace"))


def _compare(
    diagnosis: Diagnosis, options: EvidenceOptions
) -> memfit.workflows.autopsy_comparison.DeathComparison:
    from memfit.cli.options import PlanOptions
    from memfit.cli.request import plan_file, request

    job = JobOptions(job=options.job, size=options.size, batch=options.batch, length=options.length)
    plan = plan_file(PlanOptions(plan=options.plan))
    assert plan is not None
    goal = GoalOptions(memory=options.memory)
    job_request = request(job, goal, RuntimeOptions(), options.on or "this", ranks=plan.ranks)
    with Bars("en") as progress:
        from memfit.workflows.autopsy_comparison import compare_with_prediction

        return compare_with_prediction(diagnosis, job_request, plan, progress)


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield the lines of an answer: cause and certainty, evidence, place, advice, and what to record."""
    from memfit.monitoring.remedies import title_of

    title = title_of(diagnosis.cause)
    certainty = "" if diagnosis.certainty is Certainty.UNKNOWN else f" ({diagnosis.certainty})"
    yield f"{diagnosis.cause}{certainty}: {title}"
    yield from _labelled("because", diagnosis.evidence)
    if diagnosis.alternatives:
        yield from _labelled("or", [", ".join(diagnosis.alternatives)])
    place = [diagnosis.line, f"phase {diagnosis.phase}" if diagnosis.phase else ""]
    place.append(f"module {diagnosis.module}" if diagnosis.module else "")
    if any(place):
        yield from _labelled("where", [", ".join(filter(None, place))])
    yield from _labelled("do", diagnosis.advice)
    yield from _labelled("record", diagnosis.capture)


def in_one_line(diagnosis: Diagnosis) -> str:
    """Return cause, certainty, alternatives and evidence on one line."""
    from memfit.monitoring.remedies import title_of
    from memfit.types.sanitize import one_line

    others = f", or {', '.join(diagnosis.alternatives)}" if diagnosis.alternatives else ""
    title = f"{diagnosis.cause} ({diagnosis.certainty}{others}): {title_of(diagnosis.cause)}"
    return one_line("; ".join([title, *diagnosis.evidence]))


def _comparison_lines(comparison: memfit.workflows.autopsy_comparison.DeathComparison) -> Iterator[str]:
    peak, nearest = comparison.predicted.allocated_bytes, comparison.nearest
    predicted = (
        f"{comparison.predicted.plan.label}: {format_bytes(peak.value)} of tensors "
        f"({format_bytes(peak.low)} to {format_bytes(peak.high)}), "
        f"{format_bytes(comparison.needed_bytes)} needed, "
        f"{format_bytes(comparison.limit_bytes)} could be used"
    )
    yield from _labelled("predicted", [predicted])
    if comparison.measured_bytes is not None and comparison.excess_ratio is not None:
        side = "above" if comparison.excess_ratio >= 0 else "below"
        measured = (
            f"at least {format_bytes(comparison.measured_bytes)} of tensors when it died, "
            f"{abs(comparison.excess_ratio):.1%} {side} the predicted peak"
        )
        yield from _labelled("measured", [measured])
    if nearest is None:
        yield from _labelled("would fit", [f"no plan: {comparison.why_not}"])
        return
    price = f", {comparison.step_ratio:.2f}x the step time" if comparison.step_ratio is not None else ""
    step = f" ({format_seconds(nearest.step_s.value)})" if nearest.step_s else ""
    needed = format_bytes(comparison.nearest_bytes or 0)
    yield from _labelled("would fit", [f"{nearest.plan.label}: {needed} needed{price}{step}"])


def _labelled(label: str, texts: Sequence[str]) -> Iterator[str]:
    """Yield a line for each text; the first begins with the label."""
    for i, text in enumerate(texts):
        yield f"  {label if i == 0 else '':<10}{' '.join(text.split())}"
