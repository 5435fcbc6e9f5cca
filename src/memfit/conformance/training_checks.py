"""Check whether a training step trains: what the optimizer holds, whether an update was finished, and whether
weights change for their gradients.

Names of parameters are united over ranks: a parameter changes if it does on one of them, because a shard may
be empty or get no gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from memfit.conformance.findings import Checked, CheckFinding, NotChecked
from memfit.conformance.observation import (
    Observations,
    ObservedOptimizer,
    ObservedParameter,
    OptimizerGroup,
    WeightFigures,
)
from memfit.types.errors import first_names
from memfit.types.plan import Plan

# Share of elements from which weights without gradient, or unchanged ones, are a difference. Below, they may
# be parameters that a model has and does not use, or updates below the precision of a norm's weights.
_MOST_UNTRAINED_RATIO = 0.25
_NAMED = 3  # names in a text


def optimizer_parameters(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the optimizers of all ranks together hold every trained parameter; one that the step
    changed counts as held.

    A parameter that is not held is a difference in three cases: the optimizers have no tensors beside the
    model's parameters; they have some, and a step that changed weights changed none of these; or some of
    these are whole tensors in place of sharded parameters, as in an optimizer that was made before
    `fully_shard`. Else these tensors may be copies that are written back. `weights` and `master_weights`
    judge this by a step; without a step, yields `NotChecked`. Yields nothing if the optimizer has no
    parameter groups or the model no trained parameters."""
    figures, trained = _figures(observed), observed.trained
    optimizers = _optimizers(figures)
    if not optimizers or not trained:
        return
    missing = _missing(observed)
    foreign, unsharded = max(o.foreign for o in optimizers), max(o.unsharded for o in optimizers)
    if not missing or _is_certain(figures):
        stale_text = f"; {unsharded} of its tensors are as they were before sharding" if unsharded else ""
        yield Checked(
            "optimizer: parameters",
            f"all {len(trained)} trained parameters in the optimizer",
            f"{len(trained) - len(missing)}; not in it: {_join_names(missing)}{stale_text}"
            if missing
            else "all",
            wrong=bool(missing),
        )
    elif not observed.has_step:
        yield NotChecked(
            f"optimizer: {foreign} of its tensors are no parameters of the model; whether they are copies "
            "that are written back shows only in a step"
        )


