"""Parts: costs of the pieces of a model. Plans of any size are added up from a few small traces."""

from __future__ import annotations

import dataclasses

Travel = tuple[tuple[str, float], ...]
"""(kind, bytes of the whole) of each collective, as cost/collectives.py counts them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Costs of one micro-batch in a part of the model (a block, or what lies before or after all blocks).

    They are for one rank, with nothing sharded over data-parallel ranks. ``*_travel``: collectives that its
    work waits for.
    """

    forward_s: float
    backward_s: float
    kept_bytes: float  # from its forward until its backward
    forward_top_bytes: float  # highest level above the level at its start
    backward_top_bytes: float
    parameter_bytes: float  # trainable, on this rank
    flops: float
    forward_travel: Travel = ()
    backward_travel: Travel = ()


NUMBERS = (
    "forward_s",
    "backward_s",
    "kept_bytes",
    "forward_top_bytes",
    "backward_top_bytes",
    "parameter_bytes",
    "flops",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The pieces of a chain: before the blocks, one of the equal blocks, after the blocks."""

    before: Piece
    block: Piece
    after: Piece


PIECES = ("before", "block", "after")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Updating:
    """Costs of the optimizer's step, per parameter that it updates."""

    update_s: float
    state_bytes: float
    top_bytes: float  # highest level above parameters, gradients and state
    moved_bytes: float  # bytes read plus bytes written
