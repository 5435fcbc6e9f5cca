"""Find out whether the samples of a job's batch depend on each other: compare the loss and the gradients of
a small batch with those of its parts. The optimizer does not run.

``docs/decisions/017-sample-dependence.md`` describes the protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from memfit.cost.memory import live_peak_bytes
from memfit.model.batch_objects import batch_length, batch_tensors, select, split
from memfit.model.chunking_probe import one_thread
from memfit.runtime import local_machine
from memfit.trace.batch_scaling import size_dependent_operator
from memfit.trace.fake_process_group import batch_norm_anywhere
from memfit.trace.fixed_random import FixedRandom, TimeLimitExceeded
from memfit.trace.mean_functions import function_of_a_mean
from memfit.trace.trace_pool import is_fork_refused
from memfit.trace.tracer import fake_model, trace
from memfit.trace.truncated_model import with_blocks
from memfit.trace.varied_samples import varied_samples
from memfit.types.dependence import DependenceCause, DependenceKind, SampleDependence
from memfit.types.errors import UserError, first_line
from memfit.types.job import Job
from memfit.types.plan import Plan
from memfit.types.trace import Trace
from memfit.types.units import format_bytes

_SAMPLES = (8, 4, 2)  # numbers of real samples to try, largest first
_ROUNDING_RATIO, _DEPENDENCE_RATIO = 1e-9, 1e-7
# A parameter's gradient norm counts as at least this fraction of the whole gradient's norm.
_SMALL_GRADIENT_RATIO = 1e-3
# Limits: memory, expected time on one core, processor time used.
_MOST_BYTES, _MOST_COST_S, _MOST_S = 2**30, 13.0, 40.0
_FREE_SHARE = 4  # a trial may take 1/4 of the free memory
# Cost of a trial: passes over the batch, calls of each operator, a slow core's FLOP/s and time per call.
_PASSES, _CALLS, _FLOPS_PER_S, _CALL_S = 8, 14, 3e9, 4e-5
_NOISE_RATIO = 0.3  # of 1 / sqrt(fan-in), added to parameters when inputs are random
_FEW_VALUES = 3
_ONE_SAMPLE = "a batch of one sample cannot be split"
_FEW_BLOCKS = (1, 2)
# Errors for a single sample, such as BatchNorm1d's.
_ONE_IS_TOO_FEW = (RuntimeError, ValueError, IndexError, UserError)

# Keyed by the function that builds the model, then by the ids of the job's other functions (kept alive, so
# that their ids stay unique) and the batch size.
_KNOWN: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Any, SampleDependence]]]
_KNOWN = weakref.WeakKeyDictionary()


def sample_dependence(job: Job) -> SampleDependence:
    """Return whether the samples of the job's batch depend on each other ("independent", "dependent" or "not
    tested", with the reason), by a trial with a few of its samples. Jobs with the same functions for model,
    batches, loss and its terms and the same batch size are tried once per process.

    If no trial is possible, or if it decides nothing, the result is "dependent" if the model has BatchNorm
    layers that take batch statistics, else "not tested". It is also "dependent" if the step fails on parts of
    the batch only. Errors of the job's functions are not raised. The only error that is raised is autograd's
    refusal to run in a forked process (`is_fork_refused`).
    """
    with contextlib.suppress(TypeError):  # the function cannot be a weak key
        if (known := _KNOWN.setdefault(job.build_model, {}).get(_key(job))) is not None:
            return known[1]
    result = _try_job(job)
    remember_dependence(job, result)
    return result


def remember_dependence(job: Job, result: SampleDependence) -> None:
    """Let `sample_dependence` return ``result`` for this job without a trial, such as one that another
    process has made. Do nothing if ``build_model`` cannot be a weak key."""
    with contextlib.suppress(TypeError):
        functions = (job.loss, job.make_batch, job.loss_terms)
        _KNOWN.setdefault(job.build_model, {})[_key(job)] = functions, result


def _key(job: Job) -> tuple[int, ...]:
    return id(job.loss), id(job.make_batch), id(job.loss_terms), job.batch_size


def _try_job(job: Job) -> SampleDependence:
    try:
        # The job's reduced form may have more samples, but only those of the job itself are split.
        result = _try_few_samples(*_affordable(job)) if job.batch_size > 1 else _not_tested(_ONE_SAMPLE)
    except TimeLimitExceeded:
        result = _not_tested(f"the trial takes more processor time than {_MOST_S:g} s")
    except Exception as error:  # any error of the user's code on parts of a batch
        if is_fork_refused(error):
            raise
        result = _not_tested(first_line(error)[:160])
        if _needs_whole_batch(job, error):
            kind, cause = DependenceKind.DEPENDENT, DependenceCause.SIZE
            return dataclasses.replace(result, kind=kind, cause=cause)
    if result.kind is DependenceKind.NOT_TESTED:
        return _by_batch_norms(job, result)
    return result


def _needs_whole_batch(job: Job, error: Exception) -> bool:
    """Return whether the job's step fails on parts of its batch only, as one does that holds numbers for all
    samples. A trial of few real samples has raised ``error``. True if this is, or was raised from, an
    IndexError: a label that is the number of a sample is out of bounds. True also if the step can be traced
    for the batch, but not for half of it. Raises only autograd's refusal to run in a forked process."""
    if isinstance(error.__cause__ or error, IndexError):
        return True
    try:
        batch = job.make_batch(0, 0)
        half = split(batch, 2)[0]
        _trace_without_terms(_with_batch(job, batch))
    except Exception:  # noqa: BLE001  user code; the search traces the job, too, and raises it
        return False
    try:
        _trace_without_terms(_with_batch(job, half))
    except Exception as half_error:
        if is_fork_refused(half_error):
            raise
        return True
    return False


