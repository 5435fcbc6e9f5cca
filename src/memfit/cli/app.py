"""Register all commands, and convert the result or the expected error of a command to an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, cast

import typer
import typer.main
from typer.core import TyperGroup

from memfit import __version__
from memfit.cli import (
    autopsy,
    baseline,
    decide,
    doctor,
    estimate,
    export,
    lint,
    listing,
    plan,
    poc,
    record,
    report,
    run,
    sweep,
    watch,
)
from memfit.cli.aliases import rewrite, suggest_command
from memfit.cli.estimate import EstimateCommand
from memfit.cli.options import group_options
from memfit.cli.output import emit, only_json
from memfit.cli.termination import interrupted_by_signals
from memfit.files.temporary import remove_abandoned
from memfit.runtime.oom import is_oom_error
from memfit.types.errors import Interrupted, MemfitError, UserError, first_line
from memfit.types.sanitize import one_line

_NAME_ERRORS: Final = {errno.ENAMETOOLONG, errno.ELOOP}
_DISK_ERRORS: Final = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO}
INTERRUPTED: Final = Interrupted.exit_code
# Newer releases of typer contain their own copy of click. This is the UsageError of the click in use.
_USAGE_ERROR: Final = cast("type[Exception]", typer.BadParameter.__mro__[1])

# A task -> its commands, each with its function and its line in `memfit --help`.
COMMANDS: Final[Mapping[str, Mapping[str, tuple[Callable[..., None], str]]]] = {
    "Predict": {
        "estimate": (estimate.estimate, "The memory of a script as it is, or of a job, before it runs."),
        "plan": (plan.plan, "The plan that fits the memory, and its alternatives, with reasons."),
        "lint": (lint.lint, "Known mistakes in the configuration files of other libraries."),
        "baseline": (baseline.baseline, "A gate for CI: fail when the predicted memory grows."),
    },
    "Train": {
        "poc": (poc.poc, "A proof of concept: predict, search, run, measure, judge, report."),
        "run": (run.run, "Train with one plan, and measure its memory and time."),
        "sweep": (sweep.sweep, "Several plans, seeds and sizes side by side, here or on a cluster."),
        "watch": (watch.watch, "Memory, time, loss and alarms of each step of your training."),
        "autopsy": (autopsy.autopsy, "Why a training ran out of memory, with the evidence."),
    },
    "Hand over and decide": {
        "export": (export.export, "A plan as files for launchers, clusters and other libraries."),
        "report": (report.report, "The HTML report of a proof of concept."),
        "decide": (decide.decide, "Money, carbon, risk, and the gates to a pilot and to full size."),
        "record": (record.record, "A proof of concept as JSON for others; compare two of them."),
    },
    "Look up": {
        "list": (listing.list_known, "The jobs, techniques, machines and engines that memfit knows."),
        "doctor": (doctor.doctor, "What this machine has, what works on it, and what to install."),
    },
}


class _TaskGroup(TyperGroup):
    """The commands, which the help lists by task."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands of each task, with one line each, to ``formatter``."""
        for task, commands in COMMANDS.items():
            with formatter.section(task):
                formatter.write_dl([(name, line) for name, (_, line) in commands.items()])


app = typer.Typer(
    name="memfit",
    cls=_TaskGroup,
    help="Fit the training of a PyTorch model into the memory you have: predict, prove, report.",
    epilog="Start with `memfit doctor`, then `memfit poc`.",
    invoke_without_command=True,
    rich_markup_mode=None,  # plain help does not load rich
    add_completion=True,
)
for _commands in COMMANDS.values():
    for _name, (_function, _line) in _commands.items():
        app.command(_name, cls=EstimateCommand if _name == "estimate" else None)(group_options(_function))


