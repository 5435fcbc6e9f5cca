"""What sources write in a column, read as settings: launchers' flags, keys of configuration files and plain
words say the same."""

from __future__ import annotations

import re

_NO = r"n|no|none|false|off|0|disabled|without|not used|w/o|✘|✗|✖|❌|❎"
_YES = r"y|yes|true|on|1|enabled|used|✔|✓|✅"


def yes(text: str) -> bool:
    """``true``, ``Y``, ``torch.compile (inductor)``; not ``n`` and not ``not stated (likely n)``."""
    text = text.strip().lower()
    if not text or re.match(rf"({_NO})(?![a-z\d])|not\b|unknown|n/a|\?", text):
        return False
    return bool(re.match(rf"({_YES})(?![a-z\d])|.*(compile|inductor|autotune|reduce_scatter|parallel)", text))


def tied(text: str) -> bool | None:
    """None where the text does not say."""
    text = text.strip().lower()
    if re.match(rf"({_NO}|untied)(?![a-z\d])", text):
        return False
    return True if re.match(rf"({_YES}|tied|shared)(?![a-z\d])", text) else None


# -- sharding -------------------------------------------------------------------------------------------

_ZERO = r"zero[\s_-]*(?:redundancy)?[\s_-]*(?:optimi[sz]ation|optimizer)?[\s_-]*(?:stage)?[\s:=_-]*"
_STAGE = rf"{_ZERO}([0-3])(?!\d)|(?:^|deepspeed)\W*stage[\s:=_-]*([0-3])"


def sharding(text: str, data: int, told: tuple[int, int] | None) -> str:
    """One of Setup.sharding. ``data``: ranks that it is over; ``told``: the software's year and month, FSDP's
    second version being the usual one since autumn 2024."""
    text = text.lower()
    plain = "ddp" if data > 1 else ""
    if re.search(r"no_?shard", text):
        return "ddp"
    if found := re.search(_STAGE, text):
        stage = found[1] or found[2]
        named = f"zero{stage}" if stage != "0" else plain if "fsdp" not in text else ""
        return ("fsdp2" if "fsdp2" in text else "fsdp1") if "fsdp" in text else named
    if re.search(r"fsdp|hsdp|full[\s_-]*shard|fully[\s_-]*shard|shard_grad|hybrid[\s_-]*shard", text):
        if re.search(r"fsdp\W?2|fully_shard\b", text):
            return "fsdp2"
        first = re.search(r"fsdp\W?1|full_shard|fully[\s_-]shard|shard_grad|hybrid_shard", text)
        return "fsdp1" if first or (told is not None and told < (2024, 9)) else "fsdp2"
    if re.search(r"dist\w*[\s_-]*opt|optimizer[\s_-]*(states?)?[\s_-]*shard|shard\w*[\s_-]optimizer", text):
        return "zero1"
    return plain if not re.search(r"ddp|distributeddataparallel|replicat", text) else "ddp"


def reshards(text: str) -> bool:
    """Whether gathered parameters are freed after forward."""
    late = rf"{_ZERO}2|shard_?grad|reshard_after_forward\W*false|no[\s_-]reshard"
    return not re.search(late, text.lower())


def replicas(text: str, data: int) -> int:
    """Of the sharded model: hybrid sharding is over a host's eight devices and replicated over hosts."""
    hybrid = re.search(r"hsdp|hybrid", text.lower())
    return data // _HOST if hybrid and data > _HOST and data % _HOST == 0 else 1


_HOST = 8


# -- precision ------------------------------------------------------------------------------------------


def half(text: str) -> str:
    """bfloat16 holds the letters of float16."""
    short = re.search(r"(?<!b)(fp16|float16)|(?<!bf)\b16-(mixed|true)", text) and not re.search(
        "bf16|bfloat16", text
    )
    return "float16" if short else "bfloat16"


