"""The architecture of a row: its columns, with what the model's family adds to them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from memfit.types.errors import UserError
from published import words
from published.names import plain, public, public_experts


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
    (r"starcoder-?2", {**_GPT, "tied": True}),
    (r"esm-?[12]", {**_GPT, "tied": True}),
    (r"vit-|deit|bert", _GPT),
    (r"opt-\d", {**_GPT, "mlp": "relu", "rotary": 0.0, "learned_positions": True, "tied": True}),
    (r"gpt|megatron.*\d+b|turing", {**_GPT, "rotary": 0.0, "learned_positions": True, "tied": True}),
)

_SAYS_EXPERTS = r"moe|\d+x\d+b|-a\d+(\.\d+)?b|deepseek-?v[23]|gpt-?oss"


def family_of(model: str) -> dict[str, object]:
    name = plain(model)
    return next((dict(more) for pattern, more in _FAMILIES if re.search(pattern, name)), {})


def _integer(row: Mapping[str, str], key: str) -> int:
    """0 where the column is blank. Raises UserError where it is no whole number above 0."""
    text = re.sub(r"[,\s]", "", row.get(key, "") or "")
    if text in ("", "-", "?", "none", "n/a"):
        return 0
    if not re.fullmatch(r"\d+(\.0*)?", text):
        raise UserError(f"{key} is no whole number: {row[key]!r}")
    if not float(text):
        raise UserError(f"{key} is 0", hint="leave it blank where it is not known")
    return int(float(text))


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
    if size["heads"] % size["kv_heads"] and not given["kv_heads"]:
        size["kv_heads"] = size["heads"]  # the public one's are of another size
    if size["heads"] % size["kv_heads"]:
        raise UserError(f"heads {size['heads']} is no multiple of kv_heads {size['kv_heads']}")
    said = words.tied(row.get("tied_emb", ""))
    more["tied"] = bool(known.get("tied", more.get("tied", False))) if said is None else said
    more |= _extra(row)
    if "moe" not in more and (known_moe := public_experts(row["model"])):
        more["moe"] = Moe(experts=known_moe[0], top_k=known_moe[1], ffn=known_moe[2])
    if "moe" not in more and re.search(_SAYS_EXPERTS, plain(row["model"])):
        raise UserError("the moe column does not give experts, top-k and expert ffn")
    return Arch(**size, **more)  # type: ignore[arg-type]


def _extra(row: Mapping[str, str]) -> dict[str, object]:
    """Free text in ``moe`` and ``extra_arch``."""
    text = f"{row.get('moe', '')}; {row.get('extra_arch', '')}".lower()
    more: dict[str, object] = {}
    if re.search(r"learned (absolute )?pos", text):
        more |= {"learned_positions": True, "rotary": 0.0}
    if re.search(r"\bbiases\b", text):
        more["bias"] = True
    if dropout := re.search(r"dropout\W{0,3}(?:of |p\W{0,3})?(0?\.\d+)", text):
        more["dropout"] = float(dropout[1])
    if (experts := re.search(r"(\d+)\s*experts?", text)) and (top := re.search(r"top[- ]?(\d+)", text)):
        width = re.search(r"expert[- ]ffn\s*(\d+)", text)
        shared = re.search(r"shared\s*(?:ffn\s*)?(\d+)", text)
        dense = re.search(r"(\d+)\s*dense", f"{row['model']} {text}".lower())
        more["moe"] = Moe(
            experts=int(experts[1]),
            top_k=int(top[1]),
            ffn=int(width[1]) if width else _integer(row, "ffn"),
            shared_ffn=int(shared[1]) if shared else 0,
            dense_layers=int(dense[1]) if dense else 0,
        )
    if "mla" in text and (rank := re.search(r"kv_lora\s*(\d+)", text)):
        query = re.search(r"q_lora\s*(\d+)", text)
        more["mla"] = Mla(q_rank=int(query[1]) if query else 0, kv_rank=int(rank[1]))
    return more
