"""Convert options to the request that the planner takes, and other steps that several commands share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import (
    DEFAULT_WITHIN,
    DeviceOptions,
    JobOptions,
    PlanOptions,
    RuntimeOptions,
    SearchOptions,
)
from memfit.cli.output import check_choice, console, emit
from memfit.cli.progress import Bars
from memfit.cost.host import with_host_memory
from memfit.files.replace import is_stream, must_be_writable
from memfit.types.errors import Interrupted, UserError
from memfit.types.machine import Calibration, Machine
from memfit.types.parsing import parse_bytes, parse_time_limit
from memfit.types.plan import Accuracy, Bounds, Plan
from memfit.types.result import SearchResult
from memfit.types.sanitize import one_line
from memfit.types.units import format_bytes
from memfit.types.workload import Workload

if TYPE_CHECKING:
    import memfit.planner.request


def request(
    job: JobOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    on: str = "this",
    *,
    ranks: int = 1,
    bounds: Bounds | None = None,
    has_nproc: bool = False,
    plans: Sequence[Plan] = (),
) -> memfit.planner.request.Request:
    """Return the options as a request to the planner. The job itself is not built yet.

    ``on``: the machine, as in --on; ``ranks``: the number of processes, of --nproc or a plan; ``bounds``:
    further limits on the plan, None for none; ``has_nproc``: whether the command has the option --nproc;
    ``plans``: those that the user gave. Prints to standard error which accelerator of this machine is used,
    and a warning for each module beside the job's file that the job imports but for which Python finds
    another of that name.

    Raises UserError for an invalid option; for more ranks than this machine has accelerators, if it has any;
    and on another machine with accelerators, if ``ranks`` is neither 1 nor their number.
    """
    accuracy = Accuracy(check_choice("--accuracy", search_options.accuracy, Accuracy))
    parse_cap(search_options.memory)
    machine = machine_of(on, runtime.place)
    cap_bytes = parse_cap(search_options.memory, machine)
    if search_options.host_memory is not None:
        machine = with_host_memory(machine, parse_bytes(search_options.host_memory))
    count = machine.device_count
    processes = f"--nproc {ranks}" if has_nproc else f"a plan of {ranks} ranks"
    if machine.is_here and not machine.device.is_host:
        use_all = "--nproc {0} uses all {0}" if has_nproc else "`memfit plan --nproc {0}` plans for all {0}"
        if ranks > count:
            raise UserError(
                f"{processes} is more than the {count} device{'s' * (count > 1)} of this machine "
                f"({machine.device.name})",
                allowed=f"1 to {count}, one process for each device",
                hint="`--on this:cpu` uses the processor, with any number of processes",
            )
        _say_device(machine, ranks, "" if any(plan.ranks > 1 for plan in plans) else use_all)
    elif ranks > 1 and not machine.device.is_host and ranks != count:
        from memfit import catalog

        device = machine.device.name
        raise UserError(
            f"{processes} does not suit {machine.name}, which has {count} device{'s' * (count > 1)}",
            allowed=f"{count}, one process per device, or 1",
            hint=f"or set the number of devices with --on, such as --on {ranks}x{device}"
            if device in catalog.device_names()
            else "",
        )
    within_s = parse_time_limit(DEFAULT_WITHIN if runtime.within is None else runtime.within)
    warn_of_shadowed_modules(job.spec)
    quiet_libraries()
    from memfit.engines.registry import engine
    from memfit.planner.request import Request
    from memfit.planner.selection import Objective

    return Request(
        job_ref=job.ref,
        machine=machine,
        cap_bytes=cap_bytes,
        goal=Objective(check_choice("--goal", search_options.goal, Objective)),
        accuracy=accuracy,
        threads=runtime.threads or 0,
        engine=engine(search_options.engine or "native").name,
        ranks=ranks,
        bounds=bounds or Bounds(),
        recalibrate=runtime.recalibrate,
        within_s=within_s,
        continues=runtime.within is not None,
    )


def warn_of_shadowed_modules(job: str) -> None:
    """Print one warning to standard error for each module in the folder of the user's job that the job
    imports, directly or through other such modules, but for which Python finds another module of that name.
    ``job``: the job as in --job or JOB; nothing is printed for one that is not FILE.py:NAME."""
    from memfit.jobs.user_job import shadowed_modules

    for line in shadowed_modules(job):
        print(f"memfit: warning: {one_line(line)}", file=sys.stderr)


def print_workload_of(search_request: memfit.planner.request.Request, *, lang: str, quiet: bool) -> Workload:
    """Return what the answer to the request is about: the model, the data of a step, and the machine. Print
    it on standard output in the language ``lang``, unless ``quiet``. Raises UserError if the job cannot be
    loaded."""
    from memfit.jobs.registry import load
    from memfit.planner.workload import stored_workload

    ref = search_request.job_ref
    workload = stored_workload(ref, load(ref), search_request.machine.name)
    if not quiet:
        print_workload(workload, lang)
    return workload


def print_workload(workload: Workload, lang: str) -> None:
    """Print what an answer is about, the model, the data of a step and the machine, on standard output in the
    language ``lang``."""
    from rich.text import Text

    from memfit.report.words import load_words
    from memfit.report.workload_text import workload_text

    console().print(Text(workload_text(workload, load_words(lang))))


def parse_cap(memory: str | None, machine: Machine | None = None) -> int | None:
    """Return --memory in bytes; None if it is not given. If ``machine`` has GPUs, more than the memory of one
    of them is reduced to it, with a warning on standard error. Raises UserError if it is no size."""
    cap_bytes = parse_bytes(memory) if memory is not None else None
    if cap_bytes is None or machine is None or machine.device.is_host:
        return cap_bytes
    device, most_bytes = machine.device.name, int(machine.device.memory_bytes.value)
    if cap_bytes > most_bytes:
        text = f"--memory {memory} is more than {device} has: {format_bytes(most_bytes)} is used"
        print(f"memfit: warning: {one_line(text)}", file=sys.stderr)
    return min(cap_bytes, most_bytes)


def _say_device(machine: Machine, ranks: int, use_all: str) -> None:
    """Print to standard error which accelerator of this machine trains. If there are more than ``ranks``,
    also print ``use_all``, how to use all of them, with their number in place of {0} ("": nothing)."""
    count, name = machine.device_count, machine.device.name
    unused = f"; {use_all.format(count)}" if use_all and ranks < count else ""
    print(f"memfit: device: {name} ({machine.device.kind}){unused}", file=sys.stderr)


def is_here(on: str) -> bool:
    """Return whether ``on``, the machine as in --on, is the one on which memfit runs: "this" or "this:KIND",
    such as "this:cpu"."""
    return on.partition(":")[0] == "this"


def device_here(options: DeviceOptions) -> str:
    """Return --on of a command that trains, such as "this:cpu". Raises UserError if it is another machine."""
    if not is_here(options.on):
        raise UserError(
            f"--on {options.on}: training runs on this machine only",
            allowed="this, this:cpu or this:KIND",
            hint="`memfit plan --on MACHINE` plans for another one, `memfit export` hands over to it",
        )
    return options.on


def machine_of(on: str, place: str) -> Machine:
    """Return the machine that ``on`` names as in --on: "this" for the accelerators of this machine or,
    without one, its processor; "this:KIND" for its devices of that kind, such as "this:cpu"; devices of the
    catalog such as "8xH100-SXM"; or the path of a machine file, which ends in .toml. ``place``: name of the
    place of the electricity, such as "world"; not used for a machine file, which has its own. Raises
    UserError for an unknown machine or place, a kind of device that this machine does not have, and an
    invalid file; MemfitError for an accelerator of this machine that does not work."""
    from memfit import catalog
    from memfit.runtime.local_machine import this_machine

    name, _, kind = on.partition(":")
    if name == "this":
        return this_machine(place, kind)
    return catalog.from_toml(on) if on.endswith(".toml") else catalog.machine(on, place)


def excluded_techniques(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return ``names``, each of which must be the name of a technique, in the same order; empty for None.
    Raises UserError for an unknown name, with the nearest technique if one is similar."""
    from memfit.techniques.registry import technique

    return tuple(technique(name).name for name in names or ())


