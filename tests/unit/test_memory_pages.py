"""The calculator and the gallery: the page answers as `memfit estimate JOB`, or says that it cannot."""

from __future__ import annotations

import dataclasses
import json
import random
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

from memfit.cost.cuda_workspaces import Multiprocessors, inside_cuda
from memfit.cost.workspaces import bound_bytes
from memfit.types.errors import UserError
from memfit.types.trace import base_name

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
        ({"batch": 0}, "number"),
        ({"batch": 1.5}, "number"),
        ({"second": -64}, "number"),
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
    japanese = in_node("page.command(given.file, given.asked, 'estimate', 'ja')", asked=asked)
    assert japanese == f"{text} --lang ja"
    plain = in_node("page.command(given.file, given.asked, 'largest')", asked=setting())
    assert yaml.safe_load(plain.split("\n", 1)[1].split("EOF")[0]) == {"techniques": {}}
    assert plain.endswith("--largest batch --on RTX-4090 --plan plan.yaml"), "without a plan it would search"


def calls_of_kernels() -> list[tuple[str, str, list[Any]]]:
    """(operator, signature, its arguments) of calls of the kernels whose memory the page computes."""
    rng, calls = random.Random(5), []

    def tensor(shape: list[int], dtype: str = "float32", order: list[int] | None = None) -> dict[str, Any]:
        strides, step = [0] * len(shape), 1
        for dim in reversed(order or range(len(shape))):
            strides[dim], step = step, step * shape[dim]
        return {"t": [shape, strides, dtype]}

    def between(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    for _ in range(60):
        dtype, batch, length = rng.choice(["float32", "bfloat16"]), between(1, 64), between(16, 16384)
        width = rng.choice([1, 3, 33, 768, 1000, 4096])
        rows = tensor([batch, length, width], dtype, rng.choice([[0, 1, 2], [0, 2, 1], [1, 0, 2]]))
        calls.append(("sum.dim_IntList", [rows, rng.choice([[0, 1], [0], [-1], [0, 2], [1]]), True]))
        counted = tensor([batch, length], rng.choice(["bool", "int32", "int64"]))
        calls.append(("sum.dim_IntList", [counted, [rng.choice([0, 1])]]))
        volume = tensor([batch, width, length, 7], dtype, rng.choice([[0, 1, 2, 3], [0, 2, 3, 1]]))
        calls.append(
            ("convolution_backward.default", [volume, rng.choice([[True, True, True], [True, True, False]])])
        )
        for name in sorted(memory_pages.REDUCTIONS.keys() - {"sum", "mean", "convolution_backward"}):
            norm = [2] if "norm" in name else []
            calls.append((f"{name}.dim", [rows, *norm, rng.choice([[0, 1], [0], [-1], 0])]))
        calls.append(("mean.dim", [tensor([batch * length, width], dtype), [0], True]))
        count = tensor([between(1, 20000)], "int64")
        calls.append(("sort.default", [count]))
        calls.append(("sort.default", [tensor([between(1, 300), between(1, 9000)]), rng.choice([0, 1])]))
        indices = tensor([between(1, 5000)], "int64")
        values = tensor([*indices["t"][0], rng.choice([1, width])], dtype)
        accumulates = rng.choice([True, False])
        calls.append(("index_put_.default", [tensor([batch, width], dtype), [indices], values, accumulates]))
        grad = tensor([batch, length, width], dtype, rng.choice([[0, 1, 2], [0, 2, 1]]))
        tokens = tensor([batch, length], "int64")
        rest = [rng.choice([33, 50257]), -1, rng.choice([True, False])]
        calls.append(("embedding_dense_backward.default", [grad, tokens, *rest]))
        q, k = (tensor([between(1, 8), 8, n, rng.choice([64, 80, 128, 256])], dtype) for n in (length, 77))
        dropout = rng.choice([0.0, 0.0, 0.1])
        calls.append(("_scaled_dot_product_flash_attention.default", [q, rng.choice([q, k]), q, dropout]))
        calls.append(("_scaled_dot_product_flash_attention_backward.default", [q, q, k, k]))
        calls.append(("_scaled_dot_product_efficient_attention_backward.default", [q, q, k, k]))
    return [(name.split(".")[0], json.dumps([f"aten.{name}", a, {}]), a) for name, a in calls]


@needs_node
def test_the_page_computes_the_memory_inside_kernels_as_the_predictions_do() -> None:
    calls = calls_of_kernels()
    names = [base_name(f"aten.{name}") for name, _, _ in calls]
    assert set(names) == memory_pages.TAKEN | memory_pages.BOUNDED
    card = Multiprocessors(58, 1536)
    found = in_node(
        "given.calls.map(([name, args]) => page.KERNELS[name](page.filled(args, {}), given.card))",
        card=dataclasses.asdict(card),
        calls=[(name, args) for name, (_, _, args) in zip(names, calls, strict=True)],
    )
    for page, (_, signature, _) in zip(found, calls, strict=True):
        inside = inside_cuda(signature, card)
        if inside is None:
            assert page == bound_bytes(signature, "cuda", 1), signature
        else:
            both = page if isinstance(page, dict) else {"beside": page, "alone": 0}
            assert both["beside"] == inside.beside_bytes, signature
            assert both["alone"] == inside.alone_bytes, signature


def test_a_size_that_is_no_polynomial_leaves_a_plan_out() -> None:
    fit = memory_pages.Fit(batches=(2, 32), seconds=(64, 384), checks=((5, 333),))
    points = [(2, 64), (2, 384), (32, 64), (32, 384), (5, 333)]
    padded = fit.polynomial(tuple(4 * b * -(-s // 32) * 32 for b, s in points))
    assert padded["multiple"] == 32
    with pytest.raises(UserError, match="no polynomial"):
        fit.polynomial(tuple(min(b * s, 3000) for b, s in points))


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
    assert memory_pages.DATA.stat().st_size < 2_000_000
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


def test_the_pages_in_a_site_link_to_its_start_in_both_languages(tmp_path: Path) -> None:
    for page in memory_pages.build(tmp_path, in_site=True):
        assert 'href="../index.html"' in page.read_text(encoding="utf-8"), page
    assert 'href="../ja/index.html"' in (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")
