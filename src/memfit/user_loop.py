"""The techniques of a plan on a user's own model and optimizer, in the user's own loop: ``memfit.apply``.

The plan is applied by `TrainingStep`, which the trace and the worker run, too; a `Fit` calls its methods one
by one, where the worker calls them in `TrainingStep.run`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from memfit.conformance.monitor import Monitor
from memfit.conformance.sharding import world_size
from memfit.inputs import batch_of, loss_of, on_ranks, plan_of, refuse_lazy
from memfit.jobs.optimizer_groups import PlanOptimizer, UserGroups
from memfit.jobs.training_step import MicroBatch, TrainingStep, move_batch, weigh_loss
from memfit.model.batch_objects import batch_length, batch_tensors, repeat
from memfit.model.tensors import plain_tensors
from memfit.techniques.imported_optimizer import parse_arguments
from memfit.techniques.loss_scale import GradScalerScale
from memfit.techniques.optimizers import default_optimizer
from memfit.techniques.precision import clash_with_loss_scale
from memfit.techniques.rank_mesh import layout, make_world
from memfit.trace.sample_dependence import takes_batch_statistics
from memfit.types.conformance import Conformance
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError, first_line, suggest
from memfit.types.job import STRUCTURE, Job, OptimizerChoice
from memfit.types.plan import Plan

_APPLIED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # models to which a plan was applied
_IGNORED_LABEL = -100  # ignore_index of torch's losses
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "OptimizedModule")


class Fit:
    """A plan applied to the model of the user's own loop; `memfit.apply` returns it.

    ``model`` is what the loop calls in place of its model. ``optimizer`` is for learning-rate schedulers and
    checkpoints; the loop calls `step` in place of its ``step``. ``plan`` is the plan, with the values of all
    settings. ``conformance`` is what was compared with the plan after the first update, and what could not
    be; None before, and if nothing is compared.
    """

    def __init__(
        self, step: TrainingStep, optimizer: torch.optim.Optimizer, *, elements: int, conform: bool
    ) -> None:
        """``step``: the plan applied to the model. ``optimizer``: what the loop calls its optimizer.
        ``elements``: number of elements of the model's parameters before the plan was applied. ``conform``:
        whether the first step is compared with the plan."""
        self.model: Any = step.bench.call or step.model
        self.optimizer, self.plan = optimizer, step.plan
        self.conformance: Conformance | None = None
        self._step, self._conform = step, conform
        # `memfit estimate` runs the script on tensors without values: they cannot be compared with a plan
        self._is_traced = any(
            isinstance(t, FakeTensor) for p in step.model.parameters() for t in plain_tensors(p)
        )
        self._elements = elements
        self._monitor: Monitor | None = None
        self._micro_batch: MicroBatch | None = None  # the one that waits for backward
        self._is_open = self._is_complete = False  # micro-batches have begun; have all ended
        self._updates_count = 0
        self._is_in_backward = False
        # Backward updates parameters, or puts gradients into buffers of the optimizer.
        self._acts_in_backward = bool(self.plan.get("optimizer-in-backward")) or (
            step.bench.grad_norm is not None
        )
        hooked = step.bench.trainable() if self._acts_in_backward else ()
        self._hooks = [p.register_post_accumulate_grad_hook(self._must_be_own_backward) for p in hooked]
        step.take_step = self._take_step

    def split(self, batch: Any, *, whole: bool = False) -> Iterator[Any]:
        """Yield the micro-batches of ``batch``, on the device of the step: one without gradient accumulation.
        A batch of fewer samples than the plan has micro-batches gives one micro-batch for each sample. For
        each, run forward inside `forward`, then `backward`; after the last, `step`.

        ``batch``: this rank's batch of a whole step, as a DistributedSampler gives it. ``whole``: it is the
        batch of all ranks, the same on each, of which this rank takes its part. Until the first update, warns
        (UserWarning) if the micro-batches are known to train otherwise than the batch.

        Raises UserError, when it is iterated, if the batch cannot be split as the plan says or has no loss
        terms, if the plan cuts samples along their sequence and ``whole`` is False, if the previous step or
        micro-batch was not finished, and if the parameters have gradients of another backward pass.
        """
        if self._is_open:
            raise UserError(
                "fit.split was called before the previous step ended",
                hint="call fit.step() once after all micro-batches, or fit.discard() to give a step up",
            )
        if not self._acts_in_backward and any(p.grad is not None for p in self._step.bench.trainable()):
            raise UserError(
                "parameters have gradients before the first micro-batch, from another backward pass than "
                "fit.backward, such as that of a generator through its critic",
                hint="fit.optimizer.zero_grad() before fit.split frees them; or add that loss to the one of "
                "fit.backward",
            )
        if self._step.bench.slices is not None and not whole:
            raise UserError(
                f"{self.plan.label} cuts each sample along its sequence, so it needs the batch of all ranks",
                hint="fit.split(batch, whole=True), with the same batch on all ranks",
            )
        terms: float | None = None
        if whole:
            part, terms = self._step.local(batch)
        else:
            part = move_batch(batch, self._step.bench.torch_device)
        micro_batches = self._step.split(part, terms, allow_fewer=True)
        if not self._updates_count:
            self._warn([m.batch for m in micro_batches])
        self._is_open, self._is_complete = True, False
        self._watch(len(micro_batches))
        for micro_batch in micro_batches:
            self._begin(micro_batch)
            yield micro_batch.batch
            if self._micro_batch is micro_batch:
                self._close_step()
                raise UserError(
                    "fit.backward was not called for a micro-batch of fit.split",
                    hint="call fit.backward(loss) for each, in place of loss.backward()",
                )
        self._is_complete = True

    def _warn(self, parts: list[Any]) -> None:
        """Warn (UserWarning) if the micro-batches ``parts`` are known to train otherwise than their batch: if
        there are several and the model has layers that take statistics of a batch, or if their shares of
        labels -100, which torch's losses ignore, differ and no ``loss_terms`` is given."""
        norms = [n for n, m in self._step.model.named_modules() if takes_batch_statistics(m)]
        if len(parts) > 1 and norms:
            more = f" and {len(norms) - 1} other layers take" if len(norms) > 1 else " takes"
            text = f"{norms[0]}{more} statistics of each micro-batch, not of the batch"
            warnings.warn(f"{text}: {self.plan.label} changes what is trained", stacklevel=3)
        if self._is_traced or self._step.job.loss_terms is not None:
            return
        labels = [[t for t in batch_tensors(p) if t.dtype == torch.long and t.numel()] for p in parts]
        shares = {tuple(float((t == _IGNORED_LABEL).float().mean()) for t in ts) for ts in labels}
        if len(shares) > 1:
            warnings.warn(
                f"micro-batches have different shares of labels {_IGNORED_LABEL}, which losses of torch "
                "ignore: give loss_terms=, the number of labels that the loss of a batch averages, or the "
                "others get other weights than in the batch",
                stacklevel=3,
            )

    def _begin(self, micro_batch: MicroBatch) -> None:
        if isinstance(self.optimizer, PlanOptimizer):
            self.optimizer.push()
        self._step.begin(micro_batch)
        self._micro_batch = micro_batch

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which forward and loss of a micro-batch run: autocast, hooks of saved tensors
        and what else the plan puts around them."""
        return self._step.contexts()

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from ``loss``, the mean loss of the current micro-batch. It is multiplied by the
        micro-batch's share of the batch, and by the loss scale if the plan or the argument ``scaler`` of
        `memfit.apply` has one. Raises UserError if no micro-batch waits for it, or if ``loss`` is not a real
        tensor with one element that depends on a trainable parameter."""
        if self._micro_batch is None:
            raise UserError(
                "fit.backward was called outside fit.split, or twice for one micro-batch",
                hint="for part in fit.split(batch): ... fit.backward(loss)",
            )
        share, self._micro_batch = self._micro_batch.share, None
        self._is_in_backward = True
        try:
            self._step.backward(weigh_loss(loss, share))
        finally:
            self._is_in_backward = False

    def _must_be_own_backward(self, param: torch.Tensor) -> None:
        """Raise UserError if a gradient comes from another backward pass than that of `backward`."""
        if not self._is_in_backward:
            raise UserError(
                f"another backward pass than fit.backward reached the model under {self.plan.label}, which "
                "uses each gradient at once",
                hint="call requires_grad_(False) on the model's parameters while another loss is trained "
                "through it; or use a plan without optimizer-in-backward, zero and sharded-ddp",
            )

    def step(self) -> torch.Tensor:
        """Undo the loss scale, clip the gradients if `memfit.apply` got ``clip``, update the parameters and
        free the gradients. Return the gradient norm before clipping, over all ranks; 0 if float16 gradients
        overflowed, with which nothing is updated.

        The first update is compared with the plan when it is done, unless the argument ``conform`` of
        `memfit.apply` was False or `memfit estimate` traces the loop. The result is in ``conformance``.
        Raises NotConforming if it differs; UserError if not all micro-batches of `split` have run.
        """
        if not (self._is_open and self._is_complete):
            raise UserError(
                "fit.step was called before all micro-batches of fit.split have run",
                hint="call it after the loop `for part in fit.split(batch)`",
            )
        monitor, updates_count = self._monitor, self._updates_count
        if monitor is not None:
            monitor.before_update()
        norm = self._step.update()
        self._close_step()
        if monitor is not None and self._updates_count > updates_count:
            self._conform = False  # only the first step is compared
            monitor.clipping.before = float(norm)
            self.conformance = monitor.conclude()
        return norm

    def discard(self) -> None:
        """Give up the current step, if there is one: free its gradients, without an update. Raises UserError
        if the plan updates parameters during backward, or keeps gradients in buffers (sharded-ddp, and zero
        of stage 1 or above)."""
        if self._acts_in_backward:
            raise UserError(
                f"fit.discard cannot give up a step under {self.plan.label}: backward has already updated "
                "parameters or put gradients into buffers of the optimizer",
                allowed="plans without optimizer-in-backward, zero and sharded-ddp",
            )
        self._step.optimizer.zero_grad(set_to_none=True)
        self._close_step()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[Any]:
        """Context manager: yield the model in evaluation mode, without gradients, inside the contexts of
        forward. Afterwards its modules are in training or evaluation mode as before."""
        model: torch.nn.Module = self._step.bench.ddp or self._step.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), self.forward():
                yield self.model
        finally:
            for module, mode in modes.items():
                module.training = mode

    def close(self) -> None:
        """Remove the hooks and close the files of techniques that shard or store states, such as zero. The
        model keeps what else the plan changed in it. This object must not be used afterwards."""
        self._close_step()
        for hook in self._hooks:
            hook.remove()
        self._step.close()

    def _take_step(self) -> None:
        self._updates_count += 1
        self.optimizer.step()

    def _watch(self, micro_batches: int) -> None:
        """Begin to observe the step, which runs ``micro_batches``, for the comparison with the plan. A short
        batch may have fewer of them than the plan. Do nothing if no step is compared, or after the first."""
        if not self._conform or self._is_traced:
            return
        job = self._step.job
        self._monitor = Monitor(
            self._step.model,
            self._step.optimizer,
            self.plan,
            blocks=job.blocks,
            head=job.head,
            whole_elements=self._elements,
            micro_batches=micro_batches,
        )
        self._monitor.clip = job.clip
        self._monitor.__enter__()

    def _close_step(self) -> None:
        if self._monitor is not None:
            self._monitor.__exit__()
        self._monitor = self._micro_batch = None
        self._is_open = self._is_complete = False


