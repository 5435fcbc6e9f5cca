"""The training step of Hugging Face Accelerate: model and optimizer are prepared by its Accelerator.

On CPU, Accelerate 1.15 does not support FSDP: `prepare` silently wraps the model in DDP or not at all.
Setting the distributed type and the plugin on the Accelerator's state after its creation does shard, so this
module does that. It does the same for DeepSpeed, which `cpu=True` silently leaves out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import yaml

from memfit.engines import deepspeed
from memfit.engines.accelerate import CONFIG, ENGINE, config
from memfit.engines.base import sync_last
from memfit.engines.deepspeed import step
from memfit.jobs.training_step import TrainingStep
from memfit.model.blocks import find_stacks
from memfit.model.scalar_parameters import refuse_scalars
from memfit.techniques.base import OptimizerLike
from memfit.techniques.parallel.data_parallel import WrappedModel, optimize_on_host
from memfit.techniques.registry import ordered_uses
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan

_DEFAULT_MESH = "torch.distributed.fsdp._fully_shard._fully_shard._init_default_mesh"


class Step(TrainingStep):
    """The training step on the engine accelerate. ``folder`` is the folder of the run's configuration files,
    set before a step is created; None if the step is only traced for a prediction."""

    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path | None = None

    def __new__(cls, job: Job, plan: Plan, **options: Any) -> Step:
        """Create the step. If the plan has zero and ``folder`` is set, as in a run, its class is
        `_ThroughDeepspeed`. Without ``folder``, in a trace, it is this class, and memfit's own ZeRO stands
        for DeepSpeed's."""
        uses_deepspeed = "zero" in plan and cls.folder is not None
        return super().__new__(_ThroughDeepspeed if uses_deepspeed else cls)

    def _prepare(self) -> OptimizerLike:
        plan, bench = self.plan, self.bench
        content = config(plan) if self.folder is None else yaml.safe_load((self.folder / CONFIG).read_text())
        has_fsdp = bool(content.get("fsdp_config"))
        if self.folder is None and not has_fsdp:
            return self._as_native()
        self.accelerator = accelerator = _accelerator(content, plan, torch.device(bench.torch_device).type)
        if has_fsdp:
            refuse_scalars(self.model, "fsdp2")
            cast(Any, self.model)._no_split_modules = list(_block_classes(bench))
        optimizer = self._prepared_fake() if has_fsdp and self.folder is None else self._prepared()
        self.model = bench.model = accelerator.unwrap_model(self.wrapped)
        bench.call = WrappedModel(self.wrapped, self.model)
        sync = next((str(u.settings["sync"]) for u in plan.uses if "sync" in u.settings), "every")
        if sync == "last":
            bench.before_micro_batch.append(sync_last(lambda: accelerator.no_sync(self.wrapped)))
        bench.closers.append(accelerator.free_memory)
        return optimizer

    def _prepared(self) -> OptimizerLike:
        bench = self.bench
        inner_optimizer = bench.make_optimizer(bench.trainable())
        self.wrapped, optimizer = self.accelerator.prepare(self.model, inner_optimizer)
        return cast(OptimizerLike, optimizer)

    def _as_native(self) -> OptimizerLike:
        """Prepare the step for a trace of a plan without FSDP, by memfit's own techniques, and return the
        optimizer. For DDP, autocast and gradient accumulation, Accelerate does the same as memfit; memfit's
        ZeRO stands for DeepSpeed's."""
        for technique, use in ordered_uses(self.plan):
            if technique.name in self.carried:
                technique.apply(self.bench, use.settings)
        return super()._prepare()

    def _prepared_fake(self) -> OptimizerLike:
        """Prepare the step for a trace of a plan with FSDP, and return the optimizer. Accelerate finds an
        optimizer's parameters by their addresses, which fake tensors do not have. So the optimizer is created
        after the model is prepared, without Accelerate."""
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        # Torch would create the same mesh, but it cannot do so with fake tensors.
        mesh, use = self.bench.world.sub("shard"), self.plan.get("fsdp2")
        is_offloaded = use is not None and bool(use.settings["offload"])
        # The model is built on the host, and shards move.
        pool = self.bench.memory_pool("host" if is_offloaded else "")
        with mock.patch(_DEFAULT_MESH, return_value=mesh), pool:
            self.wrapped = fsdp2_prepare_model(self.accelerator, self.model)
        if is_offloaded:
            optimize_on_host(self.bench)
        return self.bench.make_optimizer(self.bench.trainable())

    def _backward(self, loss: torch.Tensor) -> None:
        if self.folder is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)


