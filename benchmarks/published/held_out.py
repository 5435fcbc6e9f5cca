"""Leave one source out: constants that were set after rows had been seen, chosen again without each source.

Every such constant is a `Choice` among levels: what stood there before any row was looked at (or the
mechanism left out), what is used now, others between and beyond. For each family of sources (the same
house) the levels are chosen on all other families' rows, one constant after the other from what stood
before until none changes: the least mean over families of the mean |ln(predicted / measured)| of their rows.
With these the rows that were left out are predicted. The shares of the catalog's microbenchmarks are no
choice: they stay.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from memfit.cost import kernel_model, op_time, stream_simulator
from memfit.types.machine import Device, Fact
from memfit.types.trace import Phase
from published import layers, pipelines, step_time
from published.rows import setup_of
from published.score import Scored, order, sweeps, times

Setting = tuple[int, ...]  # a level for every choice
Patch = tuple[Any, str, Any]  # (module, name, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``levels``: the first is what stood before. ``used``: the one in the code and the catalog today.
    ``patches``: what puts a level there. ``said``: where a paper, a code base or a log says what is used, of
    something that one source alone has."""

    name: str
    levels: tuple[float, ...]
    used: float
    patches: Callable[[float], list[Patch]]
    said: str = ""


# -- what a level changes -------------------------------------------------------------------------------

_SHORT_RUNS = (  # of products: where the catalog's share is from, short runs' share over that
    ("float8's share of its peak", 0.75 / 0.68),
    ("the H100 SXM's shares times", 0.75 / 0.68),
    ("the share of a GB200's float8 peak", 0.72 / 0.55),
)
_LIMITED_CARD, _LIMIT_RATIO = "H100-96GB-HBM2e", 500 / 700  # of an H100 SXM's power
SUSTAINED = 1.0  # products: short runs' shares (0) or sustained ones' (1), and what lies between
LIMITED = 1.0  # exponent of the ratio of powers that such a board's large kernels lose
_ISSUE_US = {10: (10, 7, 20), 25: (25, 15, 30), 40: (40, 24, 48)}  # forward, backward, optimizer
_STEPS = kernel_model._ALIGNED
_HERE = sys.modules[__name__]
_WITH_KERNELS, _FETCHED = step_time.with_kernels, step_time.fetched_s


def _issue(level: float) -> list[Patch]:
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
    issue_s = dict(zip(phases, (us * 1e-6 for us in _ISSUE_US[int(level)]), strict=True))
    return [(op_time, "ASSUMED_ISSUE_S", {**issue_s, Phase.SETUP: 0.0})]


def _of_shares(setup: Any, card: Device) -> Device:
    """`step_time.with_kernels` of the card whose shares `SUSTAINED` and `LIMITED` say."""
    ratios = dict(card.efficiency_ratio)
    if card.name == _LIMITED_CARD:
        for key in [k for k in ratios if k.startswith(("matmul", "attention"))]:
            ratios[key] = _times(ratios[key], _LIMIT_RATIO ** (LIMITED - 1))
    for key in ("matmul", "matmul_float8"):
        for start, short_over_sustained in _SHORT_RUNS:
            if key in ratios and ratios[key].source.startswith(start):
                ratios[key] = _times(ratios[key], short_over_sustained ** (1 - SUSTAINED))
    return _WITH_KERNELS(setup, dataclasses.replace(card, efficiency_ratio=ratios))


def _times(fact: Fact, factor: float) -> Fact:
    return dataclasses.replace(fact, value=fact.value * factor)


def _both(name: str, *modules: Any) -> Callable[[float], list[Patch]]:
    return lambda level: [(module, name, level) for module in modules]


def _switch(module: Any, name: str) -> Callable[[float], list[Patch]]:
    """Of a mechanism: 0 leaves it out."""
    own = getattr(module, name)
    return lambda level: [(module, name, own if level else lambda setup: type(own(setup))())]


