"""Export for torchtitan: a TOML for v0.2.2, the last release that reads one, and command-line arguments for
v0.3.

Keys are those of torchtitan/config/job_config.py (v0.2.2) and torchtitan/config/configs.py (v0.3.0). The user
sets the model, data, learning rate and length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.export.base import Files, Handover
from memfit.techniques.rank_mesh import layout, split_batch
from memfit.types.errors import UserError
from memfit.types.plan import Plan

TOML, ARGUMENTS = "torchtitan.toml", "torchtitan.args"

Sections = Mapping[str, Mapping[str, Any]]

_DDP_BUCKET_MIB = 100  # fixed in the parallelize.py of torchtitan's models
_SCHEDULES = {
    "gpipe": ("GPipe", 1),
    "1f1b": ("1F1B", 1),
    "interleaved": ("Interleaved1F1B", 2),
    "zero-bubble": ("InterleavedZeroBubble", 2),
    "zero-bubble-v": ("ZBVZeroBubble", 2),
}
_KERNELS = {"adamw-fused": "fused", "adamw-single": "for-loop"}
# Technique -> settings for which torchtitan supports one value: (setting, value, reason).
_ONLY: Mapping[str, tuple[tuple[str, object, str], ...]] = {
    "ddp": (
        ("bucket_mib", _DDP_BUCKET_MIB, "its buckets have a fixed size"),
        ("bucket_view", False, "its gradients are separate from its buckets"),
        ("sync", "every", "it reduces after every micro-batch"),
    ),
    "fsdp2": (
        ("units", "ends", "it gathers the embedding separately, and norm and head together"),
        ("prefetch", 1, "it gathers one group ahead"),
    ),
    "tensor-parallel": (("sequence", True, "it always uses sequence parallelism as well"),),
    "compile": (("scope", "blocks", "it compiles block by block"),),
    "pipeline": (
        ("first_fewer", 0, "it weighs embedding and head by its own rule"),
        ("last_fewer", 0, "it weighs embedding and head by its own rule"),
    ),
    "selective-checkpointing": (("keep", "every-second-matmul", "its op policy keeps every second matmul"),),
}
_SUPPORTED = {
    "ddp",
    "fsdp2",
    "tensor-parallel",
    "context-parallel",
    "pipeline",
    "expert-parallel",
    "bf16-autocast",
    "gradient-accumulation",
    "activation-checkpointing",
    "selective-checkpointing",
    "compile",
    "optimizer-in-backward",
    "float8-linear",
    *_KERNELS,
}


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: torchtitan.toml for v0.2.2, torchtitan.args if v0.3
    supports the plan, and ``handover.own_files``. Raises UserError if v0.2.2 cannot train the plan, or if the
    batch cannot be split into equal parts for the data-parallel ranks and micro-batches."""
    plan = handover.plan
    if reasons := tuple(_why_not(plan)):
        raise UserError(
            f"torchtitan cannot train this plan: {'; '.join(reasons)}",
            hint="`memfit plan --without TECHNIQUE --save FILE.yaml` writes a plan without one of these "
            "techniques for --plan; or change their settings in the plan file",
        )
    rendered = {**handover.own_files, TOML: toml(sections(handover))}
    if not newer_cannot(plan):
        rendered[ARGUMENTS] = "".join(f"{line}\n" for line in arguments(sections(handover)))
    return rendered


def _why_not(plan: Plan) -> Iterator[str]:
    for use in plan.uses:
        name, knobs = use.technique, use.settings
        if name not in _SUPPORTED:
            yield f"{name} is not supported"
        for knob, value, reason in _ONLY.get(name, ()):
            if knobs[knob] != value:
                yield f"{name}: {reason}, so {knob} must be {json.dumps(value)}"
        if name == "fsdp2":
            yield from _fsdp_not(knobs, staged="pipeline" in plan)
            if "bf16-autocast" in plan:
                yield "bf16-autocast: not used with FSDP, whose own precision applies to gathered parameters"
        if name == "tensor-parallel" and knobs["vocabulary"] == "whole":
            yield "tensor-parallel: embedding and head are always split, so vocabulary must not be 'whole'"
        if name == "pipeline" and knobs["virtual"] != _SCHEDULES[str(knobs["schedule"])][1]:
            stages = _SCHEDULES[str(knobs["schedule"])][1]
            yield f"pipeline: {knobs['schedule']} has {stages} stages per rank, so virtual must be {stages}"


def _fsdp_not(knobs: Mapping[str, Any], *, staged: bool) -> Iterator[str]:
    if knobs["reshard"] not in {True, False}:
        yield "fsdp2: reshard applies to all groups or none, so it must be true or false"
    if staged and (knobs["sync"], knobs["reshard"]) != ("last", False):  # torch.distributed.pipelining.stage
        yield (
            "fsdp2: its pipelines reduce in each stage's last backward and keep parameters gathered until "
            'then, so sync must be "last" and reshard false'
        )
    if not staged and knobs["sync"] != "every":
        yield 'fsdp2: it reduces after every micro-batch, so sync must be "every"'


def newer_cannot(plan: Plan) -> tuple[str, ...]:
    """Return, in words for the README, the parts of the plan that torchtitan v0.3 does not support; empty if
    it supports all."""
    checkpointing, tensor = plan.get("activation-checkpointing"), plan.get("tensor-parallel")
    return tuple(
        text
        for applies, text in (
            (
                checkpointing is not None and checkpointing.settings["every"] != 1,
                "recomputing every k-th block",
            ),
            ("selective-checkpointing" in plan, "v0.2's op policy of recomputation"),
            ("optimizer-in-backward" in plan, "optimizer steps in backward"),
            ("ddp" in plan, "DDP's own buckets"),
            ("float8-linear" in plan, "v0.2's float8 converter"),
            (
                tensor is not None and tensor.settings["vocabulary"] == "gathered",
                "gathering the logits of a split head",
            ),
        )
        if applies
    )


