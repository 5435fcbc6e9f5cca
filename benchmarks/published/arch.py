"""The architecture of a row: its columns, with what the model's family adds to them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from memfit.types.errors import UserError
from published import words


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
    "internlm2-7b": (32, 4096, 32, 8, 128, 14336, 92544, False),
    "llama-3.3-70b": (80, 8192, 64, 8, 128, 28672, 128256, False),
    "vicuna-7b": (32, 4096, 32, 32, 128, 11008, 32000, False),
    "vicuna-13b": (40, 5120, 40, 40, 128, 13824, 32000, False),
    "mistral-nemo": (40, 5120, 32, 8, 128, 14336, 131072, False),
    "mistral-small-24b": (40, 5120, 32, 8, 128, 32768, 131072, False),
    "qwen2-0.5b": (24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2-1.5b": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2-7b": (28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen2-72b": (80, 8192, 64, 8, 128, 29568, 152064, False),
    "qwen1.5-0.5b": (24, 1024, 16, 16, 64, 2816, 151936, True),
    "qwen1.5-1.8b": (24, 2048, 16, 16, 128, 5504, 151936, False),
    "qwen1.5-4b": (40, 2560, 20, 20, 128, 6912, 151936, False),
    "qwen1.5-7b": (32, 4096, 32, 32, 128, 11008, 151936, False),
    "qwen1.5-14b": (40, 5120, 40, 40, 128, 13696, 152064, False),
    "qwen1.5-32b": (64, 5120, 40, 8, 128, 27392, 152064, False),
    "gemma-3-1b": (26, 1152, 4, 1, 256, 6912, 262144, True),
    "gemma-3-4b": (34, 2560, 8, 4, 256, 10240, 262208, True),
    "gemma-3-12b": (48, 3840, 16, 8, 256, 15360, 262208, True),
    "gemma-3-27b": (62, 5376, 32, 16, 128, 21504, 262208, True),
    "phi-3-medium": (40, 5120, 40, 10, 128, 17920, 32064, False),
    "phi-3.5-mini": (32, 3072, 32, 32, 96, 8192, 32064, False),
    "phi-4": (40, 5120, 40, 10, 128, 17920, 100352, False),
    "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152, True),
    "smollm2-360m": (32, 960, 15, 5, 64, 2560, 49152, True),
    "smollm2-1.7b": (24, 2048, 32, 32, 64, 8192, 49152, True),
    "yi-6b": (32, 4096, 32, 4, 128, 11008, 64000, False),
    "yi-34b": (60, 7168, 56, 8, 128, 20480, 64000, False),
    "olmo-2-1124-7b": (32, 4096, 32, 32, 128, 11008, 100352, False),
    "mpt-7b": (32, 4096, 32, 32, 128, 16384, 50368, True),
    "mpt-30b": (48, 7168, 64, 64, 112, 28672, 50368, True),
    "starcoder2-3b": (30, 3072, 24, 2, 128, 12288, 49152, True),
    "starcoder2-7b": (32, 4608, 36, 4, 128, 18432, 49152, True),
    "pythia-70m": (6, 512, 8, 8, 64, 2048, 50304, False),
    "pythia-160m": (12, 768, 12, 12, 64, 3072, 50304, False),
    "pythia-410m": (24, 1024, 16, 16, 64, 4096, 50304, False),
    "pythia-1.4b": (24, 2048, 16, 16, 128, 8192, 50304, False),
    "gpt-neo-125m": (12, 768, 12, 12, 64, 3072, 50257, True),
    "gpt-neo-1.3b": (24, 2048, 16, 16, 128, 8192, 50257, True),
    "gpt-neo-2.7b": (32, 2560, 20, 20, 128, 10240, 50257, True),
    "gpt-j": (28, 4096, 16, 16, 256, 16384, 50400, False),
    "opt-125m": (12, 768, 12, 12, 64, 3072, 50272, True),
    "opt-1.3b": (24, 2048, 32, 32, 64, 8192, 50272, True),
    "opt-2.7b": (32, 2560, 32, 32, 80, 10240, 50272, True),
    "opt-6.7b": (32, 4096, 32, 32, 128, 16384, 50272, True),
    "opt-13b": (40, 5120, 40, 40, 128, 20480, 50272, True),
    "opt-30b": (48, 7168, 56, 56, 128, 28672, 50272, True),
    "opt-66b": (64, 9216, 72, 72, 128, 36864, 50272, True),
    "bloom-560m": (24, 1024, 16, 16, 64, 4096, 250880, True),
    "bloom-1b1": (24, 1536, 16, 16, 96, 6144, 250880, True),
    "bloom-1b7": (24, 2048, 16, 16, 128, 8192, 250880, True),
    "bloom-3b": (30, 2560, 32, 32, 80, 10240, 250880, True),
    "bloom-7b1": (30, 4096, 32, 32, 128, 16384, 250880, True),
    "bloom-176b": (70, 14336, 112, 112, 128, 57344, 250880, True),
    "bert-base": (12, 768, 12, 12, 64, 3072, 30522, True),
    "bert-large": (24, 1024, 16, 16, 64, 4096, 30522, True),
    "distilbert-base": (6, 768, 12, 12, 64, 3072, 30522, True),
    "roberta-base": (12, 768, 12, 12, 64, 3072, 50265, True),
    "roberta-large": (24, 1024, 16, 16, 64, 4096, 50265, True),
    "vit-tiny": (12, 192, 3, 3, 64, 768, 1000, False),
    "vit-small": (12, 384, 6, 6, 64, 1536, 1000, False),
    "vit-base": (12, 768, 12, 12, 64, 3072, 1000, False),
    "vit-large": (24, 1024, 16, 16, 64, 4096, 1000, False),
    "vit-huge": (32, 1280, 16, 16, 80, 5120, 1000, False),
    "vit-s": (12, 384, 6, 6, 64, 1536, 1000, False),
    "vit-b": (12, 768, 12, 12, 64, 3072, 1000, False),
    "vit-l": (24, 1024, 16, 16, 64, 4096, 1000, False),
    "vit-h": (32, 1280, 16, 16, 80, 5120, 1000, False),
    "esm2-t6-8m": (6, 320, 20, 20, 16, 1280, 33, True),
    "esm2-t12-35m": (12, 480, 20, 20, 24, 1920, 33, True),
    "esm2-t30-150m": (30, 640, 20, 20, 32, 2560, 33, True),
    "esm2-t33-650m": (33, 1280, 20, 20, 64, 5120, 33, True),
    "esm2-t36-3b": (36, 2560, 40, 40, 64, 10240, 33, True),
    "esm2-t48-15b": (48, 5120, 40, 40, 128, 20480, 33, True),
}  # fmt: skip


# Mixtures of experts among them: experts, of which a token takes, width of an expert.
_PUBLIC_MOE: Mapping[str, tuple[int, int, int]] = {
    "mixtral-8x7b": (8, 2, 14336), "mixtral-8x22b": (8, 2, 16384),
    "qwen3-30b-a3b": (128, 8, 768), "qwen3-235b-a22b": (128, 8, 1536),
}  # fmt: skip
_SAYS_EXPERTS = r"moe|\d+x\d+b|-a\d+(\.\d+)?b|deepseek-?v[23]|gpt-?oss"


def plain(name: str) -> str:
    """``Meta-Llama-3.1-8B`` and ``llama 3.1 8b`` are the same model."""
    joined = re.sub(r"[\s_/]+", "-", name.strip().lower()).replace("meta-llama-", "llama-")
    joined = re.sub(r"\bqwen-(?=\d(\.\d)?-)", "qwen", joined)
    return re.sub(r"\b(llama|gemma|phi)(?=\d)", r"\1-", joined)


def family_of(model: str) -> dict[str, object]:
    name = plain(model)
    return next((dict(more) for pattern, more in _FAMILIES if re.search(pattern, name)), {})


def public(model: str) -> tuple[int, int, int, int, int, int, int, bool] | None:
    """The longest public name that the model's name contains."""
    name = public_name(model)
    return _PUBLIC[name] if name else None


