"""Choose which tensors to drop: an integer program over a recorded step, solved by HiGHS.

Binary ``D[v]``: v is dropped after forward. ``A[v, k]`` in [0, 1]: v is still absent after the k-th first
need of backward. With D fixed, the largest A is integral: absence only ends, and a recomputed tensor needs
its sources (A[u, k] <= 1 - D[v] + A[v, k] for v made from u). Each instant of the plain step's memory level
gives a row: level - bytes absent then + bytes that recomputation takes temporarily <= budget. The objective
is the time of all calls that run again (calls shared by several tensors count once). The program ignores the
temporary bytes of recomputation and tensors kept longer as sources. A replay of its answer finds them, and
they are added to the rows. (Formulation after Jain et al., Checkmate, 2020, with one recomputation of each
tensor.)
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy

from memfit.cost.recompute_replay import Candidate, Replay

_WINDOW = 24  # a tensor may be recomputed up to this many first needs before its own
_ROUNDS = 6
GAP_RATIO = 0.003
_STEPS_UP = (0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8)  # steps from the lower bound to the plain peak
_NODES = 400  # node limit of the branch and bound; a time limit would not be deterministic


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeChoice:
    """A set of tensors to drop, with the replayed peak and the cost.

    ``dropped``: numbers of the candidates.
    """

    dropped: frozenset[int]
    peak_bytes: int
    cost_s: float


def solve(replay: Replay, budget_bytes: int, *, gap_ratio: float = GAP_RATIO) -> RecomputeChoice | None:
    """Return the cheapest choice found whose replayed peak is within the budget, or None."""
    program = _Program(replay)
    found: list[RecomputeChoice] = []
    for _ in range(_ROUNDS):
        dropped = program.dropped(budget_bytes, gap_ratio)
        if dropped is None:
            break
        choice = refined(replay, _choice(replay, dropped), budget_bytes)
        found.append(choice)
        if not program.learn(choice.dropped, budget_bytes):
            break
    fitting = [c for c in found if c.peak_bytes <= budget_bytes]
    return min(fitting, key=lambda c: (c.cost_s, sorted(c.dropped))) if fitting else None


def smallest(replay: Replay) -> RecomputeChoice:
    """Return a choice near the lowest possible peak.

    It is the first one found when raising the budget from the optimum of the program without integrality.
    """
    plain = _choice(replay, frozenset())
    low = _Program(replay).lowest_bytes()
    for share in _STEPS_UP:
        found = solve(replay, int(low + share * (plain.peak_bytes - low)), gap_ratio=1.0)
        if found is not None:
            return found
    return plain


def _choice(replay: Replay, dropped: frozenset[int]) -> RecomputeChoice:
    return RecomputeChoice(
        dropped=dropped, peak_bytes=replay.peak_bytes(dropped), cost_s=replay.cost_s(dropped)
    )


def refined(replay: Replay, choice: RecomputeChoice, budget_bytes: int) -> RecomputeChoice:
    """Keep tensors again, the most expensive first, while the replayed peak stays within the budget."""
    if choice.peak_bytes > budget_bytes:
        return choice
    by_cost = sorted(choice.dropped, key=lambda n: (choice.cost_s - replay.cost_s(choice.dropped - {n}), n))
    for number in reversed(by_cost):
        less = _choice(replay, choice.dropped - {number})
        if less.peak_bytes <= budget_bytes and less.cost_s <= choice.cost_s:
            choice = less
    return choice


class _Program:
    """Columns: D of each candidate, R of each call, A of each candidate and step of its window, and the
    peak.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.index = {c.number: i for i, c in enumerate(replay.candidates)}
        self.events = sorted({c.first_need for c in replay.candidates})
        self.place = {at: k for k, at in enumerate(self.events)}
        calls = sorted({k for c in replay.candidates for k in c.calls})
        self.call = {k: len(self.index) + i for i, k in enumerate(calls)}
        self.absent: dict[tuple[int, int], int] = {}
        column = len(self.index) + len(calls)
        for c in replay.candidates:
            last = self.place[c.first_need]
            for k in range(max(0, last - _WINDOW), last):
                self.absent[c.number, k] = column
                column += 1
        self.peak, self.width = column, column + 1
        self.rows: list[tuple[dict[int, float], float]] = []  # (coefficients, upper bound)
        self._structure()
        self.instants = self._instants()
        # temporary bytes of recomputation at that instant
        self.moment: defaultdict[int, int] = defaultdict(int)

    def _structure(self) -> None:
        for c in self.replay.candidates:
            own = self.index[c.number]
            self.rows += [({own: 1.0, self.call[k]: -1.0}, 0.0) for k in c.calls]
            last = self.place[c.first_need]
            first = max(0, last - _WINDOW)
            before = own
            for k in range(first, last):
                self.rows.append(({self.absent[c.number, k]: 1.0, before: -1.0}, 0.0))
                before = self.absent[c.number, k]
            for source in c.sources:
                if source in self.index:
                    self._after(c, self.replay.candidates[self.index[source]])

    def _after(self, made: Candidate, source: Candidate) -> None:
        """Require that ``source`` is present when ``made`` is recomputed."""
        own, last, need = self.index[made.number], self.place[source.first_need], self.place[made.first_need]
        first = max(0, last - _WINDOW)
        if need < first:
            self.rows.append(({own: 1.0, self.index[source.number]: 1.0}, 1.0))
        for k in range(first, min(last, need + 1)):
            row = {self.absent[source.number, k]: 1.0, own: 1.0}
            if k < need and (made.number, k) in self.absent:
                row[self.absent[made.number, k]] = -1.0
            if k == need or (made.number, k) in self.absent:
                self.rows.append((row, 1.0))

    def _instants(self) -> list[tuple[int, int]]:
        """Return (clock, level): the plain step's highest level between two changes of what may be absent."""
        clock, level = self.replay.clock, self.replay.level
        bounds = sorted({*self.events, *(c.gone for c in self.replay.candidates)})
        parts = numpy.searchsorted(numpy.array(bounds, dtype=numpy.int64), clock, side="right")
        top: dict[int, tuple[int, int]] = {}
        for part, at, value in zip(parts.tolist(), clock.tolist(), level.tolist(), strict=True):
            if part not in top or value > top[part][1]:
                top[part] = (at, value)
        return list(top.values())

    def _row(self, at: int) -> dict[int, float]:
        """Return the bytes absent at clock ``at``, by column, as negative coefficients."""
        # index of the last first need up to that clock
        step = int(numpy.searchsorted(self.events, at, side="right")) - 1
        row = {}
        for c in self.replay.candidates:
            if c.gone <= at < c.first_need:
                column = self.absent.get((c.number, step), self.index[c.number]) if step >= 0 else None
                row[self.index[c.number] if column is None else column] = -float(c.size_bytes)
        return row

    def dropped(self, budget_bytes: int, gap_ratio: float) -> frozenset[int] | None:
        """Return a cheapest choice under the program's rows, or None if there is none."""
        seconds = numpy.zeros(self.width)
        total = sum(self.replay.seconds[k] for k in self.call) or 1.0
        for k, column in self.call.items():
            seconds[column] = (self.replay.seconds[k] + 1e-9) / total
        rows = []
        for at, level in self.instants:
            top = level + self.moment[at]
            if top > budget_bytes:
                rows.append((self._row(at), float(budget_bytes - top)))
        solved = self._solved(rows, seconds, gap_ratio)
        if solved is None:
            return None
        return frozenset(n for n, i in self.index.items() if solved[i] > 0.5)

    def lowest_bytes(self) -> int:
        """Return a lower bound on the peak of any choice: the optimum of the program without integrality."""
        unit = float(self.replay.level.max())
        objective = numpy.zeros(self.width)
        objective[self.peak] = 1.0
        rows = [({**self._row(at), self.peak: -unit}, -float(level)) for at, level in self.instants]
        solved = self._solved(rows, objective, None)
        assert solved is not None
        return int(solved[self.peak] * unit)

    def _solved(
        self, more: list[tuple[dict[int, float], float]], objective: numpy.ndarray, gap_ratio: float | None
    ) -> numpy.ndarray | None:
        """Solve the program.

        ``more``: additional rows in bytes. ``gap_ratio``: relative optimality gap; None: without integrality.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        unit = float(max(1, int(self.replay.level.max())))
        rows = self.rows + [({k: v / unit for k, v in row.items()}, limit / unit) for row, limit in more]
        entries = [(r, k, v) for r, (row, _) in enumerate(rows) for k, v in row.items()]
        matrix = csr_array(
            ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])),
            shape=(len(rows), self.width),
        )
        whole = numpy.zeros(self.width)
        whole[: len(self.index)] = gap_ratio is not None
        solved = milp(
            objective,
            integrality=whole,
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, ub=[limit for _, limit in rows]),
            options={"mip_rel_gap": gap_ratio or 0.0, "node_limit": _NODES},
        )
        return None if solved.x is None else numpy.asarray(solved.x)

    def learn(self, dropped: frozenset[int], budget_bytes: int) -> bool:
        """Add what the replay finds above the program's rows to them. Returns whether anything was added."""
        clock, level = self.replay.levels(dropped)
        known = numpy.array([at for at, _ in self.instants], dtype=numpy.int64)
        order = numpy.argsort(known)
        changed = False
        tops: dict[int, int] = {}
        for at, value in zip(clock.tolist(), level.tolist(), strict=True):
            if value > budget_bytes:
                near = int(known[order[max(0, int(numpy.searchsorted(known[order], at, side="right")) - 1)]])
                tops[near] = max(tops.get(near, 0), int(value))
        levels = dict(self.instants)
        for at, value in tops.items():
            absent = self._absent(at, dropped)
            more = value - (levels[at] - absent)
            if more > self.moment[at]:
                self.moment[at] = more
                changed = True
        return changed

    def _absent(self, at: int, dropped: frozenset[int]) -> int:
        """Return the most bytes that the program treats as absent: of dropped tensors before their first
        need.
        """
        return sum(
            c.size_bytes
            for c in self.replay.candidates
            if c.number in dropped and c.gone <= at < c.first_need
        )
