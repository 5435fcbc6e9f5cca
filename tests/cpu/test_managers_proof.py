"""The proof of concept that the managers' guides begin with is run here, on real data, with few steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def command(guide: str) -> str:
    """The command of the block that the test of the guides leaves out."""
    text = (GUIDES / guide).read_text(encoding="utf-8")
    found = re.search(r"^```text\n\$ (memfit poc .*)\n```", text, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.long
@pytest.mark.timeout(900)  # it plans a model of 650 million parameters for a catalog of machines, too
@pytest.mark.skipif(sys.platform != "linux", reason="a cap on memory is Linux's")
def test_the_first_command_of_the_managers_guides_runs(tmp_path: Path) -> None:
    asked = {command(guide) for guide in ("manager.md", "manager.ja.md")}
    assert len(asked) == 1, "both guides ask for the same"
    words = asked.pop().split()[1:]
    store = ["--store", str(tmp_path / "store")]

    def run(*arguments: str) -> str:
        line = [sys.executable, "-m", "memfit", *arguments, *store]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(*words, "--steps", "2", "--seeds", "1", "--out", "r.html")
    assert "</html>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "purchase" in run("decide")
    run("report", "--lang", "ja", "--out", "r.ja.html")
    assert "PoC（概念実証）" in (tmp_path / "r.ja.html").read_text(encoding="utf-8")