@app.callback()
def _top(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"memfit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
    else:
        return
    raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, for example ["plan", "char-lm", "--json"], and return its exit
    code; `memfit.cli` lists the codes. By default, ``arguments`` are those of the process.

    These are printed as one line on standard error: an error that memfit raises on purpose, invalid use,
    Ctrl-C, a file name that the system refuses, a file that cannot be written because of the disk, and memory
    that ran out. With --json the line is also printed on standard output, as {"error": {"message": ...,
    "exit_code": ...}}, unless an interrupted search has already printed the best plan so far there. Any other
    exception is raised; with --json it is first printed in the same two ways. If the reader of standard
    output closes the pipe, the exit code is 1 and nothing is printed about it.

    Temporary folders of processes that were killed are removed first. Characters that the encoding of
    standard output does not have are printed as escapes.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    remove_abandoned()
    with interrupted_by_signals() as termination:
        return termination.exit_code(_main(sys.argv[1:] if arguments is None else arguments))


def _open_closed_streams() -> None:
    """Open the null device in place of each of standard input, output and error that is closed. Otherwise,
    the next file that is opened gets the number of the stream, and receives what other code prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _discard_output() -> None:
    """Redirect standard output to the null device, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: Sequence[str]) -> int:
    argv = rewrite(arguments)
    as_json = "--json" in (argv[: argv.index("--")] if "--" in argv else argv)
    try:
        _check_command(argv)
        with only_json() if as_json and "--help" not in argv else contextlib.nullcontext():
            code = typer.main.get_command(app).main(argv, prog_name="memfit", standalone_mode=False)
        sys.stdout.flush()
    except MemfitError as error:
        return _fail(str(error), error.exit_code, as_json and not isinstance(error, Interrupted))
    except _USAGE_ERROR as error:
        return _fail(_usage(error, argv), 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        _discard_output()  # the reader has closed the pipe, as in `memfit plan | head`
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NAME_ERRORS:
            return _fail(f"{error.filename}: {error.strerror}", 2, as_json)
        if fault := _machine_fault(error):
            return _fail(fault, 1, as_json)
        if as_json:
            _fail(f"{type(error).__name__}: {first_line(error)}", 1, as_json)
        raise
    if code == INTERRUPTED:
        return _fail("interrupted; runs and records already in the store are kept", INTERRUPTED, as_json)
    return int(code or 0)


def _machine_fault(error: Exception) -> str:
    """Return one line if this machine is at fault: memory ran out, or a file cannot be written because the
    disk is full, read-only or faulty, or a quota or the largest size of a file is reached; else ""."""
    if is_oom_error(error):  # torch's is a RuntimeError, such as in a job's `make_batch`
        return f"memory ran out on this machine: {first_line(error)}"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}"
    return ""


def _check_command(argv: Sequence[str]) -> None:
    """Raise UserError if there is no command of the name in ``argv``; its hint is the nearest name, old ones
    too, if one is similar. The name is the first word that does not begin with "-", because options before
    the command take no values. Without such a word, nothing is checked."""
    command = next((word for word in argv if not word.startswith("-")), None)
    names = [c.name for c in app.registered_commands if c.name]
    if command is not None and command not in names:
        raise UserError(
            f"unknown command: {command!r}",
            allowed=", ".join(names),
            hint=suggest_command(command, names),
        )


def _usage(error: BaseException, argv: Sequence[str]) -> str:
    """Return one line: the message of ``error``, which the command-line parser raised for ``argv``, and the
    command that shows the help, such as ``memfit plan --help``, or ``memfit --help`` if ``argv`` does not
    begin with a command."""
    context = getattr(error, "ctx", None)
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    command = context.command_path if context is not None else f"memfit {name}".strip()
    text = " ".join(str(getattr(error, "format_message", lambda: error)()).split())
    return f"{text.rstrip('.')}; see `{command} --help`"


def _fail(message: str, exit_code: int, as_json: bool) -> int:
    line = one_line(message)
    print(f"memfit: {line}", file=sys.stderr)
    try:
        if as_json:
            emit({"error": {"message": line, "exit_code": exit_code}})
        sys.stdout.flush()
    except OSError:  # a full disk, which the message is about
        _discard_output()
    return exit_code
