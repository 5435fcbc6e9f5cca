"""Rules for Accelerate, the Trainer and the libraries they drive. Checked against Accelerate 1.15
(commands/launch.py, utils/dataclasses.py, utils/launch.py) and transformers 5.24 (trainer.py,
training_args.py, integrations/deepspeed.py); read 2026-11."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup
from memfit.lint.phrases import Series, phrase


def _kind(a: Options) -> str:
    """Return distributed_type in upper case, "NONE" if it is not given. Unquoted, YAML reads NO as False."""
    value = a.raw("distributed_type")
    return "NO" if value is False else str(value).upper()


# -- Accelerate --------------------------------------------------------------------------------------------

# Settings that Accelerate refuses in its own file beside a DeepSpeed file, which holds them instead.
ONLY_IN_DEEPSPEED_FILE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
)


def accelerate_deepspeed_twice(a: Options, s: Setup) -> Found:
    """Report settings of Accelerate's file that only the DeepSpeed file may hold, if distributed_type is
    DEEPSPEED and Accelerate's file names a DeepSpeed file. These are mixed_precision and, in
    deepspeed_config, settings such as zero_stage and gradient_clipping. A mixed_precision that contradicts
    the DeepSpeed file is left to accelerate_deepspeed_precision."""
    path = a.raw("deepspeed_config.deepspeed_config_file")
    if not path or _kind(a) != "DEEPSPEED":
        return
    keys = [k for k in ONLY_IN_DEEPSPEED_FILE if k in a.section("deepspeed_config")]
    precision_conflict = s.deepspeed is not None and any(accelerate_deepspeed_precision(a, s.deepspeed, s))
    keys += ["mixed_precision"] if a.raw("mixed_precision") is not None and not precision_conflict else []
    if keys:
        yield {"keys": ", ".join(keys), "path": path}


def accelerate_other_launcher(a: Options, d: Options, s: Setup) -> Found:
    """Report that nothing reads the DeepSpeed file: Accelerate's distributed_type is given and is neither
    DEEPSPEED nor NONE. Nothing is reported if there are TrainingArguments, which may name the file."""
    other_launcher = a.raw("distributed_type") is not None and _kind(a) not in ("DEEPSPEED", "NONE")
    if other_launcher and s.trainer is None:  # an argument of the Trainer may name the file
        yield {"kind": _kind(a)}


def accelerate_zero3_init(a: Options, d: Options, s: Setup) -> Found:
    """Report a zero3_init_flag that is on below ZeRO stage 3, where it has no effect. Nothing is reported if
    the stage is not given."""
    stage = d.count("zero_optimization.stage")
    if a.on("deepspeed_config.zero3_init_flag") and stage is not None and stage < 3:
        yield {"stage": stage}


def accelerate_deepspeed_precision(a: Options, d: Options, s: Setup) -> Found:
    """Report a mixed_precision of Accelerate's file that contradicts the DeepSpeed file: bf16 or fp8 if that
    file enables fp16, fp16 if it enables bf16. DeepSpeed settings that stand in Accelerate's file are not
    checked: they name no precision."""
    mixed_precision = str(a.raw("mixed_precision")).lower()
    opposite = {"bf16": "fp16", "fp8": "fp16", "fp16": "bf16"}.get(mixed_precision)
    if opposite is not None and d.file != a.file and d.on(f"{opposite}.enabled"):
        yield {"mixed": mixed_precision, "other": opposite}


_SECTIONS = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM"}


def accelerate_section_ignored(a: Options, s: Setup) -> Found:
    """Report each of the sections fsdp_config, deepspeed_config and megatron_lm_config that is not empty, if
    distributed_type is given and is not FSDP, DEEPSPEED or MEGATRON_LM respectively: the section is then
    ignored."""
    for section, kind in _SECTIONS.items():
        if a.section(section) and a.raw("distributed_type") is not None and _kind(a) != kind:
            yield {"section": section, "kind": a.raw("distributed_type"), "needed": kind}


def accelerate_processes(a: Options, s: Setup) -> Found:
    """Report a num_processes that is no multiple of num_machines. num_processes is the number on all machines
    together. Nothing is reported if one of the two is unknown."""
    processes, machines = a.count("num_processes"), a.count("num_machines") or 1
    if processes and machines > 1 and processes % machines:
        yield {"processes": processes, "machines": machines}


def _machines(a: Options) -> int | None:
    """Return num_machines, or None if it is not given, below 1 or known only when a script runs. Return None,
    too, if another launcher than Accelerate's own determines the machines: SageMaker's, that of TPUs, or
    DeepSpeed's, which reads a hostfile."""
    is_local = str(a.raw("compute_environment") or "LOCAL_MACHINE").upper() == "LOCAL_MACHINE"
    accelerate_launches = (
        _kind(a) != "DEEPSPEED" or a.raw("deepspeed_config.deepspeed_multinode_launcher") == "standard"
    )
    return (
        a.size("num_machines")
        if is_local and accelerate_launches and _kind(a) not in ("XLA", "TPU")
        else None
    )


