"""Find the gradient norm to which a training with a set-up's files clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from memfit.lint.parse import Options, Setup

# The default of transformers 5.24 (max_grad_norm), Megatron-LM at d98e8a6 (--clip-grad) and torchtitan v0.2.2
# (training.max_norm); read 2026-11.
_DEFAULT_NORM = 1.0
# Kind of settings, as in Setup -> its gradient norm.
NORMS: Final[Mapping[str, str]] = {
    "deepspeed": "gradient_clipping",
    "megatron": "clip_grad",
    "torchtitan": "training.max_norm",
    "trainer": "max_grad_norm",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClippingSetting:
    """How gradients are clipped. ``limit``: the largest gradient norm; 0 if gradients are not clipped; None
    if the files do not determine it. ``explicit``: True if a file sets the limit, also by "auto"; False if
    the library's default applies or if ``limit`` is None."""

    limit: float | None
    explicit: bool


def clipping_setting(setup: Setup) -> ClippingSetting:
    """Return the clipping of the library that clips: the first of DeepSpeed, Megatron-LM, torchtitan and the
    Trainer of which ``setup`` has settings. If none is there, as with files of Accelerate or OpenFold alone,
    ``limit`` is None. It is None, too, for a norm that is known only when a script runs. A norm that is not
    given or is no number is the library's default of 1.0. A negative norm counts as 0."""
    if setup.deepspeed is not None:
        return _deepspeed(setup, setup.deepspeed)
    for kind in ("megatron", "torchtitan", "trainer"):
        options: Options | None = getattr(setup, kind)
        if options is not None:
            return _of(options, NORMS[kind])
    return ClippingSetting(limit=None, explicit=False)


def _of(options: Options, path: str) -> ClippingSetting:
    if options.undetermined(path):
        return ClippingSetting(limit=None, explicit=False)
    norm = options.number(path)
    if norm is None:
        return ClippingSetting(limit=_DEFAULT_NORM, explicit=False)
    return ClippingSetting(limit=max(0.0, norm), explicit=True)


def _deepspeed(setup: Setup, config: Options) -> ClippingSetting:
    """Return the clipping that DeepSpeed's settings ``config`` determine; the default norm is 1.0. "auto"
    stands for the Trainer's setting or, without a Trainer, for 1.0, with which Accelerate replaces it
    (accelerator.py, 1.15). ``explicit`` is then True, unless the Trainer's setting is known only when a
    script runs."""
    if config.raw(NORMS["deepspeed"]) != "auto":
        return _of(config, NORMS["deepspeed"])
    if setup.trainer is None:
        return ClippingSetting(limit=_DEFAULT_NORM, explicit=True)
    limit = _of(setup.trainer, NORMS["trainer"]).limit
    return ClippingSetting(limit=limit, explicit=limit is not None)
