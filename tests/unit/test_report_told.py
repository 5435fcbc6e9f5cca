"""A Japanese report is in Japanese also where a text does not come from the catalogs of words."""

from __future__ import annotations

import dataclasses
import re
import string

import pytest
from report_fixture import full_poc, offers

from memfit import catalog
from memfit.catalog import finance
from memfit.decision.case import parse_case
from memfit.decision.decide import decide
from memfit.jobs import registry
from memfit.report.html import render_html
from memfit.report.words import load_words
from memfit.types.job import JobRef
from memfit.verify import judge

EN, JA = load_words("en"), load_words("ja")
JAPANESE = re.compile(r"[぀-ヿ一-鿿]")


def named(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_translated_text_is_japanese_with_the_same_placeholders() -> None:
    for text, here in JA.translations.items():
        assert JAPANESE.search(here), text
        assert named(here) == named(text), text


def test_placeholder_values_are_carried_over_and_translated() -> None:
    assert JA.of("out of memory in backward of step 12") == "ステップ 12 の逆伝播でメモリー不足"
    assert JA.of("bf16-parameters is not supported by deepspeed") == "deepspeed は bf16-parameters に非対応"
    naive = JA.of("always the commonest training state (helix)")
    assert naive == "学習データで最も多い状態（ヘリックス）を常に予測"


@pytest.mark.parametrize("text", ["", "H100-PCIe", "{0}", "<b>x</b>", "NVIDIA launch price", "out of memory"])
def test_names_citations_and_unknown_texts_are_not_translated(text: str) -> None:
    assert JA.of(text) == EN.of(text) == text


def test_braces_in_a_foreign_text_are_kept_literally() -> None:
    assert JA.of("out of memory in {x!r} of step {0}") == "ステップ {0} の{x!r}でメモリー不足"


def own_texts() -> list[str]:
    """Titles and data of the built-in jobs, tests, places, and the defaults that are our own assumptions."""
    jobs = [text for job in registry.describe() for text in (job.title, job.data_source)]
    sources = [finance.default(name).source for name in finance.default_names()]
    prices = {catalog.place(name).usd_per_kwh.source for name in catalog.place_names()}
    sources += sorted(source for source in prices if "recalled" in source)
    return [*jobs, *judge._TESTS.values(), *catalog.place_names(), *sources]


@pytest.mark.parametrize("text", own_texts())
def test_built_in_titles_tests_and_sources_are_translated_to_japanese(text: str) -> None:
    assert JAPANESE.search(JA.of(text)), text


def test_metrics_of_built_in_jobs_are_translated_to_japanese() -> None:
    names = {"Q3"}  # not translated
    units = {"", "percentage points", "meV/angstrom"}
    for job in registry.describe():
        metric = registry.load(JobRef(spec=job.name)).metric
        assert metric is not None
        for text in {metric.name, metric.margin_source, metric.naive_name, metric.unit} - names - units:
            assert JAPANESE.search(JA.of(text)), text


def test_the_japanese_page_uses_the_translations() -> None:
    poc = dataclasses.replace(
        full_poc(),
        offers=offers(),
        job_title="Masked language model of proteins (ESM-2)",
        machine="this machine",
    )
    page = render_html(poc, lang="ja", decision=decide(poc, parse_case("", "it")))
    assert "タンパク質のマスク言語モデル（ESM-2）：手元のメモリーに収まる学習" in page
    for left in ("Masked language", "this machine", "an assumption", "interval of the predicted"):
        assert left not in page
