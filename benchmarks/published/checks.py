"""What a row's own figures say against each other, before anything is predicted (PROTOCOL.md, 2)."""

from __future__ import annotations

import dataclasses
import math

from memfit.catalog.load import network_names
from memfit.types.machine import Device
from published.arch import Arch
from published.predict import card_of
from published.rows import Setup
from published.schema import GIB, Row, number

_PARAMETERS_RATIO, _SPEEDS_RATIO, _CARD_RATIO, _STATE_RATIO = 0.06, 0.05, 1.02, 0.97


def contradictions(row: Row, setup: Setup) -> list[str]:
    """One line each; empty for a row that may be predicted."""
    found = [*_ranks(row, setup), *_formats(setup, card_of(setup))]
    if bool(row["mem_gib"]) != bool(row["mem_kind"]):
        found.append("mem_gib and mem_kind: one of them is empty")
    if (
        row["interconnect"]
        and row["interconnect"] not in network_names()
        and not _is_number(row["interconnect"])
    ):
        found.append(f"interconnect {row['interconnect']!r} is neither a network of the catalog nor GB/s")
    if setup.arch is not None:
        found += _sizes(row, setup, setup.arch)
    return [*found, *_card(setup), *_speeds(row, setup)]


def _ranks(row: Row, setup: Setup) -> list[str]:
    found, ranks = [], setup.ranks
    count = math.prod(ranks[k] for k in ("dp", "tp", "pp", "cp"))
    if setup.scope != "stack" and count != setup.device_count:
        found.append(f"{count} ranks (dp x tp x pp x cp) on {setup.device_count} GPUs")
    samples = setup.micro_batch * setup.micro_batches * ranks["dp"]
    if row["micro_batch"] and row["grad_accum"] and row["global_batch"] and samples != setup.global_batch:
        found.append(
            f"{samples} samples (micro_batch x grad_accum x dp) in a global batch of {setup.global_batch}"
        )
    return found


def _formats(setup: Setup, card: Device | None) -> list[str]:
    if card is None or not card.peak_flops:
        return []
    found = []
    formats = {setup.compute, "float8" if setup.float8 else setup.compute}
    found += [
        f"{card.name} has no products in {name}" for name in sorted(formats) if name not in card.peak_flops
    ]
    if card.name.startswith("V100") and setup.attention in ("flash", "te"):
        found.append(f"{card.name} has no {setup.attention} attention")
    return found


def parameters(arch: Arch, *, active: bool = False, length: int = 0) -> int:
    """Of the whole model; ``active``: those that a token is multiplied with. Biases and norms are left
    out."""
    gates = 3 if arch.mlp.startswith("swiglu") else 2
    attention = 2 * arch.hidden * arch.head_dim * (arch.heads + arch.kv_heads)
    if arch.mla:
        mla, heads = arch.mla, arch.heads
        attention = (
            arch.hidden * (mla.q_rank + mla.kv_rank + mla.rope)
            + mla.q_rank * heads * (mla.nope + mla.rope)
            + mla.kv_rank * heads * (mla.nope + mla.value)
            + heads * mla.value * arch.hidden
        )
    dense = gates * arch.hidden * arch.ffn
    total = arch.layers * (attention + dense)
    if arch.moe:
        width = (arch.moe.top_k if active else arch.moe.experts) * arch.moe.ffn + arch.moe.shared_ffn
        sparse = arch.layers - arch.moe.dense_layers
        total += sparse * (gates * arch.hidden * width - dense)
    ends = 1 if arch.tied or active else 2
    return total + ends * arch.vocab * arch.hidden + arch.learned_positions * length * arch.hidden


def _sizes(row: Row, setup: Setup, arch: Arch) -> list[str]:
    found = []
    if arch.heads % arch.kv_heads:
        found.append(f"heads {arch.heads} is no multiple of kv_heads {arch.kv_heads}")
    if arch.heads % setup.ranks["tp"]:
        found.append(f"heads {arch.heads} cannot be cut into tp {setup.ranks['tp']}")
    if arch.moe and arch.moe.experts % setup.ranks["ep"]:
        found.append(f"{arch.moe.experts} experts cannot be shared by ep {setup.ranks['ep']}")
    stated = number(row, "params_b")
    ties = [dataclasses.replace(arch, tied=tied) for tied in (True, False)]  # sources count either way
    counted = [parameters(a, length=setup.length) / 1e9 for a in ties]
    if stated and arch.ffn and min(abs(c / stated - 1) for c in counted) > _PARAMETERS_RATIO:
        found.append(f"the sizes make {counted[1]:.3g} thousand million parameters, params_b is {stated:g}")
    return [*found, *_state(setup, arch)]


