"""The report shows what a proof of concept holds, in both languages, with missing data or hostile texts."""

from __future__ import annotations

import dataclasses
import io
import re
import string
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import (
    BOTH,
    CAP,
    PEAKS,
    PLAIN,
    RECOMMENDED,
    estimate,
    full_poc,
    losses,
    minimal_poc,
    search,
    timeline,
)
from rich.console import Console

from memfit.cost.memory_estimate import UNKNOWN_FOOTPRINT
from memfit.report import charts, terminal
from memfit.report.answer import answer
from memfit.report.case import CLASSES, case_view
from memfit.report.choices import _reason, search_view
from memfit.report.html import render_html, write_html
from memfit.report.quantities import (
    Figure,
    Mark,
    difference_unit,
    figure_text,
    measured,
    predicted,
    sentence_text,
)
from memfit.report.view import downsample, poc_view
from memfit.report.words import LANGUAGES, load_words
from memfit.types import serialization
from memfit.types.errors import UserError
from memfit.types.result import OutcomeKind, Poc, Reason, ReasonKind, VerdictKind
from memfit.types.units import GIB, MIB

EN = load_words("en")
REASONS = (
    "saves",
    "left_out_slower",
    "left_out_not_needed",
    "left_out_uncertain",
    "left_out_forbidden",
    "left_out_accuracy",
    "left_out_unavailable",
    "left_out_small",
    "left_out_only_saves",
    "left_out_does_not_fit",
    "left_out_too_large",
    "left_out_late",
    "needed",
    "needed_priced",
    "needed_late",
)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def said(poc: Poc) -> list[str]:
    return [sentence_text(sentence, EN) for sentence in answer(poc)]


def shown(lang: str = "en", width: int = 200) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, color_system=None), out


def test_every_language_has_the_same_keys_and_placeholders() -> None:
    for lang in LANGUAGES:
        other = load_words(lang)
        assert list(other.texts) == list(EN.texts)
        for key, text in EN.texts.items():
            assert placeholders(other.texts[key]) == placeholders(text), key


def test_every_japanese_text_has_a_japanese_character() -> None:
    """Signs, formulas and the name of a command are exempt."""
    plain = {key for key, text in load_words("ja").texts.items() if not re.search(r"[぀-ヿ一-鿿]", text)}
    signs = {
        "autopsy.unknown",
        "column.carbon",
        "text.colon",
        "text.effect_note",
        "text.with_note",
        "terminal.verdict",
        "explain.brand",
        "lint.instead",
        "record.poc",
        "scale.reason",
        "stages.back_known",
        "stages.gate_line",
        "stages.poc",
        "summary.alone",
        "summary.both",
        "watch.brand",
    }
    assert {key for key in plain if not key.startswith(("engine.", "plan."))} <= signs


@pytest.mark.parametrize("kind", REASONS)
def test_every_search_reason_has_a_text(kind: str) -> None:
    assert f"reason.{kind}" in EN.texts


@pytest.mark.parametrize(
    ("lang", "text"),
    [
        ("en", "sgd is left out: the accuracy (rounding, the default) does not allow it."),
        ("ja", "sgd は不採用：精度条件（丸めの違いまで、既定）では許容されません。"),
    ],
)
def test_an_accuracy_that_nobody_requested_is_called_the_default(lang: str, text: str) -> None:
    reason = Reason(kind=ReasonKind.LEFT_OUT_ACCURACY, technique="sgd", detail="rounding")
    assert sentence_text(_reason(reason), load_words(lang)) == text


def test_an_unknown_language_is_a_user_error_that_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'fr'.*allowed: en, ja"):
        write_html(full_poc(), tmp_path / "r.html", lang="fr")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        terminal.print_poc(full_poc(), console=Console(file=io.StringIO()), lang="fr")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (328 * MIB, "bytes", "328 MiB"),
        (0.6, "s", "600 ms"),
        (-3.2, "s", "\u22123.2 s"),
        (7_400_000, "parameters", "7.40 M"),
        (0.000288, "usd", "$0.000288"),
        (4.2e-8, "usd", "$4.2e\u221208"),
        (600.0, "j", "600 J"),
        (7200.0, "j", "2.00 Wh"),
        (0.06, "g", "60.0 mg"),
        (1234, "count", "1,234"),
        (1.31, "ratio", "1.31×"),
        (-0.0999999, "percent", "\u22120.10 %"),
        (67.2, "percentage points", "67.2 %"),
        (0.1, difference_unit("percentage points"), "0.10 points"),
        (0.1, difference_unit("nats"), "0.10 nats"),
        (0.0, "", "0"),
    ],
)
def test_figures_are_formatted_with_a_readable_unit(value: float, unit: str, text: str) -> None:
    assert figure_text(measured(value, unit), EN) == text


