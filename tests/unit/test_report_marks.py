"""Every figure of the report carries a mark and links to the record that it comes from."""

from __future__ import annotations

import dataclasses
import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fixture import full_poc, minimal_poc, offers

from memfit.decision.case import parse_case
from memfit.decision.decide import decide
from memfit.report import html
from memfit.report.html import render_html
from memfit.report.quantities import Mark, figure_text, measured, predicted, sourced
from memfit.report.words import LANGUAGES, load_words
from memfit.types.result import Cause, EndpointDifference, VerdictKind
from memfit.verify import float32, judge, sensitivity
from memfit.workflows import proof_of_concept

CASE = """
currency = "JPY"
place = "japan"
tariff = "japan-high-voltage"
[work]
value_per_run = 30000
[money]
labour_per_hour = {value = 6000, low = 5000, high = 8000, source = "payroll", date = "2026-04-01"}
[effort]
setup_hours = {value = 12, low = 6, high = 30}
[existing]
machine = "RTX-4090"
[cloud]
machine = "A100-80GB-PCIe"
per_hour = {value = 180, low = 150, high = 220}
"""
VOID = {"meta", "link", "br", "img", "input", "hr"}
# classes of names: a digit in a name is not a figure
NAMES = {"plan", "plan-name", "role", "chip", "note", "mono"}
DIGIT = re.compile(r"\d")


@dataclasses.dataclass(eq=False)
class Node:
    tag: str
    attributes: dict[str, str]
    parents: tuple[Node, ...]
    text: str = ""
    children: list[Node] = dataclasses.field(default_factory=list)

    def has(self, *classes: str) -> bool:
        return bool({*self.attributes.get("class", "").split()} & {*classes})

    def inside(self, *classes: str) -> bool:
        return any(n.has(*classes) for n in (self, *self.parents))


