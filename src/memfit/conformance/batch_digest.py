"""Digests of the inputs that the model of this rank receives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from memfit.conformance.observation import InputDigests
from memfit.model.tensors import tensor_leaves

_LOOKS = 16  # forward passes of one step that are recorded


class InputDigester:
    """Records one digest of the model's inputs for each of the first 16 forward passes that have tensor
    inputs."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._several = False

    def record(self, args: Any, kwargs: Any) -> None:
        """Record one digest of the dtypes, shapes and values of all tensors in ``args`` and ``kwargs``, the
        inputs of a forward pass, and whether they contain different samples (along dimension 0) or differ
        from those of an earlier pass. Tensors that are scalars, empty or on the meta device are left out.
        Does nothing if there are no others, or if 16 passes have been recorded."""
        leaves = tensor_leaves((args, kwargs))
        tensors = [getattr(t, "_local_tensor", t).detach() for t in leaves]
        tensors = [t for t in tensors if t.numel() and t.dim() and not t.is_meta]
        if not tensors or len(self._digests) == _LOOKS:
            return
        count = tensors[0].shape[0]
        self._several |= any(t.shape[0] == count and bool((t != t[:1]).any()) for t in tensors)
        self._digests.append(_digest(tensors))
        self._several |= len(set(self._digests)) > 1

    def observed(self) -> InputDigests:
        """Return what was recorded so far."""
        return InputDigests(digests=tuple(self._digests), several=self._several)


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
