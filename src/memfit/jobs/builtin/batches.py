"""Functions shared by the built-in jobs for reading data, making batches and evaluating."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

EVALUATED_AT_ONCE: Final = 8  # evaluation must not need more memory than a capped training step


@contextlib.contextmanager
def open_arrays(name: str) -> Iterator[Mapping[str, Array]]:
    """Context manager: open the file ``name``.npz among the data that come with memfit. It yields the arrays
    by name; each is read from the file whenever it is accessed."""
    with (
        resources.as_file(resources.files("memfit.jobs.builtin") / "data" / f"{name}.npz") as path,
        np.load(path) as archive,
    ):
        yield archive


def epoch_indices(count: int, batch_size: int, *, step: int, seed: int) -> Array:
    """Return the indices of the examples, out of ``count``, that step number ``step`` (from 0) uses, shape
    ``(batch_size,)``.

    Every epoch is a new permutation of all examples, drawn from (seed, epoch). Steps take consecutive parts
    of it. A batch may contain the end of one epoch and the start of the next.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs: list[int] = (positions // count).tolist()
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in set(epochs)}
    return np.array([orders[e][p % count] for e, p in zip(epochs, positions, strict=True)])


def step_rng(step: int, seed: int) -> np.random.Generator:
    """Return a random generator whose numbers depend on ``step`` and ``seed`` only. They are independent of
    those that `epoch_indices` draws with the same seed."""
    return np.random.default_rng((seed, step, 1))


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors under the same names. They are copied, because memory that numpy allocated
    would be missing where bytes of tensors are counted."""
    import torch

    return {name: torch.tensor(array) for name, array in arrays.items()}


def token_loss(logits: torch.Tensor, labels: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy in nats, computed in float32, of the ``labels`` (batch, length) for ``logits``
    (batch, length, classes). Labels of -100 do not count. ``reduction``: "mean" over the others, or "sum"."""
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.device]:
    """Context manager: put the model in evaluation mode and disable gradients. At the end, also after an
    exception, the model and all its submodules get the mode that the model had.

    Yields the device of the model's first parameter, to which batches must be moved.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors under the same names on ``device``."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def equal_parts(examples: Array, batch_size: int) -> list[Array]:
    """Return ``examples`` in consecutive parts along the first dimension, as few as possible. Each has at
    most ``batch_size`` and at most EVALUATED_AT_ONCE (8) examples, and their sizes differ by at most one."""
    return np.array_split(examples, -(-len(examples) // min(batch_size, EVALUATED_AT_ONCE)))


def full_parts(examples: Array, batch_size: int) -> list[Array]:
    """Return ``examples`` in consecutive parts along the first dimension. Each has ``batch_size`` examples,
    but at most EVALUATED_AT_ONCE (8); the last has those that remain."""
    size = min(batch_size, EVALUATED_AT_ONCE)
    return [examples[start : start + size] for start in range(0, len(examples), size)]
