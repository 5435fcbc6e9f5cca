"""The decision in a real browser: four answers first, sliders that follow the formulas, no other script."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_fixture import full_poc, offers

from memfit.decision import money, monte_carlo, stages
from memfit.decision.case import DecisionCase, parse_case
from memfit.decision.decide import decide
from memfit.report.html import write_html
from memfit.report.quantities import MANY, figure_text, predicted
from memfit.report.words import load_words
from memfit.types.decision import PRICE_FACTORS, Alternative, Amount, CostSheet, Decision, Term, Terms

YEN = """
currency = "JPY"
place = "japan"
tariff = "japan-high-voltage"
[work]
steps_per_run = 400000
runs_per_year = 60
value_per_run = 30000
[money]
labour_per_hour = {value = 6000, low = 5000, high = 8000}
[effort]
setup_hours = {value = 12, low = 6, high = 30}
[existing]
machine = "RTX-4090"
setup_hours = 2
operating_hours_per_year = 40
[purchase]
setup_hours = 8
operating_hours_per_year = 40
[cloud]
machine = "A100-80GB-PCIe"
per_hour = {value = 180, low = 150, high = 220}
setup_hours = 4
operating_hours_per_year = 10
"""
EVIL = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'>{0}[red]"


@functools.cache
def made(text: str = YEN) -> Decision:
    return decide(dataclasses.replace(full_poc(), offers=offers()), parse_case(text, "it"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("decisions")
    poc = dataclasses.replace(full_poc(), offers=offers())
    decisions = {"yen": made(), "bare": made(""), "none": decide(full_poc(), DecisionCase())}
    return {
        f"{name}-{lang}": write_html(poc, folder / f"{name}-{lang}.html", lang=lang, decision=one)
        for name, one in decisions.items()
        for lang in ("en", "ja")
    }


@pytest.fixture
def opened(browser: Any, pages: Mapping[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    name, width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(pages[name].as_uri())
    yield page
    page.close()


def at(*names: str, width: int = 1280, scheme: str = "light") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("opened", [(n, width, scheme) for n in names], indirect=True, ids=str)


EVERY = [
    (f"{n}-{lang}", w, "light") for n in ("yen", "bare", "none") for lang in ("en", "ja") for w in (1280, 390)
]
EVERY += [("yen-en", width, "dark") for width in (1280, 390)]


@pytest.mark.quick_cases(
    "*yen-en*light*",
    "*yen-en*390, 'dark'*",
    "*yen-ja*390*",
    "*bare-ja*1280*",
    "*bare-en*390*",
    "*none-en*1280*",
    "*none-ja*390*",
)
@pytest.mark.parametrize("opened", EVERY, indirect=True, ids=str)
def test_the_page_has_no_overflow_errors_or_accessibility_violations(opened: Any, overflowing: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert opened.said == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    assert opened.evaluate(overflowing) == []
    found = Axe().run(opened).response["violations"]
    grave = [
        (v["id"], [n["target"] for n in v["nodes"]][:3])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert grave == []


PARTS = (".headline", ".three", ".memory", ".next")  # the first screen


@at("yen-en", "yen-ja", "bare-en", "bare-ja", "none-en", "none-ja")
def test_sentence_numbers_picture_and_next_step_fit_the_first_screen(opened: Any) -> None:
    for part in PARTS:
        box = opened.query_selector(f"#answer {part}").bounding_box()
        assert box["y"] + box["height"] <= 900
    assert len(opened.query_selector_all("#answer .three > div")) == 3
    assert len(opened.query_selector_all("#answer .memory .row")) == 3
    assert len(opened.query_selector_all(".four .card")) == 4


@at("yen-en", "yen-ja", "bare-en", "bare-ja", width=390)
def test_the_first_screen_fits_a_phone(opened: Any) -> None:
    opened.set_viewport_size({"width": 390, "height": 844})
    for part in PARTS:
        box = opened.query_selector(f"#answer {part}").bounding_box()
        assert box["y"] + box["height"] <= 844


@at("yen-en", "yen-ja", "bare-en", "bare-ja", width=718)
def test_the_first_screen_prints_as_one_page(opened: Any) -> None:
    """A4 is 794 px wide and 1,123 px high; Chromium's margins are 38 px."""
    opened.emulate_media(media="print")
    box = opened.query_selector("main > .meta").bounding_box()
    assert box["y"] + box["height"] <= 1123 - 2 * 38
    decision = opened.query_selector("#decision")
    assert decision.evaluate("e => getComputedStyle(e).breakBefore") == "page"