def _state(setup: Setup, arch: Arch) -> list[str]:
    """Weights, gradients and optimizer state that are alive together when the optimizer steps."""
    measured = setup.measured
    if (
        measured is None
        or measured.kind == "resident"
        or setup.scope != "train_step"
        or setup.code == "other"
    ):
        return []
    least, size = least_bytes(setup, arch), measured.size_bytes / measured.scale
    if size >= _STATE_RATIO * least:
        return []
    stated = f"weights, gradients and optimizer state as the row states them are {least / GIB:.4g} GiB"
    return [f"{stated} on each GPU, more than the {size / GIB:.4g} GiB measured"]


def least_bytes(setup: Setup, arch: Arch) -> float:
    """On one GPU, without activations; less where the row leaves it open."""
    ranks, sharding = setup.ranks, setup.sharding
    data = max(1, ranks["dp"] * ranks["cp"] // setup.replicas)
    here = parameters(arch) / (ranks["tp"] * ranks["pp"] * ranks["ep"])
    half = 4 if setup.parameters == "float32" else 2
    weights = 0.0 if "parameters" in setup.offload else half * here
    if sharding in ("zero3", "fsdp1", "fsdp2"):
        weights /= data
    if setup.lora is not None:
        return weights / 4 if setup.lora.base else weights
    grads = 0.0
    if "gradients" not in setup.offload and not setup.optimizer_in_backward and setup.optimizer != "none":
        grads = half * here / (data if sharding in ("zero2", "zero3", "fsdp1", "fsdp2") else 1)
    wide = 4 if setup.master_weights or half == 4 else 2
    state = {"adamw": 2 * wide, "adamw-8bit": 2, "adamw-4bit": 1, "lion": wide, "sgd": wide}.get(
        setup.optimizer, 0
    )
    master = 4 if setup.master_weights and half == 2 else 0
    kept = 0.0 if "optimizer" in setup.offload else (state + master) * here
    return weights + grads + kept / (data if sharding not in ("", "ddp") else 1)


def _card(setup: Setup) -> list[str]:
    measured = setup.measured
    if measured is None or not setup.card_bytes or setup.scope == "analytic_reference":
        return []
    size = measured.size_bytes / measured.scale
    if size <= _CARD_RATIO * setup.card_bytes:
        return []
    return [f"{size / GIB:.4g} GiB on a card of {setup.card_bytes / GIB:g}"]


def _speeds(row: Row, setup: Setup) -> list[str]:
    """Tokens per second and GPU by each published speed, which must agree, and be within the card's peak."""
    speeds, count = setup.speeds, setup.device_count
    samples = setup.global_batch or setup.micro_batch * setup.micro_batches * setup.ranks["dp"]
    tokens = samples * setup.length / setup.padding_ratio
    each = {}
    if "tok_s_gpu" in speeds:
        each["tok_s_gpu"] = speeds["tok_s_gpu"]
    if "tok_s_total" in speeds:
        each["tok_s_total"] = speeds["tok_s_total"] / count
    if "samples_s" in speeds and setup.length and setup.lengths in ("fixed", "packed"):
        each["samples_s"] = speeds["samples_s"] * setup.length / setup.padding_ratio / count
    if "step_time_s" in speeds and tokens and setup.lengths in ("fixed", "packed"):
        each["step_time_s"] = tokens / speeds["step_time_s"] / count
    found = []
    if each and max(each.values()) > (1 + _SPEEDS_RATIO) * min(each.values()):
        told = ", ".join(f"{value:.4g} by {name}" for name, value in each.items())
        found.append(f"published speeds differ: tokens per second and GPU are {told}")
    card = card_of(setup)
    if each and card is not None and setup.arch is not None:
        times = 4 if setup.lora else 6
        name = "float8" if setup.float8 else "tf32" if setup.tf32 else setup.compute
        flops_s = times * parameters(setup.arch, active=True) * max(each.values()) * setup.padding_ratio
        if name in card.peak_flops and flops_s > card.peak_flops[name].value:
            found.append(
                f"the published speed needs {flops_s / 1e12:.4g} TFLOP/s, more than the peak of {card.name}"
            )
    return found


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
