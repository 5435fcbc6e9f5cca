"""How many of a model's blocks each stage of a pipeline gets."""

from __future__ import annotations

from memfit.types.errors import UserError


def stage_sizes(blocks: int, stages: int, first_fewer: int = 0, last_fewer: int = 0) -> list[int]:
    """Divide ``blocks`` blocks among ``stages`` stages. Return the number of blocks of each.

    Were there ``first_fewer`` and ``last_fewer`` blocks more, numbers would differ by at most one, the larger
    ones first. The first and the last stage then lack these. Raises UserError if a stage would get no block.
    """
    base, remainder = divmod(blocks + first_fewer + last_fewer, stages)
    sizes = [base + (s < remainder) for s in range(stages)]
    sizes[0] -= first_fewer
    sizes[-1] -= last_fewer
    if min(sizes) < 1:
        fewer = f", with first_fewer={first_fewer} and last_fewer={last_fewer},"
        fewer *= bool(first_fewer + last_fewer)
        raise UserError(
            f"{stages} pipeline stages{fewer} are more than the model's {blocks} blocks can fill",
            allowed="fewer stages on all ranks together (stages times virtual), or smaller values of "
            "first_fewer and last_fewer"
            if fewer
            else f"at most {blocks} stages on all ranks together: stages times virtual",
        )
    return sizes
