"""Follows a page of the documentation as its reader does: writes its files, types its commands.

A block in Python, TOML, YAML or of a log that begins with ``# NAME`` is written to that file. In a block
marked ``console``, a line with ``$`` is run; its exit code must be 0 unless it ends in ``# exit code N``; the
lines below it must appear in its output, where ``...`` matches anything. Of a block marked ``sh``, each line
is run. A block marked ``text`` right below commands is what one of them prints. Any other block in Python is
run with the names of tests/data/pages/given.py, which stand for the reader's own.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memfit.cli.app import main
from memfit.inputs import plan_of

ROOT = Path(__file__).parents[2]
GIVEN = ROOT / "tests" / "data" / "pages"
Step = tuple[str, int, list[str]]  # command, exit code, lines shown
BEGIN_S = 20  # within which a command that is only begun fails, if it fails


def blocks(text: str) -> Iterator[tuple[str, str, bool]]:
    """Yield language, text, and whether only empty lines are between a block and the one before."""
    end = None
    for found in re.finditer(r"^```(\w*)\n(.*?)^```\n?", text, re.MULTILINE | re.DOTALL):
        yield found[1], found[2], end is not None and not text[end : found.start()].strip()
        end = found.end()


def steps(block: str) -> Iterator[Step]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *lines = part.splitlines()
        code = re.search(r"\s+# exit code (\d)$", command)
        yield without_comment(command), int(code[1]) if code else 0, lines


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*", "", line).strip()


def commands(language: str, block: str) -> list[Step]:
    """The commands of a block, if it has any."""
    if language == "sh":
        return [(command, 0, []) for line in block.splitlines() if (command := without_comment(line))]
    return list(steps(block)) if language == "console" else []


def file_name(language: str, body: str) -> str | None:
    """The file that a block is the content of."""
    name = re.match(r"# ([\w./-]+\.\w+)(:.*)?\n", body)
    return name[1] if name and language in ("python", "toml", "yaml", "log") else None


def write_files(text: str) -> None:
    for language, body, _ in blocks(text):
        if name := file_name(language, body):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(body, encoding="utf-8")


def missing(output: str, lines: list[str]) -> list[str]:
    """What of the lines the output lacks; spaces are ignored, as a terminal may break lines anywhere."""
    flat = "".join(output.split())
    wanted = [piece for line in lines for piece in line.split("...")]
    return [piece for piece in wanted if "".join(piece.split()) not in flat]


STAND_INS = {
    "sbatch": 'exec bash "$1"',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "echo localhost",
    "stand-in-python": 'echo "$@"',
    "memfit": f'exec {sys.executable} -m memfit "$@"',
    "python": f'exec {sys.executable} "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "less": 'exec cat "$@"',
    "dmesg": f"exec cat {ROOT}/tests/data/deaths/host_killed_dmesg_1.txt",
}
JOB = {
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_ID": "7",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_NNODES": "1",
    "PYTHON": "stand-in-python",
}


def with_stand_ins(folder: Path) -> str:
    """Return a PATH that begins with programs that stand in for those of a cluster and of a shell."""
    folder.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder.absolute()}:{os.environ['PATH']}"


def launch(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command with stand-ins that print what it would start on a cluster."""
    place = re.match(r"cd (\S+) && ", command)
    submitted = {"SLURM_SUBMIT_DIR": str(Path(place[1]).absolute() if place else Path.cwd())}
    env = {**os.environ, **JOB, **submitted, "PATH": with_stand_ins(Path("stand-ins"))}
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)