CHOICES = (
    Choice(
        name="products on Hopper and Blackwell, from short runs' shares (0) to sustained ones' (1)",
        levels=(0, 0.5, 1),
        used=1,
        patches=_both("SUSTAINED", _HERE),
    ),
    Choice(
        name="500 W H100, exponent of its power over 700 W",
        levels=(0, 0.46, 1),
        used=1,
        patches=_both("LIMITED", _HERE),
    ),
    Choice(
        name="products of a node with a power limit, from the catalog's share (0) to its low end (1)",
        levels=(0, 0.5, 1),
        used=1,
        patches=_both("LOW_END", step_time),
        said="SimuMax, products measured on its own node",
    ),
    Choice(
        name="offloaded parameters come over the host's link",
        levels=(0, 1),
        used=1,
        patches=lambda on: [(step_time, "fetched_s", _FETCHED if on else lambda setup, parameters: 0.0)],
    ),
    Choice(name="host's issue of a kernel in forward, µs", levels=(10, 25, 40), used=25, patches=_issue),
    Choice(
        name="share of strided kernels",
        levels=(1, 0.8, 0.6, 0.4),
        used=0.6,
        patches=_both("STRIDED", kernel_model),
    ),
    Choice(
        name="share of broadcast kernels",
        levels=(1, 0.8, 0.6),
        used=0.8,
        patches=_both("BROADCAST", kernel_model),
    ),
    Choice(
        name="share of narrow products",
        levels=(1, 0.85, 0.7, 0.55),
        used=0.7,
        patches=_both("NARROW", kernel_model),
    ),
    Choice(
        name="start of a normalised row, elements",
        levels=(0, 128, 256),
        used=128,
        patches=_both("_ROW_START", kernel_model),
    ),
    Choice(
        name="alignment's steps, exponent",
        levels=(0, 0.5, 1),
        used=1,
        patches=lambda e: [(kernel_model, "_ALIGNED", tuple((step, share**e) for step, share in _STEPS))],
    ),
    Choice(
        name="host memory, GB/s",
        levels=(100, 200, 300),
        used=200,
        patches=lambda gb: [(m, "ASSUMED_HOST_BYTES_S", gb * 1e9) for m in (stream_simulator, pipelines)],
    ),
    Choice(
        name="share of float8's backward",
        levels=(1, 0.75, 0.5),
        used=0.75,
        patches=_both("FULL_SUM", kernel_model, layers, step_time),
    ),
    Choice(
        name="Triton's attention over FlashAttention-2's",
        levels=(1, 0.75, 0.5),
        used=0.5,
        patches=_both("TRITON_RATIO", step_time),
        said="Dao 2023, abstract: FlashAttention-2 is twice as fast",
    ),
    Choice(
        name="kept beside a compiled chain",
        levels=(1, 1.3, 1.6),
        used=1.3,
        patches=_both("_KEPT_BESIDE", step_time),
    ),
    Choice(
        name="DeepSpeed's pipeline waits for sends in parts",
        levels=(0, 1),
        used=1,
        patches=_switch(pipelines, "_sends_wait"),
        said="DeepSpeed, runtime/pipe/p2p.py and engine.py",
    ),
    Choice(
        name="Megatron-DeepSpeed's fork waits for reductions, adds gradients apart",
        levels=(0, 1),
        used=1,
        patches=_switch(pipelines, "_fork_bytes"),
        said="Megatron-DeepSpeed, megatron/mpu/layers.py",
    ),
    Choice(
        name="BLOOM's hosts wait for every kernel",
        levels=(0, 1),
        used=1,
        patches=_switch(pipelines, "_blocking"),
        said="BLOOM's chronicles-prequel.md and tr11-176B-ml.slurm",
    ),
)
BEFORE: Setting = (0,) * len(CHOICES)
USED: Setting = tuple(c.levels.index(c.used) for c in CHOICES)
SAID: Setting = tuple(u if c.said else b for c, b, u in zip(CHOICES, BEFORE, USED, strict=True))


