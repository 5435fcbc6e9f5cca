"""Convert what a user has in a notebook (a module, a batch, a loss, an optimizer, a plan) to a Job, Plan and
Machine.

The user's objects are only read. A module is copied without its data each time a trace builds the model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from memfit import catalog
from memfit.files.read import parse_yaml
from memfit.jobs.user_job import guard_job, run_user_code
from memfit.model.batch_objects import batch_length, batch_tensors, map_batch
from memfit.model.tensors import tensor_leaves
from memfit.runtime.local_machine import this_machine
from memfit.techniques.optimizers import default_optimizer
from memfit.techniques.plan_file import parse_plan, read_plan
from memfit.techniques.registry import check, make_use
from memfit.trace.fake_copy import copy_model
from memfit.trace.tracer import fake_model
from memfit.types.device_kind import HOST, device_kind
from memfit.types.errors import UserError
from memfit.types.job import Bound, Job, OptimizerChoice
from memfit.types.machine import Machine
from memfit.types.plan import Plan

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
_OUTPUTS = (
    "output",
    "outputs",
    "out",
    "o",
    "logits",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "y_hat",
    "y_pred",
)
_BATCHES = ("batch", "inputs", "data", "b")
_TARGETS = ("labels", "label", "targets", "target", "y")
_MINE = "your training step"
_PLAN_KEYS = {"techniques", "ranks", "note", "watch"}  # no technique has one of these names


def job_of(
    model: Any,
    batch: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = None,
    bound: Bound | None = None,
    ema: float | None = None,
    clip: float | None = None,
    workers: int | None = None,
) -> Job:
    """Return a Job from a module (or a function that builds one) and a batch (or a function that makes one).

    ``model`` may also be a Job, without ``batch``, ``loss`` and ``optimizer``. A compiled module counts as
    the module inside it. ``batch`` is as in `batch_of`, and ``loss`` as in `loss_of`. ``optimizer``: "adamw",
    "adam", "sgd" or "adafactor", an import path such as "torch.optim:Muon", an optimizer of this model, a
    function of parameters, or an OptimizerChoice; None: AdamW. ``bound``, ``ema``, ``clip`` and ``workers``
    are as in `Job`, and replace those of a given Job if they are not None.

    Functions that build the model or make the batch are called at once. Raises UserError if they fail, and
    for other arguments. The functions of the new Job raise errors in the user's own code as UserErrors; those
    of a given Job are kept as they are.
    """
    if isinstance(model, Job):
        if batch is not None or loss is not None or optimizer is not None:
            raise UserError(
                "batch, loss or optimizer were given although the argument model is a Job, which has its own",
                hint="leave out these three arguments, or change them in the Job",
            )
        overrides: dict[str, Any] = {"bound": bound, "ema": ema, "clip": clip, "workers": workers}
        return dataclasses.replace(model, **{k: v for k, v in overrides.items() if v is not None})
    model = getattr(model, "_orig_mod", model)  # a compiled module is predicted as the eager module inside it
    build = _build_of(model)
    value = batch_of(batch)
    name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "model")
    job = Job(
        name=name,
        build_model=build,
        make_batch=lambda step, seed: value,
        loss=lambda model, batch: model(batch),
        batch_size=batch_length(value),
        optimizer=optimizer_of(optimizer, model),
        bound=bound,
        ema=ema,
        clip=clip,
        workers=workers or 0,
    )
    module = model if isinstance(model, torch.nn.Module) else fake_model(guard_job(job, _MINE))
    loss_function = loss_of(loss, _signature(module.forward))
    return guard_job(dataclasses.replace(job, loss=loss_function), _MINE)


def _build_of(model: Any) -> Callable[[], torch.nn.Module]:
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its forward is compiled and copied with it
            replaced_forward = vars(module).get("forward")
            if replaced_forward is not None and getattr(replaced_forward, "__self__", None) is not module:
                raise UserError(
                    f"the method forward of {name or 'the model'} was replaced by {replaced_forward!r:.60}, "
                    "so the module cannot be copied",
                    hint="give as model a function that builds it, or the module before forward was replaced",
                )
        return lambda: copy_model(model)
    if not callable(model):
        raise UserError(
            f"the argument model is a {type(model).__name__}",
            allowed="a torch.nn.Module, a function that builds one, or a memfit.Job",
        )

    def build() -> torch.nn.Module:
        built_module: torch.nn.Module = model()
        if torch._guards.active_fake_mode() is None or not isinstance(built_module, torch.nn.Module):
            return built_module
        is_fake = all(isinstance(p, FakeTensor) for p in built_module.parameters())
        # a function may return an already existing module
        return built_module if is_fake else copy_model(built_module)

    return build


def batch_of(batch: Any) -> Any:
    """Return the batch, or what ``batch`` makes if it is a function, with its tensors detached and on the
    CPU. Tensors on the meta device become zeros. A mapping becomes a dict. The given batch is not changed.

    Raises UserError for a DataLoader, for a batch without a tensor that has dimensions, for a nested tensor,
    and for an error in the function.
    """
    if callable(batch) and not isinstance(batch, Mapping | torch.Tensor) and not batch_tensors(batch):
        batch = run_user_code(batch, "the function that makes the batch")
    if isinstance(batch, torch.utils.data.DataLoader):
        raise UserError(
            "the argument batch is a DataLoader, not a batch",
            hint="give one of its batches: next(iter(loader))",
        )
    value = dict(batch) if isinstance(batch, Mapping) else batch

    def here(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()

    batch_length(value)  # raises UserError where there is no tensor
    return map_batch(here, value)


def refuse_lazy(model: torch.nn.Module) -> None:
    """Raise UserError if the model has a lazy module that has not run yet: its parameters have no shape."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise UserError(
            "the model has a lazy module, such as nn.LazyLinear, whose parameters have no shape before its "
            "first forward pass",
            hint="run the model once on a batch before, or give all sizes, as to nn.Linear",
        )


