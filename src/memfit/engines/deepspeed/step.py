"""The training step of DeepSpeed: model and optimizer are passed to `deepspeed.initialize`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch

from memfit.engines.deepspeed import CONFIG, ENGINE
from memfit.jobs.training_step import TrainingStep
from memfit.model.scalar_parameters import refuse_scalars
from memfit.techniques.base import OptimizerLike
from memfit.techniques.precision import Bf16Inputs
from memfit.techniques.rank_mesh import join_alone
from memfit.types.errors import UserError


class Step(TrainingStep):
    """The training step on the engine deepspeed. ``folder`` is the folder of the run's configuration files,
    which must be set before a step is created."""

    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path | None = None

    def _prepare(self) -> OptimizerLike:
        bench, model = self.bench, self.model
        refuse_scalars(model, "deepspeed")
        zero = self.plan.get("zero")
        if self.job.ema is not None and zero is not None and zero.settings["stage"] == 3:
            raise UserError(
                "the job's ema (moving average of the weights) is not supported with DeepSpeed's ZeRO stage "
                "3, which keeps no whole parameters between steps",
                allowed="ZeRO stages 0 to 2; --engine native, on which each rank averages its own shards; or "
                "a job without ema",
            )
        import_deepspeed(torch.device(bench.torch_device).type)
        assert self.folder is not None
        config = json.loads((self.folder / CONFIG).read_text())
        if config["bf16"]["enabled"]:
            bench.forward_contexts.append(lambda: Bf16Inputs(model))
        linear = torch.nn.functional.linear  # ZeRO stage 3 replaces it for the whole process
        join_alone(bench.torch_device)  # it stays, because DeepSpeed keeps a reference to it
        engine = self._initialize(model, bench.make_optimizer(bench.trainable()), config)
        self.wrapped, self.model, bench.call = engine, engine.module, engine
        bench.before_micro_batch.append(engine.set_gradient_accumulation_boundary)
        bench.closers += [engine.destroy, lambda: setattr(torch.nn.functional, "linear", linear)]
        return cast(OptimizerLike, engine.optimizer)

    def _initialize(self, model: torch.nn.Module, optimizer: OptimizerLike, config: dict[str, Any]) -> Any:
        import deepspeed

        return deepspeed.initialize(model=model, optimizer=cast(Any, optimizer), config=config)[0]

    def _backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)  # losses are already scaled by their share

    def update(self) -> torch.Tensor:
        if not self.wrapped.zero_optimization():
            norm = self._grad_norm()
            self.wrapped.step()
            return norm
        self.wrapped.step()
        return torch.as_tensor(self.wrapped.get_global_grad_norm())


def import_deepspeed(kind: str) -> Any:
    """Import DeepSpeed for devices of this kind and return it. Raises UserError if it does not know the kind.
    Keep it from compiling its kernel for all-reduces between processes of one host.

    Only inference uses that kernel. A process that is killed while it builds or loads the kernel leaves a
    lock file behind, and every later start on the machine would wait for that lock forever.
    """
    try:
        import deepspeed
    except ValueError as error:  # of DS_ACCELERATOR
        known_kinds = ", ".join(re.findall(r"'(\w+)'", str(error))) or str(error)
        raise UserError(
            f"engine deepspeed cannot train on devices of the kind {kind!r}: DeepSpeed does not know it",
            allowed=f"the kinds that DeepSpeed knows: {known_kinds}",
            hint="`--engine native` can, and `--on this:cpu` trains on the processor",
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
