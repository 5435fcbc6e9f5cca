"""Rules for torchtitan's TOML. Checked against v0.2.2, its last release with TOML files (parallel_dims.py,
pipeline_parallel.py, components/optimizer.py, train.py, config/manager.py, activation_checkpoint.py; read
2026-11)."""

from __future__ import annotations

from memfit.lint.parse import Found, Options, Setup
from memfit.lint.phrases import phrase
from memfit.lint.torchtitan import compiles_model, parallelism_path

_DEGREES = (
    "data_parallel_replicate",
    "data_parallel_shard",
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
)


def _degrees(t: Options) -> tuple[int, int, int, int, int]:
    """Return the degrees of parallelism in this order: data_parallel_replicate, data_parallel_shard, tensor,
    pipeline, context. A degree that is not given or unknown is 1, but that of data_parallel_shard is -1,
    which stands for all remaining ranks."""
    degrees = []
    for name in _DEGREES:
        degree = t.count(parallelism_path(t, f"{name}_degree"))
        default_degree = -1 if name == "data_parallel_shard" else 1
        degrees.append(default_degree if degree is None else degree)
    return tuple(degrees)  # type: ignore[return-value]


def _knows_degrees(t: Options) -> bool:
    """Return whether no degree of parallelism is known only when the file is filled in, such as "${PP}"."""
    return not any(t.undetermined(parallelism_path(t, f"{name}_degree")) for name in _DEGREES)


def torchtitan_degrees(t: Options, s: Setup) -> Found:
    """Report degrees of parallelism (see `_degrees`) whose product is not the number of processes, if that
    number is known. If data_parallel_shard_degree is -1, for all remaining ranks, the product of the other
    degrees must only divide that number. Degrees below 1, other than that of shard, are always reported.
    Nothing is reported if a degree is unknown."""
    if not _knows_degrees(t):
        return
    replicate, shard, tensor, pipeline, context = degrees = _degrees(t)
    shown = " x ".join(f"{n} {d}" for n, d in zip(_DEGREES, degrees, strict=True))
    model = replicate * tensor * pipeline * context
    is_wrong = replicate < 1 or min(tensor, pipeline, context) < 1
    if s.ranks is not None and not is_wrong:
        is_wrong = s.ranks % model != 0 if shard == -1 else s.ranks != model * shard
    if is_wrong:
        processes = phrase("processes", count=s.ranks) if s.ranks else phrase("any-processes")
        yield {"shown": shown, "processes": processes}


def torchtitan_async_tensor(t: Options, s: Setup) -> Found:
    """Report enable_async_tensor_parallel with tensor parallelism if torch.compile does not compile the
    model: only torch.compile implements it."""
    if compiles_model(t) or _degrees(t)[2] == 1:
        return
    if t.on(parallelism_path(t, "enable_async_tensor_parallel")):
        yield {}


def torchtitan_float8_eager(t: Options, s: Setup) -> Found:
    """Report model.converters whose names contain float8 or mx if torch.compile does not compile the model:
    these formats then cost more memory and time than bf16."""
    converters = [n for n in t.texts("model.converters") if "float8" in n or "mx" in n]
    if converters and not compiles_model(t):
        yield {"converters": ", ".join(converters)}


def torchtitan_replicate(t: Options, s: Setup) -> Found:
    """Report DDP together with tensor, pipeline or context parallelism. DDP is used if
    data_parallel_replicate_degree is above 1 and data_parallel_shard_degree is 1."""
    replicate, shard, tensor, pipeline, context = _degrees(t)
    other_degrees = {"tensor_parallel": tensor, "pipeline_parallel": pipeline, "context_parallel": context}
    if replicate > 1 and shard == 1 and max(other_degrees.values()) > 1:
        shown = ", ".join(f"{n}_degree {d}" for n, d in other_degrees.items() if d > 1)
        yield {"replicate": replicate, "shown": shown}


def torchtitan_step_in_backward(t: Options, s: Setup) -> Found:
    """Report early_step_in_backward with pipeline or expert parallelism, which do not support it."""
    if not t.on("optimizer.early_step_in_backward"):
        return
    pipeline, experts = _degrees(t)[3], t.count("parallelism.expert_parallel_degree") or 1
    if pipeline > 1 or experts > 1:
        yield {"with": phrase("pipeline-parallelism" if pipeline > 1 else "expert-parallelism")}