# -- the loss -------------------------------------------------------------------------------------


def loss_of(loss: Any, forward: inspect.Signature) -> Loss:
    """Return a function ``loss(model, batch)`` for the argument ``loss``.

    ``loss`` may be one of these, told apart by the names of its parameters, whose case does not matter:
    ``loss(output, target)`` or ``loss(output, batch)``, if the first parameter is named output, outputs, out,
    o, logits, pred, preds, prediction, predictions, y_hat or y_pred (the second is the batch if it is named
    batch, inputs, data or b, else the target); ``loss(model, batch)``, if it has any other name. A module or
    a function of torch.nn.functional, also as a functools.partial, is called with (output, target). With
    None, the loss that the model returns is used (see `model_loss`).

    The target is the last item of a tuple or list. Of another batch, it is the first of these keys or
    attributes that is there: labels, label, targets, target, y; without any, the whole batch. ``forward``:
    the signature of the model's forward, which decides what of the batch the model gets (see `_call`). Raises
    UserError if ``loss`` is neither None nor callable.
    """
    if loss is None:
        return lambda model, batch: model_loss(_call(model, batch, forward))
    if not callable(loss):
        raise UserError(
            f"the argument loss is a {type(loss).__name__}",
            allowed="a function of (model, batch), (output, batch) or (output, target), or None: the loss "
            "in the model's output",
        )
    names = _parameters(loss)
    function = loss.func if isinstance(loss, functools.partial) else loss
    is_torch_loss = (
        isinstance(function, torch.nn.Module) or getattr(function, "__module__", "") == "torch.nn.functional"
    )
    if not is_torch_loss and (not names or names[0].lower() not in _OUTPUTS):
        return loss  # type: ignore[no-any-return]
    takes_batch = not is_torch_loss and len(names) > 1 and names[1].lower() in _BATCHES

    def of_output(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        output = _call(model, batch, forward, target_apart=True)
        return loss(output, batch if takes_batch else _target(batch))  # type: ignore[no-any-return]

    return of_output


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in functions have no signature
        return []


def _signature(forward: Any) -> inspect.Signature:
    """Return the signature of a model's forward. That of a traced TorchScript module is in its schema. Raises
    ValueError if ``forward`` has neither."""
    try:
        return inspect.signature(forward)
    except ValueError:
        schema = getattr(forward, "schema", None)
        if schema is None:
            raise
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [a.name for a in schema.arguments if a.name != "self"]
    return inspect.Signature([inspect.Parameter(name, kind) for name in names])


def _target(batch: Any) -> Any:
    if isinstance(batch, tuple | list):
        return batch[-1]
    if isinstance(batch, Mapping):
        return next((batch[k] for k in _TARGETS if k in batch), batch)
    return next((target for k in _TARGETS if (target := getattr(batch, k, None)) is not None), batch)


def _call(model: Any, batch: Any, forward: inspect.Signature, *, target_apart: bool = False) -> Any:
    """Call the model with what its forward accepts of the batch, and return its output.

    Of a mapping, these are the items whose keys are parameters of forward, or all if it takes ``**kwargs``.
    Of a tuple or list, these are as many of the first items as forward has positional parameters, or all if
    it takes ``*args``. Anything else is passed as it is. With ``target_apart``, the last item of a tuple or
    list is not passed, unless forward requires that many arguments. Raises UserError if none of a mapping's
    keys is a parameter of forward.
    """
    kinds = [p.kind for p in forward.parameters.values()]
    if isinstance(batch, Mapping):
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        keywords = {k: v for k, v in batch.items() if takes_all or k in forward.parameters}
        if not keywords:
            raise UserError(
                f"the model's forward{forward} has no parameter named like one of the batch's keys: "
                f"{', '.join(map(str, batch))}",
                hint="give loss=lambda model, batch: ...",
            )
        return model(**keywords)
    if not isinstance(batch, tuple | list):
        return model(batch)
    positional_parameters = [
        p for p in forward.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    count = len(batch) if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional_parameters)
    required_count = sum(p.default is p.empty for p in positional_parameters)
    if target_apart and required_count < len(batch):
        count = min(count, len(batch) - 1)
    return model(*batch[:count])


def model_loss(output: Any) -> torch.Tensor:
    """Return the loss that a model returns itself: the tensor ``output.loss`` or ``output["loss"]``, else the
    first floating-point tensor of one element in the output.

    Without one, return the mean of the first floating-point tensor, which stands for a loss in memory. Raises
    UserError if there is no floating-point tensor.
    """
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = [t for t in tensor_leaves(output) if t.is_floating_point()]
    loss_tensor = next((t for t in leaves if t.numel() == 1), leaves[0] if leaves else None)
    if loss_tensor is None:
        raise UserError(
            f"no loss can be read from the model's output, a {type(output).__name__}",
            allowed="an output whose .loss or ['loss'] is a tensor, or that holds a floating-point tensor",
            hint="give loss=lambda model, batch: ...",
        )
    return loss_tensor if loss_tensor.numel() == 1 else loss_tensor.mean()


# -- the optimizer --------------------------------------------------------------------------------


def optimizer_of(optimizer: Any, model: Any) -> OptimizerChoice:
    if optimizer is None or isinstance(optimizer, OptimizerChoice):
        return optimizer or OptimizerChoice()
    if isinstance(optimizer, str):
        choice = OptimizerChoice(name=optimizer if ":" in optimizer else optimizer.lower())
        default_optimizer(choice, device_kind(HOST))  # raises UserError for an unknown name
        return choice
    if isinstance(optimizer, torch.optim.Optimizer):
        make = _made_like(optimizer, model)
    elif callable(optimizer):
        make = optimizer
    else:
        raise UserError(
            f"the argument optimizer is a {type(optimizer).__name__}",
            allowed="adamw, adam, sgd, adafactor or an import path such as torch.optim:Muon as text, a "
            "torch.optim.Optimizer of the argument model, a function that makes one from a list of "
            "parameters, an OptimizerChoice, or None: AdamW",
        )

    def make_checked(params: list[torch.nn.Parameter]) -> Any:
        made = run_user_code(lambda: make(params), "your optimizer")
        if not hasattr(made, "step"):
            raise UserError(
                f"the argument optimizer makes a {type(made).__name__}", allowed="a torch.optim.Optimizer"
            )
        return made

    return OptimizerChoice(name=getattr(optimizer, "__name__", type(optimizer).__name__), make=make_checked)


def _made_like(optimizer: torch.optim.Optimizer, model: Any) -> Callable[[list[torch.nn.Parameter]], Any]:
    """Return a function that makes, for the parameters that it is given, an optimizer of the same class with
    the same settings as ``optimizer``.

    Each parameter group keeps its own settings if the given parameters have the shapes of the model's
    trainable ones, in the same order. Otherwise (a technique replaced some of them) all get the optimizer's
    defaults. Raises UserError if the optimizer holds no trainable parameter of ``model``, as is always so if
    ``model`` is a function.
    """
    trainable = (
        [p for p in model.parameters() if p.requires_grad] if isinstance(model, torch.nn.Module) else []
    )
    index = {id(p): i for i, p in enumerate(trainable)}
    groups = [([index[id(p)] for p in g["params"] if id(p) in index], g) for g in optimizer.param_groups]
    if not any(indices for indices, _ in groups):
        raise UserError(
            "the argument optimizer holds no trainable parameter of the argument model",
            hint="give as model the module that it was made for, or as optimizer a function that makes "
            "one from a list of parameters",
        )
    optimizer_class: Any = type(optimizer)
    accepted_names = _parameters(optimizer_class)
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted_names}
    shapes = [p.shape for p in trainable]
    group_settings = [
        (indices, {k: v for k, v in g.items() if k != "params"}) for indices, g in groups if indices
    ]

    def make(params: list[torch.nn.Parameter]) -> Any:
        if [p.shape for p in params] != shapes:
            return optimizer_class(params, **defaults)
        return optimizer_class(
            [{**n, "params": [params[i] for i in indices]} for indices, n in group_settings], **defaults
        )

    return make


