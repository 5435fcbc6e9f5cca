"""What a traced step keeps alive at each instant, and why two plans differ: plain data, no words."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from memfit.cost.memory import memory_profile, with_workspace
from memfit.report.quantities import Figure, Sentence, predicted
from memfit.types.machine import Calibration
from memfit.types.result import Estimate
from memfit.types.trace import Allocation, Trace

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TracedEstimate:
    """A plan's estimate with the trace it was made from.

    The allocations of ``trace`` that are alive at the clock ``peak_clock`` add up to the estimate's peak
    (``allocated_bytes``) minus memory that is not in the trace, such as workspaces of BLAS.
    """

    estimate: Estimate
    trace: Trace
    peak_clock: int


def traced_estimate(estimate: Estimate, trace: Trace, calibration: Calibration) -> TracedEstimate:
    """Return ``estimate`` with the trace of its rank. ``trace``: that trace; the workspace at the peak is
    added to it."""
    profile = memory_profile(trace, calibration)
    return TracedEstimate(
        estimate=estimate, trace=with_workspace(trace, profile), peak_clock=profile.peak_clock
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """All allocations that are alive at the peak and have the same category, module, operator and line of
    user code. ``count``: their number; ``size_bytes``: their sum; ``line``: "FILE:NUMBER", or "" if lines
    were not traced.

    Modules whose paths differ only in numbers count as the same one, with stars for the numbers:
    ``layers.*.mlp``.
    """

    category: str
    module: str
    op: str
    line: str
    size_bytes: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """The bytes of one category that one operator of one module has alive at the first plan's peak and at the
    second plan's; the two differ."""

    category: str
    module: str
    op: str
    first_bytes: int
    second_bytes: int

    @property
    def change_bytes(self) -> int:
        return self.second_bytes - self.first_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanDifference:
    """The difference of the predictions for two plans of one job.

    ``by_category_bytes`` adds up exactly to the difference of the peaks. So do the ``movers``, which are
    sorted by the size of the change, largest first, except for memory that is not in the traces, such as
    workspaces of BLAS. ``sentences``: the main differences in words.
    """

    first: Estimate
    second: Estimate
    by_category_bytes: Mapping[str, int]  # second - first at their peaks, largest change first
    by_phase_bytes: Mapping[str, int]  # second - first, each phase at its own peak
    movers: tuple[MemoryChange, ...]
    sentences: tuple[Sentence, ...]

    @property
    def change_bytes(self) -> int:
        return int(self.second.allocated_bytes.value) - int(self.first.allocated_bytes.value)


def events(trace: Trace) -> list[tuple[int, int, Allocation]]:
    """Return (clock, change in bytes, allocation) for every allocation (positive) and every free (negative),
    sorted by clock; at the same clock, frees come first. Allocations that are never freed have no free."""
    births = [(a.start, a.size_bytes, a) for a in trace.allocations]
    deaths = [(a.end, -a.size_bytes, a) for a in trace.allocations if a.end is not None]
    return sorted([*births, *deaths], key=lambda e: (e[0], e[1]))


def live_allocations(trace: Trace, clock: int) -> Iterator[Allocation]:
    """Return the allocations that are alive at ``clock``, in the trace's order. Those made at that clock
    count as alive, those freed at it do not."""
    return (a for a in trace.allocations if a.start <= clock and (a.end is None or a.end > clock))


def op_name(op: str) -> str:
    """Return the name of an operator without the prefix "aten." and the suffix ".default": "mm" for
    "aten.mm.default"."""
    return op.removeprefix("aten.").removesuffix(".default")


def contributors(explained: TracedEstimate) -> tuple[Contributor, ...]:
    """Return what is alive at the peak, in the trace: one `Contributor` for each combination of category,
    module, operator and line, the largest sum first."""
    size, count = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for a in live_allocations(explained.trace, explained.peak_clock):
        key = (str(a.category), _INDEX.sub("*", a.module), op_name(a.op), a.line)
        size[key] += a.size_bytes
        count[key] += 1
    return tuple(
        Contributor(category=c, module=m, op=o, line=n, size_bytes=total, count=count[c, m, o, n])
        for (c, m, o, n), total in size.most_common()
    )


def difference(first: TracedEstimate, second: TracedEstimate) -> PlanDifference:
    """Compare the predictions for two plans of one job: what is alive at their two peaks, by category and by
    operator of a module, and the peaks of each phase. Changes are ``second`` minus ``first``."""
    first_estimate, second_estimate = first.estimate, second.estimate
    bytes_by_plan = [Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()]
    for contributor_bytes, explained in zip(bytes_by_plan, (first, second), strict=True):
        for c in contributors(explained):
            contributor_bytes[c.category, c.module, c.op] += c.size_bytes
    movers = [
        MemoryChange(
            category=c,
            module=m,
            op=o,
            first_bytes=bytes_by_plan[0][c, m, o],
            second_bytes=bytes_by_plan[1][c, m, o],
        )
        for c, m, o in {**bytes_by_plan[0], **bytes_by_plan[1]}
    ]
    comparison = PlanDifference(
        first=first_estimate,
        second=second_estimate,
        by_category_bytes=_changes(first_estimate.at_peak_bytes, second_estimate.at_peak_bytes),
        by_phase_bytes=_changes(first_estimate.phase_peak_bytes, second_estimate.phase_peak_bytes),
        movers=tuple(sorted((m for m in movers if m.change_bytes), key=lambda m: -abs(m.change_bytes))),
        sentences=(),
    )
    return dataclasses.replace(comparison, sentences=tuple(_sentences(comparison)))


def _changes(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    changes = {name: second.get(name, 0) - first.get(name, 0) for name in {**first, **second}}
    return dict(sorted(changes.items(), key=lambda item: -abs(item[1])))


def _sentences(comparison: PlanDifference) -> Iterator[Sentence]:
    """Yield, in this order, a sentence on the first plan's peak (A), on the second's (B), and on the
    difference of the peaks; then on the largest change by category, by phase and by operator of a module,
    each only if something changed."""
    for name, estimate in (("A", comparison.first), ("B", comparison.second)):
        peak = predicted(estimate.allocated_bytes.value, "bytes")
        phase = Sentence(key=f"phase.{estimate.peak_phase}")
        plan, op = estimate.plan.label, op_name(estimate.peak_op)
        yield Sentence(
            key="explain.peak", values={"name": name, "plan": plan, "peak": peak, "phase": phase, "op": op}
        )
    first_bytes = comparison.first.allocated_bytes.value
    share = predicted(100 * abs(comparison.change_bytes) / first_bytes, "percent")
    yield _change("total", comparison.change_bytes, share=share)
    for kind, parts in (("category", comparison.by_category_bytes), ("phase", comparison.by_phase_bytes)):
        name, change_bytes = next(iter(parts.items()), ("", 0))
        if change_bytes:
            yield _change(kind, change_bytes, name=Sentence(key=f"{kind}.{name}"))
    for mover in comparison.movers[:1]:
        yield _change(
            "mover",
            mover.change_bytes,
            name=Sentence(key=f"category.{mover.category}"),
            op=mover.op,
            module=mover.module or Sentence(key="text.root"),
            first=predicted(mover.first_bytes, "bytes"),
            second=predicted(mover.second_bytes, "bytes"),
        )


def _change(kind: str, change_bytes: int, **values: Figure | str | Sentence) -> Sentence:
    direction = "more" if change_bytes > 0 else "less" if change_bytes else "same"
    size = predicted(abs(change_bytes), "bytes")
    return Sentence(key=f"explain.{kind}_{direction}", values={**values, "change": size})