def _check_optimizer_arguments(plan: Plan) -> None:
    """Raise UserError if the plan's technique ``optimizer`` sets lr, betas, eps or weight_decay: the user's
    optimizer has these four, and a schedule may change them. Also raises it if the technique's setting
    ``arguments`` cannot be parsed."""
    use = plan.get("optimizer")
    arguments = parse_arguments(str(use.settings["arguments"]), "arguments") if use is not None else {}
    if fixed := sorted(arguments.keys() & {"lr", "betas", "eps", "weight_decay"}):
        raise UserError(
            f"the plan sets {fixed[0]} of its optimizer, which memfit.apply takes from your optimizer",
            hint=f"leave {fixed[0]} out of the plan's arguments and give it to the optimizer of your loop",
        )


def apply_plan(  # noqa: PLR0913
    plan: Any,
    model: torch.nn.Module,
    optimizer: Any,
    *,
    batch: Any,
    loss: Any,
    loss_terms: Callable[[Any], int] | None,
    clip: float | None,
    scaler: Any,
    device: Any,
    conform: bool,
    fields: dict[str, Any],
) -> Fit:
    """Apply ``plan`` to ``model`` in place and return a `Fit`. The arguments and errors are those of
    `memfit.apply`; ``fields`` are its keywords ``structure``."""
    job_plan = _plan(plan)
    _check_optimizer_arguments(job_plan)
    _check_model(model)
    _check_scaler(scaler, job_plan)
    for name in fields:
        if name not in STRUCTURE:
            raise UserError(
                f"memfit.apply has no argument {name!r}",
                allowed=", ".join(STRUCTURE),
                hint=suggest(name, STRUCTURE),
            )
    if loss_terms is not None and not callable(loss_terms):
        raise UserError(
            f"the argument loss_terms is a {type(loss_terms).__name__}",
            allowed="a function that returns the number of loss terms of a batch, or None: its samples",
        )
    torch_device = _device(device, model)
    user_groups = UserGroups(_optimizer(optimizer, model, torch_device), model)
    # A job's batch is that of all ranks, an example that of this one.
    example = None if batch is None else repeat(batch_of(batch), layout(job_plan).data)

    def make_batch(step: int, seed: int) -> Any:
        if example is None:
            raise UserError(
                f"the plan {job_plan.label} runs the model on an example before training",
                hint="give one batch of a whole step: memfit.apply(plan, model, optimizer, batch=batch)",
            )
        return example

    job = Job(
        name=type(model).__name__,
        build_model=lambda: model,
        make_batch=make_batch,
        loss=loss_of(loss, inspect.signature(model.forward)),
        batch_size=1 if example is None else batch_length(example),
        loss_terms=loss_terms,
        optimizer=user_groups.choice(),
        clip=clip,
        **fields,
    )
    elements = sum(p.numel() for p in model.parameters())
    forwards = {module: module.forward for module in model.modules()}
    world = make_world(job_plan, rank=dist.get_rank() if job_plan.ranks > 1 else 0, device=torch_device.type)
    step = TrainingStep(
        job, job_plan, device=torch_device.type, torch_device=_device_name(torch_device), world=world
    )
    if scaler is not None and scaler.is_enabled():
        step.bench.loss_scale = GradScalerScale(scaler, torch_device)
    for module, inner in forwards.items():
        if "forward" in vars(module) and module.forward is not inner:
            module.forward = _PlannedForward(module.forward, inner)
    _APPLIED.add(model)
    return Fit(step, user_groups.adopt(step.optimizer, model), elements=elements, conform=conform)


