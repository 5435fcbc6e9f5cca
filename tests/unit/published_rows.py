"""Rows of published runs with every column, and the setups they stand for."""

from __future__ import annotations

from published.rows import Setup, setup_of
from published.schema import columns

_PLAIN = {
    "id": "x-1",
    "group": "x",
    "house": "x",
    "link": "https://example.org",
    "model": "x",
    "quality": "A",
    "scope": "train_step",
    "code": "hf",
    "software_date": "2025-01",
    "objective": "causal",
    "layers": "8",
    "hidden": "256",
    "heads": "4",
    "kv_heads": "2",
    "ffn": "512",
    "vocab": "1024",
    "tied": "n",
    "seq_len": "256",
    "lengths": "fixed",
    "micro_batch": "2",
    "gpu": "A100-80GB-SXM",
    "gpu_mem_gb": "80",
    "power_limited": "n",
    "n_gpus": "1",
    "gpus_per_host": "8",
    "sharding": "none",
    "engine": "torch",
    "parameters": "bfloat16",
    "compute": "bfloat16",
    "low_precision": "none",
    "master_weights": "n",
    "grad_dtype": "bfloat16",
    "optimizer": "adamw",
    "optimizer_kernels": "foreach",
    "optimizer_in_backward": "n",
    "keeps_gradients": "n",
    "recompute": "none",
    "compile": "n",
    "attention": "flash",
    "loss": "code",
    "expandable_segments": "n",
    "launch_blocking": "n",
}
TITAN = {
    "code": "titan",
    "software_date": "2024-12",
    "layers": "4",
    "hidden": "64",
    "kv_heads": "4",
    "ffn": "256",
    "vocab": "512",
    "seq_len": "32",
    "n_gpus": "2",
    "sharding": "fsdp2",
    "parameters": "float32",
    "recompute": "operators",
    "attention": "sdpa",
}
MEGATRON = {
    **TITAN,
    "code": "megatron",
    "engine": "megatron",
    "n_gpus": "1",
    "sharding": "none",
    "parameters": "bfloat16",
    "master_weights": "y",
    "grad_dtype": "float32",
    "recompute": "none",
    "attention": "te",
}


def row(**given: str) -> dict[str, str]:
    return {**dict.fromkeys(columns(), ""), **_PLAIN, **given}


def setup(**given: str) -> Setup:
    return setup_of(row(**given))
