"""ZeRO as DeepSpeed lays it out (Rajbhandari et al. 2020): what of the model state each rank keeps.

Stage 1 shards the optimizer's state, stage 2 the gradients too, stage 3 the parameters too. The layouts are
those of DeepSpeed's runtime/zero/stage_1_and_2.py and stage3.py: one flat buffer of parameters, an fp32
master of this rank's part, gradients reduced in a contiguous bucket of fixed size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques.base import Knob, MakeOptimizer, Space, Technique, Workbench
from memfit.types.errors import UserError
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


def _apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch

    from memfit.techniques.precision import Bf16Inputs
    from memfit.techniques.zero3 import ZeroThree

    mesh = bench.world.sub("shard")
    if mesh is None:
        return
    stage, offload = int(settings["stage"]), str(settings["offload"])
    if offload == "parameters" and stage < 3:
        raise UserError(
            f"zero of stage {stage} keeps whole parameters on the device",
            allowed='offload="none" or "optimizer"; "parameters" with stage=3',
        )
    with bench.place("" if stage < 3 else "host"):  # stages 1 and 2 move the model to the device first
        bench.model.to(torch.bfloat16 if settings["precision"] == "bf16" else torch.float32)
    if settings["precision"] == "bf16":
        bench.forward_contexts.append(lambda: Bf16Inputs(bench.model))
    make, kind = bench.make_optimizer, ZeroThree if stage == 3 else ZeroTwo

    def make_zero(params: list[torch.nn.Parameter]) -> ZeroTwo | ZeroThree:
        return kind(bench, params, settings, make, mesh.get_group())

    bench.make_optimizer = make_zero


class Reducing:
    """What all stages share: gradients go from their parameters into a bucket as backward makes them."""

    def __init__(
        self,
        bench: Workbench,
        params: list[torch.nn.Parameter],
        settings: Mapping[str, KnobValue],
        group: torch.distributed.ProcessGroup,
    ) -> None:
        self.bench, self.params, self.group = bench, params, group
        self.ranks, self.rank = group.size(), group.rank()
        self.limit = int(settings["reduce_bucket_elements"])
        self.state_on = "" if settings["offload"] == "none" else "host"
        self.pending: list[torch.nn.Parameter] = []
        self.elements = 0
        self.last, self.queued = True, False
        handles = [p.register_post_accumulate_grad_hook(self._ready) for p in params]
        bench.closers += [h.remove for h in handles]
        bench.before_micro_batch.append(self._begin)
        bench.grad_norm = self.grad_norm

    def _begin(self, last: bool) -> None:
        self.last, self.queued = last, False

    def _ready(self, param: torch.nn.Parameter) -> None:
        import torch

        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        with torch.no_grad():
            self._on_gradient(param)

    def _into(self, buffer: torch.Tensor, at: int, param: torch.nn.Parameter) -> None:
        """Move a gradient to a place in ``buffer``; its own storage is let go."""
        assert param.grad is not None
        place = buffer.narrow(0, at, param.numel()).view_as(param)
        place.copy_(param.grad)
        param.grad = place

    def _norm(self, grads: Iterable[torch.Tensor]) -> torch.Tensor:
        """In float64, one gradient at a time, as DeepSpeed takes it."""
        import torch

        with self.bench.place(self.state_on):
            norms = [torch.linalg.vector_norm(g.double()) for g in grads]
        total = torch.stack(norms).square().sum().float()
        torch.distributed.all_reduce(total, group=self.group)
        return total.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            param.grad = None

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        raise NotImplementedError

    def _after_backward(self) -> None:
        raise NotImplementedError

    def grad_norm(self) -> torch.Tensor:
        raise NotImplementedError


class ZeroTwo(Reducing):
    """Stages 1 and 2: whole parameters on every rank, as views of one flat buffer."""

    def __init__(
        self,
        bench: Workbench,
        params: list[torch.nn.Parameter],
        settings: Mapping[str, KnobValue],
        make: MakeOptimizer,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        import torch

        super().__init__(bench, params, settings, group)
        self.reduce_early = int(settings["stage"]) == 2
        self.buffers: list[torch.Tensor] = []
        self.buffer_count = 2 if settings["overlap"] else 1
        self.own: torch.Tensor | None = None  # gradients of the parameters of this rank's part
        self.held: list[torch.Tensor] = []  # the same, from micro-batch to micro-batch
        with torch.no_grad(), bench.place(""):
            self.flat = self._flatten(2 * self.ranks)  # parts start at multiples of 4 bytes
        self.size = self.flat.numel() // self.ranks
        self.part = self.flat.narrow(0, self.rank * self.size, self.size)
        ends = list(itertools.accumulate(p.numel() for p in params))
        self.span = {p: (end - p.numel(), end) for p, end in zip(params, ends, strict=True)}
        low, high = self.rank * self.size, (self.rank + 1) * self.size
        self.mine = {
            p: (max(a, low) - a, min(b, high) - a) for p, (a, b) in self.span.items() if a < high and b > low
        }
        with bench.place(self.state_on):
            self.master = torch.nn.Parameter(self.part.detach().clone().float())
            torch.zeros_like(self.master)
            if self.state_on:
                self.master.grad = torch.zeros_like(self.master)
        self.inner = make([self.master])

    def _flatten(self, alignment: int) -> torch.Tensor:
        import torch

        count = sum(p.numel() for p in self.params)
        padding = [self.params[0].new_zeros(-count % alignment)] if count % alignment else []
        flat: torch.Tensor = torch._utils._flatten_dense_tensors([p.detach() for p in self.params] + padding)
        at = 0
        for param in self.params:
            param.data = flat.narrow(0, at, param.numel()).view_as(param)
            at += param.numel()
        return flat

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        import torch

        while len(self.buffers) < self.buffer_count:
            self.buffers.append(torch.empty(self.limit, dtype=self.flat.dtype))
        if self.reduce_early:
            self._add(param)

    def _add(self, param: torch.nn.Parameter) -> None:
        if self.elements + param.numel() > self.limit:
            self._reduce()
            self.buffers.reverse()  # with overlap the other one fills while this one is reduced
        if param.numel() <= self.limit:
            self._into(self.buffers[0], self.elements, param)
        self.pending.append(param)
        self.elements += param.numel()

    def _reduce(self) -> None:
        """All ranks' gradients are averaged in a copy, of which each rank keeps its own part."""
        import torch

        if not self.pending:
            return
        large = self.elements > self.limit
        grad = self.pending[0].grad
        assert grad is not None
        whole = grad.view(-1) if large else self.buffers[0].narrow(0, 0, self.elements)
        whole.div_(self.ranks)
        slices = [(owner, whole.narrow(0, at, count)) for owner, at, count in self._slices()]
        copy = torch._utils._flatten_dense_tensors([s for _, s in slices])
        torch.distributed.all_reduce(copy, group=self.group)
        for (owner, kept), averaged in zip(slices, copy.split([s.numel() for _, s in slices]), strict=True):
            if owner == self.rank:
                kept.copy_(averaged)
        for param in self.pending:
            self._keep(param)
        self.pending, self.elements = [], 0

    def _slices(self) -> Iterator[tuple[int, int, int]]:
        """(owner, start, elements) of the pending gradients, neighbours of one owner together."""
        at, held = 0, (-1, 0, 0)
        for param in self.pending:
            start, end = self.span[param]
            while start < end:
                owner = start // self.size
                count = min(end, (owner + 1) * self.size) - start
                if owner == held[0]:
                    held = (owner, held[1], held[2] + count)
                else:
                    if held[2]:
                        yield held
                    held = (owner, at, count)
                at, start = at + count, start + count
        yield held

    def _keep(self, param: torch.nn.Parameter) -> None:
        """The bucket is written again: what this rank needs of it moves on."""
        import torch

        if param not in self.mine:
            param.grad = None if self.reduce_early else param.grad
        elif self.state_on:
            self._to_host(param)
        else:
            if self.own is None:
                self.own, self.own_at = (
                    torch.empty(sum(p.numel() for p in self.mine), dtype=self.flat.dtype),
                    0,
                )
            self._into(self.own, self.own_at, param)
            self.own_at += param.numel()

    def _to_host(self, param: torch.nn.Parameter) -> None:
        a, b = self.mine[param]
        assert self.master.grad is not None and param.grad is not None
        at = self.span[param][0] + a - self.rank * self.size
        self.master.grad.narrow(0, at, b - a).add_(param.grad.view(-1)[a:b])
        param.grad = None

    def _after_backward(self) -> None:
        import torch

        if not self.reduce_early and not self.last:
            return  # stage 1 reduces once a step
        with torch.no_grad():
            if not self.reduce_early:
                for param in self.params:
                    if param.grad is not None:
                        self._add(param)
            self._reduce()
            fresh = (
                []
                if self.state_on
                else [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.mine]
            )
            for held, more in zip(self.held, fresh, strict=False):
                held.add_(more)
            self.held = self.held or fresh
            self.buffers, self.own = [], None
            self.zero_grad()

    def _parts(self) -> list[torch.Tensor]:
        return [g.view(-1)[a:b] for g, (a, b) in zip(self.held, self.mine.values(), strict=True)]

    def grad_norm(self) -> torch.Tensor:
        return self._norm([self.master.grad] if self.master.grad is not None else self._parts())

    def step(self) -> None:
        import torch

        if not self.state_on:
            parts = self._parts()
            missing = self.size - sum(p.numel() for p in parts)
            whole = torch._utils._flatten_dense_tensors(
                parts + [self.flat.new_zeros(missing)] * bool(missing)
            )
            self.master.grad = whole.float()
            del parts, whole
            self.held = []
        with self.bench.place(self.state_on):
            self.inner.step()
        with torch.no_grad():
            if self.state_on:
                self.master.grad.zero_()  # type: ignore[union-attr]
            else:
                self.master.grad = None
            self.part.copy_(self.master)
        self.group._allgather_base(self.flat, self.part).wait()

    @property
    def state(self) -> dict[Any, Any]:
        return {self.master: {"master": self.master, **self.inner.state.get(self.master, {})}}


