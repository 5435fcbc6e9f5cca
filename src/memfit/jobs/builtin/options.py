"""The options of a built-in job, and what every job does with them.

::

    @accept_keywords
    def make(options: BuiltInOptions) -> Job:
        shape = options.resize(_shape(options.size), DIMENSIONS)
        data = read(options.data)
        return Job(
            name=NAME,
            size=options.label,
            build_model=lambda: options.load_into(Model(shape)),
            make_batch=lambda step, seed: train_batch(data, shape, step=step, seed=seed),
            dimensions=options.dimensions_of(shape, DIMENSIONS, {"hidden": shape.heads}),
            ...
        )
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.types.errors import UserError, suggest
from memfit.types.job import Dimension, Job

if TYPE_CHECKING:
    from typing import TypeVar

    import torch
    from _typeshed import DataclassInstance

    Shape = TypeVar("Shape", bound=DataclassInstance)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInOptions:
    """What the user sets of a built-in job. ``size``: one of the job's sizes. ``data``: path of a file; None:
    the job's own data. ``weights``: path of a folder of safetensors, read when the model is built; None:
    random weights. ``batch``: samples of a step; ``length``: tokens (residues, bases, bytes) of a sample;
    None, for these two: as many as the size has. ``dimensions``: further numbers, such as {"layers": 6}, that
    replace those of the size.
    """

    size: str = "tiny"
    data: str | None = None
    weights: str | None = None
    batch: int | None = None
    length: int | None = None
    dimensions: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The size, such as ``650M``, followed by the length and the dimensions that the user sets, such as
        ``650M@4096``, ``tiny@layers=6`` or ``tiny@64,layers=6``. The batch is not in it."""
        sizes = [] if self.length is None else [str(self.length)]
        sizes += [f"{name}={value}" for name, value in self.dimensions.items()]
        return "@".join((self.size, *([",".join(sizes)] if sizes else [])))

    def resize(self, shape: Shape, fields: Mapping[str, str]) -> Shape:
        """Return ``shape``, a size with the fields ``batch_size`` and ``length``, changed to the batch, the
        length and the dimensions that the user sets. What the user does not set stays as it is. ``fields``:
        name of a dimension -> field of ``shape`` that it sets. Raises UserError for a dimension without a
        field, and TypeError for a length if ``shape`` has no such field."""
        changes = {"batch_size": self.batch, "length": self.length}
        shape = dataclasses.replace(shape, **{name: n for name, n in changes.items() if n is not None})
        return self.set_dimensions(shape, fields)

    def set_dimensions(self, shape: Shape, fields: Mapping[str, str]) -> Shape:
        """Return ``shape`` changed to the dimensions that the user sets. ``fields``: name of a dimension ->
        field of ``shape`` that it sets. Raises UserError for a dimension without a field."""
        for name in self.dimensions:
            if name not in fields:
                raise UserError(
                    f"this job has no dimension {name!r}",
                    allowed=", ".join(
                        ["--batch", *(["--length"] if hasattr(shape, "length") else [])]
                        + [f"--dim {field}" for field in fields]
                    ),
                    hint=suggest(name, fields),
                )
        return dataclasses.replace(shape, **{fields[name]: n for name, n in self.dimensions.items()})

    def dimensions_of(
        self, shape: Any, fields: Mapping[str, str], multiples: Mapping[str, int] | None = None
    ) -> tuple[Dimension, ...]:
        """Return the dimensions of a job with this ``shape``: batch, length if it has that field, and
        those of ``fields`` (name of a dimension -> field of ``shape``). ``multiples``: name -> the number of
        which only multiples are possible; any number is, of a name without one. Raises UserError if the user
        sets a number that is no multiple."""
        own_fields = {"batch": "batch_size", "length": "length"} | dict(fields)
        dimensions = [
            Dimension(name=name, value=getattr(shape, field), multiple=(multiples or {}).get(name, 1))
            for name, field in own_fields.items()
            if hasattr(shape, field)
        ]
        for dimension in dimensions:
            if dimension.name in self.dimensions and dimension.value % dimension.multiple:
                raise UserError(
                    f"the dimension {dimension.name} of this job (--dim {dimension.name}) is set to "
                    f"{dimension.value}",
                    allowed=f"multiples of {dimension.multiple}",
                )
        return tuple(dimensions)

    def load_into(self, model: torch.nn.Module, *, may_miss: tuple[str, ...] = ()) -> torch.nn.Module:
        """Load the user's weights, if any, into ``model``, and return this model. ``may_miss``: the weights
        may lack parameters whose names start with one of these. Raises UserError as `load_weights` does."""
        from memfit.jobs.weights import load_weights

        if self.weights:
            load_weights(model, self.weights, may_miss=may_miss)
        return model

    def refuse(self, *names: str, job: str, why: str) -> None:
        """Raise UserError if the user sets (to anything but None) one of the options ``names``, such as
        "data", which ``job`` does not support. ``why``: the reason, such as "it trains on random data"."""
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"the job {job} does not accept --{name}: {why}", hint=f"leave out --{name}")


def accept_keywords(make: Callable[[BuiltInOptions], Job]) -> Callable[..., Job]:
    """Return ``make``, which takes a `BuiltInOptions`, as a function that takes each field of it by keyword.
    Those that are not given have their defaults: size "tiny", no dimensions, and None for all others."""

    @functools.wraps(make)
    def make_by_keyword(**options: Any) -> Job:
        return make(BuiltInOptions(**options))

    return make_by_keyword
