"""README and docs are correct: commands exist, links have targets, stated numbers are right."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfit.lint.check import CHECKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Links of docs/site are those of the finished site: scripts/build_site.py checks them (unit/test_site.py).
SITE = sorted([*ROOT.glob("docs/site/**/*.md"), *ROOT.glob("skills/*/*.md")])
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {*SITE})
JAPANESE = [page for page in PAGES if page.name.endswith(".ja.md")]
MANUAL = "\n".join(
    p.read_text(encoding="utf-8")
    for p in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *SITE)
    if p.name != "log.md"
)


def console_lines(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```(?:console|bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def memfit_commands() -> list[str]:
    named = {words[1] for words in console_lines(MANUAL) if words[0] == "memfit" and len(words) > 1}
    return sorted(named | set(re.findall(r"^\| `memfit ([a-z]+)", MANUAL, re.MULTILINE)))


def test_the_first_code_block_of_the_readme_is_early_and_has_two_scripts() -> None:
    first = README.split("```")[1]
    assert README[: README.index("```")].count("\n") < 30
    assert README.count("\n") <= 200
    scripts = [words for words in console_lines(f"```{first}```\n") if words[0] == "bash"]
    assert len(scripts) == 2
    for words in scripts:
        subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


def test_the_readme_links_to_every_page_of_docs() -> None:
    for page in {*ROOT.glob("docs/*.md")} - {*JAPANESE}:
        assert f"](docs/{page.name})" in README


@functools.cache
def help_of(command: str) -> str:
    """Return what the command prints with --help."""
    run = subprocess.run(
        [sys.executable, "-m", "memfit", command, "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("command", memfit_commands())
def test_every_command_of_the_manual_has_help(command: str) -> None:
    assert command in help_of(command)


@pytest.mark.parametrize(("typed", "completed"), [("memfit pla", "plan"), ("memfit plan --goa", "--goal")])
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_MEMFIT_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "memfit"]
    run = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert run.stdout.split() == [completed]


def options() -> list[tuple[str, str]]:
    lines = [w for w in console_lines(MANUAL) if w[0] == "memfit" and len(w) > 1]
    # what follows "--" are the options of the user's command
    lines = [w[: w.index("--")] if "--" in w else w for w in lines]
    return sorted({(w[1], part.split("=")[0]) for w in lines for part in w if part.startswith("--")})


@pytest.mark.parametrize(("command", "option"), options())
def test_every_option_of_the_manual_exists(command: str, option: str) -> None:
    assert option in help_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_have_targets(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_headings_have_targets(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"\d+(?:[.,]\d+)*")


def sections(page: Path) -> Iterator[tuple[dict[str, object], set[str]]]:
    """Yield what no translation changes in each section of a page, and the figures of its text. Tables that a
    script writes are in the English page alone."""
    text = re.sub(r"<!-- written by.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks, own = CODE.findall(text), {page.name.replace(".ja.md", ".md")}
    for section in re.split(r"^(?=#+ )", CODE.sub("\0", text), flags=re.MULTILINE)[1:]:
        code, blocks = blocks[: section.count("\0")], blocks[section.count("\0") :]
        same = {
            "level": len(section) - len(section.lstrip("#")),
            "code without comments": [re.sub(r"(^|[ \t]+)#.*", "", b, flags=re.MULTILINE) for b in code],
            "table": [line.count("|") for line in section.splitlines() if line.startswith("|")],
            "links": {t.replace(".ja.md", ".md") for t in re.findall(r"\]\(([^)#\s]+)", section)} - own,
            "claims": set(re.findall(r"<!-- .*? -->", section)),
        }
        yield same, set(FIGURE.findall(re.sub(r"\]\([^)]*\)", "", section)))


@pytest.mark.parametrize("page", [p for p in JAPANESE if p.parent.name == "docs"], ids=lambda p: p.name)
def test_a_japanese_page_of_the_manual_says_what_the_english_one_does(page: Path) -> None:
    english = page.with_name(page.name.replace(".ja.md", ".md"))
    for (theirs, figures), (same, japanese) in zip(sections(english), sections(page), strict=True):
        assert same == theirs
        assert figures <= japanese
        # a small number may be a word in English
        assert {n for n in japanese - figures if not n.isdigit() or int(n) > 100} == set()


@pytest.mark.parametrize("page", JAPANESE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_japanese_page_links_to_japanese_pages_where_there_are_any(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)\.md", page.read_text(encoding="utf-8"))
    others = [t for t in targets if f"{t}.md" != page.name.replace(".ja.md", ".md")]
    assert not [t for t in others if (page.parent / f"{t}.ja.md").exists()]


def test_the_stated_number_of_lint_rules_is_correct() -> None:
    """benchmarks/lint_examples.py writes the record. Without folders it counts the rules added since."""
    record = (ROOT / "benchmarks/lint_examples.md").read_text(encoding="utf-8")
    counted = r"^(\d+) configurations, (\d+) rules: .*? false\.(?: Rules added later, .*: (\d+)\.)?$"
    linted, tried, later = re.findall(counted, record, re.MULTILINE)[0]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    told = re.findall(r"(\d+) (?:known )?misconfigurations", MANUAL + changes)
    assert {*map(int, told), int(tried) + int(later or 0)} == {len(CHECKS)}
    assert f"{int(linted):,}" in MANUAL


def test_every_dependency_is_documented() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for name in ("lowbit", "lora") for d in project["optional-dependencies"][name]]
    names = [re.split(r"[<>=!~\[ ]", d)[0] for d in project["dependencies"] + extras]
    assert not [n for n in names if f"| `{n}` |" not in MANUAL]
