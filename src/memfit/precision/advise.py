"""Which modules must stay in float32: each one's own code against float64, and what a fault does."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn

from memfit.jobs.step import TrainingStep, batch_length, split
from memfit.precision import casting
from memfit.precision.recording import FAILURES, LOSS, Call, learn_dtypes, record
from memfit.precision.replay import Found, Mode, compare, modes, play
from memfit.precision.tensors import is_float, rebuild
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.precision import Examined, PrecisionAdvice, Shown

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What is left must carry six bits of a module's own signal: one rounding to bfloat16 leaves nine, a matrix
# product in it more than eight. Gradients carry the noise of the batch anyway: five.
OUTPUT: Final = 2.0**-6
GRADIENT: Final = 2.0**-5
_BETTER: Final = 4.0  # times smaller must the error in float32 be, or an island would not mend it
_SAMPLES: Final = 4
_SAME: Final = 4  # modules of one place that are looked at before one of them shows a fault
_RUN: Final = 12  # the worst places whose effect on the loss is measured
_SHOWN: Final = ("pure", "autocast", "rounded", "float32")

Say = Callable[[str, int, int], None]


@dataclasses.dataclass(slots=True)
class _Place:
    """Modules of one class whose paths differ in numbers only; what was found, by path."""

    pattern: str
    kind: str
    calls: dict[str, list[Call]]  # by path
    found: dict[str, dict[str, Found]] = dataclasses.field(default_factory=dict)
    loss_ratio: float | None = None
    effect_ratio: float | None = None

    @property
    def worst(self) -> dict[str, Found]:
        return _merged(self.found.values())


def advise(
    job: Job, dtype: str, *, batches: int, trained: int, device: str = "cuda", say: Say = lambda *_: None
) -> PrecisionAdvice:
    """``batches`` of training data after ``trained`` steps of plain training; ``device`` chooses the lists of
    torch.autocast. Raises UserError where the job's step is not finite in float32."""
    low = DTYPES[dtype]
    model = _trained(job, trained, say)
    kinds = modes(model, low, cuda=device == "cuda")
    narrow = kinds["pure"].model
    places: dict[str, _Place] = {}
    data = [_few(job, trained + index) for index in range(batches)]
    for index, batch in enumerate(data):
        say("record", index, batches)
        root = record(model, batch, job.loss)
        if not math.isfinite(float(root.made)):
            raise UserError(f"the loss of {job.name} is {float(root.made)} in float32", hint="mend it first")
        _learn(root, kinds, batch, job, low)
        _examine(root, places, model, kinds, job, say)
    whole = _Whole(model, narrow, low, data[0], job)
    inside = [p for p in places.values() if p.pattern != LOSS]
    for index, place in enumerate(sorted(inside, key=_rank, reverse=True)[:_RUN]):
        say("effect", index, _RUN)
        place.loss_ratio, place.effect_ratio = whole.effect(_paths(place, "pure") or set(place.calls))
    return _told(job, dtype, device, places, whole, (batches, trained))


def _trained(job: Job, steps: int, say: Say) -> nn.Module:
    torch.manual_seed(0)
    step = TrainingStep(dataclasses.replace(job, islands=()), Plan())
    for index in range(steps):
        say("train", index, steps)
        step.run(job.make_batch(index, 0))
    step.model.zero_grad(set_to_none=True)
    return step.model


