"""What every engine says about itself as data: what it carries, what it lacks here, and its configuration."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Callable, Mapping

from memfit.engines.environment import recorded
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

Files = Mapping[str, str]


# What memfit applies to a model, a loss or an optimizer before an engine takes them.
BESIDE = frozenset(
    {
        "activation-checkpointing", "selective-checkpointing", "activation-offload", "chunked-cross-entropy",
        "adamw-8bit", "adamw-fused", "adamw-single", "adafactor", "sgd", "lora",
    }
)  # fmt: skip


def no_files(spec: RunSpec) -> Files:
    """The engine is configured in Python alone."""
    return {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A way to train. ``carries``: techniques that the engine applies itself, ``beside``: those that memfit
    applies to the model or the step and that the engine leaves alone; anything else it cannot do.
    ``reasons(plan)``: why it cannot carry a plan of such techniques after all; ``asks_cuda(plan)``: which
    parts of it run on NVIDIA GPUs alone; ``no_scalars(plan)``: whether it takes no parameters without
    dimensions. ``files(spec)``: its own configuration, name -> text, beside run.json; the worker reads these
    very files. ``tested``: versions from (included) to (excluded) with which
    it was tried. ``own_trace``: its step runs on fake tensors, so predictions for it are traces of that step;
    else ``predicted(plan)`` is the plan whose native step has its memory. ``requirements``: what pip installs
    in an environment of its own, where it clashes with memfit's.
    """

    name: str
    summary: str
    distribution: str = ""  # on the package index; "": it comes with torch
    tested: tuple[str, str] = ("", "")
    install: str = ""
    carries: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    reasons: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
    asks_cuda: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
    no_scalars: Callable[[Plan], bool] = lambda plan: False
    own_trace: bool = False
    predicted: Callable[[Plan], Plan] = lambda plan: plan
    requirements: tuple[str, ...] = ()
    files: Callable[[RunSpec], Files] = no_files
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        return self.carries | self.beside

    def supports(self, plan: Plan) -> tuple[str, ...]:
        """Why it cannot carry the plan; empty: it can."""
        gaps = (u.technique for u in plan.uses if u.technique not in self.known)
        unknown = tuple(f"{technique} is not in {self.name}" for technique in gaps)
        return unknown or self.reasons(plan)

    def probe(self) -> Probe:
        """What is installed here, without importing it."""
        if not self.distribution:
            return Probe(version=_version("torch") or "", problem="" if _version("torch") else "no torch")
        home = recorded(self.name) if self.requirements else None
        version = None
        if home is not None or not self.requirements:
            version = _version(self.distribution, home.packages if home is not None else None)
        if version is None:
            gone = f"its environment {home.folder} is gone" if home is not None else "not installed"
            return Probe(problem=gone, fix=self.install)
        low, high = self.tested
        if not _at(low) <= _at(version) < _at(high):
            return Probe(
                version=version, problem=f"{version} was never tried: {low} to below {high} were",
                fix=self.install,
            )  # fmt: skip
        return Probe(version=version)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """``problem`` "": ready to run. ``fix``: the one command that would help."""

    version: str = ""
    problem: str = ""
    fix: str = ""


def _version(distribution: str, folder: str | None = None) -> str | None:
    path = sys.path if folder is None else [folder]
    found = next(iter(importlib.metadata.distributions(name=distribution, path=path)), None)
    return found.version if found is not None else None


def _at(version: str) -> tuple[int, ...]:
    """The release of a version, comparable: "0.19.8+x" -> (0, 19, 8)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found.group().split(".")) if found else ()
