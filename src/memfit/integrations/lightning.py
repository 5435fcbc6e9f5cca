"""A callback for Lightning's Trainer, and the Trainer's arguments for a plan (Lightning 2.6).

::

    callback = MemfitCallback(plan)
    Trainer(callbacks=[callback], **trainer_arguments(plan)).fit(module, loader)
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from memfit.api import Prediction, estimate
from memfit.inputs import plan_of
from memfit.integrations.record import Recorder
from memfit.model.batch_objects import repeat
from memfit.techniques.rank_mesh import layout
from memfit.types.errors import UserError
from memfit.types.plan import Plan, use

# Techniques of the module itself. The Trainer has no arguments for them; the callback checks them.
_OF_THE_MODULE = {
    "activation-checkpointing",
    "selective-checkpointing",
    "chunked-cross-entropy",
    "compile",
    "lora",
    "qlora",
    "adamw-8bit",
    "adamw-4bit",
    "adamw-paged",
    "adamw-fused",
    "adamw-single",
    "adafactor",
    "sgd",
}
_OF_THE_TRAINER = {"ddp", "fsdp2", "bf16-autocast", "fp16-autocast", "gradient-accumulation"}
_MIXED = {"bf16-autocast": "bf16-mixed", "fp16-autocast": "16-mixed"}


def trainer_arguments(plan: Any) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer for ``plan``, which is anything that `memfit.estimate`
    accepts as a plan: ``devices`` (its number of ranks), ``accumulate_grad_batches`` (its number of
    micro-batches), ``precision`` ("bf16-mixed", "16-mixed" or "32-true") and ``strategy`` (a DDPStrategy for
    ddp, a ModelParallelStrategy for fsdp2, otherwise "auto").

    For fsdp2, the module's ``configure_model`` must call ``fully_shard`` with the plan's precision. The
    module must also apply the plan's recomputation, adapters, compilation, loss and optimizer. Raises
    UserError for a plan that cannot be read, for techniques that are none of these, and for fsdp2 with more
    than one replica.
    """
    plan = plan_of(plan)
    supported = _OF_THE_MODULE | _OF_THE_TRAINER
    unsupported = [u.technique for u in plan.uses if u.technique not in supported]
    if unsupported:
        raise UserError(
            f"Lightning's Trainer has no arguments for a plan with {', '.join(unsupported)}",
            allowed=f"plans of these techniques: {', '.join(sorted(supported))}",
            hint="for zero, DeepSpeedStrategy(config='deepspeed.json') reads the file of "
            "`memfit export --engine deepspeed`"
            if "zero" in unsupported
            else "",
        )
    return {
        "devices": plan.ranks,
        "strategy": _strategy(plan),
        "precision": next((precision for name, precision in _MIXED.items() if plan.get(name)), "32-true"),
        "accumulate_grad_batches": plan.micro_batches,
    }


def _strategy(plan: Plan) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if (ddp := plan.get("ddp")) is not None:
        knobs = ddp.settings
        return DDPStrategy(
            bucket_cap_mb=int(knobs["bucket_mib"]), gradient_as_bucket_view=bool(knobs["bucket_view"])
        )
    if "fsdp2" in plan:
        if layout(plan).replicate > 1:
            raise UserError(
                "Lightning's ModelParallelStrategy cannot apply fsdp2 with more than one replica (HSDP)",
                allowed="fsdp2 with the setting replicas: 1",
            )
        return ModelParallelStrategy(data_parallel_size=plan.ranks, tensor_parallel_size=1)
    return "auto"