@contextlib.contextmanager
def applied(setting: Setting) -> Iterator[None]:
    """While it lasts predictions are made with these levels."""
    patches = [p for c, level in zip(CHOICES, _levels(setting), strict=True) for p in c.patches(level)]
    patches.append((step_time, "with_kernels", _of_shares))
    kept = [(module, name, getattr(module, name)) for module, name, _ in patches]
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        kernel_model.layout_share.cache_clear()
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        kernel_model.layout_share.cache_clear()


# -- choosing -------------------------------------------------------------------------------------------

Errors = Callable[[Sequence[Setting]], list[Mapping[str, float]]]  # for each setting, row -> error


def chosen(
    families: Mapping[str, Sequence[str]], without: str, errors: Errors, *, said: bool = False
) -> Setting:
    """The levels that fit the rows of all families but one best, from `BEFORE` on; of equals the first.
    ``said``: what papers, code and logs say stays as they say it."""

    def cost(found: Mapping[str, float]) -> float:
        rest = [ids for name, ids in families.items() if name != without]
        return statistics.fmean(statistics.fmean(found[i] for i in ids) for ids in rest)

    at, before = SAID if said else BEFORE, None
    free = [(i, c) for i, c in enumerate(CHOICES) if not (said and c.said)]
    while at != before:
        before = at
        for place, choice in free:
            tried = [(*at[:place], level, *at[place + 1 :]) for level in range(len(choice.levels))]
            costs = [round(cost(found), 12) for found in errors(tried)]
            at = tried[costs.index(min(costs))]
    return at


class Predictor:
    """Steps of rows at settings, each predicted once: what a choice does not change of a row, neither from
    `BEFORE` nor from `USED`, is not predicted again. ``pools``: executors of one process each, with which a
    row's traces stay."""

    def __init__(
        self, rows: Sequence[Mapping[str, str]], pools: Sequence[concurrent.futures.Executor]
    ) -> None:
        self.rows = {row["id"]: dict(row) for row in rows}
        self.place = {row["id"]: pools[i % len(pools)] for i, row in enumerate(rows)}
        self.known: dict[tuple[str, Setting], float] = {}
        self.felt = {i: tuple(range(len(CHOICES))) for i in self.rows}
        self.felt = self._felt()
        self.known = {(row, self._of(row, s)): step_s for (row, s), step_s in self.known.items()}

    def seconds(self, settings: Sequence[Setting]) -> list[dict[str, float]]:
        """For each setting: row's id -> seconds of its step."""
        wanted: dict[str, list[Setting]] = {}
        for setting in settings:
            for row in self.rows:
                key = row, self._of(row, setting)
                if key not in self.known:
                    self.known[key] = math.nan
                    wanted.setdefault(row, []).append(key[1])
        asked = {r: self.place[r].submit(_step_s, self.rows[r], several) for r, several in wanted.items()}
        for row, several in wanted.items():
            self.known.update({(row, s): x for s, x in zip(several, asked[row].result(), strict=True)})
        return [{row: self.known[row, self._of(row, s)] for row in self.rows} for s in settings]

    def _of(self, row: str, setting: Setting) -> Setting:
        """The same for all settings that differ in nothing this row feels."""
        return tuple(level if i in self.felt[row] else 0 for i, level in enumerate(setting))

    def _felt(self) -> dict[str, tuple[int, ...]]:
        """Row -> the choices that change its step."""
        found: dict[str, set[int]] = {row: set() for row in self.rows}
        for base, other in ((BEFORE, [len(c.levels) - 1 for c in CHOICES]), (USED, BEFORE)):
            tried = [(*base[:i], level, *base[i + 1 :]) for i, level in enumerate(other)]
            plain, *changed = self.seconds([base, *tried])
            for row in self.rows:
                found[row] |= {i for i, one in enumerate(changed) if one[row] != plain[row]}
        return {row: tuple(sorted(choices)) for row, choices in found.items()}


