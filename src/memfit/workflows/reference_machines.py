"""Predict a job on machines of the catalog: at the size of its paper or at the user's, and the largest size
that fits each machine.

Nothing is run here. Every figure is composed from traces of the real model with few of its blocks.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from memfit import catalog
from memfit.jobs.registry import describe, load
from memfit.planner.capacity import fits_under
from memfit.planner.evaluate import PartDigest, PartKey, Predictor
from memfit.planner.plan_space import plans, usable
from memfit.planner.request import Planning, Progress, job_facts, limit_micro_batches
from memfit.planner.selection import MODELLED, best
from memfit.techniques.base import JobFacts, Technique
from memfit.trace.tracer import fake_model
from memfit.types.dependence import DependenceKind
from memfit.types.device_kind import device_kind
from memfit.types.errors import UserError
from memfit.types.job import JobRef
from memfit.types.machine import Machine
from memfit.types.plan import EffectClass, Plan, Use, use
from memfit.types.result import Estimate, LargestSize, Offer, PaperRow

MACHINES = ("RTX-4090", "A100-80GB-SXM", "H100-SXM")
LENGTHS = tuple(1024 * 2**k for k in range(8))  # 1,024 to 131,072
_FULL_LENGTH = ("650M", "3B", "15B", "124M", "1.3B")
# Techniques searched at paper size: those with the largest effect on memory, at one setting each.
_AT_PAPER = ("gradient-accumulation", "bf16-autocast", "activation-checkpointing", "adamw-8bit")


def paper(planning: Planning, progress: Progress) -> tuple[tuple[PaperRow, ...], tuple[Offer, ...]]:
    """Predict plain training and the best plan that fits on single accelerators of the catalog.

    Returns (rows, offers). ``rows``: predictions at the job's size "paper", one row for each of `MACHINES`;
    empty if the job has no such size. ``offers``: for every accelerator with a known price, plain training
    and, if another plan fits, the best one that does; at the size "paper", or at the job's present size if it
    has none.

    The best plan is the best by the request's goal. In rows it combines at most gradient accumulation, bf16
    autocast, recomputation of every block and 8-bit AdamW; for offers see `offers`, with the plan that the
    search recommends as the one that was trained.
    """
    ref = planning.request.job_ref
    has_paper_size = "paper" in sizes(ref.spec)
    predictors = _predictors(
        planning, _at_size(ref, "paper") if has_paper_size else ref, priced_accelerators()
    )
    rows = [
        _row(planning, predictor, progress)
        for predictor in predictors
        if has_paper_size and predictor.machine.name in MACHINES
    ]
    return tuple(rows), tuple(_offers(planning, predictors, progress))


def offers(planning: Planning, trained: Plan, progress: Progress) -> tuple[Offer, ...]:
    """Return predictions for the job at its present size on every single accelerator of the catalog with a
    known price: for each, plain training, and the best plan that fits by the request's goal, if there is one
    and it is another.

    ``trained``: the plan that a proof of concept trained. Plans whose effects on results its training tested
    are preferred to all others.
    """
    predictors = _predictors(planning, planning.request.job_ref, priced_accelerators())
    return tuple(_offers(planning, predictors, progress, trained))


def priced_accelerators() -> tuple[str, ...]:
    """Return the names of the catalog's accelerators that have a known price for purchase or for rental, in
    the catalog's order."""
    devices = map(catalog.device, catalog.device_names())
    return tuple(d.name for d in devices if d.usd_per_hour is not None or d.usd_to_buy is not None)