def _few(job: Job, index: int) -> Any:
    batch = job.make_batch(index, 0)
    return split(batch, max(1, batch_length(batch) // _SAMPLES))[0]


def _learn(root: Call, kinds: dict[str, Mode], batch: Any, job: Job, low: torch.dtype) -> None:
    """In which dtype each tensor really arrives."""

    def narrowed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return rebuild((args, kwargs), lambda t: t.to(low) if is_float(t) else t)

    for name in ("pure", "autocast"):
        mode = kinds[name]
        with contextlib.ExitStack() as stack:
            if name == "pure":
                stack.callback(mode.model.register_forward_pre_hook(narrowed, with_kwargs=True).remove)

            def run(mode: Mode = mode) -> Call:
                with mode.around():
                    return record(mode.model, batch, job.loss, backward=False)

            learn_dtypes(root, name, run)


def _examine(
    root: Call, places: dict[str, _Place], model: nn.Module, kinds: dict[str, Mode], job: Job, say: Say
) -> None:
    fresh: dict[str, _Place] = {}
    for call in root.all():
        if call.computes:
            key = re.sub(r"(?<![^.])\d+(?![^.])", "*", call.path)
            kind = "" if call.path == LOSS else type(model.get_submodule(call.path)).__name__
            place = fresh.setdefault(f"{key} {kind}", _Place(key, kind, {}))
            place.calls.setdefault(call.path, []).append(call)
    for index, (key, place) in enumerate(fresh.items()):
        say("module", index, len(fresh))
        kept = places.setdefault(key, place)
        kept.calls |= place.calls
        paths = list(place.calls)
        few = sorted({paths[0], paths[1 % len(paths)], paths[len(paths) // 2], paths[-1]})
        for path in few if len(paths) > _SAME else paths:
            _look(kept, path, place.calls[path], kinds, job)
        if len(paths) > _SAME and _paths(kept, "pure"):
            for path in set(paths) - set(few):
                _look(kept, path, place.calls[path], kinds, job)
        for calls in place.calls.values():
            calls.clear()


def _look(place: _Place, path: str, calls: list[Call], kinds: dict[str, Mode], job: Job) -> None:
    for call in {id(c): c for c in (calls[0], calls[-1])}.values():
        exact = play(call, kinds["exact"], job.loss)
        if exact.failed:  # code that asks for float32 by name
            exact = play(call, kinds["float32"], job.loss)
        if exact.failed or any(not bool(t.isfinite().any()) for t in exact.outputs if t.numel()):
            continue
        seen = {name: compare(exact, play(call, kinds[name], job.loss)) for name in _SHOWN}
        place.found[path] = _merged([place.found[path], seen]) if path in place.found else seen


def _merged(found: Iterable[dict[str, Found]]) -> dict[str, Found]:
    made: dict[str, Found] = {}
    for each in found:
        for name, one in each.items():
            made[name] = made[name].worst(one) if name in made else one
    return made


def _fault(found: dict[str, Found], mode: str, effect: float | None = None) -> str:
    """Why a module's own code must be float32 in that mode; "": it need not."""
    seen, wide, rounded = found[mode], found["float32"], found["rounded"]
    if seen.failed and not wide.failed:
        return "fails"
    if (seen.born or seen.output.lost) and not wide.output.lost:
        return "overflow"

    def mended(low: float, high: float, limit: float) -> bool:
        return low > limit and high < low / _BETTER

    if mended(seen.output.error, wide.output.error, OUTPUT):
        return "inputs" if rounded.output.error > seen.output.error / 2 else "computation"
    if mended(seen.gradient, wide.gradient, GRADIENT):
        return "gradient"
    moved = effect is not None and effect > GRADIENT
    if moved and mended(seen.output.spread, wide.output.spread, OUTPUT):
        return "spread"
    return ""


def _paths(place: _Place, mode: str) -> set[str]:
    return {p for p, found in place.found.items() if _fault(found, mode, place.effect_ratio)}


def _rank(place: _Place) -> tuple[bool, float]:
    if not place.found:
        return False, 0.0
    seen = place.worst["pure"]
    return bool(_fault(place.worst, "pure")), max(seen.output.spread, seen.output.error, seen.gradient / 2)


class _Whole:
    """Losses and gradients of the whole model with some modules narrow."""

    def __init__(self, model: nn.Module, narrow: nn.Module, low: torch.dtype, batch: Any, job: Job) -> None:
        self.model, self.narrow, self.low, self.batch, self.job = model, narrow, low, batch, job
        self.loss, self.grads = casting.step(model, batch, job.loss, backward=True)

    def effect(self, paths: set[str], *, backward: bool = True) -> tuple[float, float]:
        """How far the loss and everybody else's gradient move; infinite where the loss is not finite."""
        try:
            with casting.casting(self.model, self.narrow, paths, self.low):
                loss, grads = casting.step(self.model, self.batch, self.job.loss, backward=backward)
        except FAILURES:
            return math.inf, math.inf
        finally:
            self.narrow.zero_grad(set_to_none=True)
        if not math.isfinite(loss):
            return math.inf, math.inf
        moved = casting.apart(self.grads, grads, paths) if backward else 0.0
        return abs(loss - self.loss) / max(abs(self.loss), 1e-30), moved if math.isfinite(moved) else math.inf


def _told(
    job: Job, dtype: str, device: str, places: dict[str, _Place], whole: _Whole, counts: tuple[int, int]
) -> PrecisionAdvice:
    everything = [p for place in places.values() for p in place.calls if p not in ("", LOSS)]
    named = {m: _named(places.values(), m, whole.model) for m in ("pure", "autocast")}
    examined = [_told_place(p) for p in sorted(places.values(), key=_rank, reverse=True) if p.found]
    apart = named["pure"]
    kept = {p for p in everything if not any(fnmatch.fnmatchcase(o, i) for i in apart for o in _above(p))}
    return PrecisionAdvice(
        job=job.name, size=job.size, dtype=dtype, device=device,
        batches_count=counts[0], trained_steps=counts[1],
        examined=tuple(e for e in examined if e.pattern not in ("", LOSS)),
        outside=tuple(e for e in examined if e.pattern in ("", LOSS)),
        islands=apart, islands_autocast=named["autocast"],
        loss_ratio=whole.effect(set(everything), backward=False)[0],
        kept_ratio=whole.effect(kept, backward=False)[0],
    )  # fmt: skip


def _above(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _told_place(place: _Place) -> Examined:
    shown = {
        name: Shown(
            error_ratio=f.output.error, spread_ratio=f.output.spread, gradient_ratio=f.gradient,
            lost=f.failed or f.born or ("?" if f.output.lost else ""),
        )
        for name, f in place.worst.items()
    }  # fmt: skip
    reasons = {
        mode: next((r for f in place.found.values() if (r := _fault(f, mode, place.effect_ratio))), "")
        for mode in ("pure", "autocast")
    }
    return Examined(
        pattern=place.pattern, kind=place.kind, modules_count=len(place.calls), **shown,
        loss_ratio=place.loss_ratio, effect_ratio=place.effect_ratio,
        reason=reasons["pure"], reason_autocast=reasons["autocast"],
    )  # fmt: skip


def _named(places: Iterable[_Place], mode: str, model: nn.Module) -> tuple[str, ...]:
    """Patterns that match the modules at fault and no other."""
    names = [n for n, _ in model.named_modules()]
    wanted = [(p.pattern, _paths(p, mode)) for p in places if p.pattern not in ("", LOSS)]
    return tuple(p for pattern, paths in wanted for p in _patterns(pattern, paths, names))


def _patterns(pattern: str, paths: set[str], names: list[str]) -> list[str]:
    numbered = sorted({re.sub(r"(?<![^.])\d+(?![^.])", lambda m: "[0-9]" * len(m[0]), p) for p in paths})
    for tried in ([pattern], numbered):  # a star matches dots too
        if (
            len(paths) > len(tried)
            and {n for n in names for t in tried if fnmatch.fnmatchcase(n, t)} == paths
        ):
            return tried
    return sorted(paths, key=lambda p: [(len(x), x) for x in p.split(".")])
