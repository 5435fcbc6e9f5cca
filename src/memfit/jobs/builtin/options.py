"""The options of a built-in job, and what every job does with them.

::

    @accept_keywords
    def make(options: BuiltInOptions) -> Job:
        shape = options.resize(_shape(options.size))
        data = read(options.data)
        return Job(
            name=NAME,
            size=options.label,
            build_model=lambda: options.load_into(Model(shape)),
            make_batch=lambda step, seed: train_batch(data, shape, step=step, seed=seed),
            ...
        )
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memfit.types.errors import UserError
from memfit.types.job import Job

if TYPE_CHECKING:
    from typing import TypeVar

    import torch
    from _typeshed import DataclassInstance

    Shape = TypeVar("Shape", bound=DataclassInstance)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInOptions:
    """What the user sets of a built-in job. ``size``: one of the job's sizes. ``data``: path of a file; None:
    the job's own data. ``weights``: path of a folder of safetensors; None: random weights. ``batch``: samples
    of a step; ``length``: tokens (residues, bases) of a sample; None, for these two: as many as the size has.
    """

    size: str = "tiny"
    data: str | None = None
    weights: str | None = None
    batch: int | None = None
    length: int | None = None

    @property
    def label(self) -> str:
        """The size alone, such as ``650M``, or, if the user sets the length, both, such as ``650M@4096``."""
        return self.size if self.length is None else f"{self.size}@{self.length}"

    def resize(self, shape: Shape) -> Shape:
        """Return ``shape``, a size with the fields ``batch_size`` and ``length``, changed to the batch and
        the length that the user sets. What the user does not set stays as it is."""
        changes = {"batch_size": self.batch, "length": self.length}
        return dataclasses.replace(shape, **{name: n for name, n in changes.items() if n is not None})

    def load_into(self, model: torch.nn.Module, *, may_miss: tuple[str, ...] = ()) -> torch.nn.Module:
        """Load the user's weights, if any, into ``model``, and return this model. ``may_miss``: starts of
        names of parameters that the weights may lack. Raises UserError as `load_weights` does."""
        from memfit.jobs.weights import load_weights

        if self.weights:
            load_weights(model, self.weights, may_miss=may_miss)
        return model

    def refuse(self, *names: str, job: str, allowed: str) -> None:
        """Raise UserError if the user sets (to anything but None) one of the options ``names``, such as
        "data", which ``job`` does not support. ``allowed``: what the message says is allowed instead."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise UserError(
                    f"the job {job} does not accept --{name}, which is given as {value}",
                    allowed=allowed,
                    hint=f"leave out --{name}",
                )


def accept_keywords(make: Callable[[BuiltInOptions], Job]) -> Callable[..., Job]:
    """Return ``make``, which takes a `BuiltInOptions`, as a function that takes each field of it by keyword.
    Those that are not given have their defaults: size "tiny" and None for all others."""

    @functools.wraps(make)
    def make_by_keyword(**options: Any) -> Job:
        return make(BuiltInOptions(**options))

    return make_by_keyword
