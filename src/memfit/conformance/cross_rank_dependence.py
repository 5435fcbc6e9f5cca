"""Observe whether blocks of a rank that holds a part of each sample read the other ranks' parts.

A block runs four more times, without gradients: unchanged, with the input changed on every second rank, with
it changed on the other ranks, and with half of each rank's own part changed. If a change affects the other
half but no other rank, the block reads only its own part. Blocks that are initialised as the identity read
nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree

from memfit.conformance.observation import CrossRankReads
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import from_all, in_backward
from memfit.model.tensors import tensor_leaves
from memfit.types.device_kind import HOST


class PartReach:
    """Observes whether blocks read the parts of a sample that other ranks hold.

    Between `__enter__` and `__exit__`, each block is tried once, before its first forward with gradients: it
    runs with inputs changed on some ranks, and the outputs are compared. Once a block reads other ranks'
    parts, no further block is tried. All ranks must run the same blocks.

    - ``reached``: whether a tried block reads other ranks' parts.
    - ``local_only``: number of tried blocks whose output depends on other positions of the rank's own part,
      but not on other ranks' parts.
    - ``running``: True during a trial.
    - ``tried``: indices in ``blocks`` of the tried blocks.
    - ``place``: the rank's index among the ranks that share a sample.
    - ``group``: the rank's coordinates along all other dimensions of the mesh.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, place: int, group: tuple[int, ...]) -> None:
        self.blocks, self.place, self.group = blocks, place, group
        self.reached, self.running, self.local_only, self.tried = False, False, 0, set[int]()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for index, block in enumerate(self.blocks):
            self._stack.enter_context(mock.patch.object(block, "forward", self._around(index, block.forward)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _around(self, index: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            is_first = not (self.reached or self.running or index in self.tried or in_backward())
            if is_first and torch.is_grad_enabled():
                self.tried.add(index)
                self._try(self.blocks[index], inner, (args, kwargs))
            return inner(*args, **kwargs)

        return forward

    def _try(self, block: nn.Module, inner: Callable[..., Any], inputs: Any) -> None:
        parity = self.place % 2
        changes = (
            _keep,
            *(_replace_values if turn == parity else _keep for turn in (0, 1)),
            _replace_first_half,
        )
        self.running, buffers = True, [(b, b.detach().clone()) for b in block.buffers()]
        outs = []
        try:
            for change in changes:
                with torch.no_grad(), _restoring_generators(inputs):
                    args, kwargs = _pytree.tree_map_only(torch.Tensor, change, inputs)
                    outs.append(inner(*args, **kwargs))
        finally:
            self.running = False
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        reads_others = not _same(outs[0], outs[2 - parity])
        mixes_positions = not _same(
            *(_pytree.tree_map_only(torch.Tensor, _second_half, out) for out in (outs[0], outs[3]))
        )
        entries: list[tuple[tuple[int, ...], bool, bool]] = from_all(
            (self.group, reads_others, mixes_positions)
        )
        self.reached = all(any(m for g, m, _ in entries if g == group) for group, *_ in entries)
        self.local_only += not self.reached and all(mixes_positions for *_, mixes_positions in entries)

    def observed(self) -> CrossRankReads:
        """Return the result of the trials so far."""
        return CrossRankReads(reached=self.reached, local_only=self.local_only)


def _restoring_generators(args: Any) -> AbstractContextManager[None]:
    """Return a context that restores the random number generators of the host and of the accelerators that
    hold tensors of ``args``, which are of one kind."""
    devices = {t.device for t in tensor_leaves(args) if t.device.type not in (HOST, "meta")}
    if not devices:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng([d.index for d in devices], device_type=devices.pop().type)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _replace_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return 1 - ``tensor``, so that its values differ, if it is floating-point and has more than two
    dimensions, as activations have. Return other tensors unchanged."""
    return 1 - tensor if tensor.is_floating_point() and tensor.dim() > 2 else tensor


def _replace_first_half(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with the first half along dimension 1 (the one after the batch) replaced by 1 minus
    its values. Return tensors that `_replace_values` does not change unchanged."""
    if _replace_values(tensor) is tensor:
        return tensor
    return torch.cat([1 - tensor[:, : tensor.shape[1] // 2], _second_half(tensor)], dim=1)


def _second_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, tensor.shape[1] // 2 :] if tensor.dim() > 2 else tensor


def _same(first_output: Any, second_output: Any) -> bool:
    pairs = zip(_tensors(first_output), _tensors(second_output), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [getattr(t, "_local_tensor", t) for t in tensor_leaves(out)]


def reach_of(prepared: Prepared) -> PartReach:
    """Return the `PartReach` for the blocks of a prepared model. It has no blocks to try if every rank holds
    whole samples (no context or axial parallelism), or if the plan has compile."""
    coordinate = prepared.layout.coordinate(dist.get_rank() if dist.is_initialized() else 0)
    can_try = prepared.layout.context > 1 and "compile" not in prepared.plan
    group = tuple(v for name, v in coordinate.items() if name != "context")
    return PartReach(prepared.blocks if can_try else [], place=coordinate["context"], group=group)
