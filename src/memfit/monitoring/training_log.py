"""Read how far a training had come from its log, and the series of numbers that the log prints."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Final

from memfit.types.units import GIB, KIB, MIB

_OTHER_BAR: Final = re.compile(
    r"loading|shards|\bmap\b|download|tokeniz|generat|filter|fetching|building|preprocess|caching|scanning|"
    r"extract|B/s\b",
    re.IGNORECASE,
)
_EVALUATION: Final = re.compile(r"\b(?:valid\w*|val|eval\w*|test\w*|predict\w*)\b", re.IGNORECASE)
_TRAINED: Final = re.compile(r"\btrain", re.IGNORECASE)  # a line of both tells of the training
_BAR: Final = re.compile(r"(\d+)/(\d+) (?:\[|\d+:\d\d:\d\d\b)")
_BRACKET: Final = re.compile(r"^\W*\[\s*(\d+)\s*/\s*\d+\s*\]")
_SAMPLES_DONE: Final = re.compile(r"\[(\d+)/\d+ \(\s*\d+%\)\]")
_RESUMED: Final = re.compile(
    r"\b(?:resum(?:ed|ing)|continuing training|restor(?:ed|ing))\b.{0,80}"
    r"(?:checkpoint|ckpt|step|epoch|\.pth?\b)",
    re.IGNORECASE,
)
_STEP: Final = re.compile(
    r"\b(?:global[_ ]?step|step|iter(?:ation)?|it|batch|num_updates|update)s?\s*[=:#]?\s*\[?\s*(\d+)\b",
    re.IGNORECASE,
)
_IN_EPOCH: Final = re.compile(r"\]\s*\[\s*(\d+)\s*/\s*\d+\s*\]")
_EPOCH: Final = re.compile(r"\b(?:epoch|ep)\b['\"]?\s*[=:#]?\s*\[?\s*(\d+(?:\.\d+)?)", re.IGNORECASE)
_LOGGED_LOSS: Final = re.compile(r"['\"]loss['\"]: ")
_YOLO: Final = re.compile(r"^\s*(\d+)/(\d+)\s+(\d+(?:\.\d+)?)G\s")
# What a line of a training has beside the number of its step, and a line of its settings has not.
_MEASURED: Final = re.compile(r"loss|ppl|perplexity|\bacc|\blr\b|learning[_ ]rate|it/s|s/it", re.IGNORECASE)
_DIGITS: Final = re.compile(r"[\d.:]+")
_NUMBER: Final = re.compile(
    r"(?<![\w:./-])(?P<key>[A-Za-z_][\w:./-]*(?: [A-Za-z_][\w:./-]*){0,2}?)\s*[=:]?\s*"
    r"(?<![\w.])(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B\b|[GM]\b)?"
)
_MEMORY: Final = re.compile(r"mem|alloc|reserv|vram|\brss", re.IGNORECASE)
_CURRENT: Final = re.compile(r"^(?!.*(?:max|peak|reserv)).*alloc", re.IGNORECASE)
_SAMPLE: Final = re.compile(
    r"^(?!.*(?:seen|total|\bsec|/s|throughput|speed)).*"
    r"(?:longest|max_?(?:len|size|seq)|seq_?len|\blengths?\b|tokens?\b|atoms|nodes|residues|frames|pixels)",
    re.IGNORECASE,
)
_UNIT: Final = {"K": KIB, "M": MIB, "G": GIB, "T": 2**40}
_NEAR: Final = 3  # lines before the death in which the last sample is described


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NumberSeries:
    """Numbers that a log prints under one name, in order. ``rows``: the lines they are in."""

    key: str
    values: tuple[float, ...]
    rows: tuple[int, ...]
    has_unit: bool = False  # values are bytes

    @property
    def is_current(self) -> bool:
        """Whether the name says that the values are what is allocated, not a peak or what is reserved."""
        return _CURRENT.search(self.key) is not None

    @property
    def is_growing(self) -> bool:
        """Whether the last value is at least a tenth above the first, which is above 0. At least a quarter of
        the growth must be in the second half, at least half of the values above the one before, and at most a
        tenth of them more than 2 % below it. False for fewer than four values."""
        if len(self.values) < 4:
            return False
        first, middle, last = self.values[0], self.values[len(self.values) // 2], self.values[-1]
        falls = sum(b < 0.98 * a for a, b in itertools.pairwise(self.values))
        rises = sum(b > a for a, b in itertools.pairwise(self.values))
        return (
            first > 0
            and last >= 1.1 * first
            and last - middle >= 0.25 * (last - first)
            and falls <= 0.1 * len(self.values)
            and rises >= 0.5 * len(self.values)
        )

    @property
    def is_flat(self) -> bool:
        """Whether the values of the second half differ by at most 3 %; False for fewer than four values."""
        tail = self.values[len(self.values) // 2 :]
        return len(self.values) >= 4 and max(tail) <= 1.03 * min(tail)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLog:
    """What the lines of a log before the training ended tell. ``last_step``: the highest number of a training
    step, None if none is printed. ``epochs``: number of different epochs. ``in_evaluation``: the last
    progress is that of an evaluation. ``progress_rows``: indices of lines that show progress of the training.
    ``memory``: the series of memory with most values, None if none is printed. ``samples``: series of the
    sizes of samples. ``last_epoch``: the highest number of an epoch beside a step or something measured, 0 if
    none is printed. ``counts_each_step``: whether no step is left out, as in a progress bar. ``is_resumed``:
    the training went on from a checkpoint.
    """

    last_step: int | None
    epochs: int
    in_evaluation: bool
    progress_rows: tuple[int, ...]
    memory: NumberSeries | None
    samples: tuple[NumberSeries, ...]
    last_epoch: int = 0
    counts_each_step: bool = False
    is_resumed: bool = False

    @property
    def is_late(self) -> bool:
        """Whether the log shows at least step 2, two epochs, or an epoch after the number 1."""
        return (self.last_step or 0) >= 2 or self.epochs >= 2 or self.last_epoch >= 2

    @property
    def is_first_step(self) -> bool:
        """Whether the log shows steps, but none after step 1, and no epoch after the first."""
        return self.last_step is not None and not self.is_late

    @property
    def is_surely_first_step(self) -> bool:
        """Whether the log shows the first step, and no other reading is left: each step is counted, the
        training was not resumed, and the epoch cannot be the second, counted from 0."""
        return self.is_first_step and self.counts_each_step and not self.is_resumed and self.last_epoch == 0


def read_training_log(lines: Sequence[str]) -> TrainingLog:
    """Return what ``lines``, a log up to the end of the training, tell about it."""
    steps: list[int] = []
    epochs: set[int] = set()
    last_epoch = 0
    rows: list[int] = []
    in_evaluation = False
    series: dict[str, list[tuple[int, float, bool]]] = {}
    steps_of_row = _steps(lines)
    for row, line in enumerate(lines):
        if "out of memory" in line.lower() or "Tried to allocate" in line or 'File "' in line:
            continue
        for key, value, has_unit in _numbers(line):
            series.setdefault(key, []).append((row, value, has_unit))
        numbers, epoch = steps_of_row.get(row, []), _EPOCH.search(line)
        if numbers or epoch:
            in_evaluation = _EVALUATION.search(line) is not None and not _TRAINED.search(line)
        if in_evaluation:
            continue
        steps += numbers
        if epoch:
            epochs.add(number := int(float(epoch[1])))
            if numbers or _MEASURED.search(line):
                last_epoch = max(last_epoch, number)
        if numbers or _LOGGED_LOSS.search(line):
            rows.append(row)
        if _LOGGED_LOSS.search(line):
            steps.append(2)  # trainers log the first loss after several steps
    all_series = {key: _series(key, values) for key, values in series.items()}
    memory = [s for s in all_series.values() if _MEMORY.search(s.key)]
    return TrainingLog(
        last_step=max(steps, default=None),
        epochs=len(epochs),
        in_evaluation=in_evaluation,
        progress_rows=tuple(rows),
        memory=max(memory, key=lambda s: (len(s.values), s.is_current), default=None),
        samples=tuple(s for s in all_series.values() if _SAMPLE.search(s.key) and not _MEMORY.search(s.key)),
        last_epoch=last_epoch,
        counts_each_step=any(_BAR.search(line) for line in lines),
        is_resumed=any(_RESUMED.search(line) for line in lines),
    )


def outlier_factor(series: NumberSeries, row_count: int) -> float | None:
    """Return the last value of ``series`` divided by the highest value before it. None if the ratio is below
    1.3, if there are fewer than four values before it, if these only grow, as a counter does, if all of them
    are 0, or if the last value is in none of the last three of ``row_count`` lines."""
    *earlier, last = series.values
    highest = max(earlier, default=0.0)
    if len(earlier) < 4 or series.rows[-1] < row_count - _NEAR or not highest or last < 1.3 * highest:
        return None
    if all(b > a for a, b in itertools.pairwise(earlier)):
        return None
    return last / highest


def _steps(lines: Sequence[str]) -> dict[int, list[int]]:
    """Return row -> numbers of steps that this line of a training or an evaluation shows. A number after
    "step" or the like counts if its line also shows something measured, such as a loss, or if it differs from
    that of another line with the same text before it: "Total optimization steps = 375" is a setting."""
    steps: dict[int, list[int]] = {}
    rows_of_text: dict[str, list[tuple[int, int]]] = {}
    for row, line in enumerate(lines):
        if _OTHER_BAR.search(line):
            continue
        named, is_measured = list(_STEP.finditer(line)), _MEASURED.search(line) is not None
        matches = [*_BAR.finditer(line), *_IN_EPOCH.finditer(line), *(named if is_measured else ())]
        firsts = (_YOLO.match(line), _BRACKET.match(line) if is_measured else None)
        if matches := [*matches, *filter(None, firsts)]:
            steps[row] = [int(m[1]) for m in matches]
        elif samples := _SAMPLES_DONE.search(line):
            steps[row] = [2 if int(samples[1]) else 0]  # of a loop that prints the samples before its step
        for match in () if is_measured else named:
            text = _DIGITS.sub("", line[: match.start(1)])
            rows_of_text.setdefault(text, []).append((row, int(match[1])))
    for entries in rows_of_text.values():
        if len({step for _, step in entries}) > 1:
            for row, step in entries:
                steps.setdefault(row, []).append(step)
    return steps


def _numbers(line: str) -> list[tuple[str, float, bool]]:
    """Return (name, value, whether the line gives its unit, so that it is in bytes) of each memory and sample
    size that a line prints; [] if it prints none."""
    if yolo := _YOLO.match(line):
        return [("GPU_mem", float(yolo[3]) * GIB, True)]
    if not (_MEMORY.search(line) or _SAMPLE.search(line)):
        return []
    return [
        (key, float(m["value"]) * _UNIT.get((m["unit"] or " ")[0].upper(), 1), bool(m["unit"]))
        for m in _NUMBER.finditer(line)
        if _MEMORY.search(key := m["key"].strip(" :=.")) or _SAMPLE.search(key)
    ]


def _series(key: str, values: Sequence[tuple[int, float, bool]]) -> NumberSeries:
    return NumberSeries(
        key=key,
        rows=tuple(row for row, _, _ in values),
        values=tuple(value for _, value, _ in values),
        has_unit=all(has_unit for _, _, has_unit in values),
    )
