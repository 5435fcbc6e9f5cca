"""Convert files of DeepSpeed, Accelerate and the Trainer, alone or one driven by another, to a Plan."""

from __future__ import annotations

import dataclasses

from memfit.lint.draft import Draft
from memfit.lint.parse import Options, Setup
from memfit.types.plan import KnobValue

# -- DeepSpeed, alone or below Accelerate and the Trainer --------------------------------------------

_ZERO_READ = {
    "stage",
    "reduce_bucket_size",
    "overlap_comm",
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "prefetch_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "param_persistence_threshold",
    "stage3_max_live_parameters",
    "max_live_parameters",
    "memory_efficient_linear",
}
# Settings of checkpoints and of logging, and settings that do not change the memory of the device.
_ZERO_WITHOUT_BYTES = {
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "elastic_checkpoint",
    "load_from_fp32_weights",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "log_trace_cache_warnings",
    "allgather_partitions",
    "reduce_scatter",
    "contiguous_gradients",
    "sub_group_size",
    "stage3_max_reuse_distance",
    "override_module_apply",
    "use_multi_rank_bucket_allreduce",
    "allgather_bucket_size",
}
_SECTIONS = {
    "activation_checkpointing": "it affects only models that call deepspeed.checkpointing",
    "amp": "memfit does not support apex's mixed precision",
    "compression_training": "memfit does not support compression",
    "sparse_attention": "memfit does not support sparse attention",
    "tensor_parallel": "memfit does not support DeepSpeed's automatic tensor parallelism",
    "torch_autocast": "with ZeRO, memfit's only mixed precision is bf16 parameters",
    "compile": "memfit does not support DeepCompile",
    "expert_parallel": "memfit does not support DeepSpeed's expert parallelism",
    "elasticity": "a plan has a fixed number of ranks",
}


def from_deepspeed(setup: Setup, draft: Draft) -> None:
    """Add to ``draft`` the settings of ``setup.deepspeed``, with the values that the Trainer or Accelerate
    fills in for "auto". Add the recomputation that the Trainer's arguments or the settings of FSDP ask for.
    If DeepSpeed's file names no optimizer, add the Trainer's, if there is a Trainer. Settings that no plan
    can express are listed in the draft as left out."""
    config = setup.deepspeed
    assert config is not None
    _batches(setup, config, draft)
    precision = _precision(setup, config, draft)
    accumulated = str(config.raw("data_types.grad_accum_dtype") or precision)
    if ("32" in accumulated) != (precision == "fp32"):
        draft.leave(
            f"data_types.grad_accum_dtype {accumulated}",
            "gradients are predicted in the precision of the parameters",
        )
    stage = 1 if config.raw("zero_optimization") is True else config.count("zero_optimization.stage") or 0
    zero = {k: config.number(f"zero_optimization.{k}") for k in config.section("zero_optimization")}
    if stage or (draft.ranks > 1 and precision == "fp32"):
        draft.take("zero", f"ZeRO stage {stage}", **_zero_knobs(config, stage, precision, zero, draft))
    else:
        _without_stage(precision, draft)
    _deepspeed_optimizer(setup, config, draft)
    _checkpointing(setup, draft)
    for name in config.section("zero_optimization"):
        if name not in _ZERO_READ | _ZERO_WITHOUT_BYTES and config.raw(f"zero_optimization.{name}") not in (
            False,
            None,
        ):
            draft.leave(f"zero_optimization.{name}", "memfit's ZeRO has no such setting")
    for name, reason in _SECTIONS.items():
        section = config.section(name)
        if section and section.get("enabled", True) is not False:
            draft.leave(name, reason)


def _without_stage(precision: str, draft: Draft) -> None:
    if draft.ranks > 1:
        draft.take("ddp", "ZeRO stage 0")
    if precision == "bf16":
        draft.take("bf16-parameters", "bf16", rounding="master")


