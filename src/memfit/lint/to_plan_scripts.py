"""Convert Megatron-LM's arguments and torchtitan's TOML to a Plan. Both use meshes of several dimensions."""

from __future__ import annotations

from memfit.lint import models
from memfit.lint.draft import Draft, product
from memfit.lint.parse import Options, Setup
from memfit.types.plan import KnobValue


def from_megatron(setup: Setup, draft: Draft) -> None:
    """Add Megatron-LM's arguments to ``draft``. If the number of processes is unknown, assume the smallest
    possible."""
    given = setup.megatron
    assert given is not None
    tensor, pipeline, context = (
        given.size(f"{n}_parallel_size") or 1 for n in ("tensor_model", "pipeline_model", "context")
    )
    draft.length, draft.model = given.size("seq_length"), models.of_megatron(given, tensor)
    model = tensor * pipeline * context
    if setup.ranks is None:
        draft.ranks = model
        draft.leave("data-parallel ranks", "nothing says how many processes run: predicted with the fewest")
    data = max(1, draft.ranks // model)
    if context > 1:
        draft.take("context-parallel", f"context-parallel-size {context}", degree=context)
    if tensor > 1:
        draft.take(
            "tensor-parallel",
            f"tensor-model-parallel-size {tensor}",
            degree=tensor,
            sequence=given.on("sequence_parallel"),
            vocabulary="parallel-loss",
        )
    steps = _micro_batches(given, data, draft)
    if pipeline > 1:
        _megatron_pipeline(given, pipeline, steps, draft)
    else:
        draft.accumulate(steps)
    if (experts := given.size("expert_model_parallel_size") or 1) > 1:
        draft.take("expert-parallel", f"expert-model-parallel-size {experts}", degree=experts)
    _megatron_data(given, data, tensor, draft)
    _megatron_recompute(given, draft)
    for name, reason in _MEGATRON_REASONS.items():
        if given.raw(name) is not None and not given.off(name):
            draft.leave(f"--{name.replace('_', '-')}", reason)


_MEGATRON_REASONS = {
    "fp8_format": "fp8 is not in memfit: predicted as bf16",
    "fp4_format": "fp4 is not in memfit: predicted as bf16",
    "optimizer_cpu_offload": "it is not in memfit: the optimizer's state is predicted on the device",
    "cpu_offloading": "Transformer Engine's offload of activations is not in memfit",
    "use_megatron_fsdp": "Megatron's own FSDP is not in memfit",
    "decoder_first_pipeline_num_layers": "memfit deals blocks to stages evenly",
    "decoder_last_pipeline_num_layers": "memfit deals blocks to stages evenly",
    "pipeline_model_parallel_layout": "memfit deals blocks to stages evenly",
    "mtp_num_layers": "what is trained is the job's model",
}


def _micro_batches(given: Options, data: int, draft: Draft) -> int | None:
    """Return the number of micro-batches of one rank in a step."""
    micro, whole = given.size("micro_batch_size"), given.size("global_batch_size")
    steps = given.size("num_micro_batches")
    if micro and whole:
        steps = max(1, whole // (micro * data))
    draft.micro_batch, draft.batch = micro, whole
    draft.sized(data, steps)
    return steps


def _megatron_pipeline(given: Options, stages: int, steps: int | None, draft: Draft) -> None:
    virtual = given.size("num_virtual_stages_per_pipeline_rank") or 1
    layers, each = given.size("num_layers"), given.size("num_layers_per_virtual_pipeline_stage")
    if layers and each:
        virtual = max(1, layers // stages // each)
    knobs: dict[str, KnobValue] = {"micro_batches": steps} if steps else {}
    draft.take(
        "pipeline",
        f"pipeline-model-parallel-size {stages}",
        stages=stages,
        virtual=virtual,
        schedule="interleaved" if virtual > 1 else "1f1b",
        **knobs,
    )


def _megatron_data(given: Options, data: int, tensor: int, draft: Draft) -> None:
    half = given.on("bf16") or given.on("fp16")
    if given.on("fp16"):
        draft.leave("--fp16", "predicted as bf16: as many bytes, without the loss scale")
    sharded = given.on("use_distributed_optimizer")
    if data > 1 and given.on("use_torch_fsdp2"):
        draft.take("fsdp2", "--use-torch-fsdp2", precision="bf16" if half else "as-is")
        return
    alone = draft.plan.get("context-parallel") is None and draft.plan.get("pipeline") is None and tensor == 1
    if half and not given.on("grad_reduce_in_bf16"):
        draft.leave(
            "gradients in fp32", "Megatron adds them up in fp32; beside bf16 parameters memfit in bf16"
        )
    if data > 1 and sharded and alone:
        bucket = given.size("ddp_bucket_size") or max(40_000_000, 1_000_000 * data)
        draft.take(
            "zero",
            "--use-distributed-optimizer",
            stage=1,
            precision="bf16" if half else "fp32",
            reduce_bucket_elements=bucket,
            overlap=given.on("overlap_grad_reduce"),
        )
        draft.leave(
            "gradients reduced in place", f"memfit's ZeRO copies them to a bucket of {bucket} elements first"
        )
        return
    if data > 1 and sharded:
        draft.leave(
            "--use-distributed-optimizer",
            "beside other parallelism memfit shards no optimizer state alone: predicted whole on every rank",
        )
    # memfit has no DDP beside tensor parallelism, and torch's FSDP2 needs something to shard.
    if data > 1 and tensor > 1:
        draft.ranks //= data
        draft.batch = draft.batch // data if draft.batch else None
        draft.leave(
            f"{data} data-parallel replicas",
            "memfit has none beside tensor parallelism: predicted as one of them with its part of the batch",
        )
    elif data > 1:
        split = draft.plan.get("gradient-accumulation") is not None
        draft.take("ddp", "data parallel", sync="last" if split else "every")
    if half:
        draft.take("bf16-parameters", "--bf16", rounding="master")


def _megatron_recompute(given: Options, draft: Draft) -> None:
    granularity, method = given.get("recompute_granularity"), given.get("recompute_method")
    layers = given.size("recompute_num_layers") or 1
    if granularity == "selective" or given.on("recompute_activations"):
        draft.leave(
            "selective recomputation", "memfit has none of attention's core alone: predicted as kept whole"
        )
    elif granularity == "full" and method == "uniform" and layers == 1:
        draft.take("activation-checkpointing", "full recomputation", every=1)
    elif granularity == "full":
        draft.take("activation-checkpointing", "full recomputation", every=1)
        draft.leave(
            f"recompute-method {method} of {layers} layers", "predicted as one block at a time, all blocks"
        )


# -- torchtitan ----------------------------------------------------------------------------------------

_TITAN_LENGTH = 2048
_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved1f1b": "interleaved",
    "interleavedzerobubble": "zero-bubble",
    "zbvzerobubble": "zero-bubble-v",
}


def from_torchtitan(setup: Setup, draft: Draft) -> None:
    """Add torchtitan's settings to ``draft``. If the number of processes is unknown, assume the smallest
    possible."""
    given = setup.torchtitan
    assert given is not None
    draft.length, draft.model = given.size("training.seq_len") or _TITAN_LENGTH, models.of_torchtitan(given)
    degree = {
        n: given.size(f"parallelism.{n}_degree") or 1
        for n in (
            "data_parallel_replicate",
            "tensor_parallel",
            "pipeline_parallel",
            "context_parallel",
            "expert_parallel",
        )
    }
    shard = given.size("parallelism.data_parallel_shard_degree") or -1
    others = product(v for n, v in degree.items() if n != "expert_parallel")
    if setup.ranks is None:
        draft.ranks = others * max(1, shard)
        if shard == -1:
            draft.leave(
                "data_parallel_shard_degree -1", "nothing says how many processes run: predicted with 1"
            )
    shard = shard if shard > 0 else max(1, draft.ranks // others)
    tensor, pipeline = degree["tensor_parallel"], degree["pipeline_parallel"]
    if degree["context_parallel"] > 1:
        draft.take("context-parallel", "context_parallel_degree", degree=degree["context_parallel"])
    if tensor > 1:
        loss = "gathered" if given.on("parallelism.disable_loss_parallel") else "parallel-loss"
        draft.take("tensor-parallel", "tensor_parallel_degree", degree=tensor, sequence=True, vocabulary=loss)
    if degree["expert_parallel"] > 1:
        draft.take("expert-parallel", "expert_parallel_degree", degree=degree["expert_parallel"])
    _titan_batches(given, degree["data_parallel_replicate"] * shard, pipeline, draft)
    _titan_data(given, degree["data_parallel_replicate"], shard, pipeline > 1, draft)
    _titan_recompute(given, draft)
    if given.on("compile.enable") or given.on("training.compile"):
        draft.take("compile", "compile.enable", scope="blocks")
    kernel = str(given.get("optimizer.implementation") or "fused")
    if kernel in ("fused", "for-loop"):
        draft.take(
            {"fused": "adamw-fused", "for-loop": "adamw-single"}[kernel], f"optimizer.implementation {kernel}"
        )
    if given.on("optimizer.early_step_in_backward"):
        draft.take("optimizer-in-backward", "optimizer.early_step_in_backward")
    for name in given.texts("model.converters"):
        _titan_converter(given, name, draft)


def _titan_converter(given: Options, name: str, draft: Draft) -> None:
    if name not in ("float8", "quantize.linear.float8"):  # the names in v0.1 and in v0.2
        draft.leave(f"converter {name}", "of quantized training float8's linear layers only are in memfit")
        return
    recipe = str(given.get(f"{name}.recipe_name") or "tensorwise")
    draft.take("float8-linear", f"converter {name}", scaling=recipe)
    if given.on(f"{name}.enable_fsdp_float8_all_gather"):
        draft.leave("enable_fsdp_float8_all_gather", "predicted with weights gathered in 16 bits")


def _titan_batches(given: Options, data: int, stages: int, draft: Draft) -> None:
    local = given.size("training.local_batch_size") or given.size("training.batch_size") or 8
    whole = given.size("training.global_batch_size") or -1
    steps = max(1, whole // (local * data)) if whole > 0 else 1
    draft.micro_batch = local
    draft.sized(data, steps)
    if stages > 1:
        schedule = str(given.get("parallelism.pipeline_parallel_schedule") or "1F1B").lower()
        if schedule not in _SCHEDULES:
            draft.leave(f"pipeline_parallel_schedule {schedule}", "predicted as 1F1B")
        name = _SCHEDULES.get(schedule, "1f1b")
        size = given.size("parallelism.pipeline_parallel_microbatch_size") or 1
        draft.take(
            "pipeline",
            "pipeline_parallel_degree",
            stages=stages,
            schedule=name,
            virtual=2 if name in ("interleaved", "zero-bubble-v") else 1,
            micro_batches=max(1, local // size),
        )
    draft.accumulate(steps)


def _titan_data(given: Options, replicas: int, shard: int, staged: bool, draft: Draft) -> None:
    half = (given.get("training.mixed_precision_param") or "bfloat16") == "bfloat16"
    policy = str(given.get("parallelism.fsdp_reshard_after_forward") or "default")
    if shard > 1 or (replicas > 1 and draft.plan.get("tensor-parallel")):
        draft.take(
            "fsdp2",
            "FSDP",
            reshard=policy == "always" or (policy == "default" and not staged),
            precision="bf16" if half else "as-is",
            replicas=replicas,
            units="ends",
            offload=given.on("training.enable_cpu_offload"),
            sync="last" if staged else "every",
        )
        return
    if replicas > 1:
        draft.take("ddp", "data_parallel_replicate_degree", bucket_mib=100, bucket_view=False)
    if half:
        draft.take("bf16-autocast", "training.mixed_precision_param")


def _titan_recompute(given: Options, draft: Draft) -> None:
    mode = str(given.get("activation_checkpoint.mode") or "selective")
    option = str(given.get("activation_checkpoint.selective_ac_option") or "2")
    if mode == "full":
        draft.take("activation-checkpointing", "activation_checkpoint full", every=1)
    elif mode == "selective" and option.isdigit():
        draft.take("activation-checkpointing", f"selective_ac_option {option}", every=int(option))
    elif mode == "selective":
        draft.take("selective-checkpointing", f"selective_ac_option {option}", keep="every-second-matmul")
    elif mode == "memory_budget":
        draft.leave(
            "activation_checkpoint memory_budget", "the compiler's budget is not in memfit: predicted as none"
        )
