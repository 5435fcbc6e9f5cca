"""What README and docs say about memfit's performance can be repeated: claims.toml has a row for every
claim, and every row is claimed; pages are what their records say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import reproduce

ROOT = Path(__file__).parents[1]
CLAIMS = {claim.id: claim for claim in reproduce.read_claims()}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/guides/*.md"))]
READ = [page for page in PAGES if page.name not in ("log.md", "glossary.md")]
# A number beside a word for a measurement is a claim, unless the paragraph says <!-- no claim -->.
NUMBER = re.compile(r"\d ?%|\d×|\d of \d|\bmedian\b|\bthird of a second\b|minutes")
MEASURED = re.compile(
    r"\b(measured|differed|too (high|low)|off by|took|died|faster|slower|at most ten minutes)\b"
)


def blocks(page: Path) -> Iterator[str]:
    """Yield the paragraphs, list items and table rows outside code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from re.split(r"\n\s*\n|\n(?=- |\| )", text)


def claimed(block: str, page: Path) -> set[str]:
    """Return the ids of the claims of a block, and pages without a row."""
    by_page = {claim.page: claim.id for claim in CLAIMS.values() if claim.page}
    linked = re.findall(r"\]\(([^)#\s]*benchmarks/[\w/]+\.md)", block)
    paths = {(page.parent / link).resolve().relative_to(ROOT.resolve()).as_posix() for link in linked}
    ids = set(re.findall(r"<!-- claim: (\w+) -->", block))
    texts = {path for path in paths if Path(path).stem.isupper()}  # a protocol, a guide to the data
    return ids | {by_page.get(path, path) for path in paths - texts}


def test_every_claim_of_readme_and_docs_has_a_row_and_every_row_is_claimed() -> None:
    said = {name for page in READ for block in blocks(page) for name in claimed(block, page)}
    pages = {claim.id for claim in CLAIMS.values() if claim.page.startswith("docs/")}  # claims in themselves
    assert said - set(CLAIMS) == set()
    assert set(CLAIMS) - said - pages == set()


def test_every_page_of_measurements_has_a_row() -> None:
    written = [p for p in ROOT.glob("benchmarks/**/*.md") if not p.stem.isupper()]
    assert {p.relative_to(ROOT).as_posix() for p in written} <= {claim.page for claim in CLAIMS.values()}


@pytest.mark.parametrize("page", READ, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_numbers_of_measurements_are_claims(page: Path) -> None:
    loose = [
        block
        for block in blocks(page)
        if NUMBER.search(block)
        and MEASURED.search(block)
        and not claimed(block, page)
        and "<!-- no claim -->" not in block
    ]
    assert not loose


def test_commands_records_and_pages_exist() -> None:
    for claim in CLAIMS.values():
        for command in (claim.measure, claim.render, claim.quick):
            script = command.split()[0] if command else ""
            assert script in ("", "-m") or (ROOT / script).is_file(), claim.id
        for record in claim.records:
            assert (ROOT / "benchmarks" / "records" / record).is_file(), claim.id
        assert not claim.page or (ROOT / claim.page).is_file(), claim.id


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reproduce.copy_of_repository(tmp_path_factory.mktemp("reproduce"))


@pytest.mark.quick_cases("answer_times", "peers_search", "scripts", "script_edits", "survey", "exports")
@pytest.mark.parametrize("name", [name for name, claim in CLAIMS.items() if claim.render])
def test_pages_are_what_their_records_say(name: str, root: Path) -> None:
    assert reproduce.rendered(CLAIMS[name], root) == ""


def test_a_page_that_differs_from_its_records_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = CLAIMS["peers_search"]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / claim.page).write_text("edited by hand")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)  # where the pages that are kept lie
    assert "benchmarks/peers_search.md differs from its records" in reproduce.rendered(claim, root)


def test_a_configuration_is_linted_in_a_third_of_a_second_of_processor_time(tmp_path: Path) -> None:
    file = tmp_path / "trainer.yaml"
    file.write_text("fp16: true\nbf16: true\n")
    code = (
        "import time\nfrom memfit.cli.app import main\n"
        f"assert main(['lint', {str(file)!r}]) == 1\nassert time.process_time() < 0.6, time.process_time()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
