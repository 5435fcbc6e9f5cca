"""``torch.compile`` as it affects memory: which tensors it keeps for backward, and which it never makes.

Real training calls torch.compile. A trace on fake tensors compiles nothing: the joint graph of forward and
backward is traced and split by torch's own partitioner (a minimum cut over what must be kept,
torch._functorch.partitioners). Each side then runs as kernels. Matrix products, convolutions and attention
run one by one. The operators between them are fused, so that only values that leave a fused group take
memory, as in Inductor (which also overwrites an input of the same size that is not used again).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from memfit.model.blocks import equal_blocks, find_blocks
from memfit.techniques.base import Knob, StepPart, Technique, Workbench
from memfit.techniques.generation_cache import turn_off_caches
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue


def can_compile(kind: str) -> bool:
    """Return whether torch.compile has a generator of kernels for devices of this kind: torch's own, or one
    that the package which brings the device to torch has registered. Whether the compiler that it starts is
    installed is not checked."""
    try:
        from torch._inductor.codegen.common import get_scheduling_for_device, init_backend_registration

        init_backend_registration()
    except ImportError:  # of a package that the generators use
        return False
    return get_scheduling_for_device(kind) is not None


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch

    from memfit.techniques.compiled_regions import Region

    turn_off_caches(bench)
    blocks, others = list[torch.nn.Module](), list[torch.nn.Module]()
    if settings["scope"] == "model":
        others = [bench.model]
    else:
        path, blocks = find_blocks(bench.model, bench.job.blocks)
        if settings["scope"] == "parts":
            top_name = path.partition(".")[0]  # "" if the blocks are the model's own children
            others = [m for n, m in bench.model.named_children() if top_name and n != top_name]
    modules = [*blocks, *others]
    if torch._guards.active_fake_mode() is None:  # real training uses the real compiler
        kind = torch.device(bench.torch_device).type
        if not can_compile(kind):
            raise UserError(
                f"compile is not supported on devices of the kind {kind!r}: torch.compile makes no kernels "
                "for them",
                hint="take it out of the plan; `--on this:cpu` trains on the processor",
            )
        # `module.compile()` skips torch's own classes, and pipelines bypass it
        for module in modules:
            module.forward = torch.compile(module.forward)
        return
    graphs: dict[Any, Any] = {}
    kinds = [*equal_blocks(blocks), *range(len(blocks), len(modules))]  # equal blocks share a graph
    for module, kind in zip(modules, kinds, strict=True):
        region = Region(module, graphs, kind)
        module.forward = _calling(region, module.forward)


def _calling(region: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return region(*args, **kwargs)

    forward.region = region  # type: ignore[attr-defined]  # selective recomputation goes inside
    return forward


TECHNIQUE = Technique(
    name="compile",
    summary="torch.compile: fused kernels, and only what a minimum cut keeps for backward",
    script_call="torch.compile, scope: {scope}",
    changes=StepPart.PASSES,
    effect=EffectClass.E1,
    apply=_apply,
    # Not searched: only for predictions of runs that use it.
    order=45,  # inside recomputation
    knobs=(
        Knob(
            name="scope",
            default="blocks",
            doc="what becomes one graph; blocks: each repeated block; parts: each block and each child "
            "of the model that does not contain them; model: the whole model",
            choices=("blocks", "parts", "model"),
        ),
    ),
)
