"""Find modules that must stay in float32: compare their own code in each precision with float64, and measure
how far the loss and the gradients move if only these modules compute in the narrow dtype, bfloat16 or
float16."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from memfit.jobs.training_step import TrainingStep
from memfit.model.batch_objects import batch_length, split
from memfit.precision import casting
from memfit.precision.recording import FAILURES, LOSS, RecordedCall, learn_dtypes, record
from memfit.precision.replay import Mode, NonFiniteOperators, ReplayErrors, compare, modes, replay_call
from memfit.precision.sums import NarrowSums
from memfit.precision.tensors import Gap, is_float, leaves, rebuild
from memfit.types.device_kind import CUDA, device_kind
from memfit.types.errors import UserError
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.precision import ExaminedModules, PrecisionAdvice, PrecisionErrors

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Limits of the error. An output must keep six bits of a module's own signal. One rounding to bfloat16 leaves
# nine bits, a matrix product in it more than eight. Gradients carry the noise of the batch anyway, so four
# bits are enough for them.
OUTPUT: Final = 2.0**-6
GRADIENT: Final = 2.0**-4
# Or eight bits, if the error comes from computing in low precision and not from rounding: it then grows with
# the depth.
_SOME, _TWICE = 2.0**-8, 2.0
_BETTER: Final = 4.0  # the float32 error must be this many times smaller, otherwise an island would not help
_ELEMENTS: Final = 1 << 15  # most elements of the largest tensor of a batch
_PADDED: Final = 16
_SAME: Final = 4  # modules of one place that are examined before one of them shows a fault
_RUN: Final = 12  # number of worst places whose effect on the loss is measured
_WAYS: Final = ("pure", "autocast")
_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")

Progress = Callable[[str, int, int], None]


def _ignore_progress(stage: str, done: int, total: int) -> None:
    """Do nothing with the progress: the default of `advise`."""


@dataclasses.dataclass(slots=True)
class _Place:
    """Modules of one class whose paths differ only in numbers. ``pattern``: their path with stars for these
    numbers; ``kind``: the name of the class. ``calls``: the paths of all of them as keys. ``errors``: path ->
    name of the mode -> errors, for the modules that were examined. ``loss_ratio``, ``effect_ratio``: how far
    the loss, and the gradients of all other modules, move relative to their size if only these modules run in
    the narrow dtype; None if that was not run."""

    pattern: str
    kind: str
    calls: dict[str, None] = dataclasses.field(default_factory=dict)  # paths, in order
    errors: dict[str, dict[str, ReplayErrors]] = dataclasses.field(default_factory=dict)
    loss_ratio: float | None = None
    effect_ratio: float | None = None

    @property
    def worst(self) -> dict[str, ReplayErrors]:
        return _merge(self.errors.values())


def advise(
    job: Job,
    dtypes: Sequence[str],
    *,
    batches: int,
    trained: int,
    device: str = CUDA,
    progress: Progress = _ignore_progress,
) -> tuple[PrecisionAdvice, ...]:
    """Return advice on which modules must stay in float32: one `PrecisionAdvice` for each of ``dtypes``,
    which are "bf16" or "fp16", in their order.

    The model is trained without a plan and without ``Job.islands`` for ``trained`` steps, and then examined
    on ``batches`` further batches (at least one), always with only a few samples of a batch. Everything runs
    on the CPU. ``device`` is the kind of device whose list of operators that torch.autocast keeps in float32
    is assumed, such as "cuda". ``progress(stage, done, total)`` is called before each part of the work; the
    stages are "train", "record", "module" and "effect". Of "effect", ``total`` is an upper limit. Raises
    UserError if the loss is not finite in float32 after training. Errors of the job's functions are raised,
    too."""
    model = _train_model(job, trained, progress)
    modes_by_dtype = {d: modes(model, DTYPES[d], cuda=device_kind(device).autocast == "cuda") for d in dtypes}
    for other_modes in list(modes_by_dtype.values())[1:]:
        other_modes["exact"] = modes_by_dtype[dtypes[0]]["exact"]
    places: dict[str, dict[str, _Place]] = {d: {} for d in dtypes}
    data = [add_padding(_first_samples(job, trained + index)) for index in range(batches)]
    for index, batch in enumerate(data):
        progress("record", index, batches)
        root = record(model, batch, job.loss)
        if not math.isfinite(loss := float(root.output)):
            raise UserError(
                f"the loss of {job.name} is {loss} in float32, without any lower precision",
                hint="fix the job first: its loss must be finite",
            )
        for dtype, dtype_modes in modes_by_dtype.items():
            _record_real_dtypes(root, dtype_modes, batch, job, dtype)
        _examine(root, places, model, modes_by_dtype, job, progress)
    advice = []
    for dtype in dtypes:
        effects = _Effects(model, modes_by_dtype[dtype]["pure"].model, DTYPES[dtype], data[0], job)
        module_places = [p for p in places[dtype].values() if p.pattern != LOSS]
        for index, place in enumerate(sorted(module_places, key=_rank, reverse=True)[:_RUN]):
            progress("effect", index, _RUN)
            place.loss_ratio, place.effect_ratio = effects.effect(_paths(place, "pure") or set(place.calls))
        advice.append(_advise_dtype(job, dtype, device, places[dtype], effects, (batches, trained)))
    return tuple(advice)


def _train_model(job: Job, steps: int, progress: Progress) -> nn.Module:
    torch.manual_seed(0)
    step = TrainingStep(dataclasses.replace(job, islands=()), Plan())
    for index in range(steps):
        progress("train", index, steps)
        step.run(_first_samples(job, index))
    step.model.zero_grad(set_to_none=True)
    return step.model


def _first_samples(job: Job, index: int) -> Any:
    """Return the first samples of the batch of step ``index``. The batch is cut into as many micro-batches of
    at least n samples as possible, and the first one is returned; the whole batch if it has fewer than 2 n
    samples. n is the number of samples that have 2**15 elements in the batch's largest tensor, rounded down,
    but at least 2. Raises what `batch_length` raises."""
    batch = job.make_batch(index, 0)
    length = batch_length(batch)
    elements = max(t.numel() for t in leaves(batch)) // length
    return split(batch, max(1, length // max(2, _ELEMENTS // max(1, elements))))[0]


def add_padding(batch: Any) -> Any:
    """Return the batch with zeros in the last sixteenth of each mask, so that code for masked positions is
    examined too.

    A tensor counts as a mask if all its elements are one (or True), it is not complex, it has at least two
    dimensions, of which the last has at least 16 elements, and it needs no gradient. It is padded along its
    last dimension, in a copy."""

    def pad(mask: torch.Tensor) -> torch.Tensor:
        is_mask = mask.dim() > 1 and mask.shape[-1] >= _PADDED and not mask.requires_grad
        if not is_mask or mask.is_complex() or not bool((mask == 1).all()):
            return mask
        padded_mask = mask.clone()
        padded_mask[..., -(mask.shape[-1] // _PADDED) :] = 0
        return padded_mask

    return rebuild(batch, pad)


def _record_real_dtypes(
    root: RecordedCall, modes_by_name: dict[str, Mode], batch: Any, job: Job, dtype: str
) -> None:
    """Record in ``root``, in the ``dtypes`` of its calls, which dtypes inputs and outputs have in real runs
    in the modes pure and autocast."""

    def narrowed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return rebuild((args, kwargs), lambda t: t.to(DTYPES[dtype]) if is_float(t) else t)

    for name in ("pure", "autocast"):
        mode = modes_by_name[name]
        with contextlib.ExitStack() as stack:
            if name == "pure":
                stack.callback(mode.model.register_forward_pre_hook(narrowed, with_kwargs=True).remove)

            def run(mode: Mode = mode) -> RecordedCall:
                with mode.make_context():
                    return record(mode.model, batch, job.loss, backward=False)

            learn_dtypes(root, mode.name, run)


def _examine(
    root: RecordedCall,
    places: dict[str, dict[str, _Place]],
    model: nn.Module,
    modes_by_dtype: dict[str, dict[str, Mode]],
    job: Job,
    progress: Progress,
) -> None:
    calls: dict[tuple[str, str], dict[str, list[RecordedCall]]] = {}
    for call in root.all():
        if call.computes:
            pattern = _NUMBER.sub("*", call.path)
            kind = "" if call.path == LOSS else type(model.get_submodule(call.path)).__name__
            calls.setdefault((pattern, kind), {}).setdefault(call.path, []).append(call)
    for index, ((pattern, kind), by_path) in enumerate(calls.items()):
        progress("module", index, len(calls))
        places_by_dtype = {
            d: p.setdefault(f"{pattern} {kind}", _Place(pattern, kind)) for d, p in places.items()
        }
        paths = list(by_path)
        sample = sorted({paths[0], paths[1 % len(paths)], paths[len(paths) // 2], paths[-1]})
        for path in sample if len(paths) > _SAME else paths:
            _examine_calls(places_by_dtype, path, by_path[path], modes_by_dtype, job)
        if len(paths) > _SAME and any(_paths(place, m) for place in places_by_dtype.values() for m in _WAYS):
            for path in set(paths) - set(sample):
                _examine_calls(places_by_dtype, path, by_path[path], modes_by_dtype, job)
        for place in places_by_dtype.values():
            place.calls |= dict.fromkeys(paths)


def _examine_calls(
    places: dict[str, _Place],
    path: str,
    calls: list[RecordedCall],
    modes_by_dtype: dict[str, dict[str, Mode]],
    job: Job,
) -> None:
    for call in {id(c): c for c in (max(calls, key=_largest), calls[-1])}.values():
        shared_modes = next(iter(modes_by_dtype.values()))
        exact, wide = (replay_call(call, shared_modes[name], job.loss) for name in ("exact", "float32"))
        if exact.failed:  # code that names float32 explicitly
            exact = wide
        if exact.failed or any(not bool(t.isfinite().any()) for t in exact.outputs if t.numel()):
            continue
        for dtype, place in places.items():
            errors = {"float32": compare(exact, wide)}
            for name in ("rounded", *_WAYS):
                errors[name] = compare(exact, replay_call(call, modes_by_dtype[dtype][name], job.loss))
            if errors["pure"].nonfinite_operators or errors["autocast"].nonfinite_operators:
                births = NonFiniteOperators()  # non-finite values that occur in float64 too
                replay_call(call, shared_modes["exact"], job.loss, listening=births)
                for error in errors.values():
                    error.nonfinite_operators = ", ".join(
                        sorted({*error.nonfinite_operators.split(", ")} - births.names)
                    )
            sums = NarrowSums()
            if not errors["pure"].failed:
                replay = replay_call(
                    call, modes_by_dtype[dtype]["pure"], job.loss, listening=sums, backward=False
                )
                errors["sums"] = compare(exact, replay) if sums.used else ReplayErrors(Gap(), 0.0)
            place.errors[path] = _merge([place.errors[path], errors]) if path in place.errors else errors


def _largest(call: RecordedCall) -> float:
    floats = (t.detach() for t in leaves(call.inputs) if is_float(t) and t.numel())
    return max((float(t.abs().max()) for t in floats), default=0.0)


def _merge(results: Iterable[dict[str, ReplayErrors]]) -> dict[str, ReplayErrors]:
    worst: dict[str, ReplayErrors] = {}
    for errors in results:
        for name, error in errors.items():
            worst[name] = worst[name].worst(error) if name in worst else error
    return worst


def _why_float32(errors: dict[str, ReplayErrors], mode: str, effect: float | None = None) -> str:
    """Return why a module's own code must run in float32 instead of ``mode``, or "" if it may run in ``mode``
    or float32 would not help. Errors below, relative to float64, count only if those in float32 are less than
    a quarter of them. The reasons, of which the first that applies is returned:

    - "fails": the code raises an exception, which it does not in float32.
    - "overflow": it makes values that are not finite, but in float32 all its outputs and gradients are.
    - "inputs": the error of an output is above 2**-6, and mostly comes from rounding inputs and parameters.
    - "computation": that error mostly comes from computing; or it is above 2**-8, and more than twice that
      from rounding inputs and parameters.
    - "gradient": the error of a gradient is above 2**-4.
    - "spread": the error of an output relative to its standard deviation is above 2**-6. Only if ``effect``
      is known and above 2**-6.

    ``errors``: by name of the mode, among them "float32" and "rounded". ``effect``: how far the gradients of
    other modules move, relative to their size, if only this module is narrow; None if unknown.
    """
    mode_errors, float32_errors, rounded_errors = errors[mode], errors["float32"], errors["rounded"]
    if mode_errors.failed and not float32_errors.failed:
        return "fails"
    if (mode_errors.nonfinite_operators or mode_errors.output.lost) and not float32_errors.output.lost:
        return "overflow"

    def float32_helps(low: float, high: float, limit: float) -> bool:
        return low > limit and high < low / _BETTER

    if float32_helps(mode_errors.output.error, float32_errors.output.error, OUTPUT):
        return "inputs" if rounded_errors.output.error > mode_errors.output.error / 2 else "computation"
    accumulates = mode_errors.output.error > _TWICE * rounded_errors.output.error
    if accumulates and float32_helps(mode_errors.output.error, float32_errors.output.error, _SOME):
        return "computation"
    if float32_helps(mode_errors.gradient, float32_errors.gradient, GRADIENT):
        return "gradient"
    matters = effect is not None and effect > OUTPUT
    if matters and float32_helps(mode_errors.output.spread, float32_errors.output.spread, OUTPUT):
        return "spread"
    return ""


def _paths(place: _Place, mode: str) -> set[str]:
    return {p for p, errors in place.errors.items() if _why_float32(errors, mode, place.effect_ratio)}


def _rank(place: _Place) -> tuple[bool, float]:
    if not place.errors:
        return False, 0.0
    errors = place.worst["pure"]
    return bool(_why_float32(place.worst, "pure")), max(
        errors.output.spread, errors.output.error, errors.gradient / 2
    )


class _Effects:
    """Compares the loss and the gradients of the whole model in float32 with those of a run in which the own
    code of some modules runs in the dtype ``low``. ``narrow``: a copy of the model with its parameters in
    ``low``. Both run on ``batch``."""

    def __init__(self, model: nn.Module, narrow: nn.Module, low: torch.dtype, batch: Any, job: Job) -> None:
        self.model, self.narrow, self.low, self.batch, self.job = model, narrow, low, batch, job
        self.loss, self.grads = casting.run_step(model, batch, job.loss, backward=True)

    def effect(self, paths: set[str], *, backward: bool = True) -> tuple[float, float]:
        """Return (change of the loss, change of the gradients of all other modules) if the own code of the
        modules at ``paths`` runs in the narrow dtype. Both are relative to the size in float32.

        Both are infinite if the run fails with one of `FAILURES`, or if its loss is not finite. The second is
        also infinite if a gradient is not finite. Without ``backward``, the second is otherwise 0."""
        try:
            with casting.cast_modules(self.model, self.narrow, paths, self.low):
                loss, grads = casting.run_step(self.model, self.batch, self.job.loss, backward=backward)
        except FAILURES:
            return math.inf, math.inf
        finally:
            self.narrow.zero_grad(set_to_none=True)
        if not math.isfinite(loss):
            return math.inf, math.inf
        shift = casting.relative_difference(self.grads, grads, paths) if backward else 0.0
        return abs(loss - self.loss) / max(abs(self.loss), 1e-30), shift if math.isfinite(shift) else math.inf


def _advise_dtype(
    job: Job, dtype: str, device: str, places: dict[str, _Place], effects: _Effects, counts: tuple[int, int]
) -> PrecisionAdvice:
    all_paths = [p for place in places.values() for p in place.calls if p not in ("", LOSS)]
    islands = {m: _island_patterns(places.values(), m, effects.model) for m in ("pure", "autocast")}
    examined = [_examined_module(p) for p in sorted(places.values(), key=_rank, reverse=True) if p.errors]
    pure_islands = islands["pure"]
    narrow_paths = {
        p
        for p in all_paths
        if not any(fnmatch.fnmatchcase(o, i) for i in pure_islands for o in _enclosing_paths(p))
    }
    return PrecisionAdvice(
        job=job.name,
        size=job.size,
        dtype=dtype,
        device=device,
        batches_count=counts[0],
        trained_steps=counts[1],
        examined=tuple(e for e in examined if e.pattern not in ("", LOSS)),
        outside=tuple(e for e in examined if e.pattern in ("", LOSS)),
        sums=tuple(e.pattern for e in examined if _relies_on_wide_sums(e)),
        islands=pure_islands,
        islands_autocast=islands["autocast"],
        loss_ratio=effects.effect(set(all_paths), backward=False)[0],
        kept_ratio=effects.effect(narrow_paths, backward=False)[0],
    )


def _relies_on_wide_sums(place: ExaminedModules) -> bool:
    """Return whether modules that need not stay in float32 rely on kernels that sum in float32: whether the
    error of their outputs, if sums are rounded to the narrow dtype after every addition, is above 2**-8 and
    more than twice the error with torch's own kernels. Return False for modules that must stay in float32,
    for the model itself and for the loss function."""
    return (
        not place.reason
        and place.pattern not in ("", LOSS)
        and place.sums_ratio > max(_SOME, _TWICE * place.pure.error_ratio)
    )


def _enclosing_paths(path: str) -> Iterator[str]:
    parts = path.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _examined_module(place: _Place) -> ExaminedModules:
    worst = place.worst
    errors = {
        name: PrecisionErrors(
            error_ratio=f.output.error,
            spread_ratio=f.output.spread,
            gradient_ratio=f.gradient,
            lost=f.failed or f.nonfinite_operators or ("?" if f.output.lost else ""),
        )
        for name, f in worst.items()
        if name != "sums"
    }
    reasons = {
        mode: next((r for f in place.errors.values() if (r := _why_float32(f, mode, place.effect_ratio))), "")
        for mode in ("pure", "autocast")
    }
    return ExaminedModules(
        pattern=place.pattern,
        kind=place.kind,
        modules_count=len(place.calls),
        **errors,
        sums_ratio=worst["sums"].output.error if "sums" in worst else 0.0,
        loss_ratio=place.loss_ratio,
        effect_ratio=place.effect_ratio,
        reason=reasons["pure"],
        reason_autocast=reasons["autocast"],
    )


def _island_patterns(places: Iterable[_Place], mode: str, model: nn.Module) -> tuple[str, ...]:
    """Return patterns, as for ``fnmatch``, that match the paths of exactly those modules of ``model`` whose
    own code must not run in ``mode`` (`_why_float32`). The model itself and the loss function are left out.
    Where no pattern matches exactly, the paths themselves are returned."""
    names = [n for n, _ in model.named_modules()]
    paths_by_pattern = [(p.pattern, _paths(p, mode)) for p in places if p.pattern not in ("", LOSS)]
    return tuple(p for pattern, paths in paths_by_pattern for p in _patterns(pattern, paths, names))


def _patterns(pattern: str, paths: set[str], names: list[str]) -> list[str]:
    numbered = sorted({_NUMBER.sub(lambda m: "[0-9]" * len(m[0]), p) for p in paths})
    for candidates in ([pattern], numbered):  # a star matches dots too
        if (
            len(paths) > len(candidates)
            and {n for n in names for t in candidates if fnmatch.fnmatchcase(n, t)} == paths
        ):
            return candidates
    return sorted(paths, key=lambda p: [(len(x), x) for x in p.split(".")])
