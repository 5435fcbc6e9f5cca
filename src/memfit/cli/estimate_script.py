"""``memfit estimate -- COMMAND``: predict the memory of a training script as it is, before it trains."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.estimate_job import TraceFileOptions, write_trace_files
from memfit.cli.options import DEFAULT_WITHIN, SearchOptions
from memfit.cli.output import check_choice, console, emit
from memfit.cli.plan_diff import edit_of, excluded_from, print_edit
from memfit.cli.progress import Bars
from memfit.cli.request import machine_of, parse_cap, writable
from memfit.types.errors import UserError
from memfit.types.parsing import parse_time_limit
from memfit.types.plan import Accuracy
from memfit.types.result import NOT_INCLUDED_OF_SCRIPTS

if TYPE_CHECKING:
    from memfit.capture.result import ScriptAnswer
    from memfit.export.script_diff import ScriptDiff
    from memfit.export.source_edits import Source
    from memfit.report.explain_terminal import ScriptFacts
    from memfit.types.machine import Machine
    from memfit.types.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptOptions:
    """How the script is run, and whether plans for it are searched, saved and printed as an edit."""

    bound: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py:LINE=N",
            help="For a COMMAND, otherwise refused: the true number for a line of your code whose result "
            "depends on data, in place of the one that memfit assumed: how many elements its operator "
            "gives (with a decimal point: the share of all that are possible, such as 0.25), or what "
            "item() returns, or of a truth value, how often in a row it is true. The answer names these "
            "lines, as they are to be written here; other lines are ignored. Repeat the option for further "
            "lines. Default: memfit's assumptions.",
        ),
    ] = None
    plans: Annotated[
        bool,
        typer.Option(
            "--plans",
            help="For a COMMAND, otherwise refused: also search for plans, as `memfit plan` does: "
            "techniques with which the script's step fits the memory, and what each costs in time. Default: "
            "only the estimate of the script as it is.",
        ),
    ] = False
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="With --plans, otherwise refused: write the recommended plan to this file, for "
            "memfit.apply in the script. An existing file is refused. Without a plan to recommend, the exit "
            "code is 3. Default: the plan is only printed.",
        ),
    ] = None
    diff: Annotated[
        bool,
        typer.Option(
            "--diff",
            help="With --plans, otherwise refused: print, after the rest, the edit of the script that "
            "applies the recommended plan or, if the script cannot express that, the fastest other that "
            "fits, as a diff for `patch -p0`; if the script cannot be edited, the lines to insert by hand. "
            "The script itself is not changed. Refused for a command that runs a module. Default: no edit.",
        ),
    ] = False
    show_output: Annotated[
        bool,
        typer.Option(
            "--show-output",
            help="For a COMMAND, otherwise refused: show on standard error what the script prints. Default: "
            "hidden.",
        ),
    ] = False
    time_limit: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="For a COMMAND, otherwise refused: end the script, and fail, if it has not reached its "
            "second optimizer step after so many seconds, at least 1. The prediction after it, and a search "
            "for plans, are not limited by this. Default: 1800 (half an hour).",
        ),
    ] = 1800.0


def estimate_command(
    command: list[str],
    options: ScriptOptions,
    files: TraceFileOptions,
    search_options: SearchOptions,
    on: str,
    *,
    within: str | None,
    lang: str,
    as_json: bool,
) -> None:
    """Run ``command`` until its second optimizer step, print the predicted memory, and with --plans the plans
    that a search finds; write ``files`` and the file of --save. ``on``, ``within``: the machine and the time
    limit of the search, as in --on and --within. The exit code is 3 if there is no plan for --save. Raises
    UserError for wrong options and options that do not go together, for a file that cannot be written, and as
    `estimate_script` does; with --diff also as `_script_source` does, and if no edit expresses a plan."""
    parse_cap(search_options.memory)
    within_s = parse_time_limit(DEFAULT_WITHIN if within is None else within)
    if within is not None and not options.plans:
        raise UserError(
            "--within is the time limit of a search for plans, which needs --plans",
            hint="add --plans, or leave out --within",
        )
    if (options.save is not None or options.diff) and not options.plans:
        raise UserError(
            "--save and --diff write a recommended plan, for which --plans searches", hint="add --plans"
        )
    source, without = _script_source(command) if options.diff else (None, ())
    if options.save is not None:
        hint = f"delete it (rm {shlex.quote(str(options.save))}) and repeat the command, or name another file"
        writable(options.save, overwrite=False, hint=hint)
    for path in files.paths:
        writable(path)
    machine = machine_of(on, "world")  # may load torch
    cap_bytes = parse_cap(search_options.memory, machine)
    with Bars(lang) as progress:
        progress("script", 0, 0, " ".join(command))
        from memfit.capture.estimate import estimate_script
        from memfit.capture.result import PlanSearch
        from memfit.planner.selection import Objective

        search = PlanSearch(
            cap_bytes=cap_bytes,
            goal=Objective(check_choice("--goal", search_options.goal, Objective)),
            accuracy=Accuracy(check_choice("--accuracy", search_options.accuracy, Accuracy)),
            without=without,
            within_s=within_s,
        )
        answer = estimate_script(
            command,
            machine=on,
            bound=_bounds(options.bound or []),
            search=search if options.plans else None,
            limit_s=options.time_limit,
            show_output=options.show_output,
            whole_trace=bool(files.paths),
        )
    facts = _facts(answer, machine, cap_bytes)
    if cap_bytes is not None and answer.estimate is not None:  # its chance is for all memory of the device
        answer = dataclasses.replace(
            answer, estimate=dataclasses.replace(answer.estimate, oom_probability=None)
        )
    _show(answer, facts, command, options, files, source, lang=lang, as_json=as_json)
    if options.save is not None and (answer.plans is None or answer.plans.recommended is None):
        raise typer.Exit(3)


def _bounds(texts: list[str]) -> dict[str, int | float] | None:
    bounds: dict[str, int | float] = {}
    for text in texts:
        line, separator, number = text.rpartition("=")
        try:
            bounds[line] = float(number) if "." in number else int(number)
        except ValueError:
            separator = ""
        if not (line and separator):
            raise UserError(
                f"--bound {text} is not FILE.py:LINE=N",
                allowed="FILE.py:LINE=N with a number N, such as train.py:12=4096",
            )
    return bounds or None


def _show(
    answer: ScriptAnswer,
    facts: ScriptFacts,
    command: list[str],
    options: ScriptOptions,
    files: TraceFileOptions,
    source: Source | None,
    *,
    lang: str,
    as_json: bool,
) -> None:
    from rich.text import Text

    from memfit.files.replace import write_whole
    from memfit.report.explain import TracedEstimate, contributors
    from memfit.report.explain_terminal import print_script
    from memfit.report.terminal import print_search
    from memfit.report.words import load_words
    from memfit.techniques.plan_file import plan_text
    from memfit.types.device_kind import device_kind

    assert answer.estimate is not None and answer.trace is not None and answer.peak_clock is not None
    on_host = device_kind(answer.trace.device).is_host
    explained = TracedEstimate(estimate=answer.estimate, trace=answer.trace, peak_clock=answer.peak_clock)
    write_trace_files(explained, files, lang=lang, job=answer.program)
    recommended = answer.plans.recommended if answer.plans is not None else None
    if options.save is not None and recommended is not None:
        note = f"for {' '.join(command)}"
        write_whole(options.save, plan_text(recommended.estimate.plan, note=note).encode())
    if as_json:
        from memfit.cli.views import estimate_view, search_view

        estimate = {**estimate_view(answer.estimate), "not_included": list(NOT_INCLUDED_OF_SCRIPTS)}
        view: dict[str, Any] = {"script": facts, "estimate": estimate}
        if options.plans:
            view["plans"] = search_view(answer.plans) if answer.plans else None
            view["no_plans"] = answer.no_plans
        if source is not None and answer.plans is not None and recommended is not None:
            view["edit"] = _edit(source, answer, on_host=on_host)
        emit({**view, "contributors": contributors(explained)})
        return
    print_script(explained, facts, console=console(), lang=lang)
    if answer.plans is not None:
        key = "ranks" if answer.ranks > 1 else "split" if answer.micro_batches > 1 else "plain"
        words = load_words(lang).get(f"script.{key}", count=answer.micro_batches, ranks=answer.ranks)
        console().print(Text(words, style="yellow"))
        print_search(answer.plans, console=console(), lang=lang)
    elif options.plans:
        console().print(Text(answer.no_plans, style="yellow"))
    if source is not None and answer.plans is not None and recommended is not None:
        if not _is_as_it_is(source, answer):
            print_edit(
                source,
                *_edit_of(source, answer, on_host=on_host),
                as_json=False,
            )
        else:
            print(f"{source.path} needs no edit: plain training, as it is, is recommended.", file=sys.stderr)


def _facts(answer: ScriptAnswer, machine: Machine, cap_bytes: int | None) -> ScriptFacts:
    """Return what is printed of the script beside its estimate: what it trains, and whether it fits
    ``cap_bytes`` of one device, None for all its memory. If the script needs more before its first step, or
    in an evaluation, than in a step, the needed memory is larger in the same proportion. Batches in shared
    memory are added."""
    from memfit.planner.capacity import fits_under, needed_bytes
    from memfit.report.explain_terminal import ScriptFacts

    assert answer.estimate is not None and answer.trace is not None
    cap_bytes = cap_bytes or int(machine.device.memory_bytes.value)
    needed = needed_bytes(answer.estimate, machine)
    step_bytes = answer.estimate.allocated_bytes.value
    if (other_bytes := max(answer.before_training_bytes, answer.evaluation_bytes)) > step_bytes:
        needed = max(needed, int(needed / step_bytes * other_bytes))
    needed += answer.shared_bytes
    return ScriptFacts(
        program=answer.program,
        model=answer.model,
        parameter_count=answer.trace.parameter_count,
        trainable_count=answer.trace.trainable_count,
        optimizers=answer.optimizers,
        machine=machine.name,
        ranks=answer.ranks,
        cap_bytes=cap_bytes,
        needed_bytes=needed,
        fits=needed <= cap_bytes and fits_under(cap_bytes, machine)(answer.estimate),
        notes=answer.notes,
        steps=answer.steps,
        growth_bytes=answer.growth_bytes,
    )


def _edit_of(source: Source, answer: ScriptAnswer, *, on_host: bool) -> tuple[Plan, ScriptDiff]:
    """Return what `edit_of` does for the plans of ``answer``."""
    assert answer.plans is not None
    return edit_of(
        source,
        answer.plans,
        answer.batch_size,
        {},
        keeps_enabled=True,
        on_host=on_host,
        own_micro_batches=answer.micro_batches,
    )


def _is_as_it_is(source: Source, answer: ScriptAnswer) -> bool:
    """Return whether plain training is recommended and the script makes that already."""
    from memfit.export.script_diff import trains_plainly

    assert answer.plans is not None and answer.plans.recommended is not None
    is_plain = answer.plans.recommended.estimate.plan == answer.plans.baseline.estimate.plan
    return is_plain and trains_plainly(source, answer.ranks)


def _edit(source: Source, answer: ScriptAnswer, *, on_host: bool) -> ScriptDiff:
    """Return the edit of the script for the recommended plan or, if the script cannot express that, the
    fastest other that fits. It is empty if plain training is recommended, which is the script as it is. If no
    plan can be expressed, it has no diff, and its ``reason`` says why."""
    from memfit.export.script_diff import ScriptDiff

    assert answer.plans is not None and answer.plans.recommended is not None
    if _is_as_it_is(source, answer):
        return ScriptDiff(diff="")
    try:
        return _edit_of(source, answer, on_host=on_host)[1]
    except UserError as error:
        return ScriptDiff(diff="", reason=str(error))


def _script_source(command: list[str]) -> tuple[Source, tuple[str, ...]]:
    """Return (the source of the script that the command runs; what `excluded_from` returns for it). Raises
    UserError if the script cannot be read or is not Python, if the command runs a module, and as
    `load_program` does."""
    from memfit.capture.program import load_program
    from memfit.export.script_diff import read_script

    program = load_program(command)
    if not program.script:
        raise UserError(
            "--diff edits a script, but the command runs a module with -m",
            hint="name the path of the module's file in place of -m MODULE, if it runs as a script, too",
        )
    source = read_script(Path(program.script))
    return source, excluded_from(source, program.ranks)
