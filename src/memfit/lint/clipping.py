"""Find the gradient norm to which a training with a set-up's files clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from memfit.lint.parse import Options, Setup
from memfit.lint.to_plan_mace import DEFAULT_CLIP

# The default of transformers 5.24 (max_grad_norm), Megatron-LM at d98e8a6 (--clip-grad) and torchtitan v0.2.2
# (training.max_norm); read 2026-11.
_DEFAULT_NORM = 1.0
# Lightning 2.6 does not clip by default; MACE's norm is that of mace/tools/arg_parser.py at 667eee4e58d2.
_OTHER_DEFAULTS: Final[Mapping[str, float]] = {"lightning": 0.0, "mace": DEFAULT_CLIP}
# Kind of settings, as in Setup -> its gradient norm.
NORMS: Final[Mapping[str, str]] = {
    "deepspeed": "gradient_clipping",
    "megatron": "clip_grad",
    "torchtitan": "training.max_norm",
    "trainer": "max_grad_norm",
    "axolotl": "max_grad_norm",
    "lightning": "trainer.gradient_clip_val",
    "mace": "clip_grad",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClippingSetting:
    """How gradients are clipped. ``limit``: the largest gradient norm; 0 if gradients are not clipped; None
    if the files do not determine it. ``explicit``: True if a file sets the limit, also by "auto"; False if
    the library's default applies or if ``limit`` is None."""

    limit: float | None
    explicit: bool


def clipping_setting(setup: Setup) -> ClippingSetting:
    """Return the clipping of the library that clips: the first of DeepSpeed, Megatron-LM, torchtitan,
    Axolotl, the Trainer, Lightning and MACE of which ``setup`` has settings. If none is there, as with files
    of Accelerate or OpenFold alone, ``limit`` is None. It is None, too, for a norm that is known only when a
    script runs, and if Lightning clips by value. A norm that is not given or is no number is the library's
    default: 1.0, 10.0 for MACE, and none for Lightning. A negative norm and the word none count as 0, no
    clipping."""
    if setup.deepspeed is not None:
        return _deepspeed(setup, setup.deepspeed)
    if setup.lightning is not None and setup.lightning.get("trainer.gradient_clip_algorithm") == "value":
        return ClippingSetting(limit=None, explicit=False)
    for kind in ("megatron", "torchtitan", "axolotl", "trainer", "lightning", "mace"):
        options: Options | None = getattr(setup, kind)
        if options is not None:
            return _of(options, NORMS[kind], _OTHER_DEFAULTS.get(kind, _DEFAULT_NORM))
    return ClippingSetting(limit=None, explicit=False)


def _of(options: Options, path: str, default: float = _DEFAULT_NORM) -> ClippingSetting:
    if options.undetermined(path):
        return ClippingSetting(limit=None, explicit=False)
    norm = options.number(path)
    if norm is None and str(options.raw(path)).lower() == "none" and options.raw(path) is not None:
        return ClippingSetting(limit=0.0, explicit=True)  # how mace_run_train is told not to clip
    if norm is None:
        return ClippingSetting(limit=default, explicit=False)
    return ClippingSetting(limit=max(0.0, norm), explicit=True)


def _deepspeed(setup: Setup, config: Options) -> ClippingSetting:
    """Return the clipping that DeepSpeed's settings ``config`` determine; the default norm is 1.0. "auto"
    stands for the setting of the Trainer or of Axolotl or, without both, for 1.0, with which Accelerate
    replaces it (accelerator.py, 1.15). ``explicit`` is then True, unless the Trainer's setting is known only
    when a script runs."""
    if config.raw(NORMS["deepspeed"]) != "auto":
        return _of(config, NORMS["deepspeed"])
    trainer = setup.trainer or setup.axolotl  # both have the norm under the same name
    if trainer is None:
        return ClippingSetting(limit=_DEFAULT_NORM, explicit=True)
    limit = _of(trainer, NORMS["trainer"]).limit
    return ClippingSetting(limit=limit, explicit=limit is not None)
