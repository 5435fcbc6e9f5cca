"""Rules for Megatron-LM's arguments. Checked against Megatron-LM at d98e8a6 (training/arguments.py,
core/transformer/transformer_config.py, core/parallel_state.py; read 2026-11)."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup
from memfit.lint.phrases import Phrase, Series, phrase


def _size(m: Options, name: str) -> int | None:
    """Return the parallel size ``name``, such as "tensor_model" for --tensor-model-parallel-size: 1 if it is
    not given, None if it is known only when the script runs or is not a whole number above 0."""
    path = f"{name}_parallel_size"
    return 1 if m.raw(path) is None and path not in m.unsure else m.size(path)


def _mesh(m: Options) -> tuple[int, int, int] | None:
    """Return the (tensor, pipeline, context) parallel sizes, or None if one of them is None (see `_size`). A
    size that is not given is 1."""
    sizes = tuple(_size(m, n) for n in ("tensor_model", "pipeline_model", "context"))
    return None if None in sizes else sizes  # type: ignore[return-value]


def _data(s: Setup) -> int | None:
    """Return the number of data-parallel ranks: that of all ranks divided by the tensor, pipeline and context
    parallel sizes. Return None if the number of ranks or one of these sizes is unknown, or if the quotient is
    not a whole number."""
    mesh = _mesh(s.megatron) if s.megatron is not None else None
    if mesh is None or s.ranks is None or s.ranks % (mesh[0] * mesh[1] * mesh[2]):
        return None
    return s.ranks // (mesh[0] * mesh[1] * mesh[2])


def _without(m: Options, name: str) -> bool:
    """Return whether the option ``name``, which Megatron-LM leaves off by default, is certainly off: switched
    off, or not given in arguments of Megatron-LM itself. Other front ends (``m.defaults`` is False) may have
    other defaults."""
    return name not in m.unsure and (m.off(name) or (m.raw(name) is None and m.defaults))


_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "is_hybrid_model",
    "heterogeneous_layers_config_path",
    "encoder_num_layers",
)
_VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


def _splits_evenly(m: Options) -> bool:
    return all(_without(m, name) for name in _UNEVEN)


def megatron_sequence_parallel(m: Options, s: Setup) -> Found:
    """Report --sequence-parallel without tensor parallelism (size 1 or not given). Files that give neither
    the tensor-parallel size nor the micro-batch size are skipped: they are only part of the arguments."""
    is_complete = m.raw("tensor_model_parallel_size") is not None or m.raw("micro_batch_size") is not None
    if m.on("sequence_parallel") and _size(m, "tensor_model") == 1 and is_complete:
        yield {}


def megatron_optimizer_alone(m: Options, s: Setup) -> Found:
    """Report --use-distributed-optimizer together with --overlap-param-gather or --overlap-grad-reduce if
    there is a single data-parallel rank and no context parallelism. Runs of one process are skipped: they are
    for debugging and say nothing about the intended run. Nothing is reported if the number of processes is
    unknown."""
    if not m.on("use_distributed_optimizer") or _data(s) != 1 or _size(m, "context") != 1 or s.ranks == 1:
        return
    if m.on("overlap_param_gather") or m.on("overlap_grad_reduce"):
        yield {"ranks": s.ranks}


def megatron_layers(m: Options, s: Setup) -> Found:
    """Report a number of layers that is no multiple of the number of pipeline stages. Nothing is reported if
    an option, such as --decoder-first-pipeline-num-layers, asks for an uneven split or may do so. Arguments
    of Megatron-DeepSpeed and of other front ends (``m.defaults`` is False) are skipped: they may split layers
    by their own rules."""
    stages = _size(m, "pipeline_model")
    layers = m.count("num_layers")
    if layers and stages and layers % stages and _splits_evenly(m) and _without(m, "deepspeed"):
        yield {"layers": layers, "stages": stages}


def megatron_virtual_layers(m: Options, s: Setup) -> Found:
    """Report a pipeline stage whose number of layers is no multiple of
    --num-layers-per-virtual-pipeline-stage or of --num-virtual-stages-per-pipeline-rank. Nothing is reported
    if an option, such as --decoder-first-pipeline-num-layers, asks for an uneven split or may do so, or if
    the stages themselves are uneven, which megatron_layers reports. Arguments of other front ends
    (``m.defaults`` is False) are skipped."""
    if not _splits_evenly(m):
        return
    layers, stages = m.count("num_layers"), _size(m, "pipeline_model")
    layers_per_virtual_stage, virtual_stages = (m.count(n) for n in _VIRTUAL)
    if not layers or not stages or layers % stages:
        return
    if (layers_per_virtual_stage and layers // stages % layers_per_virtual_stage) or (
        virtual_stages and layers // stages % virtual_stages
    ):
        yield {"layers": layers, "stages": stages, "each": layers_per_virtual_stage or f"1/{virtual_stages}"}


def megatron_virtual_pipeline(m: Options, s: Setup) -> Found:
    """Report, with a single pipeline stage, each option of the interleaved schedule that is given:
    --num-layers-per-virtual-pipeline-stage, and --num-virtual-stages-per-pipeline-rank if above 1."""
    if _size(m, "pipeline_model") != 1:
        return
    for name in _VIRTUAL:
        if (value := m.count(name)) and (value > 1 or name.startswith("num_layers")):
            yield {"option": f"--{name.replace('_', '-')} {value}"}


def megatron_batch(m: Options, s: Setup) -> Found:
    """Report a global batch that is no multiple of micro-batch x data-parallel ranks, or of the micro-batch
    if the number of these ranks is unknown. Files with --rampup-batch-size are skipped."""
    if m.raw("rampup_batch_size") is not None:
        return
    global_batch, micro_batch, data = m.count("global_batch_size"), m.count("micro_batch_size"), _data(s)
    if global_batch and micro_batch and global_batch % (micro_batch * (data or 1)):
        ranks = phrase("data-ranks", count=data) if data else phrase("any-data-ranks")
        yield {"whole": global_batch, "micro": micro_batch, "ranks": ranks}


def megatron_ranks(m: Options, s: Setup) -> Found:
    """Report a number of processes that is no multiple of tensor- x pipeline- x context-parallel size."""
    mesh = _mesh(m)
    if mesh is None or s.ranks is None:
        return
    tensor, pipeline, context = mesh
    if s.ranks % (tensor * pipeline * context):
        yield {
            "ranks": s.ranks,
            "tensor": tensor,
            "pipeline": pipeline,
            "context": context,
            "least": tensor * pipeline * context,
        }


def megatron_interleaved_batch(m: Options, s: Setup) -> Found:
    """Report, with an interleaved schedule over several pipeline stages, a number of micro-batches per step
    that is no multiple of the number of stages. The number is global batch / (micro-batch x data-parallel
    ranks); nothing is reported if it is unknown or not whole. Files with
    --microbatch-group-size-per-virtual-pipeline-stage are skipped."""
    data = _data(s)
    if data is None or m.raw("microbatch_group_size_per_virtual_pipeline_stage") is not None:
        return
    global_batch, micro_batch = m.count("global_batch_size"), m.count("micro_batch_size")
    stages, is_interleaved = _size(m, "pipeline_model"), any(m.count(n) for n in _VIRTUAL)
    if not (stages and stages > 1 and is_interleaved and global_batch and micro_batch) or global_batch % (
        micro_batch * data
    ):
        return
    if (steps := global_batch // (micro_batch * data)) % stages:
        yield {"steps": steps, "stages": stages}


_RECOMPUTE = ("recompute_method", "recompute_num_layers")


def _recompute(m: Options) -> tuple[str | None, list[str]]:
    """Return (the granularity of recomputation; those of the options --recompute-method and
    --recompute-num-layers that are given, as text with their values). The granularity is that of
    --recompute-granularity, otherwise "selective" with --recompute-activations, otherwise None."""
    granularity = m.get("recompute_granularity") or ("selective" if m.on("recompute_activations") else None)
    names = [n for n in _RECOMPUTE if m.raw(n) is not None]
    return granularity, [f"--{n.replace('_', '-')} {m.raw(n)}" for n in names]


def megatron_recompute(m: Options, s: Setup) -> Found:
    """Report a granularity of recomputation with the wrong options: "full" needs both --recompute-method and
    --recompute-num-layers, "selective" (also given as --recompute-activations) takes neither. Nothing is
    reported if one of these is known only when the script runs."""
    granularity, recompute_options = _recompute(m)
    is_wrong = (granularity == "selective" and recompute_options) or (
        granularity == "full" and len(recompute_options) < 2
    )
    if is_wrong and not m.unsure.intersection(("recompute_granularity", *_RECOMPUTE)):
        shown = phrase("recompute-options", options=", ".join(recompute_options))
        yield {
            "granularity": granularity,
            "shown": shown if recompute_options else phrase("no-recompute-options"),
        }


def megatron_recompute_off(m: Options, s: Setup) -> Found:
    """Report --recompute-method and --recompute-num-layers if neither --recompute-granularity nor
    --recompute-activations is given: they then have no effect. Arguments of other front ends (``m.defaults``
    is False) are skipped unless they switch --recompute-granularity off."""
    granularity, recompute_options = _recompute(m)
    if granularity is None and recompute_options and _without(m, "recompute_granularity"):
        yield {"shown": ", ".join(recompute_options)}


def megatron_overlap_gather(m: Options, s: Setup) -> Found:
    """Report --overlap-param-gather without --overlap-grad-reduce, or without any option that shards the
    optimizer. These are --use-distributed-optimizer, --use-megatron-fsdp, --use-custom-fsdp,
    --use-layer-wise-distributed-optimizer, and an --optimizer whose name contains muon. An option that may be
    on is not reported as missing: one whose value is known only when the script runs, and one that arguments
    of other front ends (``m.defaults`` is False) do not give."""
    if not m.on("overlap_param_gather"):
        return
    alternatives = ("use_megatron_fsdp", "use_custom_fsdp", "use_layer_wise_distributed_optimizer")
    is_sharded = not _without(m, "use_distributed_optimizer") or not all(_without(m, n) for n in alternatives)
    is_sharded = is_sharded or m.undetermined("optimizer") or "muon" in str(m.raw("optimizer"))
    missing = [] if is_sharded else ["--use-distributed-optimizer"]
    missing += ["--overlap-grad-reduce"] if _without(m, "overlap_grad_reduce") else []
    if missing:
        yield {"missing": Series(tuple(missing), "and")}


def megatron_connections(m: Options, s: Setup) -> Found:
    """Report a CUDA_DEVICE_MAX_CONNECTIONS that prevents communication from overlapping computation. With
    --use-torch-fsdp2 or --use-megatron-fsdp, that is 1. Otherwise it is, with tensor or context parallelism,
    any number but 1 and 32, unless --overlap-moe-expert-parallel-comm, which needs more connections, is on or
    may be. A file that does not set the variable to a number is skipped: the container may set it."""
    value = m.env.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if value is None or not value.isdigit():
        return
    uses_fsdp = m.on("use_torch_fsdp2") or m.on("use_megatron_fsdp")
    mesh = _mesh(m)
    # This overlap needs more connections, so a value above 1 is right for it.
    overlaps_experts = not _without(m, "overlap_moe_expert_parallel_comm")
    if uses_fsdp and value == "1":
        yield {"value": value, "why": phrase("gathers-wait"), "wanted": phrase("or-more", value=8)}
    # Set-ups for Blackwell choose 32, which does no harm there.
    if (
        not uses_fsdp
        and not overlaps_experts
        and mesh
        and value not in ("1", "32")
        and (mesh[0] > 1 or mesh[2] > 1)
    ):
        yield {"value": value, "why": phrase("collectives-first"), "wanted": phrase("exactly", value=1)}


def megatron_two_precisions(m: Options, s: Setup) -> Found:
    """Report --fp16 together with --bf16."""
    if m.on("fp16") and m.on("bf16"):
        yield {}


def megatron_heads(m: Options, s: Setup) -> Found:
    """Report attention heads that the tensor-parallel size does not divide."""
    tensor = _size(m, "tensor_model")
    heads = m.count("num_attention_heads")
    if heads and tensor and heads % tensor:
        yield {"heads": heads, "tensor": tensor}


def _groups(m: Options) -> int | None:
    """Return --num-query-groups, or None if it is not given or has no effect. It has no effect in arguments
    of Megatron-LM itself without --group-query-attention: every head then has keys and values of its own.
    Other front ends (``m.defaults`` is False) may switch that option on by default, so it is not required in
    their arguments."""
    has_groups = m.on("group_query_attention") or not m.defaults
    return m.size("num_query_groups") if has_groups else None


def megatron_query_groups(m: Options, s: Setup) -> Found:
    """Report a number of query groups and a tensor-parallel size of which neither divides the other. Since
    Megatron core 0.16 several ranks may share one group."""
    tensor, groups = _size(m, "tensor_model"), _groups(m)
    if groups and tensor and groups % tensor and tensor % groups:
        yield {"groups": groups, "tensor": tensor}


def megatron_few_query_groups(m: Options, s: Setup) -> Found:
    """Report fewer query groups than tensor-parallel ranks, which Megatron core before 0.16 refuses. If the
    groups do not divide the ranks, megatron_query_groups reports it instead."""
    tensor, groups = _size(m, "tensor_model"), _groups(m)
    if groups and tensor and groups < tensor and tensor % groups == 0:
        yield {"groups": groups, "tensor": tensor, "each": tensor // groups}


def megatron_query_groups_off(m: Options, s: Setup) -> Found:
    """Report a --num-query-groups other than the number of heads without --group-query-attention: it then has
    no effect. Files with multi-latent attention, or whose arguments are read from a checkpoint
    (--use-checkpoint-args), are skipped, and so are arguments of other front ends (``m.defaults`` is False)
    unless they switch these three options off."""
    groups, heads = m.size("num_query_groups"), m.size("num_attention_heads")
    is_plain_attention = _without(m, "group_query_attention") and _without(m, "multi_latent_attention")
    if groups and heads and groups != heads and is_plain_attention and _without(m, "use_checkpoint_args"):
        yield {"groups": groups, "heads": heads}


def megatron_two_lengths(m: Options, s: Setup) -> Found:
    """Report --train-samples together with --train-iters, unless --skip-train is on or may be. Arguments of
    other front ends (``m.defaults`` is False) are skipped unless they switch --skip-train off."""
    samples, iterations = m.size("train_samples"), m.size("train_iters")
    if samples and iterations and _without(m, "skip_train"):
        yield {"samples": samples, "iterations": iterations}


def megatron_distributed_activations(m: Options, s: Setup) -> Found:
    """Report --distribute-saved-activations with --sequence-parallel, with which it cannot be used, or
    without tensor parallelism or --recompute-granularity full, both of which it needs. In arguments of other
    front ends (``m.defaults`` is False), a missing full recomputation is not reported."""
    if not m.on("distribute_saved_activations"):
        return
    conflicts: list[str | Phrase] = ["--sequence-parallel"] if m.on("sequence_parallel") else []
    conflicts += ["--tensor-model-parallel-size 1"] if _size(m, "tensor_model") == 1 else []
    may_be_full = m.get("recompute_granularity") == "full" or m.undetermined("recompute_granularity")
    if not may_be_full and m.defaults:
        conflicts.append(phrase("without-option", option="--recompute-granularity full"))
    if conflicts:
        yield {"clash": Series(tuple(conflicts), "comma")}


def _dense(m: Options) -> bool:
    """Return whether the network certainly has no experts: --num-experts is not given or is 0, but at least
    one of the network's sizes (layers, hidden size, heads) is given. Without any of these, the
    file may be only part of the arguments."""
    is_described = any(m.raw(n) is not None for n in ("num_layers", "hidden_size", "num_attention_heads"))
    has_no_experts = m.raw("num_experts") is None or m.number("num_experts") == 0
    return is_described and "num_experts" not in m.unsure and has_no_experts


def megatron_experts(m: Options, s: Setup) -> Found:
    """Report an expert-parallel size above 1 that does not divide the number of experts, or that is given for
    a network certainly without experts (see `_dense`)."""
    size = _size(m, "expert_model")
    if size is None or size == 1:
        return
    experts = m.count("num_experts")
    if _dense(m) or (experts and experts % size):
        shown = phrase("experts", count=experts) if experts else phrase("no-experts")
        yield {"experts": shown, "size": size}


def megatron_grouped_gemm(m: Options, s: Setup) -> Found:
    """Report --moe-grouped-gemm for a network certainly without experts (see `_dense`). With an
    expert-parallel size above 1, megatron_experts reports the network instead. Arguments of other front ends
    (``m.defaults`` is False) are skipped."""
    if m.on("moe_grouped_gemm") and _dense(m) and _size(m, "expert_model") == 1 and m.defaults:
        yield {}


def megatron_moe_sequence(m: Options, s: Setup) -> Found:
    """Report more than one expert with tensor parallelism but without --sequence-parallel, which Megatron
    refuses to train. Files are skipped as only part of the arguments if they give neither --train-iters nor
    --train-samples and not both --global-batch-size and, in the set-up, the number of processes. Arguments of
    Megatron-DeepSpeed are skipped, too, and those of other front ends (``m.defaults`` is False) unless they
    switch --sequence-parallel and --deepspeed off."""
    tensor = _size(m, "tensor_model")
    trains = any(m.raw(n) is not None for n in ("train_iters", "train_samples"))
    # Files with only part of the arguments are skipped. A known number of processes together with a global
    # batch shows that the script is complete.
    trains = trains or (s.ranks is not None and m.raw("global_batch_size") is not None)
    trains = trains and _without(m, "deepspeed")  # DeepSpeed has its own mixture of experts
    has_experts = (m.count("num_experts") or 1) > 1
    if has_experts and (tensor or 1) > 1 and _without(m, "sequence_parallel") and trains:
        yield {"experts": m.count("num_experts"), "tensor": tensor}


def megatron_context_length(m: Options, s: Setup) -> Found:
    """Report, with context parallelism, a sequence length that is no multiple of 2 x context-parallel
    size."""
    context = _size(m, "context")
    length = m.count("seq_length")
    if context and context > 1 and length and length % (2 * context):
        yield {"length": length, "context": context}


def megatron_positions(m: Options, s: Setup) -> Found:
    """Report a sequence length above --max-position-embeddings."""
    length, max_positions = m.count("seq_length"), m.count("max_position_embeddings")
    if length and max_positions and length > max_positions:
        yield {"length": length, "most": max_positions}


def megatron_torch_fsdp2(m: Options, s: Setup) -> Found:
    """Report --use-torch-fsdp2 together with --use-distributed-optimizer, --fp16, or pipeline or expert
    parallelism, with which it cannot be used, or without --no-gradient-accumulation-fusion or
    --untie-embeddings-and-output-weights, both of which it needs. In arguments of other front ends
    (``m.defaults`` is False), these two are reported only if they are switched off."""
    if not m.on("use_torch_fsdp2"):
        return
    conflicts: list[str | Phrase] = [
        f"--{n.replace('_', '-')}" for n in ("use_distributed_optimizer", "fp16") if m.on(n)
    ]
    sizes = {n: _size(m, f"{n}_model") or 1 for n in ("pipeline", "expert")}
    conflicts += [f"--{n}-model-parallel-size {size}" for n, size in sizes.items() if size > 1]
    required = ("no_gradient_accumulation_fusion", "untie_embeddings_and_output_weights")
    conflicts += [
        phrase("without-option", option=f"--{n.replace('_', '-')}") for n in required if _without(m, n)
    ]
    if conflicts:
        yield {"clash": Series(tuple(conflicts), "comma")}


def megatron_batch_schedule(m: Options, s: Setup) -> Found:
    """Report --step-batch-size-schedule together with --global-batch-size: only one of them may set the
    batch."""
    if m.raw("step_batch_size_schedule") is not None and m.raw("global_batch_size") is not None:
        yield {"whole": m.raw("global_batch_size")}


def megatron_tensor_overlap(m: Options, s: Setup) -> Found:
    """Report --tp-comm-overlap without --sequence-parallel, which it needs. In arguments of other front ends
    (``m.defaults`` is False), it is reported only if --sequence-parallel is switched off."""
    if m.on("tp_comm_overlap") and _without(m, "sequence_parallel"):
        yield {}


_ALL = (
    megatron_sequence_parallel,
    megatron_optimizer_alone,
    megatron_layers,
    megatron_virtual_layers,
    megatron_virtual_pipeline,
    megatron_batch,
    megatron_ranks,
    megatron_interleaved_batch,
    megatron_recompute,
    megatron_recompute_off,
    megatron_overlap_gather,
    megatron_connections,
    megatron_two_precisions,
    megatron_heads,
    megatron_experts,
    megatron_moe_sequence,
    megatron_context_length,
    megatron_torch_fsdp2,
    megatron_batch_schedule,
    megatron_tensor_overlap,
    megatron_positions,
    megatron_query_groups,
    megatron_few_query_groups,
    megatron_query_groups_off,
    megatron_two_lengths,
    megatron_distributed_activations,
    megatron_grouped_gemm,
)
CHECKS = {("megatron",): _ALL}
