"""The architecture of a row: its columns, with what the model's family adds to them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


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
    mlp: str = "swiglu"  # or "gelu"
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


_GPT = {"norm": "layer", "mlp": "gelu", "bias": True}
# What a family's name says beyond sizes; the first pattern that matches the model's name counts.
_FAMILIES: tuple[tuple[str, Mapping[str, object]], ...] = (
    (r"falcon", {**_GPT, "bias": False, "parallel": True, "shared_norm": True, "tied": True}),
    (
        r"pythia|neox|stablelm-(base|tuned)-alpha|stablecode|redpajama|dolly",
        {**_GPT, "parallel": True, "rotary": 0.25},
    ),
    (r"stablelm", {"norm": "layer", "rotary": 0.25}),
    (r"phi-?(1|2)(\D|$)", {**_GPT, "parallel": True, "shared_norm": True, "rotary": 0.5}),
    (r"gemma-?2", {"tied": True, "post_norms": True, "softcap": True}),
    (r"gemma-?3", {"tied": True, "post_norms": True, "qk_norm": True}),
    (r"gemma", {"tied": True}),
    (r"qwen-?3", {"qk_norm": True}),
    (r"qwen", {"qkv_bias": True}),
    (r"olmo-?2", {"qk_norm": True}),
    (r"mpt", {**_GPT, "bias": False, "rotary": 0.0, "tied": True}),
    (r"bloom", {**_GPT, "rotary": 0.0, "tied": True, "embedding_norm": True}),
    (r"gpt-?oss", {"bias": True}),
    (r"gpt-?j", {**_GPT, "parallel": True, "shared_norm": True, "rotary": 0.25}),
    (r"gpt|opt-?\d|megatron.*\d+b|turing", {**_GPT, "rotary": 0.0, "learned_positions": True, "tied": True}),
)

# Public configurations: layers, hidden, heads, key-value heads, head dim, feed-forward, vocabulary, tied.
# Sources: the models' config.json files on the Hugging Face hub.
_PUBLIC: Mapping[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "llama-2-7b": (32, 4096, 32, 32, 128, 11008, 32000, False),
    "llama-2-13b": (40, 5120, 40, 40, 128, 13824, 32000, False),
    "llama-2-70b": (80, 8192, 64, 8, 128, 28672, 32000, False),
    "llama-7b": (32, 4096, 32, 32, 128, 11008, 32000, False),
    "llama-13b": (40, 5120, 40, 40, 128, 13824, 32000, False),
    "llama-30b": (60, 6656, 52, 52, 128, 17920, 32000, False),
    "llama-65b": (80, 8192, 64, 64, 128, 22016, 32000, False),
    "llama-3-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, False),
    "llama-3-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
    "llama-3.1-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
    "llama-3.1-405b": (126, 16384, 128, 8, 128, 53248, 128256, False),
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256, True),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 32000, False),
    "mixtral-8x7b": (32, 4096, 32, 8, 128, 14336, 32000, False),
    "mixtral-8x22b": (56, 6144, 48, 8, 128, 16384, 32768, False),
    "tinyllama": (22, 2048, 32, 4, 64, 5632, 32000, False),
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-3b": (36, 2048, 16, 2, 128, 11008, 151936, True),
    "qwen2.5-7b": (28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen2.5-14b": (48, 5120, 40, 8, 128, 13824, 152064, False),
    "qwen2.5-32b": (64, 5120, 40, 8, 128, 27648, 152064, False),
    "qwen2.5-72b": (80, 8192, 64, 8, 128, 29568, 152064, False),
    "qwen-1.8b": (24, 2048, 16, 16, 128, 5504, 151936, False),
    "qwen-7b": (32, 4096, 32, 32, 128, 11008, 151936, False),
    "qwen-14b": (40, 5120, 40, 40, 128, 13696, 152064, False),
    "qwen-72b": (80, 8192, 64, 64, 128, 24576, 152064, False),
    "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936, True),
    "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936, True),
    "qwen3-4b": (36, 2560, 32, 8, 128, 9728, 151936, True),
    "qwen3-8b": (36, 4096, 32, 8, 128, 12288, 151936, False),
    "qwen3-14b": (40, 5120, 40, 8, 128, 17408, 151936, False),
    "qwen3-32b": (64, 5120, 64, 8, 128, 25600, 151936, False),
    "qwen3-30b-a3b": (48, 2048, 32, 4, 128, 768, 151936, False),
    "qwen3-235b-a22b": (94, 4096, 64, 4, 128, 1536, 151936, False),
    "gemma-2b": (18, 2048, 8, 1, 256, 16384, 256000, True),
    "gemma-7b": (28, 3072, 16, 16, 256, 24576, 256000, True),
    "gemma-2-2b": (26, 2304, 8, 4, 256, 9216, 256000, True),
    "gemma-2-9b": (42, 3584, 16, 8, 256, 14336, 256000, True),
    "gemma-2-27b": (46, 4608, 32, 16, 128, 36864, 256000, True),
    "phi-1.5": (24, 2048, 32, 32, 64, 8192, 51200, False),
    "phi-2": (32, 2560, 32, 32, 80, 10240, 51200, False),
    "phi-3-mini": (32, 3072, 32, 32, 96, 8192, 32064, False),
    "falcon-7b": (32, 4544, 71, 1, 64, 18176, 65024, True),
    "falcon-40b": (60, 8192, 128, 8, 64, 32768, 65024, True),
    "stablelm-base-alpha-3b": (16, 4096, 32, 32, 128, 16384, 50688, False),
    "stablelm-base-alpha-7b": (16, 6144, 48, 48, 128, 24576, 50432, False),
    "pythia-1b": (16, 2048, 8, 8, 256, 8192, 50304, False),
    "pythia-2.8b": (32, 2560, 32, 32, 80, 10240, 50304, False),
    "pythia-6.9b": (32, 4096, 32, 32, 128, 16384, 50432, False),
    "pythia-12b": (36, 5120, 40, 40, 128, 20480, 50688, False),
    "gpt-neox-20b": (44, 6144, 64, 64, 96, 24576, 50432, False),
    "gpt2-xl": (48, 1600, 25, 25, 64, 6400, 50257, True),
    "gpt2-large": (36, 1280, 20, 20, 64, 5120, 50257, True),
    "gpt2-medium": (24, 1024, 16, 16, 64, 4096, 50257, True),
    "gpt2": (12, 768, 12, 12, 64, 3072, 50257, True),
    "internlm-7b": (32, 4096, 32, 32, 128, 11008, 103168, False),
}  # fmt: skip


def plain(name: str) -> str:
    """``Meta-Llama-3.1-8B`` and ``llama 3.1 8b`` are the same model."""
    return re.sub(r"[\s_/]+", "-", name.strip().lower()).replace("meta-llama-", "llama-")


def family_of(model: str) -> dict[str, object]:
    name = plain(model)
    return next((dict(more) for pattern, more in _FAMILIES if re.search(pattern, name)), {})


def public(model: str) -> tuple[int, int, int, int, int, int, int, bool] | None:
    """The longest public name that the model's name contains."""
    name = plain(model)
    found = [k for k in _PUBLIC if k in name]
    return _PUBLIC[max(found, key=len)] if found else None


