"""Plans and techniques have names in words, and a picture for readers who do not train models."""

from __future__ import annotations

import dataclasses
import itertools
import runpy
from pathlib import Path

import pytest

from memfit.report.plan_words import glossary, in_words, plan_phrase, plan_title, technique_names
from memfit.report.words import LANGUAGES, load_words
from memfit.techniques.base import JobFacts
from memfit.techniques.registry import TECHNIQUES, make_use
from memfit.types.plan import Plan, use

ROOT = Path(__file__).parents[2]
EN, JA = load_words("en"), load_words("ja")
OFFLOADED = Plan(
    uses=(use("activation-checkpointing", every=2), use("activation-offload", minimum_kib=64, to="disk"))
)


def test_a_plan_is_named_in_words_in_both_languages() -> None:
    assert plan_title(OFFLOADED.label, EN) == (
        "Activation checkpointing, every second block; activation offload to disk"
    )
    assert (
        plan_phrase(OFFLOADED.label, JA)
        == "勾配チェックポイント（2 ブロックごと）、活性値のディスクへのオフロード"
    )


@pytest.mark.parametrize("lang", LANGUAGES)
def test_plain_training_and_the_number_of_devices_are_said(lang: str) -> None:
    words = load_words(lang)
    assert plan_phrase(Plan().label, words) == plan_phrase("plain training", words) == words.get("plan.plain")
    sharded = plan_phrase(Plan(uses=(use("fsdp2"),), ranks=8).label, words)
    assert "8" in sharded
    assert sharded.startswith(words.get("technique.fsdp2.name"))


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_has_a_name_and_a_picture_of_one_sentence(lang: str, name: str) -> None:
    words = load_words(lang)
    picture = words.get(f"technique.{name}.picture")
    assert words.get(f"technique.{name}.name") != name
    assert picture.endswith("。" if lang == "ja" else ".")
    assert name not in picture
    phrase = plan_phrase(Plan(uses=(make_use(name, {}),)).label, words)
    assert "{" not in phrase
    assert "=" not in phrase


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_settings_that_the_search_tries_have_different_words(lang: str, name: str) -> None:
    facts = JobFacts(
        batch_size=8, block_count=12, vocabulary=32000, device_kind="cuda", has_slices=True, ranks=8
    )
    on_devices = (facts, dataclasses.replace(facts, device_kind="cpu", ranks=1))
    plans = [
        Plan(uses=(make_use(name, dict(settings)),))
        for s in on_devices
        for settings in TECHNIQUES[name].settings(s)
    ]
    phrases = {plan.fingerprint: plan_phrase(plan.label, load_words(lang)) for plan in plans}
    for (first, a), (second, b) in itertools.combinations(phrases.items(), 2):
        assert a != b, (first, second)


def test_an_unknown_technique_and_a_foreign_text_are_kept() -> None:
    assert (
        plan_phrase("saved-tensor-offload + bf16-autocast", EN)
        == "saved-tensor-offload; mixed precision (bf16)"
    )
    for text in ("NVIDIA RTX 4090", "a plan, written by hand", ""):
        assert plan_phrase(text, EN) == in_words(text, EN) == text


def test_identifiers_inside_a_sentence_become_names() -> None:
    reason = "bf16-parameters is not supported by deepspeed"
    assert in_words(reason, EN) == "bf16 parameter storage is not supported by DeepSpeed"
    assert in_words(reason, JA) == "DeepSpeed はパラメーターの bf16 化に非対応"
    assert technique_names("lora, adamw-8bit", EN) == "LoRA, 8-bit AdamW"


def test_the_glossary_holds_the_techniques_that_occur_sorted_by_name() -> None:
    found = glossary([OFFLOADED.label, "plain", "lora"], EN)
    assert list(found) == ["activation-checkpointing", "activation-offload", "lora"]
    assert found["lora"][1].startswith("The large model stays as it is")


def test_the_glossary_pages_of_the_documentation_are_those_of_the_words() -> None:
    module = runpy.run_path(str(ROOT / "scripts" / "glossary.py"))
    for language, file in module["PAGES"].items():
        assert file.read_text(encoding="utf-8") == module["page"](language)
