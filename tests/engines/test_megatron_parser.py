"""Megatron-LM's trainer reads its rendered arguments: its own parser and validation, installed separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_arguments
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / ".parsers" / "megatron-core"

COUNT = len(megatron_arguments.PLANS)
pytestmark = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="bash scripts/parsers.sh puts megatron-core's trainer there"
)


@pytest.fixture(scope="module")
def judged() -> list[dict[str, Any]]:
    """What the trainer says to each plan, and last to the first one with an unknown argument."""
    plans = megatron_arguments.plans()
    texts = [*map(megatron_arguments._rendered, plans)]
    asked = iter([*texts, f"{texts[0]}--no-such-option 1\n"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_arguments, "plans", lambda: [*plans, plans[0]])
        patch.setattr(megatron_arguments, "_rendered", lambda plan: next(asked))
        return megatron_arguments.judged(PACKAGE)


@pytest.mark.parametrize("number", range(COUNT))
def test_the_trainer_accepts_the_rendered_arguments(number: int, judged: list[dict[str, Any]]) -> None:
    assert judged[number]["refused"] == "", judged[number]


def test_the_trainer_refuses_an_unknown_argument(judged: list[dict[str, Any]]) -> None:
    assert "no-such-option" in judged[COUNT]["refused"]