def accelerate_rendezvous(a: Options, s: Setup) -> Found:
    """Report a set-up of several machines without main_process_ip. With use_cpu, or distributed_type NO or
    MULTI_CPU, report also a missing main_process_port: the launcher for these has no default port, whereas
    the others, based on torchrun, use 29500. Nothing is reported for other launchers than Accelerate's own
    (see `_machines`)."""
    is_plain_launcher = a.on("use_cpu") or _kind(a) in ("NO", "MULTI_CPU")
    required = ("main_process_ip", "main_process_port") if is_plain_launcher else ("main_process_ip",)
    missing = [n for n in required if a.raw(n) in (None, "")]
    if (machines := _machines(a)) is not None and machines > 1 and missing:
        yield {"machines": machines, "missing": Series(tuple(missing), "and")}


def accelerate_local_address(a: Options, s: Setup) -> Found:
    """Report, with several machines, a main_process_ip that names the local machine: localhost, or an address
    that begins with "127.". Files with an mpirun_config are skipped: in their hostfile of mpirun, this
    machine may be the only one. So are files for other launchers than Accelerate's own (see `_machines`)."""
    address, machines = str(a.raw("main_process_ip")), _machines(a)
    if a.section("mpirun_config"):
        return
    if machines is not None and machines > 1 and (address == "localhost" or address.startswith("127.")):
        yield {"address": address, "machines": machines}


def accelerate_one_process(a: Options, s: Setup) -> Found:
    """Report more processes than machines with distributed_type NO and without use_cpu. Accelerate's launcher
    then starts one process per machine, whatever num_processes is, unless the command line overrides it with
    --multi_gpu or a similar option. Only files for the local machine (compute_environment LOCAL_MACHINE, the
    default) are checked. Nothing is reported if the number of processes or of machines is unknown."""
    processes, machines = a.count("num_processes"), a.count_or("num_machines", 1)
    is_local = str(a.raw("compute_environment") or "LOCAL_MACHINE").upper() == "LOCAL_MACHINE"
    if (
        _kind(a) == "NO"
        and is_local
        and not a.on("use_cpu")
        and processes is not None
        and machines is not None
        and processes > machines
    ):
        yield {"processes": processes}


def accelerate_machine_rank(a: Options, s: Setup) -> Found:
    """Report a machine_rank outside 0 to num_machines - 1. Nothing is reported for other launchers than
    Accelerate's own (see `_machines`)."""
    rank, machines = a.count("machine_rank"), _machines(a)
    if rank is not None and machines is not None and not 0 <= rank < machines:
        yield {"rank": rank, "machines": machines, "last": machines - 1}


