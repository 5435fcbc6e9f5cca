"""The report's chapter on a watched training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc

from memfit.monitoring.record import read_records
from memfit.report.html import render_html, write_watch_html
from memfit.report.watch_chapter import WATCH, watch_chapter
from memfit.report.words import LANGUAGES, load_words

MIB = 2**20
KINDS = {
    "creep": "allocated_bytes",
    "maximum": "peak_allocated_bytes",
    "above-prediction": "peak_allocated_bytes",
    "fragmentation": "reserved_bytes",
    "retries": "allocator_retries",
    "loss-spike": "loss",
    "non-finite": "grad_norm",
    "headroom": "headroom_bytes",
    "slow-rank": "before_backward_s",
}


def start(rank: int, ranks: int, **fields: Any) -> dict[str, Any]:
    values = {
        "kind": "start",
        "rank": rank,
        "world_size": ranks,
        "pid": 1,
        "host": "node",
        "time_s": 1764400000.0,
        "device": "cuda:0",
        "device_name": "Some GPU",
        "total_bytes": 1000 * MIB,
        "memory_source": "torch's allocator of cuda",
        "energy_boundary": "",
        "environment": {},
        "prediction": {"allocated_bytes": {"low": 90 * MIB, "value": 100 * MIB, "high": 110 * MIB}},
        "limits": {"headroom_ratio": 0.05},
    }
    return values | fields


def step(number: int, **fields: Any) -> dict[str, Any]:
    memory = {"allocated_bytes": 50 * MIB, "peak_allocated_bytes": 102 * MIB, "headroom_bytes": 800 * MIB}
    times = {"time_s": 1764400000.0 + number, "step_s": 0.5, "loss": 1 / number}
    return {"kind": "step", "step": number, **memory, **times, **fields}


def write(folder: Path, *ranks: list[dict[str, Any]]) -> Path:
    path = folder / "run.jsonl"
    for rank, lines in enumerate(ranks):
        own = path.with_suffix(f".{rank}.jsonl") if rank else path
        own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def two_ranks(folder: Path) -> Path:
    alarms = [
        {"kind": "alarm", "alarm": kind, "step": 5, "rank": 1, "quantity": quantity, "value": 4.0}
        | {"limit": 2.0, "text": "said in English"}
        for kind, quantity in KINDS.items()
    ]
    end = {"kind": "end", "time_s": 1764400500.0}
    first = [start(0, 2), *(step(n) for n in range(1, 11)), end]
    rest = [start(1, 2), *(step(n, headroom_bytes=700 * MIB) for n in range(1, 11)), *alarms, end]
    return write(folder, first, rest)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_page_shows_memory_against_its_prediction_headroom_alarms_times_and_losses(
    lang: str, tmp_path: Path
) -> None:
    path = write_watch_html(read_records(two_ranks(tmp_path)), tmp_path / "page.html", lang=lang)
    text, words = path.read_text(), load_words(lang)
    for name in ("memory", "free", "time", "loss"):
        assert f'id="watch-{name}-t"' in text
    assert "102 MiB" in text  # the peak
    assert "100 MiB" in text  # its prediction
    assert "\u22121.96 %" in text  # the error
    assert text.count("<li>") >= len(KINDS)
    for kind in ("creep", "slow-rank"):
        beginning = words.texts[f"watch.alarm.{kind}"].split("{")[0]
        assert beginning in text
    assert re.search(r"\{\w+\}", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)) is None
    assert "said in English" not in text


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_report_of_a_proof_of_concept_has_the_training_as_a_chapter(lang: str, tmp_path: Path) -> None:
    record = read_records(two_ranks(tmp_path))
    text = render_html(full_poc(), lang=lang, watch=record)
    assert '<a href="#watch">' in text
    assert '<section id="watch"' in text
    assert f'id="{WATCH}"' in text
    assert '<section id="watch"' not in render_html(full_poc(), lang=lang)


def test_every_kind_of_alarm_and_every_quantity_has_words() -> None:
    for lang in LANGUAGES:
        texts = load_words(lang).texts
        for kind, quantity in KINDS.items():
            assert f"watch.alarm.{kind}" in texts
            assert f"watch.quantity.{quantity}" in texts


def test_a_training_on_a_processor_without_tensor_counts_shows_its_resident_memory(tmp_path: Path) -> None:
    lines = [start(0, 1, device="cpu", device_name="", memory_source="", prediction={})]
    lines += [
        {"kind": "step", "step": n, "time_s": float(n), "host_bytes": 300 * MIB, "loss": "nan"}
        for n in range(1, 4)
    ]
    chapter = watch_chapter(read_records(write(tmp_path, lines)), load_words("en"))
    assert set(chapter.plots) == {"memory"}  # no finite loss, no time, no free memory
    assert "resident memory" in chapter.plots["memory"]
    assert chapter.head.key == "watch.head_processor_one"
    assert not chapter.predictions


def test_a_record_without_steps_is_a_chapter_without_charts(tmp_path: Path) -> None:
    record = read_records(write(tmp_path, [start(0, 1)]))
    assert watch_chapter(record, load_words("en")).plots == {}
    write_watch_html(record, tmp_path / "page.html", lang="en")


def test_of_many_steps_the_highest_memory_of_each_stretch_is_drawn(tmp_path: Path) -> None:
    lines = [start(0, 1), *(step(n) for n in range(1, 5000))]
    lines[2500] = step(2500, peak_allocated_bytes=500 * MIB)
    chapter = watch_chapter(read_records(write(tmp_path, lines)), load_words("en"))
    path = re.search(r'<path class="line[^"]*" d="([^"]*)"', chapter.plots["memory"])
    assert path is not None
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", path[1])]
    assert len(heights) <= 400
    assert min(heights) < max(heights) / 2  # the single high step is not lost


def test_ranks_and_alarms_that_are_left_out_are_counted(tmp_path: Path) -> None:
    alarm = {"kind": "alarm", "alarm": "retries", "step": 1, "rank": 0, "quantity": "allocator_retries"}
    alarms = [alarm | {"value": 1.0, "limit": 0.0, "text": ""} for _ in range(60)]
    ranks = [[start(r, 40), step(1), *(alarms if r == 0 else ())] for r in range(40)]
    record = read_records(write(tmp_path, *ranks))
    chapter = watch_chapter(record, load_words("en"))
    assert chapter.hidden_ranks is not None
    assert chapter.hidden_ranks.value == 40 - len(chapter.ranks)
    assert chapter.hidden_alarms is not None
    assert chapter.hidden_alarms.value == 60 - len(chapter.alarms)
    assert chapter.plots["memory"].count("<path") <= 17


def test_the_command_writes_a_page_and_refuses_a_wrong_file_in_one_line(tmp_path: Path) -> None:
    two_ranks(tmp_path)
    command = [sys.executable, "-m", "memfit", "report", "--watch"]
    run = subprocess.run([*command, "run.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "run.en.html"
    assert (tmp_path / "run.en.html").is_file()
    wrong = subprocess.run(
        [*command, "none.jsonl"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "there is no such file" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_error_that_ended_a_rank_is_shown(tmp_path: Path) -> None:
    end = {"kind": "end", "time_s": 2.0, "error": "OutOfMemoryError", "message": "<b>CUDA\nout"}
    record = read_records(write(tmp_path, [start(0, 1), step(1), end]))
    row = watch_chapter(record, load_words("en")).ranks[0]
    assert (row.state, row.error) == ("failed", "OutOfMemoryError: <b>CUDA")
    page = write_watch_html(record, tmp_path / "page.html", lang="en").read_text()
    assert "<b>CUDA" not in page