def test_unknown_figures_read_not_measured_or_not_predicted() -> None:
    assert figure_text(measured(None, "bytes"), EN) == "not measured"
    assert figure_text(predicted(float("nan"), "s"), EN) == "not predicted"
    assert figure_text(Figure(value=2.0, unit="percent", mark=Mark.MEASURED, signed=True), EN) == "+2.00 %"


def test_the_answer_has_three_sentences_with_their_figures() -> None:
    first, second, third = said(full_poc())
    assert "does not fit" in first
    assert "328 MiB" in first
    assert "fits: under the cap it peaked at 246.1 MiB, 18.7 % of plain training's peak, at 1.31×" in second
    assert third.startswith("Q3 stayed within the margin fixed beforehand")
    assert "\u22120.62 points to +0.82 points, 3 paired seeds" in third
    assert "±2.00 points" in third
    assert "bitwise equal" in third


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("ok", "Plain training fits"), ("timeout", "ran out of time"), ("failed", "failed")],
)
def test_the_answer_states_how_the_capped_baseline_ended(outcome: str, words: str) -> None:
    poc = full_poc()
    capped = poc.runs[0]
    ended = dataclasses.replace(capped.measurement, outcome=OutcomeKind(outcome))
    poc = dataclasses.replace(poc, runs=(dataclasses.replace(capped, measurement=ended), *poc.runs[1:]))
    assert words in said(poc)[0]


@pytest.mark.parametrize(
    ("kind", "words", "bare_words"),
    [
        (VerdictKind.EQUIVALENT, "Q3 stayed within the margin", "judged equivalent"),
        (VerdictKind.DIFFERENT, "Q3 changed by more than the margin", "judged different"),
        (VerdictKind.UNDECIDED, "is undecided", "is undecided"),
        (VerdictKind.NOT_SENSITIVE, "accuracy was kept is not shown", "accuracy was kept is not shown"),
    ],
)
def test_the_answer_never_claims_more_than_the_verdict(
    kind: VerdictKind, words: str, bare_words: str
) -> None:
    poc = full_poc()
    for bare in (False, True):
        verdict = dataclasses.replace(poc.verdicts[0].verdict, kind=kind)
        verdict = dataclasses.replace(verdict, margin=None, difference=None) if bare else verdict
        named = dataclasses.replace(poc.verdicts[0], verdict=verdict)
        sentence = said(dataclasses.replace(poc, verdicts=(named,)))[2]
        assert (bare_words if bare else words) in sentence
        if kind is not VerdictKind.EQUIVALENT:
            assert "stayed within" not in sentence


def test_the_answer_says_if_the_recommendation_was_not_completed() -> None:
    poc = full_poc()
    assert "was not measured" in said(dataclasses.replace(poc, runs=poc.runs[:1]))[1]
    oom = [
        dataclasses.replace(r, measurement=poc.runs[0].measurement)
        for r in poc.runs
        if r.spec.role == "recommended"
    ]
    assert "did not complete: out of memory" in said(dataclasses.replace(poc, runs=tuple(oom)))[1]
    assert "no comparison" in said(dataclasses.replace(poc, step_time_ratio=None))[1]


@pytest.mark.parametrize(
    ("reproducible", "step", "steps", "words"),
    [
        (True, None, None, "run twice gave bitwise equal results"),
        (True, None, 20, "run again for 20 steps gave bitwise equal losses"),
        (False, 7, None, "first differed at step 7"),
        (False, None, None, "different results"),
        (None, None, None, "not measured"),
    ],
)
def test_the_answer_says_whether_the_run_was_reproducible(
    reproducible: bool | None, step: int | None, steps: int | None, words: str
) -> None:
    poc = full_poc()
    found = dataclasses.replace(
        poc.reproducibility, reproducible=reproducible, first_differing_step=step, steps=steps
    )
    poc = dataclasses.replace(poc, reproducibility=found)
    assert words in said(poc)[2]
    Page(render_html(poc, lang="en"))


