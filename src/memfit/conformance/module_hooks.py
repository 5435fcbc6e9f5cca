"""Observe what repeated blocks do in a training step, with hooks on their layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memfit.conformance.sharding import in_backward, whole

_MOST = 0.75  # fraction of a block's elements; backward stops recomputing once it has what it needs


@dataclasses.dataclass(slots=True)
class Heard:
    """What was observed of a model's repeated blocks, which are given by their index.

    - ``ran``, ``again``: block -> elements of the parameters of each layer that ran in forward, and of each
      that ran again in backward, by the layer's id.
    - ``passed``: blocks through which gradients pass.
    - ``autocast``: (block, dtype of autocast or "off" while a layer with parameters ran in forward).
    - ``computed``: dtype -> elements of parameters with which layers ran in forward, added up over all calls
      and blocks.
    """

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
        """Register hooks on all modules inside ``blocks``, or on a block itself if it contains none, and
        return their handles. ``islands``: modules whose autocast and dtypes are not recorded. ``on_first``
        receives, in forward, the positional inputs of the modules of the block with the lowest index that has
        run. While ``busy`` returns True, forwards do not belong to the step and are ignored."""

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

    def _hear(self, index: int, module: nn.Module, inputs: Any, *, apart: bool) -> None:
        params = list(module.parameters(recurse=False))
        elements = sum(map(whole, params))
        if in_backward():
            self.again[index][id(module)] = elements
            return
        self.ran[index][id(module)] = elements
        tensors = (t for t in _pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))
        if any(t.requires_grad for t in (*params, *tensors)):
            self.passed.add(index)
        for p in () if apart else params:
            if p.is_floating_point() and p.numel():
                device_type = p.device.type
                enabled = torch.is_autocast_enabled(device_type)
                self.autocast.add((index, str(torch.get_autocast_dtype(device_type)) if enabled else "off"))
                self.computed[p.dtype] += whole(p)

    def recomputed(self) -> set[int]:
        """Return the blocks of which layers with at least 75 % of the elements that ran in forward ran again
        in backward."""
        shares = {
            i: _weight(self.again.get(i, {})) / max(_weight(elements), 1) for i, elements in self.ran.items()
        }
        return {i for i, share in shares.items() if share >= _MOST}

    def narrow(self, dtype: str) -> set[int]:
        """Return the blocks of which a layer ran under autocast to ``dtype``, such as "torch.bfloat16"."""
        return {i for i, kind in self.autocast if kind == dtype}


def _weight(layers: dict[int, int]) -> int:
    return sum(layers.values()) or len(layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What the model does without any plan. ``dtypes``: of its parameters. ``step(dtype)`` returns the
    observations of one training step, under autocast to ``dtype`` unless that is None; it returns None if the
    step fails."""

    dtypes: frozenset[torch.dtype]
    step: Callable[[torch.dtype | None], Heard | None]
