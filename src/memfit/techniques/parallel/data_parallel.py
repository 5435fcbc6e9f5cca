"""Data parallelism: the whole model on every rank (DDP), or a shard of it on each rank (FSDP2, HSDP).

DDP averages gradients in buckets while backward runs (Li et al. 2020). FSDP2 gathers each block's parameters
just before they are used and scatters its gradients (Rajbhandari et al. 2020, ZeRO-3;
torch.distributed.fsdp.fully_shard).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memfit.model.blocks import find_stacks
from memfit.model.scalar_parameters import refuse_scalars
from memfit.techniques.base import JobFacts, Knob, StepPart, Technique, Workbench
from memfit.techniques.optimizers import step_on_host
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch

_SYNC = Knob(
    name="sync",
    default="every",
    doc="when gradients are reduced over ranks; every: after every micro-batch; last: after the last one "
    "only (no_sync), until which whole gradients are kept; with fsdp2 in a pipeline, last means the last "
    "backward of each stage, until which reshard=False keeps parameters gathered",
    choices=("every", "last"),
)


def _apply_ddp(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from torch.nn.parallel import DistributedDataParallel

    mesh = bench.world.flat("replicate", "context")
    if mesh is None:
        return
    if bench.torch_device != HOST:  # DDP's hooks do not survive a later move
        bench.model.to(bench.torch_device)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(bench.model, bench.own_parameters)
    with bench.memory_pool(""):  # DDP's buckets are on the device
        ddp = DistributedDataParallel(
            bench.model,
            process_group=mesh.get_group(),
            bucket_cap_mb=int(settings["bucket_mib"]),
            gradient_as_bucket_view=bool(settings["bucket_view"]),
        )
    bench.call, bench.ddp = WrappedModel(ddp, bench.model), ddp
    if bench.on_ddp is not None:
        bench.on_ddp(ddp)
    if settings["sync"] == "last":

        def choose(last: bool) -> None:
            ddp.require_backward_grad_sync = last

        bench.before_micro_batch.append(choose)


class WrappedModel:
    """What a job's loss gets as its model if that is wrapped, as by DDP. A call calls ``wrapper``. An
    attribute is read from ``model``, the module inside the wrapper, so that the loss works unchanged."""

    def __init__(self, wrapper: torch.nn.Module, model: torch.nn.Module) -> None:
        self._wrapper, self._model = wrapper, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _apply_fsdp2(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    replicas = bench.world.layout.replicate
    if replicas > 1 and bench.world.layout.shard == 1:  # a mesh of one dimension would be sharded over
        raise UserError(
            f"{replicas} replicas of fsdp2 over {replicas} data-parallel ranks leave nothing to shard",
            hint="use ddp, or fewer replicas",
        )
    mesh = bench.world.sub("replicate", "shard") if bench.world.layout.context == 1 else _with_context(bench)
    if mesh is None:
        return
    refuse_scalars(bench.model, "fsdp2", left_alone=bench.own_parameters)
    # Fake tensors cannot be pinned.
    pinned = not bench.device.is_host and torch._guards.active_fake_mode() is None
    offload = CPUOffloadPolicy(pin_memory=pinned) if settings["offload"] else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _precision(str(settings["precision"])),
        "offload_policy": offload,
        "ignored_params": {p for n, p in bench.model.named_parameters() if n in bench.own_parameters},
    }
    # The model is built on the host, and shards move.
    with bench.memory_pool("host" if settings["offload"] else ""):
        groups = _sharded(bench, settings, options)
        root: Any = groups.pop()
    if settings["offload"]:
        optimize_on_host(bench)
    _prefetch([g for g in groups if not isinstance(g, list)], int(settings["prefetch"]))

    def choose(last: bool) -> None:
        root.set_is_last_backward(last)
        if settings["sync"] == "last":
            sync_stages(last) if bench.pipeline else root.set_requires_gradient_sync(last)

    sync_stages = _once_a_step(bench, root, stay=settings["reshard"] is False)
    bench.before_micro_batch.append(choose)


def _once_a_step(bench: Workbench, root: Any, *, stay: bool) -> Callable[[bool], None]:
    """Return a function to call before each backward, with whether that is the last of the step. The function
    makes FSDP2's modules reduce gradients only in the last backward of the step. With a pipeline, each module
    reduces them in the last backward of its own stage.

    With ``stay``, gathered parameters, too, are freed only after that backward, as when torch's schedules are
    given FSDP2's modules (torch.distributed.pipelining.stage).
    """
    from torch.distributed.fsdp import FSDPModule

    fsdp_modules = [m for m in root.modules() if isinstance(m, FSDPModule)]

    def choose(last: bool) -> None:
        for module in fsdp_modules:
            is_last_backward = last or bool(bench.pipeline and module in bench.pipeline.ending)
            module.set_requires_gradient_sync(is_last_backward, recurse=False)
            if stay:
                module.set_reshard_after_backward(is_last_backward, recurse=False)

    return choose


def _sharded(bench: Workbench, settings: Mapping[str, KnobValue], options: dict[str, Any]) -> list[Any]:
    """Shard the model with FSDP2. Return the sharded groups in the order of `_groups`, so that the model is
    the last. If the setting precision casts gathered parameters, or the parameters have several dtypes, the
    parameters of islands (modules that compute in float32) are not cast. For that, islands that are no group
    of `_groups` become groups of their own, which are not returned."""
    from torch.distributed.fsdp import fully_shard

    group_specs = _groups(bench, str(settings.get("units")), settings["reshard"])
    mixed_dtypes = settings["precision"] != "as-is" or len({p.dtype for p in bench.model.parameters()}) > 1
    if not mixed_dtypes or not bench.islands:
        return [fully_shard(modules, reshard_after_forward=free, **options) for modules, free in group_specs]
    separate_islands = {i for i in bench.islands.values() if next(i.parameters(), None) is not None}
    island_modules = {m for i in separate_islands for m in i.modules()}
    group_specs = [
        ([m for m in g if m not in island_modules] or g if isinstance(g, list) else g, free)
        for g, free in group_specs
    ]
    grouped_modules = {m for g, _ in group_specs for m in (g if isinstance(g, list) else [g])}
    separate_islands -= grouped_modules
    outer_islands = {i for i in separate_islands if grouped_modules & set(i.modules())}
    uncast_options = options | {"mp_policy": _precision("as-is")}

    def shard(module: Any, free: bool) -> Any:
        shard_options = (
            uncast_options
            if island_modules.issuperset(module if isinstance(module, list) else [module])
            else options
        )
        return fully_shard(module, reshard_after_forward=free, **shard_options)

    for island in separate_islands - outer_islands:
        shard(island, settings["reshard"] is not False)
    groups = [shard(modules, free) for modules, free in group_specs[:-1]]
    for island in outer_islands:
        shard(island, settings["reshard"] is not False)
    return [*groups, shard(*group_specs[-1])]


def optimize_on_host(bench: Workbench) -> None:
    """Make a trace count what the steps of the bench's optimizer allocate as host memory, where its
    parameters and gradients are. Set ``bench.gradients_on`` and ``bench.parameters_on`` to "host"."""
    make = bench.make_optimizer

    bench.make_optimizer = lambda params: step_on_host(bench, make(params))
    bench.gradients_on = bench.parameters_on = "host"


def _with_context(bench: Workbench) -> Any:
    """Return the mesh over which parameters are sharded if each sample is divided among ranks. Its single
    dimension has the data-parallel ranks times the ranks that share a sample. Raises UserError if fsdp2 has
    several replicas."""
    flat = bench.world.flat("shard", "context")
    if bench.world.layout.replicate > 1:
        raise UserError(
            "fsdp2 with replicas does not support context-parallel and axial-parallel",
            hint="set replicas=1 of fsdp2, or leave out context-parallel or axial-parallel",
        )
    return flat


def _blocks(bench: Workbench) -> list[Any]:
    """Return the blocks of all stacks, such as those of an encoder and of a decoder, in the model's order.
    Return [] if no repeated blocks are found. Raises UserError if there are none at ``Job.blocks``."""
    try:
        stacks = find_stacks(bench.model, bench.job.blocks)
        return [b for path, _ in bench.model.named_modules() for b in stacks.get(path, ())]
    except UserError:
        if bench.job.blocks is not None:
            raise
        return []  # the whole model is one group


def _groups(bench: Workbench, units: str, reshard: KnobValue) -> list[tuple[Any, bool]]:
    """Return (group, whether its gathered parameters are freed after forward) for each group of modules whose
    parameters FSDP2 gathers together, as the settings ``units`` and ``reshard`` say. A group is a module or a
    list of modules. The last one is the model, for all parameters that are in no other group. Raises
    UserError as `_blocks` does."""
    blocks = _blocks(bench)
    modules_before, modules_after = _modules_around_blocks(bench, blocks)
    modules: list[Any] = list(blocks)
    if units == "parts":
        modules += modules_before + modules_after
    elif units == "ends":
        modules = [*modules_before, *blocks, modules_after] if modules_after else [*modules_before, *blocks]
    free = [reshard is not False] * len(modules)
    if reshard == "not-last" and modules:
        free[-1] = False
    return [*zip(modules, free, strict=True), (bench.model, reshard is True)]


def _modules_around_blocks(bench: Workbench, blocks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return (modules before the blocks, such as the embedding; modules after them, such as the head). They
    are those that `_callable` yields of the model, that have parameters and contain no blocks, in the order
    of the model's attributes. Those between blocks count as after them. Without blocks, all are in the first
    list."""
    block_modules = {m for block in blocks for m in block.modules()}
    modules_before: list[Any] = []
    modules_after: list[Any] = []
    current = modules_before
    for module in _callable(bench.model):
        if block_modules & set(module.modules()):
            current = modules_after
        elif next(module.parameters(), None) is not None:
            current.append(module)
    return modules_before, modules_after


