"""Digests of the inputs that the model of this rank receives."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree

_LOOKS = 16  # forward passes of one step that are recorded


@dataclasses.dataclass(slots=True)
class Samples:
    """What the model received. ``given`` holds one digest per forward pass, of the first 16 passes.
    ``several`` says whether these inputs contained more than one distinct sample: two ranks may receive the
    same sample by chance, but not the same two."""

    given: list[str] = dataclasses.field(default_factory=list)
    several: bool = False

    def hear(self, args: Any, kwargs: Any) -> None:
        """Record one digest of all tensors among the inputs of a forward pass, if there are any and fewer
        than 16 passes have been recorded."""
        leaves = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = [getattr(t, "_local_tensor", t).detach() for t in leaves]
        tensors = [t for t in tensors if t.numel() and t.dim() and not t.is_meta]
        if not tensors or len(self.given) == _LOOKS:
            return
        count = tensors[0].shape[0]
        self.several |= any(t.shape[0] == count and bool((t != t[:1]).any()) for t in tensors)
        self.given.append(_digest(tensors))
        self.several |= len(set(self.given)) > 1


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
