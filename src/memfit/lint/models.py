"""Find the model that a configuration describes, and the hf: job that builds a model of the same sizes.

Sizes and defaults of Megatron-LM are those of its training/arguments.py at d98e8a6. Flavors of torchtitan are
those of its models at v0.2.2 (models/llama3 and models/qwen3, read 2026-11). Sizes of models of the Hugging
Face Hub are those of their config.json, compared with litgpt/config.py of Lightning-AI/litgpt at 26857050fe3f
(2026-06-29)."""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.catalog.published_models import cached_folder, find_published
from memfit.lint.parse import Options

_GPT2_TOKENS = 50_257
_DROPOUTS = {  # names of the dropout of attention, and of the dropout before each residual addition
    "llama": ("attention_dropout",),
    "gpt_neox": ("attention_dropout", "hidden_dropout"),
    "biogpt": ("attention_probs_dropout_prob", "hidden_dropout_prob"),
}
# Options of Megatron-LM that none of the models here supports -> what they ask for.
_MEGATRON_OTHERS = {
    "num_experts": "experts",
    "multi_latent_attention": "multi-latent attention",
    "squared_relu": "squared ReLU",
    "hybrid_override_pattern": "state-space layers",
    "heterogeneous_layers_config_path": "layers that differ",
}
# Options of Megatron-LM that decide how its model is built, besides layers and width.
_MEGATRON_MODEL = (
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "group_query_attention",
    "num_query_groups",
    "vocab_size",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "swiglu",
    "normalization",
    "position_embedding_type",
    "disable_bias_linear",
    "attention_dropout",
    "hidden_dropout",
    *_MEGATRON_OTHERS,
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """The model that a configuration describes. ``layers`` and ``width``: the number of blocks and the hidden
    size, None if unknown. ``job``: the JOB, as on memfit's command line, that builds such a model, or "" if
    none does; then ``missing`` says why. ``differences``: pairs of (what the job's model does differently, or
    what had to be assumed; what is built or assumed instead). ``options``: names of the options in the
    configuration, besides those of layers and width, that decide how the model is built."""

    layers: int | None
    width: int | None
    job: str = ""
    missing: str = ""
    differences: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


def _job(kind: str, sizes: Mapping[str, Any]) -> str:
    return f"hf:{kind}?{urllib.parse.urlencode({name: json.dumps(value) for name, value in sizes.items()})}"


# -- Megatron-LM -----------------------------------------------------------------------------------------


def of_megatron(given: Options, tensor: int) -> DescribedModel | None:
    """Return the model that Megatron-LM's arguments ``given`` describe, or None if they give neither layers,
    hidden size nor heads. The model has no ``job`` if they give only some of these; if it has parts that
    memfit cannot build, such as experts; or if none of the model types llama, biogpt and gpt_neox of
    transformers computes the same. ``tensor``: the tensor-parallel size, which determines the padding of the
    vocabulary."""
    layers, width, heads = (
        given.size(option) for option in ("num_layers", "hidden_size", "num_attention_heads")
    )
    if not (layers or width or heads):
        return None
    options = tuple(
        f"--{name.replace('_', '-')}" for name in _MEGATRON_MODEL if given.raw(name) and not given.off(name)
    )
    if layers is None or width is None or heads is None:
        missing = "the script does not give all of its sizes"
        return DescribedModel(layers=layers, width=width, missing=missing, options=options)
    unsupported = [
        feature for name, feature in _MEGATRON_OTHERS.items() if given.raw(name) and not given.off(name)
    ]
    if unsupported:
        missing = f"memfit cannot build a model with {', '.join(unsupported)} from a script"
        return DescribedModel(layers=layers, width=width, missing=missing, options=options)
    vocabulary, differences = _vocabulary(given, tensor)
    common = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": not given.on("untie_embeddings_and_output_weights"),
    }
    kind, sizes = _family(given, width, heads)
    if not kind:
        missing = "memfit has no model with this mix of positions, normalization, activation and heads"
        return DescribedModel(layers=layers, width=width, missing=missing, options=options)
    attention, hidden = _dropout(given, "attention_dropout"), _dropout(given, "hidden_dropout")
    if kind == "llama" and hidden:
        differences += ((f"hidden-dropout {hidden:g}", "the model that is predicted has none"),)
    names = _DROPOUTS[kind]
    job = _job(kind, common | sizes | dict(zip(names, (attention, hidden), strict=False)))
    return DescribedModel(layers=layers, width=width, job=job, differences=differences, options=options)


