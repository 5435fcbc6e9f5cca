"""Read the command that starts a training script, with any launcher before it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from memfit.types.errors import UserError, first_line, suggest

_PYTHON = re.compile(r"python(\d(\.\d+)?)?(\.exe)?")
_PYTHON_WITH_VALUE = frozenset({"-W", "-X", "--check-hash-based-pycs"})
_RUNNERS = ("uv", "poetry", "pdm", "hatch", "pipenv", "rye")  # `uv run COMMAND`
_RANKS_OPTIONS = ("-n", "--ntasks", "-np", "--np")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A Python program: the path of a script or the name of a module, and its arguments. ``ranks``: how many
    processes the launcher would start, 1 if its options do not say. ``environment``: variables that the
    launcher would set."""

    script: str = ""
    module: str = ""
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.module or Path(self.script).name


def load_program(command: Sequence[str]) -> Program:
    """Return the Python program that ``command`` would run.

    The command may start with python, torchrun, ``accelerate launch``, ``deepspeed``, ``srun``, ``mpirun``,
    ``mpiexec``, or ``run`` of uv, poetry, pdm, hatch, pipenv or rye; or be the name or the path of a Python
    script. ``NAME=VALUE`` and ``env`` without options may come before it. Of srun, mpirun and mpiexec, only
    the number of processes is read (-n, --ntasks, -np, --np). Raises UserError for other commands, for
    options that a launcher does not accept, if accelerate is needed and not installed, and if the script does
    not exist.
    """
    if not command:
        raise UserError("the command names no program", hint="memfit estimate -- python train.py ARGS")
    first, rest = command[0], list(command[1:])
    name = Path(first).name
    if "=" in first and not Path(first).exists():
        key, _, value = first.partition("=")
        program = load_program(rest)
        return dataclasses.replace(program, environment={key: value, **program.environment})
    if name in ("srun", "mpirun", "mpiexec"):
        words = _without_options(rest)
        program = load_program(words)
        return dataclasses.replace(
            program, ranks=_ranks_option(rest[: len(rest) - len(words)]) or program.ranks
        )
    if name == "env":
        return load_program(rest)
    if name in _RUNNERS and rest[:1] == ["run"]:
        return load_program(_without_options(rest[1:]))
    if _PYTHON.fullmatch(name):
        return _of_python(rest)
    if name == "accelerate" and rest[:1] == ["launch"]:
        return _of_accelerate(rest[1:])
    readers = {"torchrun": _of_torchrun, "deepspeed": _of_deepspeed}
    return readers[name](rest) if name in readers else _of_executable(first, rest)


def _of_python(arguments: list[str]) -> Program:
    index = 0
    while index < len(arguments) and arguments[index].startswith("-"):
        option = arguments[index]
        if option == "-m":
            return _of_module(arguments[index + 1 :])
        if option.startswith("-m") and not option.startswith("--"):
            return _of_module([option[2:], *arguments[index + 1 :]])
        if option == "-c":
            raise UserError(
                "memfit cannot trace a program that is given as text with -c",
                allowed="a script file, or a module with -m",
            )
        index += 2 if option in _PYTHON_WITH_VALUE else 1
    if index == len(arguments):
        raise UserError("the command names no script", hint="memfit estimate -- python train.py ARGS")
    return _of_script(arguments[index], arguments[index + 1 :])


def _of_module(arguments: list[str]) -> Program:
    if not arguments:
        raise UserError("no module is given after -m", hint="memfit estimate -- python -m package.train ARGS")
    launchers = {
        "torch.distributed.run": _of_torchrun,
        "torch.distributed.launch": _of_torchrun,
        "accelerate.commands.launch": _of_accelerate,
        "deepspeed.launcher.runner": _of_deepspeed,
    }
    module, rest = arguments[0], arguments[1:]
    return launchers[module](rest) if module in launchers else Program(module=module, arguments=tuple(rest))


def _of_script(path: str, arguments: list[str]) -> Program:
    if not Path(path).is_file():
        raise UserError(
            f"the script {path} does not exist or is not a file",
            hint="give its path from the current folder, or an absolute one",
        )
    return Program(script=path, arguments=tuple(arguments))


def _of_executable(name: str, arguments: list[str]) -> Program:
    path = name if Path(name).is_file() else shutil.which(name) or _installed_script(name)
    if path is None:
        launchers = ("python", "torchrun", "accelerate", "deepspeed", "srun", "mpirun")
        raise UserError(f"the command {name} does not exist", allowed=_ALLOWED, hint=suggest(name, launchers))
    if path.endswith(".py"):
        return Program(script=path, arguments=tuple(arguments))
    with Path(path).open("rb") as file:
        first_line = file.readline(300).decode(errors="replace")
    if not first_line.startswith("#!") or "python" not in first_line:
        raise UserError(f"the command {name} is no Python script", allowed=_ALLOWED)
    return Program(script=path, arguments=tuple(arguments))