def _step_s(row: Mapping[str, str], settings: Sequence[Setting]) -> list[float]:
    setup = step_time.timed(setup_of(row))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for setting in settings:
            with applied(setting):
                found.append(step_time.predicted(setup).step_s)
    return found


# -- the whole ------------------------------------------------------------------------------------------


def study(rows: Sequence[Mapping[str, str]], scored: Sequence[Scored], jobs: int) -> dict[str, Any]:
    """For the record: what each house's rows come to with levels chosen without it, beside what stood before
    and what is used."""
    known = {s.id: s for s in scored if s.speed is not None and s.speed.error is not None}
    families: dict[str, list[str]] = {}
    for s in known.values():
        families.setdefault(s.house, []).append(s.id)
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn))
            for _ in range(jobs)
        ]
        timed = [s for s in scored if s.speed is not None]
        return _studied(timed, families, Predictor([r for r in rows if r["id"] in known], pools))


def _studied(
    timed: Sequence[Scored], families: Mapping[str, Sequence[str]], predictor: Predictor
) -> dict[str, Any]:
    """``timed``: rows with a speed, refused ones among them."""
    known = {s.id: s for s in timed if any(s.id in ids for ids in families.values())}
    measured = {i: s.speed.measured_s or math.nan for i, s in known.items() if s.speed}

    def errors(settings: Sequence[Setting]) -> list[Mapping[str, float]]:
        return [
            {i: abs(math.log(step_s / measured[i])) for i, step_s in found.items()}
            for found in predictor.seconds(settings)
        ]

    def left_out(settings: Mapping[str, Setting]) -> dict[str, float]:
        found = {name: predictor.seconds([setting])[0] for name, setting in settings.items()}
        return {i: found[name][i] for name, ids in families.items() for i in ids}

    settings = {name: chosen(families, name, errors) for name in families}
    told = {name: chosen(families, name, errors, said=True) for name in families}
    on_all = chosen(families, "", errors)
    before, used, whole = predictor.seconds([BEFORE, USED, on_all])
    alone, with_told = left_out(settings), left_out(told)
    for i, s in known.items():  # the levels that are used are the ones in the code
        assert s.speed is not None
        assert math.isclose(used[i], s.speed.predicted_s or 0.0, rel_tol=1e-9), i
    return {
        "choices": [{"name": c.name, "levels": c.levels, "used": c.used, "said": c.said} for c in CHOICES],
        "families": {name: _levels(setting) for name, setting in settings.items()},
        "all": _levels(on_all),
        "rows": {i: {"before_s": before[i], "left_out_s": alone[i]} for i in known},
        "summary": {
            name: _summary(timed, found)
            for name, found in (
                ("before", before),
                ("left out", alone),
                ("left out, said", with_told),
                ("used", used),
                ("all", whole),
            )
        },
    }


def restated(held: Mapping[str, Any], scored: Sequence[Scored]) -> dict[str, Any]:
    """An earlier study with today's intervals: the statistics whose seconds it has by row, made again. Rows
    that were blind were not in it."""
    timed = [s for s in scored if s.speed is not None and not s.blind]
    seconds = {
        name: {row: found[key] for row, found in held["rows"].items()}
        for name, key in (("before", "before_s"), ("left out", "left_out_s"))
    }
    return {
        **held,
        "summary": {**held["summary"], **{name: _summary(timed, found) for name, found in seconds.items()}},
    }


def _levels(setting: Setting) -> list[float]:
    return [c.levels[i] for c, i in zip(CHOICES, setting, strict=True)]


def _summary(scored: Sequence[Scored], found: Mapping[str, float]) -> dict[str, Any]:
    again = [
        dataclasses.replace(s, speed=dataclasses.replace(s.speed, predicted_s=found.get(s.id)))
        for s in scored
        if s.speed
    ]
    return {
        "times": [dataclasses.asdict(t) for t in times(again)],
        "order": dataclasses.asdict(order(sweeps(again))),
    }