# -- plan and machine -----------------------------------------------------------------------------


def plan_of(plan: Any) -> Plan:
    """Return a Plan, with the defaults of all settings filled in, from any of these forms: a Plan; a mapping
    of techniques to settings; a mapping with keys of a plan file (techniques, ranks, note, watch); the path
    of a plan file (a Path, or text that ends in .yaml or .yml); YAML text of such a mapping; the name of one
    technique; None for plain training.

    Raises UserError if the plan cannot be read, has unknown keys, settings or values, combines techniques
    that exclude each other, or needs a package that is not installed.
    """
    if plan is None or isinstance(plan, Plan):
        plan = plan or Plan()
        complete_uses = tuple(make_use(u.technique, u.settings) for u in plan.uses)
        return check(dataclasses.replace(plan, uses=complete_uses))
    data = _read(plan)
    if isinstance(data, Path):
        return read_plan(data)
    if isinstance(data, Mapping) and not _PLAN_KEYS & set(data):
        data = {"techniques": dict(data)}
    return parse_plan(data, what="the plan")


def _read(plan: Any) -> Any:
    """Return the data of ``plan``: for text that ends in .yaml or .yml, its Path; for other text, what it
    means as YAML, or ``{name: {}}`` if that is a single name of a technique. Anything but text is returned
    unchanged.

    Raises UserError if the text is not valid YAML.
    """
    if not isinstance(plan, str):
        return plan
    if plan.strip().endswith((".yaml", ".yml")):
        return Path(plan)
    try:
        data = parse_yaml(plan, what="the text given as plan")
    except UserError as error:
        allowed = (
            "as text, the path of a plan file (.yaml or .yml), the content of one, or the name of a technique"
        )
        raise UserError(error.given, allowed=allowed) from error
    return {data: {}} if isinstance(data, str) else data


