"""What a training was doing, judged by the calls of a traceback."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Final

from memfit.monitoring.traceback_text import StackFrame

_EVALUATION: Final = re.compile(
    r"^_*(?:run_|do_)?(?:evaluat(?:e|ion)|eval(?:_\w+)?|(?:evaluat(?:e|ion)|validate|validation|val|test|dev|predict|prediction)"
    r"(?:_(?:epoch|step|loop|one_epoch|model|phase|batch|impl))|validate|\w*validation|val|test|sanity_check)$"
)
_EVALUATION_CALL: Final = re.compile(
    r"\b(?:evaluate(?:_model)?|validate|validation_step|evaluation_loop|trainer\.(?:test|predict))\("
)
_EVALUATING: Final = re.compile(r"^_*evaluat\w+$")  # of the model, or of anything else: evaluate_energy
_TRAINING: Final = re.compile(
    r"^(?:train\w*|fit\w*|_?inner_training_loop|training_\w+|_fit_impl|run_train\w*)$"
)
_TRAINING_LOOP: Final = re.compile(
    r"^(?:train(?!ing_)\w*|fit\w*|_?inner_training_loop|_fit_impl|run_train\w*)$"
)
_STEP_CALL: Final = re.compile(r"\b(?:\w*optim\w*|opt\w{0,4}|scaler|accelerator)(?:\[[^\]]*\])?\.step\(")
_OPTIMIZER_FILE: Final = re.compile(
    r"/torch/optim/|/apex/optimizers/|/deepspeed/ops/|/bitsandbytes/optim/|/torch/amp/grad_scaler|"
    r"/cuda/amp/grad_scaler"
)
_STATE: Final = re.compile(r"state\[[^\]]+\] = |exp_avg|momentum_buffer")
_STATE_FUNCTION: Final = re.compile(r"^_?init_(?:group|state)\w*$|^initialize_optimizer_states$")
_SAVE: Final = re.compile(
    r"^_*(?:save(?:_(?:model|checkpoint|ckpt|pretrained|state|weights|to_state_dict))?|"
    r"\w*save_(?:checkpoint|ckpt|model)\w*|(?!load)(?:\w*_)?state_dict)$"
)
_SAVE_CALL: Final = re.compile(
    r"\b(?:torch|dcp|dist_cp|xm|fabric|accelerator)\.save\w*\(|save_checkpoint\(|save_pretrained\(|\.state_dict\(\)"
)
_LOAD: Final = re.compile(r"^_*(?:load_(?:state_dict|checkpoint)|resume\w*|restore(?:_checkpoint|_model)?)$")
_LOAD_CALL: Final = re.compile(r"\btorch\.load\(|load_state_dict\(|load_checkpoint\(")
_BUILD: Final = re.compile(
    r"^(?:_apply|convert|to|cuda|half|from_pretrained|_load_pretrained_model|to_empty)$"
)
_BUILD_CALL: Final = re.compile(r"\.(?:to|cuda|half|bfloat16)\(|from_pretrained\(")
_ATTRIBUTE: Final = re.compile(r"\bself\.(\w+)(?:\[[^\]]*\])?\(")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOfDeath:
    """``name``: "optimizer", "save", "load", "backward", "forward", "build", "data" or "". ``in_evaluation``:
    a call of an evaluation is among the frames, with no training loop in it. ``evaluating_function``: a
    function that only by its name may be one, "" if none. ``in_training``: calls of a training loop are among
    the frames. ``adds_state``: the optimizer was making its state. ``module``: attributes of the model that
    forward calls went through.
    """

    name: str = ""
    in_evaluation: bool = False
    evaluating_function: str = ""
    in_training: bool = False
    adds_state: bool = False
    module: str = ""


def phase_of(frames: Sequence[StackFrame]) -> PhaseOfDeath:
    """Return what ran, judged by ``frames``, outermost first. What the innermost frames do decides, so that a
    forward pass in the closure of an optimizer is a forward pass."""
    if not frames:
        return PhaseOfDeath()
    in_backward = any(_is_backward(f) for f in frames)
    activities = [n for f in reversed(frames) if (n := _activity(f))]
    name = next((n for n in activities if n != "build"), "build" if activities else "")  # others build, too
    loops = [f for f in frames if _TRAINING_LOOP.match(_function(f))]
    inner = frames[frames.index(loops[-1]) :] if loops else frames  # of a search that evaluates trainings
    return PhaseOfDeath(
        name="backward" if in_backward and name == "forward" else name,
        in_evaluation=any(_is_evaluation(f) for f in inner),
        evaluating_function=next((n for f in inner if _EVALUATING.match(n := _function(f))), ""),
        in_training=any(_TRAINING.match(_function(f)) for f in frames),
        adds_state=name == "optimizer" and _adds_state(frames),
        module=_module(frames),
    )


def _function(frame: StackFrame) -> str:
    return frame.function.rpartition(".")[2]


def _path(frame: StackFrame) -> str:
    return "/" + frame.file.replace("\\", "/")


def _is_evaluation(frame: StackFrame) -> bool:
    """Return whether the name or the code of the frame is that of an evaluation."""
    return bool(_EVALUATION.match(_function(frame)) or _EVALUATION_CALL.search(frame.code))


def _is_backward(frame: StackFrame) -> bool:
    in_autograd = "/torch/autograd/" in _path(frame) and "grad_mode" not in frame.file
    return in_autograd or ".backward(" in frame.code


def _activity(frame: StackFrame) -> str:
    """Return what the frame does, one of the names of `PhaseOfDeath`; "" if it does not show that."""
    function, path, code = _function(frame), _path(frame), frame.code
    if "/torch/utils/data/" in path:
        return "data"
    if _is_backward(frame) or function == "backward":
        return "backward"
    if _OPTIMIZER_FILE.search(path) or _STEP_CALL.search(code):
        return "optimizer"
    if (
        _LOAD.match(function)
        or _LOAD_CALL.search(code)
        or ("/torch/serialization.py" in path and "load" in function)
    ):
        return "load"
    if _SAVE.match(function) or _SAVE_CALL.search(code):
        return "save"
    if function in ("forward", "_call_impl", "_wrapped_call_impl", "__call__") or "/nn/functional.py" in path:
        return "forward"
    if _BUILD.match(function) or _BUILD_CALL.search(code):
        return "build"
    return ""


def _adds_state(frames: Sequence[StackFrame]) -> bool:
    """Return whether the optimizer was making its state, not the temporary tensors of its update."""
    return any(_STATE_FUNCTION.match(_function(f)) for f in frames) or any(
        _STATE.search(f.code) and "zeros" in f.code for f in frames[-3:]
    )


def _module(frames: Sequence[StackFrame]) -> str:
    calls = (
        match[1]
        for f in frames
        if _function(f) == "forward" and "/torch/nn/" not in _path(f) and (match := _ATTRIBUTE.search(f.code))
    )
    return ".".join(c for c in calls if not c.startswith("_"))
