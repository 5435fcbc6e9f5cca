"""Rules for DeepSpeed's file. Checked against DeepSpeed 0.19.8 (runtime/config.py, runtime/engine.py,
runtime/zero/config.py, runtime/precision_config.py; read 2026-11)."""

from __future__ import annotations

from memfit.files.read import leaves
from memfit.lint.parse import Found, Options, Setup

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_LOSS_SCALE = ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale")
_ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
# Optimizers that ZeRO supports (runtime/zero/utils.py), and the 1-bit ones, which deepspeed_one_bit reports.
_TESTED = ("adam", "adamw", "fusedadam", "cpuadam", "adagrad", "lion", "fusedlion", "muon", *_ONE_BIT)


def _stage(d: Options) -> int | None:
    """Return the ZeRO stage: 0 if none is given, 1 if zero_optimization is true instead of a section, None if
    the stage is unknown, such as "auto"."""
    if d.raw("zero_optimization") is True:
        return 1
    return d.count("zero_optimization.stage") if "stage" in d.section("zero_optimization") else 0


def _device(d: Options, name: str) -> str:
    return str(d.get(f"zero_optimization.{name}.device") or "none").lower()


def _shares_samples(d: Options, s: Setup) -> bool:
    """Return whether several processes may work on the same samples, so that the batch is not divided among
    all processes. This is so if DeepSpeed's file configures tensor or sequence parallelism (tensor_parallel,
    sequence_parallel_size, the compiler pass autosp), if Accelerate's has a parallelism_config, or if
    Megatron-LM's arguments are given."""
    has_mesh = s.accelerate is not None and bool(s.accelerate.section("parallelism_config"))
    splits_model = d.section("tensor_parallel") or d.raw("sequence_parallel_size")
    splits_model = splits_model or "autosp" in d.texts("compile.passes")
    return bool(splits_model) or has_mesh or s.megatron is not None


def deepspeed_batch_product(d: Options, s: Setup) -> Found:
    """Report a train_batch_size that is not micro-batch x accumulation steps x processes. If the steps or the
    number of processes are unknown, or several processes may work on the same samples (see
    `_shares_samples`), it must only be a multiple of the product of the other factors. Nothing is reported if
    the micro-batch is unknown."""
    global_batch, micro_batch, steps = (d.count(k) for k in _BATCH)
    if not global_batch or not micro_batch or micro_batch < 1:
        return
    ranks = None if _shares_samples(d, s) else s.ranks
    smallest_batch = micro_batch * (steps or 1) * (ranks or 1)
    if global_batch % smallest_batch or (steps and ranks and global_batch != smallest_batch):
        yield {"whole": global_batch, "micro": micro_batch, "steps": steps or "n", "ranks": ranks or "n"}


def deepspeed_two_precisions(d: Options, s: Setup) -> Found:
    """Report fp16 and bf16 (or its other name, bfloat16) that are both enabled."""
    if d.on("fp16.enabled") and (d.on("bf16.enabled") or d.on("bfloat16.enabled")):
        yield {}


def deepspeed_fp16_off(d: Options, s: Setup) -> Found:
    """Report loss-scale settings in the fp16 section if it has no "enabled": fp16 is then off."""
    knobs = [k for k in d.section("fp16") if k in _LOSS_SCALE]
    if knobs and d.raw("fp16.enabled") is None:
        yield {"knobs": ", ".join(knobs)}


def deepspeed_bf16_loss_scale(d: Options, s: Setup) -> Found:
    """Report loss-scale settings, such as min_loss_scale, in the bf16 section: only the fp16 section has
    them."""
    if knobs := [k for k in _LOSS_SCALE if k in d.section("bf16")]:
        yield {"knobs": ", ".join(knobs)}


def deepspeed_offload_parameters(d: Options, s: Setup) -> Found:
    """Report offload_param below ZeRO stage 3, where it has no effect. Nothing is reported if the stage is
    unknown."""
    if _device(d, "offload_param") != "none" and (stage := _stage(d)) in (0, 1, 2):
        yield {"device": _device(d, "offload_param"), "stage": stage}


def deepspeed_offload_optimizer(d: Options, s: Setup) -> Found:
    """Report offload_optimizer at ZeRO stage 0, where it has no effect. The stage is 0 if none is given.
    Nothing is reported if it is unknown."""
    if _device(d, "offload_optimizer") != "none" and _stage(d) == 0:
        yield {"device": _device(d, "offload_optimizer")}


