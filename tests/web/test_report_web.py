"""The report in a real browser: no overflow, no empty chart, no message on the console."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc, minimal_poc

from memfit.report.explain import TracedEstimate
from memfit.report.explain_html import render_explained
from memfit.report.html import write_html
from memfit.types.trace import Allocation, Category, Phase, PhaseSpan, Trace

EMPTY_CHARTS = """() => [...document.querySelectorAll("svg:not(svg svg)")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width < 100 || box.height < 15;
}).length"""
# Two characters of one width that differ have been drawn from a font that knows them, not as two equal boxes.
DRAWS_JAPANESE = """() => {
  const pixels = (text) => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 40, height: 40});
    const pen = canvas.getContext("2d");
    pen.font = "30px " + getComputedStyle(document.body).fontFamily;
    pen.fillText(text, 2, 32);
    return pen.getImageData(0, 0, 40, 40).data.join();
  };
  return new Set(["測", "習", "プ"].map(pixels)).size === 3;
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    case = dataclasses.replace(full_poc(), job_name="alphafold2")
    pocs = {"full": full_poc(), "minimal": minimal_poc(), "case": case}
    for lang in ("en", "ja"):
        page = render_explained(explained(), job="words", lang=lang)
        (folder / f"explain-{lang}.html").write_text(page, encoding="utf-8")
    return {f"explain-{lang}": folder / f"explain-{lang}.html" for lang in ("en", "ja")} | {
        f"{name}-{lang}": write_html(poc, folder / f"{name}-{lang}.html", lang=lang)
        for name, poc in pocs.items()
        for lang in ("en", "ja")
    }


def explained() -> TracedEstimate:
    """Parameters, then three blocks whose activations are freed in reverse."""
    kib, made = 1024, []
    for block in range(3):
        about = {
            "step": 0,
            "module": f"blocks.{block}.mlp",
            "op": "aten.mm.default",
            "line": f"my.py:{block}",
        }
        state = {"category": Category.PARAMETER, "phase": Phase.SETUP, **about}
        saved = {"category": Category.ACTIVATION, "phase": Phase.FORWARD, **about}
        made.append(Allocation(start=block, end=None, size_bytes=100 * kib, **state))
        made.append(Allocation(start=10 + block, end=29 - block, size_bytes=400 * kib, **saved))
    spans = ((Phase.SETUP, 0, 10), (Phase.FORWARD, 10, 20), (Phase.BACKWARD, 20, 30))
    trace = Trace(
        device="cpu",
        steps=1,
        allocations=tuple(made),
        ops=(),
        parameter_count=1,
        trainable_count=1,
        spans=tuple(PhaseSpan(phase=p, step=0, start=a, end=b) for p, a, b in spans),
    )
    return TracedEstimate(estimate=full_poc().search.baseline.estimate, trace=trace, peak_clock=12)


