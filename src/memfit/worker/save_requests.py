"""Save on SIGUSR1, and save and end on SIGTERM: all ranks together, after the same step.

A signal reaches ranks at different times, or only one of them. Rank 0 therefore chooses the step. It
publishes "after the step that comes next" in the process group's store before it begins that step. No rank
can complete the step without rank 0, so each sees the choice when it is there. This costs a question or two
to the store per step and rank, and no collective.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Final

_NUMBERS: Final = (signal.SIGUSR1, signal.SIGTERM)
_SAVE, _END = b"save", b"end"


class SaveRequests:
    """Receives SIGUSR1 (save) and SIGTERM (save and end) in this process from its creation on, and says after
    which steps to save and to end. Must be created in the main thread. Forked children get the default
    actions of these signals."""

    def __init__(self) -> None:
        self._is_save_asked = self._is_end_asked = False  # of this process, not yet passed on
        self._choices = 0  # steps chosen so far
        self._after, self._kind = 0, b""  # the last choice
        self.has_ended = False  # the run has ended before its last step
        for number in _NUMBERS:
            signal.signal(number, self._receive)
        os.register_at_fork(after_in_child=_restore)  # such as a DataLoader's processes, which SIGTERM ends

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._is_end_asked = True
        else:
            self._is_save_asked = True

    def due(self, done: int) -> bool:
        """Return whether to save now, after ``done`` steps (at least 1), because a signal asked for it. Call
        `exchange` before."""
        return self._after == done

    def ends(self, done: int) -> bool:
        """Return whether the run is to end now, after ``done`` steps, because SIGTERM asked for it. Call
        `exchange` before."""
        return self._after == done and self._kind == _END

    def exchange(self, done: int, rank: int, store: Any) -> None:
        """Pass on requests and learn of the step that rank 0 has chosen. To be called after each step, when
        ``done`` steps are done, before `due`. ``store``: that of the process group; None if there is one
        process, which saves at once."""
        is_save_asked, is_end_asked = self._is_save_asked, self._is_end_asked
        self._is_save_asked = self._is_end_asked = False
        if store is None:
            if is_end_asked or is_save_asked:
                self._choose(done, _END if is_end_asked else _SAVE)
            return
        if is_end_asked:
            store.set("memfit/end", _END)
        if is_save_asked:
            store.set(f"memfit/save/{self._choices}", _SAVE)
        if rank:
            if store.check([f"memfit/after/{done}"]):
                self._choose(done, store.get(f"memfit/after/{done}"))
        elif not self.due(done) and (kind := self._read_request(store)):
            store.set(f"memfit/after/{done + 1}", kind)
            self._choose(done + 1, kind)

    def _read_request(self, store: Any) -> bytes:
        if store.check(["memfit/end"]):
            return _END
        return _SAVE if store.check([f"memfit/save/{self._choices}"]) else b""

    def _choose(self, after: int, kind: bytes) -> None:
        self._after, self._kind = after, kind
        self._choices += 1


def _restore() -> None:
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_DFL)