def plan_file(plan_options: PlanOptions) -> Plan | None:
    """Return the plan in the file of --plan, None for --recommended, or plain training if neither is given.
    Raises UserError if both are given, and if the file cannot be read or has no valid plan."""
    if plan_options.plan is None:
        return None if plan_options.recommended else Plan()
    if plan_options.recommended:
        raise UserError("--plan and --recommended both choose the plan", hint="leave one of them out")
    quiet_libraries()
    from memfit.techniques.plan_file import read_plan

    return read_plan(plan_options.plan)


def recommended_plan(search_request: memfit.planner.request.Request, progress: Bars) -> Plan:
    """Search for the plan that is recommended for the request and return it. Raises what `recommended_plans`
    raises."""
    return recommended_plans(search_request, progress)[0]


def recommended_plans(
    search_request: memfit.planner.request.Request, progress: Bars
) -> tuple[Plan, tuple[Plan, ...]]:
    """Search for the plan that is recommended for the request. Return (this plan, the plans of the search's
    frontier). Raises NothingFits if no plan fits the memory and the other limits, UserError if the request or
    the job is wrong, and RunError if operators cannot be timed on this machine."""
    from memfit.workflows.plan import find_plan

    result = find_plan(search_request, progress).result
    assert result.recommended is not None, "search raises NothingFits otherwise"
    return result.recommended.estimate.plan, tuple(choice.estimate.plan for choice in result.frontier)


