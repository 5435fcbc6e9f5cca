"""Observe what repeated blocks do in a training step, with hooks on their layers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from memfit.conformance.observation import BlockActivity
from memfit.conformance.sharding import count_whole_elements, in_backward
from memfit.model.tensors import tensor_leaves


class BlockListener:
    """Records what a model's repeated blocks do, by hooks that `listen` registers. The attributes have the
    names and meanings of those of `BlockActivity`."""

    def __init__(self) -> None:
        self.ran = defaultdict[int, dict[int, int]](dict)
        self.again = defaultdict[int, dict[int, int]](dict)
        self.passed = set[int]()
        self.autocast = set[tuple[int, str]]()
        self.computed = defaultdict[torch.dtype, int](int)
        self.undivided = set[int]()

    def listen(
        self,
        blocks: Sequence[nn.Module],
        *,
        islands: Container[nn.Module] = (),
        on_first: Callable[[Iterable[Any]], None] = lambda args: None,
        busy: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """Register hooks on all modules inside each of ``blocks``, or on the block itself if it contains
        none, and return the hooks' handles, with which the caller removes them.

        ``islands``: modules whose autocast and dtypes are not recorded. ``on_first(args)`` is called for each
        forward of a module of the first block: the one with the lowest index among those that have run;
        ``args`` are the module's positional inputs. Modules that run while ``busy()`` is True do not belong
        to the step and are ignored."""

        def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
                if busy():
                    return
                self._record(index, module, (args, kwargs), apart=module in islands)
                if not in_backward() and index == min(self.ran):
                    on_first(args)

            return enters

        self.undivided = {i for i, block in enumerate(blocks) if next(block.children(), None) is None}
        return [
            module.register_forward_pre_hook(hook(index), with_kwargs=True)
            for index, block in enumerate(blocks)
            for module in list(block.modules())[1:] or [block]
        ]

    def _record(self, index: int, module: nn.Module, inputs: Any, *, apart: bool) -> None:
        params = list(module.parameters(recurse=False))
        elements = sum(map(count_whole_elements, params))
        if in_backward():
            self.again[index][id(module)] = elements
            return
        self.ran[index][id(module)] = elements
        if any(t.requires_grad for t in (*params, *tensor_leaves(inputs))):
            self.passed.add(index)
        for p in () if apart else params:
            if p.is_floating_point() and p.numel():
                device_type = p.device.type
                enabled = torch.is_autocast_enabled(device_type)
                self.autocast.add((index, str(torch.get_autocast_dtype(device_type)) if enabled else "off"))
                self.computed[p.dtype] += count_whole_elements(p)

    def observed(self) -> BlockActivity:
        """Return what was recorded so far, as a value."""
        return BlockActivity(
            ran={i: dict(elements) for i, elements in self.ran.items()},
            again={i: dict(elements) for i, elements in self.again.items()},
            passed=frozenset(self.passed),
            autocast=frozenset(self.autocast),
            computed=dict(self.computed),
            undivided=frozenset(self.undivided),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlainModel:
    """The model without any plan. ``dtypes``: of its parameters. ``run(dtype)`` runs one training step, under
    autocast to ``dtype``, or without autocast if that is None. It returns what the blocks did in the step, or
    None if the step fails."""

    dtypes: frozenset[torch.dtype]
    run: Callable[[torch.dtype | None], BlockActivity | None]
