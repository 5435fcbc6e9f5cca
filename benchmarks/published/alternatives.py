"""What a row leaves open: the other values that a column may have had which its source does not state
(PROTOCOL.md, 9). Only the names of those columns are read, not the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from published.predict import as_megatron
from published.rows import Setup

_OWN_FORMATS = ("hf", "liger", "foak", "bert")  # whose user chooses the format of the parameters
_LOSSES = {"megatron": ("dense", "fused")}


def alternatives(setup: Setup, assumed: Iterable[str], phase: str) -> dict[str, Setup]:
    """Setups that differ from this one in one of the columns ``assumed``, named "column value". ``phase``:
    where the allocated peak of this one lies."""
    return {
        f"{column} {name}": dataclasses.replace(setup, **changed)
        for column in assumed
        if column in _OTHERS
        for name, changed in _OTHERS[column](setup, phase).items()
        if any(getattr(setup, field) != value for field, value in changed.items())
    }


Changes = Mapping[str, dict[str, Any]]  # a value's name -> fields of the setup


def _recompute(setup: Setup, phase: str) -> Changes:
    return {"none": {"recompute": ""}, "full": {"recompute": "full"}}


def _attention(setup: Setup, phase: str) -> Changes:
    """Written out or not: fused kernels keep the same tensors. The default of a known month is not open."""
    if setup.code not in ("hf", "bert") or setup.date is not None:
        return {}
    other = "sdpa" if setup.attention in ("eager", "unfused") else "eager"
    return {other: {"attention": other}}


def _parameters(setup: Setup, phase: str) -> Changes:
    if setup.code not in _OWN_FORMATS:
        return {}
    return {dtype: {"parameters": dtype} for dtype in ("float32", setup.compute)}


def _grad_dtype(setup: Setup, phase: str) -> Changes:
    """Elsewhere gradients have the format of the parameters."""
    if setup.code != "megatron" and not as_megatron(setup):
        return {}
    return {"float32": {"grad_bytes": 4}, "16 bits": {"grad_bytes": 2}}


def _optimizer_kernels(setup: Setup, phase: str) -> Changes:
    """Groups of tensors (foreach) need the most memory, single tensors and fused kernels the least, and both
    in the optimizer's phase alone."""
    if setup.optimizer != "adamw" or setup.code == "megatron" or as_megatron(setup):
        return {}
    if setup.optimizer_kernels != "foreach":
        return {"foreach": {"optimizer_kernels": "foreach"}}
    return {"fused": {"optimizer_kernels": "fused"}} if phase == "optimizer" else {}


def _loss(setup: Setup, phase: str) -> Changes:
    return {loss: {"loss": loss} for loss in _LOSSES.get(setup.code, ("dense", "fused-linear"))}


def _low_precision_weights(setup: Setup, phase: str) -> Changes:
    return {kept: {"low_precision_weights": kept} for kept in ("cast", "only")}


_OTHERS = {
    "recompute": _recompute,
    "attention": _attention,
    "parameters": _parameters,
    "grad_dtype": _grad_dtype,
    "optimizer_kernels": _optimizer_kernels,
    "loss": _loss,
    "low_precision_weights": _low_precision_weights,
}
