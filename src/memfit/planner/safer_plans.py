"""The next safer plan for a run that has run out of memory: one that needs less memory and changes the
training no further.

A safer plan differs from the one that failed only in techniques that leave parameters and optimizer as they
are, so that it can continue from its checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from memfit.cost.memory_estimate import ASSUMED_RESERVED_RATIO
from memfit.engines.registry import supporting_engine
from memfit.planner.capacity import CPU_HEADROOM_BYTES, CPU_HEADROOM_RATIO, fits_under, needed_bytes
from memfit.planner.evaluate import Predictor
from memfit.planner.workspace_probes import probe_workspaces
from memfit.techniques.recompute import optimal
from memfit.techniques.registry import (
    check,
    effect_of,
    in_micro_batches,
    make_use,
    proposable,
    technique,
)
from memfit.types.dependence import DependenceKind
from memfit.types.errors import MemfitError
from memfit.types.plan import EffectClass, Plan, Use
from memfit.types.result import Estimate
from memfit.types.units import MIB, format_bytes

_ACCUMULATION, _OFFLOAD = "gradient-accumulation", "activation-offload"
_CHECKPOINTING = "activation-checkpointing"
_RECOMPUTATION = "recomputation"  # a slot
# These may differ between a plan and a safer one. Others decide parameters, optimizer, precision or ranks.
_MAY_DIFFER = (_ACCUMULATION, _OFFLOAD, "chunked-cross-entropy", "chunking")
# What tracing a plan can raise, beside errors of the user's own functions, which are UserErrors.
FAILURES = (MemfitError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# A plan that failed although it was predicted to fit needs more than predicted: of a safer one at most this
# share of what the failed one was predicted to need.
_UNEXPLAINED_RATIO = 0.9
# Share of the limit that the next plan should need at most, as later batches may be larger still.
_SPARING_RATIO = 0.9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaferPlan:
    """A safer plan. ``estimate``: of this plan; ``needed_bytes``, ``failed_bytes``: the memory that it and
    the failed plan are predicted to need; ``limit_bytes``: the limit that it fits."""

    estimate: Estimate
    needed_bytes: int
    failed_bytes: int
    limit_bytes: int


def predictor_of_batch(predictor: Predictor, batch: Any) -> Predictor:
    """Return a predictor of the same job, machine and calibration, for which every step has the batch
    ``batch``."""
    job = dataclasses.replace(predictor.job, make_batch=lambda step, seed: batch)
    return dataclasses.replace(predictor, job=job, traces={}, part_digests={}, plain={})


def safer_plan(
    predictor: Predictor,
    failed: Plan,
    *,
    limit_bytes: int,
    frontier: Sequence[Plan] = (),
    tried: Collection[Plan] = (),
) -> SaferPlan | str:
    """Return a plan to continue with after ``failed`` has run out of memory, or a text that says why there is
    none. ``predictor``: predicts plans for the batch that failed. ``limit_bytes``: the memory that is there.

    The plan has the same effect class as ``failed`` or a lower one, and fits the limit with that batch. If
    ``failed`` was itself predicted to fit, it needs more than predicted, so that the plan must need at least
    10 % less than predicted for ``failed``. It is none of ``tried``, and differs from ``failed`` only in
    micro-batches, recomputation, offload of activations and chunking.

    Plans that need at most 90 % of the limit go before others, as later batches may be larger still. Among
    these, it is the first that fits:

    - the plan of ``frontier`` that needs the most memory; those that differ from ``failed`` in micro-batches
      only go before others
    - ``failed`` with the fewest additional micro-batches, if its effect class allows them, and if the samples
      of a batch are known to be independent, or are not tested and cut already
    - ``failed`` with activation checkpointing of every block, and with the fewest additional micro-batches
      that it needs
    - ``failed`` with optimal-checkpointing, which recomputes as many tensors as it takes
    - the third of these with activation offload, too

    If ``failed`` cannot be predicted, the error is raised: UserError, or one of `FAILURES`, such as
    RuntimeError.
    """
    if _probes(predictor):
        probe_workspaces(predictor, failed)
    failed_bytes = needed_bytes(predictor.whole(failed), predictor.machine)
    if failed_bytes <= limit_bytes:
        limit_bytes = int(failed_bytes * _UNEXPLAINED_RATIO)
    search = _Search(predictor=predictor, failed=failed, limit_bytes=limit_bytes, tried={failed, *tried})
    for share in (_SPARING_RATIO, 1.0):
        search.limit_bytes = int(share * limit_bytes)
        if (estimate := search.of_frontier(frontier) or search.of_extensions()) is not None:
            return SaferPlan(
                estimate=estimate,
                needed_bytes=needed_bytes(estimate, predictor.machine),
                failed_bytes=failed_bytes,
                limit_bytes=limit_bytes,
            )
    return search.why_not()


@dataclasses.dataclass(kw_only=True)
class _Search:
    """The search for a safer plan than ``failed`` within ``limit_bytes``. ``estimates``: of the plans that
    were estimated; None for one that cannot be used. ``smallest``: the least bytes that one of them needs,
    and its plan; None if there is none."""

    predictor: Predictor
    failed: Plan
    limit_bytes: int
    tried: Collection[Plan]
    estimates: dict[Plan, Estimate | None] = dataclasses.field(default_factory=dict)
    smallest: tuple[int, Plan] | None = None

    def of_frontier(self, frontier: Sequence[Plan]) -> Estimate | None:
        """Return the estimate of a plan of ``frontier`` that can follow the failed one and fits; None if
        there is none. Of several, one that differs from the failed one in its micro-batches only, if there is
        one, and of these (or else of all) the one that needs the most memory."""
        estimates = [e for plan in frontier if self._can_follow(plan) and (e := self._fitting(plan))]
        alone = self.failed.without(_ACCUMULATION)
        return max(
            estimates,
            key=lambda e: (e.plan.without(_ACCUMULATION) == alone, needed_bytes(e, self.predictor.machine)),
            default=None,
        )

    def of_extensions(self) -> Estimate | None:
        """Return the estimate of the first extension of the failed plan that fits. None if none does."""
        for variants in self._extensions():
            # More micro-batches never need more memory, so if the last variant does not fit, none does.
            if self._fitting(variants[-1]) is not None:
                return next(e for plan in variants if (e := self._fitting(plan)) is not None)
        return None

    def why_not(self) -> str:
        """Return a text that says why there is no safer plan: that none is left to try, or how much memory
        the smallest one needs and how much may be used."""
        effect = self._effect(self.failed)
        hint = (
            "; a plan with gradient-accumulation (E1) could be cut into more micro-batches"
            if effect is EffectClass.E0 and self.predictor.job_facts.micro_batch_counts[-1] > 1
            else ""
        )
        if self.smallest is None:
            return f"no plan of effect class {effect.label} is left to try{hint}"
        needed, plan = self.smallest
        return (
            f"of the plans of effect class {effect.label} that are left, {plan.label} needs least, "
            f"{format_bytes(needed)}, and {format_bytes(self.limit_bytes)} may be used{hint}"
        )

    def _extensions(self) -> Iterator[list[Plan]]:
        """Yield lists of plans to try, those that change least first. The plans of a list differ in their
        number of micro-batches only, fewest first."""
        recomputing = self._with(self.failed, _CHECKPOINTING)
        for plans in (
            self._with_splits(self.failed),
            self._with_splits(recomputing),
            self._within_budget(),
            self._with_splits(self._with(recomputing.without(optimal.OPTIMAL_CHECKPOINTING), _OFFLOAD)),
        ):
            if variants := [plan for plan in plans if self._can_follow(plan)]:
                yield variants

    def _with(self, plan: Plan, name: str) -> Plan:
        """Return the plan with the technique ``name`` in the first setting that it proposes for the job, in
        place of others of its slot. The plan is returned unchanged if it proposes none."""
        definition = technique(name)
        settings = next(iter(definition.settings(self.predictor.job_facts)), None)
        return plan if settings is None else _replace_in_slot(plan, make_use(name, settings))

    def _within_budget(self) -> list[Plan]:
        """Return the failed plan with optimal-checkpointing, which recomputes as many tensors as it takes to
        stay within the limit. Empty if next to nothing is left for tensors."""
        if self.predictor.machine.device.is_host:
            tensor_bytes = (self.limit_bytes - CPU_HEADROOM_BYTES) / CPU_HEADROOM_RATIO
        else:
            tensor_bytes = self.limit_bytes / ASSUMED_RESERVED_RATIO
        budget_mib = int(tensor_bytes) // MIB
        if budget_mib < 1:
            return []
        return [
            _replace_in_slot(self.failed, make_use(optimal.OPTIMAL_CHECKPOINTING, {"budget_mib": budget_mib}))
        ]

    def _with_splits(self, plan: Plan) -> list[Plan]:
        """Return the plan, and the plan with larger numbers of micro-batches, ascending: those that are at
        least twice the one before, and the largest possible."""
        count = plan.micro_batches
        largest, plans = self.predictor.job_facts.micro_batch_counts[-1], [plan]
        for more in self.predictor.job_facts.micro_batch_counts:
            if more >= 2 * count or count < more == largest:
                count = more
                plans.append(plan.with_use(make_use(_ACCUMULATION, {"micro_batches": more})))
        return plans

    def _can_follow(self, plan: Plan) -> bool:
        """Return whether the plan was not tried, can continue from a checkpoint of the failed one, has at
        most its effect class, and is supported: by the engine, by the machine and by the installed packages.
        """
        if plan in self.tried or plan.ranks != self.failed.ranks or _core(plan) != _core(self.failed):
            return False
        if proposable(self.failed) and not proposable(plan):
            return False
        if plan.micro_batches > self.failed.micro_batches and not self._may_split():
            return False
        with contextlib.suppress(MemfitError):  # a package is not installed, or the engine lacks a technique
            supporting_engine(self.predictor.engine, check(plan, self.predictor.machine))
            return self._effect(plan) <= self._effect(self.failed)
        return False

    def _may_split(self) -> bool:
        """Return whether the batch may be cut into more micro-batches: if the failed plan's effect class is
        at least E1 (sums are reordered), and the samples are independent, or not tested and already cut."""
        if effect_of(self.failed) < EffectClass.E1:
            return False
        kind = self.predictor.dependence.kind
        if kind is DependenceKind.NOT_TESTED:
            return in_micro_batches(self.failed)
        return kind is DependenceKind.INDEPENDENT

    def _effect(self, plan: Plan) -> EffectClass:
        return effect_of(plan, self.predictor.dependence_under(plan))

    def _fitting(self, plan: Plan) -> Estimate | None:
        """Return the plan's estimate if it fits the limit, else None, also for a plan that does not suit the
        model."""
        if plan not in self.estimates:
            self.estimates[plan] = None
            with contextlib.suppress(*FAILURES):
                self.estimates[plan] = self._estimate_of(plan)
        estimate = self.estimates[plan]
        return estimate if estimate and self._fits(estimate) else None

    def _estimate_of(self, plan: Plan) -> Estimate | None:
        """Return the plan's estimate; None if, once its tensors to recompute are chosen, it is a plan that
        was tried. On the processor of this machine, the workspaces of kernels are probed first if the plan
        does not fit although the peak of its tensors is below the limit."""
        estimate = self.predictor.whole(plan)
        if estimate.plan in self.tried:
            return None
        is_close = not self._fits(estimate) and estimate.allocated_bytes.value < self.limit_bytes
        if is_close and _probes(self.predictor):
            probe_workspaces(self.predictor, estimate.plan)
            estimate = self.predictor.whole(estimate.plan)
        needed = needed_bytes(estimate, self.predictor.machine)
        if self.smallest is None or needed < self.smallest[0]:
            self.smallest = needed, estimate.plan
        return estimate

    def _fits(self, estimate: Estimate) -> bool:
        return fits_under(self.limit_bytes, self.predictor.machine)(estimate)


def _probes(predictor: Predictor) -> bool:
    """Return whether workspaces of kernels are probed: on the processor of this machine."""
    return predictor.machine.is_here and predictor.machine.device.is_host


def _core(plan: Plan) -> Plan:
    """Return the plan without the techniques in which a safer plan may differ: gradient accumulation,
    recomputation, activation offload and chunking."""
    uses = tuple(
        u
        for u in plan.uses
        if u.technique not in _MAY_DIFFER and technique(u.technique).slot != _RECOMPUTATION
    )
    return Plan(uses=uses, ranks=plan.ranks)


def _replace_in_slot(plan: Plan, added: Use) -> Plan:
    """Return the plan with ``added`` in place of techniques of the same slot."""
    slot = technique(added.technique).slot
    others = tuple(u for u in plan.uses if not slot or technique(u.technique).slot != slot)
    return dataclasses.replace(plan, uses=others).with_use(added)
