"""Retry or reject traces that depend on a guessed value.

Code that checks its input raises if a condition on values holds. A step that trains does not raise, so an
answer that leads to an error is wrong, and the trace runs again with the other answer. A guessed number
cannot be checked like this, except for whether it matters: a trace whose memory depends on it is rejected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from memfit.cost.memory import live_peak_bytes
from memfit.trace.assumed_values import AssumedCase, assume_case
from memfit.trace.real_weights import follow_weights, offered_weights
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.trace import Phase, Trace

P = ParamSpec("P")
T = TypeVar("T")
_TRIES = 4  # conditions that are answered differently before the error is raised
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
_ANOTHER = 2  # answer to try where the answer was 1


class GuessFailed(Exception):
    """A run failed with the error ``reason`` after the code at ``place`` had got the answer True for a
    condition that is not known to be true."""

    def __init__(self, place: str, reason: Exception) -> None:
        super().__init__(place)
        self.place, self.reason = place, reason


def retry_guesses(run: Callable[Concatenate[Job, P], T]) -> Callable[Concatenate[Job, P], T]:
    """Wrap ``run``: if it raises GuessFailed, run it again with False for the condition that was last assumed
    to be true, and so on, at most four runs in all. If none of them succeeds, or one raises another error,
    raise the error that the first failed with."""

    @functools.wraps(run)
    def wrapper(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> T:
        first_error: Exception | None = None
        for _ in range(_TRIES):
            try:
                return run(job, *args, **kwargs)
            except GuessFailed as doubt:
                first_error = first_error or doubt.reason
                job = _with_bounds(job, {doubt.place: 0})
            except Exception:
                if first_error is not None:
                    raise first_error from first_error.__cause__
                raise
        assert first_error is not None
        raise first_error from first_error.__cause__

    return wrapper


def check_guessed_numbers(run: Callable[Concatenate[Job, P], Trace]) -> Callable[Concatenate[Job, P], Trace]:
    """Wrap ``run``: raise UserError if a number that the trace lists in ``guessed`` decides sizes, that is,
    if 2 in place of 1 leads to other allocations in forward or backward of the first step. The error names
    the lines that do so alone, or all of them if none does. If the run fails with 2, the number decides
    nothing."""

    @functools.wraps(run)
    def wrapper(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> Trace:
        trace = run(job, *args, **kwargs)

        def matters(lines: Iterable[str]) -> bool:
            with contextlib.suppress(UserError, *_FAILURES):  # an answer that fails says nothing
                options: Any = {**kwargs, "steps": 1}
                other_trace = run(_with_bounds(job, dict.fromkeys(lines, _ANOTHER)), *args, **options)
                return _sizes(trace) != _sizes(other_trace)
            return False

        if trace.guessed and matters(trace.guessed):
            lines = [line for line in trace.guessed if matters([line])] or trace.guessed
            raise UserError(
                f"the number that is read from a tensor at {' and '.join(lines)} determines how much memory "
                "the step takes, and memfit cannot compute it from the batch alone",
                allowed=f"bound={{{', '.join(f'{line!r}: N' for line in lines)}}} in Job(...) or "
                "estimate(...), where N is the number that the line reads",
            )
        return trace

    return wrapper


def cover_assumed_cases(run: Callable[Concatenate[Job, P], Trace]) -> Callable[Concatenate[Job, P], Trace]:
    """Wrap ``run``: if values were assumed, also trace the step in the cases LOW and HIGH (`AssumedCase`). If
    weights are offered (`offer_weights`) and the step is within the limits of their source, also trace it
    with values computed from them (`real_weights`).

    The returned trace is that of the computed values, else that of the usual case. It gives the lowest and
    the highest peak of all cases as ratios to its own peak (``assumed_low_ratio``, ``assumed_high_ratio``).
    Cases in which the step fails are left out.
    """

    @functools.wraps(run)
    def wrapper(job: Job, /, *args: P.args, **kwargs: P.kwargs) -> Trace:
        trace = run(job, *args, **kwargs)
        if not trace.assumed:
            return trace
        usual_peak_bytes, source = live_peak_bytes(trace), offered_weights()
        if source is not None and source.allows(trace, usual_peak_bytes):
            with contextlib.suppress(UserError, *_FAILURES), follow_weights(source.load()):
                trace = run(job, *args, **kwargs)
        peaks = [live_peak_bytes(trace), usual_peak_bytes]
        for case in (AssumedCase.LOW, AssumedCase.HIGH):
            with contextlib.suppress(UserError, *_FAILURES), assume_case(case):  # some values are impossible
                peaks.append(live_peak_bytes(run(job, *args, **kwargs)))
        places, case_count = " and ".join(trace.assumed), len(peaks) - 2
        note = f"values at {places} were assumed; the interval covers the peaks of {case_count} other cases"
        is_relevant = min(peaks) < max(peaks) or not case_count
        return dataclasses.replace(
            trace,
            assumed_low_ratio=min(peaks) / peaks[0],
            assumed_high_ratio=max(peaks) / peaks[0],
            assumptions=(*trace.assumptions, note) if is_relevant else trace.assumptions,
        )

    return wrapper


def _with_bounds(job: Job, overrides: Mapping[str, int]) -> Job:
    bounds = job.bound if isinstance(job.bound, Mapping) else {} if job.bound is None else {"": job.bound}
    return dataclasses.replace(job, bound={**bounds, **overrides})


def _sizes(trace: Trace) -> list[int]:
    phases = (Phase.FORWARD, Phase.BACKWARD)
    return [a.size_bytes for a in trace.allocations if a.step == 0 and a.phase in phases]
