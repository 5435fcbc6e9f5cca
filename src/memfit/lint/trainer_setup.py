"""Read the objects of a running Hugging Face Trainer as the settings of a set-up.

Checked against transformers 5.24 (trainer.py, training_args.py) and Accelerate 1.15 (state.py,
utils/dataclasses.py); read 2026-11.
"""

from __future__ import annotations

from typing import Any

from memfit.lint.parse import Options, Setup
from memfit.types.errors import UserError

_FILE = "TrainingArguments"
_PARALLEL_SIZES = ("tp_size", "cp_size", "sp_size")


def setup_of_arguments(args: Any, *, ranks: int, accelerate: Options | None = None) -> Setup:
    """Return the set-up of the TrainingArguments ``args`` with DeepSpeed's configuration if they use one.
    ``accelerate``: settings of Accelerate that are not in the arguments, None for none."""
    plugin = args.deepspeed_plugin
    deepspeed = None if plugin is None else Options(file="DeepSpeed", data=plugin.deepspeed_config)
    trainer = Options(file=_FILE, data=args.to_dict())
    return Setup(trainer=trainer, deepspeed=deepspeed, accelerate=accelerate, ranks=ranks)


def setup_of_trainer(trainer: Any, ranks: int) -> Setup:
    """Return the set-up of ``trainer``, a Trainer, on ``ranks`` processes: its arguments, and what only the
    launcher said: DeepSpeed or FSDP of ``accelerate launch``. Raises UserError for what memfit cannot predict
    from these: Megatron-LM, FSDP of XLA, and tensor, context or sequence parallelism."""
    args, state = trainer.args, trainer.accelerator.state
    _check(trainer, state)
    accelerate = None
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and not args.fsdp:
        accelerate = Options(file="accelerate launch", data=_of_launcher(plugin))
    setup = setup_of_arguments(args, ranks=ranks, accelerate=accelerate)
    launched = getattr(state, "deepspeed_plugin", None)
    if setup.deepspeed is not None or launched is None:
        return setup
    deepspeed = Options(file="accelerate launch", data=launched.deepspeed_config)
    return Setup(trainer=setup.trainer, accelerate=accelerate, deepspeed=deepspeed, ranks=ranks)


def _of_launcher(plugin: Any) -> dict[str, Any]:
    strategy = getattr(plugin.sharding_strategy, "name", plugin.sharding_strategy)
    config = {
        "version": plugin.fsdp_version,
        "offload_params": bool(getattr(plugin.cpu_offload, "offload_params", plugin.cpu_offload)),
        "activation_checkpointing": bool(plugin.activation_checkpointing),
        "reshard_after_forward": plugin.reshard_after_forward,
    }
    if strategy is not None:
        config["sharding_strategy"] = str(strategy)
    return {"distributed_type": "FSDP", "fsdp_config": config}


def _check(trainer: Any, state: Any) -> None:
    args = trainer.args
    sizes = getattr(trainer.accelerator, "parallelism_config", None) or args.parallelism_config
    unsupported = [f"{n} {size}" for n in _PARALLEL_SIZES if (size := getattr(sizes, n, 1) or 1) > 1]
    if getattr(state, "megatron_lm_plugin", None) is not None:
        unsupported.append("Megatron-LM")
    if args.fsdp and isinstance(args.fsdp_config, dict) and args.fsdp_config.get("xla"):
        unsupported.append("fsdp_config['xla']")
    if (getattr(trainer.model, "tp_size", None) or 1) > 1:
        unsupported.append("a model that tp_plan has divided")
    if unsupported:
        raise UserError(
            f"memfit.from_trainer cannot predict this Trainer, which uses {', '.join(unsupported)}",
            allowed="one process, DDP, FSDP or DeepSpeed, without these",
            hint="to predict a plan without a Trainer: memfit.estimate(model, batch, plan=...)",
        )
