"""Optimizers: AdamW as torch runs it, fused or one parameter at a time, in 8 bits (also paged) or 4 bits;
Adafactor; SGD; any other by its import path; and optimizer steps inside backward."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from memfit.techniques.base import (
    JobFacts,
    Knob,
    MakeOptimizer,
    OptimizerLike,
    StepPart,
    Technique,
    Workbench,
)
from memfit.techniques.imported_optimizer import (
    ALLOWED_PATH,
    PATH,
    imported_optimizer,
    parse_arguments,
)
from memfit.types.device_kind import DeviceKind
from memfit.types.errors import UserError, suggest
from memfit.types.job import OptimizerChoice
from memfit.types.plan import EffectClass, KnobValue

if TYPE_CHECKING:
    import torch


def default_optimizer(
    choice: OptimizerChoice,
    device: DeviceKind,
    model: torch.nn.Module | None = None,
    blocks: str | None = None,
) -> MakeOptimizer:
    """Return a function that makes plain training's optimizer of a list of parameters. It calls
    ``choice.make`` if that is set. Otherwise it makes the optimizer at the import path ``choice.name`` if
    that has a colon (`imported_optimizer`, which ``model`` and ``blocks`` are for), and else torch's
    optimizer of this name: "adamw", "adam", "sgd" or "adafactor".

    ``foreach`` is set explicitly to what torch chooses for ``device`` (on for CUDA, off for CPU; always off
    for Adafactor), because a prediction for a device is traced on CPU tensors; in an optimizer of the user or
    of an import path, only where it is left open. Unless ``choice.make`` is set, raises UserError at once for
    any other name, and as `imported_optimizer` does.
    """
    makers = {"adamw": _adamw, "adam": _adamw, "sgd": _sgd, "adafactor": _adafactor}
    if choice.make is not None:
        return functools.partial(_make_user_optimizer, choice.make, device)
    if ":" in choice.name:
        adamw = functools.partial(_adamw, dataclasses.replace(choice, name="adamw"), device)
        return functools.partial(
            _make_user_optimizer, imported_optimizer(choice, adamw, model, blocks), device
        )
    if choice.name not in makers:
        raise UserError(
            f"unknown optimizer {choice.name!r}",
            allowed=f"{', '.join(makers)}; or {ALLOWED_PATH}",
            hint=suggest(choice.name, makers),
        )
    return functools.partial(makers[choice.name], choice, device)


def _make_user_optimizer(
    make: MakeOptimizer, device: DeviceKind, params: list[torch.nn.Parameter]
) -> OptimizerLike:
    """Return the optimizer that ``make`` makes of ``params``. If torch chooses ``foreach`` for ``device``,
    set it to True in those parameter groups in which it is None and ``fused`` is off, also in those of
    optimizers that the optimizer wraps."""
    optimizer = make(params)
    for group in [g for inner in innermost(optimizer) for g in getattr(inner, "param_groups", [])]:
        if device.foreach and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def innermost(optimizer: Any) -> list[Any]:
    """Return the optimizers inside ``optimizer``: itself, or those that it wraps. A wrapper holds one, or a
    list or mapping of several, in one of the attributes ``optimizers``, ``inner``, ``optimizer`` and
    ``optim``; if it has several of these, only the first in this order counts. Wrappers may be nested."""
    attributes = getattr(optimizer, "__dict__", {})
    names = ("optimizers", "inner", "optimizer", "optim")
    inner = next((attributes[name] for name in names if name in attributes), None)
    if inner is None:
        return [optimizer]
    parts = inner.values() if isinstance(inner, Mapping) else inner if isinstance(inner, list) else [inner]
    return [single for part in parts for single in innermost(part)]


def counts_steps_on_host(optimizer: Any) -> bool:
    """Return whether all torch optimizers inside ``optimizer`` (`innermost`) keep their step counters,
    tensors without dimensions, in host memory whatever the device. That is False if a parameter group of one
    of them is fused or capturable (torch/optim/adamw.py, ``_init_group``), else True."""
    groups = [group for inner in innermost(optimizer) for group in getattr(inner, "param_groups", [])]
    return not any(group.get("fused") or group.get("capturable") for group in groups)


def _groups_by_mesh(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameters as parameter groups, each of which a ``foreach`` kernel can process: one group
    for each device mesh over which parameters are sharded, and one for those that are not sharded. Groups
    without parameters are left out."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for param in params:
        groups.setdefault(getattr(param, "device_mesh", None), []).append(param)
    return [{"params": group} for group in groups.values()]


def _adamw(choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]) -> OptimizerLike:
    import torch

    kind = torch.optim.Adam if choice.name == "adam" else torch.optim.AdamW
    optimizer = kind(_groups_by_mesh(params), **_numbers(choice), foreach=device.foreach)
    return cast(OptimizerLike, optimizer)


def _adamw_maker(kernel: str) -> Callable[..., OptimizerLike]:
    """Return a function of (choice, device, parameters) that makes torch's AdamW with the learning rate,
    betas, eps and weight decay of ``choice``, even if that is another optimizer. ``kernel`` is "fused" (the
    update is one kernel) or "single" (one parameter after the other, as in torch before 2.0)."""

    def make(choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]) -> OptimizerLike:
        import torch

        fused = True if kernel == "fused" else None
        optimizer = torch.optim.AdamW(_groups_by_mesh(params), **_numbers(choice), fused=fused, foreach=False)
        return cast(OptimizerLike, optimizer)

    return make


def _sgd(choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]) -> OptimizerLike:
    import torch

    # Adam's learning rate is per unit of gradient sign, and plain SGD needs a larger one. The factor is a
    # convention; as an E3 technique, SGD is judged by the metric.
    rate = choice.learning_rate * (100.0 if choice.name != "sgd" else 1.0)
    optimizer = torch.optim.SGD(
        _groups_by_mesh(params),
        lr=rate,
        momentum=0.9,
        weight_decay=choice.weight_decay,
        foreach=device.foreach,
    )
    return cast(OptimizerLike, optimizer)


def _adafactor(
    choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]
) -> OptimizerLike:
    import torch

    optimizer = torch.optim.Adafactor(
        params, lr=choice.learning_rate, weight_decay=choice.weight_decay, foreach=False
    )
    return cast(OptimizerLike, optimizer)


def _adamw4bit(
    choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]
) -> OptimizerLike:
    from torchao.optim import AdamW4bit

    return EagerStep(AdamW4bit(params, **_numbers(choice)))


def _adamw8bit(
    choice: OptimizerChoice, device: DeviceKind, params: list[torch.nn.Parameter]
) -> OptimizerLike:
    import bitsandbytes as bnb

    return cast(OptimizerLike, bnb.optim.AdamW8bit(params, **_numbers(choice)))


def _apply_paged(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    """Make the bench's optimizer bitsandbytes' paged AdamW of 8 bits. On a processor, whose memory is the
    host's, and in a trace, it is the unpaged one, which a trace counts as host memory. Raises UserError for
    a device without memory that it shares with the host."""
    kind = bench.device
    if not kind.is_host and not kind.managed_memory:
        raise UserError(
            f"adamw-paged needs memory that host and device share, and bitsandbytes has none for {kind.name} "
            "devices",
            hint="adamw-8bit keeps the same state in the device's memory",
        )

    def make(params: list[torch.nn.Parameter]) -> OptimizerLike:
        from torch._subclasses.fake_tensor import FakeTensor

        if kind.is_host or any(isinstance(param, FakeTensor) for param in params):
            return step_on_host(bench, _adamw8bit(bench.job.optimizer, kind, params))
        return _paged_adamw8bit(bench.job.optimizer, params)

    bench.make_optimizer = make


def _paged_adamw8bit(choice: OptimizerChoice, params: list[torch.nn.Parameter]) -> OptimizerLike:
    import bitsandbytes as bnb

    return cast(OptimizerLike, bnb.optim.PagedAdamW8bit(params, **_numbers(choice)))


def step_on_host(bench: Workbench, optimizer: OptimizerLike) -> OptimizerLike:
    """Make a trace count new tensors of the optimizer's steps as host memory. Return ``optimizer`` itself,
    whose ``step`` is wrapped. In a real run its steps do the same as before."""
    step = optimizer.step

    def on_host() -> None:
        with bench.memory_pool("host"):
            step()

    optimizer.step = on_host  # type: ignore[method-assign]
    return optimizer


def stochastic_adamw(choice: OptimizerChoice) -> MakeOptimizer:
    """Return a function that makes torchao's AdamW of a list of parameters. It rounds the updates of bf16
    parameters stochastically, and has the learning rate, betas, eps and weight decay of ``choice``, even if
    that is another optimizer."""

    def make(params: list[torch.nn.Parameter]) -> OptimizerLike:
        from torchao.optim import _AdamW

        return EagerStep(_AdamW(params, **_numbers(choice), bf16_stochastic_round=True))

    return make


def _numbers(choice: OptimizerChoice) -> dict[str, Any]:
    return {
        "lr": choice.learning_rate,
        "betas": choice.betas,
        "eps": choice.eps,
        "weight_decay": choice.weight_decay,
    }


class EagerStep:
    """Runs the steps of a torchao optimizer without torch.compile, which torchao would call. Compiling takes
    tens of seconds and needs a C++ tool chain on the first step; the arithmetic is the same without it."""

    def __init__(self, inner: OptimizerLike) -> None:
        self.inner = inner

    def step(self) -> None:
        import torch

        # Not by set_stance: torchao asks for a compiled function for each parameter, which takes longer than
        # to run it.
        with mock.patch.object(torch, "compile", lambda model, **options: model):
            self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    @property
    def state(self) -> Any:
        return self.inner.state


def _apply_in_backward(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    bench.step_in_backward = True


class StepInBackward:
    """Holds one optimizer for each trainable parameter. Each optimizer steps during backward, as soon as the
    gradient of its parameter is complete. The gradient is then freed, so that only a few exist at once.

    ``square_norms`` holds the squared norms of the gradients since the last call of `zero_grad`, which
    empties it.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.square_norms: list[torch.Tensor] = []
        self.optimizers: dict[torch.nn.Parameter, OptimizerLike] = {}
        self.handles: list[Any] = []
        bench.closers.append(self.close)
        for param in bench.trainable():
            self.optimizers[param] = bench.make_optimizer([param])
            self.handles.append(param.register_post_accumulate_grad_hook(self._step_one))

    def close(self) -> None:
        """Remove the hooks from the parameters. Otherwise parameter, hook and optimizer keep each other
        alive."""
        for handle in self.handles:
            handle.remove()

    def _step_one(self, param: torch.nn.Parameter) -> None:
        import torch

        if self.bench.on_gradient is not None:
            self.bench.on_gradient(param)
        assert param.grad is not None
        self.square_norms.append(torch.linalg.vector_norm(param.grad).square())
        self.optimizers[param].step()
        param.grad = None

    def step(self) -> None:
        """Do nothing: the parameters have been updated in backward."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.square_norms.clear()

    @property
    def state(self) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for optimizer in self.optimizers.values():
            merged.update(optimizer.state)
        return merged


def is_adamw(choice: OptimizerChoice) -> bool:
    """Return whether ``choice`` is AdamW, so that other implementations of AdamW with its hyperparameters
    train the same: whether its name is "adamw", or "adam" with a weight decay of 0. Return False for a
    user-defined optimizer (``make``), because it is not known what that does."""
    return choice.make is None and (
        choice.name == "adamw" or (choice.name == "adam" and choice.weight_decay == 0)
    )


def _replace(maker: Any) -> Any:
    def apply(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
        bench.make_optimizer = functools.partial(maker, bench.job.optimizer, bench.device)

    return apply


def _apply_imported(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    matrices = parse_arguments(str(settings["matrices"]), "technique optimizer: the setting matrices")
    choice = dataclasses.replace(
        bench.job.optimizer,
        name=str(settings["path"]),
        make=None,
        arguments=parse_arguments(str(settings["arguments"]), "technique optimizer: the setting arguments"),
        matrices=matrices or None,
        others=str(settings["others"]),
    )
    bench.make_optimizer = default_optimizer(choice, bench.device, bench.model, bench.job.blocks)


_TEXT = re.compile(r"[^\n]*")


def _once(facts: JobFacts) -> Iterable[Mapping[str, KnobValue]]:
    return [{}]


def _technique(name: str, summary: str, effect: EffectClass, maker: Any, **options: Any) -> Technique:
    """Return a technique that replaces the job's optimizer by what ``maker(choice, device, parameters)``
    returns. ``options``: further fields of `Technique`. Without ``settings`` among them, the search for one
    device does not propose the technique, but users' plans may have it."""
    return Technique(
        name=name,
        summary=summary,
        effect=effect,
        apply=_replace(maker),
        changes=StepPart.UPDATE,
        order=40,
        slot="optimizer",
        **options,
    )