def _zero_knobs(
    config: Options, stage: int, precision: str, zero: dict[str, float | None], draft: Draft
) -> dict[str, KnobValue]:
    knobs: dict[str, KnobValue] = {"stage": stage, "precision": precision}
    for knob, names in (
        ("reduce_bucket_elements", ("reduce_bucket_size",)),
        ("persist_elements", ("stage3_param_persistence_threshold", "param_persistence_threshold")),
        ("live_elements", ("stage3_max_live_parameters", "max_live_parameters")),
        ("prefetch_elements", ("stage3_prefetch_bucket_size", "prefetch_bucket_size")),
    ):
        for name in names:
            if zero.get(name) is not None:
                knobs[knob] = max(1, int(zero[name] or 0))
            elif config.raw(f"zero_optimization.{name}") == "auto":
                draft.leave(
                    f"zero_optimization.{name} auto",
                    "it is computed from the model's hidden_size; predicted with DeepSpeed's default",
                )
    if stage < 3:
        knobs["overlap"] = config.on("zero_optimization.overlap_comm")
    elif config.raw("zero_optimization.memory_efficient_linear") is False:
        knobs["memory_efficient_linear"] = False
    return knobs | _offload(config, stage, draft)


def _offload(config: Options, stage: int, draft: Draft) -> dict[str, KnobValue]:
    devices = {
        n: str(config.get(f"zero_optimization.offload_{n}.device") or "none") for n in ("param", "optimizer")
    }
    if config.on("zero_optimization.cpu_offload"):
        devices["optimizer"] = "cpu"
    for name, device in devices.items():
        if device == "nvme" and not (name == "optimizer" and stage == 3):
            draft.leave(f"offload_{name} to nvme", "predicted as offloaded to host memory")
    ratio = config.number("zero_optimization.offload_optimizer.ratio")
    if devices["optimizer"] != "none" and ratio is not None and ratio < 1:
        draft.leave(
            f"offload_optimizer.ratio {ratio:g}",
            "predicted as offloaded whole; the rest of the optimizer's state stays on the device",
        )
    knobs: dict[str, KnobValue] = {
        "offload": "optimizer" if devices["optimizer"] != "none" else "none",
    }
    if stage == 3 and devices["param"] != "none":
        knobs["offload"] = "parameters"
    if stage == 3 and devices["optimizer"] == "nvme":
        elements = config.get("zero_optimization.sub_group_size")
        knobs["nvme"] = "optimizer"
        knobs["sub_group_elements"] = int(elements) if isinstance(elements, int | float) else 1_000_000_000
    return knobs


def _precision(setup: Setup, config: Options, draft: Draft) -> str:
    """Return the precision in which memfit predicts DeepSpeed's computation, "bf16" or "fp32". fp8 is
    predicted as bf16; so is fp16, which is also listed in ``draft`` as left out. "auto" stands for the
    setting of the Trainer's arguments or, without these, of Accelerate's file; if no file gives one, it
    counts as off, and is listed too. If the section bf16 or fp16 is missing, Accelerate adds it for the
    set-up's mixed precision, and so does this function (DeepSpeedPlugin.set_mixed_precision)."""
    mixed_precision = auto_precision = setup.mixed_precision
    if setup.trainer is not None:
        auto_precision = dataclasses.replace(setup, accelerate=None).mixed_precision
    for name, precisions in (("bf16", ("bf16", "fp8")), ("bfloat16", ("bf16", "fp8")), ("fp16", ("fp16",))):
        is_auto = config.raw(f"{name}.enabled") == "auto"
        is_added = name != "bfloat16" and name not in config.data and mixed_precision in precisions
        if config.on(f"{name}.enabled") or (is_auto and auto_precision in precisions) or is_added:
            if name == "fp16":
                draft.leave("fp16", "predicted as bf16: the same number of bytes, without the loss scale")
            return "bf16"
        if is_auto and auto_precision is None:
            draft.leave(f"{name}.enabled auto", "no file gives the value that replaces it; predicted as off")
    return "fp32"


