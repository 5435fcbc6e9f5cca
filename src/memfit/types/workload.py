"""Workload: what an answer is about."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The model, the data of a step, and the machine; every answer begins with it.

    ``batch_size``: samples per step over all ranks. ``length``: of a sample, in ``length_unit``; None if
    samples have no length. ``sample_shape``: () if samples have a length, else the shape of the batch's
    largest tensor without its first dimension. ``assumed``: which of "batch" and "length" were set by a
    default instead of the user. ``machine``: "" if no machine is meant.
    """

    model: str
    parameter_count: int
    batch_size: int
    length: int | None
    length_unit: str = "tokens"
    sample_shape: tuple[int, ...] = ()
    assumed: tuple[str, ...] = ()
    machine: str = ""
