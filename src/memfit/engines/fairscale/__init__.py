"""FairScale: OSS, ShardedDataParallel and checkpoint_wrapper, configured in Python only.

FairScale 0.4.13 dates from December 2022 and is unmaintained. With torch 2, `zero_grad` of its optimizer
removes bucketed gradients from their buckets (torch's default became `set_to_none=True`), and their sums are
then silently lost. Gradients are therefore set to zero through the wrapper.
"""

from __future__ import annotations

import json

from memfit.engines.base import APPLIED_BY_MEMFIT, Engine
from memfit.types.plan import Plan

CONFIG = "fairscale.json"


def _reasons(plan: Plan) -> tuple[str, ...]:
    if "fsdp2" in plan:
        return (
            "fsdp2: FairScale's FullyShardedDataParallel requires CUDA streams and is the FSDP of torch 1",
        )
    if plan.ranks > 1 and "sharded-ddp" not in plan:
        return ("several ranks: FairScale requires sharded-ddp",)
    return ()


def config(plan: Plan) -> dict[str, object]:
    """Return the content of fairscale.json: the arguments of FairScale's ShardedDataParallel, name -> value,
    besides the model, the optimizer and the process group. Without sharded-ddp in the plan, the size of its
    reduce buffer is 0, so that it has none."""
    use = plan.get("sharded-ddp")
    buffer_elements = int(use.settings["reduce_buffer_elements"]) if use is not None else 0
    return {
        "reduce_buffer_size": buffer_elements,
        "broadcast_buffers": True,
        "sync_models_at_startup": True,
        "auto_refresh_trainable": True,
        "reduce_fp16": False,
    }


ENGINE = Engine(
    name="fairscale",
    saves=True,
    unsaved=frozenset({"fsdp2"}),  # it flattens parameters
    summary="FairScale: optimizer state and gradients of whole parameters on one rank each",
    distribution="fairscale",
    tested=("0.4.13", "0.4.14"),
    install="pip install 'memfit[fairscale]'",
    carries=frozenset({"sharded-ddp", "gradient-accumulation", "fsdp2", "activation-checkpointing"}),
    applied_by_memfit=(APPLIED_BY_MEMFIT | {"bf16-autocast"}) - {"activation-checkpointing"},
    applied_by_files=frozenset(),
    reasons=_reasons,
    files=lambda spec: {CONFIG: json.dumps(config(spec.plan), indent=2) + "\n"},
)
