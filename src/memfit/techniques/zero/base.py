"""What ZeRO and sharded DDP share: the process group and its collectives, norms of gradients, and the base
class of the optimizers of all ZeRO stages."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from memfit.techniques.base import MakeOptimizer, OptimizerLike, Workbench
    from memfit.types.plan import KnobValue


class Alone:
    """Stands for the process group of a single rank, where nothing is communicated."""

    def size(self) -> int:
        """Return the number of ranks, 1."""
        return 1

    def rank(self) -> int:
        """Return this rank's index, 0."""
        return 0


Group = Any  # a torch ProcessGroup, or Alone


def shard_group(bench: Workbench) -> Group:
    """Return the process group of the ranks among which the plan shards the model state. If this rank shares
    it with no other, return `Alone`."""
    mesh = bench.world.sub("shard")
    return mesh.get_group() if mesh is not None else Alone()


def all_reduce(tensor: torch.Tensor, group: Group) -> None:
    """Sum ``tensor`` over the ranks of ``group`` in place. On one rank, do nothing."""
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)


def all_gather(whole: torch.Tensor, own: torch.Tensor, group: Group) -> Any:
    """Start to gather ``own``, of one size on all ranks of ``group``, into ``whole``, in the order of ranks.
    Return a handle whose ``wait()`` ends when ``whole`` is complete. On one rank, copy ``own`` to ``whole``
    at once and return None."""
    if group.size() > 1:
        return group._allgather_base(whole, own)
    whole.copy_(own)
    return None


