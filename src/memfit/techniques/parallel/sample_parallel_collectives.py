"""Collectives of ranks that work on one sample together, and the mean of their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from memfit.techniques.base import Workbench

_COMM: Any = torch.ops._c10d_functional


@dataclasses.dataclass(slots=True, kw_only=True)
class GroupCollectives:
    """Collectives of one process group. ``group`` is its name, ``rank`` this rank's index in it, ``ranks``
    the number of its ranks."""

    group: str
    rank: int
    ranks: int

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor, stacked in the order of ranks to shape (ranks, ...). The tensors must
        have the same shape."""
        whole = _COMM.all_gather_into_tensor(tensor.contiguous(), self.ranks, self.group)
        parts: torch.Tensor = _COMM.wait_tensor(whole).unflatten(0, (self.ranks, -1))
        return parts

    def gather(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return every rank's tensor, in the order of ranks. The tensors must have the same shape."""
        return self.stack(tensor).unbind()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks as a new tensor, the same on every rank."""
        total: torch.Tensor = _COMM.wait_tensor(_COMM.all_reduce(tensor, "sum", self.group))
        return total

    def scatter_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the sum over ranks of ``tensor``. The parts of all ranks, which have the
        same size, lie one after the other along dimension 0."""
        part = _COMM.reduce_scatter_tensor(tensor, "sum", self.ranks, self.group)
        total: torch.Tensor = _COMM.wait_tensor(part)
        return total

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Split a tensor into equal parts along dimension 0 and send the i-th part to the i-th rank. Return
        the received parts in the order of ranks."""
        part = [tensor.shape[0] // self.ranks] * self.ranks
        received = _COMM.all_to_all_single(tensor.contiguous(), part, part, self.group)
        parts: torch.Tensor = _COMM.wait_tensor(received)
        return parts


def average_gradients(bench: Workbench, together: GroupCollectives) -> Callable[[bool], None]:
    """Return a function for ``Workbench.before_micro_batch``, which ignores its argument.

    Its first call makes every backward from then on average each gradient over the ranks of ``together`` as
    soon as the gradient is ready. Later calls do nothing. If the model is under DDP or FSDP2, which average
    over these ranks themselves, the first does nothing either.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    done = False

    def average(grad: torch.Tensor) -> torch.Tensor:
        local_grad = grad.to_local() if isinstance(grad, DTensor) else grad
        mean = together.sum(local_grad).div_(together.ranks)
        if not isinstance(grad, DTensor):
            return mean
        mesh, placements = grad.device_mesh, grad.placements
        return DTensor.from_local(
            mean, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )

    def start(last: bool) -> None:
        nonlocal done
        if not done and bench.ddp is None and not isinstance(bench.model, FSDPModule):
            for param in bench.trainable():
                param.register_hook(average)
        done = True

    return start
