"""What the built-in jobs share in making batches and in evaluating."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.types.errors import UserError

EVALUATED_AT_ONCE: Final = 8  # evaluation must not need more memory than a capped training step

if TYPE_CHECKING:
    import torch

    Array = np.ndarray[Any, Any]


def refuse(job: str, given: Mapping[str, object], *, allowed: str) -> None:
    """Raises UserError for the first of the options that ``job`` has no use for and that was given."""
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {value} for {job}", allowed=allowed)


def epoch_indices(count: int, batch_size: int, *, step: int, seed: int) -> Array:
    """Which of ``count`` examples step ``step`` uses, shape ``(batch_size,)``. Every epoch is a new
    permutation drawn from (seed, epoch); a batch may reach over the end of an epoch."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs: list[int] = (places // count).tolist()
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in set(epochs)}
    return np.array([orders[e][p % count] for e, p in zip(epochs, places, strict=True)])


def step_rng(step: int, seed: int) -> np.random.Generator:
    """Random numbers of one step, independent of the order of examples."""
    return np.random.default_rng((seed, step, 1))


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Copies in torch's own memory: what lies in numpy's would escape every count of tensor bytes."""
    import torch

    return {name: torch.tensor(array) for name, array in arrays.items()}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, restored afterwards; yields where batches must lie."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
