"""Which code is running: the user's line, the module and the autograd node."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memfit.types.trace import Phase

_PACKAGE = f"{Path(__file__).parents[1]}/"
_STEP = f"{_PACKAGE}jobs/training_step.py"  # code that calls the training step makes none of its tensors
_TORCH = f"{Path(torch.__file__).parent}/"  # and not each folder of that name: a user may have one
_NOT_THE_USERS = (_PACKAGE, _TORCH, "/lib/python3", "<")
_ON_THE_WAY = (
    *(f"{_PACKAGE}trace/", f"{_PACKAGE}capture/"),
    *(f"{_TORCH}_ops.py", f"{_TORCH}overrides.py", f"{_TORCH}utils/_"),
)


def user_place() -> str:
    """Return the path and line, such as "/home/me/file.py:12", of the innermost frame of the user's code:
    outside torch, memfit, the standard library and installed packages. The code of memfit's jobs and of the
    models in transformers counts as the user's. Return "" if there is none, or if the training step is
    reached first, as when it or the optimizer allocates."""
    frame: Any = sys._getframe(1)
    while frame is not None and (path := frame.f_code.co_filename) != _STEP:
        is_internal = any(part in path for part in _NOT_THE_USERS)
        if (
            not is_internal
            or path.startswith(f"{_PACKAGE}jobs/")
            or "/site-packages/transformers/models/" in path
        ):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def user_line() -> str:
    """Return what `user_place` returns without the folder: "file.py:12"."""
    return user_place().rpartition("/")[2]


def library_line() -> str:
    """Return the file name and line, such as "file.py:12", of the innermost frame of the user's code or of an
    installed package other than torch and memfit, to say where a value is read. Return what `user_line`
    returns if there is none before the training step."""
    frame: Any = sys._getframe(1)
    while frame is not None and (path := frame.f_code.co_filename) != _STEP:
        is_library = "/site-packages/" in path and _TORCH not in path
        if (is_library and _PACKAGE not in path) or not any(part in path for part in _NOT_THE_USERS):
            return f"{path.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return user_line()


def reading_frame() -> Any:
    """Return the innermost frame outside memfit's packages trace and capture and torch's dispatch of
    operators, in torch's own code or the user's: that of the code which reads a tensor's value. Return None
    if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None and any(p in frame.f_code.co_filename for p in _ON_THE_WAY):
        frame = frame.f_back
    return frame


def reading_line() -> str:
    """Return the place in the code that reads a tensor's value (`reading_frame`), as
    ``path:line:instruction``. The index of the bytecode instruction is included because several reads may be
    on one line. Return "" if there is none."""
    frame = reading_frame()
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}:{frame.f_lasti}"


def newest_node() -> int:
    """Return the sequence number of the newest autograd node: in forward, that of the running operator."""
    return torch._C._autograd._get_sequence_nr() - 1


def running_node() -> int:
    """Return the sequence number of the autograd node whose backward runs, or -1 if there is none."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


class ModuleStack:
    """Finds the path of the module that runs, of the model given to ``watch``; ``name(phase)`` returns it. It
    is found from a stack of module calls, or in backward as the module whose forward made the running
    autograd node (by its sequence number). The path is "" if no module runs or it is unknown, and for the
    model itself."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._by_node: dict[int, str] = {}
        self._handles: list[Any] = []

    def watch(self, model: torch.nn.Module) -> None:
        self.watch_all({"": model})

    def watch_all(self, models: Mapping[str, torch.nn.Module]) -> None:
        """Follow calls of several models. The keys are put before the paths of their modules."""
        names = {
            id(module): ".".join(filter(None, (name, path)))
            for name, model in models.items()
            for path, module in model.named_modules()
        }

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
