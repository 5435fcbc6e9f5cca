"""The work of adopting a plan here: counted, not estimated."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

from memfit.store.database import Store
from memfit.techniques.registry import technique
from memfit.types.job import JobRef
from memfit.types.plan import Plan
from memfit.types.result import Effort, OutcomeKind, Run

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_THEIRS = frozenset({"torch", "numpy"})  # already installed by anyone who trains


def effort(ref: JobRef, plan: Plan, runs: Sequence[Run], store: Store) -> Effort:
    """Count the work of adopting ``plan`` for the job on this machine.

    - ``commands``: 1
    - ``changed_lines``: the non-blank lines of the user's own job file
    - ``packages`` and ``installed_mib``: number and size on disk of the installed packages that memfit and
      the plan's techniques need, with memfit itself and without torch and numpy
    - ``failed_attempts``: those of the ``runs`` that failed or timed out, and the PoCs in ``store`` that were
      begun and not finished; if there are ``runs``, the latest PoC is theirs and is not counted
    - ``attended_minutes``: None, because only the user knows it
    """
    packages = _closure(["memfit", *(p for u in plan.uses for p in technique(u.technique).needs)])
    failure_count = sum(r.measurement.outcome in (OutcomeKind.FAILED, OutcomeKind.TIMEOUT) for r in runs)
    interrupted_ids = {r.poc_id for r in store.records(kind="begin")} - {
        r.poc_id for r in store.records(kind="poc")
    }
    current_ids = {store.latest_poc_id()} if runs else set()
    return Effort(
        commands=1,
        changed_lines=_job_lines(ref),
        packages=len(packages),
        installed_mib=round(sum(_size_mib(p) for p in packages), 1),
        attended_minutes=None,
        failed_attempts=failure_count + len(interrupted_ids - current_ids),
    )


def _job_lines(ref: JobRef) -> int:
    """Return the number of non-blank lines of the user's job file; 0 if the job is not in a Python file, as a
    built-in or Hugging Face job, or the file cannot be read."""
    path = Path(ref.spec.rpartition(":")[0])
    if path.suffix != ".py":
        return 0
    try:
        return sum(bool(line.strip()) for line in path.read_bytes().splitlines())
    except OSError:
        return 0


def _closure(roots: Sequence[str]) -> set[str]:
    """Return the names of the installed packages among ``roots`` and among all that these need, directly or
    indirectly. Left out are torch and numpy, what only these two need, and optional dependencies (extras)."""
    distributions: set[str] = set()
    queue = list(roots)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in distributions or name in _THEIRS:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        distributions.add(name)
        queue += [m.group() for r in requires if "extra ==" not in r and (m := _NAME.match(r))]
    return distributions


def _size_mib(name: str) -> float:
    files = importlib.metadata.files(name) or []
    return sum(f.size or 0 for f in files) / 2**20