class _PlannedForward:
    """The forward method that a plan gives a module. A deep copy of the module, such as an average of the
    weights, gets the module's own, bound to the copy: the plan's is bound to the module that it copies."""

    def __init__(self, forward: Callable[..., Any], inner: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward, self._inner = forward, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._inner, memo)


def _device(device: Any, model: torch.nn.Module) -> torch.device:
    """Return the device that the argument ``device`` of `memfit.apply` names; for None, that of the model's
    parameters. Raises UserError if torch does not know it or cannot use it here."""
    first_parameter = next(model.parameters())
    if device is None:
        return first_parameter.device
    try:
        torch_device = torch.device(device)
        if not isinstance(first_parameter, FakeTensor):  # `memfit estimate` stands in for the device
            torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"the argument device is {device!r}, which torch cannot use here: {first_line(error)[:200]}",
            allowed='a device of this machine such as "cpu" or "cuda:0", or None: where the parameters are',
        ) from error
    return torch_device


def _device_name(device: torch.device) -> str:
    """Return the device's name, such as "cpu" or "cuda:0". If an accelerator has no index, it gets that of
    torch's current device."""
    if device.type == HOST or device.index is not None:
        return str(device)
    return f"{device.type}:{torch.accelerator.current_device_index()}"


def _plan(plan: Any) -> Plan:
    ranks = world_size()
    job_plan = plan_of(on_ranks(plan, ranks))
    if job_plan.ranks != ranks:
        raise UserError(
            f"the plan is for {job_plan.ranks} ranks, but this process is one of {ranks}",
            allowed=f"a plan with ranks: {ranks}",
            hint=f"torchrun --nproc-per-node {job_plan.ranks}, and torch.distributed.init_process_group() "
            "before memfit.apply"
            if job_plan.ranks > ranks
            else "",
        )
    if "pipeline" in job_plan:
        raise UserError(
            "memfit.apply cannot apply pipeline to a loop: its schedule decides when forward and backward of "
            "each part of the model run",
            allowed="the other techniques",
            hint="describe the training as a Job and use `memfit run` or torch.distributed.pipelining; or "
            "plan with --without pipeline",
        )
    return job_plan


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"the argument model is a {type(model).__name__}", allowed="a torch.nn.Module")
    if model in _APPLIED:
        raise UserError(
            "a plan was applied to this model already",
            hint="build the model anew for another plan",
        )
    refuse_lazy(model)
    kinds = {kind.__name__ for kind in type(model).__mro__}
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    if sharded or kinds & set(_WRAPPERS):
        raise UserError(
            f"the model is wrapped or sharded already ({type(model).__name__})",
            allowed="the plain model: ddp, fsdp2 and compile belong in the plan",
        )
    if any(p.is_meta for p in model.parameters()):
        raise UserError(
            "parameters of the model are on the meta device, so they have no values",
            hint="model.to_empty(device=...) and initialise it, or build it on a device",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"the model {type(model).__name__} has no trainable parameter",
            hint="call requires_grad_(True) on the parameters that are to be trained",
        )


