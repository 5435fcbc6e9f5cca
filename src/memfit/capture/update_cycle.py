"""When the traced steps of a script have covered a whole cycle of its training."""

from __future__ import annotations

import time
import weakref
from typing import Any

from memfit.capture.later_training import later_training
from memfit.capture.tensors import is_fake

_STEPS = 2  # the second has the optimizer state that the first one made
# How long an optimizer is awaited that has made fewer, such as that of a generator behind its critic, and a
# later training. The range tests of torch-lr-finder, Lightning and fastai have 100 updates.
_MOST_UPDATES, _LIMIT_S = 128, 60.0
_IN_BACKWARD = 0  # stands for the optimizers that are called inside a backward pass, one per parameter


class UpdateCycle:
    """Counts the updates that a script's optimizers make. A step of the trace ends with an update of the
    optimizer that steps least often, so that the last one spans a whole cycle, such as five updates of a
    critic and one of its generator.

    ``created``: the optimizers that the script has made. ``optimizers``: those that have made updates, by id.
    ``is_over``: the last traced step was a whole cycle, and every optimizer has made two updates; or those
    that have not were awaited long enough. ``later``: where the script may train again (`later_training`).
    Updates before that training are those of another one, such as a range test of the learning rate, and do
    not count once it has begun.
    """

    def __init__(self) -> None:
        self.created: weakref.WeakSet[Any] = weakref.WeakSet()
        self.optimizers: dict[int, Any] = {}
        self.is_over = False
        self.later = ""
        self.has_begun_anew = False  # with the last step: the updates before it do not count
        self._earlier: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers of an earlier training
        self._inner: list[Any] = []  # called by others, such as that of a sharpness-aware one
        self._updates: dict[int, int] = {}  # number of them, by id
        self._recent: set[int] = set()  # have made an update since the last call of `close`
        self._closers: set[int] = set()  # made the updates with which the last step ended
        self._closes = 0
        self._begin_s = 0.0  # when the first update was made

    @property
    def count(self) -> int:
        """The most updates that an optimizer has made."""
        return max(self._updates.values(), default=0)

    def note(self, optimizer: Any, *, in_backward: bool) -> None:
        """Note an update that the script's loop, or a hook ``in_backward``, has asked for."""
        self.optimizers[id(optimizer)] = optimizer
        self._recent.add(_IN_BACKWARD if in_backward else id(optimizer))

    def note_inner(self, optimizer: Any) -> None:
        """Note that another optimizer has called this one."""
        if all(known is not optimizer for known in self._inner):
            self._inner.append(optimizer)

    def close(self, *, has_pass: bool) -> bool:
        """Return whether the updates since the last call end a step of the trace. ``has_pass``: a forward or
        backward pass was made since the last step. Updates without one belong to that step."""
        recent, self._recent = self._recent, set()
        for key in recent:
            self._updates[key] = self._updates.get(key, 0) + 1
        if not recent:
            return False
        if not has_pass:
            self._closers |= recent
            return False
        self._begin_s = self._begin_s or time.monotonic()
        self._closes += 1
        self._note_training(recent)
        least = min(self._updates.values())
        is_long = self._closes >= _MOST_UPDATES or time.monotonic() > self._begin_s + _LIMIT_S
        if min(self._updates[key] for key in recent) > least and not is_long:
            return False
        is_whole = least >= _STEPS and bool(recent & self._closers) and not self.later and not self.awaited()
        self.is_over = is_whole or (is_long and self.count >= _STEPS)
        self._closers = recent
        return True

    def _note_training(self, recent: set[int]) -> None:
        """Note where the script may train again. If it has begun to, count anew from ``recent`` updates."""
        before, self.later = self.later, later_training()
        self.has_begun_anew = bool(before) and not self.later
        if self.has_begun_anew:
            self._earlier.update(o for key, o in self.optimizers.items() if key not in recent)
            self.optimizers = {key: o for key, o in self.optimizers.items() if key in recent}
            self._updates = dict.fromkeys(recent, 1)

    def awaited(self) -> list[Any]:
        """Return the optimizers that have made no update. Those that wrap another one or are wrapped are left
        out and, if updates are made in backward, those whose parameters other optimizers have all updated."""
        active = [*self.optimizers.values(), *self._inner, *self._earlier]
        seen = {id(part) for o in active for part in (o, *o.param_groups)}
        done = {id(p) for o in active for p in params_of(o)} if _IN_BACKWARD in self._updates else set()
        return [
            o
            for o in self.created
            if not any(id(part) in seen for part in (o, *o.param_groups, *vars(o).values()))
            and any(is_fake(p) and id(p) not in done for p in params_of(o))
        ]

    def once(self) -> list[Any]:
        """Return the optimizers that have made exactly one update."""
        return [o for key, o in self.optimizers.items() if self._updates.get(key) == 1]


def params_of(optimizer: Any) -> list[Any]:
    """Return the parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