def _try_few_samples(trial_job: Job, whole_job: Job) -> SampleDependence:
    """Return the result of a trial of ``trial_job``, which has a few samples of ``whole_job``. If that is
    "independent", but the whole batch uses an operator in another way than the few samples
    (`size_dependent_operator`), return the result of a trial of the whole batch, or "not tested" if that
    would exceed the limits of memory and time. Raises TimeLimitExceeded (`FixedRandom`). Errors of the job's
    functions are raised as they are."""
    result, batch = _Trial(trial_job).run(), whole_job.make_batch(0, 0)
    length = batch_length(batch)
    if result.kind is not DependenceKind.INDEPENDENT or length <= trial_job.batch_size:
        return result
    half = split(trial_job.make_batch(0, 0), 2)[0]
    jobs = (_with_batch(trial_job, half), trial_job, _with_batch(whole_job, batch))
    traces = {j.batch_size: _trace_without_terms(j) for j in jobs}
    if not (operator := size_dependent_operator(traces)):
        return result
    few = trial_job.batch_size
    reason = f"a batch of {length} samples uses {operator} in another way than the trial's {few}"
    if excess := _Cost.of(jobs[-1]).reason(length):
        return _not_tested(f"{reason}, and {excess}")
    return _Trial(jobs[-1], part_size=few).run()


def _trace_without_terms(job: Job) -> Trace:
    # Without loss_terms, because these samples may have none.
    return trace(dataclasses.replace(job, loss_terms=None), Plan(), steps=1, update=False)


def _with_batch(job: Job, batch: Any) -> Job:
    return dataclasses.replace(job, make_batch=lambda step, seed: batch, batch_size=batch_length(batch))


def _not_tested(reason: str) -> SampleDependence:
    return SampleDependence(kind=DependenceKind.NOT_TESTED, reason=reason)


# -- BatchNorm layers, if no trial is possible ------------------------------------------------------------


def _by_batch_norms(job: Job, untested: SampleDependence) -> SampleDependence:
    """Return the result "dependent" if the model has BatchNorm layers that take batch statistics in training,
    with the reason of ``untested``, which says why a trial decided nothing. Return ``untested`` if it has no
    such layers or cannot be built."""
    try:
        model = fake_model(job).train()
    except Exception:  # noqa: BLE001  whoever traces the job reports why it cannot be built
        return untested
    norms = {name: m for name, m in model.named_modules() if takes_batch_statistics(m)}
    return _of_norms(norms, f"judged by the model's layers; {untested.reason}") if norms else untested


def takes_batch_statistics(module: nn.Module) -> bool:
    """Return whether the module is a BatchNorm layer that computes statistics of its batch as it is now."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _of_norms(norms: Mapping[str, nn.Module], reason: str, *, loss: bool = False) -> SampleDependence:
    """Return the result "dependent", whose cause is the BatchNorm layers ``norms`` (module path: layer) and
    which lists their paths. ``loss`` says whether splitting the batch changes the loss even without these
    layers; if so, the reason says it, too. ``across_ranks`` is False (the batch may be split over
    data-parallel ranks) only if ``loss`` is False and all layers are SyncBatchNorm."""
    only_sync = all(isinstance(m, nn.SyncBatchNorm) for m in norms.values())
    suffix = "; the loss also compares samples" if loss else ""
    return SampleDependence(
        kind=DependenceKind.DEPENDENT,
        cause=DependenceCause.SYNC_BATCH_NORM if only_sync else DependenceCause.BATCH_NORM,
        reason=reason + suffix,
        modules=tuple(norms),
        across_ranks=loss or not only_sync,
    )


# -- a job that fits the limits of a trial ----------------------------------------------------------------


def _affordable(job: Job) -> tuple[Job, Job]:
    """Return the job with a few samples of its first batches (`varied_samples`), so few that a trial keeps
    within the limits of memory and time (8, else 4, else 2), and the same job with its whole batch. If this
    is too much with the whole model, try the job's reduced form (`Job.reduced`), if it has one, then the
    model with 1 block, or with 2 if not all kinds of modules are in the first. Raises UserError, which says
    why, if no such job keeps within the limits. Errors of the job's functions are raised as they are."""
    reason = "the model is too large for a trial"
    for variant in _smaller_jobs(job):
        # The first samples are at hand. Those that differ most have to be read from up to 32 batches.
        candidate, reason = _with_affordable_samples(variant, _with_first_samples)
        if candidate is None:
            continue
        varied = _with_samples(variant, candidate.batch_size)
        if _shapes(varied) == _shapes(candidate):
            return varied, variant
        candidate, reason = _with_affordable_samples(variant, _with_samples)
        if candidate is not None:
            return candidate, variant
    raise UserError(reason)


