"""Python imports this module when it starts in a process of ``memfit watch -- COMMAND``.

It imports the module of the same name that would otherwise be imported, and nothing else at first. When the
program has imported torch and makes its first optimizer, the watch begins (`memfit.monitoring.child`). If it
cannot begin, one line on standard error says so, and the program goes on. Before, only the standard library
is imported.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = "MEMFIT_WATCH"  # environment variable, set by memfit.monitoring.command


class _TorchFinder:
    """Finds torch as it would otherwise be found, and calls a function once torch is loaded."""

    def __init__(self, settings: str) -> None:
        self._settings = settings

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        load = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module
            load(module)
            _attempt(lambda: _prepare(module, self._settings))

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _prepare(torch: Any, settings: str) -> None:
    """Begin the watch when the program makes its first optimizer, or when it runs out of memory before."""
    optimizer, previous_hook = torch.optim.Optimizer, sys.excepthook
    initialize = optimizer.__init__

    @functools.wraps(initialize)
    def begin(self: Any, *arguments: Any, **settings_of_optimizer: Any) -> None:
        optimizer.__init__ = initialize
        _attempt(lambda: _child().begin(settings))
        initialize(self, *arguments, **settings_of_optimizer)

    def excepthook(kind: Any, error: Any, traceback: Any) -> None:
        _attempt(lambda: _child().fail(settings, error))
        previous_hook(kind, error, traceback)

    optimizer.__init__ = begin
    sys.excepthook = excepthook


def _child() -> Any:
    from memfit.monitoring import child

    return child


def _attempt(function: Any) -> None:
    try:
        function()
    except Exception as error:  # noqa: BLE001 (the program must run as without memfit)
        print(f"memfit: this process is not watched: {type(error).__name__}: {error}", file=sys.stderr)


def _run() -> None:
    here = str(Path(__file__).parent)
    sys.path[:] = [p for p in sys.path if p != here]
    settings = os.environ.get(SETTINGS)
    if settings:
        sys.meta_path.insert(0, _TorchFinder(settings))
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    _run()
