"""The libraries refuse the set-ups that `memfit lint` calls refused, and accept the corrected ones."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_lint_rules import CASES

from memfit.runtime.ranks import free_port

# Rules that can be tried in one CPU process within a second or two.
REFUSED = (
    "deepspeed-two-precisions",
    "deepspeed-bf16-loss-scale",
    "deepspeed-section-key",
    "deepspeed-removed",
    "deepspeed-newer-key",
    "deepspeed-value",
    "trainer-value",
    "trainer-best-steps",
    "trainer-no-workers",
    "deepspeed-untested-optimizer",
    "deepspeed-scheduler-steps",
    "deepspeed-no-zero",
    "trainer-deepspeed-batch",
    "trainer-deepspeed-accumulation",
    "trainer-deepspeed-clipping",
    "trainer-deepspeed-hyperparameters",
    "trainer-deepspeed-precision",
    "trainer-two-precisions",
    "fsdp2-reshard",
    "fsdp-prefetch",
)
# Rules whose good set-up needs a disk, eight processes, or an optimizer that takes a minute to compile.
BAD_ALONE = ("deepspeed-nvme-path", "deepspeed-batch-product", "deepspeed-one-bit")


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("deepspeed", "accelerate", "transformers")),
    reason="deepspeed, accelerate or transformers is not installed",
)
def test_libraries_refuse_bad_set_ups_and_accept_good_ones() -> None:
    asked = {f"{rule} bad": dict(CASES[rule].bad) for rule in (*REFUSED, *BAD_ALONE)}
    asked |= {f"{rule} good": dict(CASES[rule].good) for rule in REFUSED}
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    child = subprocess.run(
        [sys.executable, Path(__file__).parent / "refusals.py"],
        input=json.dumps(asked),
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told = json.loads(child.stdout.splitlines()[-1])
    assert {name: error for name, error in told.items() if (error is None) == name.endswith("bad")} == {}
