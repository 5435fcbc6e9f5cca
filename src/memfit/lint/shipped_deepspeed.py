"""DeepSpeed configurations that Axolotl and LLaMA-Factory ship, and that users' files name without having
them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from memfit.lint.tables import read_table


def shipped_configuration(name: str) -> dict[str, Any] | None:
    """Return the settings of the DeepSpeed file ``name``, a path, if Axolotl or LLaMA-Factory ships a file of
    this name, otherwise None. The precision is that of the Trainer, also in the files that fix bf16."""
    zero = read_table("shipped_deepspeed.toml").get(PurePath(name).name)
    if zero is None:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": dict(zero),
    }