def _with_affordable_samples(
    job: Job, with_samples: Callable[[Job, int], Job]
) -> tuple[Job, str] | tuple[None, str]:
    """Return (the job with so few samples, by ``with_samples``, that a trial keeps within the limits; "").
    The job is None if 2 samples do not, and then the text says why."""
    candidate = with_samples(job, _SAMPLES[0])
    cost = _Cost.of(candidate)
    while cost.reason(candidate.batch_size):
        size = candidate.batch_size
        fewer = [n for n in _SAMPLES if n < size and not cost.at_least(n / size).reason(n)]
        if not fewer:
            least = min(size, _SAMPLES[-1])
            return None, cost.at_least(least / size).reason(least)
        candidate = with_samples(job, fewer[0])
        cost = _Cost.of(candidate)
    return candidate, ""


def _shapes(job: Job) -> list[torch.Size]:
    return [tensor.shape for tensor in batch_tensors(job.make_batch(0, 0))]


def _smaller_jobs(job: Job) -> Iterator[Job]:
    limit_bytes = trial_limit_bytes()
    model = fake_model(job)
    if _parameter_bytes(model) <= limit_bytes:
        yield job
    if job.reduced is not None:
        yield job.reduced()
    kinds = {type(m) for m in model.modules()}
    for count in _FEW_BLOCKS:
        short_job = with_blocks(job, count)
        with contextlib.suppress(UserError, AssertionError):  # the model has no blocks that can be left out
            short_model = fake_model(short_job)
            if {type(m) for m in short_model.modules()} == kinds:
                if _parameter_bytes(short_model) <= limit_bytes and _is_traceable(short_job):
                    yield short_job
                return


def _is_traceable(job: Job) -> bool:
    """Return whether the step of the job can be traced with its whole batch. It cannot if the model lacks
    blocks that its forward pass takes by number, as a U-Net's does. Raises only autograd's refusal to run in
    a forked process."""
    try:
        _trace_without_terms(job)
    except Exception as error:
        if is_fork_refused(error):
            raise
        return False
    return True


def _parameter_bytes(model: nn.Module) -> int:
    """Return the bytes in float64 of the model's parameters and of three sets of gradients, those of the
    whole batch and of its two halves, all together."""
    return 8 * 4 * sum(p.numel() for p in model.parameters())


def _with_first_samples(job: Job, count: int) -> Job:
    """Return the job with the first ``count`` samples of its first batch, or all if these are fewer."""
    batch = job.make_batch(0, 0)
    return _with_batch(job, select(batch, range(min(count, batch_length(batch)))))


