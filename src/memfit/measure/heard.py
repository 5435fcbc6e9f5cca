"""What repeated blocks do in a training step, heard by hooks of their layers, against the plan.

What a plan does not ask for may be the model's own doing: it recomputes, narrows or widens by itself.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree

from memfit.measure.held import in_backward, whole

if TYPE_CHECKING:
    from memfit.measure.conform import Watch

_T = TypeVar("_T")
_OWN_WIDE_RATIO = 0.1  # of elements: norms that a model keeps in float32 by itself, and adapters
_AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16-autocast": torch.float16}
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


def parameter_dtypes(watch: Watch) -> None:
    zero, plan = watch.plan.get("zero"), watch.plan
    low = plan.get("bf16-parameters") or (zero is not None and zero.settings["precision"] == "bf16")
    if plan.get("qlora") is not None:
        return
    feature = "bf16-parameters" if plan.get("bf16-parameters") else "parameter dtype"
    wanted = torch.bfloat16 if low else torch.float32
    apart = {p for m in watch.islands for p in m.parameters(recurse=False)}
    inside = {p for b in watch.blocks for p in b.parameters()} if low else set[nn.Parameter]()
    others = (p for p in inside or watch.trainable() if p not in apart)
    counted = [p for p in others if p.is_floating_point() and p.dtype != torch.float64]
    found = {p.dtype for p in counted}
    text = _listed(found)
    if low:
        wide = sum(whole(p) for p in counted if p.dtype != wanted)
        watch.differs(feature, str(wanted), text, wrong=wide > _OWN_WIDE_RATIO * sum(map(whole, counted)))
    elif torch.bfloat16 in found or torch.float16 in found:
        own = None if watch.own is None else watch.own.dtypes
        wrong = bool(_beside(watch, feature, text, found - {wanted}, own))
        watch.differs(feature, str(wanted), text, wrong=wrong)


def recomputation(watch: Watch) -> None:
    used, ran = watch.plan.get("activation-checkpointing"), set(watch.heard.ran)
    used = used or watch.plan.get("selective-checkpointing")
    if not ran:
        if used is not None:
            watch.unseen(f"{used.technique}: no repeated blocks were seen running")
        return
    wanted = set[int]()
    if used is not None:
        wanted = {i for i in ran if i % int(used.settings.get("every", 1)) == 0}
    feature = used.technique if used is not None else "activation-checkpointing"
    found = watch.heard.recomputed()
    if watch.plan.get("chunking") is not None:
        found &= wanted  # parts of the others run again, slice by slice
    planned, text = (_listed(sorted(s)) for s in (wanted, found))
    own = _own_step(watch, None) if found - wanted else None
    again = None if own is None else own.recomputed()
    beside = _beside(watch, feature, f"that blocks {text} run again", found - wanted, again)
    due = wanted & watch.heard.passed  # nothing runs again where no gradient goes through
    if used is not None and not due:
        watch.unseen(f"{feature}: no gradient goes through the blocks that would run again")
    wrong = bool(due - found or beside)
    watch.differs(feature, f"blocks {planned} run again in backward", text, wrong=wrong)


def autocast(watch: Watch) -> None:
    feature = next((n for n in _AUTOCAST if watch.plan.get(n)), "bf16-autocast")
    if not watch.heard.autocast:
        if watch.plan.get(feature):
            watch.unseen(f"{feature}: no layers of repeated blocks were heard")
        return
    found = {kind for _, kind in watch.heard.autocast}
    text = _listed(found)
    if watch.plan.get(feature) is not None:
        watch.differs(feature, str(_AUTOCAST[feature]), text, wrong=_outside(watch, feature))
        return
    own = _own_step(watch, None) if found - {"off"} else None
    kinds = None if own is None else {kind for _, kind in own.autocast}
    watch.differs(feature, "off", text, wrong=bool(_beside(watch, feature, text, found - {"off"}, kinds)))


def _outside(watch: Watch, feature: str) -> bool:
    """Whether blocks are outside of autocast that the model itself does not keep there."""
    wanted = _AUTOCAST[feature]
    blocks = {index for index, _ in watch.heard.autocast}
    outside = blocks - watch.heard.narrow(str(wanted))
    own = _own_step(watch, wanted) if outside else None
    if own is not None:
        return bool(outside & own.narrow(str(wanted)))
    few = 2 * len(outside) <= len(blocks)
    if outside and few:
        watch.unseen(f"{feature}: whether the model itself leaves blocks {_listed(sorted(outside))} out")
    return not few


def fsdp2_precision(watch: Watch) -> None:
    fsdp, computed = watch.plan.get("fsdp2"), watch.heard.computed
    if fsdp is None or not computed:
        return
    low = fsdp.settings["precision"] == "bf16"
    held = {p.dtype for block in watch.blocks for p in block.parameters() if p.is_floating_point()}
    wide = sum(n for d, n in computed.items() if d != torch.bfloat16)
    planned = {torch.bfloat16} if low else held
    wrong = wide > _OWN_WIDE_RATIO * sum(computed.values()) if low else planned != set(computed)
    watch.differs("fsdp2: precision", f"layers in {_listed(planned)}", _listed(computed), wrong=wrong)


def _own_step(watch: Watch, narrow: torch.dtype | None) -> Heard | None:
    return None if watch.own is None else watch.own.step(narrow)


def _beside(watch: Watch, feature: str, text: str, found: set[_T], own: Collection[_T] | None) -> set[_T]:
    """What is not of the plan, and not the model's own doing."""
    if own is not None:
        return found - set(own)
    if found:
        watch.unseen(f"{feature}: {text}, which the plan does not say: whether the model does so by itself")
    return set()


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values if isinstance(values, list) else sorted(values, key=str))) or "none"


AFTER_A_STEP: tuple[Callable[[Watch], None], ...] = (recomputation, autocast, fsdp2_precision)
