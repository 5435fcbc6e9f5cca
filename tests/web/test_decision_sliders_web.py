"""The first screen follows a slider or says that it does not; bars are as long as their sums; long names and
printing do not break the layout."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc, offers

from memfit.decision.case import parse_case
from memfit.decision.decide import decide
from memfit.report.html import write_html

CASE = """
currency = "JPY"
place = "japan"
[work]
runs_per_year = 35
years = 1
[money]
labour_per_hour = 3300
life_years = 5
[effort]
setup_hours = 5
[existing]
machine = "RTX-4090"
setup_hours = 1
operating_hours_per_year = 9
[purchase]
machine = "A100-80GB-PCIe"
price = 910000
setup_hours = 10
operating_hours_per_year = 9
[cloud]
machine = "H100-PCIe"
per_hour = 520
setup_hours = 6
operating_hours_per_year = 14
"""
EURO = """
currency = "EUR"
place = "germany"
[work]
runs_per_year = 35
[money]
labour_per_hour = {value = 60, low = 40, high = 90}
[effort]
setup_hours = {value = 5, low = 2, high = 20}
[existing]
machine = "RTX-4090"
setup_hours = 1
operating_hours_per_year = 9
[cloud]
setup_hours = 6
operating_hours_per_year = 14
"""
OUTSIDE = """() => [...document.querySelectorAll("th, td")].filter((e) => e.offsetParent !== null
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((e) => e.textContent)"""
# a heading may be at most as high as one line for each of its words
BROKEN = """() => [...document.querySelectorAll("thead th")].filter((e) => {
  const words = e.textContent.trim().split(/\\s+/), style = getComputedStyle(e);
  const most = parseFloat(style.lineHeight) * words.length + parseFloat(style.paddingTop) * 2 + 4;
  return e.textContent.trim() && e.getClientRects().length && e.clientHeight > 0 && inner(e) > most;
  function inner(head) {
    const range = document.createRange();
    range.selectNodeContents(head);
    return range.getBoundingClientRect().height;
  }
}).map((e) => e.textContent)"""
LONG = "a_machine_whose_name_has_no_place_to_break_" * 4


def page(browser: Any, folder: Path, text: str = CASE, width: int = 1280, **changed: Any) -> Any:
    poc = dataclasses.replace(full_poc(), offers=offers(), **changed)
    path = write_html(poc, folder / "it.html", lang="en", decision=decide(poc, parse_case(text, "it")))
    opened = browser.new_page(viewport={"width": width, "height": 900})
    opened.goto(path.as_uri())
    return opened


def test_bars_are_as_long_as_the_present_cost(browser: Any, tmp_path: Path) -> None:
    """A machine with a high residual value is not drawn by its purchase price."""
    opened = page(browser, tmp_path)
    seen = {}
    for row in opened.query_selector_all("#money table >> nth=0 >> tbody tr"):
        if row.is_visible():
            cost = float(row.query_selector("[data-figure=present_cost]").get_attribute("data-value"))
            bars = row.query_selector_all(".purse i")
            seen[cost] = sum(float(bar.evaluate("e => parseFloat(e.style.width)")) for bar in bars)
    widest = max(seen)
    assert len(seen) >= 4
    for cost, width in seen.items():
        assert width == pytest.approx(100 * cost / widest, abs=0.05)
    opened.close()


def test_figures_that_do_not_follow_a_slider_say_so(browser: Any, tmp_path: Path) -> None:
    opened = page(browser, tmp_path)
    notes = opened.locator("[data-at-start]")
    assert not any(notes.nth(i).is_visible() for i in range(notes.count()))
    opened.locator("#in-labour").fill("13000")
    for name in ("fits", "money", "risk", "next"):
        card = opened.locator(f".q-{name}")
        assert card.locator("[data-at-start]").is_visible()
    assert not opened.locator(".q-money [data-of-start]").first.is_visible()
    for room in ("uncertainty", "carbon", "risks", "stages", "phrases"):
        assert opened.locator(f"#{room} [data-at-start]").first.is_visible(), room
    best = opened.locator("tr.best").first
    assert opened.locator("[data-live=plan]").inner_text() == best.locator("[data-plan]").inner_text()
    shown = [n.get_attribute("data-value") for n in opened.query_selector_all("[data-live=saved]")]
    assert len(shown) == 2  # on the first screen and on the card
    assert set(shown) == {best.locator("[data-figure=saved]").get_attribute("data-value")}
    opened.close()


def test_a_long_name_does_not_widen_the_page(browser: Any, tmp_path: Path) -> None:
    text = CASE.replace('"RTX-4090"', f'"{LONG}"\nhours_recommended = 3\npower_w = 300')
    for width in (390, 1280):
        names = dict.fromkeys(
            ("job_title", "job_name", "machine", "metric", "metric_unit", "data_source"), LONG
        )
        opened = page(browser, tmp_path, text, width=width, **names, notes=(LONG,), environment={LONG: LONG})
        opened.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        opened.close()


def test_in_print_no_column_is_cut_off_and_no_word_breaks(browser: Any, tmp_path: Path) -> None:
    opened = page(browser, tmp_path, CASE.replace("years = 1", "years = 1\nvalue_per_run = 2500"), width=718)
    opened.emulate_media(media="print")
    assert opened.evaluate(OUTSIDE) == []
    assert opened.evaluate(BROKEN) == []
    opened.close()


def test_where_saving_does_not_pay_the_answer_fits_the_first_screen(browser: Any, tmp_path: Path) -> None:
    opened = page(browser, tmp_path, CASE.replace("RTX-4090", "A100-80GB-PCIe"))
    for part in (".headline", ".three", ".memory", ".next"):
        box = opened.query_selector(f"#answer {part}").bounding_box()
        assert box["y"] + box["height"] <= 900
    opened.close()


EDGES = {
    "a card in Japan": "",
    "few hours": "utilisation_ratio = 0.02",
    "few runs": "runs_per_year = 0.2",
    "half a run": "runs_per_year = 2.5",
    "free electricity": "energy_per_kwh = 0",
}
READ = """() => {
  const form = document.getElementById("sliders");
  if (form) form.remove();
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  return document.body.innerText.split("\\n");
}"""


@pytest.mark.parametrize("more", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("place", ["japan", "germany"])
def test_opening_a_page_changes_none_of_its_texts(
    browser: Any, tmp_path: Path, place: str, more: str
) -> None:
    """Also in a currency other than the catalog's, and with numbers outside of the range of a slider."""
    text = CASE if place == "japan" else EURO
    for name in ("runs_per_year", "utilisation_ratio", "energy_per_kwh"):
        if more.startswith(name):
            text = re.sub(rf"^{name} = .*\n", "", text, flags=re.M)
    table = "[money]" if more.startswith("energy") else "[work]"
    text = text.replace(table, f"{table}\n{more}", 1)
    opened = page(browser, tmp_path, text)
    scripted = opened.evaluate(READ)
    html = Path(opened.url.removeprefix("file://")).read_text(encoding="utf-8")
    opened.close()
    still = tmp_path / "still.html"
    still.write_text(re.sub(r"<script.*?</script>", "", html, flags=re.S), encoding="utf-8")
    bare = browser.new_page(viewport={"width": 1280, "height": 900})
    bare.goto(still.as_uri())
    written = bare.evaluate(READ)
    bare.close()
    assert [(a, b) for a, b in zip(written, scripted, strict=True) if a != b] == []