def _dropout(options: Options, name: str) -> float:
    """Return the dropout probability that the option ``name`` sets, or Megatron-LM's default of 0.1 if it is
    not given or unknown."""
    value = options.number(name)
    return 0.1 if value is None else value


def _family(options: Options, width: int, heads: int) -> tuple[str, dict[str, Any]]:
    """Return (the model type of transformers that computes as Megatron-LM would: "llama", "biogpt" or
    "gpt_neox"; settings of its configuration). Among these settings are the size of the feed-forward network
    and the largest length; not among them are layers, hidden size, heads, vocabulary, tied embeddings and
    dropout. Return ("", {}) if no model type computes the same. ``width``: the hidden size; ``heads``: the
    number of attention heads."""
    rotary = options.on("use_rotary_position_embeddings")
    position = options.get("position_embedding_type") or ("rope" if rotary else "learned_absolute")
    gated = options.on("swiglu")
    normalization = str(options.get("normalization") or "LayerNorm")
    default_ffn_size = int(4 * width * 2 / 3 / 64) * 64 if gated else 4 * width
    ffn_size, has_bias = (
        options.size("ffn_hidden_size") or default_ffn_size,
        not options.on("disable_bias_linear"),
    )
    groups = (options.size("num_query_groups") or 1) if options.on("group_query_attention") else heads
    head = options.size("kv_channels") or width // heads
    length = max(options.size("max_position_embeddings") or 1, options.size("seq_length") or 1)
    if (position, gated, normalization) == ("rope", True, "RMSNorm"):
        return "llama", {
            "intermediate_size": ffn_size,
            "num_key_value_heads": groups,
            "head_dim": head,
            "attention_bias": has_bias,
            "mlp_bias": has_bias,
            "max_position_embeddings": length,
        }
    if gated or normalization != "LayerNorm" or groups != heads or head != width // heads:
        return "", {}
    if position == "learned_absolute" and has_bias:
        return "biogpt", {
            "intermediate_size": ffn_size,
            "hidden_act": "gelu",
            "max_position_embeddings": length,
        }
    if position == "rope":
        return "gpt_neox", {
            "intermediate_size": ffn_size,
            "hidden_act": "gelu",
            "use_parallel_residual": False,
            "attention_bias": has_bias,
            "max_position_embeddings": length,
        }
    return "", {}


