"""Sharded data parallelism with FairScale's layout: whole parameters on every rank, each owned by one rank.

Only the owner keeps a parameter's optimizer state and its gradient, which all ranks reduce to it while
backward runs. After the step it broadcasts the new values (fairscale/optim/oss.py,
fairscale/nn/data_parallel/sharded_ddp.py). Gradients of small parameters are in buckets, one per owner, which
every rank keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Knob, MakeOptimizer, StepPart, Technique, Workbench
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    from memfit.techniques.zero.base import shard_group

    make, group = bench.make_optimizer, shard_group(bench)
    buffer_elements = int(settings["reduce_buffer_elements"])
    bench.make_optimizer = lambda params: ShardedDdp(bench, params, buffer_elements, make, group)


class ShardedDdp:
    """The optimizer of one rank. Each parameter is owned by one rank (`assign_owners`), and a rank may own
    none. Gradients are reduced to their owner, which updates the parameter and sends it to all ranks.

    Gradients of small parameters are reduced in buckets, one for each owner. An owner's bucket takes the
    gradients of its smallest parameters, as long as it then has fewer elements than ``most`` and than the
    whole model; the gradients of other parameters are reduced alone. With a ``most`` of 0, or on one rank,
    there are no buckets.
    """

    def __init__(
        self, bench: Workbench, params: list[torch.nn.Parameter], most: int, make: MakeOptimizer, group: Any
    ) -> None:
        from memfit.techniques.zero.base import make_inner

        self.bench, self.group, self.ranks, self.rank = bench, group, group.size(), group.rank()
        model_elements = sum(p.numel() for p in bench.model.parameters())
        self.most = min(most, model_elements) if self.ranks > 1 else 0
        self.owner = assign_owners(params, self.ranks)
        self.by_owner = [
            sorted((p for p in params if self.owner[p] == rank), key=lambda p: p.numel())
            for rank in range(self.ranks)
        ]
        self.params = sorted(
            (p for rank_params in self.by_owner for p in rank_params), key=lambda p: p.numel()
        )
        self.flats: dict[int, torch.Tensor] = {}
        self._flatten()
        self.buckets: list[Bucket] = []
        self.bucket: dict[torch.nn.Parameter, Bucket] = {}
        self.sent: list[tuple[Any, torch.nn.Parameter | None]] = []  # reductions under way, oldest first
        self.ready, self.last, self.queued = False, True, False
        bench.closers += [p.register_post_accumulate_grad_hook(self._on_gradient).remove for p in params]
        bench.closers.append(bench.model.register_forward_pre_hook(self._on_forward).remove)
        bench.before_micro_batch.append(self._begin)
        bench.grad_norm = self.grad_norm
        self.inner = make_inner(make, [p for p in params if self.owner[p] == self.rank])

    def _flatten(self) -> None:
        import torch

        with torch.no_grad():
            for rank, params in enumerate(self.by_owner):
                if not params:
                    continue
                flat, offset = params[0].new_zeros(sum(p.numel() for p in params)), 0
                for param in params:
                    place = flat.narrow(0, offset, param.numel())
                    place.copy_(param.detach().view(-1))
                    param.data = place.view_as(param)
                    offset += param.numel()
                self.flats[rank] = flat

    def _begin(self, last: bool) -> None:
        self.last, self.queued = last, False

    def _on_forward(self, *_: Any) -> None:
        """Called before each forward of the model. Do nothing where gradients are disabled. Before the first
        forward, copy each owner's parameters into a new flat tensor, of which they become views, and make the
        buckets. Before the forward of a step's last micro-batch, broadcast the model's buffers from the first
        rank. Before each forward, mark the gradients of all buckets as missing."""
        import torch

        if not torch.is_grad_enabled():
            return
        if not self.ready:
            self.ready = True
            self._flatten()
            self._fill_buckets()
        if self.last and self.ranks > 1:
            works = [self._send("broadcast", b.detach(), 0) for b in self.bench.model.buffers()]
            for work in works:
                work.wait()
        for bucket in self.buckets:
            bucket.missing, bucket.sent = len(bucket.params), False

    def _fill_buckets(self) -> None:
        import torch

        if not self.most:
            return
        with torch.no_grad():
            buckets: dict[int, Bucket] = {}
            for param in self.params:
                owner = self.owner[param]
                if owner not in buckets:
                    buckets[owner] = Bucket(owner, param.new_zeros(self.most))
                if buckets[owner].elements + param.numel() < self.most:
                    buckets[owner].add(param)
                    self.bucket[param] = buckets[owner]
            self.buckets = list(buckets.values())
            for bucket in self.buckets:
                bucket.shrink()

    def _send(self, collective: str, tensor: torch.Tensor, rank: int) -> Any:
        import torch

        global_rank = torch.distributed.get_global_rank(self.group, rank)
        return getattr(torch.distributed, collective)(tensor, global_rank, group=self.group, async_op=True)

    def _reduce(self, grad: torch.Tensor, owner: int, param: torch.nn.Parameter | None = None) -> None:
        grad.mul_(1.0 / self.ranks)
        work = self._send("reduce", grad, owner) if self.ranks > 1 else None
        self.sent.append((work, param))

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        import torch

        if not self.last:
            return
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        with torch.no_grad():
            self._hand_over(param)
            # The newest reduction is still running. An accelerator runs behind the program, so that there
            # none may have finished.
            while len(self.sent) > 1 and self.bench.device.is_host:
                self._arrive()

    def _hand_over(self, param: torch.nn.Parameter) -> None:
        if (bucket := self.bucket.get(param)) is None:
            assert param.grad is not None
            self._reduce(param.grad, self.owner[param], param)
            return
        bucket.missing -= 1
        if not bucket.missing:
            bucket.sent = True
            self._reduce(bucket.buffer, bucket.owner)

    def _arrive(self) -> None:
        work, param = self.sent.pop(0)
        if work is not None:
            work.wait()
        if param is not None and self.owner[param] != self.rank:
            param.grad = None

    def _after_backward(self) -> None:
        import torch

        with torch.no_grad():
            for bucket in self.buckets:
                if not bucket.sent and bucket.params:
                    self._reduce(bucket.buffer, bucket.owner)
                bucket.sent = True
            while self.sent:
                self._arrive()

    def grad_norm(self) -> torch.Tensor:
        import torch

        from memfit.techniques.zero.base import all_reduce, stack_norms

        grads = [p.grad for p in self.params if self.owner[p] == self.rank and p.grad is not None]
        norms = (torch.linalg.vector_norm(g) for g in grads)
        total = stack_norms(norms, self.bench.torch_device).float().square().sum()
        all_reduce(total, self.group)
        return total.sqrt()

    def own_gradients(self) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
        """Return an iterator over (parameter, 0, gradient) of each parameter that this rank owns and that has
        a gradient. The gradient is whole: it begins at element 0. Gradients of parameters that other ranks
        own are left out, because on this rank they are not averaged, or are freed."""
        owned_params = (p for p in self.params if self.owner[p] == self.rank)
        return ((p, 0, p.grad) for p in owned_params if p.grad is not None)

    def step(self) -> None:
        self.inner.step()
        if self.ranks > 1:
            for work in [self._send("broadcast", flat, rank) for rank, flat in self.flats.items()]:
                work.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            if param not in self.bucket:
                param.grad = None
        for bucket in self.buckets:
            bucket.buffer.zero_()

    @property
    def state(self) -> Any:
        return self.inner.state


class Bucket:
    """The gradients of small parameters that one rank owns. They are views of one buffer, so that they are
    reduced in one operation."""

    def __init__(self, owner: int, buffer: torch.Tensor) -> None:
        self.owner, self.buffer, self.elements = owner, buffer, 0
        self.params: list[torch.nn.Parameter] = []
        self.missing, self.sent = 0, False

    def add(self, param: torch.nn.Parameter) -> None:
        """Set the gradient of ``param`` to zeros, in a view of the next free elements of the buffer."""
        import torch

        param.grad = torch.zeros_like(param)
        self._place(param, self.elements)
        self.params.append(param)
        self.elements += param.numel()

    def shrink(self) -> None:
        """Replace the buffer by a smaller one with only the elements in use. The gradients become views of
        that."""
        self.buffer, offset = self.buffer[: self.elements].clone(), 0
        for param in self.params:
            self._place(param, offset)
            offset += param.numel()

    def _place(self, param: torch.nn.Parameter, offset: int) -> None:
        assert param.grad is not None
        place = self.buffer.narrow(0, offset, param.numel()).view_as(param)
        place.copy_(param.grad)
        param.grad = place


def assign_owners(params: list[torch.nn.Parameter], ranks: int) -> dict[torch.nn.Parameter, int]:
    """Return parameter -> rank that owns it. Parameters are assigned in the order of ``params``, each to the
    rank that has the fewest elements so far, and among several such ranks to the lowest."""
    sizes, owner_of = [0] * ranks, {}
    for param in params:
        owner_of[param] = rank = sizes.index(min(sizes))
        sizes[rank] += param.numel()
    return owner_of


TECHNIQUE = Technique(
    name="sharded-ddp",
    summary="optimizer state and gradient of each whole parameter on one rank, as FairScale lays it out",
    script_call="fairscale's OSS and ShardedDataParallel",
    changes=StepPart.BOTH,
    excluded=lambda facts: facts.needs_parameter_names,
    effect=EffectClass.E1,
    apply=_apply,
    order=90,
    slot="data-parallel",
    knobs=(
        Knob(
            name="reduce_buffer_elements",
            default=2**23,
            doc="largest number of elements of a buffer in which small gradients are reduced together (every "
            "rank keeps one buffer per rank); 0: each gradient is reduced alone; one rank has no buffers",
            minimum=0,
        ),
    ),
    forbids=("optimizer-in-backward", "tensor-parallel", "context-parallel", "pipeline"),
)