_ALLOWED = (
    "python, torchrun, accelerate launch, deepspeed, srun, or the name of a program written in Python, then "
    "its arguments; of a batch file or a shell script, the line in it that starts the training"
)


def _installed_script(name: str) -> str | None:
    path = Path(sys.executable).with_name(name)
    return str(path) if path.is_file() else None


def _of_torchrun(arguments: list[str]) -> Program:
    from torch.distributed.run import get_args_parser

    args = _parse_arguments(get_args_parser(), arguments, "torchrun")
    per_node = str(args.nproc_per_node)
    if not _is_count(per_node):
        raise UserError(
            f"--nproc-per-node={per_node} is no number of processes",
            allowed="a whole number of at least 1 (not gpu or auto, which depend on the machine)",
        )
    nodes = str(args.nnodes).rpartition(":")[2]
    if not _is_count(nodes):
        raise UserError(
            f"--nnodes={args.nnodes} is no number of nodes",
            allowed="a whole number of at least 1, or MIN:MAX, of which MAX counts",
        )
    return dataclasses.replace(_of_training_script(args), ranks=int(per_node) * int(nodes))


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _of_training_script(args: argparse.Namespace) -> Program:
    """Return the program that torchrun's arguments name; those of ``accelerate launch`` are alike. Raises
    UserError if the script does not exist."""
    if args.module:
        return _of_module([args.training_script, *args.training_script_args])
    return _of_script(args.training_script, args.training_script_args)


def _of_accelerate(arguments: list[str]) -> Program:
    try:
        from accelerate.commands.launch import (
            _validate_launch_command,
            launch_command_parser,
            prepare_simple_launcher_cmd_env,
        )
    except ImportError as error:
        raise UserError("accelerate is not installed here", hint="pip install accelerate") from error
    args = _parse_arguments(launch_command_parser(), arguments, "accelerate launch")
    program = _of_training_script(args)
    try:
        args, _, _ = _validate_launch_command(args)
        _, environment = prepare_simple_launcher_cmd_env(args)
    except (ValueError, ImportError, OSError) as error:  # options that do not fit together, or this machine
        raise UserError(f"accelerate launch cannot start {program.name}: {first_line(error)}") from error
    names = ("ACCELERATE_", "FSDP_", "DEEPSPEED_")
    kept = {k: v for k, v in environment.items() if k.startswith(names) and k != "ACCELERATE_USE_CPU"}
    return dataclasses.replace(program, ranks=int(args.num_processes or 1), environment=kept)


def _of_deepspeed(arguments: list[str]) -> Program:
    ranks, index, is_module = 1, 0, False
    while index < len(arguments) and arguments[index].startswith("-"):
        name, equals, value = arguments[index].partition("=")
        value = value if equals else (arguments[index + 1] if index + 1 < len(arguments) else "")
        if name in ("--num_gpus", "--num_nodes"):
            if not _is_count(value):
                raise UserError(f"deepspeed's {name} is {value!r}", allowed="a whole number of at least 1")
            ranks *= int(value)
        is_module = is_module or name == "--module"
        index += 1 if equals or name in ("--no_python", "--module", "--force_multi") else 2
    if index >= len(arguments):
        raise UserError("the command names no script", hint="memfit estimate -- deepspeed train.py ARGS")
    rest = arguments[index:]
    program = _of_module(rest) if is_module else _of_script(rest[0], rest[1:])
    return dataclasses.replace(program, ranks=ranks)


def _parse_arguments(
    parser: argparse.ArgumentParser, arguments: list[str], launcher: str
) -> argparse.Namespace:
    usage = io.StringIO()  # of argparse, which would name memfit as the program
    try:
        with contextlib.redirect_stderr(usage):
            return parser.parse_args(arguments)
    except SystemExit as error:
        reason = usage.getvalue().rpartition("error: ")[2].strip()
        raise UserError(
            f"{launcher} does not accept the arguments {' '.join(arguments)}" + f": {reason}" * bool(reason),
            hint=f"`{launcher} --help` lists its options",
        ) from error


def _without_options(arguments: list[str]) -> list[str]:
    """Return the words of the command from the first that is python, torchrun, accelerate, deepspeed or a
    file name ending in .py, without the options of a starter such as srun before it. Raises UserError if
    there is no such word."""
    for index, word in enumerate(arguments):
        name = Path(word).name
        is_program = _PYTHON.fullmatch(name) or name in ("torchrun", "accelerate", "deepspeed")
        if is_program or word.endswith(".py"):
            return arguments[index:]
    raise UserError(
        f"no Python program is found in the command: {' '.join(arguments)}",
        allowed="after the options: python, torchrun, accelerate launch, deepspeed, or a file .py",
    )


def _ranks_option(arguments: list[str]) -> int | None:
    for option, value in itertools.pairwise([*arguments, ""]):
        name, equals, inline = option.partition("=")
        text = inline if equals else value
        if name in _RANKS_OPTIONS and _is_count(text):
            return int(text)
    return None
