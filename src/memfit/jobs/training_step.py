"""The one training step. The trace runs it on fake tensors, the worker on real ones; there is no other.

::

    step = TrainingStep(job, plan, device="cpu")
    loss, grad_norm = step.run(batch, on_phase)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memfit.jobs.ema import WeightAverage
from memfit.model.batch_objects import batch_length, map_batch, split
from memfit.techniques import fp32_modules
from memfit.techniques.base import OptimizerLike, Workbench
from memfit.techniques.optimizers import StepInBackward, default_optimizer, innermost
from memfit.techniques.rank_mesh import World, builds_on_host, layout, moves_parameters
from memfit.techniques.registry import check, freezes_parameters, ordered_uses
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Phase

OnPhase = Callable[[Phase], None]


def _ignore(phase: Phase) -> None:
    """Do nothing when a phase begins: the default of ``on_phase``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A part of a batch that runs in one forward and backward pass. ``share``: the factor of its mean loss in
    the loss of the step. ``last``: whether the optimizer's step comes after it."""

    batch: Any
    share: float
    last: bool


_RunMicroBatch = Callable[[MicroBatch, OnPhase], torch.Tensor]


class TrainingStep:
    """A model with a plan applied, its optimizer, and the training step.

    Creating it raises UserError if the plan's techniques conflict, lack a package, or do not suit the job; if
    the model has no trainable parameters; if the job clips gradients and the plan has optimizer-in-backward;
    and if the job's optimizer needs a closure, that is, the loss several times per step. Engines other than
    memfit's own have subclasses (engines/*/step.py): ``carried`` names the techniques that the subclass
    applies itself, in `_prepare`.
    """

    carried: frozenset[str] = frozenset()

    def __init__(
        self,
        job: Job,
        plan: Plan,
        *,
        device: str = HOST,
        torch_device: str = HOST,
        world: World | None = None,
        on_built: Callable[[Workbench], None] = lambda bench: None,
    ) -> None:
        """Build the model, apply the plan, and create the optimizer.

        ``device``: the kind of device whose kernels run, such as "cuda". ``torch_device``: where the model
        and batches are, such as "cuda:0"; a trace leaves them on the CPU. ``world``: the plan's layout of
        ranks with this process's rank; by default rank 0, without a device mesh. ``on_built`` is called with
        the workbench, which holds the model as the job built it, before any technique changes it. Raises
        UserError as the class says.
        """
        check(plan)
        model = job.build_model()
        model.train()
        is_moved_later = builds_on_host(plan, device)  # by the technique that divides the model
        if torch_device != HOST and not is_moved_later:
            model.to(torch_device)
        first_device = HOST if is_moved_later else torch_device  # where the model is until then
        bench = Workbench(
            job=job,
            model=model,
            device=device_kind(device),
            torch_device=torch_device,
            make_optimizer=default_optimizer(job.optimizer, device_kind(device), model, job.blocks),
            world=world or World(layout=layout(plan)),
            first_part=lambda parts: move_batch(split(job.make_batch(0, 0), parts)[0], first_device),
        )
        on_built(bench)
        fp32_modules.keep_in_float32(bench, plan, self.carried)
        for technique, _ in ordered_uses(plan):
            technique.observe_plain_model(bench)
        for technique, use in ordered_uses(plan):
            if technique.name not in self.carried:
                technique.apply(bench, use.settings)
        if torch_device != HOST and is_moved_later:
            _move_rest(model, torch_device, bench.own_parameters, parameters=moves_parameters(plan, device))
        self.job, self.bench, self.model, self.plan = job, bench, model, plan
        self.optimizer: OptimizerLike = self._prepare()
        self.take_step: Callable[[], Any] | None = None  # called in place of the optimizer's step, if set
        # Called for a micro-batch with what runs it, in place of that, if set.
        self.around_micro_batch: Callable[[_RunMicroBatch, MicroBatch, OnPhase], torch.Tensor] | None = None
        self.average = self._weight_average()
        if job.clip is not None and bench.step_in_backward:
            raise UserError(
                "the argument clip cannot be combined with optimizer-in-backward, which updates each "
                "parameter before the norm of all gradients is known",
                allowed="clip=None, in the Job or in memfit.apply; or a plan without optimizer-in-backward",
            )
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UserError(
                f"the optimizer {type(self.optimizer).__name__} needs a closure in its step, to compute the "
                "loss several times",
                allowed="an optimizer whose step needs no closure, such as AdamW",
            )

    def run(
        self,
        batch: Any,
        on_phase: OnPhase = _ignore,
        *,
        micro_batch_limit: int | None = None,
        update: bool = True,
        terms_per_rank: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one training step on ``batch``, this rank's part of the batch: forward and backward of each
        micro-batch, then the optimizer's step and the freeing of gradients, then, if the job has one, the
        update of the moving average of weights.

        Returns two detached scalar tensors. The first is the sum of the losses of the micro-batches that ran,
        each weighted by its number of loss terms divided by ``terms_per_rank``. That is the mean number of
        loss terms over ranks with different data, as `local` returns it; by default the number in ``batch``,
        so that the first result is the mean loss of ``batch``. The second is the gradient norm before
        clipping, or 0 if float16 gradients overflowed and the optimizer's step was skipped.

        ``on_phase`` is called with each phase when it begins. ``micro_batch_limit``: run only this many
        micro-batches, the first ones and the last, for a trace that knows that the others are alike; by
        default all run. ``update=False``: free the gradients without the optimizer's step and the average's
        update. Raises UserError if ``batch`` cannot be split as the plan requires or has no loss terms, or
        if the job's loss is not a real tensor with one element that depends on a trainable parameter.
        """
        micro_batches = self.split(batch, terms_per_rank)
        loss_sum: torch.Tensor | None = None
        for index in micro_batch_indices(len(micro_batches), micro_batch_limit):
            around, part = self.around_micro_batch, micro_batches[index]
            loss = around(self._micro_step, part, on_phase) if around else self._micro_step(part, on_phase)
            loss_sum = loss if loss_sum is None else loss_sum + loss
        assert loss_sum is not None
        on_phase(Phase.OPTIMIZER)
        if not update:
            return loss_sum, self._skip_update()
        return loss_sum, self.finish()

    def finish(self) -> torch.Tensor:
        """Run what follows the last backward pass of a step: `update`, and the update of the moving average
        of weights. Return the gradient norm as `update` does."""
        norm = self.update()
        if self.average is not None:
            self.average.update()
        return norm

    def prime(self, on_phase: OnPhase = _ignore) -> None:
        """Create the optimizer's state as a first step does, by an optimizer step with gradients of zero,
        which may change the parameters, as by weight decay. Used for traces. ``on_phase`` is called once,
        with ``Phase.OPTIMIZER``."""
        on_phase(Phase.OPTIMIZER)
        for param in self.bench.trainable():
            param.grad = torch.zeros_like(param)
        self.update()

    def local(self, batch: Any) -> tuple[Any, float]:
        """Return (this rank's part of ``batch``; the mean number of loss terms of a part). ``batch``: the
        whole batch of a step, the same on all ranks.

        Data-parallel ranks get consecutive samples, as `split` cuts them, copied into new tensors. If those
        of this rank have no loss terms, return (another rank's part that has; infinity), so that its loss
        does not count. Without data parallelism the part is ``batch`` itself. If the plan cuts samples along
        their sequence, the part is the rank's slice of its samples. The part is copied to the step's device.
        Raises UserError if ``batch`` has fewer samples than there are data-parallel ranks.
        """
        world, cut_sample = self.bench.world, self.bench.slices
        if cut_sample is not None:
            with _disable_current_modes():  # labels are counted on real values, in a trace too
                parts = [s for part in split(batch, world.layout.data) for s in cut_sample(part)]
                index = world.layout.data_index(world.rank) * world.layout.context + world.index("context")
                mean_terms = sum(self._terms(p) for p in parts) / len(parts)
                return move_batch(parts[index], self.bench.torch_device), mean_terms
        if world.layout.data == 1:
            return move_batch(batch, self.bench.torch_device), float(self._terms(batch))
        rank_parts, device = split(batch, world.layout.data), self.bench.torch_device
        part, mean_terms = (
            rank_parts[world.layout.data_index(world.rank)],
            self._terms(batch) / world.layout.data,
        )
        if not self._terms(part):
            part, mean_terms = self._with_terms(rank_parts)[0][0], math.inf
        local_part = map_batch(torch.clone, part) if device == HOST else move_batch(part, device)
        return local_part, mean_terms

    def split(
        self, batch: Any, terms_per_rank: float | None = None, *, allow_fewer: bool = False
    ) -> list[MicroBatch]:
        """Return the micro-batches of the plan, in their order. ``batch`` is this rank's part of the batch;
        ``terms_per_rank`` is as in `run`. ``allow_fewer``: a batch of fewer samples than the plan has
        micro-batches, such as the last one of a DataLoader, is split into single samples. Raises UserError if
        ``batch`` cannot be split as the plan requires, or if it has no loss terms."""
        count = self.bench.micro_batches
        parts = split(batch, min(count, batch_length(batch)) if allow_fewer and count > 1 else count)
        parts, terms = self._with_terms(parts)
        total = terms_per_rank or sum(terms)
        if not total:
            raise UserError(
                "the batch has no loss terms: it has no samples, all its labels are -100, which the loss "
                "ignores, or loss_terms, an argument of Job and of memfit.apply, counts none",
                allowed="at least 1 loss term in each batch",
            )
        return [
            MicroBatch(batch=part, share=n / total, last=index == len(parts) - 1)
            for index, (part, n) in enumerate(zip(parts, terms, strict=True))
        ]

    def begin(self, micro_batch: MicroBatch) -> None:
        """Tell the plan's techniques that ``micro_batch`` begins. To be called before its forward pass."""
        for callback in self.bench.before_micro_batch:
            callback(micro_batch.last)

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from ``loss``, a weighted loss (`weigh_loss`), which is first multiplied by the loss
        scale if the plan has one."""
        scale = self.bench.loss_scale
        self._backward(loss if scale is None else loss * scale.value)

    def update(self) -> torch.Tensor:
        """Undo the loss scale, clip the gradients to the job's ``clip``, run the optimizer's step and free
        the gradients. Return the gradient norm before clipping.

        If there is a loss scale above its least (1; 0 for that of a user's GradScaler) and the norm is not
        finite, the scale is lowered, the optimizer's step is skipped, and the norm returned is 0.
        """
        norm, scale = self._grad_norm(), self.bench.loss_scale
        if scale is None or scale.unscale(norm, self.bench.trainable()):
            self._clip(norm)
            (self.take_step or self.optimizer.step)()
        else:
            norm = torch.zeros_like(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def close(self) -> None:
        """Undo what the techniques and the engine did outside of this step: remove hooks from the model, end
        the engine's own objects, close files, restore functions of torch. The step must not be used
        afterwards."""
        for close in self.bench.closers:
            close()

    def _prepare(self) -> OptimizerLike:
        bench = self.bench
        if bench.step_in_backward:
            return StepInBackward(bench)
        if not (parameters := bench.trainable()):
            raise UserError(
                "the model has no trainable parameters",
                hint="set requires_grad_(True) on some of them, for a Job in build_model",
            )
        optimizer = bench.make_optimizer(parameters)
        if bench.loss_scale is not None:
            bench.loss_scale.keep_in(innermost(optimizer)[0])
        return optimizer

    def _clip(self, norm: torch.Tensor) -> None:
        """Scale all gradients by one factor so that their norm is at most the job's ``clip``; do nothing if
        that is None.

        The arithmetic is that of `torch.nn.utils.clip_grad_norm_`. ``norm``: the norm of all gradients over
        all ranks.
        """
        if self.job.clip is None:
            return
        with torch.no_grad():
            factor = (self.job.clip / (norm + 1e-6)).clamp(max=1.0)
            if (scale := getattr(self.optimizer, "scale_gradients", None)) is not None:
                scale(factor)
                return
            grads = [p.grad for p in self.bench.trainable() if p.grad is not None]
            torch._foreach_mul_([getattr(g, "_local_tensor", g) for g in grads], factor)

    def _weight_average(self) -> WeightAverage | None:
        if self.job.ema is None:
            return None
        return WeightAverage(self.bench, self.model, self.job.ema, frozen=not freezes_parameters(self.plan))

    def _skip_update(self) -> torch.Tensor:
        norm = self._grad_norm()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _micro_step(self, micro_batch: MicroBatch, on_phase: OnPhase) -> torch.Tensor:
        if self.bench.pipeline is not None:
            return self._run_pipeline(micro_batch, on_phase)
        self.begin(micro_batch)
        on_phase(Phase.FORWARD)
        loss = self._weighted_loss(self.bench.call or self.model, micro_batch.batch, micro_batch.share)
        on_phase(Phase.BACKWARD)
        self.backward(loss)
        return loss.detach().float()

    def _run_pipeline(self, micro_batch: MicroBatch, on_phase: OnPhase) -> torch.Tensor:
        assert self.bench.pipeline is not None
        parts_count, samples = self.bench.pipeline.micro_batches, batch_length(micro_batch.batch)
        if samples % parts_count:
            raise UserError(
                f"pipeline cannot divide the {samples} samples that a data-parallel rank gets in one "
                f"accumulation step into {parts_count} equal micro-batches",
                allowed=f"a multiple of {parts_count} samples; or a value of pipeline's setting "
                f"micro_batches that divides {samples}",
            )
        parts, terms = self._with_terms(split(micro_batch.batch, parts_count))
        pieces = [(p, micro_batch.share * n / sum(terms)) for p, n in zip(parts, terms, strict=True)]
        return self.bench.pipeline.run(pieces, self._weighted_loss, on_phase, last=micro_batch.last)

    def _weighted_loss(self, model: Any, part: Any, share: float) -> torch.Tensor:
        with self.contexts():
            loss = self.job.loss(model, part)
        return weigh_loss(loss, share)

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        """Context manager: enter the contexts that the plan puts around a forward pass, such as autocast. To
        be used for evaluation too."""
        with contextlib.ExitStack() as stack:
            for context in self.bench.forward_contexts:
                stack.enter_context(context())
            yield

    def _with_terms(self, parts: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """Return (the parts of a batch, their numbers of loss terms). A part without terms, whose mean loss
        and gradients are not numbers, is replaced by one with terms, which with the number 0 adds nothing."""
        terms = [self._terms(part) for part in parts]
        substitute = next((part for part, n in zip(parts, terms, strict=True) if n), None)
        pairs = zip(parts, terms, strict=True)
        return [part if n or substitute is None else substitute for part, n in pairs], terms

    def _terms(self, part: Any) -> int:
        if self.job.loss_terms:
            return self.job.loss_terms(part)
        terms = self.bench.loss_terms(part)
        return batch_length(part) if terms is None else terms

    def _grad_norm(self) -> torch.Tensor:
        if self.bench.grad_norm is not None:
            return self.bench.grad_norm()
        if isinstance(self.optimizer, StepInBackward):
            return torch.stack(self.optimizer.square_norms).sum().sqrt()
        counted_elsewhere = self.bench.counted_elsewhere
        grads_by_name = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        own_grads = [g for n, g in grads_by_name.items() if n in self.bench.own_parameters]
        grads = [
            g for n, g in grads_by_name.items() if n not in counted_elsewhere | self.bench.own_parameters
        ]
        if self.bench.world.mesh is not None:
            return global_norm(grads, self.bench.world, own=own_grads, device=self.bench.torch_device)
        norms = [torch.linalg.vector_norm(g.coalesce().values() if g.is_sparse else g) for g in grads]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms).float())
        return total


def move_batch(batch: Any, device: str) -> Any:
    """Return the batch with its tensors on ``device``, such as "cuda:0"; the batch itself if that is the
    host."""
    return batch if device == HOST else map_batch(lambda tensor: tensor.to(device), batch)


def _move_rest(
    model: torch.nn.Module, device: str, own_parameters: Collection[str], *, parameters: bool
) -> None:
    """Move what is still on the host of a model that techniques have divided to ``device``: its buffers, the
    parameters called ``own_parameters``, which differ between ranks, and with ``parameters`` all others."""
    if parameters:
        model.to(device)
    for name, param in model.named_parameters():
        if name in own_parameters:
            param.data = param.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def weigh_loss(loss: Any, share: float) -> torch.Tensor:
    """Return the loss of a micro-batch times its share of the step's loss. Raises UserError unless it is a
    real tensor with one element that depends on a trainable parameter."""
    is_real = isinstance(loss, torch.Tensor) and not loss.is_complex()
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad or not is_real:
        description = (
            f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        )
        if isinstance(loss, torch.Tensor) and not is_real:
            description = "complex"
        elif isinstance(loss, torch.Tensor) and loss.numel() == 1:
            description = "a scalar tensor that does not depend on any trainable parameter"
        raise UserError(
            f"the loss of the training step is {description[:120]}",
            allowed="a real tensor with one element that depends on the model's trainable parameters",
        )
    return loss * share if share != 1.0 else loss


def _own_part(grad: torch.Tensor) -> tuple[tuple[Any, ...], torch.Tensor]:
    """Return (process groups over which ``grad`` is sharded; this rank's shard of it). For a plain tensor
    there are no groups, and the shard is the tensor.

    Gradients that ranks hold as partial sums, as in norms that work on a slice of the sequence, are summed
    over ranks first.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(grad, DTensor):
        return (), grad
    reduced_grad = grad.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in grad.placements]
    )
    mesh, placements = grad.device_mesh, reduced_grad.placements
    return tuple(
        mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate()
    ), reduced_grad.to_local()


def global_norm(
    grads: Sequence[torch.Tensor],
    world: World,
    *,
    own: Sequence[torch.Tensor] = (),
    device: str = HOST,
) -> torch.Tensor:
    """Return the L2 norm of the gradients of all ranks of ``world``, a float32 scalar. All ranks must call
    it, since they communicate.

    ``grads``: this rank's gradients. The squares of its shards are summed over the ranks among which each
    gradient is sharded, and over pipeline stages, which hold different parameters. ``own``: gradients of
    parameters that differ between data-parallel ranks; their squares are also summed over these ranks.
    ``device``: where the sum of a rank without gradients is made.
    """
    squares: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for grad in grads:
        groups, part = _own_part(grad)
        squares.setdefault(groups, []).append(torch.linalg.vector_norm(part).float().square())
    if own:
        data: Any = world.sub("replicate", "shard")
        values = squares.setdefault((data.get_group(),), [])
        values += [torch.linalg.vector_norm(g).float().square() for g in own]
    total = torch.zeros((), device=grads[0].device if grads else device)
    for groups, values in squares.items():
        part = torch.stack(values).sum()
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total = total + part
    if (stages := world.sub("pipeline")) is not None:
        torch.distributed.all_reduce(total, group=stages.get_group())
    return total.sqrt()


def micro_batch_indices(count: int, most: int | None) -> list[int]:
    """Return the indices of the micro-batches to run, out of ``count``, if ``most`` (at least 1) are enough:
    the first ``most`` - 1 and the last. All if ``most`` is None or at least ``count``."""
    if most is None or most >= count:
        return list(range(count))
    return [*range(most - 1), count - 1]