def dtypes(text: str, code: str, shared: str) -> tuple[str, str]:
    """(parameters' dtype, dtype of the arithmetic) of ``code``'s modules, ``shared`` out by what."""
    text = re.sub(rf"(use_)?amp\W+({_NO})\b|(no|without) (amp|autocast|mixed precision)", "", text.lower())
    low = half(text)
    if re.search(r"^\W*(fp32|float32|tf32|32-(true|bit)|single precision|full precision)", text):
        return "float32", "float32"
    if shared == "fsdp1" and re.search(r"fp32 master|upcast", text):
        return "float32", low
    whole = r"true|pure|full|bf16 param|bf16 base|params and states|weights (in|are) (bf|fp)16|bf16 weights"
    if re.search(rf"{whole}|(?<!adapter_)\bd?type\W+(torch\.)?(bf|fp|bfloat|float)16|torch_dtype", text):
        return low, low
    if re.search(r"amp|mixed|autocast|mp\b|fp32 param|master|upcast", text) or code == "titan":
        return "float32", low
    if code == "fold":  # Lightning's bf16 is autocast
        return "float32", low
    if code in ("evoformer", "nnscaler", "hf", "liger", "foak", "megatron", "thunder", "litgpt", "tune"):
        return low, low
    return "float32", low


def wide_adapters(text: str) -> bool:
    """Adapters of float32 beside a base of half precision, as peft makes them unless asked not to."""
    wide = r"(fp32|float32)\W*(lora|adapter)|adapters?\W+(in |are )?(fp32|float32)"
    return bool(re.search(wide + r"|autocast_adapter_dtype\W+true", text.lower()))


# -- optimizer ------------------------------------------------------------------------------------------


def optimizer(text: str) -> str:
    """One of Setup.optimizer. LAMB keeps what Adam keeps. Those that keep something else are named."""
    text = text.lower()
    for name in ("adafactor", "galore", "muon", "shampoo", "soap", "lomo", "apollo", "adam-mini"):
        if name in text and "adamw" not in text.replace("galore_adamw", ""):
            return name
    if "lion" in text and "adamw" not in text:
        return "lion"
    if "paged" in text:
        return "adamw-paged"
    for bits in ("8", "4"):
        if re.search(rf"{bits}-?bit", text):
            return f"adamw-{bits}bit"
    return "sgd" if re.search(r"\bsgd\b", text) else "adamw"


# -- recomputation --------------------------------------------------------------------------------------

_UNSAID = r"not (stated|captured|given|known)|unknown|unclear|^\W*\?"
_NONE = r"\bno (ac|act|gradient|activation|recomp|check)"
_SWITCHED_OFF = rf"^\W*({_NO})(?![a-z\d])|\b({_NO})\s*$|[✘✗✖❌❎]|{_NONE}"


def recompute(text: str) -> str:
    """One of Setup.recompute; "attention": selective, and not said of what."""
    text = re.sub(r"use_?reentrant\W*(true|false)", "", text.strip().lower())
    if not text or re.search(_SWITCHED_OFF, text):
        return ""
    if re.search(r"finer|chunk", text):
        return "inside"  # of blocks: the model's own code does it
    if found := _every(text):
        return f"every-{found}"
    if re.search(r"selective.*(op\b|ops\b|operator)", text):
        return "operators"
    if re.search(r"selective|\bsac\b", text):
        return "attention"
    whole = r"full|per.*block|recompute|blocks?_per|block|layer|uniform"
    if re.search(whole, text):
        return "full"
    said = re.search(rf"checkpoint|remat|\b(ac|gc)\b|^\W*({_YES})(?![a-z\d])", text)
    return "full" if said and not re.search(_UNSAID, text) else ""


def _every(text: str) -> int:
    """One of how many blocks is recomputed; 0: the text names no such share."""
    if found := re.search(r"every (\d+)|selective\D{0,12}(?<![\d/.])(\d+)(?![\d/.%])|\b1/(\d+)", text):
        return int(next(g for g in found.groups() if g))
    if re.search(r"every (other|second)|selective layer", text):
        return 2
    share = re.search(r"(\d+)\s*%", text)
    return max(1, round(100 / int(share[1]))) if share and int(share[1]) else 0


# -- offload --------------------------------------------------------------------------------------------

_KINDS = {"optimizer": "optimizer", "param": "parameters", "grad": "gradients", "activation": "activations"}


def offload(text: str, notes: str, shared: str) -> frozenset[str]:
    """What is kept in host memory. Where only "CPU offload" is said: all that FSDP keeps; what DeepSpeed's
    optimizer keeps."""
    text = text.strip().lower()
    if re.match(rf"({_NO})(?![a-z\d])", text):
        text = ""
    found = {v for k, v in _KINDS.items() if k in text}
    if text and not found and re.search(rf"offload|cpu|host|^({_YES})(?![a-z\d])", text):
        found = {"optimizer", "gradients"} | ({"parameters"} if shared.startswith("fsdp") else set())
    more = re.search(r"activation offload\w* on\b", notes.lower())
    return frozenset(found | {"activations"} if more else found)
