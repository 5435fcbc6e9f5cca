"""The architecture of a decoder, an encoder or a vision transformer."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """``experts`` of width ``ffn``, ``top_k`` of them a token; ``shared_ffn`` is always on; the first
    ``dense_layers`` blocks have an ordinary feed-forward part."""

    experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2): ranks of the two compressions, widths of a head's parts."""

    q_rank: int
    kv_rank: int
    rope: int = 64
    nope: int = 128
    value: int = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """``rotary``: the fraction of a head that is rotated; 0: positions are learned or absent."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    norm: str = "rms"  # or "layer"
    mlp: str = "swiglu"  # or "gelu", "relu"
    bias: bool = False
    qkv_bias: bool = False
    parallel: bool = False
    shared_norm: bool = False
    rotary: float = 1.0
    learned_positions: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    softcap: bool = False
    embedding_norm: bool = False
    dropout: float = 0.0
    moe: Moe | None = None
    mla: Mla | None = None