def _integer(row: Mapping[str, str], key: str) -> int:
    text = re.sub(r"[,\s]", "", row.get(key, "") or "")
    return int(float(text)) if re.fullmatch(r"\d+(\.0*)?", text) else 0


def arch_of(row: Mapping[str, str]) -> Arch | None:
    """Columns first, the public configuration of the named model where a column is blank; None where
    neither says how large the model is."""
    known = dict(
        zip(
            ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied"),
            public(row["model"]) or (),
            strict=False,
        )
    )
    given = {
        k: _integer(row, k) for k in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
    }
    size = {k: v or int(known.get(k, 0)) for k, v in given.items()}
    more = family_of(row["model"])
    if not size["layers"] or not size["hidden"]:
        return None
    size["heads"] = size["heads"] or max(1, size["hidden"] // (size["head_dim"] or 128))
    size["kv_heads"] = size["kv_heads"] or size["heads"]
    size["head_dim"] = size["head_dim"] or size["hidden"] // size["heads"]
    gated = more.get("mlp", "swiglu") == "swiglu"
    size["ffn"] = size["ffn"] or (-(-8 * size["hidden"] // 3 // 256) * 256 if gated else 4 * size["hidden"])
    tied = row.get("tied_emb", "").lower()[:1]
    more["tied"] = tied == "y" if tied in ("y", "n") else bool(known.get("tied", more.get("tied", False)))
    return Arch(**size, **{**more, **_extra(row)})  # type: ignore[arg-type]


def _extra(row: Mapping[str, str]) -> dict[str, object]:
    """Free text in ``moe`` and ``extra_arch``."""
    text = f"{row.get('moe', '')}; {row.get('extra_arch', '')}".lower()
    more: dict[str, object] = {}
    if "learned pos" in text:
        more |= {"learned_positions": True, "rotary": 0.0}
    if re.search(r"\bbiases\b", text):
        more["bias"] = True
    if (experts := re.search(r"(\d+)\s*experts?", text)) and (top := re.search(r"top[- ]?(\d+)", text)):
        width = re.search(r"expert[- ]ffn\s*(\d+)", text)
        shared = re.search(r"shared\s*(?:ffn\s*)?(\d+)", text)
        dense = re.search(r"(\d+)\s*dense", f"{row['model']} {text}".lower())
        more["moe"] = Moe(
            experts=int(experts[1]), top_k=int(top[1]), ffn=int(width[1]) if width else _integer(row, "ffn"),
            shared_ffn=int(shared[1]) if shared else 0, dense_layers=int(dense[1]) if dense else 0,
        )  # fmt: skip
    if "mla" in text and (rank := re.search(r"kv_lora\s*(\d+)", text)):
        query = re.search(r"q_lora\s*(\d+)", text)
        more["mla"] = Mla(q_rank=int(query[1]) if query else 0, kv_rank=int(rank[1]))
    return more
