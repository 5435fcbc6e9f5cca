"""ZeRO stage 3: parameters are gathered just before a module needs them, and freed when none will need them
soon.

The first forward and backward record in which order modules run, and free parameters as soon as their module
has run. From then on, parameters are gathered ahead and kept for reuse, up to limits of gathered and of
prefetched elements (DeepSpeed's partitioned_param_coordinator.py and partition_parameters.py). A freed
parameter is empty. A view of it that autograd saved keeps the whole storage.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import ReduceScatterOptions

from memfit.techniques.zero.base import Group, ZeroOptimizer, all_gather, norm64, on_device
from memfit.techniques.zero.stored_state import StoredState
from memfit.techniques.zero.zero_stage3_autograd import LinearPatch, call_on_gradient, watch_reads

if TYPE_CHECKING:
    from memfit.techniques.base import Workbench
    from memfit.types.plan import KnobValue


class ZeroThree(ZeroOptimizer):
    """Stage 3: every parameter is cut into as many pieces of one size as there are ranks; pieces at the end
    are padded. Each rank keeps one piece of each parameter. Its pieces of trained parameters are in one flat
    buffer. A step updates an fp32 master copy of that buffer and copies it back.

    ``stored`` keeps the master copy and the optimizer's state if they are on local storage; there is no
    ``master`` then. Otherwise it is None."""

    stored: StoredState | None = None

    def _prepare(self, settings: Mapping[str, KnobValue]) -> list[torch.nn.Parameter]:
        bench, params = self.bench, self.params
        self.norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        with torch.no_grad():
            self.shards = shards = Shards(bench, params, settings, self.group)
            flat = shards.flat
            if settings["nvme"] != "none":
                sizes = [shards.size[p] for p in params]
                self.stored = StoredState(bench, flat, sizes, int(settings["sub_group_elements"]))
            else:
                self._make_master(flat)
            with bench.memory_pool(""):
                self.buffers = [torch.empty(self.limit, dtype=flat.dtype, device=bench.torch_device)]
            with bench.memory_pool(self.state_on):
                self.grads = torch.zeros_like(flat, device=bench.device_of(self.state_on))
            with bench.memory_pool(""):
                for param in params:  # so that its gradient's shape is known
                    shards.gather([param])
                    shards.free([param])
        bench.on_kept(flat, "parameter")
        bench.on_kept(self.grads, "gradient")
        bench.closers.append(bench.model.register_forward_pre_hook(lambda *_: shards.begin()).remove)
        linear = LinearPatch() if settings["memory_efficient_linear"] else None
        # Also those without parameters, which leave time to gather ahead.
        for module in bench.model.modules():
            self._watch(module)
            bench.closers.append(watch_reads(module, shards.read))
            bench.closers += linear.during(module) if linear is not None else []
        return [self.master] if self.stored is None else self.stored.masters

    def _make_master(self, flat: torch.Tensor) -> None:
        leaves = bool(self.state_on) and not self.shards.offload and not self.bench.device.is_host
        with self.bench.memory_pool(self.state_on):
            wide = flat.to(self.bench.device_of(self.state_on), torch.float32, copy=leaves)
            self.master = torch.nn.Parameter(wide.clone())
            del wide
            if self.state_on:
                self.master.grad = torch.zeros_like(self.master)
            torch.zeros_like(self.master)

    def _watch(self, module: torch.nn.Module) -> None:
        """Add hooks to the module. They gather its parameters before its forward and before its backward, and
        release them after each of the two."""
        fetch, release, running = self.shards.fetch, self.shards.release, self.shards.running

        def before(mod: torch.nn.Module, args: Any) -> Any:
            running.append(mod)
            fetch(mod)
            return call_on_gradient(args, lambda: release(mod), once=True)

        def after(mod: torch.nn.Module, args: Any, out: Any) -> Any:
            running.pop()
            release(mod)
            return call_on_gradient(out, lambda: fetch(mod))

        self.bench.closers.append(module.register_forward_pre_hook(before).remove)
        self.bench.closers.append(module.register_forward_hook(after).remove)

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        self._add(param)

    def _reduce_pending(self) -> None:
        """Average the pending gradients over ranks, and give each rank its pieces. Add this rank's pieces to
        those of earlier micro-batches of the step, and free the whole gradients."""
        pending = sorted(self.pending, key=self.shards.number.__getitem__)
        sizes = [self.shards.size[p] for p in pending]
        rank_part = self._reduce_scatter([p.grad.view(-1) for p in pending if p.grad is not None], sizes)
        for param, part in zip(pending, rank_part.split(sizes), strict=True):
            self._keep(param, part)

    def _reduce_scatter(self, grads: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
        even = all(g.numel() == n * self.ranks for g, n in zip(grads, sizes, strict=True))
        if even and len(grads) == 1:
            whole = grads[0]
        elif even:  # one operation for all ranks, because thousands of pieces would take too long
            whole = torch.cat([g.view(self.ranks, -1) for g in grads], dim=1).view(-1)
        else:
            pieces = [
                c
                for r in range(self.ranks)
                for g, n in zip(grads, sizes, strict=True)
                for c in piece(g, n, r)
            ]
            whole = torch.cat(pieces)
        whole.div_(self.ranks)
        rank_part = whole.narrow(0, self.rank * sum(sizes), sum(sizes))
        if self.ranks > 1:
            self.group._reduce_scatter_base(rank_part, whole, ReduceScatterOptions()).wait()
        return rank_part

    def _keep(self, param: torch.nn.Parameter, part: torch.Tensor) -> None:
        total = self.shards.of(param, self.grads)
        on_host = bool(self.state_on) and not self.bench.device.is_host
        if self.micro_batch == 0:
            total.copy_(part)
        elif on_host:
            # The sum comes to the device and goes back.
            total.copy_(total.to(part.device, copy=True).add_(part))
        else:
            total.add_(part)
        if self.state_on and self.last:
            with self.bench.memory_pool(""):
                grad = total.to(self.bench.torch_device, copy=True) if on_host else total
                self.norms[param] = norm64(grad)
                if self.stored is not None:
                    self.stored.write_gradient(self.shards.place[param], grad.float())
                else:
                    assert self.master.grad is not None
                    self.shards.of(param, self.master.grad).copy_(grad.float())
        param.grad = None

    def _after_backward(self) -> None:
        """Reduce the pending gradients. For a parameter without a gradient, add zeros to this rank's piece
        or, in the first micro-batch of a step, replace by zeros what it holds from the step before."""
        with torch.no_grad():
            self._reduce()
            for param in self.params:
                if param not in self.added:
                    self._keep(param, torch.zeros_like(self.shards.of(param, self.grads)))
            self.shards.end()

    def own_gradients(self) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
        return ((p, self.rank * self.shards.size[p], self.shards.of(p, self.grads)) for p in self.params)

    def grad_norm(self) -> torch.Tensor:
        with torch.no_grad():
            self.shards.free(self.shards.whole)
        if self.state_on:
            return self._norm(self.norms.values())
        return self._norm(norm64(self.shards.of(p, self.grads)) for p in self.params)

    def step(self) -> None:
        self.micro_batch = -1
        if self.stored is not None:
            self._step_by_sub_groups(self.stored)
        else:
            self._step_at_once()
        with torch.no_grad():
            self.shards.gather(list(self.shards.persistent))

    def _step_at_once(self) -> None:
        with self.bench.memory_pool(self.state_on):
            if not self.state_on:
                parts = [self.shards.of(p, self.grads) for p in self.params]
                self.master.grad = torch._utils._flatten_dense_tensors(parts).float()
            self._apply_scale()
            self.inner.step()
            if not self.state_on:
                self.master.grad = None
        with torch.no_grad():
            self.shards.flat.copy_(self.master)

    def _step_by_sub_groups(self, stored: StoredState) -> None:
        """Update one sub-group after the other: only the one in memory has a gradient, and optimizers leave
        parameters without a gradient alone."""
        for start, master in stored.load_sub_groups(self.inner.state):
            with self.bench.memory_pool("host"), torch.no_grad():
                if self.scale is not None and master.grad is not None:
                    master.grad.mul_(self.scale.to(master.grad.device))
            with self.bench.memory_pool("host"):
                self.inner.step()
            with torch.no_grad():
                self.shards.flat.narrow(0, start, master.numel()).copy_(master)
        self.scale = None

    @property
    def state(self) -> Any:
        return super().state if self.stored is None else self.stored.state(self.inner.state)


class Shards:
    """This rank's pieces of all parameters, and the bookkeeping of which parameters are whole at the moment.
    Parameters that are not whole are empty tensors."""

    def __init__(
        self,
        bench: Workbench,
        trained: list[torch.nn.Parameter],
        settings: Mapping[str, KnobValue],
        group: Group,
    ) -> None:
        self.bench, self.group, self.ranks = bench, group, group.size()
        params = list(bench.model.parameters())
        self.number = {p: i for i, p in enumerate(params)}
        self.shape = {p: p.shape for p in params}
        self.size = {p: -(-p.numel() // self.ranks) for p in params}
        threshold, self.offload = int(settings["persist_elements"]), settings["offload"] == "parameters"
        self.persistent = dict.fromkeys(p for p in params if p.numel() <= threshold)
        self.most_live, self.ahead = int(settings["live_elements"]), int(settings["prefetch_elements"])
        self.whole: dict[torch.nn.Parameter, None] = {}  # in the order in which they were gathered
        self.gathers: dict[torch.nn.Parameter, Gather] = {}  # being gathered, or gathered and not used yet
        self.active: dict[torch.nn.Parameter, set[torch.nn.Module]] = defaultdict(set)
        self.running: list[torch.nn.Module] = []
        # For a module, the parameters of other modules that it reads.
        self.others: dict[torch.nn.Module, list[torch.nn.Parameter]] = defaultdict(list)
        # Modules of this micro-batch in order, while the order is recorded.
        self.visits: list[torch.nn.Module] | None = None
        self.order: list[torch.nn.Module] = []  # the known order
        on_host = {*trained, *(p for p in params if self.offload and p not in self.persistent)}
        self.shard = {p: self._cut(p, "host" if p in on_host else "") for p in params}
        self.place: dict[torch.nn.Parameter, int] = {}
        self.flat = self._flatten(trained)
        for param in params:  # for code that inspects what a rank holds
            param.whole_shape, param.shard = self.shape[param], self.shard[param]  # type: ignore[attr-defined]
        self.begin()

    def _cut(self, param: torch.nn.Parameter, pool: str) -> torch.Tensor:
        """Return this rank's piece of the parameter, in a tensor of its own in the memory pool ``pool``, and
        make the parameter empty."""
        with self.bench.memory_pool(pool):
            shard = torch.empty(self.size[param], dtype=param.dtype, device=self.bench.device_of(pool))
        start = min(self.group.rank() * self.size[param], param.numel())
        elements = param.detach().view(-1)[start : start + self.size[param]]
        shard[: elements.numel()].copy_(elements)
        shard[elements.numel() :].zero_()
        param.data = torch.empty(0, dtype=param.dtype, device=self.bench.torch_device)
        return shard

    def _flatten(self, trained: list[torch.nn.Parameter]) -> torch.Tensor:
        """Copy this rank's pieces of the trained parameters, one by one, into a flat buffer on the host. Move
        the buffer to the device unless parameters are offloaded, and return it. The pieces become views of
        the returned buffer. DeepSpeed's pieces are on the device at first (``defragment`` of
        runtime/zero/utils.py). They are freed, and the allocator's cache is emptied, before the buffer comes,
        so that pieces and buffer never take memory there at the same time."""
        with self.bench.memory_pool("host"):
            flat = torch.empty(
                sum(self.size[p] for p in trained),
                dtype=trained[0].dtype,
                device=self.bench.device_of("host"),
            )
        offset = 0
        for param in trained:
            self.place[param] = offset
            offset += self.size[param]
            self.of(param, flat).copy_(self.shard[param])
            del self.shard[param]
        if not self.offload:
            flat = on_device(self.bench, flat)
        self.shard.update((p, self.of(p, flat)) for p in trained)
        return flat

    def of(self, param: torch.nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
        """Return the view of ``flat`` that belongs to ``param``. ``flat`` has the layout of the buffer of
        this rank's pieces of trained parameters."""
        return flat.narrow(0, self.place[param], self.size[param])

    def begin(self) -> None:
        """Start a forward pass of the whole model. Free the parameters that were gathered ahead and not used.
        If the order in which modules run is not known, take the one recorded since the last call of this
        method; if none was recorded, begin to record."""
        for param in list(self.gathers):
            if param in self.gathers:
                self._finish_gather(param)
            self._free_unused(param)
        if not self.order and self.visits:
            self.order, self.visits = self.visits, None
        elif not self.order:
            self.visits = []
        # As in DeepSpeed, `live` does not count what is whole already, and is negative where that is freed.
        self.at, self.live = 0, 0
        self.latest: dict[torch.nn.Parameter, int] = defaultdict(lambda: -1)
        self.queue = deque((p, i) for i, m in enumerate(self.order) for p in self._of(m))

    def end(self) -> None:
        """End backward. Free the parameters that modules are still using: these are modules whose inputs need
        no gradient, so that the hooks that would free them do not run. Persistent parameters stay whole."""
        for param in [p for p, modules in self.active.items() if modules]:
            self.active[param].clear()
            if param not in self.persistent:
                self._free_unused(param)

    def _of(self, module: torch.nn.Module) -> list[torch.nn.Parameter]:
        params = {*module.parameters(recurse=False), *self.others[module]}
        return sorted(params, key=self.number.__getitem__)

    def read(self, param: torch.nn.Parameter) -> None:
        """Called when code reads ``param``. If a module is running and ``param`` is neither whole nor being
        gathered, as when the module uses a parameter of another one, gather it. From then on, ``param`` is
        fetched together with the running module's own parameters. If no module is running, do nothing: the
        code then reads an empty tensor unless ``param`` is whole."""
        if self.running and param in self.number and param not in self.whole and param not in self.gathers:
            self.others[self.running[-1]].append(param)
            with torch.no_grad():
                self.gather([param])

    def fetch(self, module: torch.nn.Module) -> None:
        """Make the parameters of ``module``, which is about to run in forward or backward, whole. If the
        order in which modules run is known, start gathering those of later modules. If a module does not run
        in that order, the order is forgotten, and nothing is gathered ahead until a new one is known."""
        if self.order and (self.at >= len(self.order) or self.order[self.at] is not module):
            # The modules run in another order than before.
            self.order, self.queue, self.visits = [], deque(), None
        if self.visits is not None:
            self.visits.append(module)
        params = self._of(module)
        with torch.no_grad():
            self._send([p for p in params if p not in self.whole and p not in self.gathers])
            for param in params:
                self.active[param].add(module)
                if param in self.gathers:
                    self._finish_gather(param)
            if self.order:
                self._prefetch(params)
        self.at += 1

    def _prefetch(self, module_params: list[torch.nn.Parameter]) -> None:
        """Start gathering the parameters that come next in the known order of modules. Stop when the number
        of elements gathered and not freed in this pass reaches ``live_elements`` or that of those gathered by
        this call reaches ``prefetch_elements`` (settings of zero); the last parameter may exceed these.
        ``module_params`` are the parameters of the current module."""
        new_params = {p for p in module_params if self.latest[p] < self.at}
        used_params: set[torch.nn.Parameter] = set()
        while self.queue and len(used_params) < len(new_params):
            param, self.latest[param] = self.queue.popleft()
            used_params.add(param)
        elements_left = min(self.most_live - self.live, self.ahead)
        next_params = dict[torch.nn.Parameter, None]()
        while self.queue and elements_left > 0:
            param, position = self.queue.popleft()
            self.latest[param] = max(self.latest[param], position)
            if param not in self.whole and param not in self.gathers and param not in next_params:
                next_params[param] = None
                elements_left -= math.prod(self.shape[param])
        self._send(sorted(next_params, key=self.number.__getitem__))

    def release(self, module: torch.nn.Module) -> None:
        """Free the parameters of ``module``, which has run, except those that another module is using and, if
        the order of modules is known, persistent ones and those that the next modules need. While the order
        is not known, even persistent parameters are freed (release_sub_module in
        partitioned_param_coordinator.py)."""
        params = self._of(module)
        kept_params = self._parameters_to_keep(params) if self.order else set()
        for param in params:
            self.active[param].discard(module)
            if param not in kept_params:
                self._free_unused(param)

    def _parameters_to_keep(self, module_params: list[torch.nn.Parameter]) -> set[torch.nn.Parameter]:
        """Return the parameters that `release` must not free: persistent ones; those in ``module_params``,
        which are the parameters of the released module, that were gathered ahead for a later module; and
        those of the next modules in the known order, until these have ``live_elements`` elements."""
        kept_params = set(self.persistent) | {p for p in module_params if self.latest[p] > self.at}
        elements = 0
        for module in self.order[self.at :]:
            if elements >= self.most_live:
                break
            for param in self._of(module):
                kept_params.add(param)
                elements += math.prod(self.shape[param])
        return kept_params

    def _free_unused(self, param: torch.nn.Parameter) -> None:
        if param in self.whole and not self.active[param]:
            self.free([param])
            self.live -= math.prod(self.shape[param])

    def free(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Make ``params`` empty tensors, even those that modules are using. This rank's pieces stay."""
        for param in list(params):
            param.data = torch.empty(0, dtype=param.dtype, device=self.bench.torch_device)
            self.whole.pop(param, None)
            self.active[param].clear()

    def gather(self, params: list[torch.nn.Parameter]) -> None:
        """Gather each parameter into a tensor of its own, and wait until all are whole. On one rank, several
        parameters are made whole from their pieces without a gather (`_make_whole`), and a single parameter
        gets a copy of its piece."""
        if self.ranks == 1 and len(params) > 1:
            self._make_whole(params)
            return
        device = self.bench.torch_device
        wholes = [torch.empty(self.size[p] * self.ranks, dtype=p.dtype, device=device) for p in params]
        works = [
            all_gather(w, self.shard[p].to(device), self.group) for w, p in zip(wholes, params, strict=True)
        ]
        for work in works:
            if work is not None:
                work.wait()
        for param, whole in zip(params, wholes, strict=True):
            self._set_whole(param, whole)

    def _send(self, params: list[torch.nn.Parameter]) -> None:
        """Start gathering the parameters; several of them are gathered into one flat tensor. They are then in
        ``gathers`` until `_finish_gather`. On one rank they are made whole at once."""
        if not params:
            return
        self.live += sum(math.prod(self.shape[p]) for p in params)
        if self.ranks == 1:
            self._make_whole(params)
            return
        device = self.bench.torch_device
        shards = [self.shard[p].to(device) for p in params]
        flat = torch.empty(
            sum(self.size[p] for p in params) * self.ranks, dtype=params[0].dtype, device=device
        )
        rank_part = flat.chunk(self.ranks)[self.group.rank()] if len(params) > 1 else shards[0]
        if len(params) > 1:
            torch.cat(shards, out=rank_part)
        gather = Gather(params, flat, all_gather(flat, rank_part, self.group))
        self.gathers.update(dict.fromkeys(params, gather))

    def _make_whole(self, params: list[torch.nn.Parameter]) -> None:
        """On one rank, make the parameters whole: use the pieces themselves, or copies on the device if the
        pieces are offloaded to the host."""
        for param in params:
            on_host = self.offload and not self.bench.device.is_host
            self._set_whole(
                param,
                self.shard[param].to(self.bench.torch_device, copy=True) if on_host else self.shard[param],
            )

    def _finish_gather(self, param: torch.nn.Parameter) -> None:
        """Remove ``param`` from ``gathers``, wait for the gather that contains it, and make all parameters of
        that gather whole. If this has been done for another of them, only remove ``param``. The flat tensor
        of the gather is kept until all of its parameters have been removed."""
        gather = self.gathers.pop(param)
        if gather.is_done:
            return
        gather.is_done = True
        if gather.work is not None:
            gather.work.wait()
        if len(gather.params) == 1:
            self._set_whole(param, gather.flat)
            return
        offset, rows = 0, gather.flat.view(self.ranks, -1)
        for member in gather.params:
            size, count = self.size[member], math.prod(self.shape[member])
            if count == size * self.ranks:
                flat_param = (
                    rows[:, offset : offset + size].clone(memory_format=torch.contiguous_format).view(-1)
                )
            else:
                pieces = [rows[r, offset : offset + min(size, count - r * size)] for r in range(self.ranks)]
                flat_param = torch.cat([p for p in pieces if p.numel()])
            self._set_whole(member, flat_param)
            del flat_param
            offset += size

    def _set_whole(self, param: torch.nn.Parameter, flat: torch.Tensor) -> None:
        shape = self.shape[param]
        param.data = flat[: math.prod(shape)].view(shape)
        self.whole[param] = None


class Gather:
    """A gather of ``params`` into ``flat``. It is in progress until ``is_done`` is True. ``work`` is the
    handle to wait for, or None if there is nothing to wait for."""

    def __init__(self, params: list[torch.nn.Parameter], flat: torch.Tensor, work: Any) -> None:
        self.params, self.flat, self.work, self.is_done = params, flat, work, False


def piece(flat: torch.Tensor, size: int, rank: int) -> list[torch.Tensor]:
    """Return the piece of ``rank`` of a flat tensor that is cut into pieces of ``size`` elements, as a list
    of tensors to concatenate: the elements and, if there are fewer than ``size``, the missing zeros."""
    start = min(rank * size, flat.numel())
    elements = flat[start : start + size]
    return [elements] if elements.numel() == size else [elements, flat.new_zeros(size - elements.numel())]