@pytest.fixture
def opened(
    browser: Any, reports: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[tuple[Any, list[str]]]:
    """The page at (name, width, colour scheme) with every detail unfolded, and what the console said."""
    name, width, scheme = request.param
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda wanted: None if wanted.url.startswith(("file:", "data:")) else said.append(wanted.url),
    )
    page.goto(reports[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    yield page, said
    page.close()


EVERY = [
    (f"{name}-{lang}", width, scheme)
    for name in ("full", "minimal", "explain", "case")
    for lang in ("en", "ja")
    for width in (1280, 390)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("opened", EVERY, indirect=True, ids=lambda p: "-".join(map(str, p)))
def test_the_page_has_no_overflow_empty_charts_or_console_errors(
    opened: tuple[Any, list[str]], overflowing: str
) -> None:
    page, said = opened
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.evaluate(overflowing) == []
    assert page.evaluate(EMPTY_CHARTS) == 0


@pytest.mark.parametrize("opened", [("full-ja", 390, "light")], indirect=True, ids=str)
def test_the_japanese_page_shows_japanese_text(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    assert page.evaluate("document.documentElement.lang") == "ja"
    assert "事前に定めた許容範囲に収まりました" in page.inner_text("#answer")
    if not page.evaluate(DRAWS_JAPANESE):
        pytest.skip("no Japanese font on this machine")


@pytest.mark.parametrize("opened", [("full-en", 1280, "light")], indirect=True, ids=str)
def test_charts_show_their_areas_lines_and_marks(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    visible = "e => { const b = e.getBoundingClientRect(); return b.width > 300 && b.height > 200 }"
    for chart in ("timeline", "losses"):
        svg = page.query_selector(f'svg[aria-labelledby^="{chart}"]')
        assert svg is not None
        assert svg.evaluate(visible)
    # filled areas are measured, lines on them predicted, for both plans
    assert len(page.query_selector_all("#timeline .area.measured")) == 2
    assert len(page.query_selector_all("#timeline .line.predicted")) == 2
    assert len(page.query_selector_all("#search circle.ring")) == 5
    assert len(page.query_selector_all("#losses path.line")) == 6
    assert page.query_selector("#timeline .limit") is not None


@pytest.mark.parametrize(
    "opened", [("full-en", 1280, "light"), ("full-en", 1280, "dark")], indirect=True, ids=str
)
def test_text_colours_have_wcag_aa_contrast(opened: tuple[Any, list[str]]) -> None:
    """WCAG AA: 4.5 to 1 for the ink, the soft ink and the chips on what they stand on."""
    page, _ = opened
    ratios = page.evaluate("""() => {
      const style = getComputedStyle(document.documentElement);
      const light = (name) => {
        const hex = style.getPropertyValue(name).trim();
        const parts = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16) / 255);
        const [r, g, b] = parts.map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const pairs = [
        ["--ink", "--paper"], ["--soft", "--paper"], ["--soft", "--card"], ["--limit", "--paper"],
        ["--recommended", "--paper"], ["--good", "--good-bg"], ["--bad", "--bad-bg"], ["--open", "--open-bg"],
      ];
      return pairs.map(([a, b]) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return [a, (x + 0.05) / (y + 0.05)];
      });
    }""")
    assert [name for name, ratio in ratios if ratio < 4.5] == []


ONE = pytest.mark.parametrize("opened", [("explain-en", 1280, "light")], indirect=True, ids=str)


@ONE
def test_explain_opens_at_the_peak_and_shows_any_instant(opened: tuple[Any, list[str]]) -> None:
    page, said = opened
    assert page.inner_text("#now") == "forward · step 1 · tick 12 · 1.465 MiB"  # 300 + 1200 KiB
    assert "1.172 MiB · 80.0 %" in page.inner_text("#legend")
    page.focus("#plot")
    page.keyboard.press("Home")
    assert page.inner_text("#now").endswith("100 KiB")
    assert "activations" not in page.inner_text("#rows")
    page.click("#to-peak")
    box = page.locator("#plot").bounding_box()
    page.mouse.click(box["x"] + 76 + (box["width"] - 86) * 28.5 / 30, box["y"] + 200)
    assert page.inner_text("#now") == "backward · step 1 · tick 28 · 700 KiB"
    assert said == []


@ONE
def test_explain_zooms_by_wheel_pans_by_drag_and_resets_by_double_click(
    opened: tuple[Any, list[str]],
) -> None:
    page, _ = opened
    labels = "() => [...document.querySelectorAll('#plot text.x')].map(e => e.textContent)"
    whole = page.evaluate(labels)
    assert {"setup", "forward", "backward"} <= set(whole)
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 200)
    for _ in range(9):
        page.mouse.wheel(0, -100)
    page.wait_for_function(f"!({labels})().includes('backward')")
    for _ in range(4):
        page.mouse.move(box["x"] + 1100, box["y"] + 200)
        page.mouse.down()
        page.mouse.move(box["x"] + 100, box["y"] + 200, steps=4)
        page.mouse.up()
    assert "backward" in page.evaluate(labels)
    assert page.inner_text("#now").startswith("forward")  # a drag does not select an instant
    page.mouse.dblclick(box["x"] + 600, box["y"] + 200)
    assert page.evaluate(labels) == whole


@ONE
def test_the_explain_map_opens_a_category_and_returns_by_breadcrumb(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    tiles = "() => [...document.querySelectorAll('.tile')].map(e => e.getAttribute('aria-label'))"
    assert any(
        "activations › blocks › 2 › mlp" in text and "400 KiB" in text for text in page.evaluate(tiles)
    )
    page.locator(".tile", has_text="parameters").first.click(position={"x": 8, "y": 6})
    assert page.inner_text("#crumbs").replace("\n", " ").startswith("everything › parameters and buffers")
    assert not any("activations" in text for text in page.evaluate(tiles))
    page.click("#crumbs button")
    assert any("activations" in text for text in page.evaluate(tiles))
    share = page.evaluate("""() => { const map = document.getElementById("map").getBoundingClientRect();
      const tile = document.querySelector(".tile.c-activation").getBoundingClientRect();
      return tile.width * tile.height / map.width / map.height }""")
    assert share == pytest.approx(0.8, abs=0.01)  # the area of a tile is proportional to its bytes
