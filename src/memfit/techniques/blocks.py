"""Where a model repeats itself, and where its head is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch

_HEAD_NAMES = ("lm_head", "head", "decoder", "classifier", "output")


def find_blocks(model: torch.nn.Module, path: str | None = None) -> tuple[str, list[torch.nn.Module]]:
    """(module path, its blocks). By default the ModuleList or Sequential whose members are of one class
    and hold most parameters together. Raises UserError where ``path`` is no such container."""
    if path is not None:
        return path, _children_at(model, path)
    found = [(name, list(m.children())) for name, m in model.named_modules() if _repeats(m)]
    if not found:
        raise UserError(
            "no repeated blocks found in the model",
            allowed="an nn.ModuleList or nn.Sequential of two or more modules of one class",
            hint="name its module path in Job(blocks=...)",
        )
    return max(
        found, key=lambda pair: (sum(p.numel() for b in pair[1] for p in b.parameters()), len(pair[1]))
    )


def find_stacks(
    model: torch.nn.Module, path: str | None = None, more: Sequence[str] = ()
) -> list[list[torch.nn.Module]]:
    """The blocks of `find_blocks`, then those at the paths ``more``, and of other stacks whose members are
    of the same class, or are recomputed by Hugging Face as well: an encoder's beside a decoder's."""
    first, blocks = find_blocks(model, path)
    stacks = {first: blocks} | {name: _children_at(model, name) for name in more}
    kinds = {kind for kind in type(blocks[0]).__mro__ if kind.__name__ == "GradientCheckpointingLayer"}
    kinds.add(type(blocks[0]))
    for name, module in model.named_modules():
        inside = any(name == s or name.startswith(f"{s}.") or s.startswith(f"{name}.") for s in stacks)
        children = list(module.children())
        if not inside and _repeats(module) and isinstance(children[0], tuple(kinds)):
            stacks[name] = children
    return list(stacks.values())


def _repeats(module: torch.nn.Module) -> bool:
    import torch

    children = list(module.children())
    container = isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
    return container and len(children) > 1 and len({_kind(c) for c in children}) == 1


def _kind(module: torch.nn.Module) -> type:
    """Its class, beneath what wraps it (checkpoint_wrapper, torch.compile) or is mixed in (fully_shard)."""
    for name in ("_checkpoint_wrapped_module", "_orig_mod"):
        module = module._modules.get(name) or module
    kind = type(module)
    while any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    return kind


def _children_at(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    try:
        children = list(model.get_submodule(path).children())
    except AttributeError:
        children = []
    if not children:
        raise UserError(
            f"the model has no blocks at {path!r}", allowed=", ".join(_containers(model)) or "none"
        )
    return children


def _containers(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if _repeats(m)]


def find_head(model: torch.nn.Module, path: str | None = None) -> tuple[str, torch.nn.Linear]:
    """(module path, Linear) of the projection to the vocabulary or classes: ``path``, else what Hugging
    Face calls output embeddings, else a Linear with a customary name at the top of the model."""
    import torch

    named = dict(model.named_modules())
    if path is not None:
        head = named.get(path)
        if not isinstance(head, torch.nn.Linear):
            raise UserError(f"the model has no nn.Linear at {path!r}", hint="mend Job(head=...)")
        return path, head
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in named.items():
        customary = name.rpartition(".")[2] in _HEAD_NAMES and name.count(".") <= 1
        if isinstance(module, torch.nn.Linear) and (module is outputs or customary):
            return name, module
    raise UserError(
        "no output projection found in the model",
        allowed=f"a Linear named {', '.join(_HEAD_NAMES)}",
        hint="name its module path in Job(head=...)",
    )
