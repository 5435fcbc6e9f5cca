"""Export for OpenFold: the arguments of train_openfold.py, the JSON of changed settings, and DeepSpeed's
file.

Keys are those of openfold/config.py and train_openfold.py at ce0029e (read 2026-11). A plan that OpenFold
cannot train is refused. What OpenFold does in addition to the plan is listed in the folder's README.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from memfit.engines.deepspeed import config
from memfit.export.base import Files, Handover
from memfit.lint.openfold import CKPT, EXTRA_CKPT, JOB, KERNELS, PRESETS, SIZES
from memfit.techniques.registry import make_use
from memfit.types.errors import UserError
from memfit.types.plan import Plan

ARGUMENTS: Final = "openfold.args"
CHANGES: Final = "openfold.json"
DEEPSPEED: Final = "deepspeed_config.json"
_SEED: Final = 42  # OpenFold requires one if several processes train
_BUCKET_ELEMENTS: Final = 25 * 2**20 // 2  # bf16 gradients in torch's bucket of 25 MiB

_SUPPORTED = {"ddp", "zero", "bf16-autocast", "bf16-parameters", "activation-checkpointing"}
_WHY = {
    "chunking": "OpenFold chunks only in inference (tune_chunk_size stops in training)",
    "gradient-accumulation": "OpenFold's --accumulate_grad_batches does not reach its Trainer",
    "activation-offload": "its cpu_checkpointing moves only the inputs of blocks to the host",
}
# Technique -> the settings that OpenFold restricts: (setting, allowed values, reason).
_ONLY: Mapping[str, tuple[tuple[str, tuple[object, ...], str], ...]] = {
    "ddp": (
        ("bucket_mib", (25,), "it uses Lightning's DDPStrategy with torch's default buckets"),
        ("bucket_view", (False,), "its gradients are separate from its buckets"),
    ),
    "zero": (
        ("stage", (1, 2), "OpenFold's moving average of the parameters needs them whole"),
        (
            "precision",
            ("fp32",),
            "in bf16 it has no float32 islands, modules that this job needs; bf16-parameters has them",
        ),
    ),
    "bf16-parameters": (("rounding", ("master",), "DeepSpeed keeps fp32 masters"),),
    "activation-checkpointing": (("every", (1,), "blocks_per_ckpt recomputes all blocks"),),
}


def files(handover: Handover) -> Files:
    """Return the files of the export, name -> text: openfold.args, openfold.json, deepspeed_config.json if
    the plan needs DeepSpeed, and ``handover.own_files``. Raises UserError, which lists all reasons, if
    OpenFold cannot train the plan or the job."""
    if reasons := tuple(_why_not(handover)):
        raise UserError(
            f"OpenFold cannot train this plan or this job: {'; '.join(reasons)}",
            hint=f"for another job, name {JOB} with --size {' or '.join(SIZES)}; for a technique, `memfit "
            "plan --without TECHNIQUE --save FILE.yaml` writes a plan without it for --plan, or change its "
            "settings in the plan file",
        )
    rendered = {
        **handover.own_files,
        CHANGES: json.dumps(changes(handover), indent=2) + "\n",
        ARGUMENTS: "".join(f"--{name} {value}\n" for name, value in arguments(handover).items()),
    }
    if _by_deepspeed(handover.plan):
        rendered[DEEPSPEED] = json.dumps(deepspeed(handover), indent=2) + "\n"
    return rendered


def _why_not(handover: Handover) -> Iterator[str]:
    ref, plan = handover.config.spec.job, handover.plan
    if ref.spec != JOB or _size(handover)[0] not in SIZES:
        yield f"its only network is that of {JOB} at --size {' or '.join(SIZES)}"
    for use in plan.uses:
        name = use.technique
        if name not in _SUPPORTED:
            yield f"{name}: {_WHY.get(name, 'not supported')}"
        for knob, allowed, reason in _ONLY.get(name, ()):
            if use.settings[knob] not in allowed:
                values = " or ".join(json.dumps(v) for v in allowed)
                yield f"{name}: {reason}, so {knob} must be {values}"
    if handover.config.spec.batch_size % plan.ranks:
        yield f"a batch of {handover.config.spec.batch_size} cannot be split evenly over {plan.ranks} ranks"


def _size(handover: Handover) -> tuple[str, int | None]:
    """Return (the name of the job's size, "tiny" by default; the residues to which chains are cropped). The
    latter are those of a size given as NAME@RESIDUES, otherwise the length that was given; None if neither
    was, which means the size's own number."""
    ref = handover.config.spec.job
    name, _, residues = (ref.size or "tiny").partition("@")
    return name, int(residues) if residues else ref.length


def changes(handover: Handover) -> dict[str, Any]:
    """Return the content of openfold.json, which train_openfold.py reads by --experiment_config_json: dotted
    key -> value. It has the crop, the batch of a rank, recomputation and the choice of kernels. Settings that
    OpenFold's training presets have anyway are included, to make them visible."""
    size, residues = _size(handover)
    preset = PRESETS[SIZES[size]]
    spec, plan = handover.config.spec, handover.plan
    checkpointing = "activation-checkpointing" in plan
    return {
        "data.train.crop_size": residues or preset.residues,
        "data.train.max_msa_clusters": preset.rows,
        "data.train.max_extra_msa": preset.extra_rows,
        "data.data_module.data_loaders.batch_size": spec.batch_size // plan.ranks,
        CKPT[0]: 1 if checkpointing else None,
        EXTRA_CKPT: checkpointing,
        "globals.chunk_size": None,
        **{f"globals.{kernel}": False for kernel in KERNELS},
    }


def arguments(handover: Handover) -> dict[str, Any]:
    """Return the arguments of train_openfold.py, name without leading dashes -> value."""
    plan = handover.plan
    is_bf16 = any(name in plan for name in ("bf16-autocast", "bf16-parameters"))
    arguments_by_name: dict[str, Any] = {
        "config_preset": SIZES[_size(handover)[0]],
        "experiment_config_json": CHANGES,
        "precision": "bf16-mixed" if is_bf16 else "32-true",
        "num_nodes": handover.nodes,
        "gpus": handover.per_node,
        "seed": _SEED,
    }
    return arguments_by_name | ({"deepspeed_config_path": DEEPSPEED} if _by_deepspeed(plan) else {})


def _by_deepspeed(plan: Plan) -> bool:
    """Return whether the plan needs DeepSpeed: it has zero, or bf16-parameters, which Lightning alone trains
    only without fp32 masters."""
    return "zero" in plan or "bf16-parameters" in plan


def deepspeed(handover: Handover) -> dict[str, Any]:
    """Return the content of deepspeed_config.json: what memfit's engine deepspeed writes for the plan, but
    without the accumulation steps, which Lightning sets itself and refuses in the file. A plan with
    bf16-parameters becomes ZeRO stage 2 in bf16, as in OpenFold's own file."""
    spec, is_bf16 = handover.config.spec, "bf16-parameters" in handover.plan
    if is_bf16:
        zero = make_use("zero", {"precision": "bf16", "reduce_bucket_elements": _BUCKET_ELEMENTS})
        plan = dataclasses.replace(spec.plan, uses=(zero,))
        spec = dataclasses.replace(spec, plan=plan)
    settings = config(spec)
    del settings["gradient_accumulation_steps"]
    return settings


def notes(plan: Plan) -> Iterator[str]:
    """Yield the sentences of the README on what OpenFold does that the plan does not describe; the last one
    says how memfit reads the files back."""
    yield "OpenFold gives its Trainer no number of devices: it uses all that CUDA_VISIBLE_DEVICES shows."
    yield "It also keeps a moving average of the parameters, 4 bytes each, which the plan does not include."
    yield "Its MSA also has rows for torsion angles of four templates: 132 for the plan's 128, 516 for 512."
    yield "Its loss covers side chains and clashes; memfit's covers the backbone."
    yield (
        "Attention over extra-MSA rows runs in OpenFold's own kernel, which keeps less than in the plan. "
        "`globals.use_deepspeed_evo_attention` would keep no logits at all; it is off, as in the plan."
    )
    if "bf16-parameters" in plan:
        yield (
            "DeepSpeed shards gradients, masters and optimizer state over processes (ZeRO stage 2); the plan "
            "does not shard them, which is about 1 GiB."
        )
    if any(name in plan for name in ("bf16-autocast", "bf16-parameters")):
        yield (
            "memfit's plan computes `structure`, `recycle` and `heads` in float32; OpenFold has its own "
            "exceptions, most of them for fp16, and with DeepSpeed it has bf16 parameters everywhere."
        )
    yield "`memfit plan alphafold2 --from openfold.args` reads these files back, `memfit lint` checks them."