def _offers(
    planning: Planning, predictors: Sequence[Predictor], progress: Progress, trained: Plan | None = None
) -> Iterator[Offer]:
    """Yield for each predictor's machine a prediction of plain training, and one of the best plan that fits,
    if there is one and it is another.

    The best plan is sought by the request's goal among the plans of `_tested_plans`, whose effects on results
    were tested by training ``trained``. Only if none of these fits, it is sought among the combinations of
    gradient accumulation, bf16 autocast, recomputation of every block and 8-bit AdamW, whose effects were not
    tested. Plans that fit even at the upper end of their predicted memory are preferred to all others.
    ``trained`` None: the plan that the search recommends, or plain training if it recommends none.
    """
    if trained is None:
        recommendation = planning.result.recommended
        trained = recommendation.estimate.plan if recommendation is not None else Plan()
    for predictor in predictors:
        machine = predictor.machine
        progress("outlook", 0, 0, f"{predictor.job.size} on {machine.name}")
        fits = fits_under(int(machine.device.memory_bytes.value), machine)
        plain = predictor.sketch(Plan())
        yield make_offer(plain, machine=machine.name, size=predictor.job.size, plain=True, fits=fits(plain))
        for candidate_plans in (
            _tested_plans(planning, predictor, trained),
            _paper_plans(planning, predictor),
        ):
            recommended = best(
                _fitting(predictor, candidate_plans, fits, machine), planning.request.goal, MODELLED
            )
            if recommended is not None:
                break
        if recommended is not None and recommended.plan != plain.plan:
            yield make_offer(
                recommended, machine=machine.name, size=predictor.job.size, plain=False, fits=True
            )


def _fitting(
    predictor: Predictor, candidate_plans: Sequence[Plan], fits: Callable[[Estimate], bool], machine: Machine
) -> list[Estimate]:
    """Return the predictions for those of the plans that fit the machine. If the upper end of device memory
    fits for some of them, return only these. Empty if no plan fits."""

    def surely(sketch: Estimate) -> bool:
        device_bytes = sketch.device_bytes
        return device_bytes is None or device_bytes.high <= machine.device.memory_bytes.value

    fitting = [e for e in map(predictor.sketch, candidate_plans) if fits(e)]
    return [e for e in fitting if surely(e)] or fitting


def _usable(planning: Planning, predictor: Predictor) -> list[Technique]:
    """Return the techniques that the job, the predictor's machine and the accuracy in the request allow,
    without those that the user excluded."""
    techniques, _ = usable(
        predictor.job_facts, planning.request.accuracy, dependence=planning.predictor.dependence
    )
    return [t for t in techniques if t.name not in planning.request.bounds.without]


def _tested_plans(planning: Planning, predictor: Predictor, trained: Plan) -> list[Plan]:
    """Return the plans that combine the techniques of ``trained`` and those techniques of `_AT_PAPER` that
    change results by no more than the order of sums (E1).

    Techniques that change results by more than that have the same settings as in ``trained``. Gradient
    accumulation is not added if the samples of a batch depend on each other. Activation checkpointing
    recomputes every block.
    """
    techniques = _usable(planning, predictor)
    trained_names, dependence = trained.techniques, planning.predictor.dependence

    def mild(t: Technique) -> bool:
        splits_dependent = t.name == "gradient-accumulation" and dependence.kind is DependenceKind.DEPENDENT
        return t.effect <= EffectClass.E1 and not splits_dependent

    allowed = [t for t in techniques if t.name in trained_names or (t.name in _AT_PAPER and mild(t))]
    restricted_names = {t.name for t in allowed if t.effect > EffectClass.E1}
    return [
        p
        for p in plans(predictor.job_facts, allowed)
        if _one_setting(p) and all(p.get(n) in (None, trained.get(n)) for n in restricted_names)
    ]


def stage_offers(planned: Planning) -> Iterator[Offer]:
    """Yield predictions from a finished search: of plain training, and of the recommended plan if there is
    one and it is another."""
    result, machine, size = planned.result, planned.request.machine.name, planned.job.size
    baseline, recommended = result.baseline, result.recommended
    yield make_offer(baseline.estimate, machine=machine, size=size, plain=True, fits=baseline.fits)
    if recommended is not None and recommended.estimate.plan != baseline.estimate.plan:
        yield make_offer(recommended.estimate, machine=machine, size=size, plain=False, fits=True)


