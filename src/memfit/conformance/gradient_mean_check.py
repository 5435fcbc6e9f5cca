"""Check whether the gradients that an update receives are the mean of the gradients of all ranks' backward
passes.

A fingerprint of each parameter's gradient is taken twice: of the gradient that this rank's backward made, and
of the gradient before the update (of this rank's shard if it is sharded). A fingerprint is a sum of the
elements, each weighted by a number that depends on its place. Since it is linear, the fingerprint before the
update is a multiple of the mean of the ranks' fingerprints, whoever averages and however, and the
fingerprints of shards add up. Loss scaling and clipping by norm change only the multiple. (Plain sums would
not work: transformers' gradients mostly sum to zero.)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from memfit.conformance.fingerprints import TURNS
from memfit.conformance.gradient_probes import Figures
from memfit.conformance.observation import Observation
from memfit.conformance.sharding import from_all, placed

_ROUNDING, _ROUNDING_BF16 = 2.0**-20, 2.0**-8  # of many sums in float32; gradients may be reduced in bfloat16
_SURE = 30  # multiple of what rounding can cause, squared
# Squared, relative to the ranks' distance from their mean; a smaller distance counts as equal.
_SPREAD_RATIO = 0.01
_SHARE = 0.01  # share of all gradients' squares from which a difference matters
_COUNT = 5  # a share of the number of parameters must be this many times larger
_AVERAGING = ("ddp", "zero", "sharded-ddp", "fsdp2", "context-parallel", "axial-parallel")


@dataclasses.dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank observed. ``group``: its coordinates along all mesh dimensions except those over which
    gradients are averaged. ``copy``: equal for the ranks that together hold one whole gradient, and different
    for those that hold another copy. The other fields are those of `Averages`."""

    group: tuple[int, ...]
    copy: tuple[int, ...]
    own: Figures
    backward: Figures
    before: Figures
    after: Figures
    began: bool
    waiting: bool


def mean_gradients(step: Observation) -> None:
    """Record whether the gradients that the update receives are a multiple of the mean over the data-parallel
    and context-parallel ranks. Does nothing if there is one such rank. Recorded as not checked with
    expert-parallel, with a zero-bubble pipeline, if the user's hooks may explain a difference, or if the
    observations do not decide it, for example because the ranks' gradients hardly differ."""
    ranks = step.layout.data * step.layout.context
    if ranks == 1:
        return
    feature = next((u.technique for u in step.plan.uses if u.technique in _AVERAGING), "replicas")
    feature = f"{feature}: mean of gradients"
    pipeline = step.plan.get("pipeline")
    if step.plan.get("expert-parallel") is not None:
        step.unseen(f"{feature}: experts are not the same on all ranks")
        return
    if pipeline is not None and str(pipeline.settings["schedule"]).startswith("zero-bubble"):
        step.unseen(f"{feature}: gradients of weights are computed separately from backward")
        return
    all_ranks: list[_Rank] = from_all(_this_rank(step))
    groups = [[r for r in all_ranks if r.group == g] for g in dict.fromkeys(r.group for r in all_ranks)]
    verdicts = [_judged(group) for group in groups]
    has_hooks = any(getattr(m, "_comm_hooks", None) for m in step.model.modules()) or (
        step.averages.hooked and step.plan.get("fsdp2") is not None
    )
    if any(f.wrong for f in verdicts) and any(from_all(has_hooks)):
        step.unseen(f"{feature}: they are not the mean, but a hook of the user may have changed them")
    elif reasons := [f.why for f in verdicts if not f.wrong and f.why]:
        step.unseen(f"{feature}: {reasons[0]}")
    else:
        why = next((f.why for f in verdicts if f.wrong), "")
        step.differs(feature, f"the mean of {ranks} ranks' gradients", why, wrong=bool(why))


def _this_rank(step: Observation) -> _Rank:
    averages = step.averages
    group = step.other_coordinates("replicate", "shard", "context")
    dimensions = ("shard", "context") if step.plan.get("fsdp2") is not None else ("shard",)
    is_sharded = any(step.sharded(kind)[0] > 1 for kind in ("optimizer state", "gradients"))
    copy = step.other_coordinates(*dimensions) if is_sharded else step.other_coordinates()
    cut_params = cut_names(step) if step.layout.tensor > 1 else None
    own_figures = {n: t.tolist() for n, t in averages.own.items() if cut_params is None or n in cut_params}
    return _Rank(
        group,
        copy,
        own_figures,
        averages.backward,
        averages.before,
        averages.after,
        bool(averages.began),
        averages.waiting,
    )


def cut_names(step: Observation) -> set[str]:
    """Return the names of the parameters that tensor parallelism shards. The gradient of another parameter in
    backward may be only this rank's term of a sum over tensor-parallel ranks."""

    def cut(param: nn.Parameter) -> bool:
        by_mesh = any(p.is_shard() for p, tensor_parallel in placed(param) if tensor_parallel)
        return by_mesh or bool(getattr(param, "tensor_model_parallel", False))

    return {n for n, p in step.model.named_parameters() if cut(p)}


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """The result for one group of ranks. ``why``: what is wrong if ``wrong``, else why nothing can be said;
    "" if the gradients are the mean."""

    why: str = ""
    wrong: bool = False


