"""What running each module of a job in half precision showed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Own code of some modules in one precision, beside the same in float64. Root mean square errors over the
    root mean square of the reference (``error_ratio``, ``gradient_ratio``) or over its standard deviation
    (``spread_ratio``). ``lost``: the operators that made something not finite, or what could not run.
    """

    error_ratio: float
    spread_ratio: float
    gradient_ratio: float
    lost: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Modules of one class at one place of the repeated blocks, the worst of them and of their calls.

    ``pure``: parameters and all that comes in are narrow; ``autocast``: as torch.autocast runs it;
    ``rounded``: what comes in, parameters and what goes out are rounded, and float64 computes; ``float32``:
    all of it. ``sums_ratio``: the error if sums inside were narrow too, which torch keeps in float32; 0 where
    nothing is summed. ``loss_ratio``: how far the loss moves when these alone are pure, ``effect_ratio`` the
    gradient of everything else; None where that was not run. ``reason`` "": no island is needed, else a key
    of the words.
    """

    pattern: str
    kind: str
    modules_count: int
    pure: Shown
    autocast: Shown
    rounded: Shown
    float32: Shown
    sums_ratio: float = 0.0
    loss_ratio: float | None = None
    effect_ratio: float | None = None
    reason: str = ""
    reason_autocast: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAdvice:
    """``islands``: patterns for ``Job(islands=...)`` where parameters are narrow, ``islands_autocast`` under
    autocast. ``loss_ratio``: how far the loss moves with everything pure, ``kept_ratio`` with all but the
    islands. ``outside``: the job's own loss function and the code of the model's root: no pattern names it.
    ``sums``: places that need no island because torch's kernels sum in float32; one's own must too.
    """

    job: str
    size: str
    dtype: str
    device: str
    batches_count: int
    trained_steps: int
    examined: tuple[Examined, ...]
    islands: tuple[str, ...]
    islands_autocast: tuple[str, ...]
    outside: tuple[Examined, ...]
    sums: tuple[str, ...]
    loss_ratio: float
    kept_ratio: float
