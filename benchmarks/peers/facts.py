"""What formulas for transformers ask of a run, and where the module for the others is built."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One rank's training step of a transformer. ``params`` count the whole model; ``batch`` is sequences a
    rank and micro-batch; ``states``: dtype of Adam's moments; ``stage``: of ZeRO, FSDP full shard being 3;
    ``gated``: three matrices a feed-forward part; ``block_params``: of one layer."""

    params: int
    block_params: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool
    causal: bool
    length: int
    batch: int
    tied: bool = False
    weights: str = "float32"
    compute: str = "float32"
    states: str = "float32"
    attention_dropout: bool = False
    recompute: str = ""
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    quantized: bool = False
    double: bool = False
    tensor_parallel: int = 1
    pipeline: int = 1
    accumulation: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A row as every peer is asked it. ``build``: how the peer's process makes the job, ("cpu", name),
    ("ranks", name), or ("facts",) from those; ``techniques``: all that the plan changes, by name;
    ``sharding``: "", "ddp", "zero1", "zero2", "zero3", "fsdp2"; ``shape``: of one sample, where a sample
    is one tensor; ``bucket_elements``: ZeRO's buffer, 0 where there is none."""

    name: str
    build: tuple[str, ...]
    techniques: tuple[str, ...]
    compute: str
    batch: int
    ranks: int = 1
    sharding: str = ""
    optimizer: str = "adamw"
    shape: tuple[int, ...] | None = None
    facts: Facts | None = None
    bucket_elements: int = 0

    @property
    def stage(self) -> int:
        """Of ZeRO; FSDP's full shard is 3."""
        return {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}.get(self.sharding, 0)


def to_json(question: Question) -> dict[str, Any]:
    return dataclasses.asdict(question)


def from_json(told: dict[str, Any]) -> Question:
    facts = told["facts"] and Facts(**{**told["facts"], "lora_targets": tuple(told["facts"]["lora_targets"])})
    shape = told["shape"] and tuple(told["shape"])
    return Question(
        **{
            **told,
            "facts": facts,
            "shape": shape,
            "build": tuple(told["build"]),
            "techniques": tuple(told["techniques"]),
        }
    )