def update(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether the step finished an update. It is a difference if a loss of some rank is not a number,
    if a trained parameter has a value that is not finite after the step, or if no trained parameter has
    changed.

    Yields `NotChecked` instead of the last if the learning rates are those of a warm-up, or if gradients are
    not finite and the optimizer did not step, as with a loss scale that is too high. Yields nothing if
    weights were not compared."""
    figures = _figures(observed)
    trained = _compared_parameters(observed, figures)
    if not trained:
        return
    if any(math.isnan(loss) for rank in observed.ranks for loss in rank.losses):
        yield Checked("update: loss", "a number", "not a number", wrong=True)
        return
    changed, broken = _changed_parameters(figures), _union(f.not_finite for f in figures)
    count_text = f"{sum(p.name in changed for p in trained)} of {len(trained)} trained parameters changed"
    if broken:
        found_text = f"values that are not finite in {_join_names([p for p in trained if p.name in broken])}"
        yield Checked("update", "finite weights after the step", found_text, wrong=True)
    elif changed:
        yield Checked("update", "weights change", count_text, wrong=False)
    elif reason := _reason_to_wait(figures):
        yield NotChecked(f"update: {reason}, so no weight changed")
    else:
        yield Checked("update", "weights change", f"{count_text}: {_cause(figures)}", wrong=True)


def _reason_to_wait(figures: Sequence[WeightFigures]) -> str:
    """Return why a correct training may leave all weights unchanged in this step, or ""."""
    groups = _parameter_groups(figures)
    if groups and all(_is_warming_up(g, groups) for g in groups):
        rates = sorted({g.rate for g in groups if g.rate is not None})
        return f"the learning rate is {', '.join(f'{r:g}' for r in rates[:_NAMED])} in this step"
    values = [v for f in figures for v in f.gradients.values() if v is not None]
    if not all(map(math.isfinite, values)) and not any(f.updates for f in figures):
        return (
            "gradients are not finite and the optimizer did not step, as with a loss scale that is too high"
        )
    return ""


def _is_warming_up(group: OptimizerGroup, groups: Sequence[OptimizerGroup]) -> bool:
    """Return whether the learning rate of a group can be that of a warm-up, in which updates may be 0 or
    below the precision of weights. With a scheduler of torch, this is so if the rate is below the group's
    initial one; without, if the rates of all groups are below those with which their optimizers were made."""
    if group.rate is not None and group.initial_rate is not None:
        return group.rate < group.initial_rate
    return all(g.rate is not None and g.rate < (g.default_rate or 0) for g in groups)


def _cause(figures: Sequence[WeightFigures]) -> str:
    gradients = _gradients(figures)
    if not gradients:
        return "no parameter got a gradient"
    if all(value == 0 for value in gradients.values()):
        return "all gradients are 0"
    if all(f.updates == 0 for f in figures):
        return "the optimizer did not step"
    if _parameters_without_gradient(figures):
        return "the gradients were gone when the optimizer stepped"
    groups = _parameter_groups(figures)
    if groups and all(g.rate == 0 for g in groups):
        return "the learning rate is 0, and no schedule raises it"
    return "its updates change none of them, or they were undone"


def weights(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check, if some weights have changed, whether all do that got a gradient other than 0, and whether the
    optimizer saw these gradients.

    It is a difference if a learning rate is 0 and no schedule will raise it, or if unchanged parameters, and
    those whose gradients were cleared, are all of a block or a quarter of the elements. Fewer are
    `NotChecked`, because their updates may be below the precision of their values. So are parameters in a
    warm-up, and those of 16 bits of which the optimizer may update copies that `master_weights` cannot tell.
    Parameters that `optimizer_parameters` reports are left out."""
    figures = _figures(observed)
    changed, gradients = _changed_parameters(figures), _gradients(figures)
    if not changed:
        return
    reported = {p.name for p in _missing(observed)} if _is_certain(figures) else set()
    due = [
        p
        for p in _compared_parameters(observed, figures)
        if gradients.get(p.name, 0) != 0 and p.name not in reported
    ]
    groups = _parameter_groups(figures)
    waiting = _union(g.names for g in groups if _is_warming_up(g, groups)) | _rounded(observed, figures)
    stuck, cleared = (
        _union(g.names for g in groups if g.rate == 0) - waiting,
        _parameters_without_gradient(figures),
    )
    unchanged = [p for p in due if p.name not in changed and p.name not in waiting]
    if resting := [p for p in due if p.name not in changed and p.name in waiting]:
        yield NotChecked(
            f"weights: {_join_names(resting)} did not change, as their updates may be too small yet"
        )
    lost = [p for p in due if p.name in cleared and p.name in changed]
    untrained = [*unchanged, *lost]
    is_wrong = any(p.name in stuck for p in unchanged) or _is_much(untrained, due)
    texts = [
        f"{len(params)} {text}: {_join_names(params)}"
        for text, params in (
            ("do not, at a learning rate of 0", [p for p in unchanged if p.name in stuck]),
            ("do not", [p for p in unchanged if p.name not in stuck]),
            ("without their gradients, which were gone when the optimizer stepped", lost),
        )
        if params
    ]
    if untrained and not is_wrong:
        yield NotChecked(
            f"weights: of {len(due)} with gradients, {'; '.join(texts)}; their updates may be too small"
        )
    elif due:
        planned_text = f"all {len(due)} parameters with gradients change"
        yield Checked("weights", planned_text, "; ".join(texts) or "all", wrong=is_wrong)


def block_gradients(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether gradients reach the repeated blocks that ran.

    It is a difference if no parameter of a block gets a gradient other than 0, or if parameters whose modules
    ran, and that get no gradient at all, are a quarter of a block's elements. Fewer are `NotChecked`, and so
    are such parameters of the last block alone, of which the loss may not read all outputs. Gradients of 0 in
    whole blocks are `NotChecked` if some weight matrix that gets a gradient other than 0 held only zeros
    before the step, as an output layer may at first: no gradient passes through it. Yields nothing if it was
    not observed which modules ran or no gradient was seen."""
    figures = _figures(observed)
    gradients, ran = _gradients(figures), _union(f.ran for f in figures if f.ran is not None)
    blocks = [
        (index, of_block)
        for index, params in enumerate(observed.block_parameters)
        if (of_block := [p for p in params if p.is_trained and p.name in ran])
    ]
    if not gradients or not blocks:
        return
    dead = [index for index, params in blocks if not any(gradients.get(p.name, 0) != 0 for p in params)]
    cut = {index: [p for p in params if p.name not in gradients] for index, params in blocks}
    was_zero = next(_were_zero(figures, gradients), None)
    if dead and was_zero and all(p.name in gradients for i, params in blocks if i in dead for p in params):
        names = ", ".join(map(str, dead))
        yield NotChecked(f"block gradients: 0 in blocks {names}; {was_zero} was 0 before the step")
        return
    partly = [i for i, params in blocks if i not in dead and _ratio(cut[i], params) >= _MOST_UNTRAINED_RATIO]
    unused = [p for i, params in cut.items() if i not in dead for p in params]
    if dead or (partly and partly != [blocks[-1][0]]):
        texts = [f"none that is not 0 in blocks {', '.join(map(str, dead))}"] if dead else []
        if partly:
            texts.append(f"none in parts of blocks {', '.join(map(str, partly))}: {_join_names(unused)}")
        yield Checked("block gradients", "gradients in all blocks", "; ".join(texts), wrong=True)
        return
    if unused:
        yield NotChecked(f"block gradients: {_join_names(unused)} got none; the loss may not depend on them")
    yield Checked("block gradients", "gradients in all blocks", f"in {len(blocks)} blocks", wrong=False)


def master_weights(plan: Plan, observed: Observations) -> Iterator[CheckFinding]:
    """Check whether parameters of which the optimizer updates copies are equal to these after the step.
    Yields nothing if it updates no copies that were equal to parameters before the step."""
    masters = {name: followed for f in _figures(observed) for name, followed in f.masters.items()}
    if not masters:
        return
    behind = [p for p in observed.trained if masters.get(p.name) is False]
    yield Checked(
        "master weights",
        f"{len(masters)} parameters equal to their updated copies",
        f"{len(behind)} differ: {_join_names(behind)}" if behind else "all",
        wrong=bool(behind),
    )


# -- what is united over ranks ----------------------------------------------------------------------------


def _figures(observed: Observations) -> list[WeightFigures]:
    return [rank.weights for rank in observed.ranks]


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*sets)


def _changed_parameters(figures: Sequence[WeightFigures]) -> frozenset[str]:
    """Return the parameters that the step changed, or that are equal to copies that it changed: an update may
    be below the precision of the parameter, and not of its copy."""
    followed = (frozenset(n for n, is_equal in f.masters.items() if is_equal) for f in figures)
    return _union(f.changed for f in figures) | _union(followed)


def _rounded(observed: Observations, figures: Sequence[WeightFigures]) -> frozenset[str]:
    """Return the parameters of 16 bits that no optimizer holds, if the step changed tensors of the optimizers
    that are not the model's: copies, as ZeRO has them, whose updates may round away. Otherwise return none.
    """
    optimizers = _optimizers(figures)
    if not any(o.foreign_changed for o in optimizers):
        return frozenset()
    own_names = _union(o.parameters for o in optimizers)
    half = {p.name for p in observed.trained if p.dtype.itemsize == 2}
    return frozenset(half - own_names - {n for f in figures for n in f.masters})


def _compared_parameters(observed: Observations, figures: Sequence[WeightFigures]) -> list[ObservedParameter]:
    """Return the trained parameters whose bits were compared on some rank."""
    compared = _union(f.compared for f in figures if f.compared is not None)
    return [p for p in observed.trained if p.name in compared]


def _optimizers(figures: Sequence[WeightFigures]) -> list[ObservedOptimizer]:
    return [f.optimizer for f in figures if f.optimizer is not None]


def _parameter_groups(figures: Sequence[WeightFigures]) -> list[OptimizerGroup]:
    """Return the parameter groups that hold parameters of the model or, if there are none, as where DeepSpeed
    updates copies, all groups."""
    groups = [g for optimizer in _optimizers(figures) for g in optimizer.groups]
    return [g for g in groups if g.names] or groups


def _missing(observed: Observations) -> list[ObservedParameter]:
    """Return the trained parameters that no optimizer holds and that did not change."""
    figures = _figures(observed)
    updated = _union(o.parameters for o in _optimizers(figures)) | _changed_parameters(figures)
    return [p for p in observed.trained if p.name not in updated]


def _is_certain(figures: Sequence[WeightFigures]) -> bool:
    """Return whether it is certain that parameters that no optimizer holds are not updated: beside the
    model's parameters, the optimizers have no tensors; or they have some, and a step that changed weights
    changed none of these; or some of these are whole tensors in place of sharded parameters. False if the
    optimizers have no tensors at all, because they may have them only while they step, as DeepSpeed's."""
    optimizers = _optimizers(figures)
    has_step = bool(_changed_parameters(figures))
    return any(o.parameters or o.foreign for o in optimizers) and (
        not any(o.foreign for o in optimizers)
        or any(o.unsharded for o in optimizers)
        or (has_step and not any(o.foreign_changed is None or o.foreign_changed for o in optimizers))
    )


def _gradients(figures: Sequence[WeightFigures]) -> Mapping[str, float]:
    """Return parameter -> the largest gradient of all ranks; infinity if its size is unknown or NaN."""
    largest: dict[str, float] = {}
    for name, value in (item for f in figures for item in f.gradients.items()):
        size = math.inf if value is None or math.isnan(value) else value
        largest[name] = max(largest.get(name, 0.0), size)
    return largest


def _were_zero(figures: Sequence[WeightFigures], gradients: Mapping[str, float]) -> Iterator[str]:
    """Yield the parameters that held only zeros before the step, on all ranks, and got a gradient that is not
    0."""
    for name, gradient in gradients.items():
        parts = [f.were_zero[name] for f in figures if name in f.were_zero]
        if gradient != 0 and parts and all(parts):
            yield name


def _parameters_without_gradient(figures: Sequence[WeightFigures]) -> frozenset[str]:
    """Return the parameters that the optimizer holds and whose gradients were not 0 in backward, but gone or
    0 when it stepped."""
    return _union(
        frozenset(n for n, v in f.gradients_at_update.items() if v == 0 and (f.gradients.get(n) or 0) != 0)
        for f in figures
    )


def _is_much(untrained: Sequence[ObservedParameter], due: Sequence[ObservedParameter]) -> bool:
    """Return whether ``untrained`` are all of ``due`` in some block, or have a quarter of the elements of all
    ``due``."""
    names = {p.name for p in untrained}
    blocks = {index for p in due for index in p.blocks}
    whole = any(all(p.name in names for p in due if index in p.blocks) for index in blocks)
    return bool(untrained) and (whole or _ratio(untrained, due) >= _MOST_UNTRAINED_RATIO)


def _ratio(part: Iterable[ObservedParameter], params: Iterable[ObservedParameter]) -> float:
    return sum(p.whole_elements for p in part) / max(1, sum(p.whole_elements for p in params))


def _join_names(params: Sequence[ObservedParameter]) -> str:
    return first_names([p.name for p in params], _NAMED)