def public_name(model: str) -> str:
    """Not inside a longer word or number: neither distilbert-base nor 1.7b are others' names."""
    name = plain(model)
    found = [k for k in _PUBLIC if re.search(rf"(?<![a-z0-9.]){re.escape(k)}(?![a-z0-9]|\\.\\d)", name)]
    return max(found, key=len, default="")


def _integer(row: Mapping[str, str], key: str) -> int:
    """0 where the column is blank. Raises UserError where it is no whole number."""
    text = re.sub(r"[,\s]", "", row.get(key, "") or "")
    if text in ("", "-", "?", "none", "n/a"):
        return 0
    if not re.fullmatch(r"\d+(\.0*)?", text):
        raise UserError(f"{key} is no whole number: {row[key]!r}")
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
    if "moe" not in more and (known_moe := _PUBLIC_MOE.get(public_name(row["model"]))):
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
            experts=int(experts[1]), top_k=int(top[1]), ffn=int(width[1]) if width else _integer(row, "ffn"),
            shared_ffn=int(shared[1]) if shared else 0, dense_layers=int(dense[1]) if dense else 0,
        )  # fmt: skip
    if "mla" in text and (rank := re.search(r"kv_lora\s*(\d+)", text)):
        query = re.search(r"q_lora\s*(\d+)", text)
        more["mla"] = Mla(q_rank=int(query[1]) if query else 0, kv_rank=int(rank[1]))
    return more