def _callable(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the module's children. In place of a ModuleList or ModuleDict, which cannot be called, yield its
    members, and in place of one among these in turn its members."""
    import torch

    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from _callable(child)
        else:
            yield child


def _precision(name: str) -> Any:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if name == "as-is":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _prefetch(groups: list[Any], depth: int) -> None:
    """Make each FSDP2 module of ``groups`` gather the parameters of other groups ahead: those of the next
    ``depth`` groups in forward, and those of the previous ``depth`` groups, which come next there, in
    backward. With a ``depth`` of 1, change nothing: torch gathers one group ahead by itself, and only in
    backward."""
    if depth <= 1:
        return
    for i, group in enumerate(groups):
        group.set_modules_to_forward_prefetch(groups[i + 1 : i + 1 + depth])
        group.set_modules_to_backward_prefetch(groups[max(0, i - depth) : i][::-1])


def _on_ranks(*settings: Mapping[str, KnobValue]) -> Callable[[JobFacts], Iterable[Mapping[str, KnobValue]]]:
    """Return a function for ``Technique.settings``. It returns ``settings`` if the plan has several ranks,
    and () for one rank, where the technique is useless."""
    return lambda facts: settings if facts.ranks > 1 else ()


DDP = Technique(
    name="ddp",
    summary="the same model on every rank, gradients averaged in buckets",
    script_call="torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb={bucket_mib}, "
    "gradient_as_bucket_view={bucket_view})",
    changes=StepPart.BOTH,
    effect=EffectClass.E1,
    apply=_apply_ddp,
    settings=_on_ranks({}),
    order=90,
    slot="data-parallel",
    knobs=(
        Knob(name="bucket_mib", default=25, doc="size of DDP's buckets: MiB of gradients reduced together"),
        Knob(
            name="bucket_view",
            default=True,
            doc="True: gradients are views of buckets; False: they are separate and copied to buckets",
            choices=(True, False),
        ),
        _SYNC,
    ),
    forbids=("optimizer-in-backward",),
)

FSDP2 = Technique(
    name="fsdp2",
    summary="each rank keeps a shard of parameters, gradients and optimizer state (ZeRO-3; HSDP by replicas)",
    script_call="torch.distributed.fsdp.fully_shard on each block and the model, "
    "reshard_after_forward={reshard}, precision {precision}",
    changes=StepPart.BOTH,
    excluded=lambda facts: facts.has_scalar_parameters or facts.needs_parameter_names,
    pins_host_memory=True,
    effect=EffectClass.E1,
    apply=_apply_fsdp2,
    settings=_on_ranks({}, {"precision": "bf16"}),
    order=90,
    slot="data-parallel",
    knobs=(
        Knob(
            name="reshard",
            default=True,
            doc="which gathered parameters are freed after forward; True: all; False: none; blocks: all but "
            "those of the root group, as torch before 2.8; not-last: all but those of the last group before "
            "the root and of the root",
            choices=(True, False, "blocks", "not-last"),
        ),
        Knob(
            name="precision",
            default="as-is",
            doc="dtype of gathered parameters; as-is: that of their shards; bf16: bfloat16, with gradients "
            "reduced in float32",
            choices=("as-is", "bf16"),
        ),
        Knob(
            name="prefetch",
            default=1,
            doc="groups gathered ahead in forward and backward; 1: as torch does, one group in backward",
        ),
        Knob(
            name="replicas",
            default=1,
            doc="copies of the sharded model (HSDP); a divisor of the number of data-parallel ranks",
        ),
        Knob(
            name="units",
            default="blocks",
            doc="what is gathered at once; blocks: each block; parts: also each module before or after the "
            "blocks; ends: as parts, but all modules after the blocks together; the rest is the root group",
            choices=("blocks", "parts", "ends"),
        ),
        Knob(
            name="offload",
            default=False,
            doc="whether shards of parameters and gradients are in host memory and updated there",
            choices=(True, False),
        ),
        _SYNC,
    ),
    # Neither bitsandbytes nor torch's Adafactor supports DTensor.
    forbids=("optimizer-in-backward", "adamw-8bit", "adamw-paged", "adafactor"),
    unsearched=("bf16-autocast",),  # it has its own precision setting
)