def _check_scaler(scaler: Any, plan: Plan) -> None:
    if scaler is None:
        return
    if not isinstance(scaler, torch.amp.GradScaler):
        raise UserError(
            f"the argument scaler is a {type(scaler).__name__}", allowed="a torch.amp.GradScaler, or None"
        )
    if scaler.is_enabled() and (names := clash_with_loss_scale(plan)):
        raise UserError(
            f"the plan's {', '.join(names)} cannot be combined with the argument scaler",
            hint="leave scaler out, in a loop that does not autocast to float16; or "
            f"`memfit plan {' '.join(f'--without {name}' for name in names)}` finds another plan",
        )


def _optimizer(optimizer: Any, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer that the argument ``optimizer`` of `memfit.apply` is, or makes for the trainable
    parameters of ``model``. Raises UserError if it neither is nor makes a torch.optim.Optimizer, and for an
    unknown name or import path. Errors of a function of the user are passed on."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    params = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None or isinstance(optimizer, str):
        name = optimizer or "adamw"
        optimizer = OptimizerChoice(name=name if ":" in name else name.lower())
    if isinstance(optimizer, OptimizerChoice):
        instance: Any = default_optimizer(optimizer, device_kind(device.type), model)(params)
    elif callable(optimizer):
        instance = optimizer(params)
    else:
        instance = optimizer
    if not isinstance(instance, torch.optim.Optimizer):
        raise UserError(
            f"the argument optimizer is or makes a {type(instance).__name__}",
            allowed="a torch.optim.Optimizer of the model, a function or class that makes one from a list of "
            "parameters, adamw, adam, sgd, adafactor or an import path such as torch.optim:Muon as text, an "
            "OptimizerChoice, or None: AdamW",
        )
    return instance
