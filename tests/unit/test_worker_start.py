"""What memfit and its workers import: no file of the user's in the place of an installed module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from memfit.jobs.user import shadowed_modules

JOB = """
import random

import torch
from torch import nn

from layers import make_layers
from memfit import Job


def make_batch(step, seed):
    noise = random.Random(1000 * seed + step).random()
    return {"x": torch.full((8, 4), noise), "y": torch.zeros(8, 2)}


def loss(model, batch):
    from penalties import penalty

    return nn.functional.mse_loss(model(batch["x"]), batch["y"]) + penalty(model)


job = Job(name="mine", build_model=make_layers, make_batch=make_batch, loss=loss, batch_size=8, steps=2)
"""
BESIDE = {
    "mine.py": JOB,
    "layers.py": "from torch import nn\n\ndef make_layers():\n    return nn.Linear(4, 2)\n",
    "penalties.py": "def penalty(model):\n    return sum(p.square().sum() for p in model.parameters())\n",
}
# Each would end the process that imported it, and say so.
HIDDEN = ("torch", "random", "numpy", "dataclasses", "typer", "datetime", "tempfile")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in BESIDE.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def hide(folder: Path) -> None:
    for name in HIDDEN:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the wrong {name} was imported')")


def memfit(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """``python -m memfit`` in the folder: exit code, standard output, standard error."""
    return _ended(["-m", "memfit", *arguments], folder)


def _ended(arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "XDG_DATA_HOME": str(folder / "data")},
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


def test_the_installed_script_takes_the_modules_beside_a_job_in_another_folder(folder: Path) -> None:
    hide(folder)
    (folder / "elsewhere").mkdir()
    script = folder / "elsewhere" / "memfit"
    script.write_text("import sys\nfrom memfit.__main__ import run\nsys.exit(run())\n")
    code, out, said = _ended([str(script), "run", str(folder / "mine.py:job")], folder / "elsewhere")
    assert (code, "wrong" in said) == (0, False), said
    assert out.startswith("plain: ok")


def test_ranks_import_no_file_of_the_current_folder_in_the_place_of_an_installed_module(
    folder: Path,
) -> None:
    hide(folder)
    (folder / "ddp.yaml").write_text("ranks: 2\ntechniques:\n  ddp: {}\n")
    code, out, said = memfit("run", "mine.py:job", "--plan", "ddp.yaml", folder=folder)
    assert (code, "wrong" in said) == (0, False), said
    assert "ok without a cap" in out


def test_a_module_beside_the_job_that_python_hides_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import helper\ndef job():\n    import numpy as np\n    from . import typer\n    import random\n"
    )
    (tmp_path / "helper.py").write_text("from datetime import date\nimport random, logging\n")
    for name in ("random", "datetime", "typer", "json"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("")
    import numpy

    taken = {
        "mine.py imports numpy": f"{numpy.__file__} is taken, not {tmp_path / 'numpy' / '__init__.py'}",
        "mine.py imports random": f"the standard library's is taken, not {tmp_path / 'random.py'}",
        "helper.py imports datetime": f"the standard library's is taken, not {tmp_path / 'datetime.py'}",
    }
    lines = list(shadowed_modules(f"{tmp_path / 'mine.py'}:job"))
    assert dict(line.removesuffix("; rename it if it is meant").split(": ", 1) for line in lines) == taken


@pytest.mark.parametrize(
    "spec", ["protein-ss", "hf:./llama", "nowhere.py:job", "broken.py:job", "notes.txt:job"]
)
def test_nothing_is_told_of_hidden_modules_where_there_is_no_readable_job(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import random import")
    (tmp_path / "random.py").write_text("")
    assert list(shadowed_modules(spec)) == []


def test_another_program_that_imports_memfit_keeps_its_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import memfit\n")
    (tmp_path / "mine" / "__main__.py").write_text("import sys\nprint(sys.path[0])\n")
    assert _ended(["-m", "mine", "memfit"], tmp_path) == (0, f"{tmp_path}\n", "")
