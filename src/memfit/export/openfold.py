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
_CLIPPED: Final = 0.1  # gradient norm in OpenFold's own deepspeed_config.json
_BUCKET_ELEMENTS: Final = 25 * 2**20 // 2  # bf16 gradients in torch's bucket of 25 MiB

_SAID = {"ddp", "zero", "bf16-autocast", "bf16-parameters", "activation-checkpointing"}
_WHY = {
    "chunking": "it has chunks in inference only (tune_chunk_size stops in training)",
    "gradient-accumulation": "--accumulate_grad_batches does not reach its Trainer",
    "activation-offload": "its cpu_checkpointing moves inputs of blocks alone",
}
# Technique -> the settings that OpenFold restricts: (setting, allowed values, reason).
_ONLY: Mapping[str, tuple[tuple[str, tuple[object, ...], str], ...]] = {
    "ddp": (
        ("bucket_mib", (25,), "it is Lightning's DDPStrategy with torch's buckets"),
        ("bucket_view", (False,), "gradients lie beside its buckets"),
    ),
    "zero": (
        ("stage", (1, 2), "its moving average needs whole parameters"),
        ("precision", ("fp32",), "in bf16 it has no float32 islands, as this job needs; bf16-parameters has"),
    ),
    "bf16-parameters": (("rounding", ("master",), "DeepSpeed keeps fp32 masters"),),
    "activation-checkpointing": (("every", (1,), "blocks_per_ckpt recomputes all blocks"),),
}


def files(handover: Handover) -> Files:
    """Return the files of the export. Raises UserError if OpenFold cannot train the plan."""
    if why := tuple(_why_not(handover)):
        raise UserError(f"OpenFold cannot train this plan: {'; '.join(why)}")
    found = {
        **handover.own_files,
        CHANGES: json.dumps(changes(handover), indent=2) + "\n",
        ARGUMENTS: "".join(f"--{name} {value}\n" for name, value in arguments(handover).items()),
    }
    if _by_deepspeed(handover.plan):
        found[DEEPSPEED] = json.dumps(deepspeed(handover), indent=2) + "\n"
    return found


def _why_not(handover: Handover) -> Iterator[str]:
    ref, plan = handover.config.spec.job, handover.plan
    if ref.spec != JOB or _size(handover)[0] not in SIZES:
        yield f"its network is that of {JOB} at --size {' or '.join(SIZES)}"
    for used in plan.uses:
        name = used.technique
        if name not in _SAID:
            yield f"{name}: {_WHY.get(name, 'it has none')}"
        for knob, allowed, why in _ONLY.get(name, ()):
            if used.settings[knob] not in allowed:
                values = " or ".join(json.dumps(v) for v in allowed)
                yield f"{name}: {why}, {knob} must be {values}"
    if handover.config.spec.batch_size % plan.ranks:
        yield f"a batch of {handover.config.spec.batch_size} on {plan.ranks} processes"


def _size(handover: Handover) -> tuple[str, int | None]:
    """Return the job's size and the requested crop in residues, or None for the size's own crop."""
    ref = handover.config.spec.job
    name, _, residues = (ref.size or "tiny").partition("@")
    return name, int(residues) if residues else ref.length


def changes(handover: Handover) -> dict[str, Any]:
    """Return the flat keys of --experiment_config_json. Settings that equal those of the training presets are
    included, to make them visible."""
    size, residues = _size(handover)
    preset = PRESETS[SIZES[size]]
    spec, plan = handover.config.spec, handover.plan
    recomputed = plan.get("activation-checkpointing") is not None
    return {
        "data.train.crop_size": residues or preset.residues,
        "data.train.max_msa_clusters": preset.rows,
        "data.train.max_extra_msa": preset.extra_rows,
        "data.data_module.data_loaders.batch_size": spec.batch_size // plan.ranks,
        CKPT[0]: 1 if recomputed else None,
        EXTRA_CKPT: recomputed,
        "globals.chunk_size": None,
        **{f"globals.{kernel}": False for kernel in KERNELS},
    }


def arguments(handover: Handover) -> dict[str, Any]:
    """Return the arguments of train_openfold.py by name, without their leading dashes."""
    plan = handover.plan
    half = any(plan.get(name) is not None for name in ("bf16-autocast", "bf16-parameters"))
    found: dict[str, Any] = {
        "config_preset": SIZES[_size(handover)[0]],
        "experiment_config_json": CHANGES,
        "precision": "bf16-mixed" if half else "32-true",
        "num_nodes": handover.nodes,
        "gpus": handover.per_node,
        "seed": _SEED,
    }
    return found | ({"deepspeed_config_path": DEEPSPEED} if _by_deepspeed(plan) else {})


def _by_deepspeed(plan: Plan) -> bool:
    """Return whether the plan needs DeepSpeed. Lightning alone also trains bf16 parameters, but without fp32
    masters."""
    return plan.get("zero") is not None or plan.get("bf16-parameters") is not None


def deepspeed(handover: Handover) -> dict[str, Any]:
    """Return DeepSpeed's configuration as memfit's engine writes it, without the settings that Lightning sets
    itself and refuses in the file. bf16 parameters become ZeRO stage 2, as in OpenFold's own file."""
    spec, half = handover.config.spec, handover.plan.get("bf16-parameters") is not None
    if half:
        used = make_use("zero", {"precision": "bf16", "reduce_bucket_elements": _BUCKET_ELEMENTS})
        bare = dataclasses.replace(spec.plan, uses=(used,))
        spec = dataclasses.replace(spec, plan=bare)
    found = config(spec)
    del found["gradient_accumulation_steps"]
    return {"gradient_clipping": _CLIPPED, **found}


def notes(plan: Plan) -> Iterator[str]:
    """Yield what OpenFold does that the plan does not describe."""
    yield "OpenFold hands no number of devices to its Trainer: it takes all that CUDA_VISIBLE_DEVICES shows."
    yield "It keeps a moving average of the parameters beside them, 4 bytes each, which the plan has not."
    yield "Torsion angles of four templates are rows of its MSA too: 132 where the plan has 128, 516 for 512."
    yield "Its loss knows side chains and clashes, memfit's the backbone."
    yield (
        "Extra-MSA rows attend in OpenFold's own kernel, which keeps less than the plan has. "
        "`globals.use_deepspeed_evo_attention` would keep no logits at all; it is off, as in the plan."
    )
    if plan.get("bf16-parameters") is not None:
        yield (
            "DeepSpeed shards gradients, masters and optimizer state over processes (ZeRO stage 2); the plan "
            "has them whole, about 1 GiB."
        )
    if any(plan.get(name) is not None for name in ("bf16-autocast", "bf16-parameters")):
        yield (
            "memfit's plan computes `structure`, `recycle` and `heads` in float32; OpenFold has its own "
            "exceptions, most of them for fp16, and under DeepSpeed bf16 parameters everywhere."
        )
    yield "`memfit plan alphafold2 --from openfold.args` reads these files back, `memfit lint` checks them."