def _devices(a: Options) -> tuple[int, int] | None:
    """Return (the number of devices that gpu_ids names, the number of processes per machine). Return None if
    gpu_ids is not given, is "all", or is otherwise no list of numbers; if num_processes or num_machines is
    unknown or below 1, or the former is no multiple of the latter; or if the training is on CPUs."""
    ids = a.get("gpu_ids")
    device_ids = str(ids).replace(" ", "").strip(",").split(",") if ids is not None else []
    processes, machines = a.size("num_processes"), a.count_or("num_machines", 1)
    if (
        processes is None
        or machines is None
        or machines < 1
        or processes % machines
        or a.on("use_cpu")
        or not all(device_id.isdigit() for device_id in device_ids)
    ):
        return None
    return (len(device_ids), processes // machines) if device_ids else None


def accelerate_few_devices(a: Options, s: Setup) -> Found:
    """Report a gpu_ids that names fewer devices than there are processes per machine. Nothing is reported on
    CPUs, or if one of these numbers is unknown (see `_devices`)."""
    counts = _devices(a)
    if counts is not None and counts[0] < counts[1]:
        yield {"ids": a.raw("gpu_ids"), "devices": counts[0], "processes": counts[1]}


def accelerate_idle_devices(a: Options, s: Setup) -> Found:
    """Report a gpu_ids that names more devices than there are processes per machine. Nothing is reported on
    CPUs, or if one of these numbers is unknown (see `_devices`)."""
    counts = _devices(a)
    if counts is not None and counts[0] > counts[1]:
        yield {"ids": a.raw("gpu_ids"), "devices": counts[0], "processes": counts[1]}


def accelerate_cpu_fp16(a: Options, s: Setup) -> Found:
    """Report mixed_precision fp16 together with use_cpu: Accelerate then trains in float32."""
    if a.on("use_cpu") and str(a.get("mixed_precision")).lower() == "fp16":
        yield {}


# -- FSDP, in Accelerate's file or the Trainer's -------------------------------------------------------------


def _of(name: str, options: Options) -> str:
    return str(options.get(f"fsdp_config.{name}")).lower()


def _version(options: Options, s: Setup) -> int | None:
    """Return the version of FSDP that ``options`` set, 1 or 2. If it is not set or unknown, return 1, the
    default, for Accelerate's file, and None for the Trainer's arguments, whose default depends on the release
    of transformers: newer ones use 2."""
    version = options.count("fsdp_config.version")
    return version if version is not None else 1 if options is s.accelerate else None


_ONLY_FSDP1 = (
    "use_orig_params",
    "sync_module_states",
    "forward_prefetch",
    "backward_prefetch",
    "sharding_strategy",
)
_HARMLESS = ("none", "false", "no_prefetch")  # values that ask for nothing


def fsdp2_old_options(o: Options, s: Setup) -> Found:
    """Report, if fsdp_version is 2, options that only FSDP1 has: use_orig_params, sync_module_states,
    forward_prefetch, backward_prefetch and sharding_strategy. An option that is null, false or no_prefetch
    asks for nothing and is not reported."""
    keys = [k for k in _ONLY_FSDP1 if _of(k, o) not in _HARMLESS]
    if _version(o, s) == 2 and keys:
        yield {"keys": ", ".join(f"fsdp_{k}" for k in keys)}


def fsdp2_reshard(o: Options, s: Setup) -> Found:
    """Report, with fsdp_version 2, an fsdp_reshard_after_forward that is given but is no boolean, such as
    FSDP1's FULL_SHARD. Booleans are true, yes, 1, false, no and 0."""
    value = _of("reshard_after_forward", o)
    if _version(o, s) == 2 and value not in ("none", "true", "false", "1", "0", "yes", "no"):
        yield {"value": o.raw("fsdp_config.reshard_after_forward")}


def fsdp_efficient_loading(o: Options, s: Setup) -> Found:
    """Report fsdp_cpu_ram_efficient_loading that is on with fsdp_sync_module_states false: all ranks but 0
    would train random weights."""
    if o.on("fsdp_config.cpu_ram_efficient_loading") and _of("sync_module_states", o) == "false":
        yield {}


def fsdp_wrapping(o: Options, s: Setup) -> Found:
    """Report options of FSDP that the given auto_wrap_policy does not read. transformer_layer_cls_to_wrap is
    read only by TRANSFORMER_BASED_WRAP, and min_num_params (above 0) only by SIZE_BASED_WRAP. Nothing is
    reported unless the policy is one of these two or NO_WRAP."""
    policy = _of("auto_wrap_policy", o)
    by_class, by_size = policy == "transformer_based_wrap", policy == "size_based_wrap"
    if not (by_class or by_size or policy == "no_wrap"):
        return
    if not by_class and _of("transformer_layer_cls_to_wrap", o) not in ("none", ""):
        yield {"key": "fsdp_transformer_layer_cls_to_wrap", "policy": policy.upper()}
    if not by_size and (o.number("fsdp_config.min_num_params") or 0) > 0:
        yield {"key": "fsdp_min_num_params", "policy": policy.upper()}


_PREFETCH = ("backward_pre", "backward_post", "no_prefetch", "1", "2", "none")


def fsdp_prefetch(o: Options, s: Setup) -> Found:
    """Report an fsdp_backward_prefetch that is given but is not BACKWARD_PRE, BACKWARD_POST, NO_PREFETCH, 1
    or 2, in any case."""
    if _of("backward_prefetch", o) not in _PREFETCH:
        yield {"value": o.raw("fsdp_config.backward_prefetch")}


# -- the Trainer and the libraries it drives ---------------------------------------------------------------


def _differs(d: Options, t: Options, trainer_key: str, deepspeed_key: str) -> Found:
    """Yield a finding if the setting ``trainer_key`` of the TrainingArguments ``t`` and the setting
    ``deepspeed_key`` of the DeepSpeed file ``d`` are both given as numbers and differ."""
    trainer_value, deepspeed_value = t.number(trainer_key), d.number(deepspeed_key)
    if trainer_value is not None and deepspeed_value is not None and trainer_value != deepspeed_value:
        yield {
            "ours": trainer_key,
            "mine": t.raw(trainer_key),
            "theirs": deepspeed_key,
            "other": d.raw(deepspeed_key),
        }


def trainer_deepspeed_batch(d: Options, t: Options, s: Setup) -> Found:
    """Report a micro-batch (samples per device) that the DeepSpeed file and the TrainingArguments both set,
    but differently."""
    yield from _differs(d, t, "per_device_train_batch_size", "train_micro_batch_size_per_gpu")


def trainer_deepspeed_accumulation(d: Options, t: Options, s: Setup) -> Found:
    """Report gradient accumulation steps that the DeepSpeed file and the TrainingArguments both set, but
    differently."""
    yield from _differs(d, t, "gradient_accumulation_steps", "gradient_accumulation_steps")


def trainer_deepspeed_clipping(d: Options, t: Options, s: Setup) -> Found:
    """Report a gradient norm for clipping that the DeepSpeed file and the TrainingArguments both set, but
    differently."""
    yield from _differs(d, t, "max_grad_norm", "gradient_clipping")


def trainer_deepspeed_hyperparameters(d: Options, t: Options, s: Setup) -> Found:
    """Report a learning rate (of the optimizer or at the end of the warm-up), weight decay, epsilon of Adam
    or number of warm-up steps that the DeepSpeed file and the TrainingArguments both set, but differently."""
    for trainer_key, deepspeed_key in (
        ("learning_rate", "optimizer.params.lr"),
        ("weight_decay", "optimizer.params.weight_decay"),
        ("adam_epsilon", "optimizer.params.eps"),
        ("learning_rate", "scheduler.params.warmup_max_lr"),
        ("warmup_steps", "scheduler.params.warmup_num_steps"),
    ):
        yield from _differs(d, t, trainer_key, deepspeed_key)


def trainer_deepspeed_precision(d: Options, t: Options, s: Setup) -> Found:
    """Report each of fp16 and bf16 that the DeepSpeed file and the TrainingArguments both set, but one of
    them to on and the other to off. Report also one that the DeepSpeed file switches on, if the
    TrainingArguments do not set it but switch on the other of the two."""
    for name in ("fp16", "bf16"):
        trainer_value, deepspeed_value = t.get(name), d.get(f"{name}.enabled")
        if (
            trainer_value is not None
            and deepspeed_value is not None
            and t.on(name) != d.on(f"{name}.enabled")
        ):
            mine = phrase("option-value", name=name, value=trainer_value)
            yield {"name": name, "mine": mine, "other": deepspeed_value}
    for name, other_precision in (("bf16", "fp16"), ("fp16", "bf16")):
        if d.on(f"{name}.enabled") and t.raw(name) is None and t.on(other_precision):
            mine = phrase("option-missing", name=name, other=other_precision)
            yield {"name": name, "mine": mine, "other": d.get(f"{name}.enabled")}


_SAME_AS_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")


def trainer_optimizer_twice(d: Options, t: Options, s: Setup) -> Found:
    """Report an optim of the TrainingArguments that is ignored because the DeepSpeed file names an optimizer.
    The ordinary AdamWs are not reported: adamw_torch, adamw_torch_fused, adamw_hf and adamw_apex_fused."""
    optim, kind = t.get("optim"), d.get("optimizer.type")
    if kind is not None and optim is not None and optim not in _SAME_AS_ADAMW:
        yield {"optim": optim, "type": kind}


def trainer_find_batch(d: Options, t: Options, s: Setup) -> Found:
    """Report auto_find_batch_size with ZeRO stage 3, which does not support it."""
    if t.on("auto_find_batch_size") and d.count("zero_optimization.stage") == 3:
        yield {}


def trainer_fsdp_deepspeed(t: Options, s: Setup) -> Found:
    """Report TrainingArguments that set fsdp, if they also set deepspeed or the set-up has DeepSpeed settings
    from another file."""
    if t.get("fsdp") and not t.off("fsdp") and (t.raw("deepspeed") or s.deepspeed is not None):
        yield {"fsdp": t.raw("fsdp")}


def trainer_two_precisions(t: Options, s: Setup) -> Found:
    """Report TrainingArguments in which fp16 and bf16 are both on."""
    if t.on("fp16") and t.on("bf16"):
        yield {}


def trainer_accelerate_precision(t: Options, a: Options, s: Setup) -> Found:
    """Report a mixed_precision of Accelerate's file (no, bf16 or fp16) that differs from the precision that
    the TrainingArguments switch on; the latter takes precedence. Nothing is reported if the TrainingArguments
    switch on both bf16 and fp16, or neither."""
    mixed_precision = str(a.get("mixed_precision")).lower().replace("false", "no")
    enabled = [n for n in ("bf16", "fp16") if t.on(n)]
    if len(enabled) == 1 and mixed_precision in {"no", "bf16", "fp16"} and mixed_precision != enabled[0]:
        yield {"mine": enabled[0], "mixed": mixed_precision}


def _recomputes(t: Options) -> bool:
    return t.on("gradient_checkpointing") or t.on("activation_checkpointing")


def trainer_fsdp_checkpointing(t: Options, s: Setup) -> Found:
    """Report activation_checkpointing in the fsdp_config of the file that switches FSDP on, together with
    gradient_checkpointing, or its other name activation_checkpointing, of the TrainingArguments."""
    fsdp = s.fsdp
    if fsdp is not None and _recomputes(t) and fsdp.on("fsdp_config.activation_checkpointing"):
        yield {}


def trainer_fsdp_save_only_model(t: Options, s: Setup) -> Found:
    """Report save_only_model of the TrainingArguments with FSDP's state_dict_type SHARDED_STATE_DICT, which
    does not support it. With load_best_model_at_end, trainer_best_model reports it instead."""
    fsdp = s.fsdp
    saves_only_model = t.on("save_only_model") and not t.on("load_best_model_at_end")
    if fsdp is not None and saves_only_model and _of("state_dict_type", fsdp) == "sharded_state_dict":
        yield {}


def trainer_best_model(t: Options, s: Setup) -> Found:
    """Report load_best_model_at_end with save_only_model under DeepSpeed or FSDP: to load the best model,
    these need the full checkpoint, which save_only_model does not save."""
    wrapper = "DeepSpeed" if s.deepspeed is not None else "FSDP" if s.fsdp is not None else None
    if wrapper is not None and t.on("save_only_model") and t.on("load_best_model_at_end"):
        yield {"wrapper": wrapper}


def trainer_unused_parameters(t: Options, s: Setup) -> Found:
    """Report ddp_find_unused_parameters together with activation checkpointing, if use_reentrant is
    explicitly on in gradient_checkpointing_kwargs or activation_checkpointing_kwargs, in a set-up without
    DeepSpeed and FSDP: DDP fails with both."""
    is_ddp = s.deepspeed is None and s.fsdp is None
    reentrant = any(t.on(f"{n}_checkpointing_kwargs.use_reentrant") for n in ("gradient", "activation"))
    if is_ddp and _recomputes(t) and t.on("ddp_find_unused_parameters") and reentrant:
        yield {}


def trainer_cache(t: Options, s: Setup) -> Found:
    """Report TrainingArguments that switch on use_cache and gradient_checkpointing, or the latter's other
    name activation_checkpointing."""
    if _recomputes(t) and t.on("use_cache"):
        yield {}


def fsdp2_offload_clipping(t: Options, s: Setup) -> Found:
    """Report, if fsdp_version is 2, gradient clipping together with the offload of parameters to the host
    (offload_params or cpu_offload in fsdp_config). The Trainer clips to a norm of 1.0 unless max_grad_norm
    says otherwise; 0 switches clipping off. A max_grad_norm that is known only when a script runs is not
    reported."""
    fsdp = s.fsdp
    if fsdp is None or _version(fsdp, s) != 2:
        return
    offloads = any(fsdp.on(f"fsdp_config.{k}") for k in ("offload_params", "cpu_offload"))
    norm = t.number("max_grad_norm")
    if offloads and norm != 0 and not t.undetermined("max_grad_norm"):
        yield {"norm": phrase("default-value", value=1.0) if norm is None else norm}


_FSDP = (fsdp2_old_options, fsdp2_reshard, fsdp_efficient_loading, fsdp_wrapping, fsdp_prefetch)
CHECKS = {
    ("accelerate",): (
        accelerate_deepspeed_twice,
        accelerate_section_ignored,
        accelerate_processes,
        accelerate_rendezvous,
        accelerate_local_address,
        accelerate_one_process,
        accelerate_machine_rank,
        accelerate_few_devices,
        accelerate_idle_devices,
        accelerate_cpu_fp16,
    ),
    ("accelerate", "deepspeed"): (
        accelerate_other_launcher,
        accelerate_zero3_init,
        accelerate_deepspeed_precision,
    ),
    ("deepspeed", "trainer"): (
        trainer_deepspeed_batch,
        trainer_deepspeed_accumulation,
        trainer_deepspeed_clipping,
        trainer_deepspeed_hyperparameters,
        trainer_deepspeed_precision,
        trainer_optimizer_twice,
        trainer_find_batch,
    ),
    ("trainer",): (
        trainer_fsdp_deepspeed,
        trainer_two_precisions,
        trainer_fsdp_checkpointing,
        trainer_fsdp_save_only_model,
        trainer_best_model,
        trainer_unused_parameters,
        trainer_cache,
        fsdp2_offload_clipping,
    ),
    ("trainer", "accelerate"): (trainer_accelerate_precision,),
    ("fsdp",): _FSDP,
}