class Reader:
    """Follows pages, and remembers the output of each `memfit poc`.

    ``left_out``: commands that are not run; ``begun``: commands that take minutes, of which only the first
    seconds are run; ``shorter``: command -> the one that is run in its place, if none of its output is shown.
    """

    def __init__(
        self,
        capsys: pytest.CaptureFixture[str],
        *,
        left_out: Mapping[str, str] = {},
        begun: Mapping[str, str] = {},
        shorter: Callable[[str], str] = lambda command: command,
    ) -> None:
        self.capsys = capsys
        self.left_out, self.begun, self.shorter = left_out, begun, shorter
        self.proofs: dict[str, tuple[int, str]] = {}
        self.names: dict[str, Any] = {}

    def follow(self, page: str, text: str) -> None:
        printed = ""  # by the commands of the block before
        write_files(text)  # a command may be shown above its file
        whole = [*blocks(text)]
        for (language, body, follows), after in zip(whole, [*whole[1:], ("", "", False)], strict=False):
            if file_name(language, body):
                write_files(
                    f"```{language}\n{body}```\n"
                )  # as it stands there, whatever a command has written
            elif language == "text" and not body.startswith("$ "):
                lacking = missing(printed, body.splitlines()) if follows and printed else []
                assert not lacking, f"{page}: {lacking}\n{printed}"
            elif language == "text":
                for command, code, _ in (s for s in steps(body) if not s[0].startswith("memfit")):
                    launched = launch(command)
                    assert launched.returncode == code, f"{page}: {command}\n{launched.stderr}"
                    assert re.match(r"-m [\w.]+ .* \w+\.py\b", launched.stdout)
            elif language == "python":
                self.run_python(page, body)
            shown = after[0] == "text" and after[2]
            printed = "".join(self.type(page, *step, shown=shown) for step in commands(language, body))
        typed = " ".join(
            command for language, body, _ in blocks(text) for command, _, _ in commands(language, body)
        )
        for language, body, _ in blocks(text):
            if (name := file_name(language, body)) and name not in typed:
                self.load(page, name, body)

    def load(self, page: str, name: str, body: str) -> None:
        """Loads a file that no command of its page uses: a job, a plan or a machine."""
        if "Job(" in body:
            self.type(page, f"memfit estimate {name}:job --on RTX-4090", 0, [])
        elif "\ntechniques:" in body:
            plan_of(name)
        elif "\ndevice" in body or "\n[device]" in body:
            self.type(page, f"memfit estimate protein-lm --on {name}", 0, [])

    def type(self, page: str, command: str, code: int, lines: list[str], *, shown: bool = False) -> str:
        """Runs a command of a page, and returns what it printed; "" if it is left out or only begun. The page
        shows ``lines`` of the output, and more in the next block if ``shown``."""
        if command in self.left_out:
            return ""
        if command in self.begun:
            begin(page, command)
            return ""
        found, output = self.run(command if lines or shown else self.shorter(command))
        assert found == code, f"{page}: {command}: exit code {found}\n{output}"
        assert not missing(output, lines), f"{page}: {command}: {missing(output, lines)}\n{output}"
        return output

    def run_those_in_sentences(self, page: str, text: str) -> int:
        """Runs the commands inside sentences; returns how many there are."""
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        whole = [c for c in re.findall(r"`(memfit [^`]+)`", text) if is_whole(c.split()[1:])]
        for command in whole:
            self.type(page, command, 0, [])
        return len(whole)

    def run(self, command: str) -> tuple[int, str]:
        if command in self.proofs:
            return self.proofs[command]
        if "sbatch " in command:
            done = launch(command)
            return done.returncode, done.stdout + done.stderr
        line, _, target = command.partition(" > ")
        if not line.startswith("memfit") or re.search(r"[|<]| && ", line):
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            return done.returncode, done.stdout + done.stderr
        _, *arguments = shlex.split(line)
        code = main(arguments)
        told = self.capsys.readouterr()
        if target:
            Path(target).write_text(told.out, encoding="utf-8")
        if arguments[0] == "poc":
            self.proofs[command] = code, told.out + told.err
        return code, told.out + told.err

    def run_python(self, page: str, body: str) -> None:
        """Runs a block in Python: in a notebook if it has magic commands, by pytest if it is a test."""
        if body.startswith("def test_"):
            Path("test_page.py").write_text(f"from given import *\n\n{body}", encoding="utf-8")
            found, output = self.run("python -m pytest -q test_page.py --memfit-update")
            assert found == 0, f"{page}: {output}"
            return
        if not self.names:
            self.names = runpy.run_path("given.py", {"page": page})
        if "fsdp2" in body:  # each rank calls it
            given = f"import runpy\nglobals().update(runpy.run_path('given.py', {{'page': {page!r}}}))"
            lines = [given, body, "import torch", "torch.distributed.destroy_process_group()"]
            Path("rank.py").write_text("\n".join(lines), encoding="utf-8")
            found, output = self.run("torchrun --nproc-per-node 2 rank.py")
            assert found == 0, f"{page}: {output}"
            return
        if not body.startswith("%"):
            file = Path(f"block{len(list(Path().glob('block*.py')))}.py")
            file.write_text(body, encoding="utf-8")
            exec(compile(body, file, "exec"), self.names)
            return
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        shell.user_ns.update(self.names)
        assert shell.run_cell(body).success, f"{page}: {body}"


def begin(page: str, command: str) -> None:
    """Runs the first seconds of a command, which must not fail in them; Ctrl-C ends it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=BEGIN_S)
        assert child.returncode == 0, f"{page}: {command}: exit code {child.returncode}\n{output}"
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=BEGIN_S)
        assert child.returncode == 130, f"{page}: {command}: exit code {child.returncode}\n{output}"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def is_whole(words: list[str]) -> bool:
    """Whether a command has arguments, not only a name or an option, and is no PoC, which takes minutes."""
    named = len(words) > 1 and not words[1].startswith("-")
    return words == ["doctor"] or (named and words[0] != "poc")
