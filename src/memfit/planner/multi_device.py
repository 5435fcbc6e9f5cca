"""The complete search for many devices: price grids, trace finalists, answer, and say what more would bring.

Nothing depends on how long a computation took, so the answer is the same every time.
"""

from __future__ import annotations

from memfit.planner.device_pricing import Aim, Scale
from memfit.planner.evaluate import Pricer
from memfit.planner.explanations import cannot, credible, nothing, rivals, sensitivity, smallest_traced
from memfit.planner.multi_device_shortlist import Race
from memfit.planner.plan_space import dependence_reasons, may_share
from memfit.planner.selection import Objective, best, frontier, keeps
from memfit.techniques.registry import effect_of, plain
from memfit.types.result import Choice, Estimate, Reason, SearchResult


def counts(ranks: int, goal: Objective) -> tuple[int, ...]:
    """Return the device counts to try: all devices, and also fewer where the goal can prefer fewer."""
    if goal in (Objective.FASTEST, Objective.SMALLEST):
        return (ranks,)
    fewer = [ranks]
    while fewer[-1] % 2 == 0:
        fewer.append(fewer[-1] // 2)
    return tuple(fewer)


def search_scale(pricer: Pricer, ranks: int, aim: Aim) -> SearchResult:
    """Search plans for up to ``ranks`` devices.

    Raises NothingFits with the changes that would help, and UserError if the batch cannot be divided.
    """
    scale, goal = Scale(pricer, aim), aim.goal

    unshared = plain(min(ranks, pricer.job.batch_size))  # each replica needs at least one sample
    shared = unshared.ranks == 1 or may_share(pricer.dependence, aim.accuracy)
    whole = aim.bounds.micro_batch in (0, pricer.job.batch_size // unshared.ranks)

    def fits(estimate: Estimate) -> bool:
        asked = estimate.plan != unshared or (whole and shared)
        return asked and scale.fits_memory(estimate) and keeps(aim.bounds, estimate)

    sizes = counts(ranks, goal)
    estimates = scale.over(sizes)
    finalists = Race(scale, fits).run(estimates, unshared)
    tried = {e.plan for e in finalists}
    known = [*finalists, *(e for e in estimates if e.plan not in tried and e.plan not in scale.refused)]
    basis = next((e for e in known if e.plan == unshared), None)
    if basis is None or (not basis.traced and fits(basis)):
        basis = scale.billed(scale.pricer.whole(unshared))
    known = [e for e in known if e.plan != basis.plan]
    winner = best([e for e in (*finalists, basis) if e.traced and fits(e)], goal)
    if winner is None:
        bounds = ((aim.bounds.deadline_s, Objective.FASTEST), (aim.bounds.budget_usd, Objective.CHEAPEST))
        for asked, best_by in bounds:  # how close the best plans by these goals come
            if asked is not None:
                finalists = [*finalists, *Race(scale, scale.fits_memory, best_by).run(estimates, unshared)]
        raise nothing(scale, [*finalists, basis], ranks)
    expected = [scale.expected(e) for e in known]  # compare like with like
    choices = [e for e in frontier([*(e for e in expected if credible(e, winner, goal)), basis]) if fits(e)]
    by_plan = {e.plan: e for e in (winner, basis, *choices)}
    smallest = min(by_plan.values(), key=lambda e: e.allocated_bytes.value)

    def choice(e: Estimate, reasons: tuple[Reason, ...] = ()) -> Choice:
        held = not e.traced or fits(e)  # sketches that do not fit are in no choice
        return Choice(estimate=e, fits=held, effect=effect_of(e.plan, e.dependence), reasons=reasons)

    sketch, told = scale.sketch_of(winner.plan), {e.plan for e in known}
    beside = scale.beside(sketch) if sketch is not None else []
    expected += [scale.expected(e) for e in beside if e.plan not in told]
    priced = [*expected, basis]
    sure = {e.plan: e for e in smallest_traced(scale, winner, priced, fits)}
    priced = [sure.get(e.plan, e) for e in priced]
    why = (*rivals(scale, winner, priced, fits), *cannot(scale))
    recommended = choice(winner, (*dependence_reasons(winner.plan, pricer.dependence), *why))
    considered = sum(f.considered for n, f in scale.found.items() if n in sizes)
    ordered = sorted(by_plan.values(), key=lambda e: e.allocated_bytes.value)
    return SearchResult(
        goal=goal.value,
        cap_bytes=aim.cap_bytes,
        considered=considered,
        baseline=choice(basis),
        frontier=tuple(recommended if e is winner else choice(e) for e in ordered),
        recommended=recommended,
        smallest=choice(smallest),
        sensitivity=tuple(sensitivity(scale, winner, known, ranks)),
    )
