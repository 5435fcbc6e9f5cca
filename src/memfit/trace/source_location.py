"""Whose code is at work: the user's line, the module, the autograd node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from memfit.types.trace import Phase

_PACKAGE = f"{Path(__file__).parents[1]}/"
_STEP = f"{_PACKAGE}jobs/training_step.py"  # whoever calls the training step wrote none of its tensors
_NOT_THE_USERS = (_PACKAGE, "/torch/", "/lib/python3", "<")
_ON_THE_WAY = (f"{_PACKAGE}trace/", "/torch/_ops.py", "/torch/overrides.py", "/torch/utils/_")


def user_line() -> str:
    """``file.py:12`` of the innermost frame outside torch, memfit and the standard library; of memfit, a
    built-in job's own code counts. Empty where the training step itself or the optimizer allocates."""
    frame: Any = sys._getframe(1)
    while frame is not None and (path := frame.f_code.co_filename) != _STEP:
        own = any(part in path for part in _NOT_THE_USERS)
        if not own or path.startswith(f"{_PACKAGE}jobs/") or "/site-packages/transformers/models/" in path:
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def library_line() -> str:
    """As `user_line`, but a library's own code counts as well: where exactly a value is asked for."""
    frame: Any = sys._getframe(1)
    while frame is not None and (path := frame.f_code.co_filename) != _STEP:
        installed = "/site-packages/" in path and "/site-packages/torch/" not in path
        if (installed and _PACKAGE not in path) or not any(part in path for part in _NOT_THE_USERS):
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return user_line()


def asking_line() -> str:
    """The place in the code, torch's own or the user's, that asks a tensor for its value: several may be on
    one line."""
    frame: Any = sys._getframe(1)
    while frame is not None and any(p in frame.f_code.co_filename for p in _ON_THE_WAY):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}:{frame.f_lasti}"


def newest_node() -> int:
    """Sequence number of the autograd node made last: the one whose operator is at work, in forward."""
    return torch._C._autograd._get_sequence_nr() - 1


def running_node() -> int:
    """Sequence number of the autograd node whose backward runs; -1: none."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


class ModuleStack:
    """Which module is at work: the forward stack, and in backward the module whose forward made the
    autograd node that runs (by its sequence number)."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._by_node: dict[int, str] = {}
        self._handles: list[Any] = []

    def watch(self, model: torch.nn.Module) -> None:
        names = {id(m): n for n, m in model.named_modules()}

        def enter(module: torch.nn.Module, args: Any) -> None:
            if id(module) in names:
                self._stack.append(names[id(module)])

        def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
            if id(module) in names and self._stack:
                self._stack.pop()

        hooks = torch.nn.modules.module
        self._handles.append(hooks.register_module_forward_pre_hook(enter))
        self._handles.append(hooks.register_module_forward_hook(leave, always_call=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def name(self, phase: Phase) -> str:
        if self._stack:
            name = self._stack[-1]
            if phase is Phase.FORWARD:
                self._by_node.setdefault(newest_node(), name)
            return name
        if phase is Phase.BACKWARD:
            return self._by_node.get(running_node(), "")
        return ""
