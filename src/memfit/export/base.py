"""What is handed over, and what all targets say alike."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping

from memfit.lint.clipping import ClippingSetting
from memfit.lint.draft import Carried
from memfit.lint.parse import Setup
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError
from memfit.types.launch import LaunchConfig
from memfit.types.plan import Plan

Files = Mapping[str, str]
RUN = "run.json"  # of memfit's worker, the rest of a launch's files is the engine's


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UserFiles:
    """The user's own configuration. ``carried``: as a plan, with what no plan says; ``clipping``: of
    gradients, by the files; ``job_clip``: by the job. ``for_worker``: memfit's worker reads what is exported,
    for which no value may be open and the plan's own settings must all be written."""

    setup: Setup
    carried: Carried
    clipping: ClippingSetting
    job_clip: float | None = None
    for_worker: bool = False

    @property
    def clip(self) -> float | None:
        """The largest gradient norm: what the files say, else the job, else the default of the files'
        library. None: gradients are not clipped."""
        said = self.clipping.explicit or self.job_clip is None
        return (self.clipping.limit if said else self.job_clip) or None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    """The user's settings in an export. ``files``: what is written; ``sources``: of each file, whose settings
    it keeps; ``changed``: settings of the user's that the plan replaced; ``not_carried``: those that are not
    in the export, and why."""

    files: Files
    sources: Mapping[str, str]
    changed: tuple[str, ...]
    not_carried: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A rendered launch on ``nodes`` machines. ``script``: the user's program and its arguments, in the
    place of memfit's worker; ``own_files``: of the user, name -> text, put beside it; ``user_files``: the
    user's own configuration, whose settings the export keeps; ``kept``: how it kept them; ``dependence``: of
    the job's samples, where the plan splits the batch."""

    config: LaunchConfig
    nodes: int = 1
    script: tuple[str, ...] = ()
    own_files: Files = dataclasses.field(default_factory=dict)
    user_files: UserFiles | None = None
    kept: UserSettings | None = None
    dependence: SampleDependence | None = None
    max_restarts: int = 3
    gpu: str = ""  # what skypilot calls the accelerator
    image: str = ""  # of the container
    setup: str = ""  # shell command that makes the environment of a fresh machine
    claim: str = ""  # the volume claim that pods keep checkpoints on

    def __post_init__(self) -> None:
        if clash := sorted(self.own_files.keys() & self.config.files.keys()):
            raise UserError(f"memfit writes a {clash[0]} too", hint="rename yours")
        ranks = self.plan.ranks
        if self.nodes < 1 or ranks % self.nodes:
            raise UserError(
                f"{ranks} ranks on {self.nodes} nodes",
                allowed=f"nodes that divide {ranks}: {', '.join(map(str, divisors(ranks)))}",
                hint="ranks: N in the plan file says how many processes train",
            )

    @property
    def plan(self) -> Plan:
        return self.config.spec.plan

    @property
    def per_node(self) -> int:
        return self.plan.ranks // self.nodes

    @property
    def name(self) -> str:
        """Of letters, digits and dashes, as every scheduler takes it."""
        job = self.script[0] if self.script else self.config.spec.job.spec.partition(":")[0]
        return f"memfit-{re.sub(r'[^a-z0-9]+', '-', job.lower()).strip('-')[:40].strip('-') or 'job'}"

    @property
    def engine_files(self) -> Files:
        """The engine's own configuration, as the worker would read it."""
        return {name: text for name, text in self.config.files.items() if name != RUN}

    @property
    def carried(self) -> Files:
        """What every node needs beside the program that starts it."""
        engine = self.engine_files if self.script else self.config.files
        return {**engine, **self.own_files}

    @property
    def on_gpus(self) -> bool:
        """memfit's worker trains several ranks over gloo, on processors."""
        return bool(self.script)

    @property
    def cpus_per_node(self) -> int:
        return self.per_node * max(1, self.config.spec.threads)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def quoted(words: Iterable[str]) -> str:
    return " ".join(map(shlex.quote, words))
