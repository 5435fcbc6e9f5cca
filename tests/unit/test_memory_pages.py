"""The calculator and the gallery: the page answers as `memfit estimate JOB`, or says that it cannot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import calculator
import memory_pages
import numpy
import pytest

FILE = memory_pages.page_data()
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no Node on this machine")


def setting(**changes: Any) -> dict[str, Any]:
    plain = {"precision": "float32", "recomputation": "none", "sharding": "none"}
    return {"model": "gpt-2", "device": "RTX-4090", **plain, "batch": 3, "second": 500} | changes


def in_node(expression: str, **given: Any) -> Any:
    program = (
        "const page = require(process.argv[1]); const given = JSON.parse(require('fs').readFileSync(0));"
        f"(async () => console.log(JSON.stringify({expression})))();"
    )
    done = subprocess.run(
        ["node", "-e", program, str(memory_pages.HERE / "answer.js")],
        input=json.dumps({"file": FILE, **given}),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize(
    "asked",
    [
        setting(batch=1, second=901),
        setting(precision="bf16-autocast", recomputation="blocks", sharding="fsdp2", device="H100-SXM"),
    ],
    ids=["one sample", "eight devices"],
)
def test_the_page_answers_as_memfit_estimate_does(asked: dict[str, Any]) -> None:
    """If a change of the predictions is meant, `python scripts/memory_pages.py trace` makes the data anew."""
    page, truth = calculator.page_answers([asked])[0], calculator.predicted(asked)
    verdict, error = calculator.judge(page, truth)
    assert verdict == "equal", (error, page, truth)


@needs_node
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch": 65}, "batch"),
        ({"batch": 0}, "batch"),
        ({"second": 1025}, "second"),
        ({"second": 63}, "second"),
        ({"model": "u-net-3d", "second": 100}, "multiple"),
        ({"model": "u-net-3d", "second": 128, "sharding": "fsdp2"}, "combination"),
        ({"device": "A400"}, "device"),
        ({"model": "sdxl"}, "model"),
    ],
)
def test_the_page_says_where_it_does_not_know(changes: dict[str, Any], reason: str) -> None:
    asked = setting(**changes)
    if asked["model"] in FILE["models"] or reason == "model":
        assert in_node("await page.answer(given.file, given.asked)", asked=asked) == {"run": reason}


@needs_node
def test_the_largest_batch_of_the_page_fits_and_the_next_does_not() -> None:
    asked = setting(second=1024)
    found = in_node("await page.largest(given.file, given.asked)", asked=asked)
    assert found["next"]
    fits = [
        a["fits"] for a in calculator.page_answers([asked | {"batch": found["value"] + n} for n in (0, 1)])
    ]
    assert fits == [True, False]


@needs_node
def test_the_page_draws_the_delays_of_frees_as_numpy_does() -> None:
    for by in FILE["late"]:
        drawn = in_node("Array.from(page.shifts(4000, given.by, given.file.random))", by=by)
        assert drawn == numpy.random.default_rng(0).integers(0, by + 1, 4000).tolist()


@needs_node
def test_the_commands_of_the_page_name_the_batch_of_all_devices_and_the_plan() -> None:
    asked = setting(precision="bf16-autocast", recomputation="blocks", sharding="fsdp2", batch=2)
    text = in_node("page.command(given.file, given.asked)", asked=asked)
    plan, command = text.split("EOF\n")
    import yaml

    assert yaml.safe_load(plan.split("\n", 1)[1]) == memory_pages.plan_of("bf16-autocast", "blocks", "fsdp2")
    spec = "memfit estimate hf:openai-community/gpt2 plan.yaml --batch 16 --length 500 --on 8xRTX-4090"
    assert command == spec
    plain = in_node("page.command(given.file, given.asked, 'largest')", asked=setting())
    assert yaml.safe_load(plain.split("\n", 1)[1].split("EOF")[0]) == {"techniques": {}}
    assert plain.endswith("--largest batch --on RTX-4090 --plan plan.yaml"), "without a plan it would search"


def test_a_polynomial_through_fitted_sizes_gives_sizes_between_them() -> None:
    def size(batch: int, length: int) -> int:
        return 7 + 3 * length + batch * (5 * length**2 + length)

    batches, lengths = (2, 32), (64, 384, 1024)
    fitted = memory_pages.coefficients(batches, lengths, [size(b, s) for b in batches for s in lengths])
    terms = [b * 777**p for b in (1, 5) for p in range(3)]
    assert sum(c * t for c, t in zip(fitted, terms, strict=True)) == size(5, 777)


def test_the_words_of_the_pages_have_the_same_keys_and_placeholders_in_both_languages() -> None:
    words = tomllib.loads((memory_pages.HERE / "words.toml").read_text(encoding="utf-8"))
    assert words["en"].keys() == words["ja"].keys()
    for key, text in words["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words["ja"][key])), key


def test_the_pages_are_single_files_that_load_nothing(tmp_path: Path) -> None:
    assert memory_pages.DATA.stat().st_size < 1_000_000
    pages = memory_pages.build(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in pages} >= {
        "calculator/index.html",
        "gallery/index.html",
        "gallery/gpt-2.html",
    }
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:link|img|iframe)\b|<script[^>]* src=|@import|url\(", text)
        for link in re.findall(r'href="([^"#]+)"', text):
            assert (page.parent / link).is_file()
