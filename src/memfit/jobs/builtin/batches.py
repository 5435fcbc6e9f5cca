"""Functions shared by the built-in jobs for making batches and evaluating."""

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
    """Raise UserError for the first given option that ``job`` does not support."""
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {value} is not supported by {job}", allowed=allowed)


def epoch_indices(count: int, batch_size: int, *, step: int, seed: int) -> Array:
    """Return which of ``count`` examples a step uses, shape ``(batch_size,)``.

    Every epoch is a new permutation drawn from (seed, epoch). A batch may extend over the end of an epoch.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs: list[int] = (positions // count).tolist()
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in set(epochs)}
    return np.array([orders[e][p % count] for e, p in zip(epochs, positions, strict=True)])


def step_rng(step: int, seed: int) -> np.random.Generator:
    """Return the random generator of one step, independent of the order of examples."""
    return np.random.default_rng((seed, step, 1))


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Copy arrays into torch's own memory; numpy's memory would be missing from every count of tensor
    bytes.
    """
    import torch

    return {name: torch.tensor(array) for name, array in arrays.items()}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Set evaluation mode without gradients and restore the mode afterwards.

    Yields the device for batches.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
