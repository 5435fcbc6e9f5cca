"""Convert Megatron-LM's arguments and torchtitan's TOML to a Plan. Both combine several kinds of
parallelism."""

from __future__ import annotations

import math

from memfit.lint import models
from memfit.lint.draft import Draft
from memfit.lint.parse import Options, Setup
from memfit.lint.torchtitan import compiles_model, parallelism_path
from memfit.types.plan import KnobValue


def from_megatron(setup: Setup, draft: Draft) -> None:
    """Add Megatron-LM's arguments to ``draft``. If the number of processes is unknown, assume the smallest
    that the parallel sizes allow: tensor x pipeline x context. Settings that no plan can express are listed
    in the draft as left out. Among these are data-parallel replicas beside tensor parallelism, unless torch's
    FSDP2 shards them: ``ranks`` and ``batch`` are then those of one replica."""
    options = setup.megatron
    assert options is not None
    tensor, pipeline, context = (
        options.size(f"{n}_parallel_size") or 1 for n in ("tensor_model", "pipeline_model", "context")
    )
    draft.length, draft.model = options.size("seq_length"), models.of_megatron(options, tensor)
    model_ranks = tensor * pipeline * context
    if setup.ranks is None:
        draft.ranks = model_ranks
        draft.leave(
            "data-parallel ranks", "the number of processes is unknown: predicted with the smallest possible"
        )
    data_ranks = max(1, draft.ranks // model_ranks)
    if context > 1:
        draft.take("context-parallel", f"context-parallel-size {context}", degree=context)
    if tensor > 1:
        draft.take(
            "tensor-parallel",
            f"tensor-model-parallel-size {tensor}",
            degree=tensor,
            sequence=options.on("sequence_parallel"),
            vocabulary="parallel-loss",
        )
    steps = _micro_batches(options, data_ranks, draft)
    if pipeline > 1:
        _megatron_pipeline(options, pipeline, steps, draft)
    else:
        draft.accumulate(steps)
    if (experts := options.size("expert_model_parallel_size") or 1) > 1:
        draft.take("expert-parallel", f"expert-model-parallel-size {experts}", degree=experts)
    _megatron_data(options, data_ranks, tensor, draft)
    _megatron_recompute(options, draft)
    for name, reason in _MEGATRON_REASONS.items():
        if options.get(name) is not None and not options.off(name):
            draft.leave(f"--{name.replace('_', '-')}", reason)


_MEGATRON_REASONS = {
    "fp8_format": "memfit does not support fp8: predicted as bf16",
    "fp4_format": "memfit does not support fp4: predicted as bf16",
    "optimizer_cpu_offload": "memfit does not support it: the optimizer's state is predicted on the device",
    "cpu_offloading": "memfit does not support Transformer Engine's offload of activations",
    "use_megatron_fsdp": "memfit does not support Megatron's own FSDP",
    "decoder_first_pipeline_num_layers": "memfit divides blocks evenly among stages",
    "decoder_last_pipeline_num_layers": "memfit divides blocks evenly among stages",
    "pipeline_model_parallel_layout": "memfit divides blocks evenly among stages",
    "mtp_num_layers": "the prediction is for the job's model",
}


def _micro_batches(options: Options, data_ranks: int, draft: Draft) -> int | None:
    """Set the micro-batch and the batch of ``draft``. The batch is the global batch or, if that is not given,
    micro-batch x ``data_ranks`` x micro-batches of a rank. Return the number of micro-batches of one rank in
    an optimizer step, or None if it is unknown. ``data_ranks``: number of ranks that see different
    samples."""
    micro_batch, global_batch = options.size("micro_batch_size"), options.size("global_batch_size")
    steps = options.size("num_micro_batches")
    if micro_batch and global_batch:
        steps = max(1, global_batch // (micro_batch * data_ranks))
    draft.micro_batch, draft.batch = micro_batch, global_batch
    if not options.undetermined("global_batch_size"):
        draft.set_batch(data_ranks, steps)
    return steps


def _megatron_pipeline(options: Options, stages: int, steps: int | None, draft: Draft) -> None:
    virtual_stages = options.size("num_virtual_stages_per_pipeline_rank") or 1
    layers, layers_per_virtual_stage = (
        options.size("num_layers"),
        options.size("num_layers_per_virtual_pipeline_stage"),
    )
    if layers and layers_per_virtual_stage:
        virtual_stages = max(1, layers // stages // layers_per_virtual_stage)
    knobs: dict[str, KnobValue] = {"micro_batches": steps} if steps else {}
    draft.take(
        "pipeline",
        f"pipeline-model-parallel-size {stages}",
        stages=stages,
        virtual=virtual_stages,
        schedule="interleaved" if virtual_stages > 1 else "1f1b",
        **knobs,
    )


def _megatron_data(options: Options, data_ranks: int, tensor: int, draft: Draft) -> None:
    is_half = options.on("bf16") or options.on("fp16")
    if options.on("fp16"):
        draft.leave("--fp16", "predicted as bf16: the same number of bytes, without the loss scale")
    shards_optimizer = options.on("use_distributed_optimizer")
    if data_ranks > 1 and options.on("use_torch_fsdp2"):
        draft.take("fsdp2", "--use-torch-fsdp2", precision="bf16" if is_half else "as-is")
        return
    is_only_parallelism = (
        "context-parallel" not in draft.plan and "pipeline" not in draft.plan and tensor == 1
    )
    if is_half and not options.on("grad_reduce_in_bf16"):
        draft.leave(
            "gradients in fp32",
            "Megatron adds them up in fp32; with bf16 parameters, memfit adds them up in bf16",
        )
    if data_ranks > 1 and shards_optimizer and is_only_parallelism:
        bucket = options.size("ddp_bucket_size") or max(40_000_000, 1_000_000 * data_ranks)
        draft.take(
            "zero",
            "--use-distributed-optimizer",
            stage=1,
            precision="bf16" if is_half else "fp32",
            reduce_bucket_elements=bucket,
            overlap=options.on("overlap_grad_reduce"),
        )
        draft.leave(
            "gradients reduced in place", f"memfit's ZeRO copies them to a bucket of {bucket} elements first"
        )
        return
    if data_ranks > 1 and shards_optimizer:
        draft.leave(
            "--use-distributed-optimizer",
            "together with other parallelism, memfit cannot shard only the optimizer state: predicted whole "
            "on every rank",
        )
    # memfit has no DDP beside tensor parallelism, and torch's FSDP2 needs something to shard.
    if data_ranks > 1 and tensor > 1:
        draft.ranks //= data_ranks
        draft.batch = draft.batch // data_ranks if draft.batch else None
        draft.leave(
            f"{data_ranks} data-parallel replicas",
            "memfit does not support them with tensor parallelism: predicted as one replica with its part "
            "of the batch",
        )
    elif data_ranks > 1:
        accumulates = "gradient-accumulation" in draft.plan
        draft.take("ddp", "data parallel", sync="last" if accumulates else "every")
    if is_half:
        draft.take("bf16-parameters", "--bf16", rounding="master")


def _megatron_recompute(options: Options, draft: Draft) -> None:
    granularity, method = options.get("recompute_granularity"), options.get("recompute_method")
    layers = options.size("recompute_num_layers") or 1
    if granularity == "selective" or options.on("recompute_activations"):
        draft.leave(
            "selective recomputation",
            "memfit cannot recompute only the core of attention: predicted without recomputation",
        )
    elif granularity == "full" and method == "uniform" and layers == 1:
        draft.take("activation-checkpointing", "full recomputation", every=1)
    elif granularity == "full":
        draft.take("activation-checkpointing", "full recomputation", every=1)
        draft.leave(
            f"recompute-method {method} of {layers} layers", "predicted with every block recomputed by itself"
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
    """Add torchtitan's settings to ``draft``. If the number of processes is unknown, assume the smallest that
    the degrees of parallelism allow: the product of all but the expert-parallel degree, with 1 for a shard
    degree of -1. Settings that no plan can express are listed in the draft as left out."""
    options = setup.torchtitan
    assert options is not None
    draft.length, draft.model = (
        options.size("training.seq_len") or _TITAN_LENGTH,
        models.of_torchtitan(options),
    )
    degree = {
        n: options.size(parallelism_path(options, f"{n}_degree")) or 1
        for n in (
            "data_parallel_replicate",
            "tensor_parallel",
            "pipeline_parallel",
            "context_parallel",
            "expert_parallel",
        )
    }
    shard = options.size(parallelism_path(options, "data_parallel_shard_degree")) or -1
    other_ranks = math.prod(v for n, v in degree.items() if n != "expert_parallel")
    if setup.ranks is None:
        draft.ranks = other_ranks * max(1, shard)
        if shard == -1:
            draft.leave(
                "data_parallel_shard_degree -1", "the number of processes is unknown: predicted with 1"
            )
    shard = shard if shard > 0 else max(1, draft.ranks // other_ranks)
    tensor, pipeline = degree["tensor_parallel"], degree["pipeline_parallel"]
    if degree["context_parallel"] > 1:
        draft.take("context-parallel", "context_parallel_degree", degree=degree["context_parallel"])
    if tensor > 1:
        gathers = options.on(parallelism_path(options, "disable_loss_parallel"))
        gathers = gathers or options.off("training.enable_loss_parallel")  # its name in older releases
        draft.take(
            "tensor-parallel",
            "tensor_parallel_degree",
            degree=tensor,
            sequence=True,
            vocabulary="gathered" if gathers else "parallel-loss",
        )
    if degree["expert_parallel"] > 1:
        draft.take("expert-parallel", "expert_parallel_degree", degree=degree["expert_parallel"])
    _titan_batches(options, degree["data_parallel_replicate"] * shard, pipeline, draft)
    _titan_data(options, degree["data_parallel_replicate"], shard, pipeline > 1, draft)
    _titan_recompute(options, draft)
    if compiles_model(options):
        draft.take("compile", "compile.enable", scope="blocks")
    implementation = str(options.get("optimizer.implementation") or "fused")
    if implementation in ("fused", "for-loop"):
        draft.take(
            {"fused": "adamw-fused", "for-loop": "adamw-single"}[implementation],
            f"optimizer.implementation {implementation}",
        )
    if options.on("optimizer.early_step_in_backward"):
        draft.take("optimizer-in-backward", "optimizer.early_step_in_backward")
    for name in options.texts("model.converters"):
        _titan_converter(options, name, draft)


def _titan_converter(options: Options, name: str, draft: Draft) -> None:
    if name not in ("float8", "quantize.linear.float8"):  # the names in v0.1 and in v0.2
        draft.leave(f"converter {name}", "for quantized training, memfit supports only float8 linear layers")
        return
    recipe = str(options.get(f"{name}.recipe_name") or "tensorwise")
    draft.take("float8-linear", f"converter {name}", scaling=recipe)
    if options.on(f"{name}.enable_fsdp_float8_all_gather"):
        draft.leave("enable_fsdp_float8_all_gather", "predicted with weights gathered in 16 bits")


def _titan_batches(options: Options, data_ranks: int, stages: int, draft: Draft) -> None:
    local_batch = options.size("training.local_batch_size") or options.size("training.batch_size") or 8
    global_batch = options.size("training.global_batch_size") or -1
    steps = max(1, global_batch // (local_batch * data_ranks)) if global_batch > 0 else 1
    draft.micro_batch = local_batch
    draft.set_batch(data_ranks, steps)
    if stages > 1:
        schedule = str(options.get(parallelism_path(options, "pipeline_parallel_schedule")) or "1F1B").lower()
        name = _SCHEDULES.get(schedule.replace("_", ""))  # older releases write interleaved_1f1b
        if name is None:
            draft.leave(f"pipeline_parallel_schedule {schedule}", "predicted as 1F1B")
        virtual_stages = 2 if name in ("interleaved", "zero-bubble-v") else 1
        draft.take(
            "pipeline",
            "pipeline_parallel_degree",
            stages=stages,
            schedule=name or "1f1b",
            virtual=virtual_stages,
            micro_batches=_titan_micro_batches(options, local_batch, stages * virtual_stages),
        )
    draft.accumulate(steps)


def _titan_micro_batches(options: Options, local_batch: int, stages: int) -> int:
    """Return the number of micro-batches of a pipeline. If the file sets pipeline_parallel_microbatches, as
    older releases do, it is that number. Otherwise, in a file without a table parallelism, also of older
    releases, it is ``stages``, the number of stages on all ranks. Otherwise it is ``local_batch``, the
    samples of a rank, divided by pipeline_parallel_microbatch_size (by default 1) and rounded down, at least
    1."""
    count = options.size(parallelism_path(options, "pipeline_parallel_microbatches"))
    if count is None and not options.section("parallelism"):
        count = stages
    size = options.size("parallelism.pipeline_parallel_microbatch_size") or 1
    return count or max(1, local_batch // size)


def _titan_data(options: Options, replicas: int, shard: int, has_pipeline: bool, draft: Draft) -> None:
    is_half = (options.get("training.mixed_precision_param") or "bfloat16") == "bfloat16"
    policy = str(options.get(parallelism_path(options, "fsdp_reshard_after_forward")) or "default")
    if shard > 1 or (replicas > 1 and draft.plan.get("tensor-parallel")):
        draft.take(
            "fsdp2",
            "FSDP",
            reshard=policy == "always" or (policy == "default" and not has_pipeline),
            precision="bf16" if is_half else "as-is",
            replicas=replicas,
            units="ends",
            offload=options.on("training.enable_cpu_offload"),
            sync="last" if has_pipeline else "every",
        )
        return
    if replicas > 1:
        draft.take("ddp", "data_parallel_replicate_degree", bucket_mib=100, bucket_view=False)
    if is_half:
        draft.take("bf16-autocast", "training.mixed_precision_param")


def _titan_recompute(options: Options, draft: Draft) -> None:
    mode = str(options.get("activation_checkpoint.mode") or "selective")
    option = str(options.get("activation_checkpoint.selective_ac_option") or "2")
    if mode == "full":
        draft.take("activation-checkpointing", "activation_checkpoint full", every=1)
    elif mode == "selective" and option.isdigit():
        draft.take("activation-checkpointing", f"selective_ac_option {option}", every=int(option))
    elif mode == "selective":
        draft.take("selective-checkpointing", f"selective_ac_option {option}", keep="every-second-matmul")
    elif mode == "memory_budget":
        draft.leave(
            "activation_checkpoint memory_budget",
            "memfit does not support the compiler's budget: predicted without recomputation",
        )