def torchtitan_unclipped(t: Options, s: Setup) -> Found:
    """Report early_step_in_backward with a training.max_norm that the file sets to a number other than 0:
    gradients are freed before they could be clipped."""
    if t.on("optimizer.early_step_in_backward") and (norm := t.number("training.max_norm")):
        yield {"norm": norm}


def torchtitan_microbatches(t: Options, s: Setup) -> Found:
    """Report a local batch (samples per data-parallel rank) that gives a pipeline of several stages fewer
    micro-batches than stages, or that is no multiple of pipeline_parallel_microbatch_size, by default 1.
    Files of older releases, which set pipeline_parallel_microbatches or have no table parallelism, are
    skipped."""
    pipeline = _degrees(t)[3]
    if pipeline == 1 or t.count(parallelism_path(t, "pipeline_parallel_microbatches")):
        return
    local_batch = t.count("training.local_batch_size") or t.count("training.batch_size")
    size = t.count("parallelism.pipeline_parallel_microbatch_size") or 1
    if local_batch and (local_batch % size or local_batch // size < pipeline) and t.section("parallelism"):
        yield {"local": local_batch, "size": size, "stages": pipeline}


def torchtitan_batch(t: Options, s: Setup) -> Found:
    """Report a global batch that is no multiple of local batch x data-parallel ranks. The number of these
     ranks is the replicate degree x the shard degree. If the shard degree is -1, for all remaining ranks, it
     is the number of processes / (tensor x pipeline x context degrees) or, if the number of processes is
     unknown, the replicate degree. Nothing is reported if another degree is below 1 or if a degree is unknown
    ."""
    global_batch = t.count("training.global_batch_size")
    local_batch = t.count("training.local_batch_size")
    if not global_batch or not local_batch or global_batch < 1 or not _knows_degrees(t):
        return
    replicate, shard, tensor, pipeline, context = _degrees(t)
    if min(replicate, tensor, pipeline, context) < 1:
        return
    data = replicate * shard
    if shard < 0:
        data = s.ranks // (tensor * pipeline * context) if s.ranks else replicate
    if data > 0 and global_batch % (local_batch * data):
        yield {"whole": global_batch, "local": local_batch, "data": data}


def torchtitan_budget_eager(t: Options, s: Setup) -> Found:
    """Report activation_checkpoint.mode memory_budget if torch.compile does not compile the model: only
    torch.compile implements it."""
    if t.get("activation_checkpoint.mode") == "memory_budget" and not compiles_model(t):
        yield {}


def torchtitan_sequence(t: Options, s: Setup) -> Found:
    """Report, with tensor or context parallelism, a training.seq_len that is no multiple of tensor degree x 2
    x context degree. All language models require it; image models (whose name contains flux) are skipped."""
    _, _, tensor, _, context = _degrees(t)
    length, is_image_model = t.size("training.seq_len"), "flux" in str(t.get("model.name"))
    splits_sequence = min(tensor, context) > 0 and tensor * context > 1 and not is_image_model
    if splits_sequence and length and length % (tensor * 2 * context):
        yield {"length": length, "tensor": tensor, "context": context}


def torchtitan_selective_option(t: Options, s: Setup) -> Found:
    """Report an activation_checkpoint.selective_ac_option that is neither "op" nor a whole number, if
    activation_checkpoint.mode is selective or not given."""
    value, mode = t.get("activation_checkpoint.selective_ac_option"), t.get("activation_checkpoint.mode")
    if isinstance(value, str) and value != "op" and not value.isdigit() and mode in (None, "selective"):
        yield {"value": value}


_ALL = (
    torchtitan_degrees,
    torchtitan_async_tensor,
    torchtitan_float8_eager,
    torchtitan_replicate,
    torchtitan_step_in_backward,
    torchtitan_unclipped,
    torchtitan_microbatches,
    torchtitan_batch,
    torchtitan_budget_eager,
    torchtitan_sequence,
    torchtitan_selective_option,
)
CHECKS = {("torchtitan",): _ALL}
