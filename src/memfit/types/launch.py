"""LaunchConfig: exactly what a child process receives.

It is rendered once; run executes it, export writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from memfit.types.device_kind import HOST
from memfit.types.job import JobRef
from memfit.types.plan import Plan

Shape = tuple[int, ...]
RENDEZVOUS = "rendezvous.txt"  # names the file through which the ranks of a launch find each other
RECORD_BYTES_PER_STEP = 56
"""Of each process's memory: six numbers per step, of 8 bytes, in arrays that grow by an eighth."""
RESUMABLE_EXIT = 75
"""Exit status after SIGTERM of a run that can be resumed: EX_TEMPFAIL of sysexits.h."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """Checkpoint settings of a run.

    ``save``: folder for checkpoints; "": none are saved. They are saved at the end, and before that every
    ``every_steps`` steps; if that is 0, only at the end. ``resume``: the checkpoint to resume from, or a
    folder of checkpoints, of which the newest complete one is taken; "": none. ``passed_over``: texts that
    name newer checkpoints that were not used, with the reasons. ``keep_last``: number of newest complete
    checkpoints in ``save`` that are kept when another is saved; 0: all. ``grace_s``: seconds after SIGTERM
    within which a run that saves must have saved and ended. ``restarts``: most restarts in a row, after
    deaths or hangs of ranks, without a new checkpoint in between. ``asynchronous``: whether training goes on
    while a copy of what is saved, in host memory, is written.
    """

    save: str = ""
    every_steps: int = 0
    resume: str = ""
    passed_over: tuple[str, ...] = ()
    keep_last: int = 0
    grace_s: float = 25.0
    restarts: int = 3
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One training run of one plan.

    ``cap_bytes``: memory that the process may use above what it has when the cap is set; None: no cap.
    ``cap_scope``: what the cap holds for. "training": for training; it is lifted for the evaluation. "run":
    for training and evaluation. "bound": for both, as memfit's own bound and not the user's; it is raised to
    what evaluation and saves took in the warm-up, if that is more. ``save_copy_bytes``: predicted bytes of
    the copy in host memory that an asynchronous save writes; on a processor, ``cap_bytes`` of the scope
    "bound" includes them; 0: saves are not asynchronous. ``timeout_s``: seconds after which it is stopped;
    None: never. ``steps``: number of steps from the very first one, including those done before a checkpoint
    that is resumed. ``stall_s``: seconds without progress in a step after which all ranks are ended; None:
    many steps' time (`StallWatch`). ``predicted_step_s``: None: unknown. ``degraded``: a negative control of
    the job ("half-steps": ``steps`` is already half of them); "last-bit": each initial weight is changed by
    at most one unit in its last place, which stands for a repetition of plain training; "": neither.
    """

    name: str  # "baseline", "recommended", "ablation: ..."
    role: str  # in a proof of concept baseline | recommended | ablation; else run, trial, calibration or ""
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
    cap_scope: str = "training"
    threads: int = 0  # 0: torch's default
    device: str = HOST  # torch's name of the kind of device: "cpu", "cuda"; a rank uses that of its number
    save_copy_bytes: int = 0
    evaluate: bool = True
    timeline: bool = False  # keep the measured memory timeline
    timeout_s: float | None = None
    stall_s: float | None = None
    predicted_step_s: float | None = None
    keep: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    source_digest: str = ""  # digest of the file that contains a user's job
    degraded: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The description stored in a checkpoint.

    ``step``: number of steps done. ``job``: the job's name. ``plan``: the plan's label. ``shapes``: name ->
    shape of each parameter and buffer, as a whole if it is sharded. ``optimizer``: name of the optimizer's
    class. ``state``: names of what the optimizer keeps per parameter. ``files_bytes``: file name -> size.
    ``files_sha256``: file name -> SHA-256 of its content, as hexadecimal digits; empty in checkpoints of
    versions that stored none. ``sha256``: that of the description itself, without this field.
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
    files_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sha256: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """A child process to be started.

    ``argv``: the program and its arguments; ``{dir}`` in an argument stands for the folder into which
    ``files`` (name -> text) are written. ``env``: environment variables that the process gets in addition to
    those of this process, and in place of those of the same names. ``spec``: the run that the process makes.
    """

    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    spec: RunSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRequest:
    """What a worker process is asked to measure (worker/calibrate.py).

    ``signatures``: the operators, measured in this order; none is begun after ``timing_s`` seconds.
    ``packages``: modules to import first, which register operators. ``rates``: whether to measure the
    machine's rates, such as its memory bandwidth, too. ``memory_only``: measure only the peak memory inside
    each operator, without its inputs, and neither times nor rates.
    """

    signatures: tuple[str, ...]
    timing_s: float
    packages: tuple[str, ...] = ()
    rates: bool = True
    memory_only: bool = False