class _Hooks:
    """Callback that predicts the peak memory of a training step from the loader's first batch when training
    starts, checks after the first update whether the plan was applied, and at the end of training writes the
    predicted and the measured peak to a file and prints them on rank 0. If the step cannot be predicted, the
    file says why.

    ``plan``: anything that `memfit.estimate` accepts as a plan; by default what `plan_of_trainer` returns.
    ``prediction``: an earlier prediction to use; without it, training on several ranks is not predicted,
    because the callback predicts one process only. ``path``: the file; by default memfit.json in the
    Trainer's ``default_root_dir``. For ranks other than 0 its name has the rank before the suffix, as in
    memfit.1.json. ``strict``: if the plan was not applied, training stops with NotConforming, and no file is
    written; otherwise the file says so. ``blocks``: module path of the repeated blocks; by default memfit
    finds them. Raises UserError for a plan that cannot be read, and when training starts if no plan is given
    and `plan_of_trainer` raises it.
    """

    def __init__(
        self,
        plan: Any = None,
        *,
        prediction: Prediction | None = None,
        path: str | Path | None = None,
        strict: bool = True,
        blocks: str | None = None,
    ) -> None:
        self._plan = plan_of(plan) if plan is not None else None
        self._prediction, self._path = prediction, path
        self._strict, self._blocks = strict, blocks
        self._recorder: Recorder | None = None
        self._updating, self._inside = False, False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        plan = self._plan or plan_of_trainer(trainer)
        prediction, why_not = self._prediction, ""
        if prediction is None:
            try:
                prediction = predict_first_batch(trainer, pl_module, plan)
            except UserError as error:
                why_not = str(error)
        self._recorder = Recorder(
            plan=plan,
            prediction=prediction,
            why_not=why_not,
            model=pl_module,
            strict=self._strict,
            blocks=self._blocks,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not self._inside and self._recorder is not None:
            self._recorder.step_begins(pl_module, trainer.optimizers[0], pl_module.device)
            self._inside = True

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._updating = True

    def on_train_batch_end(self, *args: Any) -> None:
        if self._updating and self._recorder is not None:
            self._recorder.step_ends()
            self._recorder.updated()
            self._updating = self._inside = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._recorder is None:
            return
        folder, rank = trainer.default_root_dir, trainer.global_rank
        path = Path(self._path) if self._path is not None else Path(folder) / "memfit.json"
        self._recorder.write(path, rank)
        if rank == 0:
            print(self._recorder.line)


@functools.cache
def _callback() -> type:
    """Return the class MemfitCallback, always the same one. The first call imports Lightning."""
    from lightning.pytorch.callbacks import Callback

    class MemfitCallback(_Hooks, Callback):  # type: ignore[misc]
        __doc__ = _Hooks.__doc__

    return MemfitCallback


def __getattr__(name: str) -> Any:
    if name == "MemfitCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def plan_of_trainer(trainer: Any) -> Plan:
    """Return the plan that a Lightning Trainer's arguments express: mixed precision (bf16 or fp16), gradient
    accumulation, the number of ranks and, on several ranks, DDP with memfit's default settings. Other
    arguments are ignored. Raises UserError for several ranks with another strategy than DDPStrategy."""
    uses = [use(name) for name, precision in _MIXED.items() if str(trainer.precision) == precision]
    if trainer.accumulate_grad_batches > 1:
        uses.append(use("gradient-accumulation", micro_batches=trainer.accumulate_grad_batches))
    if trainer.world_size > 1:
        kind = type(trainer.strategy).__name__
        if kind != "DDPStrategy":
            raise UserError(
                f"on several ranks, no plan can be derived from a Trainer with the strategy {kind}",
                allowed="DDPStrategy",
                hint="for another strategy, pass the plan: MemfitCallback(plan)",
            )
        uses.append(use("ddp"))
    return plan_of(Plan(uses=tuple(uses), ranks=trainer.world_size))


def predict_first_batch(trainer: Any, module: Any, plan: Plan) -> Prediction:
    """Return the prediction for ``plan`` of the module's ``training_step`` on the first batch of the
    Trainer's loader, on this machine, with the Trainer's first optimizer. The batch of the whole step is this
    first batch, repeated once for each accumulated micro-batch. Raises UserError if the plan has several
    ranks, if the loader has no batch, or if the step cannot be predicted."""
    if plan.ranks > 1:
        raise UserError(
            "MemfitCallback itself does not predict training on several ranks",
            hint="pass a prediction of memfit.estimate: MemfitCallback(plan, prediction=prediction)",
        )
    with torch.random.fork_rng(devices=[]):
        first_batch = next(iter(trainer.train_dataloader), None)
    if first_batch is None:
        raise UserError(
            "the Trainer's loader has no batch, so its training step cannot be predicted",
            hint="train on at least one sample; with drop_last=True, on at least one whole batch",
        )
    batch = repeat(first_batch, trainer.accumulate_grad_batches)
    batch = tuple(batch) if isinstance(batch, list) else batch

    def loss(model: Any, batch: Any) -> torch.Tensor:
        output = model.training_step(batch, 0)
        return output["loss"] if isinstance(output, dict) else output  # type: ignore[no-any-return]

    original_trainer, module._trainer = module._trainer, None  # only the module must be copied
    try:
        return estimate(module, batch, loss=loss, optimizer=trainer.optimizers[0], plan=plan)
    finally:
        module._trainer = original_trainer
