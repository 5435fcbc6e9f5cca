"""All engines, by name."""

from __future__ import annotations

from collections.abc import Mapping

from memfit.engines import accelerate, colossalai, deepspeed, fairscale, megatron, native, replay
from memfit.engines.base import Engine
from memfit.techniques.rank_mesh import layout
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError, look_up
from memfit.types.launch import LaunchConfig, RunSpec
from memfit.types.plan import Plan

ENGINES: Mapping[str, Engine] = {
    e.name: e
    for e in (
        native.ENGINE,
        accelerate.ENGINE,
        deepspeed.ENGINE,
        fairscale.ENGINE,
        megatron.ENGINE,
        colossalai.ENGINE,
        replay.ENGINE,
    )
}


def engine(name: str) -> Engine:
    """Return the engine called ``name``. If there is none, raises UserError, whose message lists all names
    and suggests the most similar one, if one is similar."""
    return look_up("engine", name, ENGINES)


def supporting_engine(name: str, plan: Plan) -> Engine:
    """Return the engine called ``name`` if it supports the plan; whether it is installed does not matter.
    Raises UserError if there is no such engine, or if the plan's degrees do not fit its number of ranks.
    Raises UserError, too, if the engine does not support the plan: the message gives the reasons and lists
    the engines that do, except replay, or "none"."""
    candidate = engine(name)
    layout(plan)  # raises first for an invalid number of ranks, which no engine would support
    if reasons := candidate.refusals(plan):
        engines = (e for e in ENGINES.values() if e is not replay.ENGINE)
        supporting_engines = ", ".join(e.name for e in engines if not e.refusals(plan)) or "none"
        raise UserError(
            f"engine {name} does not support this plan: {'; '.join(reasons)}",
            allowed=f"engines that support it: {supporting_engines}",
        )
    return candidate


def trains_on(candidate: Engine, device: str) -> bool:
    """Return whether the engine's library can train on devices of this kind, as far as that does not depend
    on what the library answers when it starts."""
    kind = device_kind(device)
    return kind.is_host or kind.runs_cuda or not candidate.cuda_only


def ready_engine(name: str, plan: Plan, device: str = HOST) -> Engine:
    """Return the engine called ``name`` if it supports the plan, can train it on devices of the kind
    ``device``, and is installed in a tested version. Otherwise raises UserError: the errors of
    `supporting_engine`; an error that names the kind of device, or the parts of the plan that require CUDA;
    or one that says what is wrong with the installation and gives the command that installs a tested
    version."""
    candidate, kind = supporting_engine(name, plan), device_kind(device)
    if not trains_on(candidate, device):
        raise UserError(
            f"engine {name} cannot train on devices of the kind {device!r}: its library supports only CUDA's "
            "and the processor",
            hint="`--engine native` can, and `--on this:cpu` trains on the processor",
        )
    if not kind.runs_cuda and (cuda_only_parts := candidate.asks_cuda(plan)):
        where = "the CPU ranks of memfit's runs" if device == HOST else f"devices of the kind {device!r}"
        raise UserError(
            f"engine {name} cannot train this plan on {where}: {', '.join(cuda_only_parts)} requires CUDA",
            hint="run it on a CUDA device; without one, `memfit estimate JOB` predicts the plan's memory, "
            "and `memfit export` writes the engine's configuration",
        )
    if (probe := candidate.probe()).problem:
        raise UserError(
            f"engine {name} cannot be used here: {probe.problem}",
            hint=f"install a tested version: {probe.fix}" if probe.fix else "",
        )
    return candidate


def must_train(name: str) -> None:
    """Raise UserError if ``name`` is the engine replay, which trains nothing."""
    if name == replay.ENGINE.name:
        raise UserError(
            f"the engine {name} trains nothing", allowed="another engine that `memfit list engines` lists"
        )


def render(spec: RunSpec) -> LaunchConfig:
    """Return the launch of the run ``spec`` on the engine that it names: the command of memfit's worker, its
    environment variables, run.json and the engine's own configuration files. Nothing is started or written.
    Raises UserError if there is no such engine."""
    return native.render(spec, engine(spec.engine))
