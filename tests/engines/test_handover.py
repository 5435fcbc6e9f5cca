"""Exported folders, each run by its own launcher on two CPU ranks: the training conforms to the plan,
gradient clipping included.

A user's script first leaves out what the export asks it to do itself, and this is reported by name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memfit.cli import main
from memfit.techniques.plan_file import plan_text
from memfit.techniques.registry import make_use
from memfit.types.plan import Plan

HERE = Path(__file__).with_name("handover")
TIMEOUT_S = 240
USERS_DEEPSPEED = {
    "gradient_clipping": 0.05,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 10}},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """``techniques`` of the plan beside checkpointing, ``words`` of the export, the package it ``needs``."""

    techniques: Mapping[str, Any]
    words: tuple[str, ...]
    needs: str = "torch"


CASES = {
    "memfit's worker, native": Case(techniques={"fsdp2": {}}, words=()),
    "a script on torch": Case(
        techniques={"fsdp2": {}}, words=("--script", "by_torch.py", "--script-applies", "all")
    ),
    "a script on Accelerate": Case(
        techniques={"ddp": {}},
        needs="accelerate",
        words=("--engine", "accelerate", "--script", "by_accelerate.py", "--script-applies", "all"),
    ),
    "a script on DeepSpeed, of the user's file": Case(
        techniques={"zero": {"stage": 2}},
        needs="deepspeed",
        words=(
            "--from",
            "ds.json",
            "--ranks",
            "2",
            "--script",
            "by_deepspeed.py",
            "--script-applies",
            "activation-checkpointing",
        ),
    ),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, tuple[Path, Any]]]:
    """The folders, with all their launchers running."""
    root = tmp_path_factory.mktemp("handover")
    for file in HERE.glob("*.py"):
        (root / file.name).write_bytes(file.read_bytes())
    (root / "ds.json").write_text(json.dumps(USERS_DEEPSPEED))
    found: dict[str, tuple[Path, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for index, (name, case) in enumerate(CASES.items()):
            if importlib.util.find_spec(case.needs) is None:
                continue
            uses = {**case.techniques, "activation-checkpointing": {}}
            plan = Plan(ranks=2, uses=tuple(make_use(n, k) for n, k in uses.items()))
            (root / "plan.yaml").write_text(plan_text(plan))
            words = ("export", "my_job.py:job", "--plan", "plan.yaml", "--to", "torchrun", *case.words)
            assert main([*words, "--max-restarts", "0", "--out", f"out{index}"]) == 0
            found[name] = (root / f"out{index}", _started(root / f"out{index}"))
    yield found
    for _, process in found.values():
        process.terminate()
        process.wait(TIMEOUT_S)


def _started(folder: Path) -> Any:
    source = str(Path(__file__).parents[2] / "src")
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": source, "DS_ACCELERATOR": "cpu"}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(["bash", "torchrun.sh"], cwd=folder, env=env, stdout=output, stderr=output)


@pytest.mark.parametrize("name", CASES)
def test_the_exported_folder_trains_the_plan(launched: Mapping[str, tuple[Path, Any]], name: str) -> None:
    if name not in launched:
        pytest.skip(f"{CASES[name].needs} is not installed")
    folder, process = launched[name]
    code, text = process.wait(TIMEOUT_S), (folder / "output.txt").read_text()
    assert code == 0, text[-3000:]
    told = [json.loads(line) for line in re.findall(r"^\[default\d\]:(\{.*\})$", text, re.M)]
    if not CASES[name].words:
        said = [t["result"] for t in told if t["event"] == "conformance"]
        assert len(said) == 2
        assert all(s.startswith("as planned (") and "gradient clipping" in s.partition(")")[0] for s in said)
        assert [t["measurement"]["outcome"] for t in told if t["event"] == "result"] == ["ok", "ok"]
        return
    ranks = [t for t in told if t["event"] == "handover"]
    assert len(ranks) == 2
    by_file = "deepspeed" in name.lower()  # which clips by the exported file
    missing = ["activation-checkpointing"] + ([] if by_file else ["gradient clipping"])
    for rank in ranks:
        assert rank["careless"] == missing
        assert {"activation-checkpointing", "gradient clipping"} <= set(rank["checked"])
    if by_file:
        exported = json.loads((folder / "deepspeed.json").read_text())
        assert exported == USERS_DEEPSPEED
