"""The documentation site, built strictly and shown by a real browser at three widths in both languages."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build_site
import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="zensical is not installed"),
]
# one of each kind of page
PAGES = (
    "index.html",
    "first-steps.html",
    "symptoms/out-of-memory-later.html",
    "techniques/index.html",
    "techniques/activation-checkpointing.html",
    "engines/deepspeed.html",
    "lint/index.html",
    "lint/trainer-best-steps.html",
    "jobs/alphafold2.html",
    "integrations/transformers.html",
    "report.html",
    "lessons/01_bet_on_the_peak.html",
    "lessons/decision-makers.html",
    "guides/scientist.html",
    "manual/estimate.html",
)
ENGLISH_PAGES = ("api/index.html", "commands/plan.html", "evidence/memory_truth.html")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *ignored: object) -> None: ...


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    out = tmp_path_factory.mktemp("site")
    build_site.build(out)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("language", build_site.LANGUAGES)
def test_pages_have_no_errors_overflow_or_accessibility_violations(
    browser: Any, address: str, language: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: said.append(wanted.url) if not is_own(wanted.url, address) else None)
    for path in (*PAGES, *(ENGLISH_PAGES if language == "en" else ())):
        page.goto(f"{address}/{'' if language == 'en' else 'ja/'}{path}")
        assert page.evaluate("document.documentElement.lang") == language
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        found = Axe().run(page).response["violations"]
        grave = [
            (v["id"], [n["target"] for n in v["nodes"]][:3])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert (path, said, grave) == (path, [], [])
    page.close()


def is_own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def test_a_reader_finds_a_symptom_by_searching_and_changes_the_language(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/symptoms/killed.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("evaluation dies")
    page.locator("a[href*='out-of-memory-evaluation']").first.wait_for(timeout=10_000)
    page.keyboard.press("Escape")
    page.goto(f"{address}/symptoms/killed.html")
    other = page.locator("a[hreflang=ja]").first.get_attribute("href")
    page.goto(f"{address}/symptoms/{other}")
    assert page.evaluate("document.documentElement.lang") == "ja"
    assert page.url.endswith("/ja/symptoms/killed.html")
    page.close()


@pytest.mark.parametrize("language", build_site.LANGUAGES)
def test_the_calculator_opens_in_the_language_of_the_page(browser: Any, address: str, language: str) -> None:
    page = browser.new_page(locale="en-US" if language == "ja" else "ja-JP")  # the page decides, not this
    page.goto(f"{address}/{'' if language == 'en' else 'ja/'}index.html")
    page.locator("article a[href*='calculator']").click()
    page.wait_for_url("**/calculator/index.html*")
    assert page.evaluate("document.documentElement.lang") == language
    page.locator("a[data-t=documentation]").click()
    page.wait_for_url(f"{address}/{'' if language == 'en' else 'ja/'}index.html")
    page.close()


def test_every_page_of_the_guides_is_in_the_summary_for_language_models(address: str) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{address}/llms.txt") as answer:
        text = answer.read().decode()
    assert text.count("\n- [") > 300
    for file in Path(build_site.HAND / "en").rglob("*.md"):
        assert file.relative_to(build_site.HAND / "en").with_suffix(".html").as_posix() in text
