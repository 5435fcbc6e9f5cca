"""Time operators on this machine, so that step times predicted for it rest on measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from memfit.cost.step_time_calibration import merge_calibrations
from memfit.planner.evaluate import Predictor
from memfit.planner.operator_timer import OperatorTimer
from memfit.planner.request import Progress, Request, autocast
from memfit.planner.selection import (
    MODELLED,
    EqualityBand,
    timed_band,
)
from memfit.runtime import local_machine
from memfit.runtime.devices import accelerators, loaded_drivers
from memfit.store.calibration import CalibrationCache, select_operators
from memfit.techniques.registry import make_plain_plan
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, use
from memfit.types.result import Timings

_FIRST_TIMING_S, _SECOND_TIMING_S = 5.0, 4.0  # nominal seconds of probing operators


def timings(known: Calibration) -> Timings:
    """Return what says how reliable the calibration's timings of operators are: the spread of repeated calls,
    the load of the machine and the waiting while they were timed, and this machine's number of processors.
    """
    return Timings(
        spread_ratio=known.spread_ratio,
        load_count=known.load_count,
        waited_ratio=known.waited_ratio,
        processor_count=local_machine.threads(),
    )


def score_band(predictor: Predictor, request: Request) -> EqualityBand:
    """Return the band of scores within which plans count as equally good: for this machine 7 % to 14 %,
    widened by the spread of its timings (`timed_band`), else 5 % (`MODELLED`)."""
    return timed_band(predictor.calibration.spread_ratio) if request.is_here else MODELLED


def calibrate(
    predictor: Predictor,
    request: Request,
    progress: Progress,
    plans: list[Plan] | None = None,
    *,
    timing_s: float = _SECOND_TIMING_S,
) -> None:
    """Add to the predictor's calibration the times of those operators of ``plans`` that take most of a step's
    time, and the kernel workspaces of at most 32 other operators that could move a plan's peak.

    What is stored for this machine is reused. The rest is measured in a child process, the predictor's
    ``operator_timer`` if it has one, and stored, and so are the machine's rates of computing and copying if
    they are not known. Nothing is done if the operators of ``plans`` are known. Without ``plans``, as in the
    first call of a search, the operators are those of plans that span the search.

    ``timing_s`` limits the number of operators: timing them would take about that many seconds on a machine
    of nominal speed (100 GFLOP/s, 10 GB/s). Without ``plans``, the limit is 5 seconds. The choice does not
    depend on how long the measurements take, so the same request finds the same stored times. Raises RunError
    if the child process gives no result; UserError if one of the plans cannot be traced.
    """
    from memfit.cost.memory import step_ops
    from memfit.cost.op_time import signatures_to_time
    from memfit.cost.workspaces import unprobed_signatures

    is_first_call = plans is None
    calibrated_plans = _representatives(predictor, request.bounds.without) if plans is None else plans
    if request.ranks == 1:
        if predictor.operator_timer and not all(map(predictor.load_traces, calibrated_plans)):
            predictor.operator_timer.start()  # new traces have operators that are not known
        predictor.trace_all(calibrated_plans)
    ops = [pair for plan in calibrated_plans for pair in step_ops(predictor.trace(plan))]
    known_signatures = {*predictor.calibration.op_s, *predictor.calibration.not_timed}
    signatures = signatures_to_time(
        ops, known_signatures, timing_s=_FIRST_TIMING_S if is_first_call else timing_s
    )
    peak_signatures = [
        s
        for plan in calibrated_plans
        for s in unprobed_signatures(predictor.trace(plan), predictor.calibration)
    ]
    signatures = list(
        dict.fromkeys(
            (*signatures, *[s for s in peak_signatures if s not in known_signatures][:_MOST_DECISIVE])
        )
    )
    if not is_first_call and not signatures:
        return
    cache = CalibrationCache(_threads(request), device=calibrated_device(request))
    stored_calibration = cache.read()
    missing_signatures = [
        s for s in signatures if s not in stored_calibration.op_s and s not in stored_calibration.not_timed
    ]
    needs_rates = not stored_calibration.flops_s and not predictor.calibration.flops_s
    if missing_signatures or needs_rates:
        progress("calibrate", 0, 0, f"{len(missing_signatures)} operators")
        stored_calibration = cache.add(
            _measure(predictor, request, missing_signatures, _LONGEST_RATIO * timing_s, needs_rates)
        )
    predictor.recalibrate(
        merge_calibrations(predictor.calibration, select_operators(stored_calibration, set(signatures)))
    )


def begin_calibration(predictor: Predictor, request: Request, progress: Progress) -> None:
    """Run the first calibration of a search (`calibrate` without plans). If the request says ``recalibrate``,
    the timings stored for its device and number of threads are discarded first. Raises RunError if the child
    process that measures gives no result."""
    if request.recalibrate:
        CalibrationCache(_threads(request), device=calibrated_device(request)).forget()
    calibrate(predictor, request, progress)


def _representatives(predictor: Predictor, excluded_techniques: Sequence[str]) -> list[Plan]:
    """Return plans whose operators span the search: plain training and plain training with autocast, each
    with the whole batch, with four micro-batches and with the smallest micro-batches, as far as the batch can
    be split so.

    Plans with a technique in ``excluded_techniques`` are left out, except plain training.
    """
    *fewer, most = predictor.job_facts.micro_batch_counts
    smallest_micro_batches = [use("gradient-accumulation", micro_batches=most)] if most > 1 else []
    four_micro_batches = [use("gradient-accumulation", micro_batches=4)] if 4 in fewer else []
    mixed_precision, plain_plan = autocast(predictor.job_facts), make_plain_plan(predictor.job_facts.ranks)
    candidates = [
        plain_plan,
        plain_plan.with_use(mixed_precision),
        *(plain_plan.with_use(u) for u in four_micro_batches + smallest_micro_batches),
        *(
            plain_plan.with_use(mixed_precision).with_use(u)
            for u in four_micro_batches + smallest_micro_batches
        ),
    ]
    return [plan for plan in candidates if plan == plain_plan or not any(map(plan.get, excluded_techniques))]


_MOST_DECISIVE = 32  # most operators whose workspaces could move a peak, probed beside those that take time
_LONGEST_RATIO = 20.0  # of the nominal budget: no machine should take longer


def _measure(
    predictor: Predictor, request: Request, signatures: list[str], timing_s: float, rates: bool
) -> Calibration:
    if predictor.operator_timer is not None:
        return predictor.operator_timer.measure(signatures, timing_s, rates)
    with one_operator_timer(predictor, request):
        return _measure(predictor, request, signatures, timing_s, rates)


@contextlib.contextmanager
def one_operator_timer(predictor: Predictor, request: Request) -> Iterator[None]:
    """Within this context, all calibrations of the predictor measure in one process, which ends with it."""
    timer = OperatorTimer(job=request.job_ref, device=request.device_kind, threads=_threads(request))
    predictor.operator_timer = timer
    try:
        yield
    finally:
        predictor.operator_timer = None
        timer.close()


def calibrated_device(request: Request) -> str:
    """Return under which name the calibration of the request's device is stored: "" for a processor and for
    another machine, else the product name of the accelerator and the versions of its driver: of those that
    are loaded, and as torch names it."""
    device = request.machine.device
    if device.is_host or not request.is_here:
        return ""
    loaded = (f"{vendor} driver {version}" for vendor, version in loaded_drivers().items())
    versions = {a.driver for a in accelerators() if a.driver}
    return ", ".join([device.name, *loaded, *(f"driver {version}" for version in sorted(versions))])


def _threads(request: Request) -> int:
    return request.threads or local_machine.threads()
