"""Record an optimizer's update of parameters once, and repeat the recording for parameters of equal layout.

The step of an optimizer ends in a function that only writes into its arguments: parameters, gradients and
states. It is called for each parameter, or once for all in each step. Of calls whose arguments have equal
layouts the events are equal, so only the first one is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memfit.trace.allocation_recorder import AllocationRecorder, Life
from memfit.trace.operators import OperatorCall, key, tensors_in

# Module and name of functions that return None and write into tensors among their arguments. Their work does
# not depend on values, such as those of step counters.
_UPDATES = (
    ("torch.optim.adam", "adam"),
    ("torch.optim.sgd", "sgd"),
    ("torchao.optim.adam", "single_param_adam"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """The record of an update between the clocks ``start`` and ``end``. ``module``: the path of the module of
    the updated parameters; "" if there are several."""

    module: str
    start: int
    end: int
    lives: list[Life]
    calls: list[OperatorCall]
    counts: Counter[str]


class UpdateReplay:
    """Repeats the record of an optimizer's update for equal updates, in one trace of one process."""

    def __init__(self, recorder: AllocationRecorder) -> None:
        self._recorder = recorder
        self._kept: dict[Any, _Update | None] = {}

    @contextlib.contextmanager
    def patches(self) -> Iterator[None]:
        """Inside this context, replay the updates of torch's Adam and SGD and of torchao's Adam, as far as
        their modules are imported already."""
        with contextlib.ExitStack() as stack:
            for path, name in _UPDATES:
                if (module := sys.modules.get(path)) is not None:
                    update = functools.partial(self._update, getattr(module, name))
                    stack.enter_context(mock.patch.object(module, name, update))
            yield

    def _update(self, func: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # which would otherwise be asked for each size
            tensors = tensors_in(args, kwargs)
            if not all(type(t) is FakeTensor and not t.is_sparse for t in tensors):
                return func(*args, **kwargs)
            module, owners = self._owners(tensors)
            call = func, self._recorder.surroundings(), owners, key(args), key(kwargs)
        if (kept := self._kept.get(call)) is not None:
            return self._repeat(kept, module)
        if call in self._kept:
            return func(*args, **kwargs)
        return self._run(call, module, func, args, kwargs)

    def _owners(self, tensors: list[torch.Tensor]) -> tuple[str, Any]:
        """Return (path, key). ``path``: of the module that all tensors with a module belong to; "" if these
        are several or none. ``key``: equal for updates whose records differ in nothing but this path, as far
        as modules decide."""
        paths = [self._recorder.owner(tensor) for tensor in tensors]
        distinct = set(paths) - {""}
        if len(distinct) > 1:
            return "", tuple(paths)
        return (next(iter(distinct)), tuple(map(bool, paths))) if distinct else ("", ())

    def _run(self, call: Any, module: str, func: Callable[..., None], args: Any, kwargs: Any) -> None:
        recorder = self._recorder
        start, first_life, first_call = recorder.clock, len(recorder.lives), recorder.call_count
        statements, counts = recorder.guesses.statements, recorder.counts()
        func(*args, **kwargs)
        lives = recorder.lives[first_life:]
        is_closed = all(life.end is not None and life.category is None for life in lives) and not any(
            life.end is not None and life.end >= start for life in recorder.lives[:first_life]
        )
        calls = recorder.calls_between(first_call)
        if not is_closed or any(c.is_collective for c in calls) or recorder.guesses.statements != statements:
            self._kept[call] = None
            return
        self._kept[call] = _Update(
            module=module,
            start=start,
            end=recorder.clock,
            lives=lives,
            calls=calls,
            counts=recorder.counts() - counts,
        )

    def _repeat(self, kept: _Update, module: str) -> None:
        recorder, names = self._recorder, {kept.module: module} if kept.module else {}
        shift = recorder.clock - kept.start
        recorder.lives += [
            dataclasses.replace(
                life,
                start=life.start + shift,
                end=None if life.end is None else life.end + shift,
                phase=recorder.current,
                step=recorder.step,
                module=names.get(life.module, life.module),
            )
            for life in kept.lives
        ]
        recorder.repeat_calls(kept.calls, shift, names)
        recorder.add_counts(kept.counts)
        recorder.clock = kept.end + shift
