"""The training step of megatron-core: its GPTModel, tensor parallelism and gradient buffers.

As in Megatron-LM's trainer, the model is always inside its DistributedDataParallel: gradients are summed into
one buffer that lives as long as the model. On CPU two functions are patched: `torch.cuda.current_device`,
which tells Megatron where to allocate new buffers, and the state of the CUDA generator, which is not used.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from memfit.engines.base import sync_last
from memfit.engines.megatron import CONFIG, ENGINE, arguments, parse
from memfit.engines.megatron.gpt import MegatronGpt, check_cut, copy_weights, read, transformer_config
from memfit.jobs.training_step import TrainingStep
from memfit.techniques import fp32_modules
from memfit.techniques.base import OptimizerLike
from memfit.techniques.rank_mesh import join_alone
from memfit.types.conformance import Conformance, Difference, NotConforming
from memfit.types.device_kind import HOST
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec


class Step(TrainingStep):
    """The training step on the engine megatron. ``folder`` is the folder of the run's configuration files,
    set before a step is created; None if the step is only traced for a prediction."""

    carried = ENGINE.carries - {"gradient-accumulation"}
    folder: Path | None = None

    def _prepare(self) -> OptimizerLike:
        bench = self.bench
        if bench.islands and fp32_modules.dtype_between_modules(self.plan) is not None:
            raise UserError(
                "engine megatron does not support the job's islands (modules kept in float32) with a plan of "
                "lower precision, because it builds its own model without them",
                hint="train in float32, or on another engine",
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # Warnings that kernels for GPUs are missing, and that Megatron uses deprecated names of torch.
            warnings.filterwarnings("ignore", module=r"megatron\.")
            warnings.filterwarnings("ignore", message="`torch.distributed")
            self._build(stack)
            bench.closers.append(stack.pop_all().close)
        for param in bench.trainable():
            bench.on_kept(cast(Any, param).main_grad, "gradient")
        bench.before_micro_batch.append(sync_last(self.wrapped.no_sync))
        return bench.make_optimizer(bench.trainable())

    def _build(self, stack: contextlib.ExitStack) -> None:
        bench, options, shape, source = self.bench, self._options(), read(self.model), cast(Any, self.model)
        degree = int(options["tensor-model-parallel-size"])
        check_cut(shape, degree)
        is_trace = isinstance(next(source.parameters()), FakeTensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's imports warn about other packages
            if bench.torch_device == HOST:
                stack.enter_context(_on_cpu())
            stack.enter_context(_parallel_state(degree, bench.torch_device, traced=is_trace))
            from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

            config = transformer_config(shape, **_transformer(options))
            self._check_sequence(bool(config.sequence_parallel))
            with bench.memory_pool(""):  # its buffers must also be allocated on the training device
                self.model = bench.model = megatron_model = MegatronGpt(shape, config)
                if bench.torch_device != HOST:
                    megatron_model.to(bench.torch_device)
                    model_parallel_cuda_manual_seed(torch.initial_seed())
                copy_weights(source, megatron_model, rank=bench.world.rank % degree)
                self.wrapped = bench.call = _wrapped(megatron_model, config, options)

    def _options(self) -> Mapping[str, str]:
        """Return the options of Megatron-LM's trainer, name without dashes -> value: in a run those in the
        run's megatron.args, in a trace, which has no such file, those that follow from the plan."""
        if self.folder is not None:
            return parse((self.folder / CONFIG).read_text())
        job = JobRef(spec=self.job.name)
        return arguments(RunSpec(name="", role="", job=job, plan=self.plan, seed=0, steps=0))

    def _check_sequence(self, is_split: bool) -> None:
        """Raise NotConforming if ``is_split``, whether Megatron's configuration splits activations along the
        sequence (sequence parallelism), differs from what the plan says. The check is here because no
        parameter's size shows it."""
        use = self.plan.get("tensor-parallel")
        planned_split = use is not None and bool(use.settings["sequence"])
        if planned_split != is_split:
            texts = {True: "split along the sequence as well", False: "whole between the sharded layers"}
            difference = Difference(
                feature="tensor-parallel: activations", planned=texts[planned_split], found=texts[is_split]
            )
            raise NotConforming(Conformance(differences=(difference,), checked=(), unseen=()))

    def update(self) -> torch.Tensor:
        self._finish_reduction()
        norm = super().update()
        self.wrapped.zero_grad_buffer()
        return norm

    def _skip_update(self) -> torch.Tensor:
        self._finish_reduction()
        norm = super()._skip_update()
        self.wrapped.zero_grad_buffer()
        return norm

    def _finish_reduction(self) -> None:
        """Let Megatron finish the reduction of gradients over ranks. Then make ``grad`` of each parameter a
        view of Megatron's gradient buffer, because torch's optimizers look for the gradients there."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.wrapped])
        for param in self.bench.trainable():
            param.grad = cast(Any, param).main_grad

    def _grad_norm(self) -> torch.Tensor:
        """Return the norm of all gradients. The squares of gradients of sharded parameters are summed over
        the tensor-parallel ranks. Gradients of other parameters, which all of these ranks hold, count
        once."""
        sharded_square, replicated_square = torch.zeros(()), torch.zeros(())
        for param in self.bench.trainable():
            square = torch.linalg.vector_norm(cast(torch.Tensor, param.grad)).float().square()
            if getattr(param, "tensor_model_parallel", False):
                sharded_square = sharded_square + square
            else:
                replicated_square = replicated_square + square
        tensor_mesh = self.bench.world.sub("tensor")
        if tensor_mesh is not None:
            torch.distributed.all_reduce(sharded_square, group=tensor_mesh.get_group())
        return (sharded_square + replicated_square).sqrt()


def _transformer(options: Mapping[str, str]) -> dict[str, Any]:
    """Return those fields of Megatron's TransformerConfig, name -> value, that its trainer derives from
    ``options`` for tensor and sequence parallelism and for recomputation."""
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": int(options["tensor-model-parallel-size"]),
        "sequence_parallel": "sequence-parallel" in options,
    }
    if "recompute-granularity" in options:
        fields |= {
            "recompute_granularity": options["recompute-granularity"],
            "recompute_method": options["recompute-method"],
            "recompute_num_layers": int(options["recompute-num-layers"]),
        }
    return fields


def _wrapped(model: MegatronGpt, config: Any, options: Mapping[str, str]) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    bucket = int(options["ddp-bucket-size"]) if "ddp-bucket-size" in options else None
    overlaps = "overlap-grad-reduce" in options
    settings = DistributedDataParallelConfig(overlap_grad_reduce=overlaps, bucket_size=bucket)
    return DistributedDataParallel(config, settings, model)


@contextlib.contextmanager
def _parallel_state(degree: int, device: str, *, traced: bool) -> Iterator[None]:
    """Initialize Megatron's process groups inside this context. They are made in addition to torch's process
    group; if there is none, create one of this process alone first, and destroy it at the end. ``degree`` is
    the number of tensor-parallel ranks, ``device`` where tensors are. ``traced`` says that the step is traced
    with fake tensors: a group created here is then fake, and Megatron's coalesced collectives run
    uncoalesced."""
    dist: Any = torch.distributed
    from megatron.core import parallel_state

    with _disable_current_modes():
        owns_group, excepthook = not dist.is_initialized(), sys.excepthook
        if owns_group and traced:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        else:
            owns_group = join_alone(device)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degree, create_gloo_process_groups=False
        )
    try:
        with _uncoalesced() if traced else contextlib.nullcontext():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        if owns_group:
            dist.destroy_process_group()
            sys.excepthook = excepthook


def _uncoalesced() -> Any:
    """Return a context inside which Megatron runs the collectives of one call separately and not coalesced,
    because fake tensors do not support that. Here each call has only one, for a single bucket, so that the
    result is the same."""
    from megatron.core.distributed import param_and_grad_buffer

    @contextlib.contextmanager
    def at_once(group: Any, async_ops: bool = False) -> Iterator[Any]:
        yield SimpleNamespace(wait=lambda: None)

    return mock.patch.object(param_and_grad_buffer, "_coalescing_manager", at_once)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    from megatron.core.tensor_parallel import random

    state = torch.zeros(0, dtype=torch.uint8)
    tracker = random.get_cuda_rng_tracker()
    tracker.states_ = {"model-parallel-rng": state}
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device(HOST)),
        mock.patch.object(random, "_get_cuda_rng_state", lambda *args, **kwargs: state),
        mock.patch.object(random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
    ):
        yield
