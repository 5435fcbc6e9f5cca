"""From a setup to a job: the model its source trained, on a batch of the size it says."""

from __future__ import annotations

import contextlib
import dataclasses
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
from published.rows import Setup
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


STACKS = {"openfold": stack_job, "fastfold": stack_job, "nnscaler": nnscaler_job}
HUGGING_FACE_CODES = ("hf", "liger", "foak", "bert")

_TENSOR_PARALLEL = {
    "blocks.*.attention.project.*": "colwise",
    "blocks.*.attention.out": "rowwise",
    "blocks.*.mlp.gate": "colwise",
    "blocks.*.mlp.up": "colwise",
    "blocks.*.mlp.down": "rowwise",
}


def job_of(setup: Setup) -> Job:
    """Raises UserError where the row leaves out a size, or names a model that is not expressed here."""
    if made := {**STACKS, "alphafold2": fold_job}.get(setup.code):
        return made(setup)
    if setup.code == "other":
        raise UserError("networks of this kind are not expressed")
    arch = known(setup)
    if setup.scope == "activation_only" and not arch.vocab:
        return decoder_job(setup, dataclasses.replace(arch, vocab=1024), _DIALECTS["hf"], Loss("hidden"))
    needed(setup, length=setup.code != "timm")
    if setup.code == "timm":
        return vit_job(setup, arch)
    if not arch.vocab:
        raise UserError("the row gives no vocab")
    if setup.code == "bert":
        return bert_job(setup, arch)
    if setup.code not in _DIALECTS:
        raise UserError(f"models of {setup.code} are not expressed yet")
    dialect = _DIALECTS[setup.code]
    if setup.code == "hf" and setup.attention in _WRITTEN_OUT:
        dialect = dataclasses.replace(dialect, attention=_WRITTEN_OUT[setup.attention])
    if setup.ranks["tp"] > 1:  # which features complex numbers hold is not followed; they are recomputed
        dialect = dataclasses.replace(dialect, rope="half")
    loss = Loss(_loss_kind(setup), alone=setup.lengths == "longest")
    return decoder_job(setup, arch, dialect, loss)


_WRITTEN_OUT = {"sdpa": "sdpa", "eager": "eager", "unfused": "eager"}


def known(setup: Setup) -> Arch:
    """Raises UserError where the row does not give the sizes."""
    if setup.arch is None:
        raise UserError("the row gives no layers, or no hidden")
    if not setup.arch.ffn:
        raise UserError("the row gives no ffn")
    return setup.arch


def needed(setup: Setup, *, length: bool = True) -> None:
    """Raises UserError that names what is blank."""
    values = {"seq_len": setup.length or not length, "micro_batch": setup.micro_batch}
    if blank := [name for name, value in values.items() if not value]:
        raise UserError(f"the row gives no {' and no '.join(blank)}")


def bert_job(setup: Setup, arch: Arch) -> Job:
    """transformers' own encoder, with heads for masked words and the next sentence where it is pre-trained,
    for classes elsewhere."""
    from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

    masked = setup.objective == "masked"
    samples = setup.micro_batch * setup.micro_batches * setup.ranks["dp"]
    config = BertConfig(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        intermediate_size=arch.ffn,
        attn_implementation="eager" if setup.attention in ("eager", "unfused") else "sdpa",
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
        return keeping_gradients(model) if setup.keeps_gradients else model

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
        return keeping_gradients(model) if setup.keeps_gradients else model

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
    """One of `Loss`: the row's own, or what the code base does at that date."""
    chunks = "eighths" if setup.code in ("titan", "tune", "litgpt", "thunder") else "fused-linear"
    stated = {"chunked": chunks, "dense": _dense(setup), "fused": "fast"}
    if setup.loss != "code":
        return stated.get(setup.loss, setup.loss)
    if setup.code == "litgpt":
        return "chunked" if setup.lora else "split"
    if setup.code == "thunder":
        return "plain"
    if setup.code == "titan":
        if setup.older(2024, 5):
            return "float-held"
        return "compiled" if setup.compiled and not setup.older(2025, 4) else "float"
    if setup.code == "tune":
        return _dense(setup) if setup.older(2024, 9) else "eighths-compiled" if setup.compiled else "eighths"
    return _dense(setup)


def _dense(setup: Setup) -> str:
    """Hugging Face's changed with 4.46 (October 2024) and 4.49 (February 2025)."""
    if setup.code not in HUGGING_FACE_CODES:
        return "float"
    return "shift-12" if setup.older(2024, 11) else "shift-14" if setup.older(2025, 3) else "padded"