def says_ranks(plan: Any) -> bool:
    """Return whether the number of ranks is settled by ``plan``, an argument for `plan_of`. False for a
    mapping, a YAML text or a technique's name that does not give it; True for all else: also for None, a Plan
    and the path of a file. Raises UserError for text that is not valid YAML."""
    data = _read(plan)
    return not isinstance(data, Mapping) or "ranks" in data


def on_ranks(plan: Any, ranks: int) -> Any:
    """Return ``plan`` as an argument for `plan_of`: with ``ranks`` ranks if it is a mapping, a YAML text or a
    technique's name that does not give their number, else unchanged. Raises UserError for text that is not
    valid YAML.
    """
    if says_ranks(plan):
        return plan
    data = _read(plan)
    return {"ranks": ranks, **(data if _PLAN_KEYS & set(data) else {"techniques": dict(data)})}


def machine_of(machine: Any) -> Machine:
    """Return a Machine for: a Machine, which is returned; a name of the catalog such as ``8xH100-SXM``; the
    path of a machine file (.toml); None or "this", which is this machine with its accelerators or, without
    one, its CPU; or "this:KIND", its devices of this kind, such as "this:cpu". Raises UserError for anything
    else, for an unknown name, a faulty file, and a kind of device that this machine does not have;
    MemfitError for an accelerator of this machine that does not work."""
    if isinstance(machine, Machine):
        return machine
    if machine is None:
        return this_machine("world")
    if isinstance(machine, str) and machine.partition(":")[0] == "this":
        return this_machine("world", machine.partition(":")[2])
    if not isinstance(machine, str | Path):
        raise UserError(
            f"the argument machine is a {type(machine).__name__}",
            allowed="a Machine, a name of the catalog such as 8xH100-SXM, the path of a machine file "
            "(.toml), None or 'this' for this machine, or 'this:KIND' for its device of a kind, such as "
            "'this:cpu'",
        )
    name = str(machine)
    return catalog.from_toml(name) if name.endswith(".toml") else catalog.machine(name)
