"""A row of the file as a setup that memfit can express. Only the columns that the schema gives to rules
are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from published.adapters import Lora
from published.arch import Arch, Mla, Moe
from published.schema import GIB, Row, assumed, columns, number, settings

RULES = tuple(name for name, column in columns().items() if column.read_by == "rules")
SPEEDS = ("tok_s_gpu", "tok_s_total", "samples_s", "step_time_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """``kind``: "allocated", "reserved", "device" (context and libraries included), "resident" (after
    forward) or "unstated". ``scale``: the number over one device's peak."""

    kind: str
    size_bytes: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run. Fields have the names and values of the schema's columns; ``recompute``, ``sharding`` and
    ``low_precision`` are empty for "none". ``date``: (year, month) of the software; None: the newest.
    ``length``, ``micro_batch``: 0 where the source does not say. ``ranks``: dp, tp, pp, vp, cp, ep."""

    id: str
    scope: str
    code: str
    date: tuple[int, int] | None
    objective: str
    layers: int
    arch: Arch | None
    fold: Mapping[str, str]
    image: Mapping[str, str]
    lora: Lora | None
    measured: Measured | None
    speeds: Mapping[str, float]
    length: int
    lengths: str
    padding_ratio: float
    micro_batch: int
    micro_batches: int
    global_batch: int
    gpu: str
    card_bytes: float
    context_bytes: int | None
    power_limited: bool
    device_count: int
    devices_per_host: int
    interconnect: str
    ranks: Mapping[str, int]
    sequence_parallel: bool
    sharding: str
    reshard: bool
    replicas: int
    engine: str
    parameters: str
    compute: str
    tf32: bool
    low_precision: str
    low_precision_weights: str
    master_weights: bool
    grad_bytes: int
    optimizer: str
    optimizer_kernels: str
    optimizer_in_backward: bool
    keeps_gradients: bool
    recompute: str
    offload: frozenset[str]
    compiled: bool
    attention: str
    loss: str
    overlap: frozenset[str]
    expandable_segments: bool
    launch_blocking: bool

    @property
    def float8(self) -> bool:
        return self.low_precision == "float8"

    def older(self, year: int, month: int) -> bool:
        """Whether the software is known to be from before that month."""
        return self.date is not None and self.date < (year, month)


def setup_of(row: Row) -> Setup:
    """``row``: one without problems. Only its columns for rules are looked at, and ``id``."""
    own = {name: row[name] for name in RULES}
    ranks = {k: int(own[k] or 1) for k in ("tp", "pp", "vp", "cp", "ep")}
    ranks["dp"] = int(own["dp"] or 0) or max(
        1, int(own["n_gpus"]) // math.prod(ranks[k] for k in ("tp", "pp", "cp"))
    )
    micro = int(own["micro_batch"] or 0)
    date = own["software_date"].split("-")
    return Setup(
        id=row["id"],
        date=(int(date[0]), int(date[1])) if own["software_date"] else None,
        layers=int(own["layers"] or 0),
        arch=_arch(own),
        fold=settings(own["fold"]),
        image=settings(own["image"]),
        lora=_lora(own),
        measured=measured_of(own),
        speeds={name: number(own, name) for name in SPEEDS if own[name]},
        length=int(own["seq_len"] or 0),
        padding_ratio=number(own, "padding_ratio") or 1.0,
        micro_batch=micro,
        micro_batches=int(own["grad_accum"] or 0) or _accumulated(own, micro, ranks["dp"]),
        global_batch=int(own["global_batch"] or 0),
        card_bytes=number(own, "gpu_mem_gb") * GIB,
        context_bytes=int(number(own, "context_mib") * 2**20) or None,
        device_count=int(own["n_gpus"]),
        devices_per_host=int(own["gpus_per_host"]),
        ranks=ranks,
        sequence_parallel=own["sp"] == "y",
        sharding="" if own["sharding"] == "none" else own["sharding"],
        reshard=own["reshard"] != "n",
        replicas=int(own["replicas"] or 1),
        compute="float32" if own["compute"] == "tf32" else own["compute"],
        tf32=own["compute"] == "tf32",
        low_precision="" if own["low_precision"] == "none" else own["low_precision"],
        grad_bytes=4 if own["grad_dtype"] == "float32" else 2,
        recompute="" if own["recompute"] == "none" else own["recompute"],
        offload=frozenset(own["offload"].split()),
        compiled=own["compile"] == "y",
        overlap=frozenset(own["overlap"].split()),
        **{name: own[name] for name in _AS_WRITTEN},
        **{name: own[name] == "y" for name in _FLAGS},
    )


_AS_WRITTEN = (
    "scope",
    "code",
    "objective",
    "lengths",
    "gpu",
    "interconnect",
    "engine",
    "parameters",
    "low_precision_weights",
    "optimizer",
    "optimizer_kernels",
    "attention",
    "loss",
)
_FLAGS = (
    "power_limited",
    "master_weights",
    "optimizer_in_backward",
    "keeps_gradients",
    "expandable_segments",
    "launch_blocking",
)


def _accumulated(row: Row, micro: int, data: int) -> int:
    samples = int(row["global_batch"] or 0)
    return max(1, samples // (micro * data)) if samples and micro else 1


def _value(text: str) -> Any:
    """Of a setting: y, a number, or a word."""
    if text == "y":
        return True
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _values(text: str) -> dict[str, Any]:
    return {k: _value(v) for k, v in settings(text).items()}


def _arch(row: Row) -> Arch | None:
    """None where the row does not say how large the model is."""
    if not (row["layers"] and row["hidden"]):
        return None
    layers, hidden = int(row["layers"]), int(row["hidden"])
    head = int(row["head_dim"] or 0)
    heads = int(row["heads"] or 0) or hidden // (head or 128)
    more = _values(row["block"])
    experts = _values(row["experts"])
    if experts:
        more["moe"] = Moe(experts=experts.pop("count"), **experts)
    if row["latent"]:
        more["mla"] = Mla(**_values(row["latent"]))
    return Arch(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(row["kv_heads"] or heads),
        head_dim=head or hidden // heads,
        ffn=int(row["ffn"] or 0),
        vocab=int(row["vocab"] or 0),
        tied=row["tied"] == "y",
        **more,
    )


def _lora(row: Row) -> Lora | None:
    if not row["lora"]:
        return None
    given = _values(row["lora"])
    targets = frozenset(given.pop("targets").split(","))
    style = "litgpt" if row["code"] in ("litgpt", "thunder") else "peft"
    return Lora(targets=targets, style=style, **{"dropout": 0.0, **given})


def measured_of(row: Row) -> Measured | None:
    if not row["mem_gib"]:
        return None
    return Measured(
        kind=row["mem_kind"], size_bytes=number(row, "mem_gib") * GIB, scale=number(row, "mem_scale") or 1.0
    )


def unit_sure(row: Row) -> bool:
    """Whether the source says what its unit is."""
    return "mem_gib" not in assumed(row)
