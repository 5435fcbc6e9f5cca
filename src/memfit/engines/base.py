"""The description of an engine: the techniques it supports, what is installed of it on this machine, and its
configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from memfit.engines.environment import load_environment
from memfit.techniques.registry import TECHNIQUES
from memfit.types.device_kind import HOST
from memfit.types.launch import RunSpec
from memfit.types.plan import Plan

Files = Mapping[str, str]


# Techniques that memfit applies to a model, a loss or an optimizer before it passes them to an engine.
APPLIED_BY_MEMFIT = frozenset(t.name for t in TECHNIQUES.values() if t.before_engine)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A library, or memfit itself, that trains a plan.

    - ``summary``: what the engine is and offers, in one line.
    - ``distribution``: the name of its package on the package index; "" if it has no package of its own.
    - ``module``: the name by which that package is imported; "": that of the distribution.
    - ``tested``: the tested versions of that package, from (inclusive) and to (exclusive).
    - ``install``: the command that installs it; "" if it has no package of its own.
    - ``carries``: names of the techniques that the engine applies itself.
    - ``applied_by_memfit``: names of the techniques that memfit applies to the model or the step and that the
      engine does not affect. Plans with a technique in neither set are not supported.
    - ``applied_by_files``: names of the techniques that its library applies if a user's script passes it the
      exported configuration; with "clipping" among them, it clips gradients as well.
    - ``reasons(plan)``: why the engine does not support a plan whose techniques are all in ``carries`` or
      ``applied_by_memfit``, such as a setting that its library lacks; empty if it does support it.
    - ``asks_cuda(plan)``: the parts of the plan, in words, that the engine runs only on CUDA devices; empty
      if there are none.
    - ``cuda_only``: whether CUDA's are the only accelerators on which its library trains. The processor is
      always allowed.
    - ``no_scalars(plan)``: whether the engine refuses, for this plan, models with parameters of shape ().
    - ``saves``: whether memfit's worker can save and resume training on this engine. ``unsaved``: names of
      the techniques with which it cannot, although ``saves`` is True.
    - ``own_trace``: whether the engine's step runs on fake tensors. If so, predictions are traces of it.
      Otherwise they are traces of the native step for the plan ``predicted(plan)``, which needs the same
      memory as the engine's step for ``plan``.
    - ``requirements``: what pip installs in a separate environment, for an engine whose dependencies conflict
      with memfit's; empty if it runs in memfit's environment.
    - ``files(spec)``: the files that configure the engine, name -> text, besides the run's run.json. The
      worker reads them.
    - ``tried_on``: kinds of devices on which memfit has run it.
    - ``env``: environment variables that its worker gets. ``{device}`` in a value stands for the kind of
      device on which it trains.
    """

    name: str
    summary: str
    applied_by_files: frozenset[str]
    distribution: str = ""
    module: str = ""
    tested: tuple[str, str] = ("", "")
    install: str = ""
    carries: frozenset[str] = frozenset()
    applied_by_memfit: frozenset[str] = frozenset()
    reasons: Callable[[Plan], Iterable[str]] = lambda plan: ()
    asks_cuda: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
    cuda_only: bool = False
    no_scalars: Callable[[Plan], bool] = lambda plan: False
    saves: bool = False
    unsaved: frozenset[str] = frozenset()
    own_trace: bool = False
    predicted: Callable[[Plan], Plan] = lambda plan: plan
    requirements: tuple[str, ...] = ()
    files: Callable[[RunSpec], Files] = lambda spec: {}
    tried_on: frozenset[str] = frozenset({HOST})
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def variables(self, device: str) -> dict[str, str]:
        """Return ``env`` for training on devices of the kind ``device``, name -> value, with ``{device}``
        replaced by that kind."""
        return {name: value.replace("{device}", device) for name, value in self.env.items()}

    @property
    def known(self) -> frozenset[str]:
        """Names of the techniques in ``carries`` and in ``applied_by_memfit``."""
        return self.carries | self.applied_by_memfit

    def refusals(self, plan: Plan) -> tuple[str, ...]:
        """Return the reasons why the engine does not support the plan; empty if it does. If the plan has
        techniques that are neither in ``carries`` nor in ``applied_by_memfit``, return one reason for each of
        these and no others."""
        techniques = (u.technique for u in plan.uses if u.technique not in self.known)
        reasons = tuple(f"{technique} is not supported by {self.name}" for technique in techniques)
        return reasons or tuple(self.reasons(plan))

    def probe(self) -> Probe:
        """Return the installed version of the engine's package, without importing it. The probe's ``problem``
        says that the package is not installed, or that its version is not one of ``tested``.

        An engine without a package of its own needs torch, in any version. An engine with ``requirements``
        is looked up only in the separate environment that `load_environment` returns; if that is None, the
        engine counts as not installed."""
        if not self.distribution:
            return Probe(
                version=_version("torch") or "", problem="" if _version("torch") else "torch is not installed"
            )
        environment = load_environment(self.name) if self.requirements else None
        version = None
        if environment is not None or not self.requirements:
            version = _version(self.distribution, environment.packages if environment is not None else None)
        if version is None:
            problem = (
                f"its environment {environment.folder} is gone or lacks the package"
                if environment is not None
                else "not installed"
            )
            return Probe(problem=problem, fix=self.install)
        low, high = self.tested
        if not _at(low) <= _at(version) < _at(high):
            return Probe(
                version=version,
                problem=f"version {version} is untested: versions from {low} to below {high} were tested",
                fix=self.install,
            )
        return Probe(version=version)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What is installed of an engine. ``version``: that of its package, or of torch for an engine without a
    package of its own; "" if it is not installed. ``problem``: what keeps the engine from running; "" if it
    is ready to run. ``fix``: the command that would help, "" if none is needed or known."""

    version: str = ""
    problem: str = ""
    fix: str = ""


def sync_last(
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Callable[[bool], None]:
    """Return a function to be called before each micro-batch, with whether it is the last of its step. It
    lets backward reduce gradients over ranks only in the last one: a second reduction would average averages.
    ``no_sync()`` returns a context in which backward does not reduce gradients."""
    stack = contextlib.ExitStack()

    def choose(last: bool) -> None:
        stack.close()
        if not last:
            stack.enter_context(no_sync())

    return choose


def _version(distribution: str, folder: str | None = None) -> str | None:
    path = sys.path if folder is None else [folder]
    package = next(iter(importlib.metadata.distributions(name=distribution, path=path)), None)
    return package.version if package is not None else None


def _at(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version as a tuple, so that versions can be compared: (0, 19, 8) for
    "0.19.8+x"; () if it does not begin with a number."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in match.group().split(".")) if match else ()
