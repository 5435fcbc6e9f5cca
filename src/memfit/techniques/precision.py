"""Precision: autocast in bf16, or in fp16 with loss scaling; bf16 parameters with fp32 master copies or
stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from memfit.techniques import fp32_modules
from memfit.techniques.base import (
    JobFacts,
    Knob,
    MakeOptimizer,
    OptimizerLike,
    StepPart,
    Technique,
    Workbench,
)
from memfit.techniques.loss_scale import LossScale
from memfit.types.plan import EffectClass, KnobValue, Plan

if TYPE_CHECKING:
    import torch


def _apply_fp16(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    _autocast(bench, "float16")
    bench.loss_scale = LossScale()


def _autocast(bench: Workbench, dtype: str) -> None:
    import torch

    # Where the tensors will be, as the model may still be in host memory. A CUDA prediction is traced on CPU
    # tensors, whose cast list differs only in a few reductions.
    device = torch.device(bench.torch_device).type
    bench.forward_contexts.append(lambda: torch.autocast(device, dtype=getattr(torch, dtype)))


def _apply_parameters(bench: Workbench, settings: Mapping[str, KnobValue]) -> None:
    import torch

    fp32_modules.cast_others(bench.model, bench.islands, torch.bfloat16)
    bench.forward_contexts.append(lambda: Bf16Inputs(bench.model))
    if settings["rounding"] == "master":
        inner = bench.make_optimizer

        def with_masters(params: list[torch.nn.Parameter]) -> MasterWeights:
            with bench.memory_pool(bench.parameters_on):  # a model that is built on the host has moved by now
                return MasterWeights(params, inner)

        bench.make_optimizer = with_masters
    else:
        from memfit.techniques.optimizers import stochastic_adamw

        bench.make_optimizer = stochastic_adamw(bench.job.optimizer)


class Bf16Inputs:
    """Context manager. Inside it, float32 tensors among the arguments with which the model is called are cast
    to bfloat16. Tensors of other dtypes are unchanged."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.handle = self.model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def _cast_inputs(model: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    import torch
    from torch.utils import _pytree

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if floating else value

    return _pytree.tree_map(cast, args), _pytree.tree_map(cast, kwargs)


class MasterWeights:
    """An optimizer of bf16 parameters that updates fp32 master copies of them (Micikevicius et al. 2018,
    section 3.1).

    ``make`` is called with a list of one master copy, for each of them, and returns its optimizer. `step`
    handles one parameter after the other: the gradient is converted to fp32, the master copy is updated and
    copied into the parameter, and the fp32 gradient is freed. The temporary memory is therefore that of one
    parameter and not of the model. Parameters without a gradient are skipped.
    """

    def __init__(self, params: list[torch.nn.Parameter], make: MakeOptimizer) -> None:
        import torch

        self.params = params
        self.masters = [torch.nn.Parameter(p.detach().float(), requires_grad=True) for p in params]
        self.inner: list[OptimizerLike] = [make([m]) for m in self.masters]

    def step(self) -> None:
        import torch

        for param, master, inner in zip(self.params, self.masters, self.inner, strict=True):
            if param.grad is None:
                continue
            master.grad = param.grad.float()
            inner.step()
            master.grad = None
            with torch.no_grad():
                param.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self.params:
            param.grad = None

    @property
    def state(self) -> dict[Any, Any]:
        merged: dict[Any, Any] = {m: {"master": m} for m in self.masters}
        for master, inner in zip(self.masters, self.inner, strict=True):
            merged[master] = {**merged[master], **inner.state.get(master, {})}
        return merged


_Settings = Iterable[Mapping[str, KnobValue]]


def _if_half_precision(half: str, *settings: Mapping[str, KnobValue]) -> Callable[[JobFacts], _Settings]:
    """Return a function for ``Technique.settings``. It returns ``settings`` if the 16-bit dtype in which the
    device multiplies (``JobFacts.half_precision``) is ``half``, "bfloat16" or "float16"; else ()."""
    return lambda facts: settings if facts.half_precision == half else ()


_ROUNDINGS = _if_half_precision("bfloat16", {"rounding": "master"}, {"rounding": "stochastic"})

# These keep gradients, or step the optimizer, at points where the step's loss scale is not applied.
WITHOUT_LOSS_SCALE = (
    "optimizer-in-backward",
    "pipeline",
    "zero",
    "sharded-ddp",
    "expert-parallel",
    "axial-parallel",
)


def clash_with_loss_scale(plan: Plan) -> tuple[str, ...]:
    """Return the names of the plan's techniques that cannot be combined with a loss scale of the user's loop:
    those that fp16-autocast forbids, and fp16-autocast, which has a loss scale of its own."""
    return tuple(u.technique for u in plan.uses if u.technique in (*WITHOUT_LOSS_SCALE, "fp16-autocast"))


AUTOCAST = Technique(
    name="bf16-autocast",
    summary="matrix products and activations in bfloat16, parameters and optimizer in float32",
    script_call="torch.autocast(device_type, torch.bfloat16) around forward and loss",
    changes=StepPart.PASSES,
    effect=EffectClass.E2,
    apply=lambda bench, settings: _autocast(bench, "bfloat16"),
    settings=_if_half_precision("bfloat16", {}),
    order=70,
    slot="precision",
)

FP16 = Technique(
    name="fp16-autocast",
    summary="matrix products and activations in float16 with a loss scale, for devices without bfloat16",
    script_call="torch.autocast(device_type, torch.float16) with a torch.amp.GradScaler",
    changes=StepPart.PASSES,
    effect=EffectClass.E2,
    apply=_apply_fp16,
    settings=_if_half_precision("float16", {}),
    order=70,
    slot="precision",
    forbids=WITHOUT_LOSS_SCALE,
)

PARAMETERS = Technique(
    name="bf16-parameters",
    summary="parameters, gradients and activations in bfloat16",
    script_call="model.to(torch.bfloat16), with an optimizer for rounding: {rounding}",
    changes=StepPart.BOTH,
    excluded=lambda facts: facts.needs_parameter_names,
    effect=EffectClass.E2,
    apply=_apply_parameters,
    settings=_ROUNDINGS,
    order=75,
    slot="precision",
    knobs=(
        Knob(
            name="rounding",
            default="master",
            doc="how updates too small for bfloat16 are preserved; master: by fp32 copies of parameters; "
            "stochastic: by stochastic rounding in torchao's AdamW, which replaces the job's optimizer",
            choices=("master", "stochastic"),
            needs={"stochastic": "torchao"},
        ),
    ),
    forbids=("qlora",),
)
