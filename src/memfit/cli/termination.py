"""End a command on the signals that ask for it: SIGTERM, as from Slurm or a container, and SIGHUP, as from a
terminal that was closed. Both interrupt it as Ctrl-C does, so that its child processes and temporary folders
go with it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_AGAIN_S: Final = 0.05


class Terminated(KeyboardInterrupt):
    """A signal has asked this process to end. Raised in the main thread, where Ctrl-C raises
    KeyboardInterrupt."""


class Termination:
    """Handles the signals that ask this process to end. ``number``: the signal that has; 0: none has."""

    def __init__(self) -> None:
        self.number = 0

    def exit_code(self, otherwise: int) -> int:
        """Return 128 plus the signal's number, as shells do, or ``otherwise`` if there was no signal."""
        return 128 + self.number if self.number else otherwise

    def _end(self, number: int, frame: FrameType | None) -> None:
        for each in _ENDING:  # a second signal must not interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        self.number = number
        raise Terminated(signal.Signals(number).name)

    def resend(self, swallowed: sys.UnraisableHookArgs) -> bool:
        """Return whether ``swallowed`` is a KeyboardInterrupt, which a signal or Ctrl-C raised. If so, send
        that signal again after 50 ms. Python swallows exceptions that are raised in callbacks of weak
        references and in finalizers, of which a trace has many."""
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            return False
        number, thread = self.number or signal.SIGINT, threading.main_thread().ident
        if self.number:
            signal.signal(number, self._end)
        if thread is not None:
            threading.Timer(_AGAIN_S, signal.pthread_kill, (thread, number)).start()
        return True


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[Termination]:
    """Inside this context, SIGTERM and SIGHUP raise `Terminated`. If Python swallows that, or the
    KeyboardInterrupt of Ctrl-C, this context sends the signal again (`Termination.resend`). A signal that is
    ignored, as under nohup, or that has a handler of its own keeps that. Outside the main thread, nothing is
    changed."""
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    handlers = {number: signal.getsignal(number) for number in _ENDING}
    changed = [number for number, handler in handlers.items() if handler is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, termination._end)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda swallowed: None if termination.resend(swallowed) else hook(swallowed)
    try:
        yield termination
    finally:
        sys.unraisablehook = hook
        for number in changed:
            signal.signal(number, handlers[number])
