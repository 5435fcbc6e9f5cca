"""Parameters without dimensions, such as `nn.Parameter(torch.tensor(1.0))`. Torch's FSDP2 and DeepSpeed do
not support them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch


def scalar_names(model: torch.nn.Module) -> list[str]:
    """Return the names of the model's parameters without dimensions, in its order."""
    return [name for name, param in model.named_parameters() if param.dim() == 0]


def refuse_scalars(
    model: torch.nn.Module, technique_or_engine: str, *, left_alone: Collection[str] = ()
) -> None:
    """Raise UserError if the model has parameters without dimensions whose names are not in ``left_alone``.
    The message names the first one, and ``technique_or_engine`` as what does not support it."""
    names = [name for name in scalar_names(model) if name not in left_alone]
    if names:
        count_of_them = f" ({len(names)} such parameters)" if len(names) > 1 else ""
        raise UserError(
            f"{technique_or_engine} does not support parameters without dimensions, but {names[0]!r} is "
            f"one{count_of_them}",
            allowed="parameters of at least one dimension",
            hint=f"give {names[0]!r} the shape (1,), which computes the same: for example "
            "nn.Parameter(torch.ones(1))",
        )
