"""The data that every export target receives, and helpers that they share."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from memfit.export.script_steps import ScriptStep
from memfit.lint.clipping import NORMS, ClippingSetting
from memfit.lint.draft import Conversion
from memfit.lint.parse import Setup
from memfit.types.dependence import SampleDependence
from memfit.types.errors import UserError
from memfit.types.launch import LaunchConfig
from memfit.types.plan import Plan

Files = Mapping[str, str]
RUN = "run.json"  # read by memfit's worker; all other files of a launch are the engine's


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UserFiles:
    """The user's own configuration files. ``setup``: the files as read. ``carried``: the plan that they
    describe, and the settings that no plan can express. ``clipping``: how the files clip gradients.
    ``job_clip``: the largest gradient norm that the job sets, None if it does not clip or is not loaded yet.
    ``for_worker``: who reads the exported files: True for memfit's worker, False for the user's script or a
    library's own program. For the worker, every value is written ("auto" is replaced), and so are all
    settings of the plan."""

    setup: Setup
    carried: Conversion
    clipping: ClippingSetting
    job_clip: float | None = None
    for_worker: bool = False

    @property
    def unused_norms(self) -> tuple[str, ...]:
        """One sentence for each limit of the gradient norm that is set and has no effect: the Trainer's
        max_grad_norm if DeepSpeed clips to another norm or not at all, and the job's if `clip`, which the
        files decide, is another."""
        sentences, config, arguments = [], self.setup.deepspeed, self.setup.trainer
        norm, used = arguments.number(NORMS["trainer"]) if arguments is not None else None, self.clip or 0.0
        if config is not None and arguments is not None and norm is not None and norm != used:
            sentences.append(
                f"{NORMS['trainer']} {norm:g} of {Path(arguments.file).name} has no effect: DeepSpeed clips, "
                f"and {Path(config.file).name} has no {NORMS['deepspeed']}, so that its norm is {used:g}."
            )
        if self.job_clip and self.job_clip != used:
            sentences.append(
                f"The job's gradient norm of {self.job_clip:g} is not used: {used:g} is that of your files."
            )
        return tuple(sentences)

    @property
    def clip(self) -> float | None:
        """The norm to which gradients are clipped, or None if they are not clipped or the norm is unknown. It
        is the norm that the files set (0 there: None); if they set none, that of the job; if the job does
        not clip either, the default of the library whose files these are."""
        files_decide = self.clipping.explicit or self.job_clip is None
        return (self.clipping.limit if files_decide else self.job_clip) or None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    """What became of the user's settings in an export. ``files``: name -> text of the exported files.
    ``sources``: exported file -> the user's file whose settings it keeps. ``changed``: one text for each
    setting that was replaced, added or removed to fit the plan, such as "deepspeed.json: bf16.enabled: false
    -> true". ``not_carried``: one text for each option that is not in the export because its value
    is known only when the user's script runs. Options of launchers, and files for which the export has none,
    get no text."""

    files: Files
    sources: Mapping[str, str]
    changed: tuple[str, ...]
    not_carried: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What an export renders: a launch and what its start on several machines needs besides.

    ``config``: the launch. ``nodes``: number of machines. ``script``: the user's program and its arguments,
    or empty if memfit's worker trains. ``own_files``: name -> text of the files that are put beside the
    program and that no target renders: the plan, and the user's program or job with the modules that it
    imports. ``user_files``: the user's own configuration, whose settings the export keeps; None if there is
    none. ``kept``: what became of these settings; None before they are merged. ``dependence``: whether the
    job's samples depend on each other; None if the plan does not split the batch. ``script_steps``: what the
    user's own training code must do because no exported file does. Raises UserError if one of
    ``own_files`` has the name of a file of ``config``, if ``nodes`` is below 1, or if the ranks cannot be
    split evenly over the nodes.
    """

    config: LaunchConfig
    nodes: int = 1
    script: tuple[str, ...] = ()
    own_files: Files = dataclasses.field(default_factory=dict)
    user_files: UserFiles | None = None
    kept: UserSettings | None = None
    dependence: SampleDependence | None = None
    script_steps: tuple[ScriptStep, ...] = ()
    max_restarts: int = 3  # how many times the launcher restarts all ranks after a failure
    gpu: str = ""  # SkyPilot's name of the accelerator
    image: str = ""  # the container image
    setup: str = ""  # shell command that prepares the environment of a new machine
    claim: str = ""  # the volume claim on which pods store checkpoints

    def __post_init__(self) -> None:
        if clashing_names := sorted(self.own_files.keys() & self.config.files.keys()):
            raise UserError(
                f"your file {clashing_names[0]} has the name of a file that memfit writes into the export",
                hint="rename your file",
            )
        ranks = self.plan.ranks
        if self.nodes < 1 or ranks % self.nodes:
            raise UserError(
                f"the plan's {ranks} ranks cannot be divided evenly among --nodes {self.nodes}",
                allowed=f"numbers of nodes that divide {ranks}: {', '.join(map(str, divisors(ranks)))}",
                hint="to change the number of ranks, set `ranks: N` in the plan file",
            )

    @property
    def plan(self) -> Plan:
        return self.config.spec.plan

    @property
    def training_code(self) -> str:
        """What trains instead of memfit's worker: the script's name, or "your training code"."""
        return self.script[0] if self.script else "your training code"

    @property
    def per_node(self) -> int:
        return self.plan.ranks // self.nodes

    @property
    def name(self) -> str:
        """A name that every scheduler accepts: ``memfit-``, then at most 40 lowercase letters, digits and
        dashes made of the script's name or, without a script, of the name of the job or its file; "job" if
        nothing remains of that."""
        job = self.script[0] if self.script else self.config.spec.job.spec.partition(":")[0]
        return f"memfit-{re.sub(r'[^a-z0-9]+', '-', job.lower()).strip('-')[:40].strip('-') or 'job'}"

    @property
    def engine_files(self) -> Files:
        """The engine's configuration files, name -> text: all files of the launch except run.json, which
        memfit's worker reads."""
        return {name: text for name, text in self.config.files.items() if name != RUN}

    @property
    def carried(self) -> Files:
        """The files that every node needs besides torchrun.sh, name -> text: the engine's configuration,
        run.json if memfit's worker trains and not a script of the user, and ``own_files``."""
        engine = self.engine_files if self.script else self.config.files
        return {**engine, **self.own_files}

    @property
    def on_gpus(self) -> bool:
        """Whether the launch trains on GPUs: True with a script of the user, False for memfit's worker, which
        trains on CPUs."""
        return bool(self.script)

    @property
    def cpus_per_node(self) -> int:
        return self.per_node * max(1, self.config.spec.threads)


def divisors(number: int) -> list[int]:
    """Return all divisors of ``number``, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def quote(words: Iterable[str]) -> str:
    """Join ``words`` with spaces into a shell command, in which words with special characters are quoted."""
    return " ".join(map(shlex.quote, words))
