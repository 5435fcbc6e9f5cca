"""Public configurations by the names that people give to models."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
    "gpt-2-xl": (48, 1600, 25, 25, 64, 6400, 50257, True),
    "gpt-2-large": (36, 1280, 20, 20, 64, 5120, 50257, True),
    "gpt-2-medium": (24, 1024, 16, 16, 64, 4096, 50257, True),
    "gpt-2": (12, 768, 12, 12, 64, 3072, 50257, True),
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
    "gpt-2-1.5b": (48, 1600, 25, 25, 64, 6400, 50257, True),
    "gpt-2-774m": (36, 1280, 20, 20, 64, 5120, 50257, True),
    "gpt-2-762m": (36, 1280, 20, 20, 64, 5120, 50257, True),
    "gpt-2-355m": (24, 1024, 16, 16, 64, 4096, 50257, True),
    "gpt-2-345m": (24, 1024, 16, 16, 64, 4096, 50257, True),
    "gpt-3-125m": (12, 768, 12, 12, 64, 3072, 50257, True),
    "gpt-3-350m": (24, 1024, 16, 16, 64, 4096, 50257, True),
    "gpt-3-760m": (24, 1536, 16, 16, 96, 6144, 50257, True),
    "gpt-3-1.3b": (24, 2048, 16, 16, 128, 8192, 50257, True),
    "gpt-3-2.7b": (32, 2560, 32, 32, 80, 10240, 50257, True),
    "gpt-3-6.7b": (32, 4096, 32, 32, 128, 16384, 50257, True),
    "gpt-3-13b": (40, 5120, 40, 40, 128, 20480, 50257, True),
    "gpt-3-175b": (96, 12288, 96, 96, 128, 49152, 50257, True),
    "codellama-7b": (32, 4096, 32, 32, 128, 11008, 32016, False),
    "codellama-13b": (40, 5120, 40, 40, 128, 13824, 32016, False),
    "codellama-34b": (48, 8192, 64, 8, 128, 22016, 32000, False),
    "llama-2-34b": (48, 8192, 64, 8, 128, 22016, 32000, False),
    "open-llama-3b": (26, 3200, 32, 32, 100, 8640, 32000, False),
    "zephyr-7b": (32, 4096, 32, 8, 128, 14336, 32000, False),
    "baichuan-7b": (32, 4096, 32, 32, 128, 11008, 64000, False),
    "baichuan2-7b": (32, 4096, 32, 32, 128, 11008, 125696, False),
    "baichuan2-13b": (40, 5120, 40, 40, 128, 13696, 125696, False),
    "chatglm3-6b": (28, 4096, 32, 2, 128, 13696, 65024, False),
    "internlm2-20b": (48, 6144, 48, 8, 128, 16384, 92544, False),
    "internlm-20b": (60, 5120, 40, 40, 128, 13824, 103168, False),
    "deepseek-llm-7b": (30, 4096, 32, 32, 128, 11008, 102400, False),
    "deepseek-coder-1.3b": (24, 2048, 16, 16, 128, 5504, 32256, False),
    "deepseek-coder-6.7b": (32, 4096, 32, 32, 128, 11008, 32256, False),
    "deepseek-coder-33b": (62, 7168, 56, 8, 128, 19200, 32256, False),
    "olmo-1b": (16, 2048, 16, 16, 128, 8192, 50304, True),
    "olmo-7b": (32, 4096, 32, 32, 128, 11008, 50304, False),
    "olmo-2-13b": (40, 5120, 40, 40, 128, 13824, 100352, False),
    "olmo-2-7b": (32, 4096, 32, 32, 128, 11008, 100352, False),
    "olmo-2-32b": (64, 5120, 40, 8, 128, 27648, 100352, False),
    "falcon-180b": (80, 14848, 232, 8, 64, 59392, 65024, True),
    "stablelm-3b-4e1t": (32, 2560, 32, 32, 80, 6912, 50304, False),
    "smollm3-3b": (36, 2048, 16, 4, 128, 11008, 128256, True),
    "minicpm-2b": (40, 2304, 36, 36, 64, 5760, 122753, True),
    "yi-9b": (48, 4096, 32, 4, 128, 11008, 64000, False),
    "olmoe-1b-7b": (16, 2048, 16, 16, 128, 1024, 50304, False),
    "gpt-oss-20b": (24, 2880, 64, 8, 64, 2880, 201088, False),
    "gpt-oss-120b": (36, 2880, 64, 8, 64, 2880, 201088, False),
    "deit-tiny": (12, 192, 3, 3, 64, 768, 1000, False),
    "deit-small": (12, 384, 6, 6, 64, 1536, 1000, False),
    "deit-base": (12, 768, 12, 12, 64, 3072, 1000, False),
    "vit-so400m": (27, 1152, 16, 16, 72, 4304, 1000, False),
    "esm2-8m": (6, 320, 20, 20, 16, 1280, 33, True),
    "esm2-35m": (12, 480, 20, 20, 24, 1920, 33, True),
    "esm2-150m": (30, 640, 20, 20, 32, 2560, 33, True),
    "esm2-650m": (33, 1280, 20, 20, 64, 5120, 33, True),
    "esm2-3b": (36, 2560, 40, 40, 64, 10240, 33, True),
    "esm2-15b": (48, 5120, 40, 40, 128, 20480, 33, True),
}


# Mixtures of experts among them: experts, of which a token takes, width of an expert.
_PUBLIC_MOE: Mapping[str, tuple[int, int, int]] = {
    "mixtral-8x7b": (8, 2, 14336),
    "mixtral-8x22b": (8, 2, 16384),
    "qwen3-30b-a3b": (128, 8, 768),
    "qwen3-235b-a22b": (128, 8, 1536),
    "olmoe-1b-7b": (64, 8, 1024),
    "gpt-oss-20b": (32, 4, 2880),
    "gpt-oss-120b": (128, 4, 2880),
}


def plain(name: str) -> str:
    """``Meta-Llama-3.1-8B``, ``llama 3.1 8b``, ``8B Llama 3.1`` and ``Llama-3.1-like 8B`` are the same."""
    joined = re.sub(r"[\s_/]+", "-", name.strip().lower())
    joined = joined.replace("meta-llama-", "llama-").replace("llama-1-", "llama-")
    joined = re.sub(r"-(like|style|based|type)(?=-|$)", "", joined)
    joined = re.sub(r"^(\d+(?:\.\d+)?[bm])-(.+)$", r"\2-\1", joined)
    joined = re.sub(r"\bqwen-(?=\d(\.\d)?-)", "qwen", joined).replace("esm-2", "esm2")
    joined = re.sub(r"\b(code|open)-llama\b", r"\1llama", joined).replace("openllama", "open-llama")
    return re.sub(r"\b(llama|gemma|phi|gpt)(?=\d)", r"\1-", joined)


def public(model: str) -> tuple[int, int, int, int, int, int, int, bool] | None:
    """The longest public name that the model's name contains."""
    name = public_name(model)
    return _PUBLIC[name] if name else None


def public_name(model: str) -> str:
    """Not inside a longer word or number: neither distilbert-base nor 1.7b are others' names."""
    name = plain(model)
    found = [k for k in _PUBLIC if re.search(rf"(?<![a-z0-9.]){re.escape(k)}(?![a-z0-9]|\.\d)", name)]
    return max((k for k in found if _of_stated_size(k, name)), key=len, default="")


def _of_stated_size(key: str, name: str) -> bool:
    """A name that tells no size is one model's, and no other size's of its family: GPT-2 13B is not GPT-2."""
    stated = re.search(r"(?<![a-z0-9.x])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name)
    if stated is None or re.search(r"\d[bm](?![a-z0-9])", key):
        return True
    layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied = _PUBLIC[key]
    block = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * ffn
    count = layers * block + vocab * hidden * (1 if tied else 2)
    wanted = float(stated[1]) * (1e9 if stated[2] == "b" else 1e6)
    return 1 / _NEAR < count / wanted < _NEAR


_NEAR = 2.0


def public_experts(model: str) -> tuple[int, int, int] | None:
    """(experts, of which a token takes, width of one) of a public mixture of experts."""
    return _PUBLIC_MOE.get(public_name(model))
