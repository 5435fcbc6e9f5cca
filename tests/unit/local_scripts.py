"""Scripts of the tests as if they were public ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from child_ranks import run_children
from scripts.corpus import PublicScript

COUNTED = Path(__file__).with_name("counted_script.py")


def local_script(name: str, command: str, ranks: int = 1) -> PublicScript:
    """Return the script NAME.py of a test's folder, started by ``command`` on ``ranks`` processes."""
    return PublicScript(
        name=name,
        kind="",
        use="development",
        repository="",
        commit="",
        path=f"{name}.py",
        sha256="",
        packages=(),
        prepare="nothing",
        folder="{work}",
        command=command,
        ranks=ranks,
    )


def measured_bytes(path: Path, *, steps: int = 2, ranks: int = 1) -> int:
    """Return the peak of the script's first ``steps`` optimizer steps, of the rank with the largest.

    `scripts.measure` measures the same, in processes that start anew and import torch."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MEMFIT_TRUTH": folder, "MEMFIT_TRUTH_STEPS": str(steps)}
        run_children(COUNTED, [[path]] * ranks, env=environment)
        records = [json.loads(file.read_text()) for file in Path(folder).glob("rank-*.json")]
    assert len(records) == ranks
    return max(int(step["peak_bytes"]) for record in records for step in record["steps"])
