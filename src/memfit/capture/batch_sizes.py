"""How much the batches of a script differ in size, by looking at more of them than are traced."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

from memfit.model.batch_objects import batch_tensors

_MOST_BATCHES = 32
_LIMIT_S = 5.0
ALIKE_RATIO = 1.02  # batches that differ by less are of one size
_PREFETCHED = 2  # DataLoader's prefetch_factor by default


class BatchSizes:
    """The sizes of a script's batches, from a data loader or made by the script's loop.

    From loaders, the one that the script used last counts. ``traced_bytes``: its largest batch since the
    script changed to it. ``largest_bytes``: the largest of these and of those that `ratios` takes.
    ``step_bytes``: without a loader, for each step position -> bytes of the tensors that the trained models
    got, the most of several calls. ``problem``: what ended `ratios` early, "" if nothing did."""

    def __init__(self) -> None:
        self.traced_bytes = self.largest_bytes = 0
        # of each step without a loader: of the tensors with which each model is called, by their number
        self.step_bytes: list[Counter[tuple[int, int, int]]] = [Counter()]
        self._begin_s = 0.0  # when the first of these steps ended
        self._loader: Any = None
        self._is_closed = False
        self.problem = ""

    @property
    def loader(self) -> Any:
        """The loader that the script used last; None if it used none."""
        return self._loader

    def note(self, batch: Any, loader: Any) -> None:
        """Note the bytes of a batch that ``loader`` has given to the script. After a call of `ratios`, do
        nothing."""
        if self._is_closed:
            return
        size_bytes = bytes_of(batch)
        self.traced_bytes = max(size_bytes, self.traced_bytes) if loader is self._loader else size_bytes
        self.largest_bytes = self.traced_bytes
        self._loader = loader

    def note_call(self, model: Any, arguments: Any) -> None:
        """Note the bytes of the tensors that the script's loop gives to a model that it trains. Do nothing if
        the script uses a loader."""
        if self._loader is None:
            tensors = batch_tensors(arguments)
            keys = ((id(model), len(tensors), i) for i in range(len(tensors)))
            sizes_bytes = (t.numel() * t.element_size() for t in tensors)
            self.step_bytes[-1] |= Counter(dict(zip(keys, sizes_bytes, strict=True)))

    def close_step(self, *, has_begun_anew: bool) -> None:
        """Note the end of a step. ``has_begun_anew``: the steps before it belong to another training."""
        self._begin_s = self._begin_s or time.monotonic()
        self.step_bytes = [*self.step_bytes[-1 if has_begun_anew else 0 :], Counter()]

    @property
    def loop_ratio(self) -> float:
        """If the script's loop makes the batches: the largest size of a tensor in a step, divided by its
        smallest in another one, for the tensor where this is most. Otherwise, and before the first batch, 1.
        """
        steps = self.step_bytes if self._loader is None else []
        keys = {key for step in steps for key in step}
        sizes = [[step[key] for step in steps if step[key]] for key in keys]
        return max((max(s) / min(s) for s in sizes), default=1.0)

    @property
    def needs_steps(self) -> bool:
        """Whether further steps must show how large the batches of the script's loop become: those so far
        differ by more than 2 %. False after 32 steps, and 5 s after the end of the first."""
        is_long = len(self.step_bytes) > _MOST_BATCHES or time.monotonic() > self._begin_s + _LIMIT_S
        return not is_long and self.loop_ratio > ALIKE_RATIO

    def shared(self) -> tuple[int, int]:
        """Return (number, bytes of the largest) of the batches that lie in shared memory at once, if the
        loader has worker processes; (0, 0) otherwise. Each worker prepares ``prefetch_factor`` batches, and
        the script holds two: the present one and the one before."""
        workers = self._loader.num_workers if self._loader is not None else 0
        if not workers:
            return 0, 0
        return workers * (self._loader.prefetch_factor or _PREFETCHED) + 2, self.largest_bytes

    def ratios(self) -> tuple[float, float, int]:
        """Take up to 32 batches of a new epoch from the loader; after 5 s, take no further one. Return (their
        median size, their largest size, their number), the sizes as ratios to the largest traced batch;
        (1, 1, 0) without a loader, batches or tensors in the traced ones. An error of the script's data set
        ends the batches and is kept as ``problem``."""
        self._is_closed = True
        sizes: list[int] = []
        begin_s = time.monotonic()
        try:
            batches = self._loader._get_iterator() if self._loader is not None else iter(())
            while len(sizes) < _MOST_BATCHES and time.monotonic() < begin_s + _LIMIT_S:
                sizes.append(bytes_of(next(batches)))
        except StopIteration:
            pass  # the epoch has fewer batches
        except Exception as error:  # noqa: BLE001  the script's data set is foreign code: its first batches count
            self.problem = f"{type(error).__name__} in batch {len(sizes) + 1} of an epoch"
        if not sizes or not self.traced_bytes:
            return 1.0, 1.0, 0
        self.largest_bytes = max(self.traced_bytes, *sizes)
        return statistics.median(sizes) / self.traced_bytes, max(sizes) / self.traced_bytes, len(sizes)


def bytes_of(batch: Any) -> int:
    """Return the bytes of all tensors of a batch."""
    return sum(t.numel() * t.element_size() for t in batch_tensors(batch))
