"""What `memfit lint` calls refused, the libraries refuse; the set-up beside it, they take."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs_rules import CASES

from memfit.runtime.ranks import free_port

# Of those that can be tried on one CPU process in a second or two.
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
# Where the good one needs a disk, eight processes, an optimizer that is compiled for a minute.
BAD_ALONE = ("deepspeed-nvme-path", "deepspeed-batch-product", "deepspeed-one-bit")


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("deepspeed", "accelerate", "transformers")),
    reason="deepspeed, accelerate or transformers is not installed",
)
def test_what_is_called_refused_is_refused() -> None:
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