class _ThroughDeepspeed(step.Step, Step):
    """The step of a run whose plan has zero: DeepSpeed's step, with a DeepSpeed engine that Accelerate
    creates. Accelerate's own `backward` also updates parameters. Here the DeepSpeed engine's `backward` and
    `step` are called instead, so that the phases of the step can be measured separately."""

    carried = Step.carried

    def _prepare(self) -> OptimizerLike:
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "engine accelerate needs the package deepspeed for a plan with zero, and it is not installed",
                hint=f"install it: {deepspeed.ENGINE.install}",
            )
        from accelerate.utils import patch_environment

        self.folder = Step.folder
        # DeepSpeed looks for a device when it is imported, and needs LOCAL_RANK even with one rank.
        kind = torch.device(self.bench.torch_device).type
        with patch_environment(DS_ACCELERATOR=kind, LOCAL_RANK=str(self.bench.world.rank)):
            return super()._prepare()

    def _initialize(self, model: torch.nn.Module, optimizer: OptimizerLike, config: dict[str, Any]) -> Any:
        assert self.folder is not None
        content = yaml.safe_load((self.folder / CONFIG).read_text())
        kind = torch.device(self.bench.torch_device).type
        self.accelerator = _accelerator(content, self.plan, kind, folder=self.folder)
        self.bench.closers.append(self.accelerator.free_memory)
        return self.accelerator.prepare(model, optimizer)[0]


def _block_classes(bench: Any) -> Iterator[str]:
    try:
        stacks = find_stacks(bench.model, bench.job.blocks)
    except UserError:
        stacks = {}
    yield from sorted({type(b).__name__ for blocks in stacks.values() for b in blocks})


def _accelerator(content: Mapping[str, Any], plan: Plan, kind: str, *, folder: Path | None = None) -> Any:
    """Return a new Accelerator for devices of this kind, after a reset of Accelerate's state. ``content`` is
    the content of the configuration file: it is passed on through the environment variables that
    `accelerate launch` would set from it. The settings of DDP's buckets, which the file does not hold, are
    taken from ``plan`` and passed as arguments. ``folder``: the folder with DeepSpeed's own file, needed only
    if ``content`` names that file. Raises UserError if the Accelerator has chosen another kind of device, as
    for one that Accelerate does not know: it would move the model there."""
    from accelerate import Accelerator
    from accelerate.utils import patch_environment

    _reset()
    on_host = kind == HOST
    with patch_environment(**_variables(content, folder)):
        accelerator = Accelerator(cpu=on_host, kwargs_handlers=list(_handlers(plan)))
        if accelerator.device.type != kind:
            raise UserError(
                f"engine accelerate cannot train on devices of the kind {kind!r}: Accelerate does not know "
                f"it, and would train on {accelerator.device.type}",
                hint="`--engine native` can, and `--on this:cpu` trains on the processor",
            )
        if content.get("fsdp_config") and on_host:
            _shard_on_cpu(accelerator)
        if content.get("deepspeed_config") and folder is not None and on_host:
            _deepspeed_on_cpu(accelerator, folder / content["deepspeed_config"]["deepspeed_config_file"])
    return accelerator


def _handlers(plan: Plan) -> Iterator[Any]:
    from accelerate.utils import DistributedDataParallelKwargs

    if (use := plan.get("ddp")) is not None:
        yield DistributedDataParallelKwargs(
            bucket_cap_mb=int(use.settings["bucket_mib"]),
            gradient_as_bucket_view=bool(use.settings["bucket_view"]),
        )


def _variables(content: Mapping[str, Any], folder: Path | None = None) -> dict[str, str]:
    """Return, name -> value, the environment variables for mixed precision, FSDP and DeepSpeed that
    accelerate/utils/launch.py sets from ``content``, the content of the configuration file. ``folder``: the
    folder with DeepSpeed's own file, if ``content`` names one; None: the variable for its path is left
    out."""
    variables = {"ACCELERATE_MIXED_PRECISION": str(content.get("mixed_precision", "no"))}
    if fsdp_settings := content.get("fsdp_config"):
        variables["ACCELERATE_USE_FSDP"] = "true"
        settings = {k.upper(): v for k, v in fsdp_settings.items()}
        variables |= {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in settings.items()}
    if deepspeed_settings := content.get("deepspeed_config"):  # read when an Accelerator is created
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        if folder is not None:
            path = folder / deepspeed_settings["deepspeed_config_file"]
            variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return variables


def _reset() -> None:
    """Reset Accelerate's state. There is one such state per process, and an earlier step in this process,
    such as that of a warm-up, may have set it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _shard_on_cpu(accelerator: Any) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin, state = FullyShardedDataParallelPlugin(fsdp_version=2), accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def _deepspeed_on_cpu(accelerator: Any, config: Path) -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    state = accelerator.state
    # PartialState overwrites AcceleratorState whenever that is accessed.
    for shared_state in (PartialState(), state):
        shared_state.distributed_type = DistributedType.DEEPSPEED
    state.deepspeed_plugins = {"default": DeepSpeedPlugin(hf_ds_config=str(config))}
    state.select_deepspeed_plugin("default")
