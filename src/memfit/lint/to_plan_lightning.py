"""Convert YAML of Lightning's command line to a Plan.

Checked against lightning 2.6.6 (pytorch/trainer/trainer.py, pytorch/strategies); read 2026-11.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from memfit.lint.draft import Draft
from memfit.lint.option_reasons import account_for
from memfit.lint.parse import Options, Setup
from memfit.lint.to_plan_fine_tuning import store_in_bf16
from memfit.lint.to_plan_hugging_face import from_deepspeed, from_hugging_face

_NAMES = ("ddp", "deepspeed", "fsdp", "auto", "single_device", "dp", "horovod", "xla", "tpu")
_BATCH_SIZES = ("data.batch_size", "data.init_args.batch_size", "data.train_batch_size")


def from_lightning(setup: Setup, draft: Draft) -> None:
    """Add the settings of Lightning's Trainer to ``draft``: its strategy, precision and accumulation, and the
    batch size of the data module as the micro-batch. The model and the data are classes that only the user's
    program knows. The options that are not in the plan are listed as left out, with the reasons."""
    options = setup.lightning
    assert options is not None
    draft.micro_batch = next(filter(None, map(options.size, _BATCH_SIZES)), None)
    steps = options.size("trainer.accumulate_grad_batches")
    kind, precision = strategy(options), _precision(options, draft)
    trainer: dict[str, Any] = {
        "gradient_accumulation_steps": steps or 1,
        "optim": "adamw_torch",  # the job's own optimizer
        "bf16": precision in ("bf16", "bf16-true"),
        "fp16": precision == "fp16",
    }
    translated = dataclasses.replace(setup, trainer=Options(file=options.file, data=trainer))
    micro_batch = draft.micro_batch
    if kind == "deepspeed":
        config = Options(file=options.file, data=_deepspeed(options, steps or 1, precision))
        from_deepspeed(dataclasses.replace(translated, deepspeed=config), draft)
    elif kind == "fsdp":
        config = Options(file=options.file, data={"distributed_type": "FSDP", "fsdp_config": _fsdp(options)})
        from_hugging_face(dataclasses.replace(translated, accelerate=config), draft)
    else:
        _model_parallel(options, kind, draft)
        from_hugging_face(translated, draft)
    draft.micro_batch, draft.batch = micro_batch, None
    draft.set_batch(draft.ranks, steps)
    if precision == "bf16-true" and kind not in ("deepspeed", "fsdp"):
        store_in_bf16(draft, "trainer.precision")
    if setup.ranks is None and kind in ("deepspeed", "fsdp", "ddp", "dp"):
        draft.leave(
            "trainer.devices", "the file does not say how many processes train: predicted with the machine's"
        )
    if options.get("trainer.gradient_clip_algorithm") == "value" and options.number(
        "trainer.gradient_clip_val"
    ):
        draft.leave(
            "trainer.gradient_clip_val, trainer.gradient_clip_algorithm value",
            "memfit clips to a norm only: predicted as the job clips",
        )
    account_for(options, "lightning", draft)


def strategy(options: Options) -> str:
    """Return the strategy as one word: "ddp", "fsdp", "deepspeed", "modelparallel" or another; "auto" if it
    is not given. It is given by name, such as "deepspeed_stage_2", or by class_path."""
    name = options.get("trainer.strategy.class_path") or options.get("trainer.strategy") or "auto"
    word = str(name).rpartition(".")[2].lower().removesuffix("strategy")
    return next((known for known in _NAMES if word == known or word.startswith(f"{known}_")), word)


def _init(options: Options, name: str) -> Any:
    return options.get(f"trainer.strategy.init_args.{name}")


def _precision(options: Options, draft: Draft) -> str:
    """Return "bf16", "bf16-true", "fp16" or "no" (float32) for the precision of Lightning's Trainer. For
    16-true, return "bf16-true", for float64 "no", and for any other precision "bf16"; these are listed in
    ``draft`` as left out."""
    value = str(options.get("trainer.precision") or "32").lower()
    if value in ("32", "32-true", "highest"):
        return "no"
    if value in ("16", "16-mixed"):
        return "fp16"
    if value in ("bf16", "bf16-mixed"):
        return "bf16"
    if value in ("bf16-true", "16-true"):
        if value == "16-true":
            draft.leave(
                f"trainer.precision {value}", "predicted with parameters in bf16, which take as many bytes"
            )
        return "bf16-true"
    reason = "memfit does not support this precision: predicted as bf16"
    if value in ("64", "64-true"):
        reason = "memfit's plans have no float64: predicted in the precision of the job's model"
        draft.leave(f"trainer.precision {value}", reason)
        return "no"
    draft.leave(f"trainer.precision {value}", reason)
    return "bf16"


def _deepspeed(options: Options, steps: int, precision: str) -> dict[str, Any]:
    """Return the configuration that Lightning's DeepSpeedStrategy builds: that of its argument config or,
    without it, that of its other arguments and of its name, such as deepspeed_stage_3_offload; each with
    ``steps`` accumulation steps and, unless it is "no", the ``precision``. A config that is the name of a
    file is not read: the result is then as without it."""
    name = str(options.get("trainer.strategy"))
    own_stage, stage = _init(options, "stage"), re.search(r"stage_(\d)", name)
    zero: dict[str, Any] = {
        "stage": own_stage if own_stage is not None else int(stage[1]) if stage else 2,
        "reduce_bucket_size": _init(options, "reduce_bucket_size") or 200_000_000,
        "overlap_comm": _init(options, "overlap_comm") is not False,
    }
    if _init(options, "offload_optimizer") or "offload" in name:
        zero["offload_optimizer"] = {"device": "cpu"}
    if _init(options, "offload_parameters") or "stage_3_offload" in name:
        zero["offload_param"] = {"device": "nvme" if name.endswith("nvme") else "cpu"}
    own = _init(options, "config")
    config = dict(own) if isinstance(own, dict) else {"zero_optimization": zero}
    if precision in ("bf16", "bf16-true"):
        config["bf16"] = {"enabled": True}
    elif precision == "fp16":
        config["fp16"] = {"enabled": True}
    return {**config, "gradient_accumulation_steps": steps}


def _fsdp(options: Options) -> dict[str, Any]:
    recomputes = _init(options, "activation_checkpointing_policy") or _init(
        options, "activation_checkpointing"
    )
    return {
        "version": 1,
        "sharding_strategy": _init(options, "sharding_strategy") or "FULL_SHARD",
        "offload_params": bool(_init(options, "cpu_offload"))
        or "cpu_offload" in str(options.get("trainer.strategy")),
        "activation_checkpointing": bool(recomputes),
    }


def _model_parallel(options: Options, kind: str, draft: Draft) -> None:
    """List strategies as left out that are neither of one process nor DDP."""
    if kind == "modelparallel":
        draft.leave(
            "trainer.strategy.class_path ModelParallelStrategy",
            "your program divides the model in configure_model, which memfit does not read: predicted as DDP",
        )
    elif kind not in ("ddp", "auto", "single_device"):
        draft.leave(f"trainer.strategy {kind}", "memfit does not support this strategy: predicted as DDP")
