"""``memfit lengths``: show how the lengths of real data affect memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, MachineOptions
from memfit.cli.output import emit, print_table
from memfit.cli.request import machine_of, print_workload
from memfit.types.job import JobRef
from memfit.types.parsing import parse_bytes
from memfit.types.plan import Plan
from memfit.types.units import format_bytes

if TYPE_CHECKING:
    import memfit.workflows.sequence_lengths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """The data, the job, and how sequences are batched."""

    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="One length a line, or .fasta[.gz], .csv or .npz."),
    ]
    job: Annotated[
        str, typer.Option(metavar="JOB", help="A built-in job, FILE.py:NAME, or hf:PATH_OR_NAME.")
    ] = "protein-lm"
    size: Annotated[str | None, typer.Option(metavar="NAME", help="The job's size.")] = None
    batch: Annotated[int | None, typer.Option(metavar="N", min=1, help="Sequences per optimizer step.")] = (
        None
    )
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For example 24GiB. Default: the machine's.")
    ] = None
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="A plan file. Default: plain training.")
    ] = None
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which column of a .csv or array of an .npz.")
    ] = None
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longer sequences are cut to this.")
    ] = None
    extra_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Special tokens added to each sequence.")
    ] = 0


def lengths(options: LengthOptions, on: MachineOptions, output: JsonOptions) -> None:
    """Show how the lengths of your data affect memory.

    Prints the peak by padded length, the probability of running out of memory per step and per epoch, the
    batch to try first, and the batching method that saves most.
    """
    cap_bytes = parse_bytes(options.memory) if options.memory is not None else None
    machine = machine_of(on.on, "world")
    quiet_libraries()
    import memfit.workflows.sequence_lengths as house
    from memfit.jobs.registry import load, names
    from memfit.planner.workload import workload_of
    from memfit.techniques.plan_file import read_plan
    from memfit.types.serialization import to_plain

    values = house.read_lengths(options.file, column=options.column) + options.extra_tokens
    values = values.clip(max=options.max_length) if options.max_length else values
    size = options.size
    if options.job in names() and "@" not in (size or ""):
        size = f"{size or 'tiny'}@{max(16, int(values.max()))}"  # enough positions for the longest sequence
    job = load(JobRef(spec=options.job, size=size, batch=options.batch))
    found = house.report(
        job,
        values,
        batch=options.batch or job.batch_size,
        machine=machine,
        plan=read_plan(options.plan) if options.plan else Plan(),
        cap_bytes=cap_bytes or int(machine.device.memory_bytes.value),
    )
    workload = dataclasses.replace(
        workload_of(job, machine.name), batch_size=found.batch, length=found.longest, assumed=()
    )
    if output.json:
        emit({"workload": workload, **to_plain(found)})
    else:
        print_workload(workload, "en")
        _print(found)


def _print(found: memfit.workflows.sequence_lengths.LengthReport) -> None:
    print(f"{found.sequences} sequences, {found.batch} a step, the longest {found.longest}")
    print_table(("padded length", "predicted peak"), _sizes(found.curve_bytes.items()))
    print_table(("random batches", "predicted peak"), _sizes(found.quantile_bytes.items()))
    worst = max(abs(h.error_ratio) for h in found.held_out)
    print(f"on {len(found.held_out)} shapes that were not fitted: off by at most {worst:.2%}")
    fits = f"up to length {found.fits_up_to}" if found.fits_up_to else "at no length of the data"
    print(
        f"fits {format_bytes(found.cap_bytes)} {fits}, with {format_bytes(found.margin_bytes)} beside tensors"
    )
    print(f"chance to run out: {found.oom_per_step:.3g} a step, {found.oom_per_epoch:.3g} an epoch")
    print(
        f"try first the sequences {', '.join(map(str, found.first[:8]))}{' ...' if found.batch > 8 else ''}"
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
            for b in found.batchings
        ),
    )
    print(f"{found.best} saves most")


def _sizes(pairs: Iterable[tuple[object, int]]) -> Iterable[tuple[str, str]]:
    return ((str(name), format_bytes(size)) for name, size in pairs)