def sections(handover: Handover) -> Sections:
    """Return the settings of torchtitan v0.2.2 for the plan, table -> setting -> value. Raises UserError if
    the batch cannot be split into equal parts for the data-parallel ranks and micro-batches."""
    plan = handover.plan
    place, fsdp = layout(plan), plan.get("fsdp2")
    is_bf16 = "bf16-autocast" in plan or (fsdp is not None and fsdp.settings["precision"] == "bf16")
    experts, tensor = plan.get("expert-parallel"), plan.get("tensor-parallel")
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": place.replicate,
        "data_parallel_shard_degree": place.shard,
        "tensor_parallel_degree": place.tensor,
        "pipeline_parallel_degree": place.pipeline,
        "context_parallel_degree": place.context,
        "expert_parallel_degree": int(experts.settings["degree"]) if experts is not None else 1,
        "fsdp_reshard_after_forward": "always" if fsdp is None or fsdp.settings["reshard"] else "never",
    }
    if tensor is not None:
        parallelism["disable_loss_parallel"] = tensor.settings["vocabulary"] == "gathered"
    training, pipeline = _batches(handover)
    training |= {
        "enable_cpu_offload": fsdp is not None and bool(fsdp.settings["offload"]),
        "dtype": "float32",
        "mixed_precision_param": "bfloat16" if is_bf16 else "float32",
        "mixed_precision_reduce": "float32",
    }
    if handover.config.spec.clip:
        training["max_norm"] = handover.config.spec.clip
    kernel = next((_KERNELS[u.technique] for u in plan.uses if u.technique in _KERNELS), "foreach")
    steps_in_backward = "optimizer-in-backward" in plan
    compile_section = {"components": ["model"]} if "compile" in plan else {}
    return {
        "training": training,
        "parallelism": {**parallelism, **pipeline},
        "activation_checkpoint": _recomputation(plan),
        "optimizer": {
            "implementation": kernel,
            **({"early_step_in_backward": True} if steps_in_backward else {}),
        },
        "compile": {"enable": bool(compile_section), **compile_section},
        **_float8_tables(plan),
    }


def _float8_tables(plan: Plan) -> Sections:
    """Return the tables of torchtitan's float8 converter, table -> setting -> value; {} if the plan has no
    float8-linear. The head is not converted, as in memfit."""
    float8 = plan.get("float8-linear")
    if float8 is None:
        return {}
    converter_settings = {"recipe_name": float8.settings["scaling"], "filter_fqns": ["output"]}
    return {"model": {"converters": ["quantize.linear.float8"]}, "quantize.linear.float8": converter_settings}


def _batches(handover: Handover) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the batch, name -> value, for two tables: (training, parallelism). The latter
    are those of the pipeline's micro-batches, {} without a pipeline. Raises UserError if the batch cannot be
    split into equal parts for the data-parallel ranks and micro-batches."""
    plan, batch_size = handover.plan, handover.config.spec.batch_size
    stages = plan.get("pipeline")
    pipeline_batches = int(stages.settings["micro_batches"]) if stages is not None else 1
    micro_batch_size = split_batch(plan, batch_size)
    training = {"local_batch_size": micro_batch_size * pipeline_batches, "global_batch_size": batch_size}
    if stages is None:
        return training, {}
    return training, {
        "pipeline_parallel_schedule": _SCHEDULES[str(stages.settings["schedule"])][0],
        "pipeline_parallel_microbatch_size": micro_batch_size,
    }


def _recomputation(plan: Plan) -> dict[str, Any]:
    if "selective-checkpointing" in plan:
        return {"mode": "selective", "selective_ac_option": "op"}
    if (use := plan.get("activation-checkpointing")) is None:
        return {"mode": "none"}
    interval = int(use.settings["every"])
    return {"mode": "full"} if interval == 1 else {"mode": "selective", "selective_ac_option": str(interval)}


def toml(settings: Sections) -> str:
    """Return ``settings``, table -> setting -> value, as TOML. Values may be strings, numbers, booleans and
    lists of strings, which have the same form in TOML and JSON."""
    tables = (
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items())
        for name, table in settings.items()
    )
    return "\n".join(tables)


def arguments(settings: Sections) -> Iterator[str]:
    """Yield the lines of torchtitan.args, which are appended to torchtitan v0.3's command line: one option
    each. ``settings``: as `sections` returns them.

    The first line switches CUDA graphs off, which memfit does not predict. The last is
    ``activation-checkpoint:KIND``, the kind of recomputation, which v0.3 takes as a word without dashes.
    disable_loss_parallel, which v0.3 does not have, is left out.
    """
    yield "--training.disable-cuda-graphs"  # memfit does not predict their pools; pipelines refuse them
    for table, options in settings.items():
        for name, value in options.items():
            if table != "activation_checkpoint" and name != "disable_loss_parallel":
                yield _option(f"{table}.{name}", value)
    yield f"activation-checkpoint:{settings['activation_checkpoint']['mode']}"  # selects a variant


def _option(path: str, value: Any) -> str:
    table, _, name = path.partition(".")
    if isinstance(value, bool):
        return f"--{path}" if value else f"--{table}.no-{name.replace('_', '-')}"
    return f"--{path} {','.join(value) if isinstance(value, list) else value}"
