"""A fake process group of the plan's size, so that one process can trace any rank."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memfit.model.tensors import tensor_leaves
from memfit.techniques.rank_mesh import World, layout, make_world
from memfit.trace.streams import group_of
from memfit.types.errors import MemfitError, UserError
from memfit.types.plan import Plan
from memfit.types.trace import Allocation, Phase, PhaseSpan, peak_of_lives


@contextlib.contextmanager
def fake_ranks(plan: Plan, rank: int) -> Iterator[World]:
    """Yield the world (ranks, meshes and groups) of ``plan`` as ``rank`` sees it. Inside this context this
    process has a fake process group, whose collectives return at once. For a plan of one rank no group is
    made. Enter this outside a fake tensor mode, because a device mesh holds real numbers.

    Process groups that this process already has, as in a training script under torchrun, are set aside
    meanwhile: inside the context they are unknown to torch.distributed, and afterwards they are as before.

    Raises UserError if the plan's degrees of parallelism do not fit its ranks (`layout`). For a plan of
    several ranks, raises MemfitError inside another such context. If the plan has tensor parallelism, a
    UserError inside the context that reports an error of the user's code is replaced by one that names tensor
    parallelism as the cause.
    """
    if plan.ranks == 1:
        yield make_world(plan, rank=0, device="cpu")
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized() and dist.get_backend() == "fake":
        raise MemfitError("a plan with several ranks cannot be traced within the trace of another one")
    with own_groups_set_aside():
        _forget_other_worlds(layout(plan), rank)
        hook = sys.excepthook  # torch installs one that adds the rank to every later traceback
        dist.init_process_group("fake", rank=rank, world_size=plan.ranks, store=FakeStore())
        try:
            with rank_patches(), _blame_tensor_parallel(plan):
                yield make_world(plan, rank=rank, device="cpu")
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook


@contextlib.contextmanager
def own_groups_set_aside() -> Iterator[None]:
    """Inside this context, hide this process's own process groups from torch.distributed, which then has
    none; afterwards it has them again. The groups themselves are not touched. Without own groups, do nothing.
    """
    from torch._C._distributed_c10d import _register_process_group, _unregister_all_process_groups
    from torch.distributed import distributed_c10d as c10d

    own_world, backend, method = c10d._world, c10d._backend, c10d._default_pg_init_method
    if own_world.default_pg is None:
        yield
        return
    _unregister_all_process_groups()
    c10d._world = types.SimpleNamespace(  # type: ignore[assignment]  # torch's own way to override it
        default_pg=None,
        pg_map={},
        pg_names={},
        pg_group_ranks={},
        pg_backend_config={},
        group_count=0,
        tags_to_pg={},
        pg_to_tag={},
        pg_coalesce_state={},
        comms=[],
        pg_config_info=[],
    )
    try:
        yield
    finally:
        c10d._world, c10d._backend, c10d._default_pg_init_method = own_world, backend, method
        for group, name in own_world.pg_names.items():
            _register_process_group(name, group)
        c10d._update_default_pg(own_world.default_pg)


@contextlib.contextmanager
def _blame_tensor_parallel(plan: Plan) -> Iterator[None]:
    """If ``plan`` has tensor parallelism, turn a UserError that was raised from an error of the user's code
    (``__cause__``) into one that names tensor parallelism as the cause. The code may reshape the output of a
    Linear by its full width, of which a rank holds a part. Other errors are raised as they are."""
    try:
        yield
    except UserError as error:
        is_own_error = error.__cause__ is None or isinstance(error.__cause__, MemfitError)
        if "tensor-parallel" not in plan or is_own_error:
            raise
        raise UserError(
            f"the model fails under tensor-parallel: {error.given}",
            hint="the output of a Linear layer that is split by columns is only a rank's part of the full "
            "width, and code that uses the full width fails; choose which layers are split, and how, as in "
            'Job(tensor_parallel={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})',
        ) from error


_last_world: list[Any] = [None]


def _forget_other_worlds(*world: Any) -> None:
    """Clear DTensor's caches if ``world``, the degrees of parallelism and the rank, differs from that of the
    last call. The caches are keyed by meshes that compare equal although their process groups differ, and
    the groups of an earlier world are gone."""
    if _last_world[0] not in (None, world):
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute._gen_transform_infos.cache_clear()
        _redistribute.clear_redistribute_planner_cache()
    _last_world[0] = world


@contextlib.contextmanager
def rank_patches() -> Iterator[None]:
    """Inside this context, patch code that needs tensor values or does work that a trace does not need:

    - DDP does not compare the shapes of parameters across ranks when it starts, for which it would read
      values.
    - A device mesh is made outside all dispatch modes, because it looks up its rank in a real tensor.
    - Functional collectives are waited for when their result is used. Among fake tensors they would be waited
      for at once.
    - FSDP2 makes only the part of a parameter that its rank takes, not the parts of all ranks. With thousands
      of ranks these are most of the work.
    - SyncBatchNorm, which requires an accelerator, runs as BatchNorm (`batch_norm_anywhere`), also in DDP.
    """
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param
    from torch.nn.parallel import distributed

    inner = DeviceMesh.__init__

    def init(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            inner(self, *args, **kwargs)

    with (
        mock.patch.object(distributed, "_verify_param_shape_across_processes", lambda *a, **k: True),
        mock.patch.object(DeviceMesh, "__init__", init),
        mock.patch.object(functional, "_are_we_tracing", lambda: False),
        mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks),
        mock.patch.object(
            distributed.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda self, module: None
        ),
        batch_norm_anywhere(),
    ):
        yield


@contextlib.contextmanager
def batch_norm_anywhere() -> Iterator[None]:
    """Inside this context, run SyncBatchNorm, which requires an accelerator, as BatchNorm. In one process
    they compute the same. On several ranks SyncBatchNorm keeps the same tensors but for a few of one number
    for each channel, and also exchanges its statistics."""

    def forward(self: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm1d.forward(self, x)

    with mock.patch.object(nn.SyncBatchNorm, "forward", forward):
        yield


class _Chunks:
    """Stands for the list of ``count`` chunks of a tensor along ``dim``, as `torch.chunk` cuts it. It
    supports only indexing by a number of at least 0, which makes that chunk, a view of the tensor. Where
    torch.chunk would make fewer chunks, the others are empty tensors of one dimension."""

    def __init__(self, tensor: torch.Tensor, count: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._each = -(-tensor.shape[dim] // count)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self._each
        remaining = self._tensor.shape[self._dim] - start
        if self._each and remaining <= 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._each, remaining))


_LATE: contextvars.ContextVar[bool] = contextvars.ContextVar("late", default=False)


@contextlib.contextmanager
def late_collectives() -> Iterator[None]:
    """Assume in traces made inside this context that gloo's collectives finish as late as possible: the
    memory of a collective is held until the next collective of its process group. gloo runs collectives on
    its own threads, so the memory of CPU ranks lies between that of a trace made outside this context, where
    they finish at once, and that of a trace made inside."""
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)


_PRIMES: contextvars.ContextVar[bool] = contextvars.ContextVar("primes", default=False)


@contextlib.contextmanager
def optimizer_steps_only() -> Iterator[None]:
    """Let traces made inside this context run only an optimizer step in place of every training step but the
    last, which halves the time of two steps. This applies only to plans whose pipeline has several stages per
    rank (``virtual`` > 1). The peaks and operators of the last step are the same. Memory that a caching
    allocator would keep from a whole first step is not seen."""
    token = _PRIMES.set(True)
    try:
        yield
    finally:
        _PRIMES.reset(token)


def runs_optimizer_steps_only(plan: Plan) -> bool:
    """Return whether a trace of ``plan`` made now runs only an optimizer step in place of every training step
    but the last: inside `optimizer_steps_only`, if the pipeline of ``plan`` has several stages per rank."""
    pipeline = plan.get("pipeline")
    return _PRIMES.get() and pipeline is not None and int(pipeline.settings["virtual"]) > 1


class GlooScratch(TorchDispatchMode):
    """Mode that allocates the temporary memory of gloo's collectives on CPU tensors: two buffers for an
    all-gather, one after the other, and a copy of the input of a reduce-scatter or scatter.

    Each is freed at once. Inside `late_collectives`, a buffer of the largest size and the tensors of the
    collective are held until the next collective of the process group. Enter the mode inside the recorder,
    which records the allocations. The rules are those of torch/csrc/distributed/c10d/ProcessGroupGloo.cpp.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._late = _LATE.get()
        self._held: dict[str, Any] = {}  # by process group, if collectives finish late

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _GLOO_SCRATCH.get(func)
        out = func(*args, **(kwargs or {}))
        groups = rule(args, out) if rule is not None else ()
        sizes = [sum(t.numel() * t.element_size() for t in _pytree.tree_leaves(g)) for g in groups]
        for size_bytes in sizes:
            torch.empty(size_bytes, dtype=torch.uint8)
        if self._late and (group := group_of(func, args)):
            scratch = torch.empty(max(sizes), dtype=torch.uint8) if sizes else None
            self._held[group] = (args, out, scratch)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here


