"""``memfit estimate JOB --lengths FILE``: show how the lengths of the user's sequences affect memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JobOptions
from memfit.cli.output import check_choice, emit, print_table
from memfit.cli.request import machine_of, parse_cap, print_workload
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.machine import Machine
from memfit.types.plan import Plan
from memfit.types.units import format_bytes

if TYPE_CHECKING:
    import memfit.workflows.sequence_lengths

_DEFAULT_JOB = "protein-lm"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """The file with the lengths of sequences, None for no question about lengths, and how it is read."""

    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="For a JOB (default here: protein-lm): show how the lengths of your sequences affect the "
            "memory of training: the predicted peak of a batch by padded length and of random batches, "
            "the longest length that fits, the probability of running out of memory, the batch to try "
            "first, and six ways to make batches, such as sorted by length or packed. FILE has the "
            "sequences or their lengths. .fasta, .fa or .faa (also with .gz): the sequences, of which "
            "each letter counts as a token; .csv with a header line, or .npz: the lengths (see --column); "
            "any other file: the lengths, one whole number per line. For two sizes of each sample, see "
            "--columns. Without --size NAME@N a built-in job gets as many positions as the longest "
            "sequence has, at least 64. A step trains --batch sequences (default: the job's number), or "
            "all if FILE has fewer. --memory: by default all memory of one device of --on. Jobs whose "
            "samples have no length are refused without --columns. Of the options of a JOB, only --size, "
            "--batch, --plan, --memory and --on can be used with it, and --lang ja only with --json.",
        ),
    ] = None
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --lengths: name of the column of the .csv file, or of the one-dimensional array of "
            "the .npz file, that holds the lengths. Default: the first column whose first value is a whole "
            "number, or the first such array of whole numbers. Ignored for other files. Not with --columns. "
            "Refused without --lengths.",
        ),
    ] = None
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="With --lengths, otherwise refused: two sizes of each sample instead of one length, such "
            "as nodes,edges or crop,rows: columns of a .csv file or keys of the lines of a .jsonl file; "
            "other files are refused. The job must have sizes of these names (see `memfit plan --largest`). "
            "A step trains --batch samples (default: one), whose sizes --combine combines. Not with "
            "--column, --max-length and --extra-tokens.",
        ),
    ] = None
    combine: Annotated[
        str,
        typer.Option(
            metavar="sum|largest",
            help="With --columns: how the two sizes of a step follow from those of its samples. sum (the "
            "default): each size is the sum over the samples, as of graphs in one batch; largest: each is "
            "that of the largest sample, as of padded samples. Ignored without --columns; largest is "
            "refused without --lengths.",
        ),
    ] = "sum"
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --lengths, otherwise refused: cut each sequence, its --extra-tokens included, to at "
            "most N tokens. Default: not cut. Not with --columns.",
        ),
    ] = None
    extra_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="With --lengths: number of special tokens to add to the length of each sequence, before it "
            "is cut to --max-length. Default: 0. Another number is refused with --columns and without "
            "--lengths.",
        ),
    ] = 0


def print_lengths(
    options: LengthOptions,
    job_options: JobOptions,
    plan: Path | None,
    memory: str | None,
    on: str,
    *,
    as_json: bool,
) -> None:
    """Print the answer to --lengths. ``job_options``: only its job, size and batch are used; ``plan``: the
    plan file, None for plain training; ``memory``: that of one device, None for all of it; ``on``: the
    machine, as in --on. Raises UserError for wrong options and files, and for a job whose samples have no
    length."""
    assert options.lengths is not None
    spec = job_options.job or _DEFAULT_JOB
    parse_cap(memory)
    machine = machine_of(on, "world")
    cap_bytes = parse_cap(memory, machine)
    if options.columns is not None:
        _print_two_sizes(options, spec, job_options, plan, machine, cap_bytes, as_json=as_json)
        return
    quiet_libraries()
    from memfit.jobs.registry import load, names
    from memfit.planner.workload import workload_of
    from memfit.techniques.plan_file import read_plan
    from memfit.types.serialization import to_plain
    from memfit.workflows import sequence_lengths

    values = sequence_lengths.read_lengths(options.lengths, column=options.column) + options.extra_tokens
    values = values.clip(max=options.max_length) if options.max_length else values
    size = job_options.size
    if spec in names() and "@" not in (size or ""):
        size = f"{size or 'tiny'}@{max(64, int(values.max()))}"  # enough positions for all that is traced
    try:
        job = load(JobRef(spec=spec, size=size, batch=job_options.batch))
    except UserError:
        if size != job_options.size and not load(JobRef(spec=spec, size=job_options.size)).tokens_per_batch:
            raise UserError(
                f"--lengths cannot be used with the job {spec}, whose samples have no length",
                allowed="a job whose samples are sequences, such as protein-lm",
                hint="--columns takes two other sizes of each sample",
            ) from None
        raise
    length_report = sequence_lengths.report(
        job,
        values,
        batch=job_options.batch or job.batch_size,
        machine=machine,
        plan=read_plan(plan) if plan else Plan(),
        cap_bytes=cap_bytes or int(machine.device.memory_bytes.value),
    )
    workload = dataclasses.replace(
        workload_of(job, machine.name),
        batch_size=length_report.batch,
        length=length_report.longest,
        assumed=(),
    )
    if as_json:
        emit({"workload": workload, **to_plain(length_report)})
    else:
        print_workload(workload, "en")
        _print(length_report)


def _print_two_sizes(
    options: LengthOptions,
    spec: str,
    job_options: JobOptions,
    plan: Path | None,
    machine: Machine,
    cap_bytes: int | None,
    *,
    as_json: bool,
) -> None:
    """Print how the two sizes of each sample (--columns) affect memory. Raises UserError for wrong options or
    files."""
    names = tuple(name.strip() for name in (options.columns or "").split(","))
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UserError(
            f"--columns {options.columns} does not name two different sizes",
            allowed="two different names with a comma, such as nodes,edges",
        )
    if options.column or options.max_length or options.extra_tokens:
        raise UserError(
            "--columns cannot be used with --column, --max-length or --extra-tokens",
            hint="leave out --columns, or these three options",
        )
    quiet_libraries()
    from memfit.techniques.plan_file import read_plan
    from memfit.types.serialization import to_plain
    from memfit.workflows.size_pairs import COMBINATIONS, read_pairs, report_pairs

    report = report_pairs(
        JobRef(spec=spec, size=job_options.size),
        (names[0], names[1]),
        read_pairs(options.lengths or "", (names[0], names[1])),
        batch=job_options.batch or 1,
        combination=check_choice("--combine", options.combine, COMBINATIONS),
        plan=read_plan(plan) if plan else Plan(),
        machine=machine,
        cap_bytes=cap_bytes or int(machine.device.memory_bytes.value),
    )
    if as_json:
        emit(to_plain(report))
        return
    print(f"{report.samples} samples, {report.batch} per step ({report.combination} of their sizes)")
    rows = [
        (name, *map(str, report.quantile_sizes[name]), format_bytes(size))
        for name, size in report.quantile_bytes.items()
    ]
    print_table((f"{report.draws} random steps", *report.names, "predicted peak"), rows)
    worst = max(abs(h.error_ratio) for h in report.held_out)
    print(f"on {len(report.held_out)} steps that the fit did not use: the error is at most {worst:.2%}")
    print(
        f"probability of running out of {format_bytes(report.cap_bytes)}: {report.oom_per_step:.3g} per "
        f"step, with {format_bytes(report.margin_bytes)} kept free for memory beside the tensors"
    )


def _print(report: memfit.workflows.sequence_lengths.LengthReport) -> None:
    print(f"{report.sequences} sequences, {report.batch} per step, the longest has length {report.longest}")
    print_table(("padded length", "predicted peak"), _sizes(report.curve_bytes.items()))
    print_table(("random batches", "predicted peak"), _sizes(report.quantile_bytes.items()))
    worst = max(abs(h.error_ratio) for h in report.held_out)
    print(f"on {len(report.held_out)} shapes that the fit did not use: the error is at most {worst:.2%}")
    fits = f"up to length {report.fits_up_to}" if report.fits_up_to else "at no length of the data"
    print(
        f"fits {format_bytes(report.cap_bytes)} {fits}, with {format_bytes(report.margin_bytes)} kept free "
        "for memory beside the tensors"
    )
    print(
        f"probability of running out of memory: {report.oom_per_step:.3g} per step, "
        f"{report.oom_per_epoch:.3g} per epoch"
    )
    print(
        "batch to try first: sequences "
        f"{', '.join(map(str, report.first[:8]))}{' ...' if report.batch > 8 else ''}"
    )
    print_table(
        ("batching", "highest peak", "fits", "steps", "padding", "attention wasted"),
        (
            (
                b.name,
                format_bytes(b.peak_bytes),
                "yes" if b.fits else "no",
                str(b.steps),
                f"{b.wasted_ratio:.1%}",
                f"{b.attention_wasted_ratio:.1%}",
            )
            for b in report.batchings
        ),
    )
    print(f"{report.best} saves most memory")


def _sizes(pairs: Iterable[tuple[object, int]]) -> Iterable[tuple[str, str]]:
    return ((str(name), format_bytes(size)) for name, size in pairs)
