"""How many of a model's blocks each stage of a pipeline gets."""

from __future__ import annotations

from memfit.types.errors import UserError


def stage_sizes(blocks: int, stages: int, first_fewer: int = 0, last_fewer: int = 0) -> list[int]:
    """Return the number of blocks of each of ``stages`` stages, of ``blocks`` blocks in all.

    ``blocks + first_fewer + last_fewer`` is divided so that numbers differ by at most one, the larger ones
    first. Then the first stage gets ``first_fewer`` fewer, and the last one ``last_fewer`` fewer. Raises
    UserError if a stage would get no block.
    """
    base, remainder = divmod(blocks + first_fewer + last_fewer, stages)
    sizes = [base + (s < remainder) for s in range(stages)]
    sizes[0] -= first_fewer
    sizes[-1] -= last_fewer
    if min(sizes) < 1:
        with_first_fewer_and_last_fewer = f", with first_fewer={first_fewer} and last_fewer={last_fewer},"
        is_even = not first_fewer + last_fewer
        raise UserError(
            f"{stages} pipeline stages{'' if is_even else with_first_fewer_and_last_fewer} are more than the "
            f"model's {blocks} blocks can fill",
            allowed=f"at most {blocks} stages on all ranks together: stages times virtual"
            if is_even
            else "fewer stages on all ranks together (stages times virtual), or smaller values of "
            "first_fewer and last_fewer",
        )
    return sizes
