"""Let one process of a distributed training run alone, as rank 0 on a fake process group."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import device_mesh, fsdp

from memfit.capture.device_redirect import DeviceRedirect
from memfit.capture.script_trace import ScriptTrace
from memfit.capture.tensors import is_real
from memfit.trace.fake_process_group import GlooScratch, prepare_ddp, rank_patches
from memfit.trace.stream_patches import streams
from memfit.types.device_kind import HOST
from memfit.types.plan import Use, use


class ScriptRanks:
    """The ranks of a script. ``count``: the size of its process group, 1 without one."""

    def __init__(self, trace: ScriptTrace, redirect: DeviceRedirect, launched: int) -> None:
        self.trace, self.redirect, self.launched = trace, redirect, launched
        self.count = 1
        self._uses: dict[str, Use] = {}
        self.backend = ""
        self._stack = contextlib.ExitStack()

    @property
    def uses(self) -> tuple[Use, ...]:
        """The techniques for several ranks that the script applies: ddp, fsdp2 or both. For ranks that share
        the work in another way, such as tensor parallelism, ddp: their memory is in the trace. Empty for one
        rank without either."""
        return tuple(self._uses.values()) or ((use("ddp"),) if self.count > 1 else ())

    def join(self, backend: Any = None, *args: Any, world_size: int = -1, **options: Any) -> None:
        """Stand for ``torch.distributed.init_process_group``: make a fake group of the script's world
        size."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        world_size = args[2] if len(args) > 2 else world_size
        self.count = world_size if world_size > 0 else int(os.environ.get("WORLD_SIZE", "1"))
        self.backend = str(backend or ("gloo" if self.trace.is_host else "nccl")).rpartition(":")[2]
        _INIT("fake", rank=0, world_size=self.count, store=FakeStore())
        if self.trace.is_host:
            self.trace.inner_modes.append(GlooScratch)
        else:
            self._stack.enter_context(streams(self.trace.recorder))

    def wrap_ddp(self, inner: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(inner)
        def init(
            ddp: Any, module: Any, device_ids: Any = None, output_device: Any = None, **options: Any
        ) -> None:
            with self.trace.region():
                inner(ddp, module, **options)
                prepare_ddp(ddp, self.trace.recorder.note_real)
            self._uses["ddp"] = use("ddp")

        return init

    def shard(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def fully_shard(module: Any, **options: Any) -> Any:
            if options.get("mesh") is None:  # a mesh holds real numbers
                options["mesh"] = device_mesh.init_device_mesh(HOST, (self.count,))
            with self.trace.region():
                out = inner(module, **options)
            offload = isinstance(options.get("offload_policy"), fsdp.CPUOffloadPolicy)
            self._uses["fsdp2"] = use("fsdp2", offload=offload)
            return out

        return fully_shard

    def spawn(
        self, fn: Callable[..., Any], args: Any = (), nprocs: int = 1, *rest: Any, **options: Any
    ) -> None:
        """Stand for ``torch.multiprocessing.spawn``: run rank 0 in this process."""
        os.environ.setdefault("WORLD_SIZE", str(nprocs))
        fn(0, *args)

    def mesh(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Return a stand-in for ``inner``, a function such as init_device_mesh whose first argument is a kind
        of device. An accelerator there is replaced by the host."""

        @functools.wraps(inner)
        def make(device_type: str, *args: Any, **options: Any) -> Any:
            return inner(
                HOST if self.redirect.names_accelerator(device_type) else device_type, *args, **options
            )

        return make


_INIT = dist.distributed_c10d.init_process_group
_NEW_GROUP, _ALL_REDUCE, _ALL_GATHER = dist.new_group, dist.all_reduce, dist.all_gather


@contextlib.contextmanager
def script_ranks(trace: ScriptTrace, redirect: DeviceRedirect, launched: int) -> Iterator[ScriptRanks]:
    """Inside this context, the process group that the script makes is a fake one, in which this process is
    rank 0. ``launched``: how many processes the script's launcher would start."""
    ranks = ScriptRanks(trace, redirect, launched)
    if launched > 1:
        names: dict[str, int | str] = {
            "WORLD_SIZE": launched,
            "LOCAL_WORLD_SIZE": launched,
            "RANK": 0,
            "LOCAL_RANK": 0,
            "GROUP_RANK": 0,
        }
        names |= {
            "ROLE_RANK": 0,
            "ROLE_WORLD_SIZE": launched,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }
        os.environ.update({name: str(value) for name, value in names.items()})
    distributed = torch.nn.parallel.DistributedDataParallel
    with contextlib.ExitStack() as stack:
        stack.enter_context(rank_patches())
        for owner, name, replacement in (
            (dist, "init_process_group", ranks.join),
            (dist.distributed_c10d, "init_process_group", ranks.join),
            (dist, "get_backend", lambda group=None: ranks.backend),
            (dist, "is_nccl_available", lambda: True),
            (dist, "new_group", _new_group),
            (dist, "all_reduce", _all_reduce),
            (dist, "all_gather", _all_gather),
            (dist, "all_gather_object", _all_gather_object),
            (dist, "gather_object", _gather_object),
            (dist, "broadcast_object_list", lambda *args, **options: None),
            (torch.multiprocessing, "spawn", ranks.spawn),
            (distributed, "__init__", ranks.wrap_ddp(distributed.__init__)),
            (fsdp, "fully_shard", ranks.shard(fsdp.fully_shard)),
            (dist, "init_device_mesh", ranks.mesh(device_mesh.init_device_mesh)),
            (device_mesh, "init_device_mesh", ranks.mesh(device_mesh.init_device_mesh)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        try:
            yield ranks
        finally:
            ranks._stack.close()


def _new_group(
    ranks: Any = None, timeout: Any = None, backend: Any = None, *rest: Any, **options: Any
) -> Any:
    return _NEW_GROUP(ranks, timeout, "fake", *rest, **options)


def _all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Stand for ``torch.distributed.all_reduce``: return what it returns, and sum a real ``tensor`` as if all
    ranks had the values of this one."""
    if is_real(tensor) and op == dist.ReduceOp.SUM:
        tensor.mul_(dist.get_world_size(group))
    return _ALL_REDUCE(tensor, op, group, async_op)


def _all_gather(tensors: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
    """Stand for ``torch.distributed.all_gather``: return what it returns, and gather a real ``tensor`` as if
    all ranks had the values of this one."""
    if is_real(tensor):
        for target in tensors:
            target.copy_(tensor)
    return _ALL_GATHER(tensors, tensor, group, async_op)


def _all_gather_object(objects: list[Any], value: Any, group: Any = None, **options: Any) -> None:
    objects[:] = [value] * len(objects)


def _gather_object(value: Any, objects: list[Any] | None = None, *place: Any, **options: Any) -> None:
    if objects is not None:
        objects[:] = [value] * len(objects)
