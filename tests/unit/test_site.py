"""The documentation site: pages generated from the code, links, and lint's explanations in the terminal."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import build_site
import pytest

from memfit.cli.app import main
from memfit.lint.check import CHECKS, explain
from memfit.techniques.registry import TECHNIQUES


@pytest.fixture(scope="module")
def sites() -> dict[str, build_site.Pages]:
    return build_site.all_pages()


@pytest.mark.parametrize("language", build_site.LANGUAGES)
def test_every_technique_engine_rule_and_job_has_a_page_in_each_language(
    sites: dict[str, build_site.Pages], language: str
) -> None:
    pages = sites[language]
    for folder, names in (
        ("techniques", TECHNIQUES),
        ("engines", build_site.ENGINES),
        ("lint", CHECKS),
        ("jobs", [job.name for job in build_site.describe()]),
    ):
        assert [name for name in names if f"{folder}/{name}.md" not in pages] == []
    assert {p for p in pages if p.startswith("symptoms/")} == {
        p for p in sites["en"] if p.startswith("symptoms/")
    }


def keys(value: object, path: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [path]
    return [key for name, inner in value.items() for key in keys(inner, f"{path}.{name}")]


def test_the_words_of_both_languages_have_the_same_keys() -> None:
    english, japanese = (set(keys(build_site.TEXTS[language])) for language in ("en", "ja"))
    # the engines' English descriptions are in the code
    assert {key for key in english ^ japanese if not key.startswith(".engine")} == set()
    assert set(build_site.TEXTS["ja"]["engine"]) == set(build_site.ENGINES)


def test_japanese_pages_of_engines_and_jobs_are_in_japanese(sites: dict[str, build_site.Pages]) -> None:
    pages = {p: text for p, text in sites["ja"].items() if p.startswith(("engines/", "jobs/"))}
    kana = "[\u3040-\u30ff\u4e00-\u9fff]"
    assert {path for path, text in pages.items() if re.search(rf"{kana}\.$", text, re.MULTILINE)} == set()
    upkeep = pages["engines/deepspeed.md"].split("## ")[1]
    for row in ("保守状況", "コンパイル"):
        value = next(line for line in upkeep.splitlines() if line.startswith(f"| {row}")).split("|")[2]
        assert re.search(kana, value)


def test_words_on_an_engines_release_without_a_translation_are_an_error() -> None:
    with pytest.raises(build_site.SiteError, match=r"has no .* for: abandoned"):
        build_site.Writer("ja").upkeep("status", "abandoned")


def test_a_technique_shows_the_measured_peaks_of_its_records(sites: dict[str, build_site.Pages]) -> None:
    rows = build_site.records("memory_truth")[-1]["rows"]
    esm = {r["plan"]: r["measured_bytes"] for r in rows if r["architecture"] == "esm"}
    page = sites["en"]["techniques/activation-checkpointing.md"]
    line = next(row for row in page.splitlines() if row.startswith("| esm |") and "(every=1)" in row)
    share = esm["activation-checkpointing(every=1)"] / esm["plain"]
    assert f"{esm['plain'] / 2**20:,.1f} MiB" in line
    assert f"{100 * share:.0f} %" in line
    assert "no record of this technique alone" in build_site.Writer("en").measured("a-new-technique")


def test_something_public_without_a_docstring_is_an_error() -> None:
    node = ast.parse("class Thing:\n    'A thing.'\n    def do(self): ...").body[0]
    assert isinstance(node, ast.ClassDef)
    with pytest.raises(build_site.SiteError, match=r"memfit\.Thing\.do has no docstring"):
        build_site.described(node, "memfit")


def test_a_link_to_a_page_that_does_not_exist_is_an_error() -> None:
    pages = {"index.md": "[a](there.md) [b](gone.md) `[c](code.md)` [d](https://x)", "there.md": ""}
    assert list(build_site.missing_pages("en", pages)) == ["en/index.md: no such page: gone.md"]


def test_a_readme_in_the_other_language_is_linked_by_the_name_of_its_built_page() -> None:
    link = build_site.linked("en", "evidence/data/README.md", "ja", "manual/evidence.md")
    assert link == "https://en.memfit.invalid/evidence/data/index.html"


def test_the_built_site_is_searched_for_dead_links_and_anchors(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#x">1</a><a href="#top">2</a>')
    (tmp_path / "b.html").write_text(
        '<img src="no.png"><a href="a.html#top">3</a><a href="https://x/y">4</a><a href="./folder">5</a>'
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    assert build_site.broken_links(tmp_path) == [
        "a.html: no such anchor: b.html#x",
        "b.html: no such target: ./folder",
        "b.html: no such target: no.png",
    ]


def test_a_folder_with_other_files_is_not_replaced_by_the_site(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(build_site.SiteError, match="is no earlier site"):
        build_site.build(tmp_path)
    assert (tmp_path / "thesis.txt").is_file()


def test_docstrings_become_markdown() -> None:
    text = "Do it:\n- one ``a < b``\n- two <c>\n\nUse it::\n\n    f(1 < 2)\n"
    assert build_site.prose(text) == ("Do it:\n\n- one ``a < b``\n- two &lt;c&gt;\n\nUse it:\n\n    f(1 < 2)")


def test_a_lesson_is_a_page_of_its_text_in_one_language_and_its_code(tmp_path: Path) -> None:
    lesson = tmp_path / "09_a.py"
    lesson.write_text(
        '# %% [markdown] lang="en"\n# # 9. A\n#\n# Text.\n# %% [markdown] lang="ja"\n# # 9. あ\n'
        "# %%\nx = 1  # one\n"
    )
    assert build_site.lesson_page(lesson, "en") == "# 9. A\n\nText.\n\n```python\nx = 1  # one\n```\n"
    assert build_site.lesson_page(lesson, "ja") == "# 9. あ\n\n```python\nx = 1  # one\n```\n"


def test_the_summary_for_language_models_lists_every_english_page_with_a_whole_sentence(
    sites: dict[str, build_site.Pages],
) -> None:
    listed = re.findall(
        r"(?m)^- \[(.+)\]\(([^()]+)\)(?:: (.*))?$", build_site.summary_for_models(sites["en"])
    )
    paths = [path for _, path, _ in listed]
    assert len(paths) == len(set(paths))
    more = {"calculator/index.html", "gallery/index.html", "ja/index.html"}
    assert {*paths} == {build_site.built_name(page) for page in sites["en"]} | more
    for _, path, summary in listed:
        if path in more or path.startswith(("evidence/", "project/", "decisions/")):
            continue
        assert re.fullmatch(r"\S+ .*[^.?!:][.?!]", summary), (path, summary)
    first = {path: summary for _, path, summary in listed}
    assert first["report.html"].startswith("`memfit poc` ends with a report on the screen; `memfit report` ")
    assert first["manual/autopsy.html"].startswith(
        "`memfit autopsy` reads what a death has left and says why"
    )
    assert first["overview.html"] == "Train the model you have in the memory you have."


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("# T\n\n**Fit.** It is *so*, isn't it? Yes.\n", "Fit."),
        ("# T\n\n![A picture](a.png)\n\n1. One\n2. Two\n\nIs [it](b.md) `a.*.b`? Yes.\n", "Is it `a.*.b`?"),
        ("# T\n\n```sh\nls\n\nls -l\n```\n\nSee e.g. 3.5 and\nmore:\n\n- a\n", "See e.g. 3.5 and more."),
        ("# T\n\n| a |\n| - |\n\n> no\n\n    code\n\n**error**: &lt;a\\_b&gt; is.\n", "error: <a_b> is."),
        ("# T\n\nOne ends. memfit begins.\n", "One ends."),
        ("# T\n\n- only\n- a list\n", ""),
    ],
)  # fmt: skip
def test_the_first_sentence_of_a_page_is_whole_and_plain(page: str, sentence: str) -> None:
    assert build_site.first_sentence(page) == sentence


def test_japanese_sentences_have_no_spaces_where_a_line_ends() -> None:
    text = "文の途中で\n改行する。\nGPU も。\n\n1. 項目\n  の続き。\n2. GPU\n```\nあ\nい\n```\n"
    assert build_site.joined(text) == (
        "文の途中で改行する。GPU も。\n\n1. 項目の続き。\n2. GPU\n```\nあ\nい\n```\n"
    )


def test_pages_that_exist_in_japanese_are_not_marked_as_english(sites: dict[str, build_site.Pages]) -> None:
    marked = {
        (path, target)
        for path, text in sites["ja"].items()
        for target in re.findall(r"\]\(([^)\s]+)\)）?[（、]英語", text)
    }
    assert {(path, target) for path, target in marked if not target.startswith("https://en.")} == set()


def test_lint_explains_a_rule_with_the_text_of_its_page(
    sites: dict[str, build_site.Pages], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", "--explain", "trainer-best-steps"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    rule = explain("trainer-best-steps")
    page = sites["en"]["lint/trainer-best-steps.md"]
    for text in (rule.do, rule.when, *rule.links):
        assert "".join(text.split()) in shown
        assert text in page.replace("\\_", "_")
    assert "<saved>" in rule.says
    assert main(["lint", "--explain", "trainer-best-steps", "--lang", "ja", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["do"] == explain("trainer-best-steps", lang="ja").do


def test_lint_refuses_an_unknown_rule_and_other_options_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, said in (
        (["--explain", "trainer-best-step"], "did you mean 'trainer-best-steps'"),
        (
            ["--explain", "trainer-best-steps", "a.yaml", "--each"],
            "FILE, --each cannot be used with --explain",
        ),
        ([], "no configuration file is given"),
    ):
        assert main(["lint", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_every_rule_says_when_it_reports_without_private_names() -> None:
    for name in CHECKS:
        rule = explain(name)
        assert rule.when, name
        assert not re.search(r"`_\w", rule.when), name
        assert dataclasses.asdict(rule)["links"], name
