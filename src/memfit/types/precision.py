"""Results of running each module of a job in half precision."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionErrors:
    """Errors of some modules in one precision, compared with the same calls in float64. Only the modules' own
    code runs; what their child modules return is taken from the recording.

    Errors are root mean squares over all elements. ``error_ratio`` (of outputs) and ``gradient_ratio`` (of
    gradients) are relative to the root mean square of the float64 result, ``spread_ratio`` (of outputs) to
    its standard deviation. ``lost``: the operators that produced non-finite values ("?" if they are unknown),
    or the error that the run raised; "" if there was neither.
    """

    error_ratio: float
    spread_ratio: float
    gradient_ratio: float
    lost: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedModules:
    """Modules of one class whose paths differ only in numbers. ``pattern`` is their path with stars for the
    numbers. Figures are the worst over these modules and their calls.

    ``kind``: name of the class. The errors of the modules' own code in four modes: ``pure``, parameters and
    all inputs in the narrow dtype (bfloat16 or float16); ``autocast``, as torch.autocast runs it;
    ``rounded``, inputs, parameters and outputs rounded to the narrow dtype, computed in float64; ``float32``,
    everything in float32. ``sums_ratio``: the error if the sums inside operators, which torch keeps in
    float32, were narrow too; 0 if nothing is summed.

    ``loss_ratio``: by how much the loss changes, relative to it, if only these modules are narrow;
    ``effect_ratio``: by how much the gradients of all other modules then change; None if that was not run.
    ``reason``: "" if these modules need not compute in float32, else a word that says why they must, a key of
    the word catalogs; ``reason_autocast``: the same under torch.autocast.
    """

    pattern: str
    kind: str
    modules_count: int
    pure: PrecisionErrors
    autocast: PrecisionErrors
    rounded: PrecisionErrors
    float32: PrecisionErrors
    sums_ratio: float = 0.0
    loss_ratio: float | None = None
    effect_ratio: float | None = None
    reason: str = ""
    reason_autocast: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAdvice:
    """Advice on which modules to compute in float32.

    ``dtype``: the narrow one, "bf16" or "fp16". ``islands``: patterns for ``Job(islands=...)`` if parameters
    are narrow; ``islands_autocast``: the same under autocast. ``loss_ratio``: by how much the loss changes,
    relative to it, with all modules in the narrow dtype; ``kept_ratio``: with all modules but the islands.
    ``examined``: the modules that were examined, without ``outside``. ``outside``: the job's loss function
    and the own code of the model's root module, which no pattern can name. ``sums``: patterns of modules that
    need no float32 only because torch's kernels sum in float32; custom kernels must do so too.
    ``batches_count`` batches were examined after ``trained_steps`` steps of training.
    """

    job: str
    size: str
    dtype: str
    device: str
    batches_count: int
    trained_steps: int
    examined: tuple[ExaminedModules, ...]
    islands: tuple[str, ...]
    islands_autocast: tuple[str, ...]
    outside: tuple[ExaminedModules, ...]
    sums: tuple[str, ...]
    loss_ratio: float
    kept_ratio: float
