"""Workload: what an answer is about."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The model, how much of it a step trains on, and where; every answer begins with it.

    ``length``: of a sample, in ``length_unit``; None where samples have none. ``sample_shape`` is then that
    of the batch's largest tensor without its first dimension. ``assumed``: "batch" and "length", where nobody
    chose them. ``machine``: "" where none is meant.
    """

    model: str
    parameter_count: int
    batch_size: int
    length: int | None
    length_unit: str = "tokens"
    sample_shape: tuple[int, ...] = ()
    assumed: tuple[str, ...] = ()
    machine: str = ""