# -- sliders ---------------------------------------------------------------------------------------------

SHOWN = ("initial", "running_per_year", "present_cost", "cost_per_run", "electricity_per_year", "residual")
MOVES: list[dict[str, float]] = [
    {},
    {"energy": 60.0},
    {"hardware": 0.4},
    {"hardware": 2.5, "runs": 150},
    {"labour": 15000.0, "setup": 90.0},
    {"runs": 1},
    {"utilisation": 0.12},
    {"energy": 5.0, "hardware": 0.3, "labour": 900.0, "setup": 1.0, "runs": 200, "utilisation": 0.95},
]
SET = """([name, value]) => {
  const input = document.querySelector(`#sliders input[name=${name}]`);
  input.step = "any"; input.max = 1e9; input.value = value;
  input.dispatchEvent(new Event("input", {bubbles: true}));
}"""


def after(decision: Decision, moves: Mapping[str, float]) -> tuple[list[Alternative], Terms]:
    """Ways and terms after the sliders have moved, as the document defines them."""
    terms, hours = decision.terms, 12.0
    if "energy" in moves:
        terms = dataclasses.replace(terms, energy_per_kwh=Amount(own=moves["energy"]), levy_per_kwh=Amount())
    names = {
        "hardware": "hardware_factor",
        "labour": "labour_per_hour",
        "runs": "runs_per_year",
        "utilisation": "utilisation_ratio",
    }
    terms = dataclasses.replace(terms, **{names[k]: v for k, v in moves.items() if k in names})
    more = moves.get("setup", hours) - hours
    ways = [
        w
        if w.plain or w.kind == "nothing"
        else dataclasses.replace(w, setup_hours=w.setup_hours + more, plan_hours=w.plan_hours + more)
        for w in decision.ways
    ]
    return ways, terms


@pytest.mark.parametrize("moves", MOVES, ids=lambda m: ",".join(m) or "start")
@at("yen-en")
def test_figures_follow_the_sliders_by_the_formulas(opened: Any, moves: dict[str, float]) -> None:
    decision = made()
    ways, terms = after(decision, moves)
    for name, value in moves.items():
        opened.evaluate(SET, [name, value])
    sheets = [money.sheet(way, terms) for way in ways]

    def pick(kind: str) -> int | None:
        return money.cheapest(ways, sheets, [i for i, w in enumerate(ways) if w.kind == kind])

    plain = [i for i, w in enumerate(ways) if w.plain and w.kind in ("purchase", "cloud")]
    reference = money.cheapest(ways, sheets, plain)
    mine = next(i for i, w in enumerate(ways) if w.kind == "existing")
    slots = {"existing": mine, "purchase": pick("purchase"), "cloud": pick("cloud"), "reference": reference}
    assert reference is not None
    for slot, index in slots.items():
        row = opened.locator(f"tr[data-slot={slot}]").first
        if index is None:
            assert not row.is_visible()
            continue
        assert row.locator("[data-name]").inner_text().endswith(ways[index].machine)
        _same(opened, slot, sheets[index])
        if slot != "reference":
            share = sheets[index].saved_percent(sheets[reference])
            told = float(row.locator("[data-figure=saved]").get_attribute("data-value"))
            assert told == pytest.approx(share, rel=1e-9, abs=1e-9)
    candidates = [i for i in (mine, slots["purchase"], slots["cloud"]) if i is not None and sheets[i].enough]
    best = min(candidates, key=lambda i: sheets[i].present_cost)
    assert opened.locator("[data-live=present]").inner_text().strip() == yen(sheets[best].present_cost)
    assert opened.locator("tr.best [data-name]").first.inner_text().endswith(ways[best].machine)
    setup = moves.get("setup", 12.0) / 12.0
    numbers = tuple(_ranged(t, decision.terms, terms, setup) for t in decision.numbers)
    _same_stages(
        opened,
        dataclasses.replace(decision, terms=terms, ways=tuple(ways), sheets=tuple(sheets), numbers=numbers),
    )
    if "energy" not in moves:  # the energy slider includes the levy
        _same_swings(opened, numbers, ways, terms, best, reference)


