"""LaunchConfig: exactly what a child process is given. Rendered once; run executes it, export writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.job import JobRef
from memfit.types.plan import Plan

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """``save``: a folder that gets checkpoints, every ``every_steps`` (0: at the end only). ``resume``: the
    folder of one to go on from; "": none. ``passed_over``: newer ones, and why they were not taken."""

    save: str = ""
    every_steps: int = 0
    resume: str = ""
    passed_over: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training run of one plan. ``cap_bytes``: what the process may take above its footprint;
    ``timeout_s``: after which it is stopped, None: never.

    ``steps`` counts from the very first, also where a checkpoint that is gone on from has done some of them.
    """

    name: str  # "baseline", "recommended", "ablation: ..."
    role: str  # baseline | recommended | ablation
    job: JobRef
    plan: Plan
    engine: str = "native"
    seed: int
    steps: int
    batch_size: int = 0  # samples of a step on all ranks; 0: not told
    # Of the model, where an engine's own trainer builds it: option to value, as on its command line.
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clip: float | None = None  # largest gradient norm, as in the job
    cap_bytes: int | None = None
    threads: int = 0  # 0: torch's default
    evaluate: bool = True
    timeline: bool = False  # keep the measured memory timeline
    timeout_s: float | None = None
    keep: Keep = dataclasses.field(default_factory=Keep)
    source_digest: str = ""  # of the file that a user's job is in


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says of itself. ``step``: how many are done; ``shapes``: of whole tensors, by name;
    ``optimizer``: its class, ``state``: what it keeps of a parameter; ``files_bytes``: name -> size."""

    step: int
    seed: int
    job: str
    plan: str
    engine: str
    ranks: int
    shapes: Mapping[str, Shape]
    optimizer: str
    state: tuple[str, ...]
    files_bytes: Mapping[str, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """``argv`` starts with a placeholder-free program; ``files`` are written beside it, name -> text."""

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    spec: RunSpec
