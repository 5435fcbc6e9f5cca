"""The complete workflow of a proof of concept (PoC): trace, cost, search, run, measure, verify, record,
report. Only here do these stages meet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from memfit.cost.memory import timeline
from memfit.cost.step_time_calibration import correct_calibration, factor
from memfit.decision import case as cases
from memfit.decision import rollout_gates
from memfit.decision.decide import decide as decide_on
from memfit.decision.projects import default_case
from memfit.engines.registry import engine
from memfit.files.read import read_text
from memfit.files.replace import must_be_writable
from memfit.monitoring.record import WatchRecord
from memfit.planner.machine_calibration import calibrate
from memfit.planner.request import Planning, Progress, Request, autocast, model_sizes
from memfit.planner.selection import Objective
from memfit.planner.single_device import is_long
from memfit.planner.technique_groups import best_of_groups
from memfit.planner.workload import workload_of
from memfit.report.case import case_offers
from memfit.report.html import write_html
from memfit.report.words import load_words
from memfit.runtime import local_machine
from memfit.store.database import Store
from memfit.store.environment import fingerprint
from memfit.store.pocs import resolve_poc_id, store_attended_minutes, stored_poc
from memfit.techniques.registry import effect_of, make_plain_plan, without
from memfit.types import serialization
from memfit.types.decision import Decision
from memfit.types.errors import RunError, UserError
from memfit.types.job import JobRef
from memfit.types.launch import RunSpec
from memfit.types.machine import Calibration, Device
from memfit.types.plan import Plan, Use, use
from memfit.types.result import (
    Cause,
    ControlResult,
    Interaction,
    Measurement,
    NamedVerdict,
    Offer,
    OutcomeKind,
    Poc,
    PreparedRun,
    Reproducibility,
    Run,
    Verdict,
    VerdictKind,
)
from memfit.verify import reproducibility, verdict
from memfit.verify.aggregate import median_step_s
from memfit.verify.sensitivity import degrade_run, judge_pair, judge_study, power_study, with_control
from memfit.workflows import reference_machines
from memfit.workflows.effort import effort
from memfit.workflows.plan import find_plan
from memfit.workflows.single_run import anatomy, explain, run_plan, run_spec
from memfit.workflows.sweep import (
    Budget,
    Placement,
    RunSettings,
    Sweep,
    SweepTrial,
    TrialResult,
    TrialState,
    prepared_trial,
)

__all__ = [
    "Objective",
    "Planning",
    "Progress",
    "Request",
    "anatomy",
    "explain",
    "poc",
    "report",
    "run_plan",
    "store_attended_minutes",
    "stored_poc",
]

# Records beside a PoC's own: the user's figures, later predictions, machines of stages, limits.
CASE, OFFER, STAGE, GATES = "case", "offer", "stage", "gates"
REPORTS = "reports"  # folder beside the store
_KEPT_GATES = "the gates stored by the last memfit decide --gates (memfit decide --gates default resets them)"
BASELINE, RECOMMENDED, ABLATION = "baseline", "recommended", "ablation"
REPEATED, CONTROL = "recommended again", "negative control"
_TIMELINE_POINTS = 400
_TRIALS_S = 60.0  # seconds of a proof of concept for rivals of its recommendation; half with one seed
# facts that must agree for machines whose times correct each other
_SAME = ("device", "processor", "cores", "torch", "env OMP_NUM_THREADS")
_CHECKPOINTING = use("activation-checkpointing", every=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Where the runs of a PoC are made side by side. ``agree``: called once, with the runs that have no
    result yet, if there are any; returns the budget."""

    placement: Placement
    agree: Callable[[Sequence[SweepTrial]], Budget]


