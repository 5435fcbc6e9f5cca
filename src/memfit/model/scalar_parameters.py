"""Parameters without dimensions, such as `nn.Parameter(torch.tensor(1.0))`. Torch's FSDP2 and DeepSpeed do
not support them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch


def scalars(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters without dimensions."""
    return [name for name, param in model.named_parameters() if param.dim() == 0]


def refuse_scalars(model: torch.nn.Module, who: str, *, left_alone: Collection[str] = ()) -> None:
    """Raise UserError naming the first parameter without dimensions, except those in ``left_alone``. ``who``
    is what does not support them."""
    found = [name for name in scalars(model) if name not in left_alone]
    if found:
        more = f" ({len(found)} such parameters)" if len(found) > 1 else ""
        raise UserError(
            f"{who} takes no parameters without dimensions, and {found[0]!r} has none{more}",
            allowed="parameters of at least one dimension",
            hint="one element in one dimension computes the same: nn.Parameter(torch.ones(1))",
        )