def deepspeed_stage3_keys(d: Options, s: Setup) -> Found:
    """Report stage3_* settings below ZeRO stage 3, where they are not read, unless they are null or "auto".
    Those for saving a model (stage3_*_on_model_save) are not reported: they do no harm there. Nothing is
    reported if the stage is unknown."""
    if (stage := _stage(d)) not in {0, 1, 2}:
        return
    stage3_keys = [
        k
        for k in map(str, d.section("zero_optimization"))  # in YAML, a key may be a number
        if k.startswith("stage3_") and "on_model_save" not in k
    ]
    keys = [k for k in stage3_keys if d.get(f"zero_optimization.{k}") is not None]
    if keys:
        yield {"keys": ", ".join(keys), "stage": stage}


def deepspeed_nvme_path(d: Options, s: Setup) -> Found:
    """Report offload_param and offload_optimizer to the device nvme without an nvme_path, in one finding
    each."""
    for name in ("offload_param", "offload_optimizer"):
        if _device(d, name) == "nvme" and d.raw(f"zero_optimization.{name}.nvme_path") in (None, "", "none"):
            yield {"name": name}


def deepspeed_nvme_stage(d: Options, s: Setup) -> Found:
    """Report offload_optimizer to nvme at ZeRO stage 1 or 2. These stages treat every device as the host and
    never read the path."""
    if _device(d, "offload_optimizer") == "nvme" and (stage := _stage(d)) in {1, 2}:
        yield {"stage": stage}


def deepspeed_torch_adam(d: Options, s: Setup) -> Found:
    """Report torch_adam with the optimizer Adam or AdamW of DeepSpeed's file together with offload_optimizer
    at ZeRO stage 1 or above. An optimizer that the program itself passes to DeepSpeed is not checked."""
    adam = str(d.get("optimizer.type")).lower() in ("adam", "adamw")
    device = _device(d, "offload_optimizer")
    if adam and d.on("optimizer.params.torch_adam") and device != "none" and _stage(d):
        yield {"device": device}


def deepspeed_hpz_ranks(d: Options, s: Setup) -> Found:
    """Report, at ZeRO stage 3, a zero_hpz_partition_size that does not divide the number of ranks. A size
    above the number of ranks is valid: the group is then all ranks. Nothing is reported if the number of
    ranks is unknown."""
    size = d.size("zero_optimization.zero_hpz_partition_size") or 1
    if _stage(d) == 3 and s.ranks is not None and size < s.ranks and s.ranks % size:
        yield {"size": size, "ranks": s.ranks}


def deepspeed_least_scale(d: Options, s: Setup) -> Found:
    """Report an fp16 section that is enabled with a dynamic loss scale, if the scale's minimum,
    min_loss_scale, is above its initial value, 2**initial_scale_power. DeepSpeed's defaults are 2**16 for the
    initial value and 1 for the minimum. A static scale (loss_scale other than 0) is skipped."""
    min_scale, power = d.number("fp16.min_loss_scale"), d.count_or("fp16.initial_scale_power", 16)
    if not d.on("fp16.enabled") or d.number("fp16.loss_scale") or min_scale is None or power is None:
        return
    if 0 <= power <= 64 and min_scale > 2**power:
        yield {"least": f"{min_scale:g}", "first": 2**power, "power": power}


def deepspeed_contiguous_checkpoints(d: Options, s: Setup) -> Found:
    """Report contiguous_memory_optimization without partition_activations, which it needs. Both are settings
    of the section activation_checkpointing."""
    section = "activation_checkpointing"
    if d.on(f"{section}.contiguous_memory_optimization") and not d.on(f"{section}.partition_activations"):
        yield {}


def deepspeed_checkpointing_unused(d: Options, s: Setup) -> Found:
    """Report partition_activations, cpu_checkpointing and contiguous_memory_optimization in the section
    activation_checkpointing that are on in a set-up of the Trainer or Accelerate. Models of Hugging Face
    recompute with torch's checkpoint, which reads none of these settings."""
    if s.trainer is None and s.accelerate is None:
        return
    options = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
    keys = [k for k in options if d.on(f"activation_checkpointing.{k}")]
    if keys:
        yield {"keys": ", ".join(keys)}


