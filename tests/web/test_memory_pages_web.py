"""The calculator and the gallery in Chromium, from files: two languages, three widths, keyboard, axe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory_pages
import pytest
from axe_playwright_python.sync_playwright import Axe

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    memory_pages.build(folder, in_site=True)
    return folder


@pytest.fixture
def opened(browser: Any, site: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[str]]]:
    """The page at (path, width, language), and what the console said."""
    path, width, lang = request.param
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, locale=lang)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith("file:") else said.append(asked.url))
    page.goto((site / path).as_uri())
    if not path.endswith("gallery/index.html"):
        page.wait_for_function("document.getElementById('largest').textContent")
    yield page, said
    page.close()


CALCULATOR, MODEL, INDEX = "calculator/index.html", "gallery/gpt-2.html", "gallery/index.html"
EVERY = [(p, w, lang) for p in (CALCULATOR, MODEL, INDEX) for w in (1280, 768, 390) for lang in ("en", "ja")]


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_a_page_has_no_error_nothing_sticks_out_and_axe_finds_nothing(
    opened: tuple[Any, list[str]], overflowing: str
) -> None:
    page, said = opened
    assert said == []
    assert page.evaluate(overflowing) == []
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("opened", [(CALCULATOR, 1280, "en")], indirect=True)
def test_a_setting_is_chosen_by_keyboard_and_the_answer_and_the_command_follow(
    opened: tuple[Any, list[str]],
) -> None:
    page, _ = opened
    page.evaluate("location.hash = 'model=gpt-2&device=L4&batch=1&second=1024&precision=float32'")
    page.wait_for_function("document.getElementById('verdict').classList.contains('fits')")
    page.focus("#batch")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("64")
    page.wait_for_function("document.getElementById('verdict').classList.contains('fits_not')")
    assert "--batch 64 --length 1024 --on L4" in page.inner_text("#commands")
    page.keyboard.press("End")
    page.keyboard.type("0")
    page.wait_for_function("document.getElementById('verdict').classList.contains('unknown')")
    assert "--batch 640" in page.inner_text("#commands")
    assert page.inner_text("#figures") == ""
    assert "batch=640" in page.url
    for wrong in ("0", "-3", "1.5", ""):  # no command is shown that would refuse them
        page.fill("#batch", wrong)
        page.wait_for_function("document.getElementById('verdict').textContent.startsWith('Enter a whole')")
        assert page.inner_text("#commands") == ""


@pytest.mark.parametrize("opened", [(CALCULATOR, 390, "en")], indirect=True)
def test_the_language_changes_on_the_page_and_the_setting_stays(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    page.fill("#batch", "3")
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "ja"
    assert page.input_value("#batch") == "3"
    assert page.inner_text("#choose-h") == "学習の条件"


@pytest.mark.parametrize("opened", [(MODEL, 1280, "en")], indirect=True)
def test_the_page_of_a_model_has_a_row_for_each_plan_and_a_column_for_each_device(
    opened: tuple[Any, list[str]],
) -> None:
    page, _ = opened
    page.wait_for_function("document.querySelectorAll('#plans tbody tr').length === 12", timeout=120_000)
    assert page.locator("#plans thead th").count() == 2 + len(memory_pages.DEVICES)
