"""ZeRO stage 3: parameters are gathered just before a module needs them and let go when none soon will.

The first forward and backward records which modules run in which order and lets parameters go at once;
from then on parameters are gathered ahead and kept for reuse within the limits (DeepSpeed's
partitioned_param_coordinator.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.distributed_c10d import ReduceScatterOptions
from torch.utils import _pytree

from memfit.techniques.zero import Reducing

if TYPE_CHECKING:
    from memfit.techniques.base import MakeOptimizer, Workbench
    from memfit.types.plan import KnobValue


class ZeroThree(Reducing):
    """Every parameter is cut evenly over the ranks; shards lie in one flat buffer, those to train first."""

    def __init__(
        self,
        bench: Workbench,
        params: list[torch.nn.Parameter],
        settings: Mapping[str, KnobValue],
        make: MakeOptimizer,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(bench, params, settings, group)
        frozen = [p for p in bench.model.parameters() if not p.requires_grad]
        with torch.no_grad(), bench.place("host" if settings["offload"] == "parameters" else ""):
            self.shards = Shards([*params, *frozen], group, settings)
        for module in bench.model.modules():
            if list(module.parameters(recurse=False)):
                self._watch(module)
        own = self.shards.flat.narrow(0, 0, sum(self.shards.size[p] for p in params))
        with bench.place(self.state_on):
            # float() of fp32 shards is the shards themselves: no copy beside them
            self.master = torch.nn.Parameter(own.detach().float())
            torch.zeros_like(self.master)
            self.grads = torch.zeros_like(own)
        bench.on_kept(self.shards.flat, "parameter")
        bench.on_kept(self.grads, "gradient")
        self.inner = make([self.master])
        with bench.place(""):
            self.buffer = torch.empty(self.limit, dtype=own.dtype)
        self.fresh = True  # the step's first micro-batch overwrites gradients, the others add

    def _watch(self, module: torch.nn.Module) -> None:
        """Fetch before and let go after the module's forward, and its backward."""
        fetch, release = self.shards.fetch, self.shards.release

        def before(mod: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            fetch(mod)
            return tapped((args, kwargs), lambda: release(mod))

        def after(mod: torch.nn.Module, args: Any, out: Any) -> Any:
            release(mod)
            return tapped(out, lambda: fetch(mod))

        self.bench.closers.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self.bench.closers.append(module.register_forward_hook(after).remove)

    def _begin(self, last: bool) -> None:
        super()._begin(last)
        self.shards.begin()

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        if self.pending and self.elements + param.numel() > self.limit:
            self._reduce()
        if self.elements + param.numel() <= self.limit:
            self._into(self.buffer, self.elements, param)
        self.pending.append(param)
        self.elements += param.numel()

    def _reduce(self) -> None:
        """Reduce and scatter a copy in which each rank's pieces lie together."""
        pending = [p for p in self.shards.size if p in set(self.pending)]  # in the order of the model
        grads = [p.grad.view(-1) for p in pending if p.grad is not None]
        sizes = [self.shards.size[p] for p in pending]
        if len(grads) == 1 and grads[0].numel() == sizes[0] * self.ranks:
            whole = grads[0]
        else:
            pieces = [
                c
                for r in range(self.ranks)
                for g, n in zip(grads, sizes, strict=True)
                for c in piece(g, n, r)
            ]
            whole = torch.cat(pieces)
        whole.div_(self.ranks)
        own = whole.chunk(self.ranks)[self.rank]
        self.group._reduce_scatter_base(own, whole, ReduceScatterOptions()).wait()
        for param, part in zip(pending, own.split(sizes), strict=True):
            kept = self.shards.of(param, self.grads)
            _ = kept.copy_(part) if self.fresh else kept.add_(part)
            param.grad = None
        self.pending, self.elements = [], 0

    def _after_backward(self) -> None:
        with torch.no_grad():
            if self.pending:
                self._reduce()
        self.fresh = False
        self.shards.end()

    def grad_norm(self) -> torch.Tensor:
        return self._norm([self.shards.of(p, self.grads) for p in self.params])

    def step(self) -> None:
        self.shards.let_go(self.shards.whole)
        with self.bench.place(self.state_on):
            parts = [self.shards.of(p, self.grads) for p in self.params]
            self.master.grad = torch._utils._flatten_dense_tensors(parts).float()
            self.inner.step()
        self.master.grad, self.fresh = None, True
        with torch.no_grad():
            if self.shards.flat.dtype != self.master.dtype:
                self.shards.flat.narrow(0, 0, self.master.numel()).copy_(self.master)
            self.shards.gather(self.shards.persistent)

    @property
    def state(self) -> dict[Any, Any]:
        return {self.master: {"master": self.master, **self.inner.state.get(self.master, {})}}


class Shards:
    """This rank's pieces of all parameters, and which parameters are whole at the moment."""

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        group: torch.distributed.ProcessGroup,
        settings: Mapping[str, KnobValue],
    ) -> None:
        self.group, self.ranks, rank = group, group.size(), group.rank()
        self.size = {p: -(-p.numel() // self.ranks) for p in params}
        ends = itertools.accumulate(self.size.values())
        self.start = {p: end - self.size[p] for p, end in zip(params, ends, strict=True)}
        self.flat = torch.empty(sum(self.size.values()), dtype=params[0].dtype)
        for param in params:
            torch.cat(piece(param.detach().view(-1), self.size[param], rank), out=self.of(param))
            param.untyped_storage().resize_(0)
        threshold = int(settings["persist_elements"])
        self.persistent = [p for p in params if p.numel() <= threshold]
        self.most_live, self.ahead = int(settings["live_elements"]), int(settings["prefetch_elements"])
        self.whole: set[torch.nn.Parameter] = set()
        self.flying: dict[torch.nn.Parameter, Flight] = {}
        self.visits: list[torch.nn.Module] = []  # of this micro-batch
        self.order: list[torch.nn.Module] = []  # of the one before: what will come

    def of(self, param: torch.nn.Parameter, flat: torch.Tensor | None = None) -> torch.Tensor:
        return (self.flat if flat is None else flat).narrow(0, self.start[param], self.size[param])

    def begin(self) -> None:
        self.order, self.visits = self.visits, []

    def end(self) -> None:
        self.let_go(self.whole.difference(self.persistent))

    def fetch(self, module: torch.nn.Module) -> None:
        needed = list(module.parameters(recurse=False))
        with torch.no_grad():
            self._send([p for p in needed if p not in self.whole and p not in self.flying])
            for param in needed:
                if param in self.flying:
                    self._land(self.flying[param])
            self.visits.append(module)
            if self._as_before():
                self._prefetch()

    def _as_before(self) -> bool:
        at = len(self.visits) - 1
        return at < len(self.order) and self.order[at] is self.visits[at]

    def _prefetch(self) -> None:
        """Send for what comes next, in the order in which it will be used."""
        coming = [p for m in self.order[len(self.visits) :] for p in m.parameters(recurse=False)]
        live = sum(p.numel() for p in (*self.whole, *self.flying))
        room = min(self.most_live - live, self.ahead)
        wanted: dict[torch.nn.Parameter, None] = {}
        for param in coming:
            if room <= 0:
                break
            if param not in self.whole and param not in self.flying and param not in wanted:
                wanted[param] = None
                room -= param.numel()
        self._send(list(wanted))

    def release(self, module: torch.nn.Module) -> None:
        own = set(module.parameters(recurse=False))
        if self._as_before():
            own -= self._soon().union(self.persistent)
        self.let_go(own & self.whole)

    def _soon(self) -> set[torch.nn.Parameter]:
        """Parameters of the coming modules, up to the limit of what may be kept for reuse."""
        soon: set[torch.nn.Parameter] = set()
        elements = 0
        for module in self.order[len(self.visits) :]:
            if elements >= self.most_live:
                break
            for param in module.parameters(recurse=False):
                soon.add(param)
                elements += param.numel()
        return soon

    def let_go(self, params: Iterable[torch.nn.Parameter]) -> None:
        for param in list(params):
            param.untyped_storage().resize_(0)
            self.whole.discard(param)

    def gather(self, params: list[torch.nn.Parameter]) -> None:
        self._send(params)
        if params:
            self._land(self.flying[params[0]])

    def _send(self, params: list[torch.nn.Parameter]) -> None:
        """Start to gather parameters into one flat tensor."""
        if not params:
            return
        count = sum(self.size[p] for p in params)
        flat = torch.empty(count * self.ranks, dtype=self.flat.dtype)
        own = flat.chunk(self.ranks)[self.group.rank()]
        torch.cat([self.of(p) for p in params], out=own)
        work = self.group._allgather_base(flat, own)
        flight = Flight(params, flat, work)
        self.flying.update(dict.fromkeys(params, flight))

    def _land(self, flight: Flight) -> None:
        """Copy each parameter out of the pieces that came."""
        if flight.work is not None:
            flight.work.wait()
        at, rows = 0, flight.flat.view(self.ranks, -1)
        for param in flight.params:
            size = self.size[param]
            param.untyped_storage().resize_(param.numel() * param.element_size())
            pieces = [rows[r, at : at + min(size, param.numel() - r * size)] for r in range(self.ranks)]
            with torch.autograd.grad_mode._unsafe_preserve_version_counter(param):
                torch.cat([p for p in pieces if p.numel()], out=param.detach().view(-1))
            at += size
            del self.flying[param]
            self.whole.add(param)


class Flight(NamedTuple):
    """A gather under way."""

    params: list[torch.nn.Parameter]
    flat: torch.Tensor
    work: Any


def piece(flat: torch.Tensor, size: int, rank: int) -> list[torch.Tensor]:
    """A rank's piece of a flat tensor, and what fills it up to ``size``."""
    start = min(rank * size, flat.numel())
    own = flat[start : start + size]
    return [own] if own.numel() == size else [own, flat.new_zeros(size - own.numel())]


def tapped(values: Any, call: Callable[[], None]) -> Any:
    """The same values; ``call`` runs when backward has gradients of those that need them."""
    leaves, shape = _pytree.tree_flatten(values)
    places = [i for i, v in enumerate(leaves) if isinstance(v, torch.Tensor) and v.requires_grad]
    if not places or not torch.is_grad_enabled():
        return values
    for i, tensor in zip(places, _Tap.apply(call, *(leaves[i] for i in places)), strict=True):  # type: ignore[no-untyped-call]
        leaves[i] = tensor
    return _pytree.tree_unflatten(leaves, shape)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(t.detach() for t in tensors)  # views of a function's own may not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.call()
        return None, *grads
