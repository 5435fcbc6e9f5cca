"""One self-contained HTML file from a Poc and its Decision.

It needs no network, has at most one script, which the page's content security policy names by its hash, and
marks every number as measured, predicted or assumed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memfit.files.replace import write_whole
from memfit.monitoring.record import WatchRecord
from memfit.report import charts, report_charts
from memfit.report.case import CLASSES
from memfit.report.choices import SPEAKING_FOR
from memfit.report.decision import MONEY, decision_view
from memfit.report.decision_answers import DECISIVE
from memfit.report.decision_rows import DecisionView, way_name
from memfit.report.plan_words import glossary, in_words, plan_phrase, plan_title, technique_names
from memfit.report.provenance import (
    CASE,
    POC,
    SAVING,
    ProvenanceRecord,
    choices,
    report_records,
    term_anchor,
)
from memfit.report.quantities import (
    MANY,
    Figure,
    Sentence,
    assumed,
    figure_text,
    measured,
    predicted,
    sentence_text,
)
from memfit.report.rows import PocView
from memfit.report.sliders import slider_inputs
from memfit.report.summary import summary
from memfit.report.view import poc_view
from memfit.report.watch_chapter import WATCH, watch_chapter, watch_record
from memfit.report.words import Words, load_words
from memfit.store.exchange.anonymous import anonymous_poc
from memfit.types.decision import DRAWS, Decision
from memfit.types.result import Poc
from memfit.types.sanitize import TURNING

if TYPE_CHECKING:
    from markupsafe import Markup


# placeholders of identifiers, which the page shows as names
_NAMES: Final = frozenset({"plan", "technique", "first", "second", "names"})
_LONG: Final = 24  # characters; a longer figure contains a long unit and may wrap


def write_html(
    poc: Poc, path: Path, *, lang: str, decision: Decision | None = None, watch: WatchRecord | None = None
) -> Path:
    """Write the report as HTML to ``path`` and return that path. Missing folders are made, and an existing
    file is replaced. The file is written completely or not at all. ``decision`` None: a report without its
    decision part. ``watch``: the record of a watched training, which becomes a chapter; None: without it.

    Raises UserError for a language without a catalog, and if the file cannot be written.
    """
    text = render_html(poc, lang=lang, decision=decision, watch=watch)
    return write_whole(path, text.encode(), make_folder=True)


def render_html(
    poc: Poc, *, lang: str, decision: Decision | None = None, watch: WatchRecord | None = None
) -> str:
    """Return the report as the text of an HTML page, without folders and without the name of this machine; if
    ``decision`` is None, without its decision part. ``watch``: as in `write_html`.
    Raises UserError for a language without a catalog."""
    words, poc = load_words(lang), anonymous_poc(poc)
    view = poc_view(poc)
    decision_page = decision_view(poc, decision) if decision is not None else None
    records = report_records(poc, decision, view.case.created if view.case else "")
    records += (watch_record(watch),) if watch is not None else ()
    return render(
        "report.html.j2",
        words,
        labels=_labels(records, decision, words),
        view=view,
        poc=poc,
        decision=decision_page,
        records=records,
        summary=summary(poc, decision_page),
        watch=watch_chapter(watch, words) if watch is not None else None,
        glossary=glossary(_plan_labels(poc, decision), words),
        speaking_for=SPEAKING_FOR,
        **_plot_values(view, words),
        **_slider_values(decision_page, words),
    )


def write_watch_html(watch: WatchRecord, path: Path, *, lang: str) -> Path:
    """Write a page about a watched training alone to ``path``, as `write_html` does, and return that path."""
    words = load_words(lang)
    record = watch_record(watch)
    text = render(
        "watch_page.html.j2",
        words,
        labels={record.anchor: record.label},
        watch=watch_chapter(watch, words),
        records=(record,),
    )
    return write_whole(path, text.encode(), make_folder=True)


def _labels(
    records: Sequence[ProvenanceRecord], decision: Decision | None, words: Words
) -> Mapping[str, str]:
    """Return anchor -> label of each record and of each number that the decision is based on. Figures link to
    these anchors."""
    terms = {term_anchor(t.name): words.name("term", t.name) for t in decision.numbers} if decision else {}
    return {r.anchor: r.label for r in records} | terms


def _plan_labels(poc: Poc, decision: Decision | None) -> Iterator[str]:
    """Yield the labels of all plans and the identifiers of all techniques that the page names."""
    yield from (run.spec.plan.label for run in poc.runs)
    for choice in choices(poc):
        yield choice.estimate.plan.label
        yield from (reason.technique for reason in choice.reasons)
    yield from (row.recommended.plan.label for row in poc.paper if row.recommended is not None)
    yield from (way.plan for way in (decision.ways if decision is not None else ()))


def _slider_values(decision_page: DecisionView | None, words: Words) -> Mapping[str, Any]:
    """Return the values of the page's template for the sliders: the script's data, its hash, by which the
    page's security policy allows this script and no other, and constants. Without a decision or without a
    best option, data and hash are ""."""
    from markupsafe import Markup

    constants = {"money_rows": MONEY, "draws": DRAWS, "decisive": DECISIVE}
    if decision_page is None or decision_page.best is None:
        return {"script_hash": "", "slider_data": "", "swing_css": _swing_css(()), **constants}
    data = slider_inputs(decision_page.decision, [(w.slot, w.index) for w in decision_page.ways])
    labels = [sentence_text(way_name(way), words) for way in decision_page.decision.ways]
    ways = decision_page.decision.ways
    plans = ["" if w.kind == "nothing" else plan_title("plain" if w.plain else w.plan, words) for w in ways]
    identifiers = ["" if w.plain or w.kind == "nothing" else w.plan for w in ways]
    untried = [technique_names(", ".join(w.untried), words) if w.untried else "" for w in ways]
    texts = {
        "labels": labels,
        "plans": plans,
        "identifiers": identifiers,
        "untried": untried,
        "many": words.texts["unit.many"],
        "least": MANY,
    }
    text = json.dumps({**data, **texts}, ensure_ascii=False)
    text = text.translate(TURNING)
    for character in "<>&\u2028\u2029":  # nothing in the text can close the element or open another
        text = text.replace(character, f"\\u{ord(character):04x}")
    digest = hashlib.sha256(_asset("decision.js").encode()).digest()
    return {
        "script_hash": f"sha256-{base64.b64encode(digest).decode()}",
        "slider_data": Markup(text),
        "swing_css": _swing_css([(low, high) for _, low, high in decision_page.swings]),
        **constants,
    }


def _swing_css(swings: Sequence[tuple[Figure, Figure]]) -> Callable[[Figure, Figure], str]:
    """Return a function that gives the position and width of a bar between two figures as CSS, on a scale
    from the lowest to the highest known figure of all ``swings``. Unknown figures count as 0."""
    ends = [f.value for swing in swings for f in swing if f.value is not None]
    lowest, span = (min(ends), max(ends) - min(ends) or 1.0) if ends else (0.0, 1.0)

    def css(low: Figure, high: Figure) -> str:
        a, b = sorted((low.value or 0.0, high.value or 0.0))
        return f"left:{100 * (a - lowest) / span:.2f}%;width:{100 * (b - a) / span:.2f}%"

    return css


def render(template: str, words: Words, *, labels: Mapping[str, str] | None = None, **values: Any) -> str:
    """Return the text of a template of this package, filled with the names of `helpers` and the given values.

    ``labels``: anchor -> label of the page's records; None: a page without records. Raises ValueError if
    ``labels`` are given and do not contain the source of a known figure; TypeError if the page would show a
    number that is not a Figure.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize_value,
    )
    return environment.get_template(template).render(words=words, **helpers(words, labels), **values)