def test_view_compares_predicted_with_measured() -> None:
    view = poc_view(full_poc())
    capped, plain = view.runs[0], view.runs[1]
    assert (capped.outcome, capped.peak.value, capped.peak_error.value) == ("oom", None, None)
    assert plain.peak_error.value == pytest.approx(100 * (1 / 1.0004 - 1), rel=1e-3)
    assert plain.step.value == pytest.approx(0.6)
    assert plain.step_error.value == pytest.approx(4.0)
    assert (plain.predicted_peak.mark, plain.peak.mark, view.cap.mark) == ("predicted", "measured", "assumed")


def test_peaks_fall_from_plain_to_recommended() -> None:
    rows = poc_view(full_poc()).plans
    assert [r.role for r in rows] == ["baseline", "ablation", "ablation", "ablation", "recommended"]
    peaks = [r.peak.value or 0 for r in rows]
    assert peaks == sorted(peaks, reverse=True)
    assert rows[-1].share.value == pytest.approx(18.75)


def test_an_ablation_equal_to_the_recommendation_adds_no_row() -> None:
    poc = full_poc()
    again = dataclasses.replace(poc.runs[2], spec=dataclasses.replace(poc.runs[2].spec, role="ablation"))
    assert len(poc_view(dataclasses.replace(poc, runs=(*poc.runs, again))).plans) == 5


def test_run_time_and_energy_are_the_step_figures_times_the_steps() -> None:
    plain = poc_view(full_poc()).resources[0]
    assert plain.time.value == pytest.approx(40 * 0.6)
    assert plain.energy.value == pytest.approx(40 * 25 * 0.6)
    assert (plain.time.mark, plain.energy.mark, plain.money.mark) == ("measured", "predicted", "predicted")


@pytest.mark.parametrize(
    ("boundary", "mark"), [("package (RAPL)", "measured"), ("package (modelled: power x time)", "predicted")]
)
def test_only_metered_energy_is_marked_as_measured(boundary: str, mark: str) -> None:
    poc = full_poc()
    run = poc.runs[1]
    read = dataclasses.replace(run.measurement, energy_j=812.0, energy_boundary=boundary)
    row = poc_view(dataclasses.replace(poc, runs=(dataclasses.replace(run, measurement=read),))).resources[0]
    assert (row.energy.value, row.energy.mark, row.boundary) == (812.0, mark, boundary)


def test_a_technique_that_costs_memory_is_not_reported_as_saving() -> None:
    best = search().frontier[0]
    worse = Reason(kind=ReasonKind.SAVES, technique="bf16-autocast", saved_bytes=-3 * MIB, time_ratio=0.8)
    choice = dataclasses.replace(best, reasons=(worse,))
    found = search_view(dataclasses.replace(search(), recommended=choice)).recommended
    assert found is not None
    assert sentence_text(found.reasons[0], EN).startswith("bf16-autocast takes 3 MiB more memory, at 0.80×")


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=3000), st.integers(1, 700))
def test_thinning_a_series_keeps_its_peak_and_the_limit_of_points(values: list[int], most: int) -> None:
    thinned = downsample(values, most)
    assert max(thinned) == max(values)
    assert len(thinned) <= max(most, 1)


@given(st.floats(0, 1e12), st.floats(1e-3, 1e12), st.sampled_from([1.0, 1024.0, float(MIB), float(GIB)]))
def test_axis_ticks_are_few_and_inside_the_axis(low: float, width: float, scale: float) -> None:
    axis = charts.Axis(title="", low=low, high=low + width * scale, scale=scale)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    slack = 1e-6 * (axis.high - axis.low) + 1e-9 * axis.high
    assert all(axis.low - slack <= t <= axis.high + slack for t in ticks)


def test_labels_of_a_chart_avoid_dots_and_lines() -> None:
    axis = charts.Axis(title="", low=0, high=100)

    def offsets(css: str, **parts: Any) -> list[str]:
        svg = charts.plot("c", title="t", description="d", x=axis, y=axis, **parts)
        return re.findall(rf'class="{css} [^>]* dy="([^"]*)"', svg)

    dot = charts.Dot(css="ring", x=20, y=50, hint="", label="recommended")
    other = charts.Dot(css="filled", x=21, y=45, hint="")
    assert offsets("name", dots=[dot]) == ["22"]
    assert offsets("name", dots=[dot, other]) == ["-12"]
    rule = charts.Rule(value=50, label="predicted")
    level = charts.Line(css="recommended", points=[(0, 10), (100, 52)])
    assert offsets("rule", rules=[rule]) == ["-6"]
    assert offsets("rule", rules=[rule], lines=[level]) == ["16"]


