"""The guides of docs/guides do what they say: every command of every console block is run, in order.

A guide is read like this: a block in Python, TOML or YAML that begins with ``# NAME`` is written to that
file. In a console block, a line with ``$`` is run; its exit code must be 0 unless it ends in
``# exit code N``; the lines below it must appear in its output, where ``...`` matches anything. A whole
command inside a sentence is run after its guide. Blocks marked ``text`` need a cluster or a GPU: their shell
commands are run with stand-ins for Slurm and for torch's launcher.

All guides share one folder, and those in one language one store. Two things differ from what a reader does.
A `memfit poc` that an earlier guide ran with the same arguments is not run again: its first output is checked
again. And the managers' guides begin after a PoC that takes minutes, which another test runs
(tests/cpu/test_managers_proof.py): here it is replaced by a record and offers made by hand (report_fixture),
so that the lines of the guides do not change. The file `theirs.json`, which another group would send, is
that record too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_fixture

from memfit.cli.app import main
from memfit.store import Store, default_path, exchange
from memfit.types.result import Interval, Offer, Poc
from memfit.types.units import GIB

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
MADE = (  # in this order: a platform engineer's guide uses the files of the scientist's
    "scientist.md",
    "platform-engineer.md",
    "scientist.ja.md",
    "platform-engineer.ja.md",
)
MANAGERS = ("manager.md", "manager.ja.md")
Step = tuple[str, int, list[str]]  # command, exit code, lines shown


def blocks(text: str) -> Iterator[tuple[str, str]]:
    yield from re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def steps(block: str) -> Iterator[Step]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *lines = part.splitlines()
        code = re.search(r"\s+# exit code (\d)$", command)
        yield command[: code.start()] if code else command, int(code[1]) if code else 0, lines


def missing(output: str, lines: list[str]) -> list[str]:
    """What of the lines the output lacks; spaces are ignored, as a terminal may break lines anywhere."""
    flat = "".join(output.split())
    wanted = [piece for line in lines for piece in line.split("...")]
    return [piece for piece in wanted if "".join(piece.split()) not in flat]


def made_by_hand() -> Poc:
    """One 24 GB card that plain training does not fit, and larger ones that it fits."""

    def offer(machine: str, *, plain: bool, fits: bool, step_s: float, power_w: float) -> Offer:
        memory = Interval(value=20.0 * GIB, low=19.0 * GIB, high=21.0 * GIB)
        step = Interval(value=step_s, low=0.9 * step_s, high=1.1 * step_s)
        plan = "plain training" if plain else "checkpointing"
        return Offer(
            machine=machine,
            size="650M",
            plan=plan,
            plain=plain,
            fits=fits,
            memory_bytes=memory,
            step_s=step,
            power_w=power_w,
        )

    offers = (
        offer("RTX-4090", plain=True, fits=False, step_s=1.0, power_w=550.0),
        offer("RTX-4090", plain=False, fits=True, step_s=1.4, power_w=560.0),
        offer("RTX-A6000", plain=True, fits=True, step_s=1.3, power_w=420.0),
        offer("RTX-A6000", plain=False, fits=True, step_s=1.8, power_w=420.0),
        offer("H100-SXM", plain=True, fits=True, step_s=0.3, power_w=1000.0),
        offer("H100-SXM", plain=False, fits=True, step_s=0.4, power_w=1010.0),
    )
    return dataclasses.replace(report_fixture.full_poc(), offers=offers)


def is_whole(words: list[str]) -> bool:
    """Whether a command has arguments, not only a name or an option, and is no PoC, which takes minutes."""
    named = len(words) > 1 and not words[1].startswith("-")
    return words == ["doctor"] or (named and words[0] != "poc")


STAND_INS = {
    "sbatch": 'exec bash "$1"',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scontrol": "echo localhost",
    "stand-in-python": 'echo "$@"',
}
JOB = {
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_ID": "7",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_NNODES": "1",
    "PYTHON": "stand-in-python",
}


def launch(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command with stand-ins that print what it would start on a cluster."""
    stubs = Path("stand-ins").absolute()
    stubs.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (stubs / name).chmod(0o755)
    place = re.match(r"cd (\S+) && ", command)
    submitted = {"SLURM_SUBMIT_DIR": str(Path(place[1]).absolute() if place else Path.cwd())}
    env = {**os.environ, **JOB, **submitted, "PATH": f"{stubs}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)


class Reader:
    """Follows a guide, and remembers the output of each `memfit poc`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.proofs: dict[str, tuple[int, str]] = {}

    def follow(self, guide: str) -> None:
        for language, body in blocks((GUIDES / guide).read_text(encoding="utf-8")):
            if language in ("python", "toml", "yaml", "log") and (name := re.match(r"# (\S+\.\w+)\n", body)):
                Path(name[1]).write_text(body, encoding="utf-8")
            elif language == "console":
                for command, code, lines in steps(body):
                    found, output = self.run(command)
                    assert found == code, f"{guide}: {command}: exit code {found}\n{output}"
                    assert not missing(output, lines), (
                        f"{guide}: {command}: {missing(output, lines)}\n{output}"
                    )
            elif language == "text":
                for command, code, _ in (s for s in steps(body) if not s[0].startswith("memfit")):
                    launched = launch(command)
                    assert launched.returncode == code, f"{guide}: {command}\n{launched.stderr}"
                    assert re.match(r"-m [\w.]+ .* \w+\.py\b", launched.stdout)

    def run_those_in_sentences(self, guide: str) -> int:
        """Runs the commands inside sentences; returns how many there are."""
        text = re.sub(r"^```.*?^```", "", (GUIDES / guide).read_text(encoding="utf-8"), flags=re.M | re.S)
        whole = [c for c in re.findall(r"`(memfit [^`]+)`", text) if is_whole(c.split()[1:])]
        for command in whole:
            found, output = self.run(command)
            assert found == 0, f"{guide}: {command}: {output}"
        return len(whole)

    def run(self, command: str) -> tuple[int, str]:
        if command in self.proofs:
            return self.proofs[command]
        if command.startswith("patch "):
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
            return done.returncode, done.stdout + done.stderr
        line, _, target = command.partition(" > ")
        program, *arguments = shlex.split(line)
        assert program == "memfit"
        code = main(arguments)
        told = self.capsys.readouterr()
        if target:
            Path(target).write_text(told.out, encoding="utf-8")
        if arguments[0] == "poc":
            self.proofs[command] = code, told.out + told.err
        return code, told.out + told.err


@pytest.mark.long
@pytest.mark.timeout(600)  # a proof of concept, on a machine that runs other tests too
@pytest.mark.skipif(sys.platform != "linux", reason="the user's data folder is moved as Linux has it")
def test_every_command_of_the_guides_exits_and_prints_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {p.name for p in GUIDES.glob("*.md")} == {*MADE, *MANAGERS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "110")
    by_hand, reader = made_by_hand(), Reader(capsys)
    Path("theirs.json").write_text(exchange.text(exchange.of_poc(by_hand)), encoding="utf-8")
    in_sentences = 0
    for guide in MADE:
        if guide == "scientist.ja.md":  # the Japanese guides begin where the English ones began
            monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data.ja"))
        reader.follow(guide)
        in_sentences += reader.run_those_in_sentences(guide)
        if guide == "scientist.md":
            shutil.copytree(tmp_path / "data", tmp_path / "data.ja")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert len(reader.proofs) == 1, "one proof of concept is shared, so that the test is quick"
    for guide in MANAGERS:  # each begins after a PoC of its own
        proof = dataclasses.replace(by_hand, poc_id=f"by-hand-{guide}")
        for kind in ("begin", "poc"):
            Store(default_path()).append(proof.poc_id, kind, proof)
        reader.follow(guide)
        in_sentences += reader.run_those_in_sentences(guide)
    assert in_sentences >= len(MADE) + len(MANAGERS)


SITE = sorted(
    p for p in (GUIDES.parent / "site").rglob("*.md") if "```console" in p.read_text(encoding="utf-8")
)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("page", SITE, ids=lambda p: f"{p.parts[-3]}-{p.parts[-2]}-{p.stem}")
def test_every_command_of_a_page_of_the_site_exits_and_prints_as_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "110")
    Reader(capsys).follow(os.path.relpath(page, GUIDES))


def test_the_guide_reader_finds_missing_output_and_parses_exit_codes() -> None:
    asked = ("doctor", "plan a.py:job --from b.yaml", "decide --gates default", "run --save")
    assert [is_whole(c.split()) for c in asked] == [True, True, False, False]
    assert missing("Peak  3\nGiB, 5 ms", ["Peak 3 GiB ... ms"]) == []
    assert missing("Peak 3 GiB", ["Peak 4 GiB", "GiB"]) == ["Peak 4 GiB"]
    assert list(steps("$ memfit lint a    # exit code 1\nbad\n$ memfit list jobs\n")) == [
        ("memfit lint a", 1, ["bad"]),
        ("memfit list jobs", 0, []),
    ]
