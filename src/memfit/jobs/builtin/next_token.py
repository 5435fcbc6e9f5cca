"""What the language models of text and DNA share: a corpus in two parts, and the loss of the next token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memfit.jobs.builtin.batches import Array, as_tensors, evaluating, full_parts, to_device, token_loss

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A long text or genome as numbers, uint8 arrays of one dimension. ``test`` is its last tenth, rounded
    down, which is held out; ``train`` is the rest. ``source``: where it comes from."""

    train: Array
    test: Array
    source: str


def split(numbers: Array, source: str) -> Corpus:
    """Return ``numbers`` (uint8, of one dimension) as a corpus whose last tenth, rounded down, is for
    testing. ``source``: where they come from."""
    boundary = len(numbers) - len(numbers) // 10
    return Corpus(train=numbers[:boundary], test=numbers[boundary:], source=source)


def next_token_loss(model: torch.nn.Module, batch: Any, *, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy, in nats, of ``batch["next"]`` (batch, length) given ``batch["tokens"]``.
    ``reduction``: "mean" over all positions of the batch, or "sum"."""
    return token_loss(model(batch["tokens"]), batch["next"], reduction=reduction)


def mean_bits(
    model: torch.nn.Module, starts: Array, windows: Callable[[Array], dict[str, Array]], batch_size: int
) -> float:
    """Return the mean cross-entropy of the next token, in bits, over the windows that begin at ``starts``.
    ``windows(some_starts)`` returns the arrays ``tokens`` and ``next`` of the windows that begin at these
    starts. At most ``batch_size`` windows, and at most 8, are evaluated at once."""
    total, count = 0.0, 0
    with evaluating(model) as device:
        for part in full_parts(starts, batch_size):
            batch = to_device(as_tensors(windows(part)), device)
            total += float(next_token_loss(model, batch, reduction="sum"))
            count += batch["next"].numel()
    return total / (count * math.log(2))
