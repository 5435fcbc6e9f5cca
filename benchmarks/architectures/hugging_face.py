"""Language models and a vision transformer of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from architectures.common import job, pictures
from memfit.types.job import Job


def _hf(config: str, kind: str, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        return model

    return build


def _text(
    rows: int, length: int, vocabulary: int, *, masked: bool = False, padded: bool = False, decoder: int = 0
) -> Callable[[torch.Generator], Any]:
    def batch(g: torch.Generator) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, vocabulary, (rows, length), generator=g)
        labels = torch.where(torch.rand(rows, length, generator=g) < 0.15, ids, -100) if masked else ids
        if decoder:
            labels = torch.randint(5, vocabulary, (rows, decoder), generator=g)
        out = {"input_ids": ids, "labels": labels}
        if padded:
            lengths = length - 3 * torch.arange(rows)[:, None]
            out["attention_mask"] = (torch.arange(length)[None] < lengths).long()
        return out

    return batch


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def esm() -> Job:
    model = _hf(
        "EsmConfig",
        "EsmForMaskedLM",
        vocab_size=33,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
    )
    return job("esm", model, _text(6, 192, 33, masked=True, padded=True), _own_loss, rows=6)


def gpt2() -> Job:
    model = _hf(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=2048, n_embd=128, n_layer=4, n_head=4, n_positions=256
    )
    return job("gpt2", model, _text(4, 256, 2048), _own_loss, rows=4)


def llama() -> Job:
    model = _hf(
        "LlamaConfig",
        "LlamaForCausalLM",
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=352,
        max_position_embeddings=256,
        use_cache=False,
    )
    return job("llama-gqa", model, _text(4, 160, 4096, padded=True), _own_loss, rows=4)


def bert() -> Job:
    model = _hf(
        "BertConfig",
        "BertForMaskedLM",
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=256,
    )
    return job("bert-dropout", model, _text(6, 160, 1024, masked=True, padded=True), _own_loss, rows=6)


def t5() -> Job:
    model = _hf(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=2048,
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return job(
        "t5", model, _text(4, 128, 2048, padded=True, decoder=64), _own_loss, rows=4, blocks="encoder.block"
    )


def vit() -> Job:
    model = _hf(
        "ViTConfig",
        "ViTForImageClassification",
        image_size=64,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=100,
    )

    def batch(g: torch.Generator) -> dict[str, torch.Tensor]:
        pixels, labels = pictures(16, 64, 100)(g)
        return {"pixel_values": pixels, "labels": labels}

    return job("vit", model, batch, _own_loss, rows=16)
