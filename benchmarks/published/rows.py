"""A row of the file read into what memfit can express, by what its free text says."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from memfit.types.errors import UserError
from published import words
from published.adapters import Lora
from published.arch import Arch, arch_of
from published.quantities import GIB, amount, batch, degree, devices, unit, whole


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``kind``: "allocated", "reserved", "device" (context and libraries included) or "resident" (after
    forward). ``sure``: the unit is stated."""

    kind: str
    size_bytes: float
    sure: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run as its source describes it. ``code``: whose modules. ``parameters``, ``compute``: dtypes;
    ``sharding``: "", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"; ``recompute``: "", "full",
    "operators", "inside" or "every-k"; ``optimizer``: "adamw", "adamw-8bit", "adamw-4bit", "sgd", ..."""

    row: Mapping[str, str]
    code: str
    arch: Arch | None
    measured: Measured | None
    length: int
    micro_batch: int
    micro_batches: int
    parameters: str
    compute: str
    float8: bool
    optimizer: str
    fused: bool
    lora: Lora | None
    sharding: str
    reshard: bool
    replicas: int
    recompute: str
    compiled: bool
    ranks: Mapping[str, int]  # dp, tp, pp, vp, cp, ep
    sequence_parallel: bool
    offload: frozenset[str]

    @property
    def id(self) -> str:
        return self.row["id"]


COLUMNS = (
    "id",
    "group",
    "scope",
    "quality",
    "model",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "ffn",
    "vocab",
    "tied_emb",
    "moe",
    "extra_arch",
    "method",
    "lora",
    "gpu",
    "gpu_mem_gb",
    "n_gpus",
    "dp",
    "zero_fsdp",
    "tp",
    "pp",
    "vp",
    "cp",
    "ep",
    "sp",
    "precision",
    "optimizer",
    "seq_len",
    "micro_batch",
    "grad_accum",
    "global_batch",
    "act_ckpt",
    "compile",
    "attn_impl",
    "offload",
    "mem_value",
    "mem_unit",
    "mem_gib",
    "mem_metric",
    "software",
    "source",
    "notes",
)


def read(path: Path) -> list[dict[str, str]]:
    """Rows with every column that is looked at. Raises UserError, once, for a file that is not so."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows = [{k: (v or "").strip() for k, v in r.items() if isinstance(k, str)} for r in table]
            columns = tuple(table.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot read {path}: {what}", hint="give a CSV file in UTF-8") from None
    if not columns:
        raise UserError(f"{path} is empty", hint="a header and one run a line are expected")
    if missing := [c for c in COLUMNS if c not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}", hint="see the columns of published.csv")
    if not rows:
        raise UserError(f"{path} has no rows", hint="one run a line below the header")
    return rows


def setup_of(row: Mapping[str, str]) -> Setup:
    code = _code(row)
    data = _data_ranks(row)
    precision, sharding = row["precision"].lower(), words.sharding(row["zero_fsdp"], data, when(row))
    parameters, compute = words.dtypes(precision, code, sharding)
    offload = words.offload(row["offload"], row["notes"], sharding)
    if sharding.startswith("zero") and "optimizer" in offload and data == 1:
        parameters = (
            compute  # ZeRO-Offload on one device: the float32 copy is the optimizer's, in host memory
        )
    length = whole(row["seq_len"])
    if (row["micro_batch"] or "").strip() == "0":
        raise UserError("micro_batch is 0", hint="leave it blank where it is not known")
    micro = whole(row["micro_batch"]) or _micro_batch(row, data, length)
    return Setup(
        row=row,
        code=code,
        arch=_arch(row, code),
        measured=measured_of(row),
        length=length,
        micro_batch=micro,
        micro_batches=whole(row["grad_accum"]) or _accumulated(row, micro, data, length),
        parameters=parameters,
        compute=compute,
        float8="fp8" in precision or "float8" in precision,
        optimizer="sgd" if code == "nnscaler" else words.optimizer(row["optimizer"]),
        fused=_fused(row, code),
        lora=_lora(row, code, sharding),
        sharding=sharding,
        reshard=words.reshards(row["zero_fsdp"]),
        replicas=words.replicas(row["zero_fsdp"], data),
        recompute=_recompute(row["act_ckpt"], code),
        compiled=words.yes(row["compile"]),
        ranks={k: degree(row, k) for k in ("tp", "pp", "vp", "cp", "ep")} | {"dp": data},
        sequence_parallel=words.yes(row["sp"]),
        offload=offload,
    )


def _data_ranks(row: Mapping[str, str]) -> int:
    """What other kinds of parallelism leave of the devices, where the row does not say."""
    others = 1
    for name in ("tp", "pp", "cp"):
        others *= degree(row, name)
    stated, count = whole(row["dp"]), devices(row["n_gpus"])
    if row["n_gpus"].strip() and not count:
        raise UserError(f"n_gpus is no whole number: {row['n_gpus']!r}")
    if stated and count and stated * others > count:
        raise UserError(f"{stated * others} ranks (dp x tp x pp x cp) on n_gpus {row['n_gpus']!r}")
    return stated or max(1, count // others)


def _arch(row: Mapping[str, str], code: str) -> Arch | None:
    """litgpt keeps the head apart from the embedding unless it is asked to tie them."""
    arch = arch_of(row)
    return dataclasses.replace(arch, tied=False) if arch and code in ("litgpt", "thunder") else arch


def _micro_batch(row: Mapping[str, str], data: int, length: int) -> int:
    """What the whole batch says, where the row tells how often it is accumulated."""
    accumulated = whole(row["grad_accum"])
    return batch(row, length) // (data * accumulated) if accumulated else 0


def _accumulated(row: Mapping[str, str], micro: int, data: int, length: int) -> int:
    samples = batch(row, length)
    return max(1, samples // (micro * data)) if samples and micro else 1


_CODES: tuple[tuple[str, str], ...] = (
    (r"af2-.*nnscaler", "nnscaler"),
    (r"evoformer|extra-msa|alphafold|openfold|uni-?fold", "evoformer"),
    (r"torchtitan", "titan"),
    (r"torchtune", "tune"),
    (r"thunder", "thunder"),
    (r"litgpt", "litgpt"),
    (r"timm|\bvit\b|vit[-_]|deit", "vision"),
    (
        r"simumax|megatron|mcore|primus|nemo|transformer[- ]engine|\bte\b|internevo|bloom|korthikanti",
        "megatron",
    ),
    (
        r"hf trainer|transformers|hugging ?face|\btrl\b|qwen|axolotl|llama-?factory|fms|peft|deepspeed",
        "hf",
    ),
)


_PART = r"evoformer|stack|block|extra-?\W?msa|trunk"


def _code(row: Mapping[str, str]) -> str:
    """The most telling columns first; a plain decoder of Hugging Face's kind where nothing is said."""
    folds = re.search(r"alphafold|openfold", row["model"].lower()) and row["scope"] == "train_step"
    if folds and not re.search(_PART, row["model"].lower()):
        return "fold"
    for columns in (("model", "group"), ("software", "source", "notes"), ("optimizer", "extra_arch")):
        text = " ".join(row.get(c, "") for c in columns).lower()
        for pattern, named in _CODES:
            if re.search(pattern, text) and not (named == "hf" and columns[0] == "model"):
                code = "hf" if named == "megatron" and _only_layers(row, text) else named
                return _kernels(row["notes"].lower()) if code == "hf" else code
    return "hf"


def _only_layers(row: Mapping[str, str], text: str) -> bool:
    """Transformer Engine's layers in a trainer of Hugging Face's kind, with torch's own optimizer."""
    own = re.search(r"simumax|megatron|mcore|primus|nemo|internevo|bloom|korthikanti", text)
    trainer = r"accelerate\b|hf trainer|\btrl\b|torch\.optim|transformers\b"
    return own is None and bool(re.search(trainer, f"{row['software']} {row['optimizer']}".lower()))


def _kernels(notes: str) -> str:
    """Hugging Face's modules, or what replaces them: all of Liger's kernels, or fms-acceleration's."""
    if "foak" in notes:
        return "foak"
    return "liger" if re.search(r"liger", notes) else "hf"


def _fused(row: Mapping[str, str], code: str) -> bool:
    """torchtitan's configurations of 2024 and later say fused; its first ones and most others do not."""
    text = f"{row['optimizer']}".lower()
    if "foreach default" in text and "fused" in text:
        return code == "titan"
    return "fused" in text


_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
_ROLES: Mapping[str, tuple[str, ...]] = {
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "projection": ("o",),
    "mlp": _MLP,
    "ffn": _MLP,
    "head": ("head",),
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "c_attn": ("q", "k", "v"),
    "attn c_proj": ("o",),
    "w1": ("gate",),
    "w2": ("up",),
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
    "gate_up_proj": ("gate", "up"),
    "w_pack": ("q", "k", "v"),
    "qkv": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "lm_head": ("head",),
    "query_key_value": ("q", "k", "v"),
    "dense_h_to_4h": ("gate", "up"),
    "dense_4h_to_h": ("down",),
    "fc1": ("gate", "up"),
    "fc2": ("down",),
    "out_proj": ("o",),
    "attn": _ATTENTION,
    "output": ("head",),
    "all linear": _ATTENTION + _MLP,
    "all-linear": _ATTENTION + _MLP,
    "all": _ATTENTION + _MLP,
    "attention": _ATTENTION,
    "linear layers": _ATTENTION + _MLP,
}


def _lora(row: Mapping[str, str], code: str, sharding: str) -> Lora | None:
    text = f"{row['lora']} {row['method']}".lower()
    if "lora" not in row["method"].lower() and not row["lora"]:
        return None
    rank = re.search(r"\br(?:ank)?\W{0,3}(\d+)|rank\W{0,3}(\d+)", text)
    dropout = re.search(r"dropout\W{0,3}(0?\.\d+)", text)
    outside = re.sub(r"\(.*?\)", "", row["lora"].lower())
    targets = _targets(outside) or _targets(row["lora"].lower())
    base = "nf4" if re.search(r"nf4|fp4|int4|4-?bit|qlora", text) else ""
    return Lora(
        rank=int(rank[1] or rank[2]) if rank else 8,
        targets=frozenset(targets or {"q", "v"}),
        dropout=float(dropout[1]) if dropout else 0.05 if code == "litgpt" else 0.0,
        base=base,
        double=bool(base) and code != "tune" and (code != "litgpt" or "dq" in text),
        keeps_input=bool(base) and _holds_inputs(row, code),
        adapter_dtype="float32" if words.wide_adapters(row["precision"]) else "",
        style="litgpt" if code in ("litgpt", "thunder") else "peft",
        stored=bool(base) and bool(sharding) and _data_ranks(row) > 1,
    )


def _targets(text: str) -> set[str]:
    named = (roles for word, roles in _ROLES.items() if re.search(rf"(?<![\w-]){word}(?![\w-])", text))
    return {role for roles in named for role in roles}


def _holds_inputs(row: Mapping[str, str], code: str) -> bool:
    """bitsandbytes before 0.43.2 (its release notes); litgpt of 2023 and 2024 asked for 0.41 and 0.42."""
    version = re.search(r"(?:bnb|bitsandbytes)\s*(\d+)\.(\d+)\.(\d+)", row["software"].lower())
    if version is None:
        return code == "litgpt"
    return (int(version[1]), int(version[2]), int(version[3])) < (0, 43, 2)


def _recompute(text: str, code: str) -> str:
    """Selective recomputation without more is Megatron's of attention, elsewhere torch's by operator."""
    found = words.recompute(text)
    of_attention = code == "megatron" or re.search("attn|attention", text.lower())
    return "operators" if found == "attention" and not of_attention else found


def measured_of(row: Mapping[str, str]) -> Measured | None:
    """Raises UserError where what is given is no size."""
    value, base = amount(row["mem_value"]), unit(row["mem_unit"], row["mem_value"])
    if row["mem_gib"]:
        if not amount(row["mem_gib"]):
            raise UserError(f"mem_gib is no number: {row['mem_gib']!r}")
        size, sure = amount(row["mem_gib"]) * GIB, True
    elif value and base:
        size, sure = value * base[0], base[1]
    elif row["mem_value"]:
        raise UserError(f"mem_value {row['mem_value']!r} with mem_unit {row['mem_unit']!r} is no size")
    else:
        return None
    return Measured(kind=_kind(row["mem_metric"].lower()), size_bytes=size, sure=sure)


def _kind(metric: str) -> str:
    for pattern, kind in (
        (r"resident after", "resident"),
        (r"nvidia-?smi|rocm-?smi|nvml|gpustat|nvtop|nvitop", "device"),
        (r"reserved|cached", "reserved"),
        (r"alloc|active", "allocated"),
    ):
        if re.search(pattern, metric):
            return kind
    return "unstated"


# Stable releases of torch, from its release notes: (minor of 2, year, month).
_TORCH_2 = (
    (0, 2023, 3),
    (1, 2023, 10),
    (2, 2024, 1),
    (3, 2024, 4),
    (4, 2024, 7),
    (5, 2024, 10),
    (6, 2025, 1),
    (7, 2025, 4),
    (8, 2025, 8),
    (9, 2025, 10),
    (10, 2026, 1),
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_SEASONS = {"early": 2, "mid": 6, "late": 11}


def when(row: Mapping[str, str]) -> tuple[int, int] | None:
    """(year, month) of the software, from dates or torch's version in the row; None: not told."""
    for text in (row["software"].lower(), row["group"].lower(), row["source"].lower()):
        if found := re.search(
            r"(20[12]\d)[-.]?([01]\d)(?!\d)[-.]?", re.sub(r"dev(20\d{4})\d\d", r"\1", text)
        ):
            return int(found[1]), int(found[2])
        if found := re.search(rf"\b({'|'.join(_MONTHS)})[a-z]*\.?\s+(20[12]\d)\b", text):
            return int(found[2]), _MONTHS.index(found[1]) + 1
        if found := re.search(r"\b(early|mid|late)[- ](20[12]\d)\b", text):
            return int(found[2]), _SEASONS[found[1]]
        if found := re.search(r"torch\s*2\.(\d+)(?:\.\d+)?(a0|\.?dev)?", text):
            minor = int(found[1]) - (1 if found[2] else 0)  # built before that release: after the one before
            return next(((y, m) for n, y, m in reversed(_TORCH_2) if n <= minor), None)
        if found := re.search(r"\b(20[12]\d)\b", text):
            return int(found[1]), 6
    return None


def before_torch_2(setup: Setup) -> bool:
    """torch 2.0 came in March 2023: foreach optimizers on CUDA, gradients set to None."""
    told = when(setup.row)
    return bool(re.search(r"torch 1\.", setup.row["software"].lower())) or (
        told is not None and told < (2023, 3)
    )


def card_bytes(row: Mapping[str, str]) -> float:
    """0 where the row does not say."""
    return amount(row["gpu_mem_gb"]) * GIB