class Walk(HTMLParser):
    """Every element with its parents, and every text with the element that contains it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[Node] = []
        self.nodes: list[Node] = []
        self.texts: list[tuple[str, Node]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs}, tuple(self.open))
        self.nodes.append(node)
        if self.open:
            self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data
        if self.open:
            self.texts.append((data, self.open[-1]))


CASES = {"bare": None, "decided": CASE, "defaults": "", "published": "", "nothing": "", "interrupted": None}
PAGES = [(name, lang) for name in CASES for lang in LANGUAGES]


@functools.cache
def walked(name: str, lang: str) -> Walk:
    poc = minimal_poc() if name == "interrupted" else full_poc()
    if name in ("decided", "defaults", "published"):
        poc = dataclasses.replace(poc, offers=offers())
    if name == "published":
        poc = dataclasses.replace(poc, job_name="alphafold2")
    case = CASES[name]
    made = None if case is None else decide(poc, parse_case(case, "it"))
    return Walk(render_html(poc, lang=lang, decision=made))


@pytest.mark.parametrize(("name", "lang"), PAGES)
def test_every_figure_has_a_mark_and_links_to_its_record(name: str, lang: str) -> None:
    walk, words = walked(name, lang), load_words(lang)
    ids = {n.attributes["id"]: n for n in walk.nodes if "id" in n.attributes}
    figures = [n for n in walk.nodes if n.has("num")]
    marks = {words.get(f"mark.{m}"): m for m in Mark}
    assert len(figures) > (5 if name == "interrupted" else 100)
    for node in figures:
        target = node.attributes.get("href", "")[1:]
        assert node.tag == "a", node.text
        assert target in ids, (node.text, target)
        assert ids[target].tag == "tr", (node.text, target)
        tag = next(n for n in node.children if n.has("tag"))
        said = tag.attributes["aria-label"]
        assert (tag.attributes["role"], node.attributes["title"]) == ("img", said)
        assert next(m for word, m in marks.items() if said.startswith(word)) in node.attributes["class"]
        head = next(n for n in ids[target].children if n.tag == "th")
        assert said.endswith(head.text.strip()), (node.text, said)


@pytest.mark.parametrize(("name", "lang"), PAGES)
def test_no_number_is_shown_without_a_mark(name: str, lang: str) -> None:
    """In cells of figures and on cards, a digit belongs to a figure or to a name."""
    walk = walked(name, lang)
    bare = []
    for text, node in walk.texts:
        chain = (*node.parents, node)
        if not DIGIT.search(text) or any(n.tag == "svg" for n in chain):
            continue
        cell = any((n.tag == "td" and n.has("n")) or n.has("tiles", "purse-facts") for n in chain)
        name_of_it = any(n.attributes.get("data-live") == "best" for n in chain)
        if cell and not name_of_it and not node.inside("num", *NAMES):
            bare.append(text)
    assert bare == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_sentences_on_cards_contain_no_unmarked_numbers(lang: str) -> None:
    """A digit in the words themselves belongs to a name or to a fixed level, never to a result."""
    walk = walked("decided", lang)
    fixed = re.compile(
        r"90 %|[1-9] (回|台|ステップ|時間|kWh)|[A-Z]+-?\d+[-\w]*|2-core x86-64 processor, 8 GiB"
    )
    for text, node in walk.texts:
        if any(n.has("card") for n in (*node.parents, node)) and not node.inside("num", *NAMES):
            assert not DIGIT.search(fixed.sub("", text)), text


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_verdict_cause_has_a_sentence_on_the_page(lang: str) -> None:
    modules = (judge, float32, sensitivity, proof_of_concept)
    source = [Path(module.__file__ or "").read_text() for module in modules]
    kinds = {kind for text in source for kind in re.findall(r'Cause\(\s*kind="(\w+)"', text)} | {
        "better",
        "worse",
        "surrogate_different",
        "surrogate_undecided",
    }
    words = load_words(lang)
    assert {key.removeprefix("why.") for key in words.texts if key.startswith("why.")} == kinds
    cause = Cause(kind="", seed=1, step=2, difference=0.25, limit_ratio=0.125, needed_count=7, detail="<b>")
    surrogate = EndpointDifference(
        name="<b>", unit="", margin=1.0, difference=0.5, low=0.0, high=1.0, kind=VerdictKind.UNDECIDED
    )
    poc = full_poc()
    first = poc.verdicts[0]
    verdicts = [
        dataclasses.replace(
            first,
            verdict=dataclasses.replace(
                first.verdict,
                kind=VerdictKind.UNDECIDED,
                cause=dataclasses.replace(cause, kind=kind),
                surrogates=(surrogate,),
            ),
        )
        for kind in kinds
    ]
    page = render_html(dataclasses.replace(poc, verdicts=tuple(verdicts)), lang=lang)
    told = next(n for n in Walk(page).nodes if n.attributes.get("id") == "verdicts").text
    for kind in kinds:
        for piece in re.split(r"\{\w+\}", words.texts[f"why.{kind}"]):
            assert piece.strip() in told


def test_a_figure_without_a_record_is_refused() -> None:
    """Rendering fails for a figure without a source and for a number without a mark."""
    with pytest.raises(ValueError, match="with the source ''"):
        _shown(measured(1.0, "s"))
    with pytest.raises(ValueError, match="'run-2'"):
        _shown(measured(1.0, "s", "run-2"))
    with pytest.raises(TypeError, match="without a mark"):
        _shown(12)
    assert 'href="#run-1"' in _shown(sourced(measured(1.0, "s"), "run-1"))


def _shown(value: object) -> str:
    helpers = html.helpers(load_words("en"), {"run-1": "R1"})
    return str(helpers["t"]("text.paper_step", step=value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (78.5, "78.5 %"),
        (-12.34, "\u221212.3 %"),
        (-200.0, "\u2212200 %"),
        (-240.0, "\u2212240 % (3.4 times as much)"),
        (-3000.0, "\u22123,000 % (31 times as much)"),
    ],
)
def test_a_large_loss_is_also_given_as_a_factor(value: float, text: str) -> None:
    assert figure_text(predicted(value, "saving"), load_words("en")) == text


def test_figures_without_a_source_inherit_the_source_of_their_row() -> None:
    row = (predicted(1.0, "s"), {"own": predicted(2.0, "s", "run-9")})
    first, rest = sourced(row, "run-1")
    assert (first.source, rest["own"].source) == ("run-1", "run-9")
