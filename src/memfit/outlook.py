"""Beyond this machine: the same job at paper size on machines of the catalog, and how far each reaches.

Nothing here is run; every figure is composed from traces of the real model with few of its blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from memfit import catalog
from memfit.jobs.registry import describe, load
from memfit.planning import Planning, Progress, fits_under, space_of
from memfit.pricing import Pricer
from memfit.search.choose import best
from memfit.search.space import plans, usable
from memfit.types.job import JobRef
from memfit.types.plan import Plan, Use, use
from memfit.types.result import PaperRow, Reach

MACHINES = ("RTX-4090", "A100-80GB-SXM", "H100-SXM")
# What is searched at paper size: the techniques that move memory most, at one setting each.
_AT_PAPER = ("gradient-accumulation", "bf16-autocast", "activation-checkpointing", "adamw-8bit")


def paper_rows(planning: Planning, progress: Progress) -> tuple[PaperRow, ...]:
    """Plain and recommended on three machines; empty where the job has no paper size."""
    ref = _at(planning, "paper")
    if ref is None:
        return ()
    return tuple(_row(planning, pricer, ref, progress) for pricer in _pricers(planning, ref))


def sizes(spec: str) -> tuple[str, ...]:
    """Published sizes of a built-in job; none for the user's own."""
    return next((b.sizes for b in describe() if b.name == spec), ())


def _at(planning: Planning, size: str) -> JobRef | None:
    ref = planning.request.job
    if size not in sizes(ref.spec):
        return None
    return dataclasses.replace(ref, size=size, batch=None, steps=None, data=None, weights=None)


def _pricers(planning: Planning, ref: JobRef) -> list[Pricer]:
    """One a machine; machines with the same kernels share their traces."""
    job = load(ref)
    place = planning.request.machine.place
    shared: dict[Any, Any] = {}
    made = []
    for name in MACHINES:
        machine = catalog.machine(name, place.name if place else "world")
        pricer = Pricer(job=job, machine=machine, space=space_of(job, machine.device.kind))
        pricer.parts = shared
        made.append(pricer)
    return made


def _row(planning: Planning, pricer: Pricer, ref: JobRef, progress: Progress) -> PaperRow:
    machine = pricer.machine
    fits = fits_under(int(machine.device.memory_bytes.value), machine)
    progress("outlook", 0, 0, f"{ref.size} on {machine.name}")
    plain = pricer.sketch(Plan())
    fitting = [e for e in map(pricer.sketch, _paper_plans(planning, pricer)) if fits(e)]
    return PaperRow(
        machine=machine.name,
        size=pricer.job.size,
        device_memory_bytes=int(machine.device.memory_bytes.value),
        plain=plain,
        plain_fits=fits(plain),
        recommended=best(fitting, planning.request.goal),
    )


def _paper_plans(planning: Planning, pricer: Pricer) -> list[Plan]:
    techniques, _ = usable(pricer.space, planning.request.accuracy)
    kept = [t for t in techniques if t.name in _AT_PAPER]
    return [p for p in plans(pricer.space, kept) if _one_setting(p)]


def _one_setting(plan: Plan) -> bool:
    recompute = plan.get("activation-checkpointing")
    return recompute is None or recompute.settings["every"] == 1


def reach(planning: Planning, progress: Progress) -> tuple[Reach, ...]:
    """The largest published size that fits each machine, plain and with the tightest allowed plan."""
    # Sizes below the paper's are cut to the data at hand; only those at full length compare.
    every = sizes(planning.request.job.spec)
    names = [s for s in every if s in ("650M", "3B", "15B", "124M", "1.3B")]
    if not names:
        return ()
    table: dict[str, list[Pricer]] = {}

    def fitting(index: int, plan_of: str) -> str | None:
        """The largest size on machine ``index``; sizes grow, so the first that does not fit ends it."""
        largest = None
        for size in names:
            progress("outlook", 0, 0, f"{size} on {MACHINES[index]}")
            if size not in table:
                table[size] = _pricers(planning, _sized(planning.request.job, size))
            pricer = table[size][index]
            plan = Plan() if plan_of == "plain" else _tightest(planning, pricer)
            if not fits_under(int(pricer.machine.device.memory_bytes.value), pricer.machine)(
                pricer.sketch(plan)
            ):
                break
            largest = size
        return largest

    rows = []
    for index, machine in enumerate(MACHINES):
        plain, tight = fitting(index, "plain"), fitting(index, "tight")
        rows.append(_reach_row(machine, plain, tight, names, table, index))
    return tuple(rows)


def _sized(ref: JobRef, size: str) -> JobRef:
    return dataclasses.replace(ref, size=size, batch=None, steps=None, data=None, weights=None)


def _reach_row(
    machine: str,
    plain: str | None,
    tight: str | None,
    names: Sequence[str],
    table: dict[str, list[Pricer]],
    index: int,
) -> Reach:
    def parameters(size: str | None) -> float | None:
        return None if size is None else float(_count(table[size][index]))

    return Reach(
        machine=machine,
        quantity="parameters",
        plain=parameters(plain),
        recommended=parameters(tight),
        plain_label=plain or "",
        recommended_label=tight or "",
        at_limit=tight == names[-1],
    )


def _count(pricer: Pricer) -> int:
    from memfit.trace.tracer import fake_model

    return sum(p.numel() for p in fake_model(pricer.job).parameters())


def _tightest(planning: Planning, pricer: Pricer) -> Plan:
    """Single-sample micro-batches, bf16 activations, recomputation, small optimizer state: as far as
    the accuracy class allows."""
    names = {t.name for t in usable(pricer.space, planning.request.accuracy)[0]}
    wanted: list[Use] = [use("bf16-autocast"), use("activation-checkpointing", every=1), use("adamw-8bit")]
    if pricer.space.batch_size > 1:
        wanted.append(use("gradient-accumulation", micro_batches=pricer.space.batch_size))
    return Plan(uses=tuple(u for u in wanted if u.technique in names))
