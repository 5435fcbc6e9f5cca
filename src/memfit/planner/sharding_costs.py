"""Bytes per parameter and their sharding, from data parallelism, precision and optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.types.parts import Updating
from memfit.types.plan import Use


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What data parallelism, precision and optimizer make of a parameter.

    Byte figures are per element. ``*_shards`` is the number of ranks it is divided over.
    """

    compute: str  # "bf16", "autocast", "fp32"
    stored: float
    gathered: float
    gradient: float
    reduced: float  # while it is communicated
    parameter_shards: int
    gradient_shards: int
    state_shards: int
    replicas: int
    reshard: bool
    stays: bool  # gathered parameters stay until the last micro-batch's backward
    every: bool  # gradients are reduced in every micro-step
    bucket: float  # copies of gradients kept beside them (0 or 1)
    bucket_bytes: float  # of a fixed size
    offload: str  # "", "optimizer", "all"
    kind: str  # "", "ddp", "fsdp2", "zero"
    updating: Updating


def compute_of(uses: Sequence[Use]) -> str:
    """Return the precision of forward and backward: "bf16", "autocast" or "fp32"."""
    for used in uses:
        if used.technique == "bf16-autocast":
            return "autocast"
        if used.technique == "bf16-parameters" or used.settings.get("precision") == "bf16":
            return "bf16"
    return "fp32"


def state_of(uses: Sequence[Use], ranks: int, updating: Updating, *, staged: bool) -> State:
    """Return the state of these techniques.

    ``ranks`` is the number of ranks that share a parameter, over data and context. ``staged``: part of a
    pipeline.
    """
    named = {u.technique: u.settings for u in uses}
    compute = compute_of(uses)
    halved = "bf16-parameters" in named
    stored = 2.0 if halved else 4.0
    every = any(u.settings.get("sync") == "every" for u in uses)
    if "fsdp2" in named:
        knobs = named["fsdp2"]
        copies = int(knobs["replicas"])
        gathered = 2.0 if knobs["precision"] == "bf16" or halved else 4.0
        shards, reshard = ranks // copies, knobs["reshard"] is True
        return State(
            compute=compute,
            stored=stored,
            gathered=gathered,
            gradient=stored,
            reduced=2.0 if halved and knobs["precision"] != "bf16" else 4.0,
            parameter_shards=shards,
            gradient_shards=shards,
            state_shards=shards,
            replicas=copies,
            reshard=reshard,
            stays=staged and not reshard and not every,
            every=every,
            bucket=0.0,
            bucket_bytes=0.0,
            offload="all" if knobs["offload"] else "",
            kind="fsdp2",
            updating=updating,
        )
    if "zero" in named:
        knobs = named["zero"]
        stage, half = int(knobs["stage"]), knobs["precision"] == "bf16"
        size = 2.0 if half else 4.0
        master = dataclasses.replace(updating, state_bytes=updating.state_bytes + 4.0 * half)
        return State(
            compute=compute,
            stored=size,
            gathered=size,
            gradient=size,
            reduced=size,
            parameter_shards=ranks if stage == 3 else 1,
            gradient_shards=ranks if stage >= 2 else 1,
            state_shards=ranks,
            replicas=1,
            reshard=stage == 3,
            stays=False,
            every=True,
            bucket=0.0,
            bucket_bytes=size * int(knobs["reduce_bucket_elements"]),
            offload={"none": "", "optimizer": "optimizer", "parameters": "all"}[str(knobs["offload"])],
            kind="zero",
            updating=master,
        )
    if "ddp" in named:
        knobs = named["ddp"]
        return State(
            compute=compute,
            stored=stored,
            gathered=stored,
            gradient=stored,
            reduced=stored,
            parameter_shards=1,
            gradient_shards=1,
            state_shards=1,
            replicas=ranks,
            reshard=False,
            stays=False,
            every=every and not staged,  # a pipeline syncs DDP at its last micro-batch only
            bucket=0.0 if knobs["bucket_view"] else 1.0,
            bucket_bytes=0.0,
            offload="",
            kind="ddp",
            updating=updating,
        )
    return State(
        compute=compute,
        stored=stored,
        gathered=stored,
        gradient=stored,
        reduced=stored,
        parameter_shards=1,
        gradient_shards=1,
        state_shards=1,
        replicas=1,
        reshard=False,
        stays=False,
        every=True,
        bucket=0.0,
        bucket_bytes=0.0,
        offload="",
        kind="",
        updating=updating,
    )
