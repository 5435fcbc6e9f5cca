"""Every engine, by name."""

from __future__ import annotations

from collections.abc import Mapping

from memfit.engines import accelerate, colossalai, deepspeed, fairscale, megatron, native, replay
from memfit.engines.base import Engine
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError, named
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
    """Raises UserError with the closest names when there is no such engine."""
    return named("engine", name, ENGINES)


def carrying(name: str, plan: Plan) -> Engine:
    """The engine, where it can carry the plan. Raises UserError with every reason why not, and with those
    that can."""
    found = engine(name)
    layout(plan)  # which ranks there are is nobody's gap
    if why := found.supports(plan):
        able = (e for e in ENGINES.values() if e is not replay.ENGINE)
        others = ", ".join(e.name for e in able if not e.supports(plan)) or "none"
        raise UserError(
            f"engine {name} cannot carry this plan: {'; '.join(why)}", allowed=f"engines that can: {others}"
        )
    return found


def ready(name: str, plan: Plan) -> Engine:
    """The same, installed, and able to train it here, on CPU ranks. Raises UserError with the command that
    installs it, or with what asks for CUDA."""
    found = carrying(name, plan)
    if parts := found.asks_cuda(plan):
        raise UserError(
            f"engine {name} cannot train this plan here: {', '.join(parts)} asks for CUDA",
            hint="`memfit explain` predicts it, and its configuration can be exported",
        )
    if (probe := found.probe()).problem:
        raise UserError(f"engine {name}: {probe.problem}", hint=probe.fix)
    return found


def render(spec: RunSpec) -> LaunchConfig:
    """The launch of ``spec`` on its engine: the worker, and the engine's own configuration beside it."""
    return native.render(spec, engine(spec.engine))