def test_a_phase_without_a_prediction_has_its_name_and_no_error() -> None:
    poc = full_poc()
    peaks = [{**run.measurement.phase_peak_bytes, "evaluation": 5 * MIB} for run in poc.runs]
    runs = tuple(
        dataclasses.replace(run, measurement=dataclasses.replace(run.measurement, phase_peak_bytes=of_run))
        for run, of_run in zip(poc.runs, peaks, strict=True)
    )
    page = render_html(dataclasses.replace(poc, runs=runs), lang="ja")
    row = page[page.index(">評価</td>") :].partition("</tr>")[0]
    assert "予測なし" in row
    assert "5 MiB" in row
    assert '<td class="n">–</td>' in row


def test_a_non_finite_loss_only_interrupts_its_line_in_the_chart() -> None:
    axis = charts.axis("loss", values=[1.0, float("nan"), 2.0, float("inf")], zero=False)
    assert (axis.low, axis.high) == (pytest.approx(0.92), pytest.approx(2.08))
    line = charts.Line(css="baseline", points=[(0, 1.0), (1, float("nan")), (2, 2.0)])
    steps = charts.Axis(title="step", low=0, high=2)
    svg = charts.plot("c", title="t", description="d", x=steps, y=axis, lines=[line])
    assert "nan" not in svg
    assert svg.count("M") == 2


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("poc", [full_poc(), minimal_poc()], ids=["full", "minimal"])
def test_html_is_one_file_that_loads_nothing(poc: Poc, lang: str, tmp_path: Path) -> None:
    path = write_html(poc, tmp_path / "deep" / "r.html", lang=lang)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    attributes = dict(page.tags)
    assert attributes["html"] == {"lang": lang}
    assert not [t for t, _ in page.tags if t in ("script", "img", "iframe", "object")]
    loaded = [v or "" for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert all(v.startswith(("#", "data:")) for v in loaded)
    assert not re.search(r"url\(|@import|https?://", text)
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]
    assert len(text) < 300_000