def make_offer(estimate: Estimate, *, machine: str, size: str, plain: bool, fits: bool) -> Offer:
    """Return the prediction as an Offer for ``machine``. ``size``: name of the job's size; ``plain``: whether
    the plan is plain training; ``fits``: whether it fits the machine.

    The offer's memory is all that is held on the device if that is predicted, else the peak of live tensors.
    """
    step_s, energy_j = estimate.step_s, estimate.energy_j
    return Offer(
        machine=machine,
        size=size,
        plan=estimate.plan.label,
        plain=plain,
        fits=fits,
        memory_bytes=estimate.device_bytes or estimate.allocated_bytes,
        step_s=step_s,
        power_w=energy_j / step_s.value if energy_j is not None and step_s is not None else None,
    )


def sizes(spec: str) -> tuple[str, ...]:
    """Return the names of the sizes of the built-in job called ``spec``; empty if there is no such built-in
    job."""
    return next((b.sizes for b in describe() if b.name == spec), ())


def _predictors(planning: Planning, ref: JobRef, machines: Sequence[str] = MACHINES) -> list[Predictor]:
    """Return one predictor of the job ``ref`` for each of ``machines`` (names in the catalog), in the same
    order. Those of devices with the same kernels share the traces of parts of the model. Whether the samples
    of a batch depend on each other is taken from ``planning``."""
    job = load(ref)
    place = planning.request.machine.place
    digests_by_kernels: dict[tuple[str, tuple[int, int]], dict[PartKey, PartDigest]] = {}
    facts_by_kind: dict[str, JobFacts] = {}
    predictors = []
    for name in machines:
        machine = catalog.machine(name, place.name if place else "world")
        kind = device_kind(machine.device.trace_kind)
        if kind.name not in facts_by_kind:
            facts_by_kind[kind.name] = job_facts(job, kind.name)
        predictor = Predictor(job=job, machine=machine, job_facts=facts_by_kind[kind.name])
        predictor.dependence = planning.predictor.dependence  # of the same model at a smaller size
        limit_micro_batches(predictor, planning.request.accuracy)
        kernels = kind.name, kind.attention_since
        predictor.part_digests = digests_by_kernels.setdefault(kernels, {})
        predictors.append(predictor)
    return predictors


def _row(planning: Planning, predictor: Predictor, progress: Progress) -> PaperRow:
    machine = predictor.machine
    fits = fits_under(int(machine.device.memory_bytes.value), machine)
    progress("outlook", 0, 0, f"{predictor.job.size} on {machine.name}")
    plain = predictor.sketch(Plan())
    fitting = _fitting(predictor, _paper_plans(planning, predictor), fits, machine)
    return PaperRow(
        machine=machine.name,
        size=predictor.job.size,
        device_memory_bytes=int(machine.device.memory_bytes.value),
        plain=plain,
        plain_fits=fits(plain),
        recommended=best(fitting, planning.request.goal, MODELLED),
    )


def _paper_plans(planning: Planning, predictor: Predictor) -> list[Plan]:
    techniques = _usable(planning, predictor)
    allowed = [t for t in techniques if t.name in _AT_PAPER]
    return [p for p in plans(predictor.job_facts, allowed) if _one_setting(p)]


def _one_setting(plan: Plan) -> bool:
    recompute = plan.get("activation-checkpointing")
    return recompute is None or recompute.settings["every"] == 1


def reach(planning: Planning, progress: Progress) -> tuple[LargestSize, ...]:
    """Return the largest model that fits each of `MACHINES`, then the longest input that does; each with
    plain training, and with a plan of bf16 autocast, recomputation of every block, 8-bit AdamW and the
    smallest micro-batches, each only if the job, the machine and the user allow it.

    The models tried are the job's sizes 650M, 3B, 15B, 124M and 1.3B; smaller sizes have samples cut to the
    available data. The inputs tried have the `LENGTHS` (1,024 to 131,072), at the size "paper" with a batch
    of one sample. There are no entries for models if the job has none of these sizes, and none for inputs if
    it has no size "paper" or its samples have no length.
    """
    job = planning.request.job_ref
    models = {s: _at_size(job, s) for s in sizes(job.spec) if s in _FULL_LENGTH}
    inputs = {}
    if "paper" in sizes(job.spec):
        inputs = {str(n): dataclasses.replace(_at_size(job, f"paper@{n}"), batch=1) for n in LENGTHS}
    rows = []
    for quantity, versions in (
        ("parameters", _Versions(planning, models)),
        ("length", _Versions(planning, inputs)),
    ):
        for index, machine in enumerate(MACHINES if versions.can_load() else ()):
            progress("outlook", 0, 0, f"{quantity} on {machine}")
            plain, saving = (versions.find_largest(index, saving=saving) for saving in (False, True))
            rows.append(_reach_row(machine, quantity, plain, saving, versions, index))
    return tuple(rows)


