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

import contextlib
import ctypes
import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy

from memfit.cost.recompute_replay import Candidate, Replay

_ROUNDS = 6
_STEPS_UP = (0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8)  # steps from the lower bound to the plain peak


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SolverEffort:
    """How hard the solver tries.

    ``gap_ratio``: it may stop when its solution takes at most this much more time than the proven lower
    bound, relative to the bound. ``window``: a tensor may be recomputed up to this many first needs before
    its own. ``nodes``: limit on the nodes of the branch and bound; a limit on time would not be
    deterministic.
    """

    gap_ratio: float = 0.003
    window: int = 24
    nodes: int = 400


THOROUGH, QUICK = SolverEffort(), SolverEffort(gap_ratio=0.05, window=8, nodes=20)
_ANY = SolverEffort(gap_ratio=1.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeChoice:
    """A choice of tensors to drop after forward and to recompute in backward.

    ``dropped``: their numbers, as in `Candidate`. ``peak_bytes`` and ``cost_s``: the peak of the step and the
    seconds of recomputation with this choice, as `Replay` computes them.
    """

    dropped: frozenset[int]
    peak_bytes: int
    cost_s: float


def solve(replay: Replay, budget_bytes: int, *, effort: SolverEffort = THOROUGH) -> RecomputeChoice | None:
    """Choose tensors to drop so that the peak by ``replay`` is at most ``budget_bytes`` and recomputation
    takes least time. Return the fastest choice within the budget that an integer program finds in up to six
    rounds, corrected by a replay after each; None if it finds none.
    """
    program = _Program(replay, effort)
    choices: list[RecomputeChoice] = []
    for _ in range(_ROUNDS):
        dropped = program.dropped(budget_bytes)
        if dropped is None:
            break
        choice = refine_choice(replay, _choice(replay, dropped), budget_bytes)
        choices.append(choice)
        if not program.learn(choice.dropped, budget_bytes):
            break
    fitting_choices = [c for c in choices if c.peak_bytes <= budget_bytes]
    return min(fitting_choices, key=lambda c: (c.cost_s, sorted(c.dropped))) if fitting_choices else None


def smallest(replay: Replay) -> RecomputeChoice:
    """Return a choice of tensors to drop whose peak is near the lowest possible one.

    The budget is raised in steps from a lower bound on the peak towards the peak without dropping, and the
    first choice that `solve` finds is returned; if it finds none, the choice that drops nothing.
    """
    plain = _choice(replay, frozenset())
    lower_bound = _Program(replay, _ANY).lowest_bytes()
    for share in _STEPS_UP:
        choice = solve(replay, int(lower_bound + share * (plain.peak_bytes - lower_bound)), effort=_ANY)
        if choice is not None:
            return choice
    return plain


def _choice(replay: Replay, dropped: frozenset[int]) -> RecomputeChoice:
    return RecomputeChoice(
        dropped=dropped, peak_bytes=replay.peak_bytes(dropped), cost_s=replay.cost_s(dropped)
    )


def refine_choice(replay: Replay, choice: RecomputeChoice, budget_bytes: int) -> RecomputeChoice:
    """Return the choice without those tensors that need not be dropped: without them the replayed peak is
    still at most ``budget_bytes``, and recomputation takes no longer. The tensors are tried one by one, the
    one that saves most seconds of recomputation first. A choice whose peak is above the budget is returned as
    it is.
    """
    if choice.peak_bytes > budget_bytes:
        return choice
    by_cost = sorted(choice.dropped, key=lambda n: (choice.cost_s - replay.cost_s(choice.dropped - {n}), n))
    for number in reversed(by_cost):
        smaller = _choice(replay, choice.dropped - {number})
        if smaller.peak_bytes <= budget_bytes and smaller.cost_s <= choice.cost_s:
            choice = smaller
    return choice


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Discard what C code writes to standard output: some versions of HiGHS print a line of their own there,
    in the middle of the caller's output."""
    own, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    try:
        os.dup2(null, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(own, 1)
        os.close(own)
        os.close(null)


class _Program:
    """The integer program of one replay.

    Its columns are, in this order: for each candidate whether it is dropped; for each call whether it runs
    again; for each candidate whether it is still absent, at each of the clocks of ``effort.window`` before
    its own first need in backward at which another candidate is first needed; and the peak.
    """

    def __init__(self, replay: Replay, effort: SolverEffort) -> None:
        self.replay, self.effort = replay, effort
        self.index = {c.number: i for i, c in enumerate(replay.candidates)}
        self.events = sorted({c.first_need for c in replay.candidates})
        self.place = {clock: k for k, clock in enumerate(self.events)}
        calls = sorted({k for c in replay.candidates for k in c.calls})
        self.call = {k: len(self.index) + i for i, k in enumerate(calls)}
        self.absent: dict[tuple[int, int], int] = {}
        column = len(self.index) + len(calls)
        for c in replay.candidates:
            need_index = self.place[c.first_need]
            for k in range(max(0, need_index - self.effort.window), need_index):
                self.absent[c.number, k] = column
                column += 1
        self.peak, self.width = column, column + 1
        self.rows: list[tuple[dict[int, float], float]] = []  # (coefficients, upper bound)
        self._structure()
        self.instants = self._instants()
        # temporary bytes of recomputation at that instant
        self.temporary_bytes: defaultdict[int, int] = defaultdict(int)

    def _structure(self) -> None:
        for c in self.replay.candidates:
            drop_column = self.index[c.number]
            self.rows += [({drop_column: 1.0, self.call[k]: -1.0}, 0.0) for k in c.calls]
            need_index = self.place[c.first_need]
            first_index = max(0, need_index - self.effort.window)
            previous_column = drop_column
            for k in range(first_index, need_index):
                self.rows.append(({self.absent[c.number, k]: 1.0, previous_column: -1.0}, 0.0))
                previous_column = self.absent[c.number, k]
            for source in c.sources:
                if source in self.index:
                    self._require_source(c, self.replay.candidates[self.index[source]])

    def _require_source(self, candidate: Candidate, source: Candidate) -> None:
        """Add the rows that require that the tensor ``source``, if dropped, is present again when
        ``candidate``, which is made from it, is recomputed.
        """
        drop_column, source_need, candidate_need = (
            self.index[candidate.number],
            self.place[source.first_need],
            self.place[candidate.first_need],
        )
        first_index = max(0, source_need - self.effort.window)
        if candidate_need < first_index:
            self.rows.append(({drop_column: 1.0, self.index[source.number]: 1.0}, 1.0))
        for k in range(first_index, min(source_need, candidate_need + 1)):
            row = {self.absent[source.number, k]: 1.0, drop_column: 1.0}
            if k < candidate_need and (candidate.number, k) in self.absent:
                row[self.absent[candidate.number, k]] = -1.0
            if k == candidate_need or (candidate.number, k) in self.absent:
                self.rows.append((row, 1.0))

    def _instants(self) -> list[tuple[int, int]]:
        """Return (clock, live bytes) of the highest level, without dropping, in each stretch of the step. A
        new stretch begins at each clock at which a candidate is no longer needed by forward or is first
        needed by backward.
        """
        clock, level = self.replay.clock, self.replay.level
        bounds = sorted({*self.events, *(c.gone for c in self.replay.candidates)})
        parts = numpy.searchsorted(numpy.array(bounds, dtype=numpy.int64), clock, side="right")
        highest: dict[int, tuple[int, int]] = {}
        for part, instant, value in zip(parts.tolist(), clock.tolist(), level.tolist(), strict=True):
            if part not in highest or value > highest[part][1]:
                highest[part] = (instant, value)
        return list(highest.values())

    def _row(self, instant: int) -> dict[int, float]:
        """Return the row of the memory at clock ``instant``, column -> coefficient: for each candidate that
        may be absent then, minus its bytes, in the column of the variable that is 1 if it is absent.
        """
        # index of the last first need up to that clock
        event_index = int(numpy.searchsorted(self.events, instant, side="right")) - 1
        row = {}
        for c in self.replay.candidates:
            if c.gone <= instant < c.first_need:
                column = (
                    self.absent.get((c.number, event_index), self.index[c.number])
                    if event_index >= 0
                    else None
                )
                row[self.index[c.number] if column is None else column] = -float(c.size_bytes)
        return row

    def dropped(self, budget_bytes: int) -> frozenset[int] | None:
        """Return the numbers of the candidates that are dropped in the program's solution of least
        recomputation time; None if the solver finds no solution for ``budget_bytes`` within its limit of
        nodes.
        """
        seconds = numpy.zeros(self.width)
        total = sum(self.replay.seconds[k] for k in self.call) or 1.0
        for k, column in self.call.items():
            seconds[column] = (self.replay.seconds[k] + 1e-9) / total
        rows = []
        for instant, level in self.instants:
            peak = level + self.temporary_bytes[instant]
            if peak > budget_bytes:
                rows.append((self._row(instant), float(budget_bytes - peak)))
        solution = self._solve(rows, seconds)
        if solution is None:
            return None
        return frozenset(n for n, i in self.index.items() if solution[i] > 0.5)

    def lowest_bytes(self) -> int:
        """Return a lower bound on the peak in bytes of any choice: the optimum of the program if tensors
        could be dropped in part (without integrality).
        """
        unit = float(self.replay.level.max())
        objective = numpy.zeros(self.width)
        objective[self.peak] = 1.0
        rows = [({**self._row(instant), self.peak: -unit}, -float(level)) for instant, level in self.instants]
        solution = self._solve(rows, objective, is_integral=False)
        assert solution is not None
        return int(solution[self.peak] * unit)

    def _solve(
        self,
        extra_rows: list[tuple[dict[int, float], float]],
        objective: numpy.ndarray,
        *,
        is_integral: bool = True,
    ) -> numpy.ndarray | None:
        """Return the values of all columns that minimise ``objective`` (one coefficient for each column), or
        None if no solution is found.

        ``extra_rows``: additional rows, (coefficient by column, upper bound), in bytes. ``is_integral``: a
        candidate is dropped or not; False: it may be dropped in part.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        unit = float(max(1, int(self.replay.level.max())))
        rows = self.rows + [
            ({k: v / unit for k, v in row.items()}, limit / unit) for row, limit in extra_rows
        ]
        entries = [(r, k, v) for r, (row, _) in enumerate(rows) for k, v in row.items()]
        matrix = csr_array(
            ([e[2] for e in entries], ([e[0] for e in entries], [e[1] for e in entries])),
            shape=(len(rows), self.width),
        )
        integrality = numpy.zeros(self.width)
        integrality[: len(self.index)] = is_integral
        with _quiet_stdout():
            result = milp(
                objective,
                integrality=integrality,
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, ub=[limit for _, limit in rows]),
                options={
                    "mip_rel_gap": self.effort.gap_ratio * is_integral,
                    "node_limit": self.effort.nodes,
                },
            )
        return None if result.x is None else numpy.asarray(result.x)

    def learn(self, dropped: frozenset[int], budget_bytes: int) -> bool:
        """Correct the program by a replay of the choice ``dropped``. Where the replay is above
        ``budget_bytes``, the bytes by which it is above the program's prediction are added to the level at
        that clock from now on. Return whether any level was raised.
        """
        clock, level = self.replay.levels(dropped)
        instants = numpy.array([instant for instant, _ in self.instants], dtype=numpy.int64)
        order = numpy.argsort(instants)
        changed = False
        highest: dict[int, int] = {}
        for instant, value in zip(clock.tolist(), level.tolist(), strict=True):
            if value > budget_bytes:
                nearest = int(
                    instants[
                        order[max(0, int(numpy.searchsorted(instants[order], instant, side="right")) - 1)]
                    ]
                )
                highest[nearest] = max(highest.get(nearest, 0), int(value))
        levels = dict(self.instants)
        for instant, value in highest.items():
            absent_bytes = self._absent(instant, dropped)
            extra_bytes = value - (levels[instant] - absent_bytes)
            if extra_bytes > self.temporary_bytes[instant]:
                self.temporary_bytes[instant] = extra_bytes
                changed = True
        return changed

    def _absent(self, instant: int, dropped: frozenset[int]) -> int:
        """Return the bytes of the dropped tensors that may be absent at clock ``instant``, because forward no
        longer needs them and backward does not need them yet.
        """
        return sum(
            c.size_bytes
            for c in self.replay.candidates
            if c.number in dropped and c.gone <= instant < c.first_need
        )
