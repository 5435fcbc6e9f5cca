"""Bytes per parameter and their sharding, from data parallelism, precision and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.types.parts import UpdateCosts
from memfit.types.plan import Use


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How data parallelism, precision and optimizer keep and share a parameter, its gradient and its
    optimizer state.

    Bytes per element: ``stored``, of the parameter between uses; ``gathered``, as forward and backward read
    it; ``gradient``, as it is kept; ``reduced``, of the gradient while it is communicated.
    ``parameter_shards``, ``gradient_shards``, ``state_shards``: number of ranks over which each is divided, 1
    if it is not. ``replicas``: number of groups of ranks that each hold all shards; gradients are reduced
    over these, too. ``reshard``: whether gathered parameters are freed after forward. ``offload``: what is in
    host memory; "optimizer" is the optimizer state alone, "all" also parameters and gradients.
    ``sub_group``: if optimizer state is on local storage, the elements that pass through host memory at a
    time; else 0. ``live``: elements of gathered parameters that are kept for reuse; 0 if none are.
    """

    compute: str  # "bf16", "autocast", "fp32"
    stored: float
    gathered: float
    gradient: float
    reduced: float
    update_costs: UpdateCosts
    parameter_shards: int = 1
    gradient_shards: int = 1
    state_shards: int = 1
    replicas: int = 1
    reshard: bool = False
    stays: bool = False  # gathered parameters stay until the last micro-batch's backward
    every: bool = True  # gradients are reduced in every micro-step
    bucket: float = 0.0  # copies of gradients kept beside them (0 or 1)
    bucket_bytes: float = 0.0  # of a fixed size
    offload: str = ""  # "", "optimizer", "all"
    kind: str = ""  # "", "ddp", "fsdp2", "zero"
    sub_group: int = 0
    live: int = 0


def compute_of(uses: Sequence[Use]) -> str:
    """Return the precision of forward and backward under these techniques: "autocast", "bf16" or "fp32". The
    first technique that sets one decides: bf16-autocast sets "autocast"; bf16-parameters, or any technique
    with the setting precision "bf16", sets "bf16". If none does, it is "fp32".
    """
    for used in uses:
        if used.technique == "bf16-autocast":
            return "autocast"
        if used.technique == "bf16-parameters" or used.settings.get("precision") == "bf16":
            return "bf16"
    return "fp32"


def state_of(uses: Sequence[Use], ranks: int, update_costs: UpdateCosts, *, staged: bool) -> State:
    """Return how these techniques (data parallelism, precision, optimizer) keep and share a parameter.

    ``ranks``: number of ranks that have the same part of the model, data-parallel times context-parallel
    ranks. ``update_costs``: costs of the optimizer's step on one rank. ``staged``: whether the model is cut
    into pipeline stages.
    """
    settings_by_name = {u.technique: u.settings for u in uses}
    has_half_parameters = "bf16-parameters" in settings_by_name
    stored = 2.0 if has_half_parameters else 4.0
    whole = State(
        compute=compute_of(uses),
        stored=stored,
        gathered=stored,
        gradient=stored,
        reduced=stored,
        update_costs=update_costs,
    )
    reduces_each_micro = any(u.settings.get("sync") == "every" for u in uses)
    if "fsdp2" in settings_by_name:
        knobs = settings_by_name["fsdp2"]
        replica_count = int(knobs["replicas"])
        shards, reshard = ranks // replica_count, knobs["reshard"] is True
        return dataclasses.replace(
            whole,
            gathered=2.0 if knobs["precision"] == "bf16" or has_half_parameters else 4.0,
            reduced=2.0 if has_half_parameters and knobs["precision"] != "bf16" else 4.0,
            parameter_shards=shards,
            gradient_shards=shards,
            state_shards=shards,
            replicas=replica_count,
            reshard=reshard,
            stays=staged and not reshard and not reduces_each_micro,
            every=reduces_each_micro,
            offload="all" if knobs["offload"] else "",
            kind="fsdp2",
        )
    if "zero" in settings_by_name:
        knobs = settings_by_name["zero"]
        stage, is_half = int(knobs["stage"]), knobs["precision"] == "bf16"
        element_bytes = 2.0 if is_half else 4.0
        return dataclasses.replace(
            whole,
            stored=element_bytes,
            gathered=element_bytes,
            gradient=element_bytes,
            reduced=element_bytes,
            update_costs=dataclasses.replace(
                update_costs, state_bytes=update_costs.state_bytes + 4.0 * is_half
            ),
            parameter_shards=ranks if stage == 3 else 1,
            gradient_shards=ranks if stage >= 2 else 1,
            state_shards=ranks,
            reshard=stage == 3,
            bucket_bytes=element_bytes * int(knobs["reduce_bucket_elements"]),
            offload={"none": "", "optimizer": "optimizer", "parameters": "all"}[str(knobs["offload"])],
            kind="zero",
            live=int(knobs["live_elements"]) if stage == 3 else 0,
            sub_group=int(knobs["sub_group_elements"]) if knobs["nvme"] != "none" else 0,
        )
    if "ddp" in settings_by_name:
        return dataclasses.replace(
            whole,
            replicas=ranks,
            every=reduces_each_micro and not staged,  # a pipeline syncs DDP at its last micro-batch only
            bucket=0.0 if settings_by_name["ddp"]["bucket_view"] else 1.0,
            kind="ddp",
        )
    return whole
