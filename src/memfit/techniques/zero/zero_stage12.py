"""ZeRO stages 0, 1 and 2, which keep whole parameters on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from memfit.techniques.zero.base import ZeroOptimizer, all_gather, all_reduce, norm64, on_device

if TYPE_CHECKING:
    from memfit.types.plan import KnobValue


class ZeroNone(ZeroOptimizer):
    """Stage 0: everything is whole on every rank. After the last backward of a step, gradients are averaged
    over ranks in flat copies, one after the other. A copy takes gradients until it has more than
    ``most_elements`` elements (deepspeed/runtime/engine.py). A parameter without a gradient gets one of
    zeros."""

    most_elements = 500_000_000

    def _prepare(self, settings: Mapping[str, KnobValue]) -> list[torch.nn.Parameter]:
        self.bench.grad_norm = None  # gradients are in the parameters
        return self.params

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        """Do nothing: gradients are averaged after backward."""

    def _after_backward(self) -> None:
        with torch.no_grad():
            pending: list[torch.Tensor] = []
            for param in self.params if self.last else ():
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                pending.append(param.grad)
                if sum(g.numel() for g in pending) > self.most_elements:
                    self._average(pending)
                    pending = []
            if pending:
                self._average(pending)

    def _average(self, grads: list[torch.Tensor]) -> None:
        flat = torch._utils._flatten_dense_tensors(grads)
        all_reduce(flat, self.group)
        flat.mul_(1.0 / self.ranks)
        for grad, mean in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(mean)

    def scale_gradients(self, factor: torch.Tensor) -> None:
        torch._foreach_mul_([p.grad for p in self.params if p.grad is not None], factor)

    def step(self) -> None:
        self.inner.step()

    def own_gradients(self) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
        return ((p, 0, p.grad) for p in self.params if p.grad is not None)

    @property
    def state(self) -> Any:
        return self.inner.state


class ZeroTwo(ZeroOptimizer):
    """Stages 1 and 2: every rank has whole parameters, which are views of one flat buffer. Each rank updates
    an fp32 master copy of its part of the buffer and copies it back. Then the parts of all ranks are
    gathered.

    What an accelerator holds, for P trained parameters of b bytes on N ranks, by
    deepspeed/runtime/zero/stage_1_and_2.py of 0.19:

    - bP: the flat buffer. It is made in host memory and replaces the parameters, so that the accelerator
      never has both. DeepSpeed up to 0.18 always does so. From 0.19 on it makes the buffer on the accelerator
      if that has bP bytes free, so that a peak measured there may be up to 2bP while nothing else is there.
    - 4P/N: the master copy. In set-up there are also, one after the other, a copy of the part in the
      buffer's dtype, bP/N, and 4P/N of zeros for the gradient.
    - In backward b times the elements of the buckets, and bP/N for gradients of the own part; under stage 1
      also the gradients of all parameters until the end of the last backward, bP.
    - In the update 4P/N for the gradient of the master copy, and the optimizer's state.

    With ``offload``, master copy, its gradient and the optimizer's state are in host memory, with bP/N
    through which the new part goes to the accelerator. The accelerator keeps bP and b times the elements of
    the largest parameter. In set-up, the copy of the part, bP/N, is there too, as in DeepSpeed since 0.18.3;
    if ``copies_part`` is False, as before, it is made in host memory."""

    copies_part = True

    def _prepare(self, settings: Mapping[str, KnobValue]) -> list[torch.nn.Parameter]:
        bench, params = self.bench, self.params
        self.shards_gradients = int(settings["stage"]) == 2
        self.in_backward = self.shards_gradients or bool(settings["overlap"])
        self.buffer_count = 2 if settings["overlap"] else 1
        self.own: torch.Tensor | None = None  # gradients of the parameters in this rank's part
        self.sums: list[torch.Tensor] = []  # the same, summed over micro-batches
        with torch.no_grad():
            self.flat = self._flatten(2 * self.ranks)  # parts start at multiples of 4 bytes
            for param in bench.model.parameters():
                if not param.requires_grad:
                    param.data = on_device(bench, param.detach())
        self.size = self.flat.numel() // self.ranks
        self.part = self.flat.narrow(0, self.rank * self.size, self.size)
        ends = list(itertools.accumulate(p.numel() for p in params))
        self.span = {p: (end - p.numel(), end) for p, end in zip(params, ends, strict=True)}
        low, high = self.rank * self.size, (self.rank + 1) * self.size
        self.own_ranges = {
            p: (max(a, low) - a, min(b, high) - a) for p, (a, b) in self.span.items() if a < high and b > low
        }
        on_host = bool(self.state_on) and not bench.device.is_host
        with torch.no_grad(), bench.memory_pool("host" if on_host and not self.copies_part else ""):
            part_copy = self.part.clone()
        with torch.no_grad(), bench.memory_pool(self.state_on):
            self.master = torch.nn.Parameter(
                part_copy.to(bench.device_of(self.state_on), torch.float32, copy=on_host)
            )
            del part_copy
            if self.state_on:
                self._keep_on_host(max(p.numel() for p in params))
            else:
                torch.zeros_like(self.master)
        return [self.master]

    def _keep_on_host(self, largest: int) -> None:
        """Make the host's buffers and the gradient of the master copy, which are kept from step to step. Also
        make a buffer of ``largest`` elements, the largest number of elements of a parameter, on the device.
        Through it, sums of gradients come back from the host."""
        host, dtype = self.bench.device_of("host"), self.flat.dtype
        self.low = torch.zeros(self.size, dtype=dtype, device=host)
        self.spare_host = torch.zeros(largest, dtype=dtype, device=host)
        with self.bench.memory_pool(""):
            self.spare = torch.zeros(largest, dtype=dtype, device=self.bench.torch_device)
        self.master.grad = torch.zeros_like(self.master)
        self.gathered: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.norms: dict[torch.nn.Parameter, torch.Tensor] = {}

    def _flatten(self, alignment: int) -> torch.Tensor:
        """Return a flat copy of the trained parameters, of which they become views. It is padded with zeros
        to a multiple of ``alignment`` elements. On an accelerator, the parameters are freed there before the
        copy, which is made on the host, comes."""
        bench, count = self.bench, sum(p.numel() for p in self.params)
        with bench.memory_pool("host"):
            tensors = [p.detach().to(bench.device_of("host")) for p in self.params]
            if not bench.device.is_host:
                for param in self.params:
                    param.data = torch.empty(0, dtype=param.dtype, device=bench.torch_device)
            padding = [tensors[0].new_zeros(-count % alignment)] if count % alignment else []
            flat: torch.Tensor = torch._utils._flatten_dense_tensors(tensors + padding)
        shapes = [t.shape for t in tensors]
        del tensors, padding
        flat, offset = on_device(bench, flat), 0
        for param, shape in zip(self.params, shapes, strict=True):
            param.data = flat.narrow(0, offset, shape.numel()).view(shape)
            offset += shape.numel()
        return flat

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        while len(self.buffers) < self.buffer_count:
            self.buffers.append(torch.empty(self.limit, dtype=self.flat.dtype, device=self.flat.device))
        if self.in_backward and (self.last or self.shards_gradients):
            self._add(param)

    def _add(self, param: torch.nn.Parameter) -> None:
        super()._add(param)
        if self.state_on and param.numel() > self.limit and param.grad is not None:
            param.grad = param.grad.clone()

    def _reduce_pending(self) -> None:
        grad = self.pending[0].grad
        assert grad is not None
        self._average(grad.view(-1) if self.elements > self.limit else self.buffers[0][: self.elements])
        for param in self.pending:
            self._keep(param)

    def _average(self, whole: torch.Tensor) -> None:
        """Average the pending gradients over all ranks. ``whole`` holds their elements. Only what belongs to
        this rank's part is replaced by the average; the rest of ``whole`` is only divided by the number of
        ranks."""
        whole.div_(self.ranks)
        slices = [(owner, whole.narrow(0, offset, count)) for owner, offset, count in self._slices()]
        copy = torch._utils._flatten_dense_tensors([s for _, s in slices])
        all_reduce(copy, self.group)
        for (owner, target), mean in zip(slices, copy.split([s.numel() for _, s in slices]), strict=True):
            if owner == self.rank:
                target.copy_(mean)

    def _slices(self) -> Iterator[tuple[int, int, int]]:
        """Yield (owner, start, number of elements) for slices of the pending gradients, which are numbered as
        if they lay one after the other. The owner is the rank to whose part of the parameters the slice
        belongs. A gradient that crosses the border of two parts is cut; adjacent slices of one owner are
        merged."""
        offset, run = 0, (-1, 0, 0)
        for param in self.pending:
            start, end = self.span[param]
            while start < end:
                owner = start // self.size
                count = min(end, (owner + 1) * self.size) - start
                if owner == run[0]:
                    run = (owner, run[1], run[2] + count)
                else:
                    if run[2]:
                        yield run
                    run = (owner, offset, count)
                offset, start = offset + count, start + count
        yield run

    def _keep(self, param: torch.nn.Parameter) -> None:
        """Handle the reduced gradient of ``param``, whose bucket will be reused. If this rank's part has
        elements of the parameter, move the gradient to the host if state is offloaded (`_to_host`), else to a
        buffer of such gradients. If the part has none, stage 2 frees the gradient, and stage 1 keeps it until
        the end of backward."""
        if param not in self.own_ranges:
            param.grad = None if self.shards_gradients else param.grad
        elif self.state_on:
            self._to_host(param)
        else:
            if self.own is None:
                elements = sum(p.numel() for p in self.own_ranges)
                self.own = torch.empty(elements, dtype=self.flat.dtype, device=self.flat.device)
                self.own_at = 0
            self._into(self.own, self.own_at, param)
            self.own_at += param.numel()

    def _to_host(self, param: torch.nn.Parameter) -> None:
        """Handle the reduced gradient of ``param``, of which this rank's part has elements, if state is
        offloaded. In stage 2, first add to the gradient the sum over earlier micro-batches, which is on the
        host. In micro-batches before the last, write the new sum to the host. In the last one, write this
        rank's part of it to the gradient of the master copy, which is on the host, store the norm of that
        part for `grad_norm`, and free the gradient on the device."""
        (a, b), grad = self.own_ranges[param], param.grad
        assert self.master.grad is not None and grad is not None
        has_sum = self.shards_gradients and self.micro_batch > 0
        if has_sum or not self.last:
            if param not in self.gathered:
                with self.bench.memory_pool("host"):
                    self.gathered[param] = torch.zeros(
                        param.numel(), dtype=param.dtype, device=self.bench.device_of("host")
                    )
            if has_sum:
                grad.view(-1).add_(self.spare[: param.numel()].copy_(self.gathered[param]))
            if not self.last:
                self.gathered[param].copy_(grad.view(-1))
        if self.last:
            offset, rank_part = self.span[param][0] + a - self.rank * self.size, grad.view(-1)[a:b]
            self.norms[param] = norm64(rank_part)
            self.master.grad.narrow(0, offset, b - a).copy_(rank_part.float())
            param.grad = None

    def _after_backward(self) -> None:
        """Reduce the gradients that are not reduced yet; in stage 1, only after the last backward of a step.
        Parameters in this rank's part without a gradient get one of zeros. If state is offloaded, the zeros
        replace what the host kept from the step before. Finally free the buckets and the gradients of the
        parameters."""
        if not self.shards_gradients and not self.last:
            return  # stage 1 reduces once per step
        with torch.no_grad():
            for param in self.params:
                if param.grad is not None and param not in self.added:
                    self._add(param)
            self._reduce()
            if self.state_on:
                for param in self.own_ranges:
                    if param not in self.added:
                        param.grad = torch.zeros_like(param)
                        self._to_host(param)
            else:
                new_grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.own_ranges]
                for total, grad in zip(self.sums, new_grads, strict=False):
                    total.add_(grad)
                self.sums = self.sums or new_grads
            self.buffers, self.own = [], None
            self.zero_grad()

    def own_gradients(self) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
        if self.state_on:
            assert self.master.grad is not None
            part_start = self.rank * self.size
            for param, (a, b) in self.own_ranges.items():
                yield param, a, self.master.grad.narrow(0, self.span[param][0] + a - part_start, b - a)
        elif self.sums:
            starts = (a for a, _ in self.own_ranges.values())
            yield from zip(self.own_ranges, starts, self._parts(), strict=True)

    def _parts(self) -> list[torch.Tensor]:
        return [g.view(-1)[a:b] for g, (a, b) in zip(self.sums, self.own_ranges.values(), strict=True)]

    def grad_norm(self) -> torch.Tensor:
        return self._norm(self.norms.values() if self.state_on else map(norm64, self._parts()))

    def step(self) -> None:
        self.micro_batch = -1
        if not self.state_on:
            self.master.grad = self._own_gradient()
            self.sums = []
        with self.bench.memory_pool(self.state_on):
            self._apply_scale()
            self.inner.step()
        with torch.no_grad():
            if self.state_on:
                self.part.copy_(self.low.copy_(self.master))
            else:
                self.master.grad = None
                self.part.copy_(self.master)
        if self.ranks > 1:
            all_gather(self.flat, self.part, self.group).wait()

    def _own_gradient(self) -> torch.Tensor:
        parts = self._parts()
        missing = self.size - sum(p.numel() for p in parts)
        parts += [self.flat.new_zeros(missing)] * bool(missing)
        whole: torch.Tensor = torch._utils._flatten_dense_tensors(parts)
        return whole.float()