# Settings whose "auto" Accelerate fills in without a Trainer (accelerator.py, _prepare_deepspeed, 1.15). The
# Trainer fills in more.
_ACCELERATE_FILLS = {
    *_BATCH,
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_optimizer.nvme_path",
}


def deepspeed_auto_unfilled(d: Options, s: Setup) -> Found:
    """Report, in a set-up with a file of Accelerate and without a Trainer, "auto" values of settings for
    which Accelerate fills in no value, such as optimizer.params.betas."""
    if s.accelerate is None or s.trainer is not None:
        return
    keys = [path for path, value in leaves(d.data) if value == "auto" and path not in _ACCELERATE_FILLS]
    if keys:
        yield {"keys": ", ".join(keys)}


def deepspeed_untested_optimizer(d: Options, s: Setup) -> Found:
    """Report an optimizer of DeepSpeed's file that is not on ZeRO's list of tested ones, at ZeRO stage 1 or
    above without zero_allow_untested_optimizer. The list has Adam, AdamW, FusedAdam, CPUAdam, Adagrad, Lion,
    FusedLion and Muon. 1-bit optimizers are left to deepspeed_one_bit."""
    kind = str(d.get("optimizer.type") or "adam")
    if kind.lower() not in _TESTED and _stage(d) and not d.on("zero_allow_untested_optimizer"):
        yield {"type": kind, "stage": _stage(d)}


def deepspeed_one_bit(d: Options, s: Setup) -> Found:
    """Report a 1-bit optimizer (OneBitAdam, ZeroOneAdam, OneBitLamb) at ZeRO stage 1 or above. At stage 0,
    and at an unknown one, deepspeed_removed reports it."""
    if str(d.get("optimizer.type")).lower() in _ONE_BIT and _stage(d):
        yield {"type": d.get("optimizer.type"), "stage": _stage(d)}


def deepspeed_offload_lamb(d: Options, s: Setup) -> Found:
    """Report the optimizer LAMB with offload_optimizer at ZeRO stage 1 or above and with
    zero_allow_untested_optimizer: DeepSpeed has no LAMB for the host. Without zero_allow_untested_optimizer,
    deepspeed_untested_optimizer reports LAMB instead."""
    device = _device(d, "offload_optimizer")
    allowed = _stage(d) and d.on("zero_allow_untested_optimizer")
    if str(d.get("optimizer.type")).lower() == "lamb" and allowed and device != "none":
        yield {"device": device}


def deepspeed_scheduler_steps(d: Options, s: Setup) -> Found:
    """Report a WarmupDecayLR or WarmupCosineLR scheduler without total_num_steps, which it needs. "auto"
    counts as given."""
    kind = str(d.get("scheduler.type"))
    if kind in {"WarmupDecayLR", "WarmupCosineLR"} and d.raw("scheduler.params.total_num_steps") is None:
        yield {"type": kind}


def deepspeed_pipeline(d: Options, s: Setup) -> Found:
    """Report more than one pipeline stage together with ZeRO stage 2 or 3. The number of pipeline stages is
    that of Megatron-DeepSpeed's arguments or, without these or with --no-pipeline-parallel, that of
    DeepSpeed's file. Nothing is reported if that number or the ZeRO stage is unknown."""
    m = s.megatron
    stages = d.count("pipeline.stages")
    if m is not None and not m.on("no_pipeline_parallel"):
        stages = m.count_or("pipeline_model_parallel_size", stages or 1)
    if stages is not None and stages > 1 and _stage(d) in {2, 3}:
        yield {"stages": stages, "stage": _stage(d)}


def deepspeed_bucket(d: Options, s: Setup) -> Found:
    """Report, at ZeRO stage 1 or 2, a reduce_bucket_size above the number of the model's parameters; the
    default is 500,000,000 elements. These stages allocate the whole bucket, and a second one if overlap_comm
    is on. Nothing is reported if the number of parameters, the stage or the size is unknown, as with "auto",
    or if contiguous_gradients is off (then no bucket is allocated)."""
    allocates_bucket = _stage(d) in {1, 2} and not d.off("zero_optimization.contiguous_gradients")
    bucket = d.count_or("zero_optimization.reduce_bucket_size", 500_000_000)
    if s.parameters is not None and bucket is not None and allocates_bucket and bucket > s.parameters:
        bytes_per_element = 2 if d.on("bf16.enabled") or d.on("fp16.enabled") else 4
        bucket_count = 2 if d.on("zero_optimization.overlap_comm") else 1
        mib = bucket * bytes_per_element * bucket_count / 2**20
        yield {"bucket": bucket, "parameters": s.parameters, "mib": f"{mib:.0f}"}


