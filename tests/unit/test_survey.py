"""The page of the survey: every model can be looked up, and its tables are those of the records."""

from __future__ import annotations

import re
from typing import Any

import pytest
import survey

MODELS = survey.read_models()


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m["name"])
def test_a_model_has_a_reference_and_a_shape_or_the_reason_why_not(model: dict[str, Any]) -> None:
    assert re.search(r"\b(19|20)\d\d\b", model["reference"])
    assert re.search(r"doi:10\.|arXiv:\d{4}\.\d{4,5}|bba[cd]\d+", model["reference"])
    assert sum(key in model for key in ("job", "same_as", "why")) == 1
    assert ("why" in model) != ("shape" in model)
    if "same_as" in model:
        assert any(m["name"] == model["same_as"] and "job" in m for m in MODELS)


def test_the_tables_of_the_page_are_those_of_the_records() -> None:
    page = survey.PAGE.read_text(encoding="utf-8")
    tables = page.partition(survey.BEGIN)[2].partition(survey.END)[0]
    assert tables.strip() == survey.tables(MODELS, survey.read_records()).strip()


NOT_PREDICTED = {
    "ESM3",
    "ProtBert",
}  # their memory is unknown in the page until benchmarks/survey.py has run them


def test_every_job_has_a_record_with_about_the_published_parameters() -> None:
    records = survey.read_records()
    for model in MODELS:
        if "job" not in model:
            continue
        record = records[model["name"]]
        assert record["job"] == model["job"]
        numbers = re.findall(r"([\d.]+) ([MB])", model["published"])
        if numbers and "parameters" in record:
            value, unit = numbers[-1]
            published = float(value) * {"M": 1e6, "B": 1e9}[unit]
            assert record["parameters"] == pytest.approx(published, rel=0.15)


def test_a_model_without_a_job_stays_unknown() -> None:
    rows = list(survey.memory_rows([m for m in MODELS if m["name"] == "FuXi"], {}))
    assert rows[-1].endswith("| 72 GB | unknown | unknown |")
