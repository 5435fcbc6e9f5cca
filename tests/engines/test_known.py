"""Every setting that `memfit lint` says a library has goes back through that library's own parser."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = {
    "deepspeed": "deepspeed",
    "accelerate": "accelerate",
    "trainer": "transformers",
    "torchtitan": ".parsers/torchtitan-0.2",
    "megatron": ".parsers/megatron-core",
}


@pytest.mark.parametrize(("library", "package"), LIBRARIES.items())
def test_the_library_parser_accepts_every_setting_of_the_table(library: str, package: str) -> None:
    beside = [str(ROOT / package)] if package.startswith(".") else []
    if not all(Path(p).is_dir() for p in beside) or not (beside or importlib.util.find_spec(package)):
        pytest.skip(f"{package} is not there (bash scripts/parsers.sh)")
    text = resources.files("memfit.lint").joinpath(f"options/{library}.toml").read_text(encoding="utf-8")
    path = os.pathsep.join(
        [*beside, str(ROOT / "src"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    )
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("known.py"), library, *beside],
        input=text,
        env=os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout.splitlines()[-1]) == []
