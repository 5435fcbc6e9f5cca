"""Whatever file a reader of memfit is given, it answers in one short line, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from memfit.cli.app import main
from memfit.files import read
from memfit.files.read import bounded, parse_json, parse_toml, parse_yaml, read_data_text, read_text
from memfit.techniques.plan_file import read_plan
from memfit.types.errors import UserError
from memfit.workflows.sequence_lengths import read_lengths

# A command line for each reader; X stands for the file.
READERS = (
    ("plan", "char-lm", "--from", "X"),
    ("plan", "char-lm", "--on", "X"),
    ("plan", "char-lm", "--data", "X"),
    ("plan", "char-lm", "--diff", "X"),
    ("run", "char-lm", "--plan", "X"),
    ("lint", "X"),
    ("decide", "--gates", "X"),
    ("record", "--add", "X"),
    ("estimate", "char-lm", "--lengths", "X"),
    ("autopsy", "X"),
    ("baseline", "check", "--file", "X"),
    ("watch", "--limits", "X", "--", "true"),
    ("run", "char-lm", "--resume", "X"),
    ("plan", "X:job"),
)


def refusal(reader: Sequence[str], path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses the file."""
    assert main([word.replace("X", str(path)) for word in reader]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memfit: ")
    assert len(line) < 700
    return line


@pytest.mark.parametrize("reader", READERS, ids=" ".join)
@pytest.mark.parametrize("kind", ["device", "named pipe", "folder", "nothing"])
def test_what_is_no_regular_file_is_refused_at_once(
    reader: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    path = tmp_path / "x.toml"
    make: dict[str, Callable[[], object]] = {
        "device": lambda: path.symlink_to("/dev/zero"),
        "named pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "nothing": lambda: None,
    }
    make[kind]()
    refusal(reader, path, capsys)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "a: &a [*a]", "[" * 5000, "a: " + "9" * 5000, "a: " + "9" * 400, "!!int ''", "!!timestamp x",
     "!!bool x", "!!python/object/apply:os.system [x]", "2001-99-99: x", "\0", "? [a]\n: b",
     "- x\n" * 100_000],
)  # fmt: skip
def test_yaml_beyond_the_limits_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_yaml(text, what="it")
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


def test_yaml_with_aliases_and_merges_is_read() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\nother:\n  <<: *b\n  z: *b\n"
    assert parse_yaml(text, what="it")["other"] == {"x": 1, "y": [1, 2], "z": {"x": 1, "y": [1, 2]}}


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "9" * 400, "", "{", '"\ud800', "[" * 70 + "]" * 70]
)
def test_json_beyond_the_limits_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_json(text, what="it")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "text", [".".join("a" * 100_000) + " = 1", "a = " + "[" * 5000, "a = " + "9" * 400, "a"]
)
def test_toml_beyond_the_limits_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_toml(text, what="it")
    assert len(str(refused.value)) < 400


def test_too_many_values_are_refused() -> None:
    with pytest.raises(UserError, match="it has too many values"):
        bounded([[0] * 1000] * 1001, what="it")
    assert bounded({"a": [1, 2]}, what="it") == {"a": [1, 2]}


def test_a_file_that_is_too_large_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, 10 * 2**40)  # sparse: it takes no space
    with pytest.raises(UserError, match="is too large to be read; allowed: at most 67108864 bytes"):
        read_text(path)


def test_a_small_file_that_unpacks_to_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.fasta.gz"
    path.write_bytes(gzip.compress(bytes(2**21)))
    monkeypatch.setattr(read, "MOST_BYTES", 2**19)
    with pytest.raises(UserError, match="is too large when unpacked; allowed: at most 524288 bytes"):
        read_data_text(path, most_bytes=2**30)


def test_an_archive_that_unpacks_to_much_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        for _ in range(80):
            file.write(bytes(2**20))
    (tmp_path / "x.npz").write_bytes(stream.getvalue())
    line = refusal(("estimate", "char-lm", "--lengths", "X"), tmp_path / "x.npz", capsys)
    assert "is too large when unpacked" in line


def test_the_limit_of_an_archive_is_the_one_that_the_error_names(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", bytes(2**19))
        archive.getinfo("a.npy").file_size = 2**40  # of the directory alone
    limit_bytes = read.unpacked_limit(path.stat().st_size, 2**29)
    assert limit_bytes > read.MOST_BYTES
    with pytest.raises(UserError, match=f"is too large when unpacked; allowed: at most {limit_bytes} bytes"):
        read_lengths(str(path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "1000000000"), "less than or equal to 16777216"),
        (("--steps", "9" * 20), "less than or equal to 2147483647"),
        (("--memory", "9" * 30 + "GiB"), "too large for the memory size of a machine; allowed: at most"),
        (("--memory", "9" * 5000), "too large for the memory size of a machine; allowed: at most"),
        (("--threads", "99999999"), "less than or equal to 4096"),
        (("--deadline", "9" * 5000 + "h", "--steps", "5", "--on", "H100-SXM"), "not a time"),
    ],
)
def test_a_number_beyond_all_machines_is_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "char-lm", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_too_little_memory_for_a_batch_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 7.45 GiB")

    monkeypatch.setattr("memfit.jobs.registry.load", load)
    assert main(["plan", "char-lm", "--batch", "16777216"]) == 1
    expected = "memfit: memory ran out on this machine: Unable to allocate 7.45 GiB\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_message_with_what_a_file_contains_is_short(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"ranks: {'x' * 50_000}\n")
    with pytest.raises(UserError, match=r"the value of ranks is 'xxx") as refused:
        read_plan(path)
    assert len(str(refused.value)) < 1300
