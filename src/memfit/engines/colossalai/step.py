"""The training step with Colossal-AI's Booster. It runs in the engine's separate environment, which has an
older torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch

from memfit.engines.base import sync_last
from memfit.engines.colossalai import CONFIG, ENGINE
from memfit.jobs.training_step import TrainingStep
from memfit.techniques.base import OptimizerLike
from memfit.types.device_kind import DeviceKind
from memfit.types.errors import UserError


class Step(TrainingStep):
    """The training step on the engine colossalai. ``folder`` is the folder of the run's configuration files,
    which must be set before a step is created."""

    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path

    def _prepare(self) -> OptimizerLike:
        bench, model = self.bench, cast(Any, self.model)
        content = json.loads((self.folder / CONFIG).read_text())
        base_optimizer = bench.make_optimizer(bench.trainable())
        self.booster: Any = None
        if not content["plugin"]:
            self.wrapped: Any = model
            return base_optimizer
        _check(model, bench.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that kernels for GPUs are missing
            from colossalai.booster import Booster, plugin

            self.booster = Booster(plugin=getattr(plugin, content["plugin"])(**content["arguments"]))
            self.wrapped, optimizer, *_ = self.booster.boost(model, base_optimizer)
        self.model = bench.model = self.wrapped.unwrap()
        bench.call = self.wrapped
        if any(u.settings.get("sync") == "last" for u in self.plan.uses):
            no_sync = self.booster.no_sync
            bench.before_micro_batch.append(sync_last(lambda: no_sync(self.wrapped, self.optimizer)))
        return cast(OptimizerLike, _Stepping(optimizer))

    def _backward(self, loss: torch.Tensor) -> None:
        if self.booster is None:
            loss.backward()
        else:
            self.booster.backward(loss, cast(Any, self.optimizer).inner)


class _Stepping:
    """Gives Colossal-AI's wrapper of an optimizer, ``inner``, the interface of torch's optimizers. The
    wrapper itself hides the optimizer's state, and passes arguments on by position only."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self) -> Any:
        return self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    @property
    def state(self) -> Any:
        return self.inner.optim.state


def _check(model: torch.nn.Module, device: DeviceKind) -> None:
    batch_norm_names = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ]
    if batch_norm_names and device.is_host:
        raise UserError(
            f"engine colossalai turns the module {batch_norm_names[0]} into a SyncBatchNorm, which requires "
            "CUDA, but the ranks train on CPUs",
            allowed="on CPUs a model without batch normalization, or a plan without ddp",
        )