def _nothing(space: Space) -> Iterable[Mapping[str, KnobValue]]:
    return []  # a plan of one rank has no use for it


TECHNIQUE = Technique(
    name="zero",
    summary="optimizer state, then gradients, then parameters sharded, as DeepSpeed lays them out",
    effect=EffectClass.E1,
    apply=_apply,
    settings=_nothing,
    order=90,
    slot="data-parallel",
    knobs=(
        Knob(
            name="stage",
            default=2,
            doc="1: optimizer state; 2: and gradients; 3: and parameters",
            choices=(1, 2, 3),
        ),
        Knob(
            name="precision",
            default="fp32",
            doc="parameters and gradients; the master is fp32",
            choices=("fp32", "bf16"),
        ),
        Knob(name="reduce_bucket_elements", default=500_000_000, doc="gradients reduced together"),
        Knob(
            name="overlap",
            default=False,
            doc="stages 1, 2: a second bucket fills meanwhile",
            choices=(True, False),
        ),
        Knob(
            name="offload",
            default="none",
            doc="what lives in host memory",
            choices=("none", "optimizer", "parameters"),
        ),
        Knob(name="persist_elements", default=100_000, doc="stage 3: parameters up to this size stay whole"),
        Knob(name="live_elements", default=1_000_000_000, doc="stage 3: gathered parameters kept for reuse"),
        Knob(name="prefetch_elements", default=50_000_000, doc="stage 3: gathered ahead"),
    ),
    forbids=(
        "optimizer-in-backward",
        "bf16-autocast",
        "bf16-parameters",
        "tensor-parallel",
        "context-parallel",
        "pipeline",
    ),
)
