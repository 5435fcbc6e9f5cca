"""The first screen of the report: one sentence, three numbers, a bar of memory and the next step."""

from __future__ import annotations

import dataclasses

import pytest
from report_fixture import PLAIN, RECOMMENDED, choice, full_poc, minimal_poc, offers

from memfit.decision.case import parse_case
from memfit.decision.decide import decide
from memfit.report.decision import decision_view
from memfit.report.quantities import sentence_text
from memfit.report.summary import Summary, summary
from memfit.report.words import LANGUAGES, load_words
from memfit.types.result import Poc, VerdictKind

EN, JA = load_words("en"), load_words("ja")


def decided(poc: Poc, case: str = "") -> Summary:
    poc = dataclasses.replace(poc, offers=offers())
    return summary(poc, decision_view(poc, decide(poc, parse_case(case, "it"))))


def judged(kind: VerdictKind) -> Poc:
    poc = full_poc()
    first = poc.verdicts[0]
    verdict = dataclasses.replace(first.verdict, kind=kind)
    return dataclasses.replace(poc, verdicts=(dataclasses.replace(first, verdict=verdict),))


def test_the_sentence_says_what_fits_and_what_the_test_showed() -> None:
    assert sentence_text(summary(full_poc(), None).sentence, EN) == (
        "This training needs 1.282 GiB and does not fit into 328 MiB; with the recommended plan it ran in "
        "246.1 MiB, and Q3 stayed within the margin fixed beforehand."
    )
    assert sentence_text(summary(full_poc(), None).sentence, JA) == (
        "通常は 1.282 GiB を要し、328 MiB に収まらない学習を、推奨プランでは 246.1 MiB で実行でき、Q3 の差も"
        "事前に定めた許容範囲に収まりました。"
    )


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("kind", VerdictKind)
def test_the_sentence_claims_equivalence_only_if_the_verdict_does(lang: str, kind: VerdictKind) -> None:
    words = load_words(lang)
    sentence = sentence_text(summary(judged(kind), None).sentence, words)
    kept = words.get("summary.accuracy.equivalent_interval", metric="Q3")
    assert sentence.endswith(kept) is (kind is VerdictKind.EQUIVALENT)


def test_a_plan_that_was_not_run_is_called_predicted() -> None:
    poc = full_poc()
    planned = dataclasses.replace(poc, runs=poc.runs[:1], verdicts=())
    assert "should run in 246 MiB, but its effect on the results was not measured." in sentence_text(
        summary(planned, None).sentence, EN
    )


def test_plain_training_as_the_recommendation_claims_no_saving() -> None:
    poc = full_poc()
    best = dataclasses.replace(choice(PLAIN), fits=True)
    search = dataclasses.replace(poc.search, recommended=best, baseline=best)
    found = summary(dataclasses.replace(poc, search=search, runs=(), verdicts=()), None)
    assert "nothing has to be changed" in sentence_text(found.sentence, EN)
    assert found.plan == ""


@pytest.mark.parametrize("case", [None, ""])
def test_there_are_three_numbers_three_bars_and_a_next_step(case: str | None) -> None:
    found = summary(full_poc(), None) if case is None else decided(full_poc(), case)
    assert len(found.numbers) == len(found.bars) == 3
    assert [bar.kind for bar in found.bars] == ["have", "plain", "plan"]
    assert found.plan == RECOMMENDED.label
    assert sentence_text(found.next_step, EN).endswith(".")


def test_without_a_plan_that_fits_the_screen_names_the_least_memory() -> None:
    poc = full_poc()
    search = dataclasses.replace(poc.search, recommended=None)
    sentence = sentence_text(summary(dataclasses.replace(poc, search=search), None).sentence, EN)
    assert (
        sentence
        == "The training does not fit into 328 MiB with any allowed plan: the smallest needs 246 MiB."
    )


def test_an_unfinished_record_has_a_first_screen() -> None:
    assert sentence_text(summary(minimal_poc(), None).sentence, JA).endswith("。")