def on_device(bench: Workbench, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``tensor``, which is in host memory, on the accelerator; the tensor itself if the
    device is the host."""
    if bench.device.is_host:
        return tensor
    with bench.memory_pool(""):
        return tensor.to(bench.torch_device, copy=True)


def norm64(grad: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of one gradient as a float64 scalar, as DeepSpeed computes it."""
    norm: torch.Tensor = torch.linalg.vector_norm(grad.double())
    return norm


def stack_norms(norms: Iterable[torch.Tensor], device: str) -> torch.Tensor:
    """Return the scalar tensors ``norms``, those of a rank's gradients, as one tensor of one dimension. If
    there are none, return an empty tensor on ``device``."""
    scalars = list(norms)
    return torch.stack(scalars) if scalars else torch.zeros(0, device=device)


def make_inner(make: MakeOptimizer, params: list[torch.nn.Parameter]) -> OptimizerLike:
    """Return the optimizer that ``make`` makes of ``params``, the parameters that one rank updates. If there
    are none, return an optimizer that updates nothing, because torch's do not accept an empty list."""
    return make(params) if params else cast("OptimizerLike", torch.optim.SGD([{"params": []}]))


class ZeroOptimizer(abc.ABC):
    """Base class of the optimizers of ZeRO's stages, 0 to 3.

    In each micro-batch, `_on_gradient` is called with each parameter as soon as backward has completed its
    gradient, and `_after_backward` at the end of backward. ``params`` are the trained parameters. ``inner``,
    the optimizer that ``make`` returns, updates what `_prepare` returns: the parameters in stage 0, and in
    stages 1 to 3 ``master``, an fp32 copy of this rank's part of the parameters, which on NVMe is cut into
    several (`StoredState`).

    Stages 1 to 3 collect gradients in the first of ``buffers``, each of which holds ``limit`` elements.
    ``pending`` are the parameters whose gradients have been collected and not reduced yet, with ``elements``
    elements in all. ``added`` are the parameters whose gradients have been collected in this micro-batch.
    """

    inner: OptimizerLike
    master: torch.nn.Parameter

    def __init__(
        self,
        bench: Workbench,
        params: list[torch.nn.Parameter],
        settings: Mapping[str, KnobValue],
        make: MakeOptimizer,
        group: Group,
    ) -> None:
        self.bench, self.params, self.group = bench, params, group
        self.ranks, self.rank = group.size(), group.rank()
        self.limit = int(settings["reduce_bucket_elements"])
        self.state_on = "" if settings["offload"] == "none" else "host"
        self.buffers: list[torch.Tensor] = []
        self.pending: list[torch.nn.Parameter] = []
        self.added: set[torch.nn.Parameter] = set()
        self.elements = 0
        self.last, self.queued, self.micro_batch = True, False, -1
        self.scale: torch.Tensor | None = None  # applied to the gradients in the next step
        handles = [p.register_post_accumulate_grad_hook(self._ready) for p in params]
        bench.closers += [h.remove for h in handles]
        bench.before_micro_batch.append(self._begin)
        bench.grad_norm = self.grad_norm
        updated = self._prepare(settings)
        with bench.memory_pool(self.state_on):
            self.inner = make(updated)

    def _begin(self, last: bool) -> None:
        self.last, self.queued, self.micro_batch = last, False, self.micro_batch + 1
        self.added.clear()

    def _ready(self, param: torch.nn.Parameter) -> None:
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        with torch.no_grad():
            self._on_gradient(param)

    def _add(self, param: torch.nn.Parameter) -> None:
        """Collect the gradient of ``param``: copy it to the first buffer. If the buffer would then hold more
        than ``limit`` elements, first reduce the pending gradients. A gradient of more than ``limit``
        elements stays where it is and is reduced alone."""
        if self.elements + param.numel() > self.limit:
            self._reduce()
            self.buffers.reverse()  # if there are two, the other fills while this one is reduced
        if param.numel() <= self.limit:
            self._into(self.buffers[0], self.elements, param)
        self.pending.append(param)
        self.added.add(param)
        self.elements += param.numel()

    def _reduce(self) -> None:
        if self.pending:
            self._reduce_pending()
            self.pending, self.elements = [], 0

    def _into(self, buffer: torch.Tensor, offset: int, param: torch.nn.Parameter) -> None:
        """Copy the gradient of ``param`` to ``buffer``, from element ``offset`` on. ``param.grad`` becomes a
        view of the buffer."""
        assert param.grad is not None
        place = buffer.narrow(0, offset, param.numel()).view_as(param)
        place.copy_(param.grad)
        param.grad = place

    def _norm(self, norms: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the Euclidean norm of the gradients of all ranks together, a float32 scalar. ``norms`` are
        those of the gradients that this rank keeps."""
        total = stack_norms(norms, self.bench.torch_device).square().sum().float()
        all_reduce(total, self.group)
        return total.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            param.grad = None

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Make the next step, and only that, multiply the fp32 gradients by ``factor`` just before the
        update, as DeepSpeed clips gradients. Stage 0 multiplies the gradients at once."""
        self.scale = factor

    def _apply_scale(self) -> None:
        if self.scale is not None and self.master.grad is not None:
            with torch.no_grad():
                self.master.grad.mul_(self.scale.to(self.master.grad.device))
        self.scale = None

    @property
    def state(self) -> Any:
        return {self.master: {"master": self.master, **self.inner.state.get(self.master, {})}}

    @abc.abstractmethod
    def own_gradients(self) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
        """Yield (parameter, start, gradient) for each parameter of which this rank updates a part.
        ``gradient`` is the reduced gradient of that part, and ``start`` the element of the parameter at which
        the part begins. In stage 3, ``gradient`` may end with elements of padding, beyond the end of the
        parameter."""

    @abc.abstractmethod
    def _prepare(self, settings: Mapping[str, KnobValue]) -> list[torch.nn.Parameter]:
        """Make the tensors that the stage keeps from step to step. Return the parameters that the inner
        optimizer updates."""

    @abc.abstractmethod
    def _on_gradient(self, param: torch.nn.Parameter) -> None: ...

    @abc.abstractmethod
    def _after_backward(self) -> None: ...

    def _reduce_pending(self) -> None:
        """Average the pending gradients over all ranks, and keep of them what this rank needs to update its
        part of the parameters. Stages 1 to 3 define it; stage 0 has no pending gradients."""
        raise NotImplementedError

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of all gradients, over all ranks, a float32 scalar. Stages 1 to 3 define it. In
        stage 0 the training step computes the norm from the parameters' gradients instead."""
        raise NotImplementedError

    @abc.abstractmethod
    def step(self) -> None: ...
