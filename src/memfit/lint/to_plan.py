"""Convert a set-up to a memfit Plan, and list the settings that no plan can express.

A setting that the files do not give has the library's own default (DeepSpeed 0.19 runtime/zero/config.py and
config.py; Accelerate 1.15 utils/dataclasses.py; transformers 5.24 training_args.py; Megatron-LM at d98e8a6
training/arguments.py; torchtitan v0.2.2 config/job_config.py; OpenFold in openfold.py; read 2026-11).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memfit.lint.draft import Carried, Draft
from memfit.lint.parse import Setup
from memfit.lint.to_plan_hugging_face import from_deepspeed, from_hugging_face
from memfit.lint.to_plan_openfold import from_openfold
from memfit.lint.to_plan_scripts import from_megatron, from_torchtitan


def over(setup: Setup) -> Carried:
    """Convert ``setup`` to a plan. If several libraries are configured, only one decides how the model is
    distributed, the first of OpenFold, Megatron-LM, torchtitan, DeepSpeed, and Accelerate with the Trainer.
    An unknown number of processes counts as 1, with Megatron-LM and torchtitan as the smallest number that
    the settings allow. Files in ``setup.missing`` are listed as left out. Raises UserError for a crop, batch
    or blocks_per_ckpt of OpenFold that is not a whole number above 0."""
    engine, apply = _whose(setup)
    draft = Draft(ranks=setup.ranks or 1)
    apply(setup, draft)
    for name in setup.missing:
        draft.leave(f"the file {name}", "it does not exist")
    plan = dataclasses.replace(draft.plan, ranks=draft.ranks)
    return Carried(
        plan=plan,
        engine=engine,
        micro_batch=draft.micro_batch,
        batch=draft.batch,
        left_out=tuple(dict.fromkeys(draft.left_out)),
        size=draft.size,
        length=draft.length,
        model=draft.model,
    )


def _whose(setup: Setup) -> tuple[str, Callable[[Setup, Draft], None]]:
    if setup.openfold is not None or setup.openfold_config is not None:
        return "native" if setup.deepspeed is None else "deepspeed", from_openfold
    if setup.megatron is not None:
        return "megatron", from_megatron
    if setup.torchtitan is not None:
        return "native", from_torchtitan
    if setup.deepspeed is not None:
        return "accelerate" if setup.accelerate or setup.trainer else "deepspeed", from_deepspeed
    return "accelerate", from_hugging_face