def deepspeed_no_zero(d: Options, s: Setup) -> Found:
    """Report a missing zero_optimization section in a set-up with a file of Accelerate, or with arguments of
    the Trainer that give per_device_train_batch_size: both libraries need the section. Without that argument,
    the Trainer's are ignored: scripts that only generate text have some of them, too. Nothing is reported if
    DeepSpeed's autotuning is on."""
    trainer_trains = s.trainer is not None and s.trainer.raw("per_device_train_batch_size") is not None
    is_autotuning = d.on("autotuning.enabled")
    if (
        (trainer_trains or s.accelerate is not None)
        and d.raw("zero_optimization") is None
        and not is_autotuning
    ):
        yield {}


# From _REMOVED_TOP_LEVEL_CONFIG_KEYS and _REMOVED_ZERO_CONFIG_KEYS of runtime/config.py, 0.19.8.
_REMOVED = (
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)


def deepspeed_removed(d: Options, s: Setup) -> Found:
    """Report settings that DeepSpeed has removed and refuses at any value, such as amp and elasticity. Report
    also 1-bit optimizers at ZeRO stage 0, or if the stage is unknown: DeepSpeed has removed them, too."""
    keys = [k for k in _REMOVED if d.raw(k) is not None]
    if str(d.get("optimizer.type")).lower() in _ONE_BIT and not _stage(d):
        keys.append(f"optimizer.type {d.get('optimizer.type')}")
    if keys:
        yield {"keys": ", ".join(keys)}


def deepspeed_zeropp(d: Options, s: Setup) -> Found:
    """Report, below ZeRO stage 3, the settings of ZeRO++ that are on: zero_quantized_weights,
    zero_quantized_gradients, zero_quantized_nontrainable_weights, and zero_hpz_partition_size above 1. Only
    stage 3 supports them. Nothing is reported if the stage is unknown."""
    if _stage(d) not in {0, 1, 2}:
        return
    switches = ("weights", "gradients", "nontrainable_weights")
    keys = [f"zero_quantized_{k}" for k in switches if d.on(f"zero_optimization.zero_quantized_{k}")]
    if (d.count("zero_optimization.zero_hpz_partition_size") or 1) > 1:
        keys.append("zero_hpz_partition_size")
    if keys:
        yield {"keys": ", ".join(keys), "stage": _stage(d)}


def deepspeed_gather_on_save(d: Options, t: Options, s: Setup) -> Found:
    """Report ZeRO stage 3 in a set-up with a Trainer, if neither stage3_gather_16bit_weights_on_model_save
    nor one of its older names is true or "auto": only shards of the model are then saved. Nothing is reported
    if save_strategy is "no" or known only when a script runs."""
    if _stage(d) != 3 or t.undetermined("save_strategy") or str(t.get("save_strategy")).lower() == "no":
        return
    names = ("stage3_gather_16bit", "gather_16bit", "stage3_gather_fp16")
    values = [d.raw(f"zero_optimization.{n}_weights_on_model_save") for n in names]
    if not any(v is True or str(v).lower() in ("true", "auto") for v in values):
        yield {}


_OWN = (
    deepspeed_batch_product,
    deepspeed_two_precisions,
    deepspeed_fp16_off,
    deepspeed_bf16_loss_scale,
    deepspeed_offload_parameters,
    deepspeed_offload_optimizer,
    deepspeed_stage3_keys,
    deepspeed_nvme_path,
    deepspeed_contiguous_checkpoints,
    deepspeed_checkpointing_unused,
    deepspeed_auto_unfilled,
    deepspeed_untested_optimizer,
    deepspeed_one_bit,
    deepspeed_offload_lamb,
    deepspeed_scheduler_steps,
    deepspeed_pipeline,
    deepspeed_bucket,
    deepspeed_removed,
    deepspeed_no_zero,
    deepspeed_zeropp,
    deepspeed_nvme_stage,
    deepspeed_torch_adam,
    deepspeed_hpz_ranks,
    deepspeed_least_scale,
)
CHECKS = {("deepspeed",): _OWN, ("deepspeed", "trainer"): (deepspeed_gather_on_save,)}