def _batches(setup: Setup, config: Options, draft: Draft) -> None:
    args = setup.trainer
    micro_batch, steps = (
        config.size("train_micro_batch_size_per_gpu"),
        config.size("gradient_accumulation_steps"),
    )
    if args is not None:
        micro_batch = micro_batch or args.size("per_device_train_batch_size")
        steps = steps or args.size("gradient_accumulation_steps")
    global_batch = config.size("train_batch_size")
    if global_batch is not None and micro_batch is not None and steps is None:
        steps = max(1, global_batch // (micro_batch * draft.ranks))
    is_unknown = steps is None and args is not None and args.undetermined("gradient_accumulation_steps")
    if global_batch is not None and micro_batch is None and not is_unknown:
        micro_batch = max(1, global_batch // ((steps or 1) * draft.ranks))
    draft.micro_batch = micro_batch
    draft.accumulate(steps)
    if not is_unknown:
        draft.set_batch(draft.ranks, steps)


_DEEPSPEED_ADAM = ("adam", "adamw", "fusedadam")
_TRAINER_OPTIMIZERS = {
    "adamw_torch_fused": "adamw-fused",
    "adamw_apex_fused": "adamw-fused",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "adamw_bnb_8bit": "adamw-8bit",
    "adamw_8bit": "adamw-8bit",
    "adamw_torch_8bit": "adamw-8bit",
    "paged_adamw_8bit": "adamw-paged",
    "adamw_torch_4bit": "adamw-4bit",
}


def _deepspeed_optimizer(setup: Setup, config: Options, draft: Draft) -> None:
    name = config.get("optimizer.type")
    if name is None:
        _trainer_optimizer(setup, draft)
    elif str(name).lower() in _DEEPSPEED_ADAM:
        is_on_host = config.raw("zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
        if not is_on_host and not config.on("optimizer.params.torch_adam"):
            draft.take("adamw-fused", f"optimizer {name}")
    elif str(name).lower() == "sgd":
        draft.take("sgd", f"optimizer {name}")
    else:
        draft.leave(f"optimizer {name}", "predicted with the job's own optimizer")


def _trainer_optimizer(setup: Setup, draft: Draft) -> None:
    if setup.trainer is None or setup.trainer.undetermined("optim"):
        return
    name = str(setup.trainer.get("optim") or "adamw_torch_fused")
    if name in _TRAINER_OPTIMIZERS:
        draft.take(_TRAINER_OPTIMIZERS[name], f"optim {name}")
    elif name not in ("adamw_torch", "adamw_hf"):
        draft.leave(f"optim {name}", "predicted with the job's own optimizer")


# -- Accelerate and the Trainer without DeepSpeed ------------------------------------------------------


def from_hugging_face(setup: Setup, draft: Draft) -> None:
    """Add the settings of Accelerate's file and of the TrainingArguments to ``draft``, for a set-up without
    DeepSpeed; either file may be missing. Settings that no plan can express are listed in the draft as left
    out."""
    accelerate, args = setup.accelerate, setup.trainer
    kind = str(accelerate.raw("distributed_type") if accelerate is not None else "").upper()
    fsdp = _fsdp_options(setup)
    precision = setup.mixed_precision or "no"
    is_sharded = fsdp is not None and (draft.ranks > 1 or setup.ranks is None)
    if precision == "fp8" or (precision == "fp16" and is_sharded):
        draft.leave(f"mixed precision {precision}", "predicted as bf16")
        precision = "bf16"
    data_ranks = draft.ranks
    if fsdp is not None and is_sharded:
        data_ranks = _fsdp(setup, fsdp, precision, draft)
    else:
        if draft.ranks > 1:
            draft.take("ddp", kind or "data parallel", **_ddp(setup))
        if precision != "no":
            draft.take(f"{precision}-autocast", f"mixed precision {precision}")
    _trainer_optimizer(setup, draft)
    _checkpointing(setup, draft)
    if args is not None:
        if not args.undetermined("per_device_train_batch_size"):
            draft.micro_batch = args.size("per_device_train_batch_size") or 8  # the Trainer's default
        steps = args.size("gradient_accumulation_steps")
        draft.accumulate(steps)
        if not args.undetermined("gradient_accumulation_steps"):
            draft.set_batch(data_ranks, steps)
        if args.on("torch_compile"):
            draft.take("compile", "torch_compile", scope="model")
    if (
        accelerate is not None
        and accelerate.section("dynamo_config")
        and not (args and args.on("torch_compile"))
    ):
        draft.take("compile", "dynamo_config", scope="model")


def _ddp(setup: Setup) -> dict[str, KnobValue]:
    """Return the settings of the technique ddp under Accelerate or the Trainer: "bucket_view", "bucket_mib"
    and "sync" (see `_sync`). As by torch's defaults, gradients are separate from the buckets, and a bucket
    has 25 MiB, unless the Trainer's ddp_bucket_cap_mb sets another size."""
    mib = setup.trainer.size("ddp_bucket_cap_mb") if setup.trainer is not None else None
    return {"bucket_view": False, "bucket_mib": mib or 25, "sync": _sync(setup)}


def _sync(setup: Setup) -> str:
    """Return after which micro-batches of a step gradients are reduced over ranks, "last" or "every". It is
    "last" if the Trainer's gradient_accumulation_steps is above 1 and its sync_each_batch is not on,
    otherwise "every"."""
    args = setup.trainer
    steps = args.size("gradient_accumulation_steps") if args is not None else None
    sync_option = "accelerator_config.gradient_accumulation_kwargs.sync_each_batch"
    return "last" if args is not None and (steps or 1) > 1 and not args.on(sync_option) else "every"


def _fsdp_options(setup: Setup) -> Options | None:
    """Return FSDP's settings under the names of Accelerate's fsdp_config, without the prefix ``fsdp_``, or
    None if neither file switches FSDP on. If both do, they are those of Accelerate's file. If no "version" is
    set, it is 1 for Accelerate's file and 2 for the TrainingArguments."""
    accelerate, args = setup.accelerate, setup.trainer
    if accelerate is not None and str(accelerate.raw("distributed_type")).upper() == "FSDP":
        return Options(file=accelerate.file, data={"version": 1, **accelerate.section("fsdp_config")})
    if args is None or setup.fsdp is None:
        return None
    data = {"version": 2, **args.section("fsdp_config")}
    fsdp_flags = args.texts("fsdp")
    data.setdefault("reshard_after_forward", "shard_grad_op" not in fsdp_flags)
    if "no_shard" in fsdp_flags:
        data["sharding_strategy"] = "NO_SHARD"
    data.setdefault("offload_params", data.get("cpu_offload", "offload" in fsdp_flags))
    return Options(file=args.file, data=data)


def _fsdp(setup: Setup, fsdp: Options, precision: str, draft: Draft) -> int:
    """Add FSDP, and the tensor and context parallelism of Accelerate's file, to the draft. FSDP1 is predicted
    as FSDP2, or as DDP if its strategy is NO_SHARD, and listed as left out. Return the number of ranks that
    see different samples: all ranks / (tensor x context size), at least 1. If it is 1, nothing is sharded:
    only the precision is added in place of FSDP2."""
    strategy = str(fsdp.raw("sharding_strategy") or "FULL_SHARD").upper()
    strategy = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}.get(
        strategy, strategy
    )
    accelerate = setup.accelerate or Options(file="", data={})
    sizes = {n: accelerate.size(f"parallelism_config.{n}_size") or 1 for n in ("tp", "cp", "dp_replicate")}
    for name, technique in (("tp", "tensor-parallel"), ("cp", "context-parallel")):
        if sizes[name] > 1:
            draft.take(technique, f"{name}_size {sizes[name]}", degree=sizes[name])
    data_ranks = max(1, draft.ranks // (sizes["tp"] * sizes["cp"]))
    if fsdp.count("version") != 2:
        draft.leave("fsdp_version 1", "memfit does not support its flat parameters: predicted as FSDP2")
        if strategy == "NO_SHARD":
            draft.take("ddp", "NO_SHARD", **_ddp(setup))
            if precision == "bf16":
                draft.take("bf16-autocast", "mixed precision bf16")
            return data_ranks
    if str(fsdp.raw("auto_wrap_policy")).upper() == "NO_WRAP":
        draft.leave(
            "auto_wrap_policy NO_WRAP",
            "predicted with one unit per block; without wrapping, all parameters are gathered at once",
        )
    reshard = fsdp.raw("reshard_after_forward")
    keeps_parameters = strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") or str(reshard).lower() == "false"
    replicas = (
        (accelerate.size("num_machines") or 1) if strategy.startswith("HYBRID") else sizes["dp_replicate"]
    )
    if data_ranks > 1:
        draft.take(
            "fsdp2",
            "FSDP",
            reshard=not keeps_parameters,
            replicas=replicas,
            offload=fsdp.on("offload_params"),
            precision="bf16" if precision == "bf16" else "as-is",
            sync=_sync(setup),
        )
    elif precision == "bf16":
        draft.take("bf16-autocast", "mixed precision bf16")
    return data_ranks


def _checkpointing(setup: Setup, draft: Draft) -> None:
    args, fsdp = setup.trainer, _fsdp_options(setup)
    trainer_recomputes = args is not None and (
        args.on("gradient_checkpointing") or args.on("activation_checkpointing")
    )
    if trainer_recomputes or (fsdp is not None and fsdp.on("activation_checkpointing")):
        draft.take("activation-checkpointing", "checkpointing of every block", every=1)
