"""``memfit decide --gates``: from a proof of concept to a pilot and to the full size, gate by gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import (
    EffortOptions,
    JobOptions,
    OutputOptions,
    RuntimeOptions,
    SearchOptions,
    StoreOptions,
)
from memfit.cli.output import check_language, console, emit
from memfit.cli.progress import Bars
from memfit.cli.record import SourcedRecord, find_record
from memfit.cli.request import machine_of, request
from memfit.files.read import read_text
from memfit.types.errors import UserError
from memfit.types.sanitize import one_line

if TYPE_CHECKING:
    import rich.console

    import memfit.decision.rollout_gates
    import memfit.planner.request
    import memfit.report.words
    import memfit.types.decision
    import memfit.types.result


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """The file with limits that the figures of a proof of concept must keep, and for the next two stages, the
    pilot and the full-size training, their machines, the size and the job."""

    gates: Annotated[
        str | None,
        typer.Option(
            metavar="default|FILE.toml",
            help="Instead of costs: check the figures of the proof of concept, or of the record from "
            "others, against limits, called gates, and exit with code 1 if one is not kept. A figure that "
            "was not measured does not keep its limit. default: memfit's own limits. FILE.toml: your "
            "limits, such as step_ratio = 1.5 under [time]; false disables a limit, and a limit that the "
            "file does not name is memfit's own. The limits are stored with a proof of concept that was run "
            "here, and its later reports and decisions use them. With --json all limits are printed. "
            "Default: with --pilot or --full, the limits stored last with the proof of concept, or memfit's "
            "own if there are none; otherwise no check. Not with --case or --template.",
        ),
    ] = None
    pilot: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="Check the limits (--gates) and, if all are kept, search for a plan of the pilot, the "
            "stage between the proof of concept and the full-size training, on MACHINE, given as in --on of "
            "`memfit plan`, and print its predicted memory and step time. The plan of the proof of concept "
            "is not used. The exit code is 3 if no plan fits. The prediction is stored with a proof of "
            "concept that was run here. Default: the pilot is not predicted. Not with --case or --template.",
        ),
    ] = None
    full: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="As --pilot, for the full-size training: check the limits (--gates) and, if all are kept, "
            "search for its plan on MACHINE, given as in --on of `memfit plan`, and print its predicted "
            "memory and step time. The exit code is 3 if no plan fits. Default: the full-size training is "
            "not predicted. Not with --case or --template.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Size of the job in both predicted stages, the pilot and the full-size training, whatever "
            "size the record has. Batch, length and data are the defaults of the job at this size. Default: "
            "paper for a built-in job, otherwise the job's default size. Refused without --pilot and --full.",
        ),
    ] = None
    job: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Job to predict for the pilot and the full-size training, as in JOB of `memfit plan`. "
            "Default: the job of the record. If such a stage is predicted for a record from others whose job "
            "is not built in, this option is needed. Refused without --pilot and --full.",
        ),
    ] = None


def check_gates(
    record_name: str | None,
    options: GateOptions,
    effort: EffortOptions,
    search_options: SearchOptions,
    runtime: RuntimeOptions,
    store: StoreOptions,
    output: OutputOptions,
) -> None:
    """Print whether the figures of a record keep the limits, and predict the stages whose machines are given.
    ``record_name``: a file, or the ID of a proof of concept or of a record from others; None for the proof of
    concept begun last. The limits are those of --gates; without it, those stored last with a proof of concept
    that was run here, or else memfit's own. If a figure does not keep its limit, no stage is predicted and
    the exit code is 1. With a proof of concept that was run here, the limits of --gates, --attended-minutes,
    and the machines and predictions of the stages are stored.

    Raises UserError for an unknown machine and a wrong file of limits, as `find_record`, `_store_attended`
    and `_job_spec` do, and for a job that cannot be predicted; NothingFits if no plan fits a stage."""
    lang = check_language(output.lang)
    machines = {n: m for n, m in (("pilot", options.pilot), ("full", options.full)) if m is not None}
    for name in machines.values():
        machine_of(name, runtime.place)  # raises for an unknown machine before any long work begins
    quiet_libraries()
    from memfit.decision import rollout_gates
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    gates_path = Path(options.gates) if options.gates not in (None, "default") else None
    limits = rollout_gates.read(gates_path) if gates_path is not None else rollout_gates.Gates()
    sourced_record = find_record(record_name, store.store)
    if effort.attended_minutes is not None:
        sourced_record = _store_attended(sourced_record, effort.attended_minutes, store)
    record = sourced_record.record
    if options.gates is None and not sourced_record.taken_from:
        limits = proof_of_concept.stored_gates(Store(store.store), record.poc_id)
    gate_results = rollout_gates.evaluate(record, limits)
    failed = [gate for gate in gate_results if not gate.holds]
    stages: dict[str, Any] = {}
    if not failed and machines:
        from memfit.workflows.reference_machines import sizes

        spec, plannings = options.job or _job_spec(sourced_record, store), []
        job = JobOptions(job=spec, size=options.size or ("paper" if "paper" in sizes(spec) else None))
        for name, on in machines.items():
            stages[name], planning = _search_stage(job, on, search_options, runtime)
            plannings.append(planning)
        if not sourced_record.taken_from:
            _store_predictions(record.poc_id, plannings, store)
    decision = (
        None if sourced_record.taken_from else _decide(record.poc_id, stages, options.gates, store, lang)
    )
    if output.json:
        stages = stages if decision is None or failed else _with_costs(stages, decision[1])
        details = {
            "gates": [g.model_dump() for g in gate_results],
            "limits": limits.model_dump(),
            "stages": stages,
        }
        emit(
            {"poc_id": record.poc_id, "taken_from": sourced_record.taken_from, "holds": not failed, **details}
        )
    else:
        _print(sourced_record, gate_results, stages, decision, lang)
    if failed:
        raise typer.Exit(1)


def _store_attended(sourced_record: SourcedRecord, minutes: float, store: StoreOptions) -> SourcedRecord:
    """Store ``minutes``, for which people attended to the proof of concept of the record, with it, and return
    its updated record. Raises UserError for a record from others, and for a number that is negative or not
    finite."""
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    poc_id = sourced_record.record.poc_id
    if sourced_record.taken_from:
        raise UserError(
            f"--attended-minutes cannot be set for the proof of concept {poc_id}, which was not run here: "
            f"its record was taken from {sourced_record.taken_from}",
            hint="leave out --attended-minutes",
        )
    proof_of_concept.store_attended_minutes(Store(store.store), poc_id, minutes)
    return find_record(poc_id, store.store)


def _job_spec(sourced_record: SourcedRecord, store: StoreOptions) -> str:
    """Return the record's job as it is named on the command line, such as "char-lm". For a record that was
    measured here it may be a job of the user, FILE.py:NAME. Raises UserError if a record from others is not
    of a built-in job: predicting the job would run a file that others name."""
    from memfit.jobs.registry import names
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    record = sourced_record.record
    if not sourced_record.taken_from:
        return proof_of_concept.stored_poc(Store(store.store), record.poc_id).runs[0].spec.job.spec
    if record.model.job in names():
        return record.model.job
    raise UserError(
        f"the record from {sourced_record.taken_from} is of the job {record.model.job!r}, which is not built "
        "into memfit, and memfit does not run a file because a record from others names it",
        allowed=f"a record of a built-in job: {', '.join(names())}",
        hint="or give with --job FILE.py:NAME your own file with this job, to predict it",
    )


def _search_stage(
    job: JobOptions, on: str, search_options: SearchOptions, runtime: RuntimeOptions
) -> tuple[dict[str, Any], memfit.planner.request.Planning]:
    """Search for the plan of one stage, the pilot or the full-size training, on the machine ``on``. Return
    (plain data; the finished search). The data have the recommended plan, its predicted memory and step time,
    its cost and energy for 1,000 steps, "stop_when", the observations at which the stage should be stopped,
    and "way_back", what to return to then. Raises NothingFits if no plan fits the machine, and UserError for
    invalid options."""
    from memfit.planner import search
    from memfit.types.units import format_bytes

    job_request = request(job, search_options, runtime, on)
    with Bars("en") as progress:
        planning = search.search(job_request, progress)
    choice = planning.result.recommended
    assert choice is not None, "search raises NothingFits otherwise"
    estimate = choice.estimate
    memory = estimate.device_bytes or estimate.allocated_bytes
    stage = {
        "machine": job_request.machine.name,
        "size": planning.job.size,
        "plan": estimate.plan.to_dict(),
        "label": estimate.plan.label,
        "memory_bytes": dataclasses.asdict(memory),
        "step_s": dataclasses.asdict(estimate.step_s) if estimate.step_s else None,
        "usd_per_1000_steps": 1000 * estimate.usd if estimate.usd is not None else None,
        "kwh_per_1000_steps": estimate.energy_j / 3600 if estimate.energy_j is not None else None,
        "stop_when": [
            f"the measured memory is above {format_bytes(memory.high)}",
            *([f"a step takes longer than {estimate.step_s.high:.3g} s"] if estimate.step_s else []),
            "a loss or a gradient norm is not finite",
            "the metric leaves its margin",
        ],
        "way_back": "the stage before, with its plan and checkpoints (`memfit run --save`, `--resume`)",
    }
    return stage, planning


def _store_predictions(
    poc_id: str, plannings: list[memfit.planner.request.Planning], store: StoreOptions
) -> None:
    """Store the predictions of the stages in ``plannings``, at least one, with the proof of concept
    ``poc_id``, for its decision on costs. Also predict and store the same size of the job on every device of
    the catalog that has a price, except in three cases: these predictions are already stored; the first stage
    has one process and plain training of the model has more than 10,000 operators, so that its traces take
    long; or the proof of concept recommended no plan. Everything is predicted before anything is stored.
    Raises UserError if the store does not have the proof of concept, or what is stored cannot be read."""
    from memfit.planner.single_device import is_long
    from memfit.store import Store
    from memfit.workflows import proof_of_concept, reference_machines

    records = Store(store.store)
    poc, base_planning = proof_of_concept.stored_poc(records, poc_id), plannings[0]
    offers: list[memfit.types.result.Offer] = []
    stored_offers = (*poc.offers, *proof_of_concept.offers_of(records, poc_id))
    priced_already = {o.machine for o in stored_offers if o.size == base_planning.job.size} >= set(
        reference_machines.priced_accelerators()
    )
    slow = base_planning.predictor.job_facts.ranks == 1 and is_long(base_planning.predictor)
    if not priced_already and not slow and poc.search.recommended is not None:
        with Bars("en") as progress:
            offers += reference_machines.offers(base_planning, poc.search.recommended.estimate.plan, progress)
    offers += [offer for planning in plannings for offer in reference_machines.stage_offers(planning)]
    for offer in offers:
        records.append(poc_id, proof_of_concept.OFFER, offer)


def _decide(
    poc_id: str, stages: dict[str, Any], gates: str | None, store: StoreOptions, lang: str
) -> tuple[memfit.types.result.Poc, memfit.types.decision.Decision]:
    """Return the proof of concept and its decision: the costs of each stage and option, with the figures of
    the user that were stored last. Before that, store the machines of ``stages`` and the limits that
    ``gates``, the value of --gates, names, so that the report shows these gates; None: the stored limits
    stay. An empty text stands for memfit's own limits. ``lang``: the reader's language, for the currency and
    the place if the user gave no figures. Raises UserError if the file ``gates`` cannot be read, and if what
    is stored with the proof of concept is wrong."""
    from memfit.store import Store
    from memfit.workflows import proof_of_concept

    records = Store(store.store)
    for name, stage in stages.items():
        records.append(poc_id, proof_of_concept.STAGE, {"name": name, "machine": stage["machine"]})
    if gates is not None:
        text = "" if gates == "default" else read_text(Path(gates))
        records.append(poc_id, proof_of_concept.GATES, {"text": text})
    return proof_of_concept.decide(records, poc_id=poc_id, case=None, lang=lang)


def _with_costs(stages: dict[str, Any], decision: memfit.types.decision.Decision) -> dict[str, Any]:
    """Return stage name -> plain data of every stage in the decision: its state, machine, plan, prediction
    and costs, as in the report. The fields of the same stage in ``stages``, which was predicted just now, are
    added to them and replace those of the same name."""
    record_keys = (
        "state",
        "machine",
        "plan",
        "engine",
        "memory_bytes",
        "step_s",
        "spent",
        "to_spend",
        "most",
        "unpaid",
    )
    stage_views = {}
    for stage in decision.stages:
        stage_values = dataclasses.asdict(stage)
        view = {"currency": decision.currency, **{name: stage_values[name] for name in record_keys}}
        stage_views[stage.name] = view | stages.get(stage.name, {})
    return stage_views


def _print(
    sourced_record: SourcedRecord,
    gate_results: tuple[memfit.decision.rollout_gates.Gate, ...],
    stages: dict[str, Any],
    decision: tuple[memfit.types.result.Poc, memfit.types.decision.Decision] | None,
    lang: str,
) -> None:
    from memfit.report.decision_terminal import print_gate_end, print_gates, print_stages
    from memfit.report.words import load_words

    output, words, model = console(), load_words(lang), sourced_record.record.model
    title = f"PoC {sourced_record.record.poc_id}: {model.job} {model.size}"
    if machine := sourced_record.record.hardware.get("machine"):
        title += f", {words.of(machine)}"
    output.print(one_line(title), markup=False)
    if sourced_record.taken_from:
        notice = words.get("scale.taken", source=sourced_record.taken_from)
        output.print(one_line(notice), markup=False, style="yellow")
    print_gates([g.words for g in gate_results], console=output, lang=lang)
    if decision is not None and all(g.holds for g in gate_results):
        print_stages(*decision, console=output, lang=lang)
    elif decision is None:
        _print_plain(stages, output, words)
    print_gate_end([g.words for g in gate_results], predicted=bool(stages), console=output, lang=lang)
    unmeasured = [g.name for g in gate_results if g.name == "effort: attended minutes" and g.found is None]
    if unmeasured and not sourced_record.taken_from:
        output.print(words.get("scale.ask_attended"), markup=False)


def _print_plain(
    stages: dict[str, Any], output: rich.console.Console, words: memfit.report.words.Words
) -> None:
    """Print the predictions of ``stages`` without costs, as is done for a record from others, whose costs are
    not known. The texts are those of ``words``."""
    from memfit.types.units import format_bytes

    for name, stage in stages.items():
        memory, step = stage["memory_bytes"], stage["step_s"]
        limits = {"memory": format_bytes(memory["high"]), "step": f"{step['high']:.3g} s" if step else ""}
        stop = words.get("stages.stop_numbers", **limits) if step else words.get("stages.stop_text")
        lines = [("machine", f"{stage['machine']}, {stage['size']}: {stage['label']}")]
        lines += [("memory", " – ".join(format_bytes(memory[bound]) for bound in ("low", "high")))]
        lines += [("step", f"{step['low']:.3g} – {step['high']:.3g} s")] if step else []
        lines += [
            ("stop", stop),
            *((bound, words.get(f"stages.{bound}_text")) for bound in ("back", "watch")),
        ]
        output.print(words.get(f"stages.{name}"), style="bold", markup=False)
        for key, text in lines:
            output.print(f"  {words.get(f'stages.{key}')}{words.get('text.colon')}{text}", markup=False)