@contextlib.contextmanager
def best_so_far(*, lang: str, as_json: bool, workload: Workload | None = None) -> Iterator[None]:
    """Context manager. If Ctrl-C interrupts a search within its block when the search already has a result,
    print that result in the language ``lang`` (as JSON, with ``workload``, if ``as_json``), and raise
    Interrupted, whose exit code is 130. An earlier Ctrl-C is raised unchanged, as KeyboardInterrupt."""
    from memfit.planner.search import SearchInterrupted

    try:
        yield
    except SearchInterrupted as stop:
        show_search(stop.result, lang=lang, as_json=as_json, workload=workload)
        raise Interrupted from None


def show_search(
    result: SearchResult,
    *,
    lang: str,
    as_json: bool,
    correction: Calibration | None = None,
    workload: Workload | None = None,
) -> None:
    """Print the result of a search as text in the language ``lang`` or, with ``as_json``, as a JSON object
    whose first field is ``workload``. ``correction``: how measured runs corrected the predicted step times;
    None, or one made from no run: they did not."""
    if as_json:
        from memfit.cli.views import search_view

        emit({"workload": workload, **search_view(result, correction)})
    else:
        from memfit.report.terminal import print_search

        print_search(result, lang=lang, console=console(), correction=correction)


def writable(path: Path, *, overwrite: bool = True, hint: str = "--force overwrites it") -> Path:
    """Return ``path``, the path of a file that will be written later. Raises UserError if it is a folder, if
    its folder does not exist, if it is a regular file and ``overwrite`` is False (with ``hint``), and if the
    file or a new one in its folder cannot be written. Call it before any long work begins."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file that can be written", hint="give a file name")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}", hint="create it first")
    is_written_to = is_stream(path)  # as /dev/stdout and named pipes are, in place of being replaced
    if path.exists() and not overwrite and not is_written_to:
        raise UserError(f"{path} already exists", hint=hint)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"no permission to write {path}", hint="choose another file")
    if not is_written_to:
        must_be_writable(path.parent, path.name)
    return path
