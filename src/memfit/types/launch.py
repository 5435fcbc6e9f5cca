"""LaunchConfig: exactly what a child process receives.

It is rendered once; run executes it, export writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.job import JobRef
from memfit.types.plan import Plan

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Checkpoint settings of a run.

    ``save``: folder for checkpoints, every ``every_steps`` (0: at the end only). ``resume``: folder of the
    checkpoint to resume from; "": none. ``passed_over``: newer checkpoints that were not used, with the
    reasons.
    """

    save: str = ""
    every_steps: int = 0
    resume: str = ""
    passed_over: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training run of one plan.

    ``cap_bytes``: memory that the process may use above its footprint. ``timeout_s``: time after which it is
    stopped; None: never. ``steps`` counts from the very first step, including steps done before a checkpoint
    that is resumed.
    """

    name: str  # "baseline", "recommended", "ablation: ..."
    role: str  # baseline | recommended | ablation
    job: JobRef
    plan: Plan
    engine: str = "native"
    seed: int
    steps: int
    batch_size: int = 0  # samples per step over all ranks; 0: unknown
    # Model sizes for an engine whose own trainer builds the model: option -> value, as on its command line.
    sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clip: float | None = None  # largest gradient norm, as in the job
    cap_bytes: int | None = None
    threads: int = 0  # 0: torch's default
    evaluate: bool = True
    timeline: bool = False  # keep the measured memory timeline
    timeout_s: float | None = None
    keep: Keep = dataclasses.field(default_factory=Keep)
    source_digest: str = ""  # digest of the file that contains a user's job


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The description stored in a checkpoint.

    ``step``: number of steps done. ``shapes``: shapes of whole tensors by name. ``optimizer``: its class.
    ``state``: what it keeps per parameter. ``files_bytes``: name -> size.
    """

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
    """What is launched.

    ``argv`` starts with the program, without placeholders. ``files`` are written beside it, name -> text.
    """

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    spec: RunSpec
