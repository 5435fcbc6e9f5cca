"""Turn a trace into memory: the live bytes over the clock, their peak, and who holds them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy

from memfit.types.downsample import thin_phases
from memfit.types.machine import Calibration
from memfit.types.trace import Allocation, Category, OpCall, Phase, PhaseSpan, Trace, peak_of_lives


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """The peak of the live bytes of one rank's trace, over all of it and in each phase, and what is alive at
    the peak.

    ``at_peak_bytes``: bytes alive at the peak by category. If the peak lies inside a kernel whose memory was
    probed, what this kernel takes counts as "workspace". ``by_module_bytes``: bytes alive at the peak by the
    module that allocated them, without what that kernel takes. ``peak_op``: that kernel's operator, else the
    operator whose allocation reaches the peak, or "" if there is none. ``workspace_probed``: whether the peak
    lies inside such a kernel.
    """

    peak_bytes: int
    phase_peak_bytes: Mapping[str, int]
    at_peak_bytes: Mapping[str, int]
    by_module_bytes: Mapping[str, int]
    peak_phase: str
    peak_op: str
    peak_clock: int
    workspace_probed: bool


def levels(trace: Trace) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return two arrays with one entry for each allocation and each free of the trace: its clock, and the
    live bytes after it. They are sorted by clock; at the same clock, allocations come before frees.
    """
    clock = [a.start for a in trace.allocations] + [a.end for a in trace.allocations if a.end is not None]
    changes = [a.size_bytes for a in trace.allocations]
    changes += [-a.size_bytes for a in trace.allocations if a.end is not None]
    order = numpy.argsort(numpy.array(clock, dtype=numpy.int64), kind="stable")
    return (
        numpy.array(clock, dtype=numpy.int64)[order],
        numpy.cumsum(numpy.array(changes, dtype=numpy.int64)[order]),
    )


def live_peak_bytes(trace: Trace) -> int:
    """Return the highest number of live bytes between the operators of the trace; at the same clock, frees
    come before allocations."""
    return peak_of_lives((a.start, a.end, a.size_bytes) for a in trace.allocations)


def memory_profile(trace: Trace, calibration: Calibration) -> MemoryProfile:
    """Return the profile of the trace. It counts the live bytes between operators, and those inside the
    operators of which ``calibration.op_peak_bytes`` has the peak, because they were run alone to measure it.

    The setup of later steps than the first does not count for the peak of the setup phase, as nothing is
    built then.
    """
    trace = with_kept(trace, calibration)
    clock, live = levels(trace)
    phase_peak, peaks = Counter[str](), []
    for span in trace.spans:
        start_index, end_index = numpy.searchsorted(clock, (span.start, span.end))
        highest_bytes = int(live[start_index - 1]) if start_index else 0  # the level at its start
        if end_index > start_index:
            top_index = start_index + int(numpy.argmax(live[start_index:end_index]))
            peaks.append((int(live[top_index]), int(clock[top_index]), str(span.phase), "", False))
            highest_bytes = max(highest_bytes, int(live[top_index]))
        if span.phase is Phase.SETUP and span.start:
            continue  # nothing is built between steps
        phase_peak[str(span.phase)] = max(phase_peak[str(span.phase)], highest_bytes)
    for op, op_peak in _inside(trace, clock, live, calibration):
        if op.phase is Phase.SETUP and op.clock >= trace.spans[0].end:
            continue
        peaks.append((op_peak, op.clock, str(op.phase), op.op, True))
        phase_peak[str(op.phase)] = max(phase_peak[str(op.phase)], op_peak)
    # A probe that finds only the outputs adds nothing: ties go to the level between operators.
    top_bytes, peak_clock, phase, op_name, probed = max(peaks, key=lambda p: (p[0], not p[4]))
    live_allocations = trace.live_at(peak_clock)
    categories = _sum_by(live_allocations, lambda a: str(a.category))
    modules = _sum_by(live_allocations, lambda a: a.module)
    if (workspace_bytes := top_bytes - sum(categories.values())) > 0:
        workspace = str(Category.WORKSPACE)  # which may be there, as workspaces of BLAS that are kept
        categories[workspace] = categories.get(workspace, 0) + workspace_bytes
    return MemoryProfile(
        peak_bytes=top_bytes,
        phase_peak_bytes=dict(phase_peak),
        at_peak_bytes=categories,
        by_module_bytes=modules,
        peak_phase=phase,
        peak_op=op_name or next((a.op for a in trace.allocations if a.start == peak_clock), ""),
        peak_clock=peak_clock,
        workspace_probed=probed,
    )


