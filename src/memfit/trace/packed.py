"""Packed sequences padded again, as torch does it in code that reads and writes values where no mode sees it
(aten/src/ATen/native/PackedSequence.cpp)."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memfit.trace.shadows import Shadows


def pads_packed(shadows: Shadows) -> contextlib.AbstractContextManager[Any]:
    """``pad_packed_sequence`` with batch sizes that are real, and lengths whose values are followed."""

    def pad(
        data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, value: float, total_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with _disable_current_modes():
            rows = int(batch_sizes[0])
            real = (batch_sizes[:, None] > torch.arange(rows)).sum(0)
            widths, steps = (t.tolist() for t in batch_sizes.unique_consecutive(return_counts=True))
        longest = len(batch_sizes)
        if 0 < total_length < longest:
            raise ValueError(f"total_length is {total_length}, and the longest sequence has {longest}")
        out = data.new_full((max(longest, total_length), rows, *data.shape[1:]), value)
        lengths = torch.empty(rows, dtype=torch.int64)
        shadows.attach(lengths, real)
        place = time = 0
        for width, count in zip(widths, steps, strict=True):
            piece = data[place : place + width * count].view(count, width, *data.shape[1:])
            out[time : time + count, :width].copy_(piece)
            place, time = place + width * count, time + count
        return (out.transpose(0, 1) if batch_first else out), lengths

    return mock.patch.object(torch._VF, "_pad_packed_sequence", pad, create=True)
