"""What a traced step keeps alive at each instant, and why two plans differ: plain data, no words."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from memfit.report.quantities import Figure, Sentence, predicted
from memfit.types.result import Estimate
from memfit.types.trace import Allocation, Trace

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TracedEstimate:
    """A plan's estimate with the trace it was made from.

    The level of the trace at the instant ``peak_clock`` is the estimate's peak, less memory that is not in
    the trace, such as workspaces of BLAS.
    """

    estimate: Estimate
    trace: Trace
    peak_clock: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """Allocations alive at the same time from one operator of one module on one line of user code, taken
    together. ``count``: their number; ``size_bytes``: their sum.

    Modules whose paths differ only in numbers count as one: ``layers.*.mlp``.
    """

    category: str
    module: str
    op: str
    line: str
    size_bytes: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """An operator of a module that holds more or fewer bytes at the second plan's peak than at the
    first's.
    """

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
    """The difference of two plans of one job.

    The categories add up exactly to the difference of the peaks. The movers do too, except for memory that is
    not in the traces, such as workspaces of BLAS.
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
    """Return (clock, change in bytes, allocation) for every allocation and every free, by clock. At the same
    clock, frees come first."""
    births = [(a.start, a.size_bytes, a) for a in trace.allocations]
    deaths = [(a.end, -a.size_bytes, a) for a in trace.allocations if a.end is not None]
    return sorted([*births, *deaths], key=lambda e: (e[0], e[1]))


def live_allocations(trace: Trace, clock: int) -> Iterator[Allocation]:
    """Return the allocations that are alive at ``clock``: those made at it are, those freed at it are not."""
    return (a for a in trace.allocations if a.start <= clock and (a.end is None or a.end > clock))


def op_name(op: str) -> str:
    """Shorten ``aten.mm.default`` to ``mm``."""
    return op.removeprefix("aten.").removesuffix(".default")


def contributors(explained: TracedEstimate) -> tuple[Contributor, ...]:
    """Return what is alive in the trace at the peak, largest first."""
    size, count = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for a in live_allocations(explained.trace, explained.peak_clock):
        key = (str(a.category), _folded(a.module), op_name(a.op), a.line)
        size[key] += a.size_bytes
        count[key] += 1
    return tuple(
        Contributor(category=c, module=m, op=o, line=n, size_bytes=total, count=count[c, m, o, n])
        for (c, m, o, n), total in size.most_common()
    )


def difference(first: TracedEstimate, second: TracedEstimate) -> PlanDifference:
    """Compare two plans of one job at their peaks."""
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


def _folded(module: str) -> str:
    return _INDEX.sub("*", module)


def _changes(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    changes = {name: second.get(name, 0) - first.get(name, 0) for name in {**first, **second}}
    return dict(sorted(changes.items(), key=lambda item: -abs(item[1])))


def _sentences(comparison: PlanDifference) -> Iterator[Sentence]:
    """Yield sentences on each plan's peak, their difference, and the largest change by category, by phase and
    by operator of a module, where there is one."""
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
