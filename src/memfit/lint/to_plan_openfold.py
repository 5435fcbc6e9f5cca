"""Convert OpenFold's settings to a Plan for the job alphafold2, and list what no plan can express."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.lint import openfold
from memfit.lint.draft import Draft
from memfit.lint.parse import Options, Setup
from memfit.lint.to_plan_hugging_face import from_deepspeed

_KERNELS = {
    "use_deepspeed_evo_attention": "its kernel keeps no logits and is not in memfit: predicted with them",
    "use_lma": "attention in blocks is not in memfit: predicted with all logits",
    "use_flash": "it is for columns of the MSA only; predicted with their logits",
}
_SECTIONS = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "fp16", "16-true": "fp16"}
_CHANGES = {
    "model.template.average_templates": "memfit's templates are those of the paper",
    "model.template.offload_templates": "memfit keeps templates on the device",
    "model.evoformer_stack.clear_cache_between_blocks": "it lowers reserved memory, not allocated",
    "model.extra_msa.extra_msa_stack.clear_cache_between_blocks": "it lowers reserved memory, not allocated",
}


def from_openfold(setup: Setup, draft: Draft) -> None:
    """Add OpenFold's settings to ``draft``. Raises UserError for values that OpenFold's configuration does
    not accept."""
    half = openfold.precision(setup)
    if setup.deepspeed is not None:
        _with_deepspeed(setup, setup.deepspeed, half, draft)
    else:
        if draft.ranks > 1:
            draft.take("ddp", "DDPStrategy", bucket_view=False)
        _precision(half, draft)
    draft.micro_batch, draft.batch = openfold.batch_size(setup), None
    draft.sized(draft.ranks, None)
    _recomputation(setup, draft)
    draft.size = _size(setup, draft)
    for option, reason in _unsaid(setup):
        draft.leave(option, reason)


def _precision(name: str, draft: Draft) -> None:
    if name in ("bf16-mixed", "16-mixed", "16-true"):
        draft.take("bf16-autocast", f"precision {name}")
        if name != "bf16-mixed":
            draft.leave(f"precision {name}", "predicted as bf16-mixed")
    elif name == "bf16-true":
        draft.take("bf16-parameters", "precision bf16-true", rounding="stochastic")
        draft.leave("precision bf16-true", "it rounds updates; predicted with other rounding, as many bytes")
    elif name != "32-true":
        draft.leave(f"precision {name}", "predicted as 32-true")


def _with_deepspeed(setup: Setup, given: Options, half: str, draft: Draft) -> None:
    """Add DeepSpeed's settings. Lightning enables the half precision that --precision names if DeepSpeed's
    file has no section for it. In memfit the structure module and the heads stay in float32, which its ZeRO
    in bf16 does not support."""
    section = _SECTIONS.get(half)
    on = [s for s in ("bf16", "bfloat16", "fp16") if given.on(f"{s}.enabled")]
    if on or (section is not None and section not in given.data):
        if draft.ranks > 1:
            draft.take("ddp", "DeepSpeed", bucket_view=False)
        draft.take("bf16-parameters", "bf16 parameters with fp32 masters", rounding="master")
        if "fp16" in (on or [section or ""]):
            draft.leave("fp16", "predicted as bf16: as many bytes, without the loss scale")
        draft.leave(
            f"zero_optimization.stage {given.count('zero_optimization.stage') or 0}",
            "beside float32 islands memfit has no ZeRO in bf16: states are predicted whole on each process",
        )
        if str(given.get("zero_optimization.offload_optimizer.device") or "none") != "none":
            draft.leave("offload_optimizer", "predicted on the device")
    else:
        from_deepspeed(setup, draft)
        draft.left_out = [left for left in draft.left_out if left.option != "activation_checkpointing"]
    # Unlike most programs, OpenFold calls deepspeed.checkpointing, so the section has an effect.
    if given.on("activation_checkpointing.cpu_checkpointing"):
        draft.leave("cpu_checkpointing", "inputs of recomputed blocks go to the host; memfit keeps them")


def _recomputation(setup: Setup, draft: Draft) -> None:
    together = openfold.blocks_per_ckpt(setup)
    if together is None:
        if openfold.changed(setup, [openfold.EXTRA_CKPT], True) is True:
            draft.leave(openfold.EXTRA_CKPT, "memfit recomputes all stacks or none")
        return
    draft.take("activation-checkpointing", f"blocks_per_ckpt {together}", every=1)
    if together > 1:
        draft.leave(f"blocks_per_ckpt {together}", "predicted as each block by itself")
    if openfold.changed(setup, [openfold.EXTRA_CKPT], True) is not True:
        draft.leave(f"{openfold.EXTRA_CKPT} false", "memfit recomputes all stacks or none")


def _size(setup: Setup, draft: Draft) -> str:
    """Return the size of the job: a published one, optionally with another crop ("SIZE@RESIDUES"). Return ""
    if the network is not the monomer's."""
    asked, name = openfold.crop(setup), openfold.preset(setup)
    if asked is None:
        draft.leave(f"config_preset {name or 'of a variable'}", "memfit has the monomer's network only")
        return ""
    fine = asked.rows > openfold.PRESETS["initial_training"].rows
    size, like = ("finetune", "finetuning") if fine else ("initial", "initial_training")
    usual = openfold.PRESETS[like]
    for field, key in (("rows", "max_msa_clusters"), ("extra_rows", "max_extra_msa")):
        given, ours = getattr(asked, field), getattr(usual, field)
        if given != ours:
            draft.leave(f"{key} {given}", f"the job has {ours} at size {size}")
    if not asked.templates:
        draft.leave("model.template.enabled false", "the job has four templates at this size")
    return size if asked.residues == usual.residues else f"{size}@{asked.residues}"


def _unsaid(setup: Setup) -> Iterator[tuple[str, str]]:
    for name, reason in _KERNELS.items():
        if openfold.changed(setup, [f"globals.{name}"]) is True:
            yield name, reason
    if (chunk := openfold.changed(setup, ["globals.chunk_size"])) is not None:
        yield f"chunk_size {chunk}", "OpenFold chunks in inference; predicted without"
    for path, reason in _CHANGES.items():
        if openfold.changed(setup, [path]) is True:
            yield path, reason
    yield "ema.decay", "the moving average of parameters, 4 bytes each on the device, is not in the plan"
