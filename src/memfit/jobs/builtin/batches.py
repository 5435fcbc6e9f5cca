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
    """Raise UserError if an option that ``job`` does not support is given. ``given`` maps such options to
    their values, None where one is not given; the first one given is named. ``allowed``: what the message
    says is allowed instead."""
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{job} does not support any {option}, given {value}", allowed=allowed)


def epoch_indices(count: int, batch_size: int, *, step: int, seed: int) -> Array:
    """Return the indices of those of ``count`` examples that a step uses, shape ``(batch_size,)``.

    Every epoch is a new permutation of all examples, drawn from (seed, epoch). A batch may extend over the
    end of an epoch.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs: list[int] = (positions // count).tolist()
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in set(epochs)}
    return np.array([orders[e][p % count] for e, p in zip(epochs, positions, strict=True)])


def step_rng(step: int, seed: int) -> np.random.Generator:
    """Return a random generator that depends on ``step`` and ``seed`` only, and that is independent of the
    order of examples."""
    return np.random.default_rng((seed, step, 1))


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors, copied into torch's own memory; numpy's memory would be missing from
    every count of tensor bytes.
    """
    import torch

    return {name: torch.tensor(array) for name, array in arrays.items()}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Put the model in evaluation mode and disable gradients inside this context; then restore the model's
    mode.

    Yields the device of its parameters, to which batches must be moved.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
