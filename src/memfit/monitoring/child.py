"""The watch in a process of ``memfit watch -- COMMAND``."""

from __future__ import annotations

import atexit
import functools
import json
import sys

from memfit.monitoring.watch import TrainingWatch
from memfit.runtime.oom import is_oom_error


@functools.cache
def begin(settings: str) -> TrainingWatch:
    """Begin the watch of this process, which ends with the process, and return it. Later calls return the
    same watch. ``settings``: JSON with the arguments ``file``, ``prediction`` and ``limits`` of
    `TrainingWatch`."""
    watch = TrainingWatch(**json.loads(settings))
    watch.__enter__()
    TrainingWatch.of_process = watch
    # A program may replace the hook of uncaught errors; Python keeps the error here before it calls one.
    atexit.register(lambda: _close(watch, getattr(sys, "last_value", None)))
    return watch


def fail(settings: str, error: BaseException) -> None:
    """End the watch of this process with the error that ends the process, if it has trained or is out of
    memory. Processes that only start others are thus left out."""
    if begin.cache_info().currsize == 0 and not is_oom_error(error):
        return
    _close(begin(settings), error)


def _close(watch: TrainingWatch, error: BaseException | None) -> None:
    if watch.is_recording or (error is not None and is_oom_error(error)):
        watch.close(error)
