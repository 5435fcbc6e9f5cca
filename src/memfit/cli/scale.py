"""``memfit scale``: from a proof of concept to a pilot and the full size, one gate at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memfit.cli.options import GoalOptions, HereOptions, JobOptions, JsonOptions, StoreOptions
from memfit.cli.output import console, emit, print_table
from memfit.cli.progress import Bars
from memfit.cli.quiet import quiet_libraries
from memfit.cli.record import found_record
from memfit.cli.request import machine_of, request

if TYPE_CHECKING:
    import memfit.gates
    import memfit.shared
    import memfit.types.result


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    record: Annotated[
        str | None, typer.Argument(metavar="[RECORD]", help="A record's file or ID. Default: the last.")
    ] = None
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Your limits; `--json` shows all of them.")
    ] = None
    pilot: Annotated[
        str | None, typer.Option(metavar="MACHINE", help="Where the pilot would run, as of --on.")
    ] = None
    full: Annotated[str | None, typer.Option(metavar="MACHINE", help="Where the full size would.")] = None
    size: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The job's size there. Default: paper, if it has that."),
    ] = None


def scale(
    own: ScaleOptions, goal: GoalOptions, here: HereOptions, store: StoreOptions, output: JsonOptions
) -> None:
    """Hold a proof of concept against the gate to the next stage, and predict that stage.

    Exit code 1 where a gate does not hold: nothing further is predicted then.
    """
    machines = {n: m for n, m in (("pilot", own.pilot), ("full", own.full)) if m is not None}
    for name in machines.values():
        machine_of(name, here.place)  # known before anything long begins
    quiet_libraries()
    from memfit import gates

    limits = gates.read(own.gates) if own.gates is not None else gates.Gates()
    record = found_record(own.record, store.store)
    held = gates.evaluate(record, limits)
    failed = [gate for gate in held if not gate.holds]
    stages: dict[str, Any] = {}
    if not failed:
        job = _job(record.model.job, own.size)
        stages = {name: _stage(record.poc_id, job, on, goal, here, store) for name, on in machines.items()}
    if output.json:
        told = {"gates": [g.model_dump() for g in held], "limits": limits.model_dump(), "stages": stages}
        emit({"poc_id": record.poc_id, "holds": not failed, **told})
    else:
        _print(record, held, stages)
    if failed:
        raise typer.Exit(1)


def _job(spec: str, size: str | None) -> JobOptions:
    from memfit.outlook import sizes

    return JobOptions(job=spec, size=size or ("paper" if "paper" in sizes(spec) else None))


def _stage(
    poc_id: str, job: JobOptions, on: str, goal: GoalOptions, here: HereOptions, store: StoreOptions
) -> dict[str, Any]:
    """The plan of one stage with what is predicted for it, which is kept for the decision."""
    from memfit import planning
    from memfit.types.units import format_bytes

    asked = request(job, goal, here, on)
    with Bars("en") as progress:
        result = planning.search(asked, progress).result
    found = result.recommended
    assert found is not None, "search raises NothingFits otherwise"
    estimate = found.estimate
    _keep(poc_id, result, asked.machine.name, job.size or "", store)
    memory = estimate.device_bytes or estimate.allocated_bytes
    return {
        "machine": on,
        "size": job.size,
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


def _keep(
    poc_id: str, result: memfit.types.result.SearchResult, machine: str, size: str, store: StoreOptions
) -> None:
    from memfit import outlook, pipeline
    from memfit.store import Store

    kept, best = Store(store.store), result.recommended
    sides = [(result.baseline, True), (best, False)] if best is not None else []
    for choice, plain in sides:
        if plain or choice.estimate.plan != result.baseline.estimate.plan:
            offer = outlook.offer(choice.estimate, machine=machine, size=size, plain=plain, fits=choice.fits)
            kept.append(poc_id, pipeline.OFFER, offer)


def _print(record: memfit.shared.Shared, held: tuple[memfit.gates.Gate, ...], stages: dict[str, Any]) -> None:
    from memfit.types.units import format_bytes

    out = console()
    out.print(f"PoC {record.poc_id}: {record.model.job} {record.model.size}", markup=False)
    print_table(
        ("Gate", "Found", "Limit", ""),
        [(g.name, _told(g.found), g.limit, "holds" if g.holds else "FAILS") for g in held],
    )
    for name, stage in stages.items():
        memory, step = stage["memory_bytes"], stage["step_s"]
        out.print(f"{name} on {stage['machine']}, size {stage['size']}: {stage['label']}", markup=False)
        span = " to ".join(format_bytes(memory[end]) for end in ("low", "high"))
        speed = f"{step['value']:.3g} s ({step['low']:.3g} to {step['high']:.3g})" if step else "not known"
        out.print(f"  predicted memory {span}; step {speed}", markup=False)
        out.print(f"  stop when {'; or '.join(stage['stop_when'])}", markup=False)
        out.print(f"  way back: {stage['way_back']}", markup=False)
    failed = [gate.reason for gate in held if not gate.holds]
    if failed:
        out.print(f"Stopped before the next stage: {'; '.join(failed)}.", markup=False)
    elif not stages:
        out.print("Every gate holds. --pilot MACHINE and --full MACHINE predict the next stages.")


def _told(found: float | bool | str | None) -> str:
    if found is None:
        return "not measured"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:.4g}" if isinstance(found, float) else found