ADAMW_8BIT = _technique(
    "adamw-8bit",
    "AdamW with its two moments in 8 bits (Dettmers et al. 2022)",
    EffectClass.E2,
    _adamw8bit,
    script_call="an 8-bit AdamW, such as torchao.optim.AdamW8bit or bitsandbytes.optim.AdamW8bit",
    excluded=lambda facts: not facts.is_adamw,
    before_engine=True,
    settings=_once,
    needs=("bitsandbytes",),
    supports=lambda kind: kind.bitsandbytes,
    forbids=("bf16-parameters",),
)
ADAMW_PAGED = Technique(
    name="adamw-paged",
    summary="AdamW in 8 bits, with its moments in paged memory that host and device share",
    script_call="bitsandbytes.optim.PagedAdamW8bit",
    changes=StepPart.UPDATE,
    effect=EffectClass.E2,
    apply=_apply_paged,
    order=40,
    slot="optimizer",
    needs=("bitsandbytes",),
    supports=lambda kind: kind.bitsandbytes and (kind.is_host or kind.managed_memory),
    forbids=("bf16-parameters",),
)
ADAMW_4BIT = _technique(
    "adamw-4bit",
    "AdamW with its two moments in 4 bits (Li et al. 2023)",
    EffectClass.E3,
    _adamw4bit,
    script_call="torchao.optim.AdamW4bit",
    excluded=lambda facts: not facts.is_adamw,
    needs=("torchao",),
    forbids=("bf16-parameters",),
)
ADAMW_FUSED = _technique(
    "adamw-fused",
    "AdamW's update in one kernel: no temporaries",
    EffectClass.E1,
    _adamw_maker("fused"),
    script_call="torch.optim.AdamW(..., fused=True)",
    excluded=lambda facts: not facts.is_adamw,
    before_engine=True,
)
ADAMW_SINGLE = _technique(
    "adamw-single",
    "AdamW one parameter at a time: temporaries of the largest parameter only",
    EffectClass.E0,
    _adamw_maker("single"),
    script_call="torch.optim.AdamW(..., foreach=False)",
    excluded=lambda facts: not facts.is_adamw,
    before_engine=True,
)
ADAFACTOR = _technique(
    "adafactor",
    "second moments factored into rows and columns, no first moment (Shazeer and Stern 2018)",
    EffectClass.E3,
    _adafactor,
    script_call="Adafactor, such as torch.optim.Adafactor",
    excluded=lambda facts: facts.optimizer == "adafactor",
    before_engine=True,
    settings=_once,
)
SGD = _technique(
    "sgd",
    "SGD with momentum: one moment instead of two",
    EffectClass.E3,
    _sgd,
    script_call="torch.optim.SGD with momentum",
    excluded=lambda facts: facts.optimizer == "sgd",
    before_engine=True,
    settings=_once,
)
IMPORTED = Technique(
    name="optimizer",
    summary="any installed torch optimizer by its import path: Muon, Lion, Adam-mini, GaLore and others",
    script_call="the optimizer {path}, arguments: {arguments}; group of the blocks' matrices: {matrices}; "
    "optimizer of other parameters: {others}",
    changes=StepPart.UPDATE,
    effect=EffectClass.E3,
    apply=_apply_imported,
    order=40,
    slot="optimizer",
    knobs=(
        Knob(
            name="path",
            default="torch.optim:AdamW",
            doc="import path of the optimizer's class: PACKAGE.MODULE:CLASS",
            pattern=PATH,
        ),
        Knob(
            name="arguments",
            default="",
            doc="keyword arguments of the class, such as lr=0.02, betas=(0.9, 0.95); lr and weight_decay are "
            "the job's unless they are set here",
            pattern=_TEXT,
        ),
        Knob(
            name="matrices",
            default="",
            doc="settings of a parameter group of the matrices of the repeated blocks, such as rank=128 for "
            "GaLore; if left out, there is no such group",
            pattern=_TEXT,
        ),
        Knob(
            name="others",
            default="same",
            doc="what updates the parameters that are not matrices of the repeated blocks; same: this "
            "optimizer; adamw: AdamW",
            choices=("same", "adamw"),
        ),
    ),
    # These update copies or shards of parameters, which have other shapes and no names.
    forbids=("bf16-parameters", "zero", "sharded-ddp", "fsdp2", "tensor-parallel"),
)
IN_BACKWARD = Technique(
    name="optimizer-in-backward",
    summary="step each parameter as soon as its gradient is complete, then free the gradient",
    script_call="update each parameter in a register_post_accumulate_grad_hook",
    changes=StepPart.NONE,
    excluded=lambda facts: facts.clips_gradients,
    effect=EffectClass.E0,
    apply=_apply_in_backward,
    settings=_once,
    order=85,
    forbids=("gradient-accumulation",),
)
