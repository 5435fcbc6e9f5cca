"""Convert OpenFold's settings to a Plan for the job alphafold2, and list what no plan can express."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.lint import openfold
from memfit.lint.draft import Draft
from memfit.lint.parse import Options, Setup
from memfit.lint.to_plan_hugging_face import from_deepspeed

_KERNELS = {
    "use_deepspeed_evo_attention": "memfit lacks its kernel, which keeps no logits: predicted with logits",
    "use_lma": "memfit does not support attention in blocks: predicted with all logits",
    "use_flash": "it applies only to columns of the MSA; predicted with their logits",
}
_SECTIONS = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "fp16", "16-true": "fp16"}
_CHANGES = {
    "model.template.average_templates": "memfit uses templates as in the paper",
    "model.template.offload_templates": "memfit keeps templates on the device",
    "model.evoformer_stack.clear_cache_between_blocks": "it lowers only reserved memory",
    "model.extra_msa.extra_msa_stack.clear_cache_between_blocks": "it lowers only reserved memory",
}


def from_openfold(setup: Setup, draft: Draft) -> None:
    """Add OpenFold's settings, and those of DeepSpeed's file if there is one, to ``draft``. Settings that no
    plan can express are listed in the draft as left out. Raises UserError for a crop, batch or
    blocks_per_ckpt that is not a whole number above 0; blocks_per_ckpt may also be null."""
    precision = openfold.precision(setup)
    if setup.deepspeed is not None:
        _with_deepspeed(setup, setup.deepspeed, precision, draft)
    else:
        if draft.ranks > 1:
            draft.take("ddp", "DDPStrategy", bucket_view=False)
        _precision(precision, draft)
    draft.micro_batch, draft.batch = openfold.batch_size(setup), None
    draft.set_batch(draft.ranks, None)
    _recomputation(setup, draft)
    draft.size = _size(setup, draft)
    for option, reason in _not_modelled(setup):
        draft.leave(option, reason)


def _precision(name: str, draft: Draft) -> None:
    if name in ("bf16-mixed", "16-mixed", "16-true"):
        draft.take("bf16-autocast", f"precision {name}")
        if name != "bf16-mixed":
            draft.leave(f"precision {name}", "predicted as bf16-mixed")
    elif name == "bf16-true":
        draft.take("bf16-parameters", "precision bf16-true", rounding="stochastic")
        draft.leave(
            "precision bf16-true",
            "it rounds updates; predicted with stochastic rounding, which takes the same number of bytes",
        )
    elif name != "32-true":
        draft.leave(f"precision {name}", "predicted as 32-true")


def _with_deepspeed(setup: Setup, config: Options, precision: str, draft: Draft) -> None:
    """Add DeepSpeed's settings to ``draft``. ``precision``: the full name of Lightning's precision. Lightning
    enables the half precision that it names if DeepSpeed's file has no section for it. With half precision,
    memfit keeps the structure module and the heads in float32, which its ZeRO in bf16 does not support. ZeRO
    is then listed as left out, and in its place bf16 parameters with float32 masters and, for several ranks,
    DDP are added. In float32, the settings are added as `from_deepspeed` does."""
    section = _SECTIONS.get(precision)
    enabled_sections = [s for s in ("bf16", "bfloat16", "fp16") if config.on(f"{s}.enabled")]
    if enabled_sections or (section is not None and section not in config.data):
        if draft.ranks > 1:
            draft.take("ddp", "DeepSpeed", bucket_view=False)
        draft.take("bf16-parameters", "bf16 parameters with fp32 masters", rounding="master")
        if "fp16" in (enabled_sections or [section or ""]):
            draft.leave("fp16", "predicted as bf16: the same number of bytes, without the loss scale")
        draft.leave(
            f"zero_optimization.stage {config.count('zero_optimization.stage') or 0}",
            "memfit's ZeRO in bf16 cannot keep modules in float32, which this job needs: parameters, "
            "gradients and optimizer state are predicted whole on each process",
        )
        if str(config.get("zero_optimization.offload_optimizer.device") or "none") != "none":
            draft.leave("offload_optimizer", "predicted on the device")
    else:
        from_deepspeed(setup, draft)
        draft.left_out = [note for note in draft.left_out if note.option != "activation_checkpointing"]
    # Unlike most programs, OpenFold calls deepspeed.checkpointing, so the section has an effect.
    if config.on("activation_checkpointing.cpu_checkpointing"):
        draft.leave(
            "cpu_checkpointing",
            "OpenFold moves the inputs of recomputed blocks to the host; memfit keeps them on the device",
        )


def _recomputation(setup: Setup, draft: Draft) -> None:
    blocks_per_group = openfold.blocks_per_ckpt(setup)
    if blocks_per_group is None:
        if openfold.changed_value(setup, [openfold.EXTRA_CKPT], True) is True:
            draft.leave(openfold.EXTRA_CKPT, "memfit recomputes all stacks or none")
        return
    draft.take("activation-checkpointing", f"blocks_per_ckpt {blocks_per_group}", every=1)
    if blocks_per_group > 1:
        draft.leave(f"blocks_per_ckpt {blocks_per_group}", "predicted with each block recomputed by itself")
    if openfold.changed_value(setup, [openfold.EXTRA_CKPT], True) is not True:
        draft.leave(f"{openfold.EXTRA_CKPT} false", "memfit recomputes all stacks or none")


def _size(setup: Setup, draft: Draft) -> str:
    """Return the size of the job alphafold2 that has the set-up's crop: "finetune" if the crop has more rows
    of the MSA than the preset initial_training, otherwise "initial"; followed by "@RESIDUES", such as "@320",
    if the crop has another number of residues than the job at that size. Other differences are listed in
    ``draft`` as left out. Return "" if the preset is unknown or its network is not the one for single chains;
    the preset is then listed as left out."""
    crop, name = openfold.crop(setup), openfold.preset(setup)
    if crop is None:
        draft.leave(f"config_preset {name or 'of a variable'}", "memfit supports only the monomer's network")
        return ""
    is_finetuning = crop.rows > openfold.PRESETS["initial_training"].rows
    size, preset_name = ("finetune", "finetuning") if is_finetuning else ("initial", "initial_training")
    default_crop = openfold.PRESETS[preset_name]
    for field, key in (("rows", "max_msa_clusters"), ("extra_rows", "max_extra_msa")):
        value, default_value = getattr(crop, field), getattr(default_crop, field)
        if value != default_value:
            draft.leave(f"{key} {value}", f"the job has {default_value} at size {size}")
    if not crop.templates:
        draft.leave("model.template.enabled false", "the job has four templates at this size")
    return size if crop.residues == default_crop.residues else f"{size}@{crop.residues}"


def _not_modelled(setup: Setup) -> Iterator[tuple[str, str]]:
    for name, reason in _KERNELS.items():
        if openfold.changed_value(setup, [f"globals.{name}"]) is True:
            yield name, reason
    if (chunk := openfold.changed_value(setup, ["globals.chunk_size"])) is not None:
        yield f"chunk_size {chunk}", "OpenFold uses chunks only in inference; predicted without chunks"
    for path, reason in _CHANGES.items():
        if openfold.changed_value(setup, [path]) is True:
            yield path, reason
    yield "ema.decay", "the plan omits the moving average of parameters, 4 bytes per parameter on the device"
