"""A Japanese report is Japanese where others than the catalogs of words wrote the text."""

from __future__ import annotations

import dataclasses
import re
import string

import pytest
from report_fixture import full_poc, offers

from memfit import catalog
from memfit.catalog import finance
from memfit.decision.case import parsed
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


def test_every_told_text_is_japanese_with_the_same_places() -> None:
    for text, here in JA.told.items():
        assert JAPANESE.search(here), text
        assert named(here) == named(text), text


def test_what_changes_is_carried_over_and_translated_itself() -> None:
    assert JA.of("out of memory in backward of step 12") == "ステップ 12 の逆伝播でメモリー不足"
    assert JA.of("bf16-parameters is not supported by deepspeed") == "deepspeed は bf16-parameters に非対応"
    naive = JA.of("always the commonest training state (helix)")
    assert naive == "学習データで最も多い状態（ヘリックス）を常に予測"


@pytest.mark.parametrize("text", ["", "H100-PCIe", "{0}", "<b>x</b>", "NVIDIA launch price", "out of memory"])
def test_names_citations_and_strangers_stay_as_they_are(text: str) -> None:
    assert JA.of(text) == EN.of(text) == text


def test_a_stranger_s_braces_do_no_harm() -> None:
    assert JA.of("out of memory in {x!r} of step {0}") == "ステップ {0} の{x!r}でメモリー不足"


def own_texts() -> list[str]:
    """Titles and data of the built-in jobs, tests, places, and the defaults that are our own assumptions."""
    jobs = [text for job in registry.describe() for text in (job.title, job.data_source)]
    sources = [finance.default(name).source for name in finance.default_names()]
    prices = {catalog.place(name).usd_per_kwh.source for name in catalog.place_names()}
    sources += sorted(source for source in prices if "recalled" in source)
    return [*jobs, *judge._TESTS.values(), *catalog.place_names(), *sources]


@pytest.mark.parametrize("text", own_texts())
def test_our_own_words_are_told_in_japanese(text: str) -> None:
    assert JAPANESE.search(JA.of(text)), text


def test_metrics_of_the_built_in_jobs_are_told_in_japanese() -> None:
    names = {"Q3"}  # stand as they are
    units = {"", "percentage points", "meV/angstrom"}
    for job in registry.describe():
        metric = registry.load(JobRef(spec=job.name)).metric
        assert metric is not None
        for text in {metric.name, metric.margin_source, metric.naive_name, metric.unit} - names - units:
            assert JAPANESE.search(JA.of(text)), text


def test_the_page_uses_them() -> None:
    poc = dataclasses.replace(
        full_poc(),
        offers=offers(),
        job_title="Masked language model of proteins (ESM-2)",
        machine="this machine",
    )
    page = render_html(poc, lang="ja", decision=decide(poc, parsed("", "it")))
    assert "タンパク質のマスク言語モデル（ESM-2）：手元のメモリーに収まる学習" in page
    for left in ("Masked language", "this machine", "an assumption", "interval of the predicted"):
        assert left not in page