def poc(  # noqa: PLR0913
    request: Request,
    *,
    store: Store,
    seeds: int,
    steps: int | None,
    report_path: Path | None,
    lang: str,
    command: str,
    progress: Progress,
    side_by_side: SideBySide | None = None,
) -> Poc:
    """Run a proof of concept (PoC) and return it: search a plan; train the baseline (plain training), the
    recommended plan and ablations (variants of these two); judge whether the results of each plan are
    equivalent to those of the baseline; write the report.

    If the metric says that they are, the job's negative control must be judged different, or the verdict is
    "not_sensitive": by the job's stored power study, or else by training the control with seed 0.

    Every run is stored in ``store`` as soon as it ends. If the request is for this machine, the batch is
    first halved until plain training fits its free memory or has one sample per rank.

    ``seeds``: number of pairs of runs of baseline and recommended plan; their seeds count from 0. ``steps``:
    optimizer steps of each run; None: the job's own number. ``report_path`` None: a file in the folder
    "reports" beside the store. ``lang``: language of the report. ``command``: command line that the PoC
    records. ``side_by_side``: an executor makes the runs, several at a time; those that one has made for an
    earlier PoC, finished or not, are taken from ``store`` if they completed or memory ran out under the cap.
    None: all are made here, one after the other. Raises NothingFits if no plan fits; SearchInterrupted on
    Ctrl-C while plans are searched; UserError for a language without a catalog, if the report's folder cannot
    be written, or if the request or the job is wrong; RunError if operators cannot be timed, or if the budget
    of ``side_by_side`` does not suffice.
    """
    load_words(lang)  # a wrong language is an error before anything is trained
    must_be_writable(report_path.parent if report_path else store.path.parent / REPORTS, "the report")
    started = time.perf_counter()
    parallel = 1 if side_by_side is None else int(side_by_side.placement.settings.get("parallel", "1"))
    if parallel > 1 and not request.threads:  # runs side by side on this machine share its threads
        threads = max(1, local_machine.threads() // (parallel * request.ranks))
        request = dataclasses.replace(request, threads=threads)
    planning = find_plan(request, progress, must_run=True, measure_s=min(_TRIALS_S, _TRIALS_S / 2 * seeds))
    runner = _PocRunner(planning, store, seeds, steps or planning.job.steps, command, progress)
    proof = runner.begin(request)
    specs = list(runner.specs())
    calibrate(
        planning.predictor, planning.request, progress, plans=list(dict.fromkeys(s.plan for s in specs))
    )
    specs = runner.shorten(specs)
    if side_by_side is not None:
        proof = runner.add_runs(proof, specs, side_by_side)
    else:
        for index, spec in enumerate(specs):
            label = f"{spec.name} ({index + 1} of {len(specs)})"
            proof = runner.add_run(proof, spec, label)
    proof = runner.conclude(runner.add_control(proof, side_by_side))
    path = report_path or store.path.parent / REPORTS / f"{proof.poc_id}.{lang}.html"
    proof = dataclasses.replace(proof, took_s=time.perf_counter() - started, report=str(path))
    store.append(proof.poc_id, "poc", proof)
    decision = decide_on(proof, default_case(proof, lang), by_default=True)
    write_html(proof, path, lang=lang, decision=decision)
    return proof


def report(
    store: Store,
    *,
    poc_id: str | None,
    path: Path | None,
    lang: str,
    case: Path | None = None,
    watch: WatchRecord | None = None,
) -> Path:
    """Write the HTML report of a stored PoC, with its decision, to ``path``, and return that path. ``poc_id``
    None: the latest PoC. ``path`` None: memfit-ID.LANG.html in the current folder.

    The report of an interrupted PoC shows the runs that ended. ``case``: file with the user's figures, as in
    `decide`. ``watch``: the record of a watched training, which becomes a chapter. Raises UserError if there
    is no such PoC, if the file or what is stored is wrong, for a language without a catalog, and if the
    report cannot be written.
    """
    proof, decision = decide(store, poc_id=poc_id, case=case, lang=lang)
    path = path or Path(f"memfit-{proof.poc_id}.{lang}.html")
    return write_html(proof, path, lang=lang, decision=decision, watch=watch)


def decide(store: Store, *, poc_id: str | None, case: Path | None, lang: str = "en") -> tuple[Poc, Decision]:
    """Return a stored PoC, and the decision about adopting its recommended plan. ``poc_id`` None: the latest
    PoC.

    ``case``: file with the user's figures (`DecisionCase`), such as prices; it is then stored with the PoC.
    None: the last such file stored with the PoC, or defaults if there is none: a typical project of the job,
    and currency and place by ``lang``, the language of the reader. Also taken into account are
    the predictions for other machines that were stored with the PoC, the machines of its stages, and the last
    stored limits of the gates.

    Raises UserError if there is no such PoC, or if the file or what is stored is wrong.
    """
    resolved_id = resolve_poc_id(store, poc_id)
    proof = stored_poc(store, resolved_id)
    case_records = store.records(resolved_id, CASE)
    if case is not None:
        user_case, name = cases.read(case), str(case)
    elif case_records:
        last_case = json.loads(case_records[-1].body)
        user_case, name = (
            cases.parse_case(last_case["text"], f"the stored case, {last_case['name']},"),
            last_case["name"],
        )
    else:
        user_case, name = default_case(proof, lang), ""
    later_offers = offers_of(store, resolved_id)
    stage_machines = {
        s["name"]: s["machine"] for s in map(json.loads, (r.body for r in store.records(resolved_id, STAGE)))
    }
    decision = decide_on(
        proof,
        user_case,
        more=later_offers,
        name=name,
        named=stage_machines,
        limits=stored_gates(store, resolved_id),
        by_default=case is None and not case_records,
    )
    if case is not None:
        store.append(resolved_id, CASE, {"name": name, "text": read_text(case)})
    return proof, decision


def stored_gates(store: Store, poc_id: str) -> rollout_gates.Gates:
    """Return the limits of the gates that were stored last with this PoC, or memfit's own if there are none.
    Raises UserError if the stored limits are wrong."""
    records = store.records(poc_id, GATES)[-1:]  # earlier ones may be of an older version
    limits = [rollout_gates.parse_gates(json.loads(r.body)["text"], _KEPT_GATES) for r in records]
    return limits[0] if limits else rollout_gates.Gates()


def offers_of(store: Store, poc_id: str) -> list[Offer]:
    """Return the predictions for other machines that were stored with this PoC after it was made, oldest
    first. Empty if there are none. Raises UserError if what is stored is wrong."""
    return [
        serialization.loads(Offer, r.body, what=f"record {r.record_id}") for r in store.records(poc_id, OFFER)
    ]


def correct_step_times(request: Request, store: Store, poc_id: str | None) -> Request:
    """Return the request with its predicted step times corrected by the runs of a PoC: by the ratio of
    measured to predicted step time. ``poc_id`` None: the latest PoC. Of several runs of one plan, the median
    ratio counts.

    Raises UserError if there is no such PoC; if it ran another job than the request's; if the request is not
    for this machine; if the kind of device, the processor, its number of cores, torch's version or
    OMP_NUM_THREADS are not as in the PoC; or if no run of the PoC completed with a measured and a predicted
    step time.
    """
    resolved_id = resolve_poc_id(store, poc_id)
    proof, environment = stored_poc(store, resolved_id), fingerprint()
    job = proof.runs[0].spec.job.spec if proof.runs else proof.job_name
    if not request.is_here or job != request.job_ref.spec:
        raise UserError(
            f"PoC {resolved_id} ran {job} on this machine, so it cannot correct predictions for another job "
            "or machine",
            allowed="the same job, on this machine",
        )
    ran_on = proof.runs[0].spec.device if proof.runs else request.device_kind
    then = {**proof.environment, "device": ran_on}
    now = {**environment, "device": request.device_kind}
    changed_facts = [name for name in _SAME if then.get(name) != now.get(name)]
    if changed_facts:
        changed_facts_text = "; ".join(f"{n} {then.get(n)} then, {now.get(n)} now" for n in changed_facts)
        raise UserError(
            f"PoC {resolved_id} cannot correct predictions, because it ran in a different environment: "
            f"{changed_facts_text}",
            hint="run `memfit poc` again here, and name the new PoC with --corrected-by",
        )
    # The PoC's trials had already corrected the predictions of its runs. Their factor is taken out again.
    trial_ratios = [
        (t.plan, min(t.step_s) / t.predicted_s) for t in proof.search.trials if t.step_s and t.predicted_s
    ]
    by_trials = correct_calibration(Calibration(), trial_ratios, source="")
    ratios: dict[Plan, list[float]] = {}
    for run in proof.runs:
        seconds = median_step_s(run.measurement)
        if run.measurement.outcome is OutcomeKind.OK and seconds and run.predicted_step_s:
            ratio = seconds / run.predicted_step_s * factor(by_trials, run.spec.plan)
            ratios.setdefault(run.spec.plan, []).append(ratio)
    if not ratios:
        raise UserError(
            f"no run of PoC {resolved_id} completed with a measured and a predicted step time, so it cannot "
            "correct predictions",
            hint="name another PoC with --corrected-by",
        )
    median_ratios = [(plan, statistics.median(plan_ratios)) for plan, plan_ratios in ratios.items()]
    return dataclasses.replace(
        request, correction=correct_calibration(request.correction, median_ratios, source=resolved_id)
    )


@dataclasses.dataclass(kw_only=False)
class _PocRunner:
    """Makes a PoC in steps: lists its runs, trains and stores them one by one, and judges them at the end.

    ``planning``: the finished search. ``seeds``: number of pairs of runs of baseline and recommended plan.
    ``steps``: optimizer steps of each run. ``command``: command line that the PoC records. ``budget``: what
    an executor may still use; None: not agreed on yet.
    """

    planning: Planning
    store: Store
    seeds: int
    steps: int
    command: str
    progress: Progress
    budget: Budget | None = None

    @property
    def recommended(self) -> Plan:
        choice = self.planning.result.recommended
        assert choice is not None, "search raises NothingFits otherwise"
        return choice.estimate.plan

    @property
    def baseline(self) -> Plan:
        return make_plain_plan(self.planning.request.ranks)

    @property
    def mixed(self) -> Use:
        return autocast(self.planning.predictor.job_facts)

    def begin(self, original_request: Request) -> Poc:
        job, result, request = self.planning.job, self.planning.result, self.planning.request
        # Other machines and sizes are only reported for one device, and for models that are traced quickly.
        metric, covers_other_sizes = job.metric, request.ranks == 1 and not is_long(self.planning.predictor)
        paper, offers = (
            reference_machines.paper(self.planning, self.progress)
            if covers_other_sizes
            else ((), case_offers(job.name))
        )
        proof = Poc(
            poc_id=f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=self.command,
            job_name=job.name,
            job_title=job.title or job.name,
            job_size=job.size,
            data_source=job.data_source,
            parameter_count=self.planning.predictor.trace(self.baseline).parameter_count,
            workload=workload_of(job, request.machine.name),
            metric=metric.name if metric else "",
            metric_unit=metric.unit if metric else "",
            metric_naive=metric.naive if metric else None,
            metric_naive_name=metric.naive_name if metric else "",
            metric_margin_source=metric.margin_source if metric else "",
            machine=request.machine.name,
            environment=fingerprint(),
            cap_bytes=self.planning.cap_bytes,
            cap_reason=self.planning.cap_reason,
            search=result,
            runs=(),
            verdicts=(),
            interactions=(),
            reproducibility=Reproducibility(reproducible=None),
            effort=effort(request.job_ref, self.recommended, (), self.store),
            predicted_timeline_bytes={
                name: timeline(self.planning.predictor.trace(plan), _TIMELINE_POINTS)
                for name, plan in ((BASELINE, self.baseline), (RECOMMENDED, self.recommended))
            },
            place=request.machine.place.name if request.machine.place else "",
            paper=paper,
            offers=offers,
            reach=reference_machines.reach(self.planning, self.progress) if covers_other_sizes else (),
            steps_per_run=self.steps,
            notes=_notes(
                request.job_ref,
                original_request.job_ref,
                covers_other_sizes=covers_other_sizes or request.ranks > 1,
            ),
            finished=False,
        )
        self.store.append(proof.poc_id, "begin", proof)
        return proof

    def specs(self) -> Iterator[RunSpec]:
        """Yield the runs of the PoC in the order in which they are made.

        1. The baseline with seed 0 under the memory cap.
        2. For each seed: the baseline without the cap, then the recommended plan under it. Running them in
           turn exposes both to the same noise.
        3. The recommended plan again with seed 0 under the cap, to test whether a run is reproducible. If all
           its steps would take more than half a minute, it has fewer (`shorten`).
        4. Ablations, all with seed 0 and without the cap: the recommended plan without each of its techniques
           in turn; the best plan that fits with autocast, with recomputation and, on several ranks, with
           sharded states (`best_of_groups`); plain training with autocast; and, if the model has repeated
           blocks, plain training with checkpointing, then with autocast and checkpointing.

        Ablations are left out if their plan was already yielded or has a technique that the user excluded.
        """
        yield self._spec(BASELINE, BASELINE, self.baseline, seed=0, capped=True)
        for seed in range(self.seeds):
            yield self._spec(BASELINE, BASELINE, self.baseline, seed=seed)
            yield self._spec(RECOMMENDED, RECOMMENDED, self.recommended, seed=seed, capped=True)
        yield self._spec(REPEATED, RECOMMENDED, self.recommended, seed=0, capped=True)
        known_plans, excluded_techniques = (
            {self.baseline, self.recommended},
            self.planning.request.bounds.without,
        )
        for name, plan in self._ablations():
            if plan not in known_plans and not any(plan.get(technique) for technique in excluded_techniques):
                known_plans.add(plan)
                yield self._spec(name, ABLATION, plan, seed=0)

    def _ablations(self) -> Iterator[tuple[str, Plan]]:
        for technique_use in self.recommended.uses:
            reduced_plan = without(self.recommended, technique_use.technique)
            with contextlib.suppress(UserError):  # a budget that cannot be met without it
                yield f"without {technique_use.technique}", self.planning.predictor.resolve(reduced_plan)
        for group, plan in best_of_groups(self.planning):
            yield f"best with {group}", plan
        yield "precision only", self.baseline.with_use(self.mixed)
        if self.planning.predictor.job_facts.block_count:
            yield "checkpointing only", self.baseline.with_use(_CHECKPOINTING)
            combined_plan = self.baseline.with_use(self.mixed).with_use(_CHECKPOINTING)
            yield "precision and checkpointing", combined_plan

    def _spec(self, name: str, role: str, plan: Plan, *, seed: int, capped: bool = False) -> RunSpec:
        request, job = self.planning.request, self.planning.job
        engine_name = "native" if engine(request.engine).refusals(plan) else request.engine
        return RunSpec(
            name=name,
            role=role,
            job=request.job_ref,
            plan=plan,
            engine=engine_name,
            seed=seed,
            steps=self.steps,
            batch_size=job.batch_size,
            clip=job.clip,
            sizes=model_sizes(engine_name, job),
            cap_bytes=self.planning.cap_bytes if capped else None,
            device=request.device_kind,
            threads=request.threads or max(1, local_machine.threads() // request.ranks),
            timeline=seed == 0,
        )

    def shorten(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        """Return the runs, with those shortened that take long and on which no verdict on the recommended
        plan rests: the ablations, whose steps may take 25 seconds for each of the PoC's seeds all together,
        and the repeated run, whose steps may take 25 seconds.

        The time is shared out in equal parts, the quickest ablation first, by predicted step times. A run
        that takes longer than its part is returned without evaluation and with as many steps as fit, at least
        5: it then shows no accuracy. Runs without a predicted step time are unchanged.
        """
        shortened = dict[str, RunSpec]()
        for names, limit_s in (
            ({spec.name for spec in specs if spec.role == ABLATION}, _SHORT_S * self.seeds),
            ({REPEATED}, _SHORT_S),
        ):
            chosen = [spec for spec in specs if spec.name in names]
            steps = ((spec, self.planning.predictor.whole(spec.plan).step_s) for spec in chosen)
            timed = sorted(((step.value, spec) for spec, step in steps if step), key=lambda pair: pair[0])
            left_s = limit_s
            for index, (step_s, spec) in enumerate(timed):
                count = max(_FEWEST_STEPS, int(left_s / (len(timed) - index) / step_s))
                if count < spec.steps:
                    shortened[spec.name] = dataclasses.replace(spec, steps=count, evaluate=False)
                left_s -= min(count, spec.steps) * step_s
        return [shortened.get(spec.name, spec) for spec in specs]

    def add_run(self, poc: Poc, spec: RunSpec, label: str) -> Poc:
        run = run_spec(spec, self.planning.predictor.whole(spec.plan), self.progress, label)
        self.store.append(poc.poc_id, "run", run)
        return dataclasses.replace(poc, runs=(*poc.runs, run))

    def add_runs(self, poc: Poc, specs: Sequence[RunSpec], side_by_side: SideBySide) -> Poc:
        """Return the PoC with the runs of ``specs``, made by an executor (``side_by_side``). Each is stored
        as soon as it ends. A run that reported nothing has failed. Raises RunError if the budget did not
        suffice for all."""
        runs, notes = self._by_executor(poc.poc_id, "run", specs, side_by_side)
        return dataclasses.replace(poc, runs=runs, notes=(*poc.notes, *notes))

    def _by_executor(
        self, poc_id: str, kind: str, specs: Sequence[RunSpec], side_by_side: SideBySide
    ) -> tuple[tuple[Run, ...], tuple[str, ...]]:
        """Return (the runs of ``specs``, in their order; sentences on where they were made). Each run is
        stored as a row of ``kind`` as soon as it ends. One that reported nothing is returned as failed and is
        not stored. Raises RunError if the budget did not suffice for all, and UserError as
        ``side_by_side.agree`` and `Sweep.run` do."""
        prepared = [
            PreparedRun(spec=spec, estimate=self.planning.predictor.whole(spec.plan)) for spec in specs
        ]
        trials = [prepared_trial(each, side_by_side.placement) for each in prepared]
        stored: set[str] = set()

        def store_ended(sweep: Sweep) -> None:
            ended = [r for r in sweep.results if r.run is not None and r.trial.trial_id not in stored]
            for result in ended:
                self.store.append(poc_id, kind, result.run)
                stored.add(result.trial.trial_id)
            running = [r.trial.plan_name for r in sweep.results if r.state is TrialState.RUNNING]
            self.progress("run", len(stored), len(sweep.results), ", ".join(running))

        with Sweep(trials, RunSettings(), self.store) as sweep:
            if sweep.left:
                self.budget = self.budget or side_by_side.agree(sweep.left)
                sweep.run(self.budget, store_ended)
                self.budget = self.budget.minus(sweep.hours, sweep.usd or 0.0)
            store_ended(sweep)
        if any(result.state is TrialState.NOT_RUN for result in sweep.results):
            raise RunError(
                f"the budget sufficed for {len(stored)} of {len(trials)} runs; the same command makes the "
                "others, with a new budget"
            )
        runs = tuple(_run_of(result, each) for result, each in zip(sweep.results, prepared, strict=True))
        return runs, tuple(_notes_on_places(sweep, self.planning.request.machine.device))

    def add_control(self, poc: Poc, side_by_side: SideBySide | None = None) -> Poc:
        """Return the PoC with a run of the job's negative control, trained with seed 0 and stored, if the
        metric judges the recommended plan equivalent and there is no stored power study; otherwise
        unchanged. Raises RunError as `add_runs` does."""
        baseline_runs, recommended_runs = _judged_runs(poc.runs)
        outcome = self._verdict(baseline_runs, recommended_runs)
        if outcome.kind is not VerdictKind.EQUIVALENT or not outcome.metric:
            return poc
        plain_spec = baseline_runs[0].spec
        if power_study(self.planning.job, plain_spec) is not None:
            return poc
        spec = degrade_run(
            dataclasses.replace(plain_spec, name=CONTROL, role=CONTROL), self.planning.job.negative_control
        )
        if side_by_side is not None:
            (run,), _ = self._by_executor(poc.poc_id, "control", [spec], side_by_side)
        else:
            label = f"{CONTROL}: {spec.degraded}"
            run = run_spec(spec, self.planning.predictor.whole(spec.plan), self.progress, label)
            self.store.append(poc.poc_id, "control", run)
        return dataclasses.replace(poc, control=run)

    def conclude(self, poc: Poc) -> Poc:
        runs = poc.runs
        baseline_runs, recommended_runs = _judged_runs(runs)
        repeated_runs = [r for r in runs if r.spec.name == REPEATED]
        return dataclasses.replace(
            poc,
            verdicts=tuple(self._verdicts(baseline_runs, recommended_runs, runs, poc.control)),
            interactions=tuple(self._interactions(runs)),
            reproducibility=reproducibility(recommended_runs[0], repeated_runs[0]),
            effort=effort(self.planning.request.job_ref, self.recommended, runs, self.store),
            step_time_ratio=_paired_ratio(baseline_runs, recommended_runs),
            finished=True,
        )

    def _verdict(self, base: Sequence[Run], other: Sequence[Run]) -> Verdict:
        job, first_run = self.planning.job, other[0]
        effect = effect_of(first_run.spec.plan, first_run.dependence)
        return verdict(base, other, effect=effect, metric=job.metric, surrogates=job.surrogates)

    def _control_result(self, outcome: Verdict, plain: Run, control: Run | None) -> ControlResult | None:
        job = self.planning.job
        if (study := power_study(job, plain.spec)) is not None:
            return judge_study(study)
        return None if control is None else judge_pair(plain, control, job.endpoints, outcome)

    def _verdicts(
        self,
        baseline_runs: Sequence[Run],
        recommended_runs: Sequence[Run],
        runs: Sequence[Run],
        control: Run | None = None,
    ) -> Iterator[NamedVerdict]:
        if self.recommended != self.baseline:
            outcome = self._verdict(baseline_runs, recommended_runs)
            outcome = with_control(outcome, self._control_result(outcome, baseline_runs[0], control))
            yield NamedVerdict(name=RECOMMENDED, plan=self.recommended, verdict=outcome)
        else:
            identity_verdict = Verdict(
                kind=VerdictKind.EQUIVALENT,
                effect=effect_of(self.baseline),
                test="identity",
                reason="the recommendation is plain training itself",
                cause=Cause(kind="same_plan"),
            )
            yield NamedVerdict(name=RECOMMENDED, plan=self.baseline, verdict=identity_verdict)
        whole_ablations = [r for r in runs if r.spec.role == ABLATION and r.spec.steps == self.steps]
        for other in whole_ablations:  # shortened ones show no accuracy
            outcome = self._verdict(baseline_runs[:1], [other])
            yield NamedVerdict(name=other.spec.name, plan=other.spec.plan, verdict=outcome)

    def _interactions(self, runs: Sequence[Run]) -> Iterator[Interaction]:
        """Yield the interaction of autocast and checkpointing on plain training with seed 0, for each of the
        quantities peak, step time and metric, in this order. A quantity is left out if it was not measured
        for all four combinations: neither technique, each alone, and both."""
        uses = ((), (self.mixed,), (_CHECKPOINTING,), (self.mixed, _CHECKPOINTING))
        corners = [functools.reduce(Plan.with_use, corner, self.baseline) for corner in uses]
        cells = [_find_run(runs, plan) for plan in corners]
        for quantity, value in _QUANTITIES.items():
            values = [value(c.measurement) if c else None for c in cells]
            if all(v is not None for v in values):
                neither, first_only, second_only, both = (float(v) for v in values if v is not None)
                yield Interaction(
                    first=self.mixed.technique,
                    second=_CHECKPOINTING.technique,
                    quantity=quantity,
                    neither=neither,
                    first_only=first_only,
                    second_only=second_only,
                    both=both,
                )


def _judged_runs(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs that the verdict compares: those of the baseline without the cap, and those of the
    recommended plan."""
    return (
        [r for r in runs if r.spec.role == BASELINE and r.spec.cap_bytes is None],
        [r for r in runs if r.spec.name == RECOMMENDED],
    )


def _notes(job: JobRef, requested_job: JobRef, *, covers_other_sizes: bool) -> tuple[str, ...]:
    """Return sentences for the reader of a report, in this order: that the batch is smaller than requested,
    if ``job`` differs from ``requested_job``; that the job's full size was not planned, if
    ``covers_other_sizes`` is False and the job has a size "paper". Empty if neither is the case."""
    notes = []
    if job != requested_job:
        notes.append(
            "Plain training does not fit this machine's free memory at the requested batch, so all results "
            f"here, including the verdict, are for a batch of {job.batch}."
        )
    if not covers_other_sizes and "paper" in reference_machines.sizes(job.spec):
        notes.append(
            "The full size was not planned here, because tracing this model takes long; run "
            f"`memfit plan {job.spec} --size paper --on MACHINE` to plan it."
        )
    return tuple(notes)


def _run_of(result: TrialResult, prepared: PreparedRun) -> Run:
    """Return the run that the trial reported, or a failed one if it reported none."""
    if result.run is not None:
        return result.run
    estimate = prepared.estimate
    return Run(
        spec=prepared.spec,
        predicted_peak_bytes=int(estimate.allocated_bytes.value),
        predicted_phase_peak_bytes=estimate.phase_peak_bytes,
        predicted_step_s=estimate.step_s.value if estimate.step_s else None,
        measurement=Measurement(outcome=OutcomeKind.FAILED, reason=result.reason),
    )


def _notes_on_places(sweep: Sweep, device: Device) -> Iterator[str]:
    """Yield sentences on what the places of the runs do to their step times, which are predicted for
    ``device`` of this machine."""
    if sweep.is_parallel:
        yield "Runs were made side by side, which may have changed their step times."
    here = fingerprint()["processor"] if device.is_host else device.name
    if others := sorted({r.device for r in sweep.results if r.device not in ("", here)}):
        yield f"Runs were made on {', '.join(others)}; the predictions are for {here}."


def _find_run(runs: Sequence[Run], plan: Plan) -> Run | None:
    """Return the first completed run of the plan with seed 0, or None if there is none."""
    successful_runs = (r for r in runs if r.measurement.outcome is OutcomeKind.OK and r.spec.seed == 0)
    return next((r for r in successful_runs if r.spec.plan == plan), None)


_SHORT_S, _FEWEST_STEPS = 25.0, 5  # of steps, see `shorten`; runs also take some seconds to start
_QUANTITIES: Mapping[str, Callable[[Measurement], float | int | None]] = {
    "peak_bytes": lambda m: m.peak_bytes,
    "step_s": median_step_s,
    "metric": lambda m: m.metric,
}


def _paired_ratio(baseline_runs: Sequence[Run], recommended_runs: Sequence[Run]) -> float | None:
    """Return the median of recommended / baseline step time over pairs of runs; None if no pair has both
    times.

    The runs at the same position in the two lists are a pair: they have the same seed and ran one after the
    other.
    """
    ratios = []
    for baseline_run, recommended_run in zip(baseline_runs, recommended_runs, strict=False):
        baseline_s, recommended_s = (
            median_step_s(baseline_run.measurement),
            median_step_s(recommended_run.measurement),
        )
        if baseline_s and recommended_s:
            ratios.append(recommended_s / baseline_s)
    return statistics.median(ratios) if ratios else None
