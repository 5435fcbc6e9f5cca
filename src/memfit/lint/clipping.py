"""The largest gradient norm that a set-up's own files clip to."""

from __future__ import annotations

import dataclasses

from memfit.lint.parse import Options, Setup

# Of transformers 5.24 (max_grad_norm), Megatron-LM at d98e8a6 (--clip-grad) and torchtitan v0.2.2
# (training.max_norm); read 2026-11.
_DEFAULT_NORM = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClippingSetting:
    """``limit``: the largest gradient norm; 0: gradients are not clipped; None: the files do not decide.
    ``explicit`` is False where no file says so and the library's own default holds."""

    limit: float | None
    explicit: bool


def clipping_setting(setup: Setup) -> ClippingSetting:
    """Of the outermost library that clips: DeepSpeed's file decides below the Trainer and Accelerate."""
    if setup.deepspeed is not None:
        return _deepspeed(setup, setup.deepspeed)
    for options, path in (
        (setup.megatron, "clip_grad"), (setup.torchtitan, "training.max_norm"),
        (setup.trainer, "max_grad_norm"),
    ):  # fmt: skip
        if options is not None:
            return _of(options, path)
    return ClippingSetting(limit=None, explicit=False)


def _of(options: Options, path: str) -> ClippingSetting:
    found = options.number(path)
    if found is None:
        return ClippingSetting(limit=_DEFAULT_NORM, explicit=False)
    return ClippingSetting(limit=max(0.0, found), explicit=True)


def _deepspeed(setup: Setup, config: Options) -> ClippingSetting:
    """ "auto" is the Trainer's setting; Accelerate alone makes 1.0 of it (accelerator.py, 1.15)."""
    if config.raw("gradient_clipping") == "auto":
        limit = _of(setup.trainer, "max_grad_norm").limit if setup.trainer is not None else _DEFAULT_NORM
        return ClippingSetting(limit=limit, explicit=True)
    found = config.number("gradient_clipping")
    return ClippingSetting(
        limit=_DEFAULT_NORM if found is None else max(0.0, found), explicit=found is not None
    )