def _ranged(t: Term, before: Terms, after: Terms, setup: float) -> Term:
    """Each range moves with its slider."""

    def size(of: Terms) -> float:
        now = getattr(of, t.name)
        return now.at(of.per_usd) if isinstance(now, Amount) else now

    if t.name != "setup_hours" and not (hasattr(after, t.name) and None not in (t.low, t.high)):
        return t
    ratio = setup if t.name == "setup_hours" else size(after) / size(before) if size(before) else 1.0
    return dataclasses.replace(t, value=ratio * t.value, low=ratio * t.low, high=ratio * t.high)


def _same_stages(page: Any, there: Decision) -> None:
    """The stages keep the machines that they began with."""
    first, pilot, full = there.stages
    trial, whole = (None if s.way is None else there.ways[s.way] for s in (pilot, full))
    wanted = {
        "spent": stages.running_cost(first.energy_j, first.hours, there.terms),
        "pilot": stages.pilot_cost(there, trial),
        "most": stages.pilot_most(there, trial),
        "full": stages.cost_after_pilot(there, whole, trial),
    }
    assert None not in wanted.values()
    for name, value in wanted.items():
        cells = page.query_selector_all(f"[data-stage={name}]:not([data-still] *)")
        assert len(cells) >= (8 if name == "most" else 1)  # also on the cards and in the risks
        for cell in cells:
            assert float(cell.get_attribute("data-value")) == pytest.approx(value, rel=1e-9)
            assert cell.text_content().startswith(yen(value))


def _same_swings(
    page: Any, told: Sequence[Term], ways: list[Alternative], terms: Terms, best: int, reference: int
) -> None:
    """The script of the page computes the swings with code of its own."""
    pair = ways[best], ways[reference]  # the sellers' prices are those of the options shown now
    ranges = (*(t for t in told if t.name not in PRICE_FACTORS), *monte_carlo.price_factors(*pair))
    wanted = {s.name: s for s in monte_carlo.tornado(*pair, terms, ranges)}
    rows = page.query_selector_all("[data-swing]")
    assert len(rows) > 5
    for row in rows:
        ends = [
            float(row.query_selector(f"[data-end={e}]").get_attribute("data-value")) for e in ("low", "high")
        ]
        swing = wanted.get(row.get_attribute("data-swing"))
        if swing is not None:
            assert ends == pytest.approx([swing.low_percent, swing.high_percent], rel=1e-9, abs=1e-9)
        else:
            assert ends[0] == pytest.approx(ends[1])


def _same(page: Any, slot: str, sheet: CostSheet) -> None:
    for name in SHOWN:
        cell = page.locator(f"tr[data-slot={slot}] [data-figure={name}]").first
        assert float(cell.get_attribute("data-value")) == pytest.approx(
            getattr(sheet, name), rel=1e-9, abs=1e-6
        )


