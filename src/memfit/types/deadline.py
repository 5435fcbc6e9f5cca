"""The time by which a search has to answer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator


class TimeUp(BaseException):
    """Raised if the time of a search is up before the work that was asked for is finished or begun.

    It derives from BaseException, as KeyboardInterrupt does, so that nothing takes it for an error of the
    user's model.
    """


class Deadline:
    """When a search has to stop looking for better plans.

    ``end_s``: that time, on the clock of `time.monotonic`; infinite: never. ``hit_time_limit``: whether
    anything was left out because the time was up. As long as it is False, the answer does not depend on the
    clock.
    """

    def __init__(self, end_s: float = math.inf) -> None:
        self.end_s, self.hit_time_limit = end_s, False

    @classmethod
    def after(cls, limit_s: float | None) -> Deadline:
        """Return the deadline ``limit_s`` seconds from now; None: one that never comes."""
        return cls() if limit_s is None else cls(time.monotonic() + limit_s)

    @property
    def left_s(self) -> float:
        """The seconds until the deadline; 0 after it, infinite if there is none."""
        return max(0.0, self.end_s - time.monotonic())

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called and still holds."""
        return self.end_s == 0.0

    def stop(self) -> None:
        """Let the time be up from now on. Within `overtime` or `earlier_by`, this holds only until the end of
        the ``with`` block."""
        self.end_s = 0.0

    def check(self) -> None:
        """Raise TimeUp, and set ``hit_time_limit``, if the time is up."""
        if not self.has_time():
            raise TimeUp

    def has_time(self) -> bool:
        """Return whether there is time left; set ``hit_time_limit`` if there is none."""
        self.hit_time_limit = self.hit_time_limit or self.left_s <= 0
        return self.left_s > 0

    def overtime(self) -> contextlib.AbstractContextManager[None]:
        """Return a context within which there is no deadline, for work without which there is no answer."""
        return self._ending(math.inf)

    def earlier_by(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Return a context within which the deadline is ``seconds`` earlier, so that they are left for what
        follows."""
        return self._ending(self.end_s - seconds)

    @contextlib.contextmanager
    def _ending(self, end_s: float) -> Iterator[None]:
        own_end_s, self.end_s = self.end_s, end_s
        try:
            yield
        finally:
            self.end_s = own_end_s
