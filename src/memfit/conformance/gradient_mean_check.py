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

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.fingerprints import TURNS
from memfit.conformance.observation import Figures, GradientFigures, Observations, RankObservation
from memfit.conformance.planned_shards import averaging_technique, shard_degree
from memfit.techniques.rank_mesh import layout
from memfit.types.plan import Plan

_ROUNDING, _ROUNDING_BF16 = 2.0**-20, 2.0**-8  # of many sums in float32; gradients may be reduced in bfloat16
_SURE = 30  # multiple of what rounding can cause, squared
# Squared, relative to the ranks' distance from their mean; a smaller distance counts as equal.
_SPREAD_RATIO = 0.01
_SHARE = 0.01  # share of all gradients' squares from which a difference matters
_COUNT = 5  # a share of the number of parameters must be this many times larger


def mean_gradients(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether each parameter's gradient at the update is a multiple of the mean of the gradients of the
    data-parallel and context-parallel ranks.

    Yields `NotChecked` with expert-parallel, with a zero-bubble pipeline, if gradients are not the mean but
    hooks of the user may have changed them, or if the observations do not decide it: for example, the ranks'
    gradients hardly differ, or no gradients were observed in backward. Yields nothing if there is only one
    such rank."""
    ranks = layout(plan).data * layout(plan).context
    if ranks == 1:
        return
    feature = f"{averaging_technique(plan)}: mean of gradients"
    pipeline = plan.get("pipeline")
    if "expert-parallel" in plan:
        yield NotChecked(f"{feature}: experts are not the same on all ranks")
        return
    if pipeline is not None and str(pipeline.settings["schedule"]).startswith("zero-bubble"):
        yield NotChecked(f"{feature}: gradients of weights are computed separately from backward")
        return
    # Gradients are averaged over the ranks of a group.
    groups = collections.defaultdict[tuple[int, ...], list[RankObservation]](list)
    for rank in observed.ranks:
        groups[rank.other_coordinates("replicate", "shard", "context")].append(rank)
    verdicts = [_judge([r.gradients for r in group], _copies(plan, group)) for group in groups.values()]
    if any(v.wrong for v in verdicts) and any(r.gradients.has_user_hooks for r in observed.ranks):
        yield NotChecked(f"{feature}: they are not the mean, but a hook of the user may have changed them")
    elif reasons := [v.why for v in verdicts if not v.wrong and v.why]:
        yield NotChecked(f"{feature}: {reasons[0]}")
    else:
        why = next((v.why for v in verdicts if v.wrong), "")
        yield Checked(feature, f"the mean of {ranks} ranks' gradients", why, wrong=bool(why))


def _copies(plan: Plan, group: Sequence[RankObservation]) -> list[list[GradientFigures]]:
    """Return the gradients of the ranks of ``group`` in lists, each of the ranks whose shards together are
    whole gradients. If neither gradients nor optimizer state are sharded, each list has one rank."""
    dimensions = ("shard", "context") if "fsdp2" in plan else ("shard",)
    is_sharded = any(shard_degree(plan, kind)[0] > 1 for kind in ("optimizer state", "gradients"))
    copies = collections.defaultdict[tuple[int, ...], list[GradientFigures]](list)
    for rank in group:
        copies[rank.other_coordinates(*(dimensions if is_sharded else ()))].append(rank.gradients)
    return list(copies.values())


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """The result for one group of ranks. If ``wrong``, gradients are not the mean, and ``why`` says what they
    are. Else ``why`` is the reason why nothing can be said, or "" if the gradients are the mean."""

    why: str = ""
    wrong: bool = False


def _judge(group: list[GradientFigures], copies: list[list[GradientFigures]]) -> _Verdict:
    if any(g.began for g in group):
        return _Verdict("gradients of an earlier pass existed when the step began")
    if any(g.waiting for g in group):
        return _Verdict("some gradients that were not reduced before the optimizer step", wrong=True)
    if not all(g.local for g in group):
        return _Verdict("no gradients were observed in backward")
    ranks = _Ranks.of([g.local for g in group])
    if not bool(ranks.sure.any()):
        return _Verdict("the gradients of the ranks hardly differ")
    return _compare(ranks, copies)


def _compare(ranks: _Ranks, copies: list[list[GradientFigures]]) -> _Verdict:
    before = [ranks.figures([g.before for g in copy]) for copy in copies]
    after = [ranks.figures([g.after for g in copy]) for copy in copies]
    backward = [ranks.figures([g.backward for g in copy]) for copy in copies]
    if not any(bool(f.any()) for f in (*before, *after, *backward)):
        return _Verdict("the gradients that the update receives were not found")
    if not any(bool(f.any()) for f in before):
        before = backward  # the optimizer's step was not observed
    if ranks.are_mean(before) or ranks.are_mean(after):  # the second: averaged within the optimizer's step
        return _Verdict()
    if not ranks.are_of_one_rank(before[0]) and all(ranks.are_alike(f, before[0]) for f in before):
        if ranks.are_mean(backward):
            return _Verdict()  # averaged, then clipped or decayed
        if len(copies) > 1:
            return _Verdict("the gradients are the same on every rank, but not a multiple of the mean")
    return _Verdict("gradients that were not reduced over all ranks", wrong=True)


class _Ranks:
    """The gradients that the backward passes of several ranks made, over which gradients should be averaged,
    as fingerprints (each a row of figures).

    ``local``: the figures of each rank, with shape (ranks, parameters, figures). ``sure``: a mask of the
    parameters whose gradients differ between ranks by more than rounding. Only of these can the mean be told
    from a rank's own gradient."""

    @classmethod
    def of(cls, group: list[Figures]) -> _Ranks:
        names = sorted(set[str]().union(*group))
        zeros = [0.0] * (len(TURNS) + 1)
        values = torch.tensor([[f.get(n, zeros) for n in names] for f in group], dtype=torch.float64)
        return cls(names, values[..., :-1], values[..., -1].mean(0))

    def __init__(self, names: list[str], local: torch.Tensor, squares: torch.Tensor) -> None:
        self._names, self.local, self._squares, self._mean = names, local, squares, local.mean(0)
        sizes = self._mean.square().sum(-1).clamp_min(1e-300)
        self._near = _SPREAD_RATIO * torch.stack(
            [_squared_sine(rank_figures, self._mean) for rank_figures in local]
        ).amax(0)
        noise = _SURE * squares / sizes
        self.sure = (self._near > noise * _ROUNDING**2) & local.isfinite().all(-1).all(0)
        self._rounding = noise * _ROUNDING_BF16**2

    def figures(self, copy: list[Figures]) -> torch.Tensor:
        """Return the figures of whole gradients, with shape (parameters, figures): for each parameter, the
        sum over the shards in ``copy``, which has one mapping (parameter name -> figures) per rank. What is
        in no mapping is zero."""
        zeros = [0.0] * len(TURNS)
        shards = [[rank_figures.get(n, zeros) for n in self._names] for rank_figures in copy]
        return torch.tensor(shards, dtype=torch.float64).sum(0)

    def are_mean(self, copies: list[torch.Tensor]) -> bool:
        """Return whether each of ``copies``, with shape (parameters, figures), has gradients, and those that
        are not a multiple of the ranks' mean have a share (`_share`) of less than 1 %."""
        return all(bool(f.any()) and self._share(self._wrong(f)) < _SHARE for f in copies)

    def _wrong(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return a mask of the parameters in ``sure`` whose ``gradients``, with shape (parameters, figures),
        are not a multiple of the ranks' mean."""
        distances = _squared_sine(gradients, self._mean)
        return self.sure & (distances > self._near) & (distances > self._rounding)

    def are_of_one_rank(self, gradients: torch.Tensor) -> bool:
        """Return whether one rank exists of whose own gradients all those ``gradients`` are multiples that
        are not multiples of the ranks' mean. Exceptions with a share (`_share`) of less than 1 % are allowed.
        Also True if all are multiples of the mean. ``gradients`` has shape (parameters, figures)."""
        wrong = self._wrong(gradients)
        return any(
            self._share(wrong & self._differ(gradients, rank_figures)) < _SHARE for rank_figures in self.local
        )

    def are_alike(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Return whether ``a`` and ``b``, with shape (parameters, figures), are equal up to a factor per
        parameter and rounding. Parameters where they differ may have a share (`_share`) of less than 1 %.
        Parameters that are not in ``sure`` do not count."""
        return self._share(self.sure & self._differ(a, b)) < _SHARE

    def _differ(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _squared_sine(a, b) > torch.maximum(self._near / 10, self._rounding)

    def _share(self, mask: torch.Tensor) -> float:
        """Return how much the parameters in ``mask`` weigh among those in ``sure``, from 0 to 1: their share
        of the sum of all gradients' squares, or a fifth of their share of the number of parameters if that is
        larger. The number counts because heads and embeddings may outweigh all blocks."""
        by_squares = float(self._squares[mask].sum() / self._squares[self.sure].sum())
        return max(by_squares, float(mask.sum() / self.sure.sum()) / _COUNT)


def _squared_sine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return, for each parameter, the squared sine of the angle between its figures in ``a`` and in ``b``
    (the last dimension): 0 if one is a multiple of the other, also if one is zero; 1 if they are
    orthogonal."""
    product, sizes = (a * b).sum(-1).square(), a.square().sum(-1) * b.square().sum(-1)
    nonzero = sizes > 0
    return torch.where(nonzero, 1 - product / torch.where(nonzero, sizes, 1.0), 0.0).clamp_min(0.0)