@at("yen-en", "yen-ja")
def test_marks_of_figures_link_to_the_record_of_the_machine_shown(opened: Any) -> None:
    """Where a slider puts another machine into a row, the marks of its figures lead to that one's line."""
    opened.evaluate(SET, ["hardware", 0.2])
    seen = set()
    for row in opened.query_selector_all("#money tbody tr[data-slot]"):
        if not row.is_visible() or row.get_attribute("data-slot") == "nothing":
            continue
        machine = row.query_selector("[data-name]").inner_text()
        for link in row.query_selector_all("[data-figure] a.num"):
            target = link.get_attribute("href")
            record = opened.query_selector(target)
            assert machine.lower() in record.inner_text().lower()
            assert link.get_attribute("title").endswith(record.query_selector("th").inner_text())
            assert link.query_selector(".tag").get_attribute("aria-label") == link.get_attribute("title")
            seen.add(target)
    assert len(seen) > 2
    start = {i for slot, i in made().slots if slot != "nothing"}
    assert {int(t.removeprefix("#way-")) for t in seen} != start, "another machine stands in a row now"


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_a_large_loss_is_written_alike_by_page_and_script(
    browser: Any, pages: Mapping[str, Path], lang: str
) -> None:
    page = browser.new_page()
    page.goto(pages[f"yen-{lang}"].as_uri())
    page.evaluate(SET, ["labour", 200000.0])
    page.evaluate(SET, ["hardware", 50.0])
    words, told = load_words(lang), []
    for cell in page.query_selector_all("#money [data-figure=saved]"):
        value = cell.get_attribute("data-value")
        if value is not None and cell.is_visible():
            assert cell.inner_text().strip() == figure_text(predicted(float(value), "saving"), words)
            told.append(float(value))
    assert min(told) < MANY < max(told)
    page.close()


def yen(value: float) -> str:
    return f"¥{value:,.0f}"


@at("yen-en", "bare-ja")
def test_untouched_sliders_change_no_text(opened: Any) -> None:
    """The page reads the same with and without its script."""
    live = "[data-figure], [data-live], [data-end]"
    drawn = [e.text_content() for e in opened.query_selector_all(live)]
    still = opened.context.browser.new_page(java_script_enabled=False)
    still.goto(opened.url)
    written = [
        e.inner_text().strip() for e in still.query_selector_all("[data-figure], [data-live], [data-end]")
    ]
    still.close()
    squeezed = ["".join(t.split()) for t in drawn]
    visible = [(a, b) for a, b in zip(squeezed, ("".join(t.split()) for t in written), strict=True) if b]
    assert len(visible) > 20
    assert [a for a, b in visible if a.lower() != b.lower()] == []  # styles make first letters large


@at("yen-en")
def test_reset_restores_the_initial_figures(opened: Any) -> None:
    before = opened.inner_text("#money tbody")
    opened.locator("#in-hardware").fill("3")
    assert opened.inner_text("#money tbody") != before
    opened.click("#sliders button[type=reset]")
    opened.locator("#sliders [data-at-start]").wait_for(state="hidden")
    assert opened.inner_text("#money tbody") == before


# -- printing and hostile texts --------------------------------------------------------------------------


@at("yen-en", "yen-ja")
def test_the_printed_page_hides_the_sliders_and_shows_the_risks(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert not opened.locator("#sliders").is_visible()
    assert opened.locator("#risks").is_visible()
    assert opened.pdf(format="A4").startswith(b"%PDF")


def test_hostile_texts_are_shown_and_do_not_run(browser: Any, tmp_path: Path) -> None:
    case = parse_case(
        f"[existing]\nmachine = {json.dumps(EVIL)}\nhours_recommended = 3\npower_w = 300\n"
        f"[money]\nlabour_per_hour = {{value = 60, source = {json.dumps(EVIL)}}}\n",
        "it",
    )
    poc = dataclasses.replace(
        full_poc(),
        offers=offers(),
        job_title=EVIL,
        job_name=EVIL,
        machine=EVIL,
        notes=(EVIL,),
        metric=EVIL,
        command=EVIL,
        data_source=EVIL,
        environment={EVIL: EVIL},
    )
    path = write_html(poc, tmp_path / "evil.html", lang="en", decision=decide(poc, case, name=EVIL))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.images.length") == 0
    assert page.inner_text("body").count(EVIL) >= 8
    opened = page.locator("[data-name]", has_text="existing").first.inner_text()
    assert opened == f"The existing {EVIL}"  # also after the script has written it
    page.close()
