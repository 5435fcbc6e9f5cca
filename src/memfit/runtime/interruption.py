"""Receive SIGTERM and SIGUSR1, so that a run saves before a scheduler ends this process."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Final, Self

_NUMBERS: Final = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """In its ``with`` block, SIGTERM and SIGUSR1 do not end this process but are kept for `take`. Entered
    outside the main thread, which alone receives signals, it does nothing.

    ``grace_s``: seconds after the first SIGTERM at which the run must have ended (`is_over`). A second
    SIGTERM ends this time at once."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._pending: deque[int] = deque()
        self._over_s: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._over_s = time.monotonic() + (self.grace_s if self._over_s is None else 0.0)
        self._pending.append(number)

    def take(self) -> Sequence[int]:
        """Return the numbers of the signals that have arrived since the last call, in order."""
        return [self._pending.popleft() for _ in range(len(self._pending))]

    @property
    def is_terminating(self) -> bool:
        """Whether SIGTERM has arrived."""
        return self._over_s is not None

    @property
    def is_over(self) -> bool:
        """Whether the time within which a run must end after SIGTERM is over (``grace_s``)."""
        return self._over_s is not None and time.monotonic() >= self._over_s

    @property
    def too_early(self) -> str:
        """The reason, in words, why ranks are killed if SIGTERM arrives before their first step."""
        return "stopped by SIGTERM before the first step"

    @property
    def too_late(self) -> str:
        """The reason, in words, why ranks are killed that have not ended ``grace_s`` seconds after
        SIGTERM."""
        return f"stopped by SIGTERM; it did not save within {self.grace_s:g} s"


NO_INTERRUPTION: Final = Interruption(0.0)
"""One that receives nothing."""