def test_html_holds_the_key_numbers_with_their_provenance() -> None:
    text = render_html(full_poc(), lang="en")
    page = Page(text)
    for number in ("1.282 GiB", "246.1 MiB", "18.7 %", "1.31×", "+4.00 %", "67.2 %", "131 GiB", "3.17×"):
        assert number in page.text
    marks = {m for m in Mark if f'<a class="num {m}" href="#' in text}
    assert marks == set(Mark)
    for value, mark in (("246.1 MiB", "measured"), ("328 MiB", "assumed")):
        told = (
            rf'<a class="num {mark}" href="#[\w-]+" title="{mark}, from \w+">{value}<i class="tag" role="img"'
        )
        assert re.search(told, text)
    drawn = [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert [a["aria-labelledby"] for a in drawn] == [
        "timeline-t timeline-d",
        "pareto-t pareto-d",
        "losses-t losses-d",
    ]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_only_a_job_with_a_recorded_case_has_a_case_chapter(lang: str) -> None:
    case = case_view("alphafold2")
    assert case is not None
    page = Page(render_html(dataclasses.replace(full_poc(), job_name="alphafold2"), lang=lang))
    bars = [a for tag, a in page.tags if tag == "rect" and (a.get("class") or "").startswith("c-")]
    assert len(bars) == sum(len(plan.parts) for size in case.sizes for plan in size.plans)
    assert load_words(lang).get("section.case") in page.text
    assert case.created in page.text  # the date of the recording is given
    other = Page(render_html(full_poc(), lang=lang))
    assert load_words(lang).get("section.case") not in other.text


def test_a_recorded_case_adds_up_and_has_a_text_for_every_name() -> None:
    case = case_view("alphafold2")
    assert case is not None
    assert [(s.residues, s.rows) for s in case.sizes] == [(256, 128), (384, 512)]
    for size in case.sizes:
        assert f"case.size.{size.name}" in EN.texts
        for plan in size.plans:
            assert f"case.plan.{plan.plan}" in EN.texts
            assert sum(part for _, part in plan.parts) == plan.peak.value
            assert plan.fits is (plan.peak.value < case.memory.value)
    assert all(f"case.class.{name}" in EN.texts for name in CLASSES)
    assert case_view("char-lm") is case_view("../words") is None


def test_html_ids_are_unique_and_links_have_targets() -> None:
    page = Page(render_html(full_poc(), lang="ja"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for t, a in page.tags if t == "a"}
    assert targets <= set(ids)


def test_the_contents_list_every_section_after_them_in_its_order() -> None:
    page = render_html(full_poc(), lang="en")
    contents = page[page.index("<nav") : page.index("</nav>")]
    linked = re.findall(r'href="#([\w-]+)"', contents)
    assert linked == re.findall(r'<h2 id="([\w-]+)-h"', page[page.index("</nav>") :])
    assert {"runs", "search", "records"} <= {*linked}


def test_the_report_of_an_unfinished_poc_says_what_is_missing() -> None:
    page = Page(render_html(minimal_poc(), lang="en"))
    assert "was interrupted" in page.text
    for words in ("No run has finished yet", "No memory timeline was kept", "Not measured", "not recorded"):
        assert words in page.text


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_poc_interrupted_after_any_run_renders(cut: int) -> None:
    poc = full_poc()
    poc = dataclasses.replace(poc, runs=poc.runs[:cut], verdicts=(), interactions=(), finished=False)
    Page(render_html(poc, lang="ja"))


def test_a_stored_poc_renders_like_the_original() -> None:
    poc = full_poc()
    stored = serialization.loads(Poc, serialization.dumps(poc))
    assert render_html(stored, lang="en") == render_html(poc, lang="en")


def test_times_are_not_predicted_on_a_machine_of_unknown_speed() -> None:
    poc = minimal_poc()
    unknown = dataclasses.replace(
        poc.search.baseline,
        estimate=estimate(PLAIN, 2 * GIB, None),
        reasons=(Reason(kind=ReasonKind.SAVES, technique="x"),),
    )
    found = dataclasses.replace(poc.search, baseline=unknown, frontier=(unknown,), recommended=unknown)
    rows = tuple(dataclasses.replace(row, plain=unknown.estimate) for row in full_poc().paper)
    page = Page(render_html(dataclasses.replace(poc, search=found, paper=rows), lang="en"))
    assert "step not predicted" in page.text
    assert "x saves not predicted." in page.text


def test_hostile_texts_are_escaped_on_the_page_and_in_the_terminal() -> None:
    evil = "<script>alert(1)</script>{0}[red]"
    poc = full_poc()
    run = dataclasses.replace(
        poc.runs[0], measurement=dataclasses.replace(poc.runs[0].measurement, reason=evil)
    )
    poc = dataclasses.replace(
        poc,
        job_title=evil,
        machine=evil,
        metric=evil,
        cap_reason=evil,
        notes=(evil,),
        environment={evil: evil},
        runs=(run, *poc.runs[1:]),
    )
    text = render_html(poc, lang="en")
    page = Page(text)
    assert "script" not in {t for t, _ in page.tags}
    assert page.text.count(evil) >= 6
    console, out = shown()
    terminal.print_poc(poc, console=console, lang="en")
    assert evil in out.getvalue()


def test_an_old_report_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old", encoding="utf-8")

    def full_disk(*_: object, **__: object) -> Path:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="No space left on device; what was there is unchanged"):
        write_html(full_poc(), path, lang="en")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_terminal_summary_shows_key_figures_in_every_language(lang: str) -> None:
    console, out = shown()
    terminal.print_poc(dataclasses.replace(full_poc(), report="/home/me/r.html"), console=console, lang=lang)
    terminal.print_poc(minimal_poc(), console=console, lang=lang)
    text = out.getvalue()
    for part in (
        "1.282 GiB",
        "246.1 MiB",
        "1.31",
        "67.2 %",
        "/home/me/r.html",
        "18.0 MiB in encoder.layer.3",
    ):
        assert part in text
    assert load_words(lang).get("verdict.undecided") in text
    assert load_words(lang).get("page.unfinished") in text


def test_terminal_plan_marks_the_recommended_line() -> None:
    console, out = shown()
    terminal.print_search(search(), console=console, lang="en")
    text = out.getvalue()
    starred = [line for line in text.splitlines() if line.strip().startswith("*")]
    assert len(starred) == 1
    assert "412 estimated" in text
    assert "+ bf16-autocast saves 148 MiB at 0.87× the step time" in text
    assert "- qlora is left out" in text


def test_terminal_plan_shortens_a_long_frontier_and_counts_the_rest() -> None:
    console, out = shown()
    found = search()
    frontier = (*found.frontier, *[found.smallest] * 100)
    many = dataclasses.replace(found, frontier=frontier)
    terminal.print_search(many, console=console, lang="en")
    left = re.search(r"Further plans on the frontier between these: (\d+)\.", out.getvalue())
    assert left is not None
    assert int(left[1]) == len(frontier) - len(terminal._spread(search_view(many).frontier))


def test_terminal_plan_says_that_the_memory_beside_tensors_of_a_kind_of_device_is_unknown() -> None:
    found = full_poc().search
    estimate = dataclasses.replace(found.baseline.estimate, assumptions=(UNKNOWN_FOOTPRINT,))
    unknown = dataclasses.replace(found, baseline=dataclasses.replace(found.baseline, estimate=estimate))
    for lang, said in (("en", "Assumed: 6 % of the tensors' memory"), ("ja", "仮定：アロケーターの分として")):
        for result, is_said in ((unknown, True), (found, False)):
            console, out = shown(lang)
            terminal.print_search(result, console=console, lang=lang)
            assert (said in out.getvalue()) is is_said


def test_terminal_plan_says_once_what_the_step_times_rest_on() -> None:
    found = full_poc().search
    estimate = dataclasses.replace(found.baseline.estimate, step_basis="published")
    timed = dataclasses.replace(found, baseline=dataclasses.replace(found.baseline, estimate=estimate))
    for lang, said in (("en", " per step (from published figures),"), ("ja", "（公表値に基づく）、")):
        for result, count in ((timed, 1), (found, 0)):
            console, out = shown(lang)
            terminal.print_search(result, console=console, lang=lang)
            assert "".join(out.getvalue().split()).count("".join(said.split())) == count


def test_terminal_plan_marks_estimates_that_were_not_traced() -> None:
    found = search()
    (console, out), (other, plain) = shown(), shown()
    terminal.print_search(found, console=other, lang="en")
    assert "~" not in plain.getvalue()
    one, *rest = found.frontier
    sketched = dataclasses.replace(one, estimate=dataclasses.replace(one.estimate, traced=False))
    terminal.print_search(dataclasses.replace(found, frontier=(sketched, *rest)), console=console, lang="en")
    assert out.getvalue().count("~") == 4  # need, peak, step time, and the legend


def test_a_shortened_frontier_keeps_both_ends_and_the_recommended_plan() -> None:
    one = search_view(search()).smallest
    rows = [dataclasses.replace(one, plan=f"{i}", recommended=i == 77) for i in range(200)]
    few = terminal._spread(rows)
    assert (few[0], few[-1]) == (rows[0], rows[-1])
    assert rows[77] in few
    assert len(few) == 13
    assert terminal._spread(rows[:12]) == rows[:12]


def test_terminal_plan_names_the_smallest_plan_when_nothing_fits() -> None:
    console, out = shown()
    terminal.print_search(
        dataclasses.replace(search(), recommended=None, cap_bytes=MIB), console=console, lang="en"
    )
    assert "No allowed plan fits 1 MiB. The smallest needs 246 MiB" in out.getvalue()


def test_terminal_explain_shows_shares_and_sums_small_modules() -> None:
    console, out = shown()
    many = {f"layer.{i}": MIB for i in range(20)}
    found = dataclasses.replace(estimate(BOTH, 40 * MIB), by_module_bytes={"": 20 * MIB, **many})
    terminal.print_estimate(found, console=console, lang="en")
    text = out.getvalue()
    assert re.search(r"activations +20 MiB +50\.0 %", text)
    assert re.search(r"\(model itself\) +20 MiB +50\.0 %", text)
    assert re.search(r"6 smaller modules together +6 MiB +15\.0 %", text)
    assert "The peak is in the backward phase, at aten::mm." in text


def test_the_poc_fixture_is_consistent() -> None:
    """The hand-made PoC keeps the invariants of a real one."""
    poc = full_poc()
    assert poc.cap_bytes == CAP == PEAKS[PLAIN] // 4
    assert PEAKS[RECOMMENDED] <= CAP
    assert max(timeline(PEAKS[PLAIN])) == pytest.approx(PEAKS[PLAIN])
    assert sum(losses(0)[-4:]) < sum(losses(0)[:4])


def test_a_source_note_is_not_translated_as_an_engine_refusal() -> None:
    words = load_words("ja")
    assert words.of("zero is not supported by accelerate") == "accelerate は zero に非対応"
    source = "it is that of the 40 GB model; its larger memory is not in it"
    assert words.of(source) == source
