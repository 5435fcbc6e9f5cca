"""Parts: costs of the pieces of a model, measured in a few small traces. The costs of plans of any size are
added up from them."""

from __future__ import annotations

import dataclasses

Travel = tuple[tuple[str, float], ...]
"""(kind, bytes of the whole tensor) of each collective operation, as cost/collectives.py counts them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PartCosts:
    """Costs of one micro-batch in a piece of the model (a block, or what lies before or after all blocks).

    They are for one rank, with nothing sharded over data-parallel ranks. ``forward_s`` and ``backward_s`` are
    the seconds of its operators; the time of collectives is added to them later. ``forward_travel``,
    ``backward_travel``: the collectives that the piece's forward and backward wait for.
    ``forward_sample_s``, ``backward_sample_s``: the seconds that each sample adds in a large micro-batch, if
    that was traced apart, else 0.
    """

    forward_s: float
    backward_s: float
    kept_bytes: float  # kept from its forward until its backward
    forward_top_bytes: float  # highest memory in its forward above that at the start of the forward
    backward_top_bytes: float  # the same for its backward
    parameter_bytes: float  # trainable, on this rank
    flops: float
    forward_travel: Travel = ()
    backward_travel: Travel = ()
    forward_sample_s: float = 0.0
    backward_sample_s: float = 0.0


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
    """The costs of the three pieces of a model of equal blocks: before the blocks, one block, after the
    blocks.
    """

    before: PartCosts
    block: PartCosts
    after: PartCosts


PIECES = ("before", "block", "after")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCosts:
    """Costs of the optimizer's step. All but ``tensor_top_bytes`` are per parameter element that the step
    updates: seconds, bytes of optimizer state, highest bytes of temporary tensors, and bytes read plus
    written. ``tensor_top_bytes``: the bytes of those temporary tensors that do not grow with the number of
    blocks, such as those for one parameter at a time.
    """

    update_s: float
    state_bytes: float
    top_bytes: float  # highest memory above parameters, gradients and state
    tensor_top_bytes: float
    moved_bytes: float
