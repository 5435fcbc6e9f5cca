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
    """Open the file ``name``.npz that comes with memfit. Yields its arrays by name, each read when it is
    accessed."""
    with (
        resources.as_file(resources.files("memfit.jobs.builtin") / "data" / f"{name}.npz") as path,
        np.load(path) as archive,
    ):
        yield archive


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


def token_loss(logits: torch.Tensor, labels: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy in nats of the ``labels`` (batch, length), of which -100 do not count, for
    ``logits`` (batch, length, classes). ``reduction``: "mean" or "sum"."""
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)


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


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch on ``device``."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def equal_parts(examples: Array, batch_size: int) -> list[Array]:
    """Return ``examples``, indices of what is evaluated, in parts of nearly equal size: at most
    ``batch_size`` and EVALUATED_AT_ONCE each."""
    return np.array_split(examples, -(-len(examples) // min(batch_size, EVALUATED_AT_ONCE)))


def full_parts(examples: Array, batch_size: int) -> list[Array]:
    """Return ``examples`` as `equal_parts` does, but with as many in every part except the last as are
    allowed."""
    size = min(batch_size, EVALUATED_AT_ONCE)
    return [examples[start : start + size] for start in range(0, len(examples), size)]
