"""``memfit autopsy``: say why a training ran out of memory. Without --job it does not load torch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import JobOptions, OutputOptions, RuntimeOptions, SearchOptions
from memfit.cli.output import check_language, emit
from memfit.cli.progress import Bars
from memfit.files.read import open_regular
from memfit.monitoring.diagnosis import Diagnosis
from memfit.types.errors import UserError
from memfit.types.sanitize import replace_controls
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import memfit.workflows.autopsy_comparison
    from memfit.report.words import Words

_MOST_TEXT_BYTES = 8 * 2**20  # of the end of a log


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceOptions:
    """The files with evidence; and the job, size, batch, length, plan, machine and memory of the prediction
    with which it is compared. None: not given."""

    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Evidence of why one training ended: files, or - (once) for standard input. Each may be: "
            "the log of the training or its error message; a memory snapshot of torch "
            "(torch.cuda.memory._dump_snapshot) of at most 512 MiB, of which no code is run, or its content "
            "as JSON; the file of `memfit watch` (not as -); the kernel's log, as `dmesg -T` prints it; the "
            "output of a scheduler. Of a text, the last 8 MiB are read.",
        ),
    ]
    job: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Predict this job under --plan, compare the prediction with the evidence, and find a plan "
            "that would have fitted and its step time: --plan with other micro-batches, recomputation, "
            "offload or chunking or, if none of these fits, the one that a search recommends. A built-in "
            "job, FILE.py:NAME or hf:PATH_OR_NAME, as in `memfit plan`. Default: no comparison.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Size of the job, as in `memfit plan`. Default: the job's default size. Refused without "
            "--job.",
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples per optimizer step of all processes together, as in `memfit plan`. Default: the "
            "job's number. Refused without --job.",
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Length of a sample, as in `memfit plan`. Default: the length of the job's size. Refused "
            "without --job.",
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="File with the plan under which the job trained, as written by `memfit plan --save`. "
            "Default: plain training, without any technique. Refused without --job.",
        ),
    ] = None
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="Machine on which the job trained, as in `memfit plan`. Default: this, the machine that "
            "memfit runs on. Refused without --job.",
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that the training could use on each device, such as 24GiB; more than a GPU has "
            "counts as what it has. Default: the limit, or else the capacity of the device, that the "
            "evidence states, less what was used outside torch if that is why memory ran out; if it states "
            "neither, all memory of the device of --on. Refused without --job.",
        ),
    ] = None


def autopsy(options: EvidenceOptions, output: OutputOptions) -> None:
    """Say why a training ran out of memory, with the evidence for it and what to do.

    Names one of: tensors too large, fragmentation, a leak, a longer sample, evaluation, the optimizer's step,
    a checkpoint, late growth without a known reason, memory outside torch, a killed process, shared memory;
    or says that memory was not the reason, or that the evidence shows none. If the evidence allows several
    causes, names them all, and what to record next time.

    Example: memfit autopsy train.log oom.pickle"""
    from memfit.monitoring.autopsy import combine
    from memfit.report.words import load_words

    words = load_words(check_language(output.lang))
    _check(options)
    diagnosis = combine([_diagnosis_of(name) for name in options.files])
    comparison = _compare(diagnosis, options, output.lang) if options.job is not None else None
    diagnosis = translate(diagnosis, words)
    if output.json:
        emit(_view(diagnosis, comparison))
    else:
        compared_lines = _comparison_lines(comparison, words) if comparison is not None else ()
        print(replace_controls("\n".join([*lines(diagnosis, words), *compared_lines])))


def translate(diagnosis: Diagnosis, words: Words) -> Diagnosis:
    """Return the diagnosis with its evidence, its advice and what to record next time in the language of
    ``words``. Text of a log stays as it is."""
    return dataclasses.replace(
        diagnosis,
        evidence=tuple(map(words.of, diagnosis.evidence)),
        advice=tuple(map(words.of, diagnosis.advice)),
        capture=tuple(map(words.of, diagnosis.capture)),
    )


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
        raise UserError(
            f"{', '.join(unused)} cannot be used without --job",
            hint="name with --job JOB the job that trained",
        )
    if options.files.count("-") > 1:
        raise UserError(
            "- is given several times, but standard input is read once",
            allowed="- once, and any number of files",
        )


def _diagnosis_of(name: str) -> Diagnosis:
    """Return the diagnosis of one piece of evidence: a file, or standard input for "-". By its content it is
    a memory snapshot, the record of a watched training (only as a file), or else the text of a log. Raises
    UserError if it cannot be read, and for a snapshot that is damaged or too large."""
    from memfit.monitoring import autopsy as rules
    from memfit.monitoring.memory_snapshot import LARGEST_BYTES, is_snapshot, parse_snapshot, read_snapshot
    from memfit.monitoring.record import read_records

    if name == "-":
        stream = sys.stdin.buffer
        data = head = stream.read(4096)
        if is_snapshot(data):
            data += stream.read(max(0, LARGEST_BYTES + 1 - len(data)))  # one byte more is refused
            return rules.diagnose_snapshot(parse_snapshot(data, what="standard input"))
        while more := stream.read(_MOST_TEXT_BYTES):
            data = (data + more)[-_MOST_TEXT_BYTES:]
        return rules.diagnose_log(_text_of(data, head))
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
    return rules.diagnose_log(_text_of(text, head))


def _text_of(data: bytes, head: bytes) -> str:
    """Return the text of a log, or of its end. ``head``: the log's first bytes, which mark UTF-16, as the
    redirection of Windows PowerShell writes it."""
    marks = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
    return data.decode(marks.get(head[:2], "utf-8"), "replace").lstrip("\ufeff")


def _compare(
    diagnosis: Diagnosis, options: EvidenceOptions, lang: str
) -> memfit.workflows.autopsy_comparison.DeathComparison:
    from memfit.cli.options import PlanOptions
    from memfit.cli.request import plan_file, request

    job = JobOptions(job=options.job, size=options.size, batch=options.batch, length=options.length)
    plan = plan_file(PlanOptions(plan=options.plan))
    assert plan is not None
    search_options = SearchOptions(memory=options.memory)
    job_request = request(job, search_options, RuntimeOptions(), options.on or "this", ranks=plan.ranks)
    with Bars(lang) as progress:
        from memfit.workflows.autopsy_comparison import compare_with_prediction

        return compare_with_prediction(diagnosis, job_request, plan, progress)


def lines(diagnosis: Diagnosis, words: Words) -> Iterator[str]:
    """Yield the lines of an answer: cause and certainty, then, as far as there are any, evidence, other
    possible causes, place, advice, and what to record next time."""
    from memfit.monitoring.remedies import title_of

    title = words.of(title_of(diagnosis.cause))
    yield words.get(f"autopsy.{diagnosis.certainty}", cause=diagnosis.cause, title=title)
    yield from _label_lines("because", diagnosis.evidence, words)
    if diagnosis.alternatives:
        yield from _label_lines("or", [", ".join(diagnosis.alternatives)], words)
    place = [diagnosis.line]
    if diagnosis.phase:
        place.append(words.get("autopsy.phase", phase=words.of(diagnosis.phase)))
    if diagnosis.module:
        place.append(words.get("autopsy.module", module=diagnosis.module))
    if any(place):
        yield from _label_lines(
            "where", [words.get("plan.detail_separator").join(filter(None, place))], words
        )
    yield from _label_lines("do", diagnosis.advice, words)
    yield from _label_lines("record", diagnosis.capture, words)


def in_one_line(diagnosis: Diagnosis) -> str:
    """Return the diagnosis on one line, in English: the cause with its certainty and title, other possible
    causes, and the evidence."""
    from memfit.monitoring.remedies import title_of
    from memfit.types.sanitize import one_line

    others = f", or {', '.join(diagnosis.alternatives)}" if diagnosis.alternatives else ""
    title = f"{diagnosis.cause} ({diagnosis.certainty}{others}): {title_of(diagnosis.cause)}"
    return one_line("; ".join([title, *diagnosis.evidence]))


def _comparison_lines(
    comparison: memfit.workflows.autopsy_comparison.DeathComparison, words: Words
) -> Iterator[str]:
    peak, nearest = comparison.predicted.allocated_bytes, comparison.nearest
    predicted = words.get(
        "autopsy.predicted",
        plan=comparison.predicted.plan.label,
        peak=format_bytes(peak.value),
        low=format_bytes(peak.low),
        high=format_bytes(peak.high),
        needed=format_bytes(comparison.needed_bytes),
        limit=format_bytes(comparison.limit_bytes),
    )
    yield from _label_lines("predicted", [predicted], words)
    if comparison.measured_bytes is not None and comparison.excess_ratio is not None:
        measured = words.get(
            f"autopsy.measured_{'above' if comparison.excess_ratio >= 0 else 'below'}",
            measured=format_bytes(comparison.measured_bytes),
            excess=f"{abs(comparison.excess_ratio):.1%}",
        )
        yield from _label_lines("measured", [measured], words)
    if nearest is None:
        reason = words.of(comparison.why_not)
        yield from _label_lines("fits", [words.get("autopsy.no_plan", reason=reason)], words)
        return
    text = words.get(
        "autopsy.nearest", plan=nearest.plan.label, needed=format_bytes(comparison.nearest_bytes or 0)
    )
    if comparison.step_ratio is not None:
        text += words.get("autopsy.step_ratio", ratio=f"{comparison.step_ratio:.2f}")
    if nearest.step_s:
        text += words.get("autopsy.step", step=format_seconds(nearest.step_s.value))
    yield from _label_lines("fits", [text], words)


def _label_lines(label: str, texts: Sequence[str], words: Words) -> Iterator[str]:
    """Yield an indented line for each text. The first begins with the label in the language of ``words``, the
    others with as many spaces."""
    from rich.cells import cell_len, set_cell_size

    width = max(map(cell_len, words.all("autopsy.label"))) + 1
    for i, text in enumerate(texts):
        name = words.get(f"autopsy.label.{label}") if i == 0 else ""
        yield f"  {set_cell_size(name, width)}{' '.join(text.split())}"