def _at_size(ref: JobRef, size: str) -> JobRef:
    return dataclasses.replace(ref, size=size, batch=None, length=None, steps=None, data=None, weights=None)


@dataclasses.dataclass(kw_only=False)
class _Versions:
    """Versions of a job by increasing size (``jobs``: name -> job). Each is loaded only once for all
    `MACHINES`."""

    planning: Planning
    jobs: Mapping[str, JobRef]
    loaded: dict[str, list[Predictor]] = dataclasses.field(default_factory=dict)
    has_removed: bool = False  # a version could not be loaded: it and the larger ones were removed

    def can_load(self) -> bool:
        """Return whether there is a smallest version and it can be loaded. It cannot if the versions differ
        in length and the job has none, as one on grids or on molecules in space."""
        try:
            return bool([self.predictor(name, 0) for name in list(self.jobs)[:1]])
        except UserError:
            return False

    def predictor(self, name: str, index: int) -> Predictor:
        if name not in self.loaded:
            try:
                self.loaded[name] = _predictors(self.planning, self.jobs[name])
            except UserError:  # the available data are shorter
                names = list(self.jobs)
                self.jobs = {n: self.jobs[n] for n in names[: names.index(name)]}
                self.has_removed = True
                raise
        return self.loaded[name][index]

    def find_largest(self, index: int, *, saving: bool) -> str | None:
        """Return the name of the largest version that fits the machine ``MACHINES[index]``; None if not even
        the smallest fits.

        ``saving``: True: with the allowed plan that needs the least memory; False: with plain training. If a
        version cannot be loaded, it and all larger ones are left out. The search is a bisection, which
        assumes that no version fits that is larger than one that does not.
        """
        while True:
            names = list(self.jobs)
            try:
                below = bisect.bisect_left(
                    names, True, key=lambda name: not self._fits(name, index, saving=saving)
                )
            except UserError:
                if not self.has_removed:
                    raise
                self.has_removed = False
            else:
                return names[below - 1] if below else None

    def _fits(self, name: str, index: int, *, saving: bool) -> bool:
        predictor = self.predictor(name, index)
        plan = _least_memory_plan(self.planning, predictor) if saving else Plan()
        fits = fits_under(int(predictor.machine.device.memory_bytes.value), predictor.machine)
        return fits(predictor.sketch(plan))


def _reach_row(
    machine: str, quantity: str, plain: str | None, saving: str | None, versions: _Versions, index: int
) -> LargestSize:
    def amount(name: str | None) -> float | None:
        if name is None:
            return None
        if quantity == "length":
            return float(name)
        model = fake_model(versions.predictor(name, index).job)
        return float(sum(p.numel() for p in model.parameters()))

    label = "paper" if quantity == "length" else None
    return LargestSize(
        machine=machine,
        quantity=quantity,
        plain=amount(plain),
        recommended=amount(saving),
        plain_label=label or plain or "",
        recommended_label=label or saving or "",
        at_limit=saving == list(versions.jobs)[-1],
    )


def _least_memory_plan(planning: Planning, predictor: Predictor) -> Plan:
    """Return the plan that counts as the allowed one with the least memory: bf16 autocast, recomputation of
    every block, 8-bit optimizer state, and gradient accumulation with the smallest micro-batches, each only
    if the job, the machine and the user allow it. No other plan is tried."""
    names = {t.name for t in _usable(planning, predictor)}
    uses: list[Use] = [use("bf16-autocast"), use("activation-checkpointing", every=1), use("adamw-8bit")]
    if predictor.job_facts.micro_batch_counts[-1] > 1:
        uses.append(use("gradient-accumulation", micro_batches=predictor.job_facts.micro_batch_counts[-1]))
    return Plan(uses=tuple(u for u in uses if u.technique in names))
