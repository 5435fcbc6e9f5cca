"""Compare what a prepared model, to which a plan should have been applied, does with what the plan says.

Engines ignore some settings silently, so no engine is asked for its settings. Instead the monitor measures
the elements of parameters, gradients and optimizer state that this rank holds, their dtypes, which modules
run again in backward, whether autocast is active where layers run, whether replicas are still equal after a
step, and more. What it observed is a value (observation.py), which checks (registry.py) compare with the
plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from memfit.conformance import block_checks, fingerprints, registry, snapshot
from memfit.conformance.autograd_graph import GraphProbe
from memfit.conformance.batch_digest import InputDigester
from memfit.conformance.clipping_probe import ClippingProbe
from memfit.conformance.cross_rank_dependence import reach_of
from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.gradient_probes import GradientProbe
from memfit.conformance.module_hooks import BlockListener, PlainModel
from memfit.conformance.observation import (
    Observations,
    ObservedParameter,
    RankObservation,
    part_elements,
)
from memfit.conformance.planned_shards import shard_degree
from memfit.conformance.prepared import Prepared
from memfit.conformance.sharding import (
    buffered_gradients,
    from_all,
    in_backward,
    layers,
    local_elements,
    meshes_of,
    world_size,
)
from memfit.conformance.stage_order import OrderProbe
from memfit.conformance.weight_updates import WeightUpdates
from memfit.types.conformance import Conformance, Difference, NotConforming
from memfit.types.plan import Plan

_LOOKS = 16  # in one backward pass


class Monitor(Prepared):
    """Observes one training step of a prepared model, run between `__enter__` and `__exit__`. `observe`
    returns what was observed, and `conclude` compares that with the plan. Both can be called without a step;
    then they cover only what can be seen without one.

    ``micro_batches`` is the number of micro-batches that the observed step runs; None: the plan's.
    ``plain_model``, which the caller may set, is the model without a plan. If it is None, effects that the
    plan does not request, and that the model may cause by itself, are reported as not checked instead of as
    differences."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        plan: Plan,
        *,
        blocks: str | None = None,
        head: str | None = None,
        whole_elements: int | None = None,
        micro_batches: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, plan, blocks=blocks, head=head, whole_elements=whole_elements)
        self.plain_model: PlainModel | None = None  # set by the caller, if known
        self.micro_batches = micro_batches
        self.order, self.reach, self.inputs = OrderProbe(plan), reach_of(self), InputDigester()
        self.gradients, self.clipping = GradientProbe(self), ClippingProbe(self)
        self.weights, self.activity = WeightUpdates(self), BlockListener()
        self.graph = GraphProbe(model, self._on_backward, weighs="activation-offload" in plan)
        self._listening = contextlib.ExitStack()
        self._forwards = 0
        self._passes: list[int] = []  # numbers of backward passes, for each optimizer step
        self._learned = set[int]()  # ids of parameters that got a gradient
        self._gradient_elements: int | None = None
        self._arrived_gradients = self._backward_gradient_elements = 0
        self._gathered_blocks: tuple[int, ...] | None = None
        self._block_inputs: list[float] = []
        self._block_outputs: list[tuple[float, float]] = []

    # -- listening ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:  # an error must not leave functions of torch patched
            for listener in (self.graph, self.order, self.reach, self.gradients, self.clipping, self.weights):
                stack.enter_context(listener)
            for handle in self._hooks():
                stack.callback(handle.remove)
            self._listening = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _hooks(self) -> Iterator[Any]:
        """Register the hooks on the model and the optimizer, and yield their handles."""
        compile_use = self.plan.get("compile")  # a hook inside would split the graph
        if compile_use is None or compile_use.settings["scope"] != "model":
            yield self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        yield from self.activity.listen(
            self.blocks if compile_use is None else (),
            islands=self.islands,
            on_first=self._on_first,
            busy=lambda: self.reach.running,
        )
        if self.layout.tensor > 1 and self.blocks and compile_use is None:
            yield self.blocks[-1].register_forward_hook(self._on_last)
        torch_optimizers = [o for o in layers(self.optimizer) if isinstance(o, torch.optim.Optimizer)]
        for param in (trainable := list(self.trainable())):
            yield param.register_post_accumulate_grad_hook(self._on_gradient(len(trainable)))
        if torch_optimizers:
            yield torch_optimizers[-1].register_step_pre_hook(self._on_update)
            yield torch_optimizers[-1].register_step_post_hook(lambda *_: self._on_step())

    def _on_gradient(self, count: int) -> Callable[[nn.Parameter], None]:
        def listen(param: nn.Parameter) -> None:
            self._arrived_gradients += 1
            self._learned.add(id(param))
            if self._arrived_gradients % max(1, count // _LOOKS) == 0 or self._arrived_gradients % count == 0:
                self._backward_gradient_elements = max(
                    self._backward_gradient_elements, self._held_gradients()
                )

        return listen

    def _held_gradients(self) -> int:
        return sum(local_elements(p.grad) for p in self.trainable() if p.grad is not None)

    def before_update(self) -> None:
        """Record which trained parameters have gradients and, on the first call, how many elements of
        gradients this rank holds. To be called before each update, when gradients are complete. A torch
        optimizer does so itself, by a hook, between `__enter__` and `__exit__`."""
        self._learned |= {id(p) for p in self.trainable() if p.grad is not None}
        self.weights.before_update()
        if self._gradient_elements is None:
            self._gradient_elements = self._held_gradients() + buffered_gradients(self.optimizer)

    def _on_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.before_update()
        self.clipping.before_update(optimizer)

    def _on_step(self) -> None:
        """Record, after an update, how many backward passes ran since the previous update, those in the
        closure of the optimizer's step included."""
        self._passes.append(self.graph.backwards - sum(self._passes))

    def _on_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not in_backward() and torch.is_grad_enabled():  # torch's pipelines infer shapes without gradients
            self._forwards += 1
            self.order.on_forward()
            if self.layout.data > 1:
                self.inputs.record(args, kwargs)

    def _on_first(self, args: Any) -> None:
        if len(self._block_inputs) < _LOOKS and self.layout.context > 1:
            self._block_inputs += fingerprints.of_inputs(args)

    def _on_last(self, module: nn.Module, args: Any, out: Any) -> None:
        if len(self._block_outputs) < _LOOKS and not in_backward() and torch.is_grad_enabled():
            self._block_outputs += fingerprints.of_output(out)

    def _on_backward(self) -> None:
        self.order.on_backward()
        if self._gathered_blocks is None and "fsdp2" in self.plan:
            self._gathered_blocks = snapshot.gathered_blocks(self)

    # -- what was observed ----------------------------------------------------------------------------

    def observe(self) -> Observations:
        """Return what was observed on this rank and what the others observed that is compared between ranks.
        All ranks must call it.

        If blocks differ from the plan, the checks compare them with the model without a plan. For this, one
        step of ``plain_model`` is run without autocast, under the planned autocast dtype, or both, as they
        need (`block_checks.plain_runs`). No step is run if ``plain_model`` is None or no block differs."""
        with meshes_of(self.plan, self.model):
            observed = self._observed()
        if self.plain_model is None:
            return observed
        runs = {dtype: self.plain_model.run(dtype) for dtype in block_checks.plain_runs(self.plan, observed)}
        return dataclasses.replace(
            observed,
            plain_dtypes=self.plain_model.dtypes,
            plain_runs={dtype: activity for dtype, activity in runs.items() if activity is not None},
        )

    def _observed(self) -> Observations:
        activity, saved = self.activity.observed(), self.graph.observed()
        has_step = bool(activity.ran or self._forwards or saved.backwards)
        plan, block_modules = self.plan, [m for block in self.blocks for m in block.modules()]
        params = tuple(
            snapshot.parameters(
                self, self.graph, self._learned, measures_norms=has_step and self._compares_norms()
            )
        )
        head = snapshot.head(self) if "chunked-cross-entropy" in plan else None
        names_kernel = "adamw-fused" in plan or "adamw-single" in plan
        may_offload = "fsdp2" in plan or "zero" in plan
        return Observations(
            rank=dist.get_rank() if world_size() > 1 else 0,
            ranks=tuple(from_all(self._rank_observation(params))),
            model_elements=self.whole_elements,
            micro_batches=self.micro_batches,
            clip=self.clip,
            norm_before_clipping=self.clipping.before,
            parameters=params,
            block_count=len(self.blocks),
            head=snapshot.linear(head) if head is not None else None,
            other_linears=tuple(
                snapshot.linear(m) for m in snapshot.linears(self.model.modules()) if m is not head
            ),
            block_linears=tuple(map(snapshot.linear, snapshot.linears(block_modules))),
            frozen_linears=tuple(map(snapshot.linear, filter(snapshot.is_frozen_linear, block_modules))),
            has_dropout=any(map(snapshot.drops_values, self.model.modules())),
            fsdp_groups=tuple(snapshot.fsdp_group_blocks(self)),
            states=tuple(snapshot.optimizer_states(self)),
            update_kernels=snapshot.update_kernels(self.optimizer) if names_kernel else frozenset(),
            optimizer_classes=snapshot.optimizer_classes(self.optimizer),
            offload_policy=snapshot.offload_policy(self) if may_offload else None,
            activity=activity,
            saved=saved,
            reads=self.reach.observed(),
            forwards=self._forwards,
            passes=tuple(self._passes),
            gradient_elements=self._gradient_elements,
            arrived_gradients=self._arrived_gradients,
            backward_gradient_elements=self._backward_gradient_elements,
            gathered_blocks=self._gathered_blocks,
        )

    def _rank_observation(self, params: tuple[ObservedParameter, ...]) -> RankObservation:
        tensor_sharded = frozenset(p.name for p in params if p.is_tensor_sharded)
        only = tensor_sharded if self.layout.tensor > 1 else None
        # A freed matrix has no elements.
        matrices = [p for p in params if len(p.shape) > 1 and p.elements]
        return RankObservation(
            coordinate=self.layout.coordinate(dist.get_rank() if world_size() > 1 else 0),
            held_elements=sum(p.local_elements for p in params),
            part_elements=part_elements(params, self.whole_elements),
            norms={p.name: p.norm for p in params if p.is_trained and p.norm is not None},
            matrix_norms=tuple(p.norm for p in matrices if p.norm is not None and self.layout.tensor > 1),
            tensor_sharded=tensor_sharded if any(p.is_tensor_sharded is not None for p in params) else None,
            learned=frozenset(p.name for p in params if p.is_trained and p.has_gradient),
            block_inputs=tuple(self._block_inputs),
            block_outputs=tuple(self._block_outputs),
            losses=tuple(self.graph.ends),
            inputs=self.inputs.observed(),
            order=self.order.observed(),
            update=self.clipping.observed(),
            gradients=self.gradients.observed(only=only),
            weights=self.weights.observed(),
        )

    def _compares_norms(self) -> bool:
        """Return whether ranks are compared by the norms of their parameters: with several ranks that do not
        shard parameters, with a pipeline, or with tensor parallelism."""
        has_replicas = self.layout.ranks > 1 and shard_degree(self.plan, "parameters")[0] == 1
        return has_replicas or "pipeline" in self.plan or self.layout.tensor > 1

    # -- comparing ------------------------------------------------------------------------------------

    def conclude(self) -> Conformance:
        """Run all checks and return the result, which has no differences. Raises NotConforming with the
        differences of all ranks if there are any on any rank, and UserError if the class of the technique
        optimizer cannot be imported. If the number of ranks is not the planned one, this is the difference,
        and nothing else is checked. All ranks must call it."""
        ranks = world_size()
        findings: list[CheckFinding] = [
            Checked("ranks", str(self.plan.ranks), str(ranks), wrong=ranks != self.plan.ranks)
        ]
        if ranks == self.plan.ranks:
            findings += registry.findings(self.plan, self.observe())
        result = _gather(findings)
        if result.differences:
            raise NotConforming(result)
        return result


def _gather(findings: list[CheckFinding]) -> Conformance:
    """Return the result for ``findings``: the differences of all ranks, each once, so that all ranks stop if
    one does; what was checked and not checked on this rank alone. All ranks must call it."""
    checked = [f for f in findings if isinstance(f, Checked)]
    differences = [
        Difference(feature=f.feature, planned=f.planned, found=f.found) for f in checked if f.wrong
    ]
    return Conformance(
        differences=tuple(dict.fromkeys(d for of_rank in from_all(differences) for d in of_rank)),
        checked=tuple(dict.fromkeys(f.feature for f in checked)),
        unseen=tuple(f.text for f in findings if isinstance(f, NotChecked)),
    )
