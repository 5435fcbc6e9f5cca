"""Activation checkpointing: blocks keep only their inputs and run again in backward (Chen et al. 2016).

``activation-checkpointing(every=k)`` recomputes every k-th block. ``selective-checkpointing`` recomputes all
operators inside every block except the expensive ones that its policy keeps. Results are bitwise equal (E0):
the random state is restored before the second forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.model.blocks import find_stacks
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.techniques.generation_cache import turn_off_caches
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


@functools.cache
def _checkpoint_arguments() -> frozenset[str]:
    """Return the names of the arguments that torch.utils.checkpoint.checkpoint takes itself."""
    from torch.utils.checkpoint import checkpoint

    return frozenset({*inspect.signature(checkpoint).parameters, "preserve_rng_state"})


def recompute(block: torch.nn.Module, **options: Any) -> None:
    """Make the block keep only its inputs in training mode, and run again in backward. In evaluation mode it
    runs as before. ``options`` are passed to torch.utils.checkpoint.checkpoint, besides use_reentrant=False.
    """
    from torch.utils.checkpoint import checkpoint

    inner: Callable[..., Any] = block.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return inner(*args, **kwargs)
        run = inner
        if taken := {name: kwargs.pop(name) for name in _checkpoint_arguments() & kwargs.keys()}:
            run = functools.partial(inner, **taken)  # such as ``debug``, which checkpoint would take itself
        return checkpoint(run, *args, use_reentrant=False, **options, **kwargs)

    block.forward = forward


def _apply_full(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    turn_off_caches(bench)
    for blocks in find_stacks(bench.model, bench.job.blocks, bench.job.more_blocks).values():
        for block in blocks[:: int(settings["every"])]:
            recompute(block)


def _apply_selective(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    turn_off_caches(bench)
    policy = str(settings["keep"])
    operators = frozenset(kept_operators(policy))
    make_predicate = functools.partial(
        _every_second if policy == "every-second-matmul" else _all_of, operators
    )
    stacks = find_stacks(bench.model, bench.job.blocks, bench.job.more_blocks)
    for block in itertools.chain(*stacks.values()):
        region = getattr(block.forward, "region", None)
        if region is None:
            block.forward = _without_cast_cache(block.forward)
            recompute(block, context_fn=functools.partial(_contexts, make_predicate), **_hook_options())
        else:  # a compiled block's graph is split according to the policy
            region.recompute = make_predicate


def _hook_options() -> dict[str, bool]:
    """Return the keyword arguments for torch.utils.checkpoint.checkpoint with which what the policy keeps
    stays on the device although hooks of saved tensors, such as those of activation-offload, are active:
    ``{"respect_saved_tensors_hooks": False}``. Return {} for versions of torch without this option, which
    always keep it there. Versions with the option warn unless it is given."""
    from torch.utils.checkpoint import checkpoint

    name = "respect_saved_tensors_hooks"
    return {name: False} if name in inspect.signature(checkpoint).parameters else {}


def _without_cast_cache(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``inner``, the forward method of a block, with autocast's cache of cast weights disabled while
    it runs. With the cache, a block that is called several times would find cached copies from the second
    call on, but not in the recomputation, so that the two would run different operators."""
    import torch

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        was_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return inner(*args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(was_enabled)

    return forward


def _contexts(make_predicate: Callable[[], Callable[[Any], bool]]) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    keeps = {True: make_predicate(), False: make_predicate()}  # keyed by whether it is the recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_kept = keeps[context.is_recompute](op)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    forward_context, recompute_context = create_selective_checkpoint_contexts(policy)
    return forward_context, _Lasting(recompute_context)


class _Lasting:
    """Wraps torch's context for recomputation, which returns kept values only once. With this class, a second
    backward pass through a retained graph, as for higher-order gradients, finds them again."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.kept: Mapping[Any, Any] = {}

    def __enter__(self) -> None:
        import torch

        if torch._C._autograd._get_current_graph_task_keep_graph():
            self.kept = {operator: copy.copy(entries) for operator, entries in self.inner.storage.items()}
        self.inner.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.inner.__exit__(*raised)
        self.inner.storage.update(self.kept)
        self.kept = {}


def _all_of(kept_operators: frozenset[Any]) -> Callable[[Any], bool]:
    return kept_operators.__contains__


def _every_second(kept_operators: frozenset[Any]) -> Callable[[Any], bool]:
    """Return a new predicate for one call of a block. It is called with the block's operators in their order
    and says of each whether its output is kept. It follows torchtitan: of the plain matrix products (mm, also
    of torchao's 8-bit tensors), the first, the third and so on are kept. Of the other operators, those in
    ``kept_operators`` are kept."""
    import torch

    # In eager mode, policies see a product of torchao's 8-bit tensors as a plain one; a compiler's graph has
    # the 8-bit operator.
    products, seen = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default), 0

    def keeps(op: Any) -> bool:
        nonlocal seen
        is_product = op in products
        seen += is_product
        return op in kept_operators and not (is_product and seen % 2 == 0)

    return keeps


def kept_operators(policy: str) -> Iterable[Any]:
    """Yield the operators whose outputs ``policy``, a value of the setting ``keep``, keeps. With "attention",
    these are the fused attention kernels, whose recomputation costs most per byte. With "matmul" and
    "every-second-matmul", matrix products and convolutions are added."""
    import torch

    aten: Any = torch.ops.aten
    yield aten._scaled_dot_product_flash_attention_for_cpu.default
    yield aten._scaled_dot_product_flash_attention.default
    yield aten._scaled_dot_product_efficient_attention.default
    yield aten._scaled_dot_product_cudnn_attention.default
    if policy != "attention":
        yield from (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default)
        yield aten._scaled_mm.default


FULL = Technique(
    name="activation-checkpointing",
    summary="keep only the inputs of blocks and compute their insides again in backward",
    script_call="recompute {blocks} in backward: model.gradient_checkpointing_enable(), or "
    "torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)",
    changes=StepPart.PASSES,
    before_engine=True,
    effect=EffectClass.E0,
    apply=_apply_full,
    settings=lambda facts: [
        {"every": k} for k in (1, 2, 3) if k < facts.block_count or k == facts.block_count == 1
    ],
    order=50,
    slot="recomputation",
    knobs=(
        Knob(
            name="every",
            default=1,
            doc="recompute every k-th block of each stack, beginning with the first; 1: all blocks",
        ),
    ),
)

SELECTIVE = Technique(
    name="selective-checkpointing",
    summary="recompute cheap operators of every block, keep the expensive ones",
    script_call="torch.utils.checkpoint with create_selective_checkpoint_contexts, keep: {keep}",
    changes=StepPart.PASSES,
    before_engine=True,
    effect=EffectClass.E0,
    apply=_apply_selective,
    settings=lambda facts: [{"keep": "attention"}, {"keep": "matmul"}] if facts.block_count else [],
    order=50,
    slot="recomputation",
    knobs=(
        Knob(
            name="keep",
            default="attention",
            doc="whose outputs stay in memory; attention: those of fused attention; matmul: also those of "
            "matrix products and convolutions; every-second-matmul: as matmul, but of plain matrix products "
            "(mm) only every second",
            choices=("attention", "matmul", "every-second-matmul"),
        ),
    ),
)