def _finalize_value(value: Any) -> Any:
    """Return ``value`` as the page shows it: in a text, characters that change the reading direction are
    replaced; other values are unchanged. Raises TypeError for a bare number, which has no mark (measured,
    predicted or assumed)."""
    _no_bare_number(value)
    return value.translate(TURNING) if isinstance(value, str) else value


def _no_bare_number(value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise TypeError(f"{value!r} is shown without a mark: make it a Figure, or text if it is only a name")


def _asset(name: str) -> str:
    return resources.files("memfit.report").joinpath(name).read_text(encoding="utf-8")


def _figure_renderer(words: Words, labels: Mapping[str, str] | None) -> Callable[[Figure], Markup]:
    """Return a function that shows a figure as HTML with its mark and, if ``labels`` (anchor -> label) are
    given, as a link to its record. Unknown figures get no mark and no link. The function raises ValueError
    for a known figure whose source is not in the given ``labels``."""
    from markupsafe import Markup

    def num(figure: Figure) -> Markup:
        text = figure_text(figure, words)
        css = f"{figure.mark} long" if len(text) > _LONG else str(figure.mark)
        if figure.value is None:
            return Markup('<span class="missing">{}</span>').format(text)
        mark = words.get(f"mark.{figure.mark}")
        if labels is None:
            return Markup(
                '<span class="num {0}">{1}<i class="tag" role="img" aria-label="{2}" title="{2}"></i></span>'
            ).format(css, text, mark)
        if figure.source not in labels:
            raise ValueError(
                f"the report shows the number {text} ({mark}) with the source {figure.source!r}, but none of "
                "its records has this anchor, so the number has nothing to link to"
            )
        live_attribute = Markup(' data-stage="{}"').format(figure.live) if figure.live else ""
        tooltip = words.get("mark_of", mark=mark, record=labels[figure.source])
        return Markup(
            '<a class="num {0}" href="#{1}" title="{3}"{4}>{2}'
            '<i class="tag" role="img" aria-label="{3}"></i></a>'
        ).format(css, figure.source, text, tooltip, live_attribute)

    return num


def _placeholder_html(key: str, value: object, words: Words) -> object:
    """Return the value of a placeholder: a text as `in_words`, an engine or a currency by its name, and the
    identifier of a plan or a technique as its name with the identifier as its tooltip. Values that are no
    text are unchanged."""
    from markupsafe import Markup

    _no_bare_number(value)
    if type(value) is not str:
        return value
    if key in ("engine", "currency"):
        return words.texts.get(f"{key}.{value}", value)
    if key not in _NAMES:
        return in_words(value, words)
    name = plan_phrase(value, words) if key == "plan" else technique_names(value, words)
    return Markup('<span class="plan-name" title="{}">{}</span>').format(value, name)


def _strip_markup(value: object) -> object:
    from markupsafe import Markup

    return value.striptags() if isinstance(value, Markup) else value


def helpers(words: Words, labels: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Return the names that all templates can use.

    Functions: ``t`` (text of a key of the word catalogs, filled), ``num`` (a figure with its mark), ``say``
    (a sentence, a figure or a text), ``plan_name`` (a plan in words), ``technique_names`` (techniques in
    words), ``moment`` (a date), ``section_ids`` (the ids of the sections in a part of the page, in order) and
    ``asset`` (the content of a file of this package, not escaped). Makers of
    figures: ``assumed``, ``counted`` (measured) and ``guessed`` (predicted). Anchors of records: those that
    begin with ``of_``. Constants: ``labels`` (empty if None) and ``case_classes``.
    """
    from markupsafe import Markup, escape

    num = _figure_renderer(words, labels)

    def t(key: str, **values: object) -> Markup:
        html_values = {
            k: num(v) if isinstance(v, Figure) else _placeholder_html(k, v, words) for k, v in values.items()
        }
        text_values = {
            k: figure_text(v, words) if isinstance(v, Figure) else _strip_markup(html_values[k])
            for k, v in values.items()
        }
        return Markup(escape(words.template(key, text_values))).format(**html_values)

    def say(sentence: Sentence | Figure | str) -> Markup:
        if isinstance(sentence, str):
            return escape(in_words(sentence, words))
        if isinstance(sentence, Figure):
            return num(sentence)
        return t(
            sentence.key,
            **{k: say(v) if isinstance(v, Sentence) else v for k, v in sentence.values.items()},
        )

    def asset(name: str) -> Markup:
        return Markup(_asset(name))

    def moment(iso: str) -> str:
        """Return a time in ISO format for readers: "2026-03-01 09:30 UTC" for "2026-03-01T09:30:00+00:00",
        and unchanged if it is not in UTC."""
        return iso[:16].replace("T", " ") + " UTC" if iso.endswith("+00:00") else iso

    return {
        "t": t,
        "num": num,
        "moment": moment,
        "say": say,
        "asset": asset,
        "section_ids": lambda html: re.findall(r'<section id="([\w-]+)"', html),
        "plan_name": lambda label: plan_title(label, words),
        "technique_names": lambda names: technique_names(", ".join(names), words) if names else "",
        "assumed": assumed,
        "counted": measured,
        "guessed": predicted,
        "of_poc": POC,
        "of_case": CASE,
        "of_watch": WATCH,
        "of_saving": SAVING,
        "of_term": term_anchor,
        "labels": labels or {},
        "case_classes": CLASSES,
    }


def _plot_values(view: PocView, words: Words) -> Mapping[str, Any]:
    from markupsafe import Markup

    def bar(value: Figure, full: float, **options: Any) -> Markup:
        return Markup(charts.bar(value.value, full=full, **options))

    def interval(bounds: tuple[float, float, float], reach: float, css: str) -> Markup:
        return Markup(charts.interval(bounds, reach=reach, css=css))

    def stacked(parts: Any, full: float, rule: Figure) -> Markup:
        return Markup(charts.stacked(parts, full=full, rule=rule.value))

    return {
        "timeline_plot": Markup(report_charts.timeline_plot(view.timelines, cap=view.cap, words=words)),
        "pareto_plot": Markup(report_charts.pareto_plot(view, words)),
        "loss_plot": Markup(report_charts.loss_plot(view.losses, words)),
        "bar": bar,
        "interval": interval,
        "stacked": stacked,
        "largest": largest,
        "forest_reach": _forest_reach(view),
    }


def largest(*figures: Figure) -> float:
    """Return the value that the full width of several bars stands for: the largest known value of
    ``figures``, or 1 if none is known or the largest is 0."""
    return max((f.value for f in figures if f.value is not None), default=1.0) or 1.0


def _forest_reach(view: PocView) -> float:
    """Return the value at the right end of the strips that show the verdicts' intervals, in units of the
    margin; the left end is its negative.

    It is the same for all verdicts, and 10 % more than the farthest end of any interval, or than 1.3 if that
    is more.
    """
    widest = max((max(map(abs, v.in_margins)) for v in view.verdicts if v.in_margins), default=1.0)
    return 1.1 * max(1.3, widest)
