"""Compare a prediction with the stored one: which peaks grew, in which modules, at which lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from memfit.cost.module_memory import COLUMNS, MODULE_RATIO, module_sums
from memfit.types.baseline import (
    OTHERS,
    ROOT,
    BaselineComparison,
    MemoryBaseline,
    MemoryDrift,
    ModuleGrowth,
    ModuleMemory,
)
from memfit.types.units import MIB, format_bytes

_SEGMENT_BYTES: Final = 20 * MIB  # torch's caching allocator reserves memory in steps of up to this size
_MOST_MODULES: Final = 5  # named for the drift of one phase


def compare_baseline(
    stored: MemoryBaseline, predicted: MemoryBaseline, tolerance_ratio: float
) -> BaselineComparison:
    """Return how the prediction ``predicted``, which has the rows of all its modules, differs from the stored
    one: what grew by more than the tolerance (drifts), and notes, such as on phases whose peak fell.

    A phase has drifted if its peak grew by more than ``tolerance_ratio`` of the stored one. A module has
    drifted if its bytes in a phase grew by more than that share of the stored ones, or of 1 % of the stored
    peak if the module had less. New modules count together, against those that are gone: a renamed module is
    no drift. Of alike blocks, the largest is compared with the largest, and so on. A phase that has drifted
    as a whole has no drifts of single modules; its drift names up to five modules that grew. Reserved memory
    has drifted if it grew by more than the tolerance and by more than 20 MiB, as it is reserved in steps of
    up to that size.
    """
    modules = _Modules(stored, predicted, tolerance_ratio)
    drifts = [*_of_phases(stored, predicted, modules, tolerance_ratio)]
    drifts += _of_modules(modules, [drift.phase for drift in drifts])
    drifts += _of_reserved(stored, predicted, tolerance_ratio)
    fallen = [*_decrease_notes(stored, predicted, tolerance_ratio)]
    return BaselineComparison(
        title=stored.title,
        drifts=tuple(drifts),
        notes=(*_notes(stored, predicted, modules), *fallen),
        fell=bool(fallen),
    )


class _Modules:
    """The modules of a stored and a new prediction. ``known``: those that the stored one names and that still
    exist; ``gone``: those that it names and that hold nothing any more; ``new``: those that it does not name
    and that hold, in one column, more than 1 % of its peak x (1 + tolerance). All others are small and
    counted together."""

    def __init__(self, stored: MemoryBaseline, predicted: MemoryBaseline, tolerance_ratio: float) -> None:
        self._tolerance_ratio, self._least_bytes = tolerance_ratio, MODULE_RATIO * stored.allocated_bytes
        self._rows_before, self._rows_now = stored.modules, predicted.modules
        self._blocks_before, self._blocks_now = stored.blocks, {b.module: b for b in predicted.blocks}
        self._before, self._now = module_sums(stored.modules), module_sums(predicted.modules)
        listed = self._before.keys() - {OTHERS}
        unlisted = self._now.keys() - listed
        limit_bytes = self._least_bytes * (1 + tolerance_ratio)
        self.known, self.gone = sorted(listed & self._now.keys()), sorted(listed - self._now.keys())
        self.new = sorted(m for m in unlisted if max(self._now[m].values()) > limit_bytes)
        self._small = unlisted - set(self.new)

    def growth(self, columns: Collection[str]) -> tuple[ModuleGrowth, ...]:
        """Return the modules that hold more bytes than before in these ``columns`` together, such as
        "forward_bytes", the largest growth first; small modules count as one. Modules that are gone are left
        out."""

        def total(sums: dict[str, dict[str, int]], modules: Iterable[str]) -> int:
            return sum(sums[m][c] for m in modules if m in sums for c in columns)

        growth = [
            ModuleGrowth(
                module=module,
                line=self._grown_line(module, columns),
                from_bytes=total(self._before, [module]),
                to_bytes=total(self._now, [module]),
                new=module in self.new,
            )
            for module in (*self.known, *self.new)
        ]
        small_before, small_now = total(self._before, [OTHERS]), total(self._now, self._small)
        growth.append(ModuleGrowth(module=OTHERS, line="", from_bytes=small_before, to_bytes=small_now))
        growing = (g for g in growth if g.to_bytes > g.from_bytes)
        return tuple(sorted(growing, key=lambda g: (g.from_bytes - g.to_bytes, g.module)))

    def drifted(self, column: str) -> list[ModuleGrowth]:
        """Return the modules whose growth in this ``column``, such as "forward_bytes", is above the
        tolerance, the largest first. New modules are judged by the growth of their sum over that of the
        modules that are gone: all with bytes in this column are returned, or none."""
        gone_bytes = sum(self._before[m][column] for m in self.gone)
        new_bytes = sum(self._now[m][column] for m in self.new)
        has_new = self._is_drift(gone_bytes, new_bytes)
        whole = [
            g
            for g in self.growth((column,))
            if (has_new if g.new else self._is_drift(g.from_bytes, g.to_bytes))
        ]
        return [*whole, *self._drifted_blocks(column, {g.module for g in whole})]

    def _drifted_blocks(self, column: str, drifted: Collection[str]) -> Iterator[ModuleGrowth]:
        """Yield the largest growth of a single block in this ``column`` for each module of alike blocks that
        has not ``drifted`` as a whole. The n-th largest before is compared with the n-th largest now."""
        for blocks in self._blocks_before:
            now = self._blocks_now.get(blocks.module)
            if now is None or blocks.module in drifted:
                continue
            pairs = zip(getattr(blocks, column), getattr(now, column), strict=False)
            grown = [(to_b, from_b) for from_b, to_b in pairs if self._is_drift(from_b, to_b)]
            if grown:
                to_bytes, from_bytes = max(grown, key=lambda pair: pair[0] - pair[1])
                yield ModuleGrowth(
                    module=blocks.module,
                    line=self._grown_line(blocks.module, (column,)),
                    from_bytes=from_bytes,
                    to_bytes=to_bytes,
                    single=True,
                )

    def _is_drift(self, from_bytes: int, to_bytes: int) -> bool:
        return to_bytes - from_bytes > self._tolerance_ratio * max(from_bytes, self._least_bytes)

    def _grown_line(self, module: str, columns: Collection[str]) -> str:
        """Return the line of ``module``, such as "src/model.py:12", whose bytes in these ``columns``, such as
        "forward_bytes", grew most; "" if no line is known. A line before and a line now are the same if their
        file and text are equal."""

        def by_code(rows: Iterable[ModuleMemory]) -> Counter[tuple[str, str]]:
            sizes = Counter[tuple[str, str]]()
            for row in rows:
                if row.module == module and row.line:
                    sizes[row.file, row.code] += sum(getattr(row, column) for column in columns)
            return sizes

        before, now = by_code(self._rows_before), by_code(self._rows_now)
        grown = max(now, key=lambda key: (now[key] - before[key], key), default=None)
        lines = (r.line for r in self._rows_now if r.module == module and (r.file, r.code) == grown)
        return next(lines, "")


def _of_phases(
    stored: MemoryBaseline, predicted: MemoryBaseline, modules: _Modules, tolerance_ratio: float
) -> Iterator[MemoryDrift]:
    for phase in dict.fromkeys((*stored.phase_bytes, *predicted.phase_bytes)):
        from_bytes, to_bytes = stored.phase_bytes.get(phase, 0), predicted.phase_bytes.get(phase, 0)
        if to_bytes > from_bytes * (1 + tolerance_ratio):
            columns = {"state_bytes", f"{phase}_bytes"} & set(COLUMNS)
            yield MemoryDrift(
                phase=phase,
                whole=True,
                from_bytes=from_bytes,
                to_bytes=to_bytes,
                modules=modules.growth(columns)[:_MOST_MODULES],
            )


def _of_modules(modules: _Modules, drifted_phases: Collection[str]) -> Iterator[MemoryDrift]:
    """Yield the drifts of modules in phases that have not drifted as a whole. Drifts of states (parameters,
    gradients, optimizer state, inputs), which are in all phases, are yielded only if no phase has drifted."""
    for column in COLUMNS:
        phase = {"state_bytes": "states"}.get(column, column.removesuffix("_bytes"))
        if phase in drifted_phases or (phase == "states" and drifted_phases):
            continue
        for growth in modules.drifted(column):
            yield MemoryDrift(
                phase=phase,
                whole=False,
                from_bytes=growth.from_bytes,
                to_bytes=growth.to_bytes,
                modules=(growth,),
            )


def _of_reserved(
    stored: MemoryBaseline, predicted: MemoryBaseline, tolerance_ratio: float
) -> Iterator[MemoryDrift]:
    from_bytes, to_bytes = stored.reserved_bytes, predicted.reserved_bytes
    if from_bytes is None or to_bytes is None:
        return
    if to_bytes - from_bytes > max(tolerance_ratio * from_bytes, _SEGMENT_BYTES):
        yield MemoryDrift(phase="reserved", whole=True, from_bytes=from_bytes, to_bytes=to_bytes)


def _decrease_notes(
    stored: MemoryBaseline, predicted: MemoryBaseline, tolerance_ratio: float
) -> Iterator[str]:
    for phase, from_bytes in stored.phase_bytes.items():
        to_bytes = predicted.phase_bytes.get(phase, 0)
        if to_bytes < from_bytes * (1 - tolerance_ratio):
            yield f"{phase} takes less: {_change_text(from_bytes, to_bytes)}"


def _notes(stored: MemoryBaseline, predicted: MemoryBaseline, modules: _Modules) -> Iterator[str]:
    if (stored.torch, stored.memfit) != (predicted.torch, predicted.memfit):
        yield (
            f"the baseline was written by torch {stored.torch} and memfit {stored.memfit}; this is torch "
            f"{predicted.torch} and memfit {predicted.memfit}"
        )
    if stored.plan_label != predicted.plan_label:
        yield f"the plan was {stored.plan_label}; it is {predicted.plan_label}"
    if stored.parameter_count != predicted.parameter_count:
        yield f"the model had {stored.parameter_count:,} parameters; it has {predicted.parameter_count:,}"
    for what, names in (("new modules", modules.new), ("modules that are gone", modules.gone)):
        if names:
            yield f"{what}: {', '.join(map(_module_name, names))}"


# -- texts ----------------------------------------------------------------------------------------


def drift_text(drift: MemoryDrift) -> str:
    """Return the drift in one line: "forward: 1.2 GiB -> 1.3 GiB (+8.3 %); encoder +100 MiB (model.py:12)"
    or, of one module, "forward of encoder, model.py:12: 1 GiB -> 1.1 GiB (+10.0 %)"."""
    change = _change_text(drift.from_bytes, drift.to_bytes)
    if not drift.whole:
        growth = drift.modules[0]
        place = f", {growth.line}" if growth.line else ""
        return f"{drift.phase} of {_growth_name(growth)}{place}: {change}"
    grown = ", ".join(map(_growth_text, drift.modules))
    what = {"reserved": "reserved memory"}.get(drift.phase, drift.phase)
    return f"{what}: {change}{f'; {grown}' if grown else ''}"


def _growth_text(growth: ModuleGrowth) -> str:
    place = f" ({growth.line})" if growth.line else ""
    return f"{_growth_name(growth)} +{format_bytes(growth.to_bytes - growth.from_bytes)}{place}"


def _growth_name(growth: ModuleGrowth) -> str:
    mark = "new module " if growth.new else "one of " if growth.single else ""
    return f"{mark}{_module_name(growth.module)}"


def _module_name(module: str) -> str:
    return {ROOT: "the model itself", OTHERS: "modules of less than 1 % each"}.get(module, module)


def _change_text(from_bytes: int, to_bytes: int) -> str:
    percent = f" ({100 * (to_bytes / from_bytes - 1):+.1f} %)" if from_bytes else ""
    return f"{format_bytes(from_bytes)} -> {format_bytes(to_bytes)}{percent}"