def _gloo_rules() -> dict[Any, Callable[[Any, Any], tuple[Any, ...]]]:
    """Return collective operator -> function of (its arguments, its output) that returns groups of tensors,
    for each operator for which gloo allocates temporary memory. gloo allocates a buffer of the bytes of each
    group, one after the other, and frees it before the next."""
    c10d, functional = torch.ops.c10d, torch.ops._c10d_functional
    return {
        c10d._allgather_base_.default: lambda args, out: (args[0], args[0]),
        c10d.allgather_.default: lambda args, out: (args[0], args[0]),
        c10d._reduce_scatter_base_.default: lambda args, out: (args[1],),
        c10d.scatter_.default: lambda args, out: (args[1],) if args[1] else (),
        functional.all_gather_into_tensor.default: lambda args, out: (args[0], out),
        functional.reduce_scatter_tensor.default: lambda args, out: (args[0],),
    }


_GLOO_SCRATCH = _gloo_rules()


class _RealIntegers(TorchDispatchMode):
    """Mode in which int32 tensors made by ``torch.empty`` are real: DDP lists its buckets in them and reads
    them in C++. Operators on real tensors alone run for real. Each real tensor that is made is reported as
    ``note(tensor, operator's name)``."""

    def __init__(self, note: Callable[[torch.Tensor, str], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensor_leaves((args, kwargs))
        is_maker = func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is torch.int32
        if is_maker or (tensors and all(type(t) is torch.Tensor for t in tensors)):
            with no_dispatch():
                out = func(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                self._note(out, str(func))
            return out
        return func(*args, **kwargs)


def split_host_memory(
    allocations: Sequence[Allocation], spans: Sequence[PhaseSpan]
) -> tuple[tuple[Allocation, ...], dict[str, Any]]:
    """Return (the allocations that are on the device, the fields of `Trace` about host memory). Except for
    ``host_peak_bytes``, these leave out the temporary memory of building the model: they count only
    allocations that are freed after the first forward pass began, or never. Bytes are as requested, not
    rounded. Allocations at the place "nowhere" are left out of all."""
    host = [a for a in allocations if a.stream == "host"]
    forward_start = next((s.start for s in spans if s.phase is Phase.FORWARD), 0)
    later_host = [a for a in host if a.end is None or a.end > forward_start]
    on_device = tuple(a for a in allocations if a.stream not in ("host", "nowhere"))
    return on_device, {
        "host_peak_bytes": _highest(host),
        "host_step_bytes": _highest(later_host),
        "host_optimizer_bytes": _highest([a for a in later_host if a.phase is Phase.OPTIMIZER]),
        "host_blocks_bytes": _host_blocks([a for a in later_host if a.phase is not Phase.OPTIMIZER]),
    }


def _host_blocks(allocations: Sequence[Allocation]) -> tuple[tuple[int, int], ...]:
    """Return (size in bytes, number) of the tensors that decide how large a pool of pinned memory becomes, in
    order of size. The pool reuses a freed block only for a size that rounds up to the same power of two. For
    each power, these are the tensors that are alive when most tensors of that power are. Allocations of 0
    bytes are left out."""
    by_power = defaultdict[int, list[Allocation]](list)
    for a in allocations:
        if a.requested_bytes:
            by_power[(a.requested_bytes // a.pieces - 1).bit_length()].append(a)
    blocks = Counter[int]()
    for group in by_power.values():
        changes = [(a.start, a.pieces, a.requested_bytes // a.pieces) for a in group]
        changes += [(a.end, -a.pieces, a.requested_bytes // a.pieces) for a in group if a.end is not None]
        alive, most = Counter[int](), Counter[int]()
        for _, count, size_bytes in sorted(changes):
            alive[size_bytes] += count
            if alive.total() > most.total():
                most = alive.copy()
        blocks += most
    return tuple(sorted(blocks.items()))


def _highest(allocations: Sequence[Allocation]) -> int:
    return peak_of_lives((a.start, a.end, a.requested_bytes) for a in allocations)


def prepare_ddp(wrapped: Any, note: Callable[[torch.Tensor, str], Any]) -> None:
    """Prepare the DDP module ``wrapped`` for fake tensors. Its reduction reads the value of the collective's
    future, which is None on a fake process group, so a communication hook replaces it: it divides each bucket
    by the number of ranks and all-reduces it. Before each forward pass, DDP lists its buckets in int32
    tensors and reads them in C++. They are made real; each of them, and each tensor computed from real ones,
    is reported as ``note(tensor, operator)``."""
    enter = wrapped._pre_forward

    def pre_forward(*args: Any, **kwargs: Any) -> Any:
        with _RealIntegers(note):
            return enter(*args, **kwargs)

    wrapped._pre_forward = pre_forward
    ranks = wrapped.process_group.size()

    def reduce(group: Any, bucket: Any) -> Any:
        buffer = bucket.buffer().div_(ranks)
        torch.distributed.all_reduce(buffer, group=group, async_op=True)
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(buffer)
        return future

    # torch reads the annotations as types, and in this module they are strings.
    reduce.__annotations__ = {
        "bucket": torch._C._distributed_c10d.GradBucket,
        "return": torch.futures.Future[torch.Tensor],
    }
    wrapped.register_comm_hook(wrapped.process_group, reduce)


def process_groups() -> dict[str, tuple[int, ...]]:
    """Return the ranks of every process group that this rank belongs to, by the group's name. The default
    group comes first. Return {} if this process has no process group."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return {}
    groups = dist.distributed_c10d._world.pg_group_ranks
    return {dist.distributed_c10d._get_process_group_name(g): tuple(r) for g, r in groups.items()}
