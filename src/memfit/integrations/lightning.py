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
    """Return the Trainer's arguments ``strategy``, ``precision``, ``accumulate_grad_batches`` and ``devices``
    for ``plan``, which is anything that `memfit.estimate` accepts as a plan. ``devices`` is the plan's number
    of ranks, ``precision`` "bf16-mixed", "16-mixed" or "32-true".

    The strategy is a DDPStrategy with ddp, a ModelParallelStrategy with fsdp2, else "auto". With fsdp2, the
    module's ``configure_model`` must call ``fully_shard`` with the plan's precision. Recomputation, adapters,
    compilation, the loss and optimizers are also left to the module. Raises UserError for a plan that cannot
    be read, for techniques that neither the Trainer nor the module can apply, and for fsdp2 with replicas.
    """
    plan = plan_of(plan)
    unsupported = [u.technique for u in plan.uses if u.technique not in _OF_THE_MODULE | _OF_THE_TRAINER]
    if unsupported:
        raise UserError(
            f"neither Lightning's Trainer nor its module can apply {', '.join(unsupported)}",
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
                "Lightning's ModelParallelStrategy cannot apply fsdp2 with several replicas (HSDP)",
                allowed="fsdp2 with the setting replicas: 1",
            )
        return ModelParallelStrategy(data_parallel_size=plan.ranks, tensor_parallel_size=1)
    return "auto"


class _Hooks:
    """Callback that predicts the peak memory of a training step from the loader's first batch when training
    starts, checks after the first update whether the plan was applied, and at the end of training writes
    predicted and measured peak to a file and prints them on rank 0. If the step cannot be predicted, the file
    says why.

    ``plan``: anything that `memfit.estimate` accepts as a plan; by default it is derived from the Trainer's
    arguments. ``prediction``: an earlier prediction to use; without it, training on several ranks is not
    predicted, because the callback predicts one process only. ``path``: the file; by default memfit.json in
    the Trainer's ``default_root_dir``. For ranks other than 0 its name has the rank before the suffix, as in
    memfit.1.json. ``strict``: if the plan was not applied, training stops with NotConforming; otherwise only
    the file says so. ``blocks``: module path of the repeated blocks; by default they are searched. Raises
    UserError for a plan that cannot be read, and at the start of training if none can be derived.
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
        self._recorder.write(path.with_suffix(f".{rank}.json") if rank else path)
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
    accumulation, DDP with memfit's default settings on several ranks, and the number of ranks. Other
    arguments are ignored. Raises UserError for several ranks with another strategy than DDP."""
    uses = [use(name) for name, precision in _MIXED.items() if str(trainer.precision) == precision]
    if trainer.accumulate_grad_batches > 1:
        uses.append(use("gradient-accumulation", micro_batches=trainer.accumulate_grad_batches))
    if trainer.world_size > 1:
        kind = type(trainer.strategy).__name__
        if kind != "DDPStrategy":
            raise UserError(
                f"a plan cannot be derived from the Trainer's strategy {kind} on several ranks",
                hint="pass the plan: MemfitCallback(plan)",
            )
        uses.append(use("ddp"))
    return plan_of(Plan(uses=tuple(uses), ranks=trainer.world_size))


def predict_first_batch(trainer: Any, module: Any, plan: Plan) -> Prediction:
    """Return the prediction for ``plan`` of the module's ``training_step`` on the first batch of the
    Trainer's loader, on this machine, with the Trainer's first optimizer. The batch of the whole step is this
    first batch, repeated once for each accumulated micro-batch. Raises UserError if the plan has several
    ranks, or if the step cannot be predicted."""
    if plan.ranks > 1:
        raise UserError(
            "MemfitCallback cannot predict training on several ranks itself",
            hint="pass a prediction: MemfitCallback(prediction=...)",
        )
    with torch.random.fork_rng(devices=[]):
        first_batch = next(iter(trainer.train_dataloader))
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
