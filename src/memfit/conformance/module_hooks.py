"""What repeated blocks do in a training step, seen by hooks of their layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memfit.conformance.sharding import in_backward, whole

_MOST = 0.75  # of a block's elements; backward stops once it has what it needs


@dataclasses.dataclass(slots=True)
class Heard:
    """By the index of a block. ``ran``, ``again``: elements of layers that ran, and that ran once more in
    backward; ``passed``: blocks that gradients go through; ``autocast``: (block, dtype or "off") of its
    layers; ``computed``: elements of layers by the dtype of their parameters."""

    ran: dict[int, dict[int, int]] = dataclasses.field(default_factory=lambda: defaultdict(dict))
    again: dict[int, dict[int, int]] = dataclasses.field(default_factory=lambda: defaultdict(dict))
    passed: set[int] = dataclasses.field(default_factory=set)
    autocast: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    computed: dict[torch.dtype, int] = dataclasses.field(default_factory=lambda: defaultdict(int))

    def listen(
        self,
        blocks: Sequence[nn.Module],
        *,
        islands: Container[nn.Module] = (),
        on_first: Callable[[Iterable[Any]], None] = lambda args: None,
        busy: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """Handles of the hooks. ``islands``: whose autocast is none of the plan's; ``on_first`` is given
        what layers of the first block are given; ``busy``: whether a forward is none of the step's."""

        def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
                if busy():
                    return
                self._hear(index, module, (args, kwargs), apart=module in islands)
                if not in_backward() and index == min(self.ran):
                    on_first(args)

            return enters

        return [
            module.register_forward_pre_hook(hook(index), with_kwargs=True)
            for index, block in enumerate(blocks)
            for module in list(block.modules())[1:] or [block]
        ]

    def _hear(self, index: int, module: nn.Module, given: Any, *, apart: bool) -> None:
        own = list(module.parameters(recurse=False))
        elements = sum(map(whole, own))
        if in_backward():
            self.again[index][id(module)] = elements
            return
        self.ran[index][id(module)] = elements
        tensors = (t for t in _pytree.tree_leaves(given) if isinstance(t, torch.Tensor))
        if any(t.requires_grad for t in (*own, *tensors)):
            self.passed.add(index)
        for p in () if apart else own:
            if p.is_floating_point() and p.numel():
                kind = p.device.type
                on = torch.is_autocast_enabled(kind)
                self.autocast.add((index, str(torch.get_autocast_dtype(kind)) if on else "off"))
                self.computed[p.dtype] += whole(p)

    def recomputed(self) -> set[int]:
        """Blocks of which nearly all runs again."""
        shares = {i: _weight(self.again.get(i, {})) / max(_weight(own), 1) for i, own in self.ran.items()}
        return {i for i, share in shares.items() if share >= _MOST}

    def narrow(self, dtype: str) -> set[int]:
        """Blocks with a layer under autocast to that."""
        return {i for i, kind in self.autocast if kind == dtype}


def _weight(layers: dict[int, int]) -> int:
    return sum(layers.values()) or len(layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What the model does by itself, without any plan. ``step``: one training step of it, heard, under
    autocast to that dtype where one is given; None: it could not be run."""

    dtypes: frozenset[torch.dtype]
    step: Callable[[torch.dtype | None], Heard | None]
