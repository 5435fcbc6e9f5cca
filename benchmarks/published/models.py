"""From a setup to a job: the model its source trained, on a batch of the size it says."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch

from memfit.types.errors import UserError
from memfit.types.job import Job
from published.adapters import LinearMaker, freeze
from published.arch import Arch
from published.decoder import FOAK, HUGGING_FACE, LIGER, LITGPT, TITAN, TUNE, Decoder, Dialect
from published.evoformer import stack_job
from published.folding import fold_job
from published.losses import Loss
from published.nnscaler import nnscaler_job
from published.rows import Setup, before_torch_2, when
from published.vision import vit_job

_DIALECTS = {
    "litgpt": LITGPT,
    "thunder": LITGPT,
    "titan": TITAN,
    "tune": TUNE,
    "hf": HUGGING_FACE,
    "liger": LIGER,
    "foak": FOAK,
}


STACKS = {"evoformer": stack_job, "nnscaler": nnscaler_job}

_TENSOR_PARALLEL = {
    "blocks.*.attention.project.*": "colwise",
    "blocks.*.attention.out": "rowwise",
    "blocks.*.mlp.gate": "colwise",
    "blocks.*.mlp.up": "colwise",
    "blocks.*.mlp.down": "rowwise",
}


def job_of(setup: Setup) -> Job:
    """Raises UserError where the row leaves out a size, or names a model that is not expressed here."""
    if made := {**STACKS, "fold": fold_job}.get(setup.code):
        return made(setup)
    if setup.arch is not None and setup.row["scope"] == "activation_only" and not setup.arch.vocab:
        setup = dataclasses.replace(setup, arch=dataclasses.replace(setup.arch, vocab=1024))
        return decoder_job(setup, setup.arch, _DIALECTS["hf"], Loss("hidden"))
    if left_out := re.search(_LEFT_OUT, setup.row["model"].lower()):
        raise UserError(f"networks of {left_out[0]}'s kind are not expressed")
    arch = known(setup)
    if re.search(r"\bbert\b|bert-|roberta", setup.row["model"].lower()):
        needed(setup)
        return bert_job(setup, arch)
    if setup.code == "vision":
        needed(setup, length=False)
        return vit_job(setup, arch)
    if not arch.vocab:
        raise UserError("the row gives no vocab")
    needed(setup)
    if setup.code not in _DIALECTS:
        raise UserError(f"models of {setup.code} are not expressed yet")
    loss = Loss(_loss_kind(setup), alone="longest example stated" in setup.row["notes"].lower())
    dialect = _DIALECTS[setup.code]
    if setup.code == "hf" and (kind := _attention(setup)):
        dialect = dataclasses.replace(dialect, attention=kind)
    if setup.ranks["tp"] > 1:  # which features complex numbers hold is not followed; they are recomputed
        dialect = dataclasses.replace(dialect, rope="half")
    return decoder_job(setup, arch, dialect, loss)


def _attention(setup: Setup) -> str:
    """How Hugging Face's decoder attends; empty: by flash-attn. Until December 2023 it wrote attention out
    unless flash-attn was asked for."""
    text, told = setup.row["attn_impl"].lower(), when(setup.row)
    if re.search(r"eager|unfused|naive|vanilla|(no|not|without) flash|flash\w*\W+(false|off|no|✘)", text):
        return "eager"
    if not text and told is not None and told < (2023, 12):
        return "eager"
    return "sdpa" if "sdpa" in text and "flash" not in text else ""


# Encoders with decoders, convolutions, scans: their sizes are not those of the columns.
_LEFT_OUT = (
    r"\bt5\b|flan-t5|\bmt5|\bbart\b|whisper|wav2vec|hubert|unet|stable.?diffusion|\bsdxl?\b|\bdit\b|resnet|"
    r"resnext|efficientnet|convnext|swin|mamba|rwkv|hyena|\bclip\b|albert|deberta|\bdetr\b|\blstm\b"
)


def known(setup: Setup) -> Arch:
    """Raises UserError where neither the row nor a public configuration gives the sizes."""
    if setup.arch is None:
        blank = " and no ".join(c for c in ("layers", "hidden") if not setup.row[c])
        named = setup.row["model"] or "its model"
        raise UserError(f"the row gives no {blank}, and no public configuration of {named} is known here")
    return setup.arch


def needed(setup: Setup, *, length: bool = True) -> None:
    """Raises UserError that names what is blank or no whole number."""
    values = {"seq_len": setup.length or not length, "micro_batch": setup.micro_batch}
    if blank := [name for name, value in values.items() if not value]:
        told = " and ".join(f"{n} ({setup.row[n]!r})" if setup.row[n] else f"no {n}" for n in blank)
        raise UserError(f"the row gives {told}" if told.startswith("no ") else f"not whole numbers: {told}")


def bert_job(setup: Setup, arch: Arch) -> Job:
    """transformers' own encoder, with heads for masked words and the next sentence where it is pre-trained,
    for classes elsewhere. Attention is written out unless the row names a kernel."""
    from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

    told = " ".join(setup.row[c] for c in ("method", "extra_arch")).lower()
    masked = bool(re.search(r"\bmlm\b|masked|pre-?train", told))
    kernel = re.search(
        r"(?<!un)fused attention|flash|sdpa|mem\w*[\s_-]efficient", setup.row["attn_impl"].lower()
    )
    samples = setup.micro_batch * setup.micro_batches * setup.ranks["dp"]
    config = BertConfig(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        intermediate_size=arch.ffn,
        attn_implementation="sdpa" if kernel else "eager",
        max_position_embeddings=max(512, setup.length),
    )

    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        tokens = torch.zeros(samples, setup.length, dtype=torch.int64)
        classes = torch.zeros(samples, dtype=torch.int64)
        if masked:
            return {"input_ids": tokens, "labels": tokens.clone(), "next_sentence_label": classes}
        return {"input_ids": tokens, "labels": classes}

    def build() -> torch.nn.Module:
        kind: Any = BertForPreTraining if masked else BertForSequenceClassification
        model: torch.nn.Module = kind(config)
        return keeping_gradients(model) if before_torch_2(setup) else model

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=batch,
        loss=lambda model, part: model(**part).loss,
        batch_size=samples,
        blocks="bert.encoder.layer",
    )


def keeping_gradients(model: torch.nn.Module) -> torch.nn.Module:
    """Gradients are zeroed after a step and not let go of, as torch did before 2.0."""
    kept: dict[torch.nn.Parameter, torch.Tensor | None] = {}

    def keep(param: torch.nn.Parameter) -> None:
        kept[param] = param.grad

    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(keep)
    return model


def decoder_job(setup: Setup, arch: Arch, dialect: Dialect, loss: Loss) -> Job:
    samples = setup.micro_batch * setup.micro_batches * setup.ranks["dp"]

    def build() -> torch.nn.Module:
        with default_dtype(setup.parameters):
            sizes = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim)
            linear = LinearMaker(setup.lora, sizes)
            model = freeze(Decoder(arch, dialect, linear, setup.length, loss.inside), setup.lora)
        return keeping_gradients(model) if before_torch_2(setup) else model

    def batch(step: int, seed: int) -> dict[str, torch.Tensor]:
        tokens = torch.zeros(samples, setup.length, dtype=torch.int64)
        return {"tokens": tokens, "targets": tokens.clone()}

    return Job(
        name=setup.id,
        build_model=build,
        make_batch=batch,
        loss=loss,
        batch_size=samples,
        blocks="blocks",
        head="head",
        loss_terms=lambda part: int(part["tokens"].shape[0]),
        tensor_parallel=_TENSOR_PARALLEL,
    )


@contextlib.contextmanager
def default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _loss_kind(setup: Setup) -> str:
    told = when(setup.row)
    if setup.code == "litgpt":
        return "chunked" if setup.lora else "split"
    if setup.code == "thunder":
        return "plain"
    if setup.code == "titan":
        if told is not None and told < (2024, 5):
            return "float-held"
        return "compiled" if setup.compiled and told is not None and told >= (2025, 4) else "float"
    if setup.code == "tune":
        eighths = "eighths-compiled" if setup.compiled else "eighths"
        return "float" if told is not None and told < (2024, 9) else eighths
    return _hugging_face_loss(setup)


def _hugging_face_loss(setup: Setup) -> str:
    text = " ".join(setup.row.get(c, "") for c in ("notes", "extra_arch", "method")).lower()
    if re.search(r"liger|fused linear|chunked nll", text) and "fast ce" not in text.replace(
        "fast ce, rope", ""
    ):
        return "fused-linear"
    if "fast ce" in text:
        return "fast"
    version = re.search(r"transformers\s*[~=v]*\s*(\d+)\.(\d+)", setup.row["software"].lower())
    told = when(setup.row)
    if version is not None:
        number = (int(version[1]), int(version[2]))
        return "padded" if number >= (4, 49) else "shift-14" if number >= (4, 46) else "shift-12"
    if told is None or told < (2024, 11):
        return "shift-12"
    return "padded" if told >= (2025, 3) else "shift-14"
