"""ESM-2 encoders (Lin et al. 2023, Science 379:1123) on Hugging Face's layers, for both protein jobs.

Hugging Face's own forward looks at the values of the padding mask (it drops a mask of ones), so its
operators would depend on the data and differ under fake tensors. Here the same layers are called with the
mask as ``(batch, 1, 1, length)``, which always takes one path.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

WINDOW: Final = 15  # residues seen by the input projection, as in PSIPRED (Jones 1999, JMB 292:195)
FEATURES: Final = 41  # one-hot residue (21) and profile (20)
VOCABULARY: Final = 33
PAD, MASK = 1, 32  # token numbers of ESM-2's alphabet


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EsmSize:
    """``length`` in residues (tokens), ``batch_size`` in chains."""

    layers: int
    width: int
    heads: int
    length: int
    batch_size: int

    def with_length(self, length: int, batch_size: int) -> EsmSize:
        return dataclasses.replace(self, length=length, batch_size=batch_size)


# Published ESM-2 shapes (Lin et al. 2023, table S1); the feed-forward part is four times as wide.
PUBLISHED: Final = {
    "8M": EsmSize(layers=6, width=320, heads=20, length=1024, batch_size=8),
    "35M": EsmSize(layers=12, width=480, heads=20, length=1024, batch_size=8),
    "150M": EsmSize(layers=30, width=640, heads=20, length=1024, batch_size=8),
    "650M": EsmSize(layers=33, width=1280, heads=20, length=1024, batch_size=8),
    "3B": EsmSize(layers=36, width=2560, heads=40, length=1024, batch_size=8),
    "15B": EsmSize(layers=48, width=5120, heads=40, length=1024, batch_size=8),
}


def _masked_lm(size: EsmSize) -> Any:
    """Hugging Face's EsmForMaskedLM without the contact head, which neither job trains."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        mask_token_id=MASK,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=max(1026, size.length + 2),
        position_embedding_type="rotary",
        token_dropout=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )
    model = EsmForMaskedLM(config)
    del model.esm.contact_head
    return model


def encode(esm: Any, inputs: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Embedded inputs ``(batch, length, width)`` through the encoder; ``valid`` is False at padding."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
    rotary = esm.rotary_embeddings(inputs, positions)
    encoded = esm.encoder(inputs, attention_mask=valid[:, None, None, :], position_embeddings=rotary)
    return encoded.last_hidden_state  # type: ignore[no-any-return]


class SecondaryStructure(nn.Module):
    """Three-state secondary structure per residue; parameters ``esm.*`` carry ESM-2's own names."""

    def __init__(self, size: EsmSize) -> None:
        super().__init__()
        self.embed = nn.Linear(WINDOW * FEATURES, size.width)
        self.esm = _masked_lm(size).esm
        del self.esm.embeddings
        self.head = nn.Linear(size.width, 3)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, length, 3)`` of features ``(batch, length, 41)``."""
        features = features.to(self.esm.encoder.emb_layer_norm_after.weight.dtype)
        reach = WINDOW // 2
        windows = functional.pad(features, (0, 0, reach, reach)).unfold(1, WINDOW, 1).flatten(2)
        return self.head(encode(self.esm, self.embed(windows), valid))  # type: ignore[no-any-return]


class MaskedLanguageModel(nn.Module):
    """ESM-2's masked language model; all parameters carry Hugging Face's names."""

    def __init__(self, size: EsmSize) -> None:
        super().__init__()
        whole = _masked_lm(size)
        self.esm, self.lm_head = whole.esm, whole.lm_head

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, length, 33)`` of token numbers ``(batch, length)``."""
        embedded = self.esm.embeddings(tokens, attention_mask=valid)
        return self.lm_head(encode(self.esm, embedded, valid))  # type: ignore[no-any-return]
