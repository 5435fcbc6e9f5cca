"""DeepSpeed configurations that Axolotl and LLaMA-Factory ship, and that users' files name without having
them.

Only settings that determine memory or time are here. Sources: deepspeed_configs/ of axolotl-ai-cloud/axolotl
at 067b021c8b87 (2026-07-24), examples/deepspeed/ of hiyouga/LLaMA-Factory at ff6d4d12eeb0 (2026-08-18); read
2026-11."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

_HOST = {"device": "cpu"}
_AUTO_SIZES = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
_ZERO: Final[Mapping[str, Mapping[str, Any]]] = {
    # Axolotl
    "zero1.json": {"stage": 1, "overlap_comm": True},
    "zero2.json": {"stage": 2, "overlap_comm": True, "offload_optimizer": _HOST},
    "zero3.json": {"stage": 3, "overlap_comm": True, "max_live_parameters": 0, **_AUTO_SIZES},
    "zero3_bf16.json": {"stage": 3, "overlap_comm": True, "max_live_parameters": 0, **_AUTO_SIZES},
    "zero3_bf16_cpuoffload_params.json": {
        "stage": 3,
        "overlap_comm": True,
        "max_live_parameters": 0,
        "offload_param": _HOST,
        **_AUTO_SIZES,
    },
    "zero3_bf16_cpuoffload_all.json": {
        "stage": 3,
        "overlap_comm": True,
        "max_live_parameters": 0,
        "offload_param": _HOST,
        "offload_optimizer": _HOST,
        **_AUTO_SIZES,
    },
    # LLaMA-Factory
    "ds_z0_config.json": {"stage": 0, "overlap_comm": False, "reduce_bucket_size": 500_000_000},
    "ds_z2_config.json": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 500_000_000},
    "ds_z2_offload_config.json": {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 500_000_000,
        "offload_optimizer": _HOST,
    },
    "ds_z3_config.json": {"stage": 3, "stage3_max_live_parameters": 1_000_000_000, **_AUTO_SIZES},
    "ds_z3_offload_config.json": {
        "stage": 3,
        "stage3_max_live_parameters": 1_000_000_000,
        "offload_param": _HOST,
        "offload_optimizer": _HOST,
        **_AUTO_SIZES,
    },
}


def shipped_configuration(name: str) -> dict[str, Any] | None:
    """Return the settings of the DeepSpeed file ``name``, a path, if Axolotl or LLaMA-Factory ships a file of
    this name, otherwise None. The precision is that of the Trainer, also in the files that fix bf16."""
    zero = _ZERO.get(PurePath(name).name)
    if zero is None:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": dict(zero),
    }
