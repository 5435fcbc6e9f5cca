"""A job that imports the module beside it only inside its functions, and clips gradients."""

from __future__ import annotations

from typing import Any

import torch

from memfit import Job


def _net() -> torch.nn.Module:
    import parts

    return parts.Net()


def _batch(step: int, seed: int) -> Any:
    from parts import batch

    return batch(step, seed)


def _loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    from parts import loss

    return loss(model, batch)


job = Job(name="mine", build_model=_net, make_batch=_batch, loss=_loss, batch_size=8, steps=2, clip=0.05)
