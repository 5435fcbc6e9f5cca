"""LaunchConfig: exactly what a child process is given. Rendered once; run executes it, export writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.job import JobRef
from memfit.types.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training run of one plan. ``cap_bytes``: what the process may take above its footprint."""

    name: str  # "baseline", "recommended", "ablation: ..."
    role: str  # baseline | recommended | ablation
    job: JobRef
    plan: Plan
    engine: str = "native"
    seed: int
    steps: int
    batch_size: int = 0  # samples of a step on all ranks; 0: not told
    cap_bytes: int | None = None
    threads: int = 0  # 0: torch's default
    evaluate: bool = True
    timeline: bool = False  # keep the measured memory timeline
    timeout_s: float = 600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """``argv`` starts with a placeholder-free program; ``files`` are written beside it, name -> text."""

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    spec: RunSpec
