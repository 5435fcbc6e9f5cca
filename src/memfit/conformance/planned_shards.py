"""What a plan says that one rank holds of a model, and which technique averages gradients over ranks."""

from __future__ import annotations

from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")


def averaging_technique(plan: Plan) -> str:
    """Return the name of the plan's first technique that averages gradients over ranks, for findings;
    "replicas" if it has none."""
    return next((u.technique for u in plan.uses if u.technique in _AVERAGING), "replicas")


def shard_degree(plan: Plan, what: str) -> tuple[int, str]:
    """Return (number of ranks over which the plan shards ``what``, 1 if it does not; a name of this feature
    for findings). ``what`` is "parameters", "gradients" or "optimizer state". The name says which technique
    shards, for example "fsdp2: gradients"; without fsdp2, zero and sharded-ddp it is ``what`` itself."""
    mesh = layout(plan)
    if "fsdp2" in plan:
        return mesh.shard * mesh.context, f"fsdp2: {what}"
    if (use := plan.get("zero")) is not None:
        stage = int(use.settings["stage"])
        required_stage = {"optimizer state": 1, "gradients": 2, "parameters": 3}[what]
        return (mesh.shard if stage >= required_stage else 1), f"zero stage {stage}: {what}"
    if "sharded-ddp" in plan and what != "parameters":
        return mesh.shard, f"sharded-ddp: {what}"
    return 1, what


def persists(plan: Plan, elements: int) -> bool:
    """Return whether the plan has zero and ``elements`` is at most its setting ``persist_elements``: ZeRO 3
    keeps a parameter of so few elements whole on every rank. The stage in the plan is ignored."""
    use = plan.get("zero")
    return use is not None and elements <= int(use.settings["persist_elements"])
