"""Chromium, once for all tests of pages."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


_HERE, _LONGEST = Path(__file__).parent, "test_decision_web.py"

# Elements that stick out of the page although no scrolling box of theirs holds them.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return (box.right > innerWidth + 0.5 || box.left < -0.5) && box.width > 1 && !e.closest(".scroll");
}).map(e => e.tagName + "." + (e.className.baseVal ?? e.className))"""


@pytest.fixture
def overflowing() -> str:
    return OVERFLOWING


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "no Chromium on this machine" if CHROMIUM is None else ""
    if not reason and importlib.util.find_spec("playwright") is None:
        reason = "playwright is not installed"
    for item in items:
        if "tests/web" in item.path.as_posix():
            item.add_marker(pytest.mark.web)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
    # They come first, beginning with the longest one: short files remain for the end, when a worker that has
    # no more of them waits for the others.
    items.sort(key=lambda item: 2 if item.path.parent != _HERE else item.path.name != _LONGEST)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()