def _judged(group: list[_Rank]) -> _Verdict:
    if any(r.began for r in group):
        return _Verdict("gradients of an earlier pass existed when the step began")
    if any(r.waiting for r in group):
        return _Verdict("some gradients that were not reduced before the optimizer step", wrong=True)
    if not all(r.own for r in group):
        return _Verdict("no gradients were observed in backward")
    ranks = _Ranks.of(group)
    if not bool(ranks.sure.any()):
        return _Verdict("the gradients of the ranks hardly differ")
    copies = [[r for r in group if r.copy == c] for c in dict.fromkeys(r.copy for r in group)]
    return _compared(ranks, copies)


def _compared(ranks: _Ranks, copies: list[list[_Rank]]) -> _Verdict:
    before, after, backward = (
        [ranks.figures([getattr(r, moment) for r in copy]) for copy in copies]
        for moment in ("before", "after", "backward")
    )
    if not any(bool(f.any()) for f in (*before, *after, *backward)):
        return _Verdict("the gradients that the update receives were not found")
    if not any(bool(f.any()) for f in before):
        before = backward  # the optimizer's step was not observed
    if ranks.averaged(before) or ranks.averaged(after):  # the second: averaged within the optimizer's step
        return _Verdict()
    if not ranks.of_one(before[0]) and all(ranks.alike(f, before[0]) for f in before):
        if ranks.averaged(backward):
            return _Verdict()  # averaged, then clipped or decayed
        if len(copies) > 1:
            return _Verdict("the gradients are the same on every rank, but not a multiple of the mean")
    return _Verdict("gradients that were not reduced over all ranks", wrong=True)


class _Ranks:
    """The gradients that the ranks' backward passes made, for ranks whose gradients are averaged. ``own``:
    figures of each, with shape (ranks, parameters, figures). ``sure`` marks parameters whose gradients differ
    between ranks by more than rounding, so that their mean can be told from a rank's own gradient."""

    @classmethod
    def of(cls, group: list[_Rank]) -> _Ranks:
        names = sorted(set[str]().union(*(r.own for r in group)))
        zeros = [0.0] * (len(TURNS) + 1)
        values = torch.tensor([[r.own.get(n, zeros) for n in names] for r in group], dtype=torch.float64)
        return cls(names, values[..., :-1], values[..., -1].mean(0))

    def __init__(self, names: list[str], own: torch.Tensor, squares: torch.Tensor) -> None:
        self._names, self.own, self._squares, self._mean = names, own, squares, own.mean(0)
        sizes = self._mean.square().sum(-1).clamp_min(1e-300)
        self._near = _SPREAD_RATIO * torch.stack(
            [_apart(rank_figures, self._mean) for rank_figures in own]
        ).amax(0)
        noise = _SURE * squares / sizes
        self.sure = (self._near > noise * _ROUNDING**2) & own.isfinite().all(-1).all(0)
        self._rounding = noise * _ROUNDING_BF16**2

    def figures(self, copy: list[Figures]) -> torch.Tensor:
        """Return the figures of whole gradients, with shape (parameters, figures), as the sums over the
        shards in ``copy``, one mapping per rank."""
        zeros = [0.0] * len(TURNS)
        shards = [[rank_figures.get(n, zeros) for n in self._names] for rank_figures in copy]
        return torch.tensor(shards, dtype=torch.float64).sum(0)

    def averaged(self, copies: list[torch.Tensor]) -> bool:
        return all(bool(f.any()) and self.off(f) < _SHARE for f in copies)

    def off(self, given: torch.Tensor) -> float:
        """Return the share of the gradients in ``given``, with shape (parameters, figures), that are not a
        multiple of the ranks' mean. Parameters that are not in ``sure`` do not count."""
        return self._share(self._wrong(given))

    def _wrong(self, gradients: torch.Tensor) -> torch.Tensor:
        distances = _apart(gradients, self._mean)
        return self.sure & (distances > self._near) & (distances > self._rounding)

    def of_one(self, given: torch.Tensor) -> bool:
        """Return whether one and the same rank's backward made all gradients in ``given`` that are not a
        multiple of the ranks' mean, but for a share of 1 %. True if all are a multiple of the mean. ``given``
        has shape (parameters, figures)."""
        wrong = self._wrong(given)
        return any(
            self._share(wrong & self._differ(given, rank_figures)) < _SHARE for rank_figures in self.own
        )

    def alike(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Return whether ``a`` and ``b``, with shape (parameters, figures), are equal up to a factor per
        parameter and rounding, but for a share of 1 % of the gradients."""
        return self._share(self.sure & self._differ(a, b)) < _SHARE

    def _differ(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _apart(a, b) > torch.maximum(self._near / 10, self._rounding)

    def _share(self, mask: torch.Tensor) -> float:
        """Return the share of the parameters marked by ``mask`` among those in ``sure``: their share of the
        squares, or a fifth of their share of the number if that is larger, because heads and embeddings may
        outweigh all blocks."""
        by_squares = float(self._squares[mask].sum() / self._squares[self.sure].sum())
        return max(by_squares, float(mask.sum() / self.sure.sum()) / _COUNT)


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return, for each parameter, the squared sine of the angle between its figures in ``a`` and in ``b``, 0
    if one of the two is zero. The last dimension is that of the figures."""
    product, sizes = (a * b).sum(-1).square(), a.square().sum(-1) * b.square().sum(-1)
    nonzero = sizes > 0
    return torch.where(nonzero, 1 - product / torch.where(nonzero, sizes, 1.0), 0.0).clamp_min(0.0)
