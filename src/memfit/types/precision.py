"""Results of running each module of a job in half precision."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionErrors:
    """A run of some modules' own code, without that of their children, in one precision, compared with the
    same in float64.

    Errors are root mean squares relative to the root mean square of the reference (``error_ratio`` of
    outputs, ``gradient_ratio`` of gradients) or to its standard deviation (``spread_ratio`` of outputs).
    ``lost``: the operators that produced non-finite values ("?" if they are unknown), or the error that the
    run raised; "" if there was neither.
    """

    error_ratio: float
    spread_ratio: float
    gradient_ratio: float
    lost: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedModules:
    """Modules of one class whose paths differ only in numbers (``pattern`` with stars for them); figures are
    the worst over these modules and their calls.

    ``kind``: name of the class. ``pure``: parameters and all inputs are narrow, in bfloat16 or float16.
    ``autocast``: as run by torch.autocast. ``rounded``: inputs, parameters and outputs are rounded to the
    narrow dtype and float64 computes. ``float32``: everything in float32. ``sums_ratio``: the error if the
    sums inside, which torch keeps in float32, were narrow too; 0 if nothing is summed. ``loss_ratio``: how
    far the loss moves if only these modules are pure; ``effect_ratio``: how far the gradients of all other
    modules then move; None if that was not run. ``reason``: "" if these modules need not compute in float32,
    else a key of the word catalogs; ``reason_autocast``: the same under torch.autocast.
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
    are narrow; ``islands_autocast``: the same under autocast. ``loss_ratio``: how far the loss moves,
    relative to it, with all modules in the narrow dtype; ``kept_ratio``: with all but the islands.
    ``outside``: the job's loss function and the code of the model's root, which no pattern can name.
    ``sums``: patterns of modules that need no float32 only because torch's kernels sum in float32; custom
    kernels must do so too. ``batches_count`` batches were examined after ``trained_steps`` steps of training.
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