def _vocabulary(options: Options, tensor: int) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Return (the size of the vocabulary; assumptions, as pairs of what is missing and what is assumed). The
    size is --padded-vocab-size or, without it, --vocab-size rounded up to a multiple of
    --make-vocab-size-divisible-by (by default 128) x ``tensor``, the tensor-parallel size. If neither is
    given, it is GPT-2's 50,257, rounded up in the same way; that is an assumption unless the tokenizer is
    GPT2BPETokenizer."""
    padded_size = options.size("padded_vocab_size")
    if padded_size is not None:
        return padded_size, ()
    count, multiple = (
        options.size("vocab_size"),
        (options.size("make_vocab_size_divisible_by") or 128) * tensor,
    )
    padded = -(-(count or _GPT2_TOKENS) // multiple) * multiple
    if count is not None or options.get("tokenizer_type") == "GPT2BPETokenizer":
        return padded, ()
    return padded, (
        ("the tokenizer's vocabulary", f"the script does not give it: {padded:,} tokens are assumed"),
    )


# -- torchtitan ------------------------------------------------------------------------------------------

_LLAMA3 = {
    "debugmodel": (256, 768, 6, 16, 16),
    "8B": (4096, 14_336, 32, 32, 8),
    "70B": (8192, 28_672, 80, 64, 8),
    "405B": (16_384, 53_248, 126, 128, 8),
}
_QWEN3 = {
    "debugmodel": (256, 3072, 8, 16, 8),
    "0.6B": (1024, 3072, 28, 16, 8),
    "1.7B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12_288, 36, 32, 8),
    "14B": (5120, 17_408, 40, 40, 8),
    "32B": (5120, 25_600, 64, 64, 8),
}
_TIED = ("debugmodel", "0.6B", "1.7B", "4B")  # flavors of Qwen3 with tied embeddings
_ATTENTIONS = re.compile(r"_(flex|varlen)(_attn)?$")  # suffixes of flavors that have the same sizes
_DEBUG_TOKENS = 2048


def of_torchtitan(options: Options) -> DescribedModel | None:
    """Return the model that torchtitan's file names, or None if it gives neither model.name nor model.flavor.
    If it gives only one of them, the other is torchtitan's default, the name llama3 or the flavor debugmodel.
    A model other than llama3 and qwen3, or of a flavor that memfit does not know, has no ``job`` and unknown
    sizes."""
    if not (options.raw("model.name") or options.raw("model.flavor")):
        return None
    name = str(options.get("model.name") or "llama3")
    flavor = str(options.get("model.flavor") or "debugmodel")
    size = _ATTENTIONS.sub("", flavor)
    rows = {"llama3": _LLAMA3, "qwen3": _QWEN3}.get(name, {})
    if size not in rows:
        missing = f"memfit does not know the sizes of torchtitan's {name} {flavor}"
        return DescribedModel(layers=None, width=None, missing=missing)
    width, ffn_size, layers, heads, groups = rows[size]
    tokens = _DEBUG_TOKENS if size == "debugmodel" else 128_256 if name == "llama3" else 151_936
    job = _job(
        name.removesuffix("3") if name == "llama3" else name,
        {
            "hidden_size": width,
            "intermediate_size": ffn_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": tokens,
            "head_dim": width // heads if name == "llama3" else 128,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": name == "qwen3" and size in _TIED,
        },
    )
    differences = (
        (f"torchtitan's {name} {flavor}", "predicted as the model of transformers with the same sizes"),
    )
    return DescribedModel(layers=layers, width=width, job=job, differences=differences)


# -- Hugging Face Hub ------------------------------------------------------------------------------------

# Pattern of the model's name, in lower case and without its owner -> (model type of transformers; width, size
# of the feed-forward network, layers, heads, groups of keys and values, vocabulary; further settings).
_TIED_EMBEDDINGS: Mapping[str, Any] = {"tie_word_embeddings": True}
_HUB: Mapping[str, tuple[str, tuple[int, ...], Mapping[str, Any]]] = {
    r"(codellama-7b-python|llama-?2?-7b)": ("llama", (4096, 11_008, 32, 32, 32, 32_000), {}),
    r"codellama-7b": ("llama", (4096, 11_008, 32, 32, 32, 32_016), {}),
    r"llama-?2?-13b": ("llama", (5120, 13_824, 40, 40, 40, 32_000), {}),
    r"llama-?2-70b": ("llama", (8192, 28_672, 80, 64, 8, 32_000), {}),
    r"llama-?3(\.1)?-8b": ("llama", (4096, 14_336, 32, 32, 8, 128_256), {}),
    r"llama-?3(\.1|\.3)?-70b": ("llama", (8192, 28_672, 80, 64, 8, 128_256), {}),
    r"llama-?3\.2-1b": ("llama", (2048, 8192, 16, 32, 8, 128_256), _TIED_EMBEDDINGS),
    r"llama-?3\.2-3b": ("llama", (3072, 8192, 28, 24, 8, 128_256), _TIED_EMBEDDINGS),
    r"tinyllama[-_]1\.1b": ("llama", (2048, 5632, 22, 32, 4, 32_000), {}),
    r"mistral-7b-(instruct-)?v0\.3": ("mistral", (4096, 14_336, 32, 32, 8, 32_768), {}),
    r"mistral-7b": ("mistral", (4096, 14_336, 32, 32, 8, 32_000), {}),
    r"mixtral-8x7b": ("mixtral", (4096, 14_336, 32, 32, 8, 32_000), {}),
    r"qwen2(\.5)?-0\.5b": ("qwen2", (896, 4864, 24, 14, 2, 151_936), _TIED_EMBEDDINGS),
    r"qwen2(\.5)?-1\.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151_936), _TIED_EMBEDDINGS),
    r"qwen2\.5-3b": ("qwen2", (2048, 11_008, 36, 16, 2, 151_936), _TIED_EMBEDDINGS),
    r"qwen2(\.5)?-7b": ("qwen2", (3584, 18_944, 28, 28, 4, 152_064), {}),
    r"qwen2\.5-14b": ("qwen2", (5120, 13_824, 48, 40, 8, 152_064), {}),
    r"qwen2\.5-32b": ("qwen2", (5120, 27_648, 64, 40, 8, 152_064), {}),
    r"qwen2(\.5)?-72b": ("qwen2", (8192, 29_568, 80, 64, 8, 152_064), {}),
    r"gemma-2-2b": ("gemma2", (2304, 9216, 26, 8, 4, 256_000), {"head_dim": 256}),
    r"gemma-2-9b": ("gemma2", (3584, 14_336, 42, 16, 8, 256_000), {"head_dim": 256}),
    r"gemma-2-27b": ("gemma2", (4608, 36_864, 46, 32, 16, 256_000), {"head_dim": 128}),
    r"gemma-2b": ("gemma", (2048, 16_384, 18, 8, 1, 256_000), {"head_dim": 256}),
    r"gemma-7b": ("gemma", (3072, 24_576, 28, 16, 16, 256_000), {"head_dim": 256}),
    r"phi-3-mini": ("phi3", (3072, 8192, 32, 32, 32, 32_064), {"pad_token_id": 32_000}),
} | {
    rf"qwen3-{re.escape(flavor.lower())}": (
        "qwen3",
        (width, ffn_size, layers, heads, groups, 151_936),
        {"head_dim": 128, **(_TIED_EMBEDDINGS if flavor in _TIED else {})},
    )
    for flavor, (width, ffn_size, layers, heads, groups) in _QWEN3.items()
    if flavor != "debugmodel"
}
_SIZE_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_OTHER_KINDS = re.compile(r"[-_.](vl|vision|awq|gptq|moe|a\d+b|fp8|audio|omni|embedding|reward)\b|\dx\d")


def of_hub(name: str | None, file: str, length: int | None) -> DescribedModel | None:
    """Return the model called ``name`` on the Hugging Face Hub, or in a local folder; None without a name.
    Its configuration is that of the folder that `_local_folder` finds; or that of the model's family and
    size, if memfit knows these; or that of memfit's table of published models. Nothing is downloaded. Without
    any of these, the model has no ``job``. ``layers`` and ``width`` are None if the job is a folder, which is
    not read here, or if there is none. ``length``: tokens per sample, for which a model of a known family
    gets positions; None if unknown."""
    if not name:
        return None
    if (folder := _local_folder(name, file)) is not None:
        return DescribedModel(layers=None, width=None, job=f"hf:{folder}")
    short_name = name.rstrip("/").rpartition("/")[2].lower()
    for pattern, (kind, sizes, further_settings) in _HUB.items():
        is_other = _OTHER_KINDS.search(short_name) and kind != "mixtral"
        if is_other or not re.search(rf"(?<![a-z0-9]){pattern}(?![0-9])", short_name):
            continue
        settings = {**dict(zip(_SIZE_NAMES, sizes, strict=True)), **further_settings}
        if length is not None:
            settings["max_position_embeddings"] = max(length, 4096)
        difference = (name, "predicted for the sizes that memfit knows of this model, with random weights")
        return DescribedModel(
            layers=sizes[2], width=sizes[0], job=_job(kind, settings), differences=(difference,)
        )
    if published := find_published(name):
        repository, model = published
        difference = (name, "predicted for the sizes that memfit knows of this model, with random weights")
        return DescribedModel(
            layers=model.settings.get("num_hidden_layers"),
            width=model.settings.get("hidden_size"),
            job=f"hf:{repository}",
            differences=(difference, *(((name, f"predicted {model.note}"),) if model.note else ())),
        )
    missing = (
        f"{name} is neither a local folder nor in the cache of the Hugging Face Hub, and memfit does not "
        "know its sizes"
    )
    return DescribedModel(layers=None, width=None, missing=missing)


def _local_folder(name: str, file: str) -> Path | None:
    """Return the first of these folders that has a config.json: ``name`` relative to the folder of ``file``,
    ``name`` from the current folder, and the model ``name`` in this machine's cache of the Hub. Return None
    if none has one."""
    try:
        folders = (Path(file).parent / name, Path(name).expanduser(), cached_folder(name))
        return next((f for f in folders if f is not None and (f / "config.json").is_file()), None)
    except (OSError, RuntimeError):  # a name of more than 255 bytes, or "~" of a user who does not exist
        return None