def with_workspace(trace: Trace, profile: MemoryProfile) -> Trace:
    """Return the trace with the kernel workspace at the peak of ``profile`` added as an allocation of one
    tick of the clock, so that the highest level of the trace is that peak. The trace is unchanged if the peak
    does not lie inside an operator with a workspace. ``profile``: of ``trace``.
    """
    clock = profile.peak_clock
    op = next((o for o in trace.ops if o.clock == clock), None)
    size_bytes = profile.at_peak_bytes.get(str(Category.WORKSPACE), 0)
    size_bytes -= sum(a.size_bytes for a in trace.live_at(clock) if a.category is Category.WORKSPACE)
    if op is None or not size_bytes:
        return trace
    workspace = Allocation(
        start=clock,
        end=clock + 1,
        size_bytes=size_bytes,
        category=Category.WORKSPACE,
        phase=op.phase,
        step=op.step,
        module=op.module,
        op=op.op,
    )
    return dataclasses.replace(trace, allocations=(*trace.allocations, workspace))


def with_kept(trace: Trace, calibration: Calibration) -> Trace:
    """Return the trace with the measured sizes of those tensors in which forward kernels hand workspace to
    backward. Fake tensors show them with 0 bytes; the sizes come from ``calibration.op_kept_bytes``. The
    trace is unchanged if that has no size for any of its operators.
    """
    if not any(op.signature in calibration.op_kept_bytes for op in trace.ops):
        return trace
    empty_allocations = {(a.op, a.start): a for a in trace.allocations if not a.size_bytes}
    sizes: dict[int, int] = {}
    for op in trace.ops:
        kept_bytes = calibration.op_kept_bytes.get(op.signature)
        starts = [start for name, start in empty_allocations if name == op.op and start > op.clock]
        if kept_bytes and starts:
            sizes[min(starts)] = kept_bytes
    allocations = (
        dataclasses.replace(a, size_bytes=sizes[a.start]) if a.start in sizes else a
        for a in trace.allocations
    )
    return dataclasses.replace(trace, allocations=tuple(allocations))


def _inside(
    trace: Trace, clock: numpy.ndarray, live: numpy.ndarray, calibration: Calibration
) -> Iterator[tuple[OpCall, int]]:
    """Yield (operator, highest live bytes inside it) for each operator whose own peak was probed: the level
    at its start plus ``calibration.op_peak_bytes``. ``clock`` and ``live``: the levels of the trace
    (`levels`).
    """
    for op in trace.ops:
        op_peak_bytes = calibration.op_peak_bytes.get(op.signature)
        if op_peak_bytes is not None:
            index = int(numpy.searchsorted(clock, op.clock, side="right")) - 1
            yield op, (int(live[index]) if index >= 0 else 0) + op_peak_bytes


def _sum_by(allocations: Iterable[Allocation], key: Callable[[Allocation], str]) -> dict[str, int]:
    total = Counter[str]()
    for a in allocations:
        total[key(a)] += a.size_bytes
    return dict(total.most_common())


def timeline(trace: Trace, points: int) -> tuple[int, ...]:
    """Return the live bytes over the last traced step, without setup, as about ``points`` values in the order
    of time.

    Every forward, backward and optimizer phase gets the same number of values, at least two; each is the
    highest level in its part of the phase. So a measured step can be laid over it. Micro-steps that were not
    traced are shown as copies of those that represent them.
    """
    clock, live = levels(trace)
    step_spans = trace.last_step_spans
    micro_spans, optimizer_spans = [s for s in step_spans if s.phase is not Phase.OPTIMIZER], step_spans[-1:]
    stretches = []
    for span in (*micro_spans, *_repeated(trace) * trace.repeated_micro_steps, *optimizer_spans):
        start_index, end_index = numpy.searchsorted(clock, (span.start, span.end))
        stretches.append([int(v) for v in live[max(0, start_index - 1) : end_index]])
    return thin_phases(stretches, points)


def step_ops(trace: Trace) -> tuple[tuple[OpCall, int], ...]:
    """Return (operator call, how often a step makes it) for the calls of the last traced step, without setup,
    in the order of the trace.

    Of equal micro-steps only some are traced. A call in a micro-step that represents n others, which were not
    traced, counts n + 1 times. Calls in equal slices count as `OpCall.times` says.
    """
    repeated_spans, repetitions = _repeated(trace), trace.repeated_micro_steps
    return tuple(
        (
            op,
            op.times * (1 + repetitions if any(s.start <= op.clock < s.end for s in repeated_spans) else 1),
        )
        for op in trace.last_step_ops
    )


def _repeated(trace: Trace) -> tuple[PhaseSpan, ...]:
    """Return the spans of the forwards and backwards that represent the forwards and backwards of micro-steps
    that were not traced.

    They are the trace's ``repeated_spans``; if it has none, the last forward and the last backward of the
    last step, or () if that step has neither. In a pipeline, spans of other micro-batches may lie between
    them. They are returned even if all micro-steps were traced.
    """
    if trace.repeated_spans:
        return trace.repeated_spans
    step_spans = [s for s in trace.spans if s.step == trace.steps - 1]
    phases = [[s for s in step_spans if s.phase is phase][-1:] for phase in (Phase.FORWARD, Phase.BACKWARD)]
    return (*phases[0], *phases[1])
