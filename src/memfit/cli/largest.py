"""``memfit plan --largest``: the largest batch, length or other size that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.output import emit, print_table, refuse_options
from memfit.cli.progress import Bars
from memfit.cli.request import print_workload_of, writable
from memfit.types.errors import UserError
from memfit.types.plan import Plan
from memfit.types.sanitize import replace_controls
from memfit.types.units import format_bytes

if TYPE_CHECKING:
    import memfit.planner.largest
    import memfit.planner.request
    import memfit.workflows.largest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LargestOptions:
    """The size whose largest value is asked for, along which values of another size, for which plans, and
    where to write the answer for a sampler. None: not given."""

    largest: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE[,SIZE]",
            help="Instead of recommending a plan: the largest batch, length (seq_len), crop, atoms, "
            "rollout, hidden, layers or other size of the job (see --dim) that fits --memory, for each of "
            "several plans (see --plan). With two sizes, such as length,batch: the largest of the second "
            "for several values of the first. Every answer is traced, and so is the next larger value, "
            "which does not fit; a remark says if there is none, as when the job refuses it. Without "
            "--memory: what is free now of the memory of this machine's GPU; otherwise all memory of the "
            "device. With --measure, values are also trained on this machine for three steps each under a "
            "hard cap, in at most 16 runs for each answer, until the largest has run twice with 0.5 MiB "
            "or 0.25 % less than that size, and the next one has run out of memory twice with as much more. "
            "If nothing fits, the exit code is 3. Not with --from, --diff, --save, --corrected-by, "
            "--deadline, --budget, --micro-batch or --explain-infeasible, and with --lang ja only as "
            "--json. Example: memfit plan "
            "protein-lm --largest batch --on H100-SXM.",
        ),
    ] = None
    plans: Annotated[
        list[Path] | None,
        typer.Option(
            "--plan",
            metavar="FILE.yaml",
            help="With --largest: answer for the plan in this file, as written by --save. Can be given "
            "several times. Default: at most four plans of a search: the recommended one, plain training, "
            "and others of the frontier; with --buckets, the recommended one. With --diff: print the edit "
            "for this plan, which can be given once. Refused without --largest or --diff.",
        ),
    ] = None
    values: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="With --largest and two sizes, otherwise refused: the values of the first, whole numbers "
            "of at least 1. Default: a quarter, half, once, twice and four times the job's own value. Not "
            "with --buckets.",
        ),
    ] = None
    buckets: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...|FILE",
            help="With --largest batch, otherwise refused: the largest batch for each of several lengths to "
            "which sequences are padded. N,N,...: these lengths. FILE, as for `memfit estimate --lengths`: "
            "the lengths, multiples of 8, of at most 8 buckets that hold about equally many sequences of "
            "FILE each. Not with --values.",
        ),
    ] = None
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --largest, otherwise refused: try only multiples of N that the job and the plan can "
            "have. Default: all values that they can have, such as a batch that the ranks and micro-batches "
            "divide.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="With --buckets or two sizes in --largest, otherwise refused: write the answer for the "
            'first plan to this file as one JSON object for a sampler, such as {"128": 96, "256": 40}. A '
            "value of the first size for which nothing fits is left out. An existing file is refused without "
            "--force.",
        ),
    ] = None


def refuse_without_largest(options: LargestOptions) -> None:
    """Raise UserError if --plan, --values, --buckets, --step or --out is given. Call it if neither --largest
    nor --diff is."""
    names = {
        "--plan": options.plans,
        "--values": options.values,
        "--buckets": options.buckets,
        "--step": options.step,
        "--out": options.out,
    }
    hint = "give --largest batch, or another size of the job"
    refuse_options(names, "cannot be used without --largest", hint=hint)


def print_largest(
    job_request: memfit.planner.request.Request,
    options: LargestOptions,
    *,
    as_json: bool,
    force: bool,
    measure: bool = False,
) -> None:
    """Find the largest values that ``options`` ask for, print them, and write them to the file of --out, if
    it is given. The exit code is 3 if nothing fits under any plan. ``force``: whether an existing file is
    replaced; ``measure``: whether values are run under the cap, too. Raises UserError as `_question` does,
    for sizes that the job does not have, for a file of a plan that cannot be read, for a file of --out that
    cannot be written, and if ``measure`` is not possible."""
    along, dimension, values = _question(options)
    if options.out is not None:
        if not along:
            raise UserError(
                "--out needs --buckets or two sizes in --largest",
                allowed="--largest length,batch --out FILE.json, or --largest batch --buckets LENGTHS --out "
                "FILE.json",
            )
        writable(options.out, overwrite=force)
    from memfit.files.replace import write_whole
    from memfit.techniques.plan_file import read_plan
    from memfit.types.serialization import dumps
    from memfit.workflows.largest import largest

    plans = [read_plan(path) for path in options.plans or ()]
    workload = print_workload_of(job_request, lang="en", quiet=as_json)
    with Bars("en") as progress:
        report = largest(
            job_request,
            dimension,
            along=along,
            values=values,
            plans=plans,
            most_plans=1 if options.buckets else None,
            step=options.step,
            measure=measure,
            progress=progress,
        )
    if options.out is not None:
        write_whole(options.out, (dumps(report.buckets, indent=2) + "\n").encode())
    if as_json:
        emit({"workload": workload, **_plain(report)})
    else:
        _print(report)
        if options.out is not None:
            print(f"written to {options.out}")
    if all(row.result is None or row.result.value is None for row in report.rows):
        raise typer.Exit(3)


def _question(options: LargestOptions) -> tuple[str, str, list[int]]:
    """Return (the first of two sizes, "" for one size; the size whose largest value is asked for; the values
    of the first size, none for the default). With --buckets, the first size is "length", and its values are
    the lengths in ascending order. That the job has these sizes is not checked. Raises UserError for a
    --largest that is not one name or two; for --buckets with another --largest than batch or batch_size, or
    with --values; for --values with one size; for --values and --buckets that are not whole numbers of at
    least 1; and as `read_lengths` does for the file of --buckets."""
    names = [name.strip() for name in (options.largest or "").split(",")]
    if not all(names) or len(names) > 2:
        raise UserError(
            f"--largest {options.largest} is neither one size nor two with a comma",
            allowed="the name of one size, such as batch, or of two with a comma, such as length,batch",
        )
    if options.buckets is not None:
        if names not in (["batch"], ["batch_size"]) or options.values:
            raise UserError(
                "--buckets gives lengths for which --largest finds the largest batch",
                allowed="--largest batch --buckets LENGTHS, without --values",
            )
        return "length", names[0], _bucket_lengths(options.buckets)
    if len(names) == 1:
        if options.values:
            raise UserError(
                "--values needs two sizes in --largest",
                allowed="two sizes, such as --largest length,batch --values 128,256",
            )
        return "", names[0], []
    return names[0], names[1], _numbers("--values", options.values) if options.values else []


def _bucket_lengths(text: str) -> list[int]:
    if not Path(text).is_file():
        return sorted(_numbers("--buckets", text))
    from memfit.workflows.largest import bucket_edges
    from memfit.workflows.sequence_lengths import read_lengths

    return bucket_edges(read_lengths(text))


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        no_file = ", and there is no such file" if option == "--buckets" else ""
        raise UserError(
            f"{option} {text} is not a list of whole numbers{no_file}",
            allowed="whole numbers of at least 1 with commas, such as 128,256,512"
            + (", or the path of a file" if option == "--buckets" else ""),
        )
    return [int(part) for part in parts]


def _plain(report: memfit.workflows.largest.LargestReport) -> dict[str, object]:
    from memfit.types.serialization import to_plain

    plain: dict[str, object] = to_plain(report)
    rows = [
        {
            "label": row.plan.label,
            "largest": row.result.value if row.result else None,
            "largest_expected": row.result.expected.value if row.result and row.result.expected else None,
            **to_plain(row),
        }
        for row in report.rows
    ]
    return plain | {"rows": rows, "buckets": dict(report.buckets) if report.along else None}


def _print(report: memfit.workflows.largest.LargestReport) -> None:
    along = [report.along] if report.along else []
    print(
        f"Largest {report.dimension} that fits {format_bytes(report.cap_bytes)} of one device "
        f"({report.cap_reason})"
    )
    numbers = {plan: str(n) for n, plan in enumerate(dict.fromkeys(r.plan for r in report.rows), start=1)}
    runs = [row.result.measured for row in report.rows if row.result and row.result.measured]
    columns = ("ran", "ran out of memory") if runs else ()
    print_table(
        (
            "plan",
            *along,
            f"largest {report.dimension}",
            "needs",
            "next",
            "needs",
            "expected up to",
            *columns,
            "speed",
        ),
        [
            (numbers[row.plan], *([str(row.value)] if along else []), *_cells(row, has_runs=bool(runs)))
            for row in report.rows
        ],
    )
    for plan, number in numbers.items():
        print(f"plan {number}: {plan.label}")
    print(
        "largest: safe, with the margin that memfit keeps; expected up to: the largest whose expected memory "
        "fits without it, which may run out of memory"
    )
    if runs:
        limit = next((size.limit for m in runs for size in m.runs if size.limit), "")
        count = sum(len(measured.runs) for measured in runs)
        print(
            f"ran, ran out of memory: measured under a hard cap of {format_bytes(report.cap_bytes)} "
            f"({limit}), {runs[0].steps} steps each, {count} runs"
        )
    for line in _remarks(report, numbers):
        print(replace_controls(line))


def _cells(row: memfit.workflows.largest.LargestRow, *, has_runs: bool) -> tuple[str, ...]:
    """Return the cells of a row of the table after its plan and value: the largest value that fits and what
    it needs, the next value and what it needs, the largest that is expected to fit; if ``has_runs``, the
    largest that ran and the smallest above it that ran out of memory; and the speed. ``has_runs``: whether
    any value of the table was run."""
    result = row.result
    if result is None:
        return ("none", "", "", "", "", *(("", "") if has_runs else ()), "")
    safe, following, expected = result.safe, result.safe_next, result.expected
    return (
        str(safe.value) if safe else "none",
        format_bytes(safe.needed_bytes) if safe else "",
        str(following.value) if following else "",
        ("refused" if following.problem else format_bytes(following.needed_bytes)) if following else "",
        str(expected.value) if expected else "none",
        *(_measured_cells(result.measured) if has_runs else ()),
        _speed(safe),
    )


def _measured_cells(measured: memfit.planner.largest.MeasuredLargest | None) -> tuple[str, str]:
    if measured is None:
        return "", ""
    ran, died = measured.ran, measured.died
    return str(ran.value) if ran else "none", str(died.value) if died else "none"


def _speed(size: memfit.planner.largest.TracedSize | None) -> str:
    if size is None or size.samples_per_s is None:
        return ""
    if size.tokens_per_s is not None:
        return f"{size.samples_per_s:.3g} samples/s ({size.tokens_per_s:.3g} tokens/s)"
    return f"{size.samples_per_s:.3g} samples/s"


def _remarks(report: memfit.workflows.largest.LargestReport, numbers: Mapping[Plan, str]) -> Iterator[str]:
    from memfit.planner.largest import LIMIT_TEXTS

    lines: dict[str, None] = {}
    for row in report.rows:
        where = f"plan {numbers[row.plan]}"
        if row.value is not None:
            where += f", {report.along} {row.value}"
        result = row.result
        if result is None:
            lines[f"{where}: {row.problem}"] = None
        elif result.limit == "job" and result.safe_next is not None:
            lines[f"{where}: the limit is not the memory of the training: {result.safe_next.problem}"] = None
        elif result.limit != "memory":
            lines[f"{where}: {LIMIT_TEXTS[result.limit]}"] = None
        elif result.safe is None and result.safe_next is not None:
            smallest = result.safe_next
            lines[
                f"{where}: no {report.dimension} fits; the smallest, {smallest.value}, needs "
                f"{format_bytes(smallest.needed_bytes)}{f'; {smallest.host}' if smallest.host else ''}"
            ] = None
        elif result.safe_next is not None and result.safe_next.host:
            lines[f"{where}: the host's memory is the limit: the next {result.safe_next.host}"] = None
        if result is not None and result.measured is not None:
            lines |= dict.fromkeys(f"{where}: {text}" for text in _measured_remarks(result))
    yield from lines
    yield from (f"note: {note}" for note in report.notes)


def _measured_remarks(result: memfit.planner.largest.LargestValue) -> Iterator[str]:
    measured = result.measured
    assert measured is not None
    if (failed := measured.failed) is not None:
        yield f"{failed.value} ended in another way, so no further value was run: {failed.reason}"
        return
    for value in measured.uncertain:
        yield f"{value} is too near the cap to tell whether it runs each time"
    ran, died = measured.ran, measured.died
    if ran and died and not measured.uncertain and died.value - ran.value > result.step:
        yield f"no value between {ran.value} and {died.value} was run"
