"""A Japanese report is in Japanese also where a text does not come from the catalogs of words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import string
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from report_fixture import full_poc, offers

from memfit import capture, catalog
from memfit.catalog import finance
from memfit.cli import plan_from_config
from memfit.cost.workspaces import UnprobedWorkspaces
from memfit.decision.case import parse_case
from memfit.decision.decide import decide
from memfit.decision.projects import estimated_hours, project_of
from memfit.jobs import registry
from memfit.lint import (
    draft,
    to_plan,
    to_plan_fine_tuning,
    to_plan_hugging_face,
    to_plan_lightning,
    to_plan_mace,
    to_plan_openfold,
    to_plan_scripts,
)
from memfit.lint.option_reasons import option_reasons
from memfit.monitoring.autopsy import diagnose_log
from memfit.monitoring.remedies import title_of
from memfit.planner import block_costs
from memfit.report.html import render_html
from memfit.report.words import load_words
from memfit.techniques import float8
from memfit.techniques.parallel import (
    axial_parallel,
    context_parallel,
    gathered_attention,
    tensor_parallel,
)
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.trace import UNKNOWN_BUFFER
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
    sources += [finance.site_pue(site).source for site in ("desk", "cloud")]
    sources += [finance.labour_cost(place)[0].source for place in ("world", "us", "japan", "germany")]
    sources.append(estimated_hours(full_poc().effort).source)
    for project in filter(None, (project_of("alphafold2", "initial"), project_of("protein-ss", "paper"))):
        sources += [fact.source for fact in project.work.values()]
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


def calls(module: ModuleType, name: str) -> list[ast.Call]:
    """All calls of the function or method ``name`` in the source of a module."""
    nodes = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Call)]
    return [n for n in nodes if name in (getattr(n.func, "id", ""), getattr(n.func, "attr", ""))]


def literal(node: Any) -> str:
    """The text of a literal or an f-string, with 7 for each value that it is filled with; "" for all else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def left_out_reasons() -> list[str]:
    """Why settings of a configuration, and plans of a search for many devices, are left out."""
    lint = (
        draft,
        to_plan,
        to_plan_fine_tuning,
        to_plan_hugging_face,
        to_plan_lightning,
        to_plan_mace,
        to_plan_openfold,
        to_plan_scripts,
    )
    reasons = [literal(call.args[1]) for module in lint for call in calls(module, "leave")]
    reasons += [literal(call.args[2]) for call in calls(plan_from_config, "_leave_out")]
    for table in (
        to_plan_hugging_face._SECTIONS,
        to_plan_openfold._KERNELS,
        to_plan_openfold._CHANGES,
        to_plan_scripts._MEGATRON_REASONS,
    ):
        reasons += table.values()
    for library in ("accelerate", "axolotl", "deepspeed", "lightning", "llamafactory", "mace", "trainer"):
        reasons += option_reasons(library).reasons.values()
    parallel = (axial_parallel, context_parallel, gathered_attention, tensor_parallel)
    for call in (call for module in (*parallel, float8, block_costs) for call in calls(module, "UserError")):
        for case in ("body", "orelse"):  # of a text that depends on a condition
            texts = {k.arg or "": literal(getattr(k.value, case, k.value)) for k in call.keywords}
            reasons.append(str(UserError(literal(call.args[0]), **texts)))
    return sorted(set(reasons) - {""})


@pytest.mark.parametrize("text", left_out_reasons())
def test_reasons_why_something_is_left_out_are_translated_to_japanese(text: str) -> None:
    assert JAPANESE.search(JA.of(text)), text


def script_notes() -> list[str]:
    """The notes on a script, with 7 for what fills them in."""
    found = []
    for name in ("child", "sandbox"):
        file = Path(capture.__file__).parent / f"{name}.py"
        for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) in ("self.notes.append", "notes.append"):
                parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
                found.append("".join(p.value if isinstance(p, ast.Constant) else "7" for p in parts))
    return found


@pytest.mark.parametrize("text", script_notes())
def test_notes_on_a_script_are_translated_to_japanese(text: str) -> None:
    assert JAPANESE.search(JA.of(text)), text


def test_assumptions_of_an_estimate_are_printed_in_japanese() -> None:
    found = UnprobedWorkspaces(high_bytes=1, signatures=("a",), calls={"convolution": 12})
    text = JA.of(found.assumption())
    assert "convolution (12 calls)" in text
    assert JAPANESE.search(text)
    assert JAPANESE.search(JA.of(UNKNOWN_BUFFER))


def test_answers_of_an_autopsy_are_translated_to_japanese() -> None:
    logs = sorted((Path(__file__).parents[1] / "data/deaths").glob("*.txt"))
    assert logs
    for log in logs:
        answer = diagnose_log(log.read_text(encoding="utf-8"))
        for text in (title_of(answer.cause), *answer.evidence, *answer.advice, *answer.capture):
            assert JAPANESE.search(JA.of(text)), (log.name, text)


def test_a_translated_reason_within_another_is_translated_too() -> None:
    reason = (
        "tensor-parallel: the width of up is 6, which 4 ranks cannot share equally; "
        "allowed: a degree that divides 6"
    )
    translated = "tensor-parallel：up の幅（6）は 4 ランクで等分できない。次数は 6 の約数に限られる"
    assert JA.of(reason) == translated
    whole = f"tensor-parallel cannot be traced with this model: {reason}"
    assert JA.of(whole) == f"このモデルでは tensor-parallel をトレースできない（{translated}）"


def test_the_japanese_page_uses_the_translations() -> None:
    poc = dataclasses.replace(
        full_poc(),
        offers=offers(),
        job_title="Masked language model of proteins (ESM-2)",
        machine="this machine",
    )
    page = render_html(poc, lang="ja", decision=decide(poc, parse_case("", "it")))
    assert "タンパク質のマスク言語モデル（ESM-2）：限られたメモリーでの学習" in page
    for left in ("Masked language", "this machine", "an assumption", "interval of the predicted"):
        assert left not in page
