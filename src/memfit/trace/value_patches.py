"""Torch functions that bypass dispatch modes and read or write tensor values directly. They are patched while
tracing, and use the values that are known."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from memfit.trace.assumed_values import is_assumed, mark_assumed
from memfit.trace.concrete_values import ConcreteValues
from memfit.trace.data_dependent import Guesses


@contextlib.contextmanager
def patch_value_reads(guesses: Guesses) -> Iterator[None]:
    """Inside this context, patch the functions that read or write values of fake tensors without a dispatch
    mode: pad_packed_sequence, ctc_loss, tensor_split, numpy and tolist. ``guesses`` gives the values. If
    bitsandbytes is imported already, the maps of its 8-bit optimizers are computed once, for real."""
    concrete_values = guesses.concrete_values
    with contextlib.ExitStack() as stack:
        if (quantization := sys.modules.get("bitsandbytes.functional")) is not None:
            quantization_map = functools.partial(_quantization_map, quantization.create_dynamic_map)
            stack.enter_context(mock.patch.object(quantization, "create_dynamic_map", quantization_map))
        for home, name, replacement in (
            (torch._VF, "_pad_packed_sequence", _padding(concrete_values)),
            (torch, "ctc_loss", _with_lengths_as_tensors(torch.ctc_loss)),
            (torch, "tensor_split", _with_parts_as_numbers(torch.tensor_split)),
            (torch.Tensor, "tensor_split", _with_parts_as_numbers(torch.Tensor.tensor_split)),
            (torch.Tensor, "numpy", _read_known(guesses, torch.Tensor.numpy)),
            (FakeTensor, "tolist", _read_known(guesses, torch.Tensor.tolist)),
        ):
            stack.enter_context(mock.patch.object(home, name, replacement, create=home is torch._VF))
        yield


def _quantization_map(inner: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    """Return ``inner(*args, **options)``, a map between 8 bits and numbers, as a new fake tensor. Its numbers
    follow from the arguments, though ``inner`` reads values of tensors to compute them."""
    return torch.tensor(_numbers_of_map(inner, args, tuple(options.items())), dtype=torch.float32)


@functools.cache
def _numbers_of_map(inner: Callable[..., torch.Tensor], args: Any, options: Any) -> list[float]:
    with _disable_current_modes():
        numbers: list[float] = inner(*args, **dict(options)).tolist()
    return numbers


def _read_known(guesses: Guesses, inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of ``inner``, which is ``Tensor.numpy`` or ``Tensor.tolist``, for fake tensors: it
    works on their known or assumed values, or else on a bound or ones (`Guesses.read`). Other libraries call
    it. Real tensors are passed to ``inner``."""

    def called(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if type(tensor) is not FakeTensor:
            return inner(tensor, *args, **options)
        with _disable_current_modes():
            return inner(guesses.read(tensor, inner.__name__).clone(), *args, **options)

    return called


def _with_lengths_as_tensors(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of ``inner``, which is ``ctc_loss``, that turns lists and tuples of lengths into fake
    tensors. Torch's own version turns them into tensors at a point where they cannot be fake."""

    def called(scores: Any, targets: Any, *lengths: Any, **options: Any) -> Any:
        lengths = tuple(torch.tensor(n) if isinstance(n, list | tuple) else n for n in lengths)
        return inner(scores, targets, *lengths, **options)

    return called


def _with_parts_as_numbers(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a version of ``inner``, which is ``tensor_split``, that also takes the indices, or the number of
    parts, as a fake tensor."""

    def called(tensor: Any, where: Any, *rest: Any, **options: Any) -> Any:
        return inner(tensor, where.tolist() if isinstance(where, torch.Tensor) else where, *rest, **options)

    return called


def _padding(concrete_values: ConcreteValues) -> Callable[..., Any]:
    """Return a ``pad_packed_sequence`` that takes the batch sizes as a real tensor and returns (fake padded
    sequences, fake lengths). The real lengths are attached in ``concrete_values``, as assumed ones if the
    batch sizes are assumed (aten/src/ATen/native/PackedSequence.cpp). It raises ValueError if
    ``total_length`` is positive and less than the longest sequence."""

    def pad(
        data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, value: float, total_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _disable_current_modes():
            rows = int(batch_sizes[0])
            real = (batch_sizes[:, None] > torch.arange(rows)).sum(0)
            if is_assumed(batch_sizes):
                mark_assumed(real)
            widths, steps = (t.tolist() for t in batch_sizes.unique_consecutive(return_counts=True))
        longest = len(batch_sizes)
        if 0 < total_length < longest:
            raise ValueError(
                f"total_length of pad_packed_sequence is {total_length}, but must be at least {longest}, the "
                "length of the longest sequence"
            )
        out = data.new_full((max(longest, total_length), rows, *data.shape[1:]), value)
        lengths = torch.empty(rows, dtype=torch.int64)
        concrete_values.attach(lengths, real)
        offset = start = 0
        for width, count in zip(widths, steps, strict=True):
            piece = data[offset : offset + width * count].view(count, width, *data.shape[1:])
            out[start : start + count, :width].copy_(piece)
            offset, start = offset + width * count, start + count
        return (out.transpose(0, 1) if batch_first else out), lengths

    return pad
