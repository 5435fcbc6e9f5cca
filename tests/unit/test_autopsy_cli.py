"""``memfit autopsy`` reads all kinds of evidence, and compares it with a prediction."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from allocator_snapshot import SnapshotWriter, train

from memfit.cli.app import main
from memfit.monitoring.autopsy import diagnose_run
from memfit.monitoring.diagnosis import Certainty, DeathCause

_DEATHS = Path(__file__).parents[1] / "data/deaths"


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    assert main(["autopsy", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    writer = SnapshotWriter(4000)
    assert not train(writer, 40, leak=100)
    path = tmp_path / "oom.pickle"
    path.write_bytes(pickle.dumps(writer.snapshot()))
    return path


def test_the_answer_has_cause_evidence_place_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autopsy", str(_DEATHS / "fragmentation_after_hours_3.txt")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fragmentation (likely): ")
    for part in (
        "  because ",
        "4.03 GiB",
        "  or ",
        "leak",
        "/root/run/train.py:301",
        "expandable_segments",
        "  record ",
    ):
        assert part in text


def test_the_answer_is_in_japanese_with_the_words_of_the_log_as_they_are(
    capsys: pytest.CaptureFixture[str], snapshot: Path
) -> None:
    log = _DEATHS / "fragmentation_after_hours_3.txt"
    assert main(["autopsy", str(log), "--lang", "ja"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fragmentation（可能性が高い）：空きメモリーの合計は足りていたが")
    for part in (
        "  根拠 ",
        "要求 242 MiB、デバイスの容量 79.26 GiB",
        "/root/run/train.py:301、フェーズ：逆伝播",
    ):
        assert part in text
    answer = json_of(capsys, snapshot, "--lang", "ja")
    texts = [*answer["evidence"], *answer["advice"]]  # type: ignore[misc]
    assert all(re.search("[ぁ-ん]", text) for text in texts), texts
    assert main(["autopsy", str(log), "--lang", "fr"]) == 2


def test_a_log_and_a_snapshot_are_one_death(capsys: pytest.CaptureFixture[str], snapshot: Path) -> None:
    both = json_of(capsys, _DEATHS / "fragmentation_after_hours_3.txt", snapshot)
    assert (both["cause"], both["certainty"]) == ("leak", "certain")
    assert both["comparison"] is None


def test_standard_input_may_be_text_or_a_snapshot(
    capsys: pytest.CaptureFixture[str], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, cause in ((snapshot, "leak"), (_DEATHS / "host_killed_dmesg_1.txt", "host-killed")):
        stream = io.TextIOWrapper(io.BytesIO(path.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stream)
        assert json_of(capsys, "-")["cause"] == cause


def test_a_snapshot_on_standard_input_that_is_too_large_is_refused(
    capsys: pytest.CaptureFixture[str], snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = snapshot.read_bytes()
    for data in (pickled, json.dumps(pickle.loads(pickled)).encode()):
        monkeypatch.setattr("memfit.monitoring.memory_snapshot.LARGEST_BYTES", len(data) - 1)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["autopsy", "-"]) == 2
        assert "standard input is too large to be read; allowed: at most" in capsys.readouterr().err


def test_the_end_of_a_long_standard_input_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memfit.monitoring.memory_snapshot.LARGEST_BYTES", 2**20)
    monkeypatch.setattr("memfit.cli.autopsy._MOST_TEXT_BYTES", 2**18)
    end = (_DEATHS / "host_killed_dmesg_1.txt").read_bytes()
    log = b"step 1: loss 0.5\n" * 2**17 + end  # over 2 MiB
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(log)))
    assert json_of(capsys, "-")["cause"] == "host-killed"


def test_the_record_of_a_watch_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(
        '{"kind": "command", "time_s": 0.0}\n{"kind": "exit", "time_s": 1.0, "code": -9, "oom_kills": 2}\n'
    )
    assert json_of(capsys, path)["cause"] == "host-killed"


def test_controls_in_a_log_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_text(
        'Traceback (most recent call last):\n  File "/a\x1b[2J.py", line 1, in f\nValueError: \x1b[31mno\n'
    )
    assert main(["autopsy", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "cannot read missing.txt"),
        (["-", "-"], "standard input is read once"),
        (["a.txt", "--plan", "p.yaml"], "--plan cannot be used without --job"),
        (["."], ". is a folder"),
    ],
)
def test_wrong_input_gives_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["autopsy", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_hostile_snapshot_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "hostile.pickle"
    path.write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    assert main(["autopsy", str(path)]) == 2
    assert "nothing in it was run" in capsys.readouterr().err


def test_reading_evidence_does_not_load_torch() -> None:
    code = (
        "import sys; from memfit.cli.app import main; "
        f"main(['autopsy', {str(_DEATHS / 'leak_yolo_3.txt')!r}]); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )


def test_the_prediction_is_compared_and_the_nearest_plan_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_text(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 100.00 MiB. GPU 0 has a total "
        "capacity of 24.00 GiB of which 10.00 MiB is free. Of the allocated memory 500.00 MiB is allocated "
        "by PyTorch, and 10.00 MiB is reserved by PyTorch but unallocated.\n"
    )
    answer = json_of(
        capsys, path, "--job", "char-lm", "--batch", "64", "--on", "RTX-4090", "--memory", "1.5GiB"
    )
    comparison = answer["comparison"]
    assert isinstance(comparison, dict)
    assert comparison["measured_bytes"] == 600 * 2**20
    predicted = comparison["predicted"]["allocated_bytes"]["value"]
    assert comparison["excess_ratio"] == pytest.approx(600 * 2**20 / predicted - 1)
    assert comparison["needed_bytes"] > comparison["limit_bytes"] == 1.5 * 2**30
    assert comparison["nearest_bytes"] <= comparison["limit_bytes"]
    assert comparison["step_ratio"] >= 1


def test_a_log_in_utf_16_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "log"  # as `python train.py > log` writes it in Windows PowerShell
    path.write_text("step 2 loss 0.1\nKilled\n", encoding="utf-16")
    assert json_of(capsys, path)["cause"] == "host-killed"


def test_a_run_of_memfit_that_dies_is_explained_in_a_line() -> None:
    first = diagnose_run("MemoryError", 0)
    assert (first.cause, first.certainty) == (DeathCause.TENSORS_TOO_LARGE, Certainty.CERTAIN)
    assert (
        diagnose_run("[enforce fail] DefaultCPUAllocator: can't allocate memory", 40).cause
        is DeathCause.LATE_GROWTH
    )
    assert diagnose_run("killed by the kernel at its cap of 1 GiB", 3).cause is DeathCause.HOST_KILLED


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        (
            (
                "OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 MiB. GPU 0 has a total "
                "capacity of 79.11 GiB of which 78.00 GiB is free. 20.00 MiB allowed; Of the allocated "
                "memory 18.50 MiB is allocated by PyTorch, and 1.50 MiB is reserved by PyTorch but "
                "unallocated."
            ),
            "device",
        ),
        ("OutOfMemoryError: a message of another form", "device"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "host"),
        ("MemoryError: ", "host"),
    ],
)
def test_a_run_says_whether_the_devices_memory_or_the_hosts_ran_out(message: str, memory: str) -> None:
    diagnosis = diagnose_run("out of memory in forward of step 0", 0, message=message, device="cuda")
    assert diagnosis.memory == memory
    assert diagnosis.cause is DeathCause.TENSORS_TOO_LARGE
    named = "the device (cuda)" if memory == "device" else "the host"
    assert any(text.startswith(f"memory of {named} ran out") for text in diagnosis.evidence)