def _with_samples(job: Job, count: int) -> Job:
    """Return the job with ``count`` samples that differ (`varied_samples`) as its batch of step 0, and as
    many that stand together, the first of its first batch, as that of step 1. Samplers may put what belongs
    together, such as several samples of one person, side by side. Raises what `varied_samples` raises."""
    varied, batch = varied_samples(job, count), job.make_batch(0, 0)
    size = batch_length(varied)
    first = select(batch, range(size))
    return dataclasses.replace(
        job, make_batch=lambda step, seed: first if step == 1 else varied, batch_size=size
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Cost:
    """The expected cost of a trial: peak memory, seconds of arithmetic (``flops_s``), and seconds that calls
    of operators take besides (``call_s``). ``needed_bytes`` is twice the peak of a traced step, because the
    trial runs in float64."""

    needed_bytes: int
    flops_s: float
    call_s: float

    @classmethod
    def of(cls, job: Job) -> _Cost:
        job_trace = _trace_without_terms(job)
        flops = _PASSES * sum(op.times * op.flops for op in job_trace.ops)
        calls = _CALLS * sum(op.times for op in job_trace.ops)
        return cls(2 * live_peak_bytes(job_trace), flops / _FLOPS_PER_S, calls * _CALL_S)

    def at_least(self, ratio: float) -> _Cost:
        """Return a lower bound of the cost with the fraction ``ratio`` of the samples. Bytes and arithmetic
        are taken to shrink in proportion; the time of calls stays."""
        return _Cost(int(self.needed_bytes * ratio), self.flops_s * ratio, self.call_s)

    def reason(self, samples: int) -> str:
        """Return why the cost of a trial is too high, as a clause that names ``samples``, its number of
        samples. Return "" if it is within the limits of memory and time."""
        limit_bytes, seconds = trial_limit_bytes(), self.flops_s + self.call_s
        if self.needed_bytes > limit_bytes:
            needed_text, limit_text = format_bytes(self.needed_bytes), format_bytes(limit_bytes)
            return f"a trial of {samples} samples needs {needed_text}, more than the limit of {limit_text}"
        if seconds > _MOST_COST_S:
            return (
                f"a trial of {samples} samples takes {seconds:.0f} s, more than the limit of "
                f"{_MOST_COST_S:g} s"
            )
        return ""


def trial_limit_bytes() -> int:
    """Return the bytes that a trial may take: 1 GiB, or a quarter of the free memory if that is less."""
    return min(_MOST_BYTES, local_machine.free_bytes() // _FREE_SHARE)


# -- the trial ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Gradients:
    """A loss and the gradient of every trained parameter (``by_name``), of a batch or as a weighted sum over
    its parts. ``size`` is the sum of the absolute values of the weighted losses, the scale for comparing
    losses. ``graph`` is the loss's autograd node; None for a sum."""

    loss: float
    size: float
    by_name: dict[str, torch.Tensor]
    graph: Any = None

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm())

    def norm(self) -> float:
        return float(sum(g.double().square().sum() for g in self.by_name.values()) ** 0.5)

    def distance(self, other: _Gradients) -> float:
        """Return the largest of the relative differences between the two losses and between the two gradients
        of each parameter. That of the losses is relative to the larger ``size``. Those of gradients are
        relative to the larger of the two norms, which counts as at least 1/1000 of the norm of all
        parameters' gradients, because rounding may dominate small ones. Return infinity if a loss or a
        gradient is not finite."""
        scale = max(self.norm(), other.norm())
        if not self.is_finite() or not other.is_finite():
            return math.inf
        loss = abs(self.loss - other.loss) / max(self.size, other.size, 1e-300)
        distances = [
            _norm(self.by_name[n] - other.by_name[n])
            / max(_norm(self.by_name[n]), _norm(other.by_name[n]), _SMALL_GRADIENT_RATIO * scale, 1e-300)
            for n in self.by_name
        ]
        return max(loss, *distances)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _sum(parts: Sequence[_Gradients], weights: Sequence[float]) -> _Gradients:
    return _Gradients(
        loss=sum(w * p.loss for p, w in zip(parts, weights, strict=True)),
        size=sum(abs(w) * p.size for p, w in zip(parts, weights, strict=True)),
        by_name={
            n: sum((w * p.by_name[n] for p, w in zip(parts, weights, strict=True)), torch.zeros(()))
            for n in parts[0].by_name
        },
    )


class _Trial:
    """One model and batch, whose loss and gradients are computed for the whole batch and for its parts.
    ``run()`` returns the result. ``part_size``: number of samples of the parts with which half of the batch
    is compared, too."""

    def __init__(self, job: Job, *, part_size: int = 1) -> None:
        self.job, self.part_size = job, part_size
        self.batch = job.make_batch(0, 0)
        self.length = batch_length(self.batch)
        halves = split(self.batch, min(2, self.length))
        sizes = {batch_length(p) for p in (*halves, *self._small_parts(halves[0]))}
        self.mode = FixedRandom({1, self.length, *sizes}, time.thread_time() + _MOST_S)
        self.norms: dict[str, nn.Module] = {}  # layers whose forward took batch statistics
        self.first_gradients: _Gradients | None = None  # of the whole batch with the model as it was built
        self.mean_function = ""  # see `function_of_a_mean`
        self.state: dict[tuple[nn.Module, str], torch.Tensor] = {}

    def run(self) -> SampleDependence:
        if self.length < 2:
            return _not_tested(_ONE_SAMPLE)
        with _on_its_own(), self.mode, batch_norm_anywhere():
            self.model = _model_in_float64(self.job)
            self.state = _state_of(self.model)
            batch = _in_float64(self.batch)
            result = self._compare_halves(batch, "on real samples", real=True)
            if result.kind is DependenceKind.INDEPENDENT:
                result = self._set_by_first_batch(batch) or self._with_other_numbers(batch) or result
            return self._on_random(batch, result) if result.kind is DependenceKind.INDEPENDENT else result

    def _with_other_numbers(self, batch: Any) -> SampleDependence | None:
        """Return the first of these results: with random numbers that differ from sample to sample, if it is
        not "independent"; on the first samples of a batch, if it is "dependent"; "dependent" if the loss
        weighs classes and the job has no ``loss_terms``. Return None if there is none of them."""
        if self.mode.draw_for_each_sample():
            drawn_result = self._compare_halves(batch, "with random numbers of each sample", real=False)
            self.mode.batch_dims.clear()
            if drawn_result.kind is not DependenceKind.INDEPENDENT:
                return drawn_result
        first = _in_float64(self.job.make_batch(1, 0))
        first_result = self._compare_halves(first, "on the first samples of a batch", real=False)
        if first_result.kind is DependenceKind.DEPENDENT:
            return first_result
        if self.mode.weighs_classes and self.job.loss_terms is None:
            return SampleDependence(
                kind=DependenceKind.DEPENDENT,
                cause=DependenceCause.WEIGHTS,
                reason="the loss is a mean that weighs classes differently",
            )
        return None

    def _on_random(self, batch: Any, real_result: SampleDependence) -> SampleDependence:
        """Return the result on random samples, with noise added to the model's parameters, if it is
        "dependent". Else return "not tested" if the loss has a function of a mean (`function_of_a_mean`),
        else ``real_result``, whose reason says so if random samples could not be tried."""
        _add_noise(self.model)
        try:
            random_result = self._compare_halves(_redrawn(batch), "on random samples", real=False)
        except TimeLimitExceeded:
            raise
        except Exception as error:  # noqa: BLE001  the job may not accept random values
            random_result = _not_tested(first_line(error)[:160])
        if random_result.kind is DependenceKind.DEPENDENT:
            return random_result
        if self.mean_function:
            return _not_tested(
                f"the loss applies {self.mean_function} to a sum or mean over samples, which may change at "
                "values that the trial did not have"
            )
        if random_result.kind is DependenceKind.NOT_TESTED:
            reason = f"{real_result.reason}; random samples could not be tried: {random_result.reason}"
            return dataclasses.replace(real_result, reason=reason)
        return real_result

    def _compare_halves(self, batch: Any, setting: str, *, real: bool) -> SampleDependence:
        """Compare loss and gradients of the whole batch with those of its halves and, for a ``real`` batch or
        random numbers of each sample, those of the first half with those of its parts of ``part_size``
        samples, unless the loss fails on these.
        Return the result:

        - "independent" if they are equal up to rounding and a forward pass leaves the model's state as it is.
        - "dependent" if they differ (`_difference`), or if a forward pass changes the state (`_stateful`).
        - "not tested" if the whole batch has a loss or gradients that are not finite or gradients that are
          all zero, if a ``real`` batch has another loss when it is computed again, if the loss fails on
          half of the batch, or if `_difference` says so.

        ``setting`` names the batch in the result's reason, as in "on random samples". Raises
        TimeLimitExceeded, and the error of a loss that fails on the whole batch.
        """
        first_gradients = None
        if real:  # fill caches; what the first batch sets is tried by `_set_by_first_batch`
            first_gradients = self.first_gradients = self._gradients(batch)
            self.state = _state_of(self.model)
        batch_gradients = self._gradients(batch)
        if not batch_gradients.is_finite() or not batch_gradients.norm():
            return _not_tested(
                f"the loss or gradients are not finite, or the gradients are all zero, {setting}"
            )
        if (
            first_gradients is not None
            and batch_gradients.distance(first_gradients) > _ROUNDING_RATIO
            and batch_gradients.distance(self._gradients(batch)) > _ROUNDING_RATIO
        ):
            return _not_tested("the loss has random numbers or a state of its own, which cannot be fixed")
        final_state = _state_of(self.model)
        halves = split(batch, 2)
        try:
            part_gradients, states = self._of_parts(halves)
        except TimeLimitExceeded:
            raise
        except Exception as error:  # noqa: BLE001  any error of the user's code
            return _not_tested(f"the loss fails on half of the batch: {first_line(error)[:160]}")
        difference = self._difference(batch, halves, batch_gradients, part_gradients, setting)
        if difference is not None:
            return difference
        if changed_keys := _changed_keys(self.state, final_state):
            return self._stateful(changed_keys, final_state, states)
        self.mean_function = self.mean_function or function_of_a_mean(
            batch_gradients.graph, part_gradients[0].graph
        )
        samples = self._small_parts(halves[0])
        if (real or self.mode.batch_dims) and len(samples) > 1 and self._terms(halves[0]):
            with contextlib.suppress(*_ONE_IS_TOO_FEW):
                sample_gradients, _ = self._of_parts(samples)
                if (
                    difference := self._difference(
                        halves[0], samples, part_gradients[0], sample_gradients, setting
                    )
                ) is not None:
                    return difference
        return SampleDependence(
            kind=DependenceKind.INDEPENDENT, reason=f"the whole and the split batch agree {setting}"
        )

    def _set_by_first_batch(self, batch: Any) -> SampleDependence | None:
        """Return the result "dependent" if the first forward pass sets state from its batch, such as a scale,
        a codebook or a maximum of all batches so far, and "not tested" if models built anew differ. Otherwise
        return None, also if the first pass sets the same for every batch, such as caches of positions.

        New models compute the first half, the second half after it (as micro-batches do) and the second half
        alone (as ranks do). Both must add up to the loss and gradients of the whole batch in a new model.
        Errors of the job's functions are raised as they are.
        """
        whole, model, state = self.first_gradients, self.model, self.state
        if whole is None or not whole.is_finite():
            return None
        halves = split(batch, 2)
        middle = batch_length(halves[0])
        try:
            first, changed = self._anew(halves[0]), self._unlike(model)
            self.state = _state_of(self.model)
            later = self._gradients(halves[1], first_sample=middle)
            alone = self._anew(halves[1], first_sample=middle)
            distance = max(whole.distance(self._total(halves, [first, last])) for last in (later, alone))
            if distance <= _DEPENDENCE_RATIO:
                return None
            if whole.distance(self._anew(batch)) > _ROUNDING_RATIO:
                return _not_tested("the job builds a model with other values each time")
        finally:
            self.model, self.state = model, state
        return SampleDependence(
            kind=DependenceKind.DEPENDENT,
            cause=DependenceCause.STATE,
            reason="the first forward pass sets state from its batch; the whole and the split batch differ "
            f"by {distance:.1g} on real samples",
            modules=changed,
        )

    def _anew(self, part: Any, first_sample: int = 0) -> _Gradients:
        """Build the model anew and return its loss and gradients on ``part``, whose first sample has the
        number ``first_sample`` in the whole batch."""
        self.model = _model_in_float64(self.job)
        self.state = _state_of(self.model)
        return self._gradients(part, first_sample=first_sample)

    def _unlike(self, model: nn.Module) -> tuple[str, ...]:
        """Return the paths of the parameters and buffers that have the same shape in ``model`` and in this
        trial's model but other values."""
        others = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        own = (*self.model.named_parameters(), *self.model.named_buffers())
        return tuple(
            n for n, t in own if n in others and others[n].shape == t.shape and not _alike(others[n], t)
        )

    def _total(self, parts: Sequence[Any], gradients: Sequence[_Gradients]) -> _Gradients:
        """Return the sum of the gradients of ``parts``, each weighted by its share of the loss terms
        (`Job.loss_terms`, or the number of samples). Parts without terms are left out: their mean is not
        defined. Raises UserError if no part has terms."""
        terms = [self._terms(p) for p in parts]
        if not any(terms):
            raise UserError(
                "the job's loss_terms, which counts the terms of a batch's loss, gives 0 for each part of "
                "the batch",
                allowed="at least 1 for the whole batch",
            )
        pairs = [(g, n / sum(terms)) for g, n in zip(gradients, terms, strict=True) if n]
        return _sum(*zip(*pairs, strict=True))

    def _small_parts(self, half: Any) -> Sequence[Any]:
        """Return the parts of ``half``, the half of a batch, of about ``part_size`` samples each."""
        return split(half, max(1, batch_length(half) // self.part_size))

    def _of_parts(self, parts: Sequence[Any]) -> tuple[list[_Gradients], list[dict[Any, torch.Tensor]]]:
        """Return (the loss and gradients of each part, the model's state after each part, see `_state_of`).
        Every part starts from the same state. Errors of the loss are raised as they are."""
        gradients, states, first = [], [], 0
        for part in parts:
            gradients.append(self._gradients(part, first_sample=first))
            states.append(_state_of(self.model))
            first += batch_length(part)
        return gradients, states

    def _gradients(self, part: Any, seed: int = 0, first_sample: int = 0) -> _Gradients:
        _restore(self.state)
        self.mode.start_pass(batch_length(part), first_sample)
        _seed(seed)
        self.model.zero_grad(set_to_none=True)
        with _watched(self.model, self.norms):
            # The loss may change its batch.
            loss = self.job.loss(self.model, _pytree.tree_map_only(torch.Tensor, torch.clone, part))
            loss.backward()
        params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}
        dense = {n: g.to_dense() if g.is_sparse else g for n, g in grads.items()}
        value = float(loss.detach())
        self.model.zero_grad(set_to_none=True)
        return _Gradients(loss=value, size=abs(value), by_name=dense, graph=loss.grad_fn)

    def _terms(self, part: Any) -> int:
        return self.job.loss_terms(part) if self.job.loss_terms else batch_length(part)

    def _difference(
        self,
        batch: Any,
        parts: Sequence[Any],
        batch_gradients: _Gradients,
        part_gradients: list[_Gradients],
        setting: str,
    ) -> SampleDependence | None:
        """Return None if the loss and gradients of the whole batch equal, up to rounding, the sum of those of
        its ``parts``, each weighted by its share of the loss terms (`Job.loss_terms`, or the number of
        samples). Otherwise return the result: "dependent" with the cause, or "not tested" if rounding or
        random numbers may explain the difference. ``setting``: as in `_compare_halves`. Raises what `_total`
        raises."""
        terms = [self._terms(p) for p in parts]
        distance = batch_gradients.distance(self._total(parts, part_gradients))
        if distance <= _ROUNDING_RATIO:
            return None
        if distance <= _DEPENDENCE_RATIO:
            return _not_tested(
                f"the whole and the split batch differ by {distance:.0e}, which rounding may explain, "
                f"{setting}"
            )
        if batch_gradients.distance(self._gradients(batch, seed=1)) > _ROUNDING_RATIO:
            return _not_tested("the loss has random numbers or a state of its own, which cannot be fixed")
        reason = f"the whole and the split batch differ by {distance:.1g} {setting}"
        if norms := dict(self.norms):
            return _of_norms(norms, reason, loss=self._differs_without(batch, norms))
        if (weights := _weights(batch_gradients, part_gradients)) is not None:
            return _wrongly_weighed(weights, [n / sum(terms) for n in terms])
        if not all(p.is_finite() for p in part_gradients):
            reason = f"the loss or gradients of a part of the batch are not finite {setting}"
        return SampleDependence(kind=DependenceKind.DEPENDENT, cause=DependenceCause.LOSS, reason=reason)

    def _differs_without(self, batch: Any, norms: Mapping[str, nn.Module]) -> bool:
        """Return whether splitting the batch in halves changes the loss or the gradients even if the
        BatchNorm layers ``norms`` use their running statistics. Return False if one of the layers has none.
        Raises what `_total` raises."""
        layers = [m for m in norms.values() if getattr(m, "running_mean", None) is not None]
        if len(layers) < len(norms):
            return False  # layers without running statistics cannot be held fixed
        for m in layers:
            m.eval()
        parts = split(batch, 2)
        gradients, _ = self._of_parts(parts)
        differs = self._gradients(batch).distance(self._total(parts, gradients)) > _DEPENDENCE_RATIO
        for m in layers:
            m.train()
        return differs

    def _stateful(
        self,
        changed_keys: list[tuple[nn.Module, str]],
        final_state: Mapping[Any, torch.Tensor],
        states: Sequence[Mapping[Any, torch.Tensor]],
    ) -> SampleDependence:
        """Return the result "dependent" for a model whose state (`_state_of`) a forward pass changes: the
        whole and the split batch have the same loss and gradients, but each part updates the state.

        ``changed_keys`` are the keys of what the whole batch changes; ``final_state`` is the state after the
        whole batch, ``states`` those after each part. If BatchNorm layers took batch statistics, they are the
        cause. Else the result lists the changed state; ``across_ranks`` is True if it depends on the samples,
        and False if each pass changes it in the same way.
        """
        if self.norms:
            return _of_norms(dict(self.norms), "each part updates the layers' statistics")
        names = {m: name for name, m in self.model.named_modules()}
        paths = tuple(f"{names[m]}.{name}".strip(".") for m, name in changed_keys)
        depends_on_data = any(not _alike(s.get(k), final_state[k]) for s in states for k in changed_keys)
        detail = "depending on its samples" if depends_on_data else "once for each part"
        return SampleDependence(
            kind=DependenceKind.DEPENDENT,
            cause=DependenceCause.STATE,
            across_ranks=depends_on_data,
            reason=f"a forward pass updates this state, {detail}",
            modules=paths,
        )


def _wrongly_weighed(weights: list[float], shares: list[float]) -> SampleDependence:
    loss_weights, step_weights = (", ".join(f"{w:.3g}" for w in ws) for ws in (weights, shares))
    kind = "a sum" if all(abs(w - 1) < _DEPENDENCE_RATIO for w in weights) else "a mean"
    reason = (
        f"the loss is {kind} that weighs {len(weights)} parts of the batch by {loss_weights}, but the step "
        f"weighs them by {step_weights}"
    )
    return SampleDependence(kind=DependenceKind.DEPENDENT, cause=DependenceCause.WEIGHTS, reason=reason)


def _weights(batch_gradients: _Gradients, part_gradients: Sequence[_Gradients]) -> list[float] | None:
    """Return the weights with which the losses and gradients of the parts add up to those of the whole batch.
    A part whose loss or gradients are not finite, such as a mean over no terms, weighs 0. Return None if the
    whole is neither a weighted mean of the parts (weights of at least 0 that add up to 1) nor their plain sum
    (weights 1)."""
    weights = torch.tensor([float(p.is_finite()) for p in part_gradients])
    finite = [p for p in part_gradients if p.is_finite()]
    if not finite:
        return None
    columns, target = torch.stack([_flat(p) for p in finite], dim=1), _flat(batch_gradients)
    solution = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    weights[weights > 0] = solution.clamp(min=0)
    is_sum = batch_gradients.distance(_sum(finite, solution.tolist())) <= _ROUNDING_RATIO
    is_mean_or_sum = abs(float(solution.sum()) - 1) <= _DEPENDENCE_RATIO or bool(
        ((solution - 1).abs() <= _DEPENDENCE_RATIO).all()
    )
    return weights.tolist() if is_sum and is_mean_or_sum and float(solution.min()) >= 0 else None


def _flat(gradients: _Gradients) -> torch.Tensor:
    return torch.cat([*(g.flatten() for g in gradients.by_name.values()), torch.tensor([gradients.loss])])


# -- settings for a trial, and the state of a model ------------------------------------------------------


@contextlib.contextmanager
def _on_its_own() -> Iterator[None]:
    """Inside this context, use float64 by default and one thread, enable gradients and hide warnings.
    Afterwards, restore the default dtype, the number of threads and the random states of torch, numpy and
    Python."""
    dtype = torch.get_default_dtype()
    states = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        warnings.catch_warnings(),
        one_thread(),
    ):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(states[0])
            numpy.random.set_state(states[1])  # noqa: NPY002


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002


@contextlib.contextmanager
def _watched(model: nn.Module, norms: dict[str, nn.Module]) -> Iterator[None]:
    """Inside this context, add to ``norms`` (module path: layer) each BatchNorm layer of ``model`` that is
    called and takes batch statistics then."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if takes_batch_statistics(module):
                norms[name] = module

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    hooks = [m.register_forward_pre_hook(note(n)) for n, m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _model_in_float64(job: Job) -> nn.Module:
    with FixedRandom.paused():
        torch.set_default_dtype(torch.float32)
        _seed(0)
        model = job.build_model()
        torch.set_default_dtype(torch.float64)
        model._apply(_wide).train()
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    setattr(module, name, _wide(value))
    return model


def _in_float64(batch: Any) -> Any:
    return _pytree.tree_map_only(torch.Tensor, lambda t: _wide(t.detach()), batch)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _redrawn(batch: Any) -> Any:
    """Return a batch of the same structure with other values. Each floating-point tensor with more than 3
    distinct values gets normal random numbers of the same mean and deviation, except for its zeros. Other
    tensors keep their values, in another order within each sample; equal values at the start or the end of a
    sample stay there. (Zeros and ends may be padding, and a job may cut its batch to the longest sample.) Of
    these other tensors, those of one dimension and those whose first dimension is not the batch stay as they
    are. The result is the same for every call."""
    generator, length = torch.Generator().manual_seed(0), batch_length(batch)

    def drawn(t: torch.Tensor) -> torch.Tensor:
        if not t.numel():
            return t
        if t.is_floating_point() and t.unique().numel() > _FEW_VALUES:
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            return torch.where(t == 0, t, t.mean() + noise * t.std().nan_to_num(1.0))
        if t.dim() < 2 or t.shape[0] != length:
            return t
        rows = t.reshape(length, -1)
        moved = _between_runs(rows) & _between_runs(rows.flip(1)).flip(1)
        order = torch.rand(rows.shape, generator=generator).argsort(dim=1)
        drawn_rows = rows.clone()
        for row, source, places, sequence in zip(drawn_rows, rows, moved, order, strict=True):
            row[places] = source[sequence[places[sequence]]]
        return drawn_rows.reshape(t.shape)

    with FixedRandom.paused():
        return _pytree.tree_map_only(torch.Tensor, drawn, batch)


def _between_runs(rows: torch.Tensor) -> torch.Tensor:
    """Return a bool tensor of the shape of ``rows``: False for the equal values at the start of each row,
    True for the elements after them."""
    return (rows != rows[:, :1]).cumsum(dim=1) > 0


def _add_noise(model: nn.Module) -> None:
    """Add normal noise to all parameters, with a deviation of 0.3 / sqrt(fan-in) (fan-in at least 10),
    because parameters that start at zero would hide the layers behind them."""
    generator = torch.Generator().manual_seed(0)
    with FixedRandom.paused(), torch.no_grad():
        for p in model.parameters():
            width = max(1, p[0].numel() if p.dim() > 1 else 1)
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(noise, alpha=_NOISE_RATIO / max(width, 10) ** 0.5)


def _state_of(model: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor]:
    """Return copies of the buffers and of other tensors, except parameters, that modules hold, by (module,
    attribute). A tensor that several modules hold is copied once, and its keys share the copy."""
    attributes = [(m, n, t) for m in model.modules() for n, t in (*m._buffers.items(), *vars(m).items())]
    return _copy_state({(m, n): t for m, n, t in attributes if isinstance(t, torch.Tensor)})


def _copy_state(
    state: Mapping[tuple[nn.Module, str], torch.Tensor],
) -> dict[tuple[nn.Module, str], torch.Tensor]:
    copies = {id(t): t.detach().clone() for t in state.values()}
    return {k: copies[id(t)] for k, t in state.items()}


def _restore(state: Mapping[tuple[nn.Module, str], torch.Tensor]) -> None:
    for (module, name), value in _copy_state(state).items():
        holder = module._buffers if name in module._buffers else vars(module)
        holder[name] = value


def _changed_keys(
    old_state: Mapping[tuple[nn.Module, str], torch.Tensor],
    new_state: Mapping[tuple[nn.Module, str], torch.Tensor],
) -> list[tuple[nn.Module, str]]:
    """Return the keys of ``old_state`` whose tensors differ in ``new_state`` by more than rounding or are
    missing there, as after a forward pass (`_state_of`). BatchNorm's counter of passes is left out."""
    return [
        (module, name)
        for (module, name), t in old_state.items()
        if not (isinstance(module, _BatchNorm) and name == "num_batches_tracked")
        and not _alike(new_state.get((module, name)), t)
    ]


def _alike(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    if left is None or left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    return torch.allclose(left, right, rtol=_ROUNDING_RATIO, atol=1e-12, equal_nan=True)
