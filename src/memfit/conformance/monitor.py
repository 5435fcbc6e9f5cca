"""Compare what a prepared model, to which a plan should have been applied, does with what the plan says.

Engines ignore some settings silently, so no engine is asked for its settings. Instead the monitor measures
the elements of parameters, gradients and optimizer state that this rank holds, their dtypes, which modules
run again in backward, whether autocast is active where layers run, and whether replicas are still equal after
a step. The other modules of this package check more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from memfit.conformance import (
    block_checks,
    clipping_check,
    distributed_checks,
    gradient_mean_check,
    sample_checks,
    schedule_check,
    technique_checks,
    tensor_parallel_check,
)
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import (
    buffered_gradients,
    in_backward,
    layers,
    local_elements,
    meshes_of,
    placed,
    state_elements,
    whole,
    world_size,
)
from memfit.types.conformance import Conformance, NotConforming

_PADDING = 64  # elements per rank, of flat buffers
_LOOKS = 16  # in one backward pass
_IGNORED_RATIO = 0.05  # fraction of elements that FSDP2 may leave whole


class Monitor(Observation):
    """Listens to one training step of a prepared model between `__enter__` and `__exit__`. `conclude`
    compares model and step with the plan. If no step was listened to, it compares only what can be seen
    without one."""

    _handles: list[Any]

    # -- listening ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._handles = []
        for listener in (self.graph, self.order, self.reach, self.averages, self.clipping):
            listener.__enter__()
        compile_use = self.plan.get("compile")  # a hook inside would split the graph
        if compile_use is None or compile_use.settings["scope"] != "model":
            self._handles.append(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True))
        self._handles += self.heard.listen(
            self.blocks if compile_use is None else (),
            islands=self.islands,
            on_first=self._on_first,
            busy=lambda: self.reach.running,
        )
        if self.layout.tensor > 1 and self.blocks and compile_use is None:
            self._handles.append(self.blocks[-1].register_forward_hook(self._on_last))
        torch_optimizers = [o for o in layers(self.optimizer) if isinstance(o, torch.optim.Optimizer)]
        for param in (trainable := list(self.trainable())):
            self._handles.append(param.register_post_accumulate_grad_hook(self._on_gradient(len(trainable))))
        if torch_optimizers:
            self._handles.append(torch_optimizers[-1].register_step_pre_hook(self._on_update))
            self._handles.append(torch_optimizers[-1].register_step_post_hook(lambda *_: self._on_step()))
        return self

    def __exit__(self, *_: object) -> None:
        for listener in (self.clipping, self.averages, self.reach, self.order, self.graph):
            listener.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_gradient(self, count: int) -> Callable[[nn.Parameter], None]:
        def listen(param: nn.Parameter) -> None:
            self.arrived += 1
            self.learned.add(id(param))
            if self.arrived % max(1, count // _LOOKS) == 0 or self.arrived % count == 0:
                self.waiting = max(self.waiting, self._held_gradients())

        return listen

    def _held_gradients(self) -> int:
        return sum(local_elements(p.grad) for p in self.trainable() if p.grad is not None)

    def before_update(self) -> None:
        """Record which parameters have gradients and, the first time, how many elements of gradients this
        rank holds. To be called when gradients are complete and the optimizer has not started; a hook on a
        torch optimizer does so."""
        self.learned |= {id(p) for p in self.trainable() if p.grad is not None}
        if self.gradients is None:
            self.gradients = self._held_gradients() + buffered_gradients(self.optimizer)

    def _on_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.before_update()
        self.clipping.before_update(optimizer)

    def _on_step(self) -> None:
        """Record how many backward passes ran since the previous update, those in the closure of the
        optimizer's step included."""
        self.passes.append(self.graph.backwards - sum(self.passes))

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not in_backward() and torch.is_grad_enabled():  # torch's pipelines infer shapes without gradients
            self.forwards += 1
            self.order.on_forward()
            if self.layout.data > 1:
                self.samples.hear(args, kwargs)

    def _on_first(self, args: Any) -> None:
        if len(self.entered) < _LOOKS and self.layout.context > 1:
            self.entered += distributed_checks.entering(args)

    def _on_last(self, module: nn.Module, args: Any, out: Any) -> None:
        if len(self.left) < _LOOKS and not in_backward() and torch.is_grad_enabled():
            self.left += tensor_parallel_check.leaving(out)

    def _on_backward(self) -> None:
        self.order.on_backward()
        if self.still_gathered is None and self.plan.get("fsdp2") is not None:
            self.still_gathered = distributed_checks.still_gathered(self)

    # -- comparing ------------------------------------------------------------------------------------

    def conclude(self) -> Conformance:
        """Run all checks and return the result. If the number of ranks is not the planned one, nothing else
        is checked. All ranks must call it. Raises NotConforming with the differences of all ranks if anything
        differs on any rank."""
        with meshes_of(self.plan, self.model):
            return self._concluded()

    def _concluded(self) -> Conformance:
        self._ranks()
        if not self.differences:
            if self.plan.get("expert-parallel") is None:
                self._parameters()
            block_checks.parameter_dtypes(self)
            for check in (
                *technique_checks.AT_REST,
                tensor_parallel_check.tensor_parallel,
                *distributed_checks.AT_REST,
            ):
                check(self)
            if has_step := bool(self.heard.ran or self.forwards or self.graph.backwards):
                self._stepped()
            elif self.plan.uses:
                self.unseen("gradients, recomputation and replicas: no training step was observed")
            self.not_seen += technique_checks.not_looked_at(self, stepped=has_step)
        result = self._gathered()
        if result.differences:
            raise NotConforming(result)
        return result

    def _stepped(self) -> None:
        self._micro_batches()
        if self.plan.get("expert-parallel") is None:
            self._gradients()
            self._state()
        other_checks = (
            *block_checks.AFTER_A_STEP,
            schedule_check.schedule,
            sample_checks.different_samples,
            sample_checks.other_parts,
            gradient_mean_check.mean_gradients,
            tensor_parallel_check.summed,
            clipping_check.clipped,
        )
        for check in (*technique_checks.AFTER_A_STEP, *distributed_checks.AFTER_A_STEP, *other_checks):
            check(self)

    def _gathered(self) -> Conformance:
        """Return the result: the differences of all ranks, so that all ranks stop if one does, and what was
        checked and not checked on this rank."""
        differences_by_rank = [self.differences]
        if dist.is_initialized() and dist.get_world_size() > 1:
            differences_by_rank = [None] * dist.get_world_size()  # type: ignore[list-item]
            dist.all_gather_object(differences_by_rank, self.differences)
        union = dict.fromkeys(d for rank_differences in differences_by_rank for d in rank_differences)
        return Conformance(differences=tuple(union), checked=tuple(self.checked), unseen=tuple(self.not_seen))

    def _ranks(self) -> None:
        ranks = world_size()
        self.differs("ranks", str(self.plan.ranks), str(ranks), wrong=ranks != self.plan.ranks)

    def _parameters(self) -> None:
        """Record whether this rank holds as many elements of parameters as planned: at most its shard if the
        plan shards them, else at least 99 % of its part of the model. Recorded as not checked if they should
        be sharded and this rank holds none."""
        params = list(self.model.parameters())
        held_elements, part_elements = sum(map(local_elements, params)), self.part(params)
        degree, feature = self.sharded("parameters")
        if degree > 1 and not held_elements:
            self.unseen(f"{feature}: no shards were found")
        elif degree > 1:
            persistent_elements = sum(whole(p) for p in params if self.persists(p))
            max_elements = persistent_elements + self._shard(
                [p for p in params if not self.persists(p)], degree
            )
            self.differs(
                feature,
                f"1/{degree} of {part_elements:,} elements on a rank",
                f"{held_elements:,}",
                wrong=held_elements > max_elements,
            )
        elif part_elements:
            self.differs(
                "parameters",
                "whole",
                f"{held_elements:,} of {part_elements:,} elements on a rank",
                wrong=held_elements < 0.99 * part_elements,
            )

    def _shard(self, params: list[nn.Parameter], degree: int) -> float:
        """Return the most elements of ``params`` that one of ``degree`` ranks may hold. With fsdp2, they are
        whole rows of each parameter, and whole parameters that it ignores (at most 5 % of the elements); with
        sharded-ddp, an even part and most of the largest parameter; else an even part. If some of ``params``
        are freed and their sizes unknown, it is an even part of the whole model with any technique. Padding
        of 64 elements per rank is added except with sharded-ddp."""
        sizes = [whole(p) for p in params]
        if (part_elements := self.part(params)) > sum(sizes):
            return part_elements / degree + _PADDING * degree
        if self.plan.get("sharded-ddp") is not None:
            return sum(sizes) / degree + max(sizes, default=0) * (degree - 1) / degree
        by_rows = self.plan.get("fsdp2") is not None
        ignored_params = [p for p in params if not placed(p)] if by_rows else []
        if sum(map(whole, ignored_params)) > _IGNORED_RATIO * sum(sizes):
            ignored_params = []
        ignored_ids = {id(p) for p in ignored_params}  # parameters that FSDP2 was told to ignore
        rows = [p.shape[0] if by_rows and p.dim() else n for p, n in zip(params, sizes, strict=True)]
        parts = (
            n if id(p) in ignored_ids else math.ceil(r / degree) * n / max(r, 1)
            for p, r, n in zip(params, rows, sizes, strict=True)
        )
        return sum(parts) + _PADDING * degree

    def _overlapping(self, params: list[nn.Parameter], degree: int) -> int:
        """Return the elements of those of ``params`` that lie at least partly in this rank's part if all are
        concatenated and divided evenly among ``degree`` ranks."""
        size = math.ceil(sum(map(whole, params)) / degree)
        first = size * (dist.get_rank() % degree)
        ends = list(itertools.accumulate(map(whole, params)))
        return sum(
            end - start
            for start, end in itertools.pairwise([0, *ends])
            if start < first + size and end > first
        )

    def _bucketed(self) -> int:
        """Return the elements of the buckets for gradients, one per owning rank, that sharded-ddp keeps on
        every rank; 0 without sharded-ddp."""
        use = self.plan.get("sharded-ddp")
        return int(use.settings["reduce_buffer_elements"]) * self.layout.shard if use is not None else 0

    def _micro_batches(self) -> None:
        accumulation, pipeline = self.plan.get("gradient-accumulation"), self.plan.get("pipeline")
        planned_count = self.micro_batches or (
            int(accumulation.settings["micro_batches"]) if accumulation else 1
        )
        if pipeline is not None:  # every stage on this rank runs each micro-batch
            planned_count *= int(pipeline.settings["micro_batches"]) * int(pipeline.settings["virtual"])
            # torch's stages may run one to infer shapes.
            found_count = self.order.staged.count("F") or self.forwards
            feature = "pipeline: micro-batches"
        else:  # a loss may call the model several times, and read other data in between
            found_count, feature = self.graph.backwards or self.forwards, "gradient-accumulation"
        if found_count and (pipeline is not None or planned_count > 1):
            # LBFGS and sharpness-aware steps run their micro-batches several times.
            if pipeline is None and not found_count % planned_count:
                found_count = max(self.passes, default=0) or found_count
            wrong = (
                found_count != planned_count if pipeline is not None else bool(found_count % planned_count)
            )
            self.differs(feature, f"{planned_count} micro-batches", str(found_count), wrong=wrong)
        elif accumulation is not None or pipeline is not None:
            self.unseen(f"{feature}: no forward or backward pass was observed")

    def _gradients(self) -> None:
        params = list(self.trainable())
        degree, feature = self.sharded("gradients")
        if degree == 1 or self.gradients is None:
            return
        part_elements = self.part(params)
        max_elements = self._shard(params, degree)
        # Gradients were not reduced to shards.
        unreduced = self.plan.get("fsdp2") is not None and not self.gradients
        self.differs(
            feature,
            f"1/{degree} of {part_elements:,} elements on a rank before the update",
            f"{self.gradients:,}",
            wrong=unreduced or self.gradients > max_elements + self._bucketed(),
        )
        zero = self.plan.get("zero")
        if zero is None or int(zero.settings["stage"]) != 2 or not self.waiting:
            return
        bucket = int(zero.settings["reduce_bucket_elements"])
        # The last one may be in progress.
        max_elements = self._overlapping(params, degree) + bucket + max(map(whole, params))
        if max_elements >= part_elements:
            self.unseen(f"{feature} in backward: all gradients fit in one reduce bucket")
        else:
            self.differs(
                feature,
                f"at most {int(max_elements):,} of {part_elements:,} elements in backward",
                f"{self.waiting:,}",
                wrong=self.waiting > max_elements,
            )

    def _state(self) -> None:
        state_count = state_elements(self.optimizer)
        params = list(self.trainable())
        part_elements = self.part(params)
        degree, feature = self.sharded("optimizer state")
        if not state_count:
            self.unseen("optimizer state: none was found")
        elif degree > 1:
            max_elements = self._shard(params, degree)
            self.differs(
                feature,
                f"state for 1/{degree} of {part_elements:,} elements",
                f"state for {state_count:,}",
                wrong=state_count > max_elements,
            )
