"""A replay of PyTorch's CUDA caching allocator: what it reserves for a sequence of allocations and frees.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (read at pytorch@001074d) and of the notes in the
documentation ("Memory management" and "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF"). Small requests
(up to 1 MiB) and large ones have separate free lists, one per stream. A request takes the smallest free block
that is large enough and splits it. If there is none, a segment is requested from the driver. A freed block
merges with its free neighbours in the segment. Private pools of CUDA graphs are not modelled.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Hashable, Iterable, Iterator

import numpy

from memfit.cost.caching_allocator_rules import (
    ADDRESSES_BYTES,
    LARGE_SEGMENT_BYTES,
    SMALL_BYTES,
    SMALLEST_BYTES,
    Pool,
    SegmentBlock,
    growable,
    is_whole,
    merge,
    room_bytes,
    rounded_bytes,
    run_holds,
    segment_bytes,
)
from memfit.types.trace import Allocation

Event = tuple[Hashable, int, str]
"""(key, size in bytes, stream) is an allocation; (key, -1, "") frees it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of PYTORCH_CUDA_ALLOC_CONF.

    ``cap_bytes`` is the memory that the driver can give (or the fraction set); None: unlimited. Above
    ``garbage_collection_threshold`` of it, garbage is collected. As in PyTorch, 0 disables garbage
    collection.
    """

    max_split_size_bytes: int | None = None
    roundup_power2_divisions: int = 0  # a power of two, for all sizes
    expandable_segments: bool = False
    garbage_collection_threshold: float = 0.0
    cap_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Result of a replay.

    With ``fits`` False, an allocation failed even after all cached memory was released; the peaks are those
    up to then.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    allocated_bytes: int  # when the sequence ended
    reserved_bytes: int
    retries: int  # how often cached segments were released to make room; each time synchronises the device
    fits: bool


class CachingAllocator:
    """Call ``allocate`` and ``free``, then read ``allocated_bytes``, ``reserved_bytes`` and their peaks."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.allocated_bytes = self.reserved_bytes = 0
        self.allocated_peak_bytes = self.reserved_peak_bytes = 0
        self.retries = 0
        self._unsplit_bytes = self.settings.max_split_size_bytes
        self._pools: dict[tuple[str, bool], Pool] = {}
        self._searches = ([0], [0])  # of large requests, of small ones
        self._live: dict[Hashable, SegmentBlock] = {}
        self._held: dict[Hashable, SegmentBlock] = {}
        self._next_address = 0

    def allocate(self, key: Hashable, size_bytes: int, stream: str = "") -> bool:
        """Allocate ``size_bytes`` under the name ``key``, which `free` takes.

        Returns False if out of memory, after all cached memory was released.
        """
        size = rounded_bytes(size_bytes, self.settings.roundup_power2_divisions)
        small = size <= SMALL_BYTES
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(small=small, searches=self._searches[small])
        block = self._cached(pool, size) or self._fresh(pool, size)
        if block is None:
            return False
        rest = block.size - size
        if self._splits(pool, size, rest):
            remainder = block.insert_after(block.address + size, rest)
            block.size = size
            pool.add(remainder)
        block.idle = False
        self._live[key] = block
        self.allocated_bytes += block.size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return True

    def free(self, key: Hashable) -> None:
        self.request_free(key)
        self.complete_free(key)

    def request_free(self, key: Hashable) -> None:
        """Mark the block as no longer allocated, but not yet reusable.

        The tensor is gone, but another stream recorded on it may still use the block.
        """
        block = self._held[key] = self._live.pop(key)
        self.allocated_bytes -= block.size

    def complete_free(self, key: Hashable) -> None:
        block = self._held.pop(key)
        for neighbour in (block.before, block.after):
            merge(block, neighbour)
        block.pool.add(block)

    # -- where a block comes from ---------------------------------------------------------------------

    def _cached(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Return the best-fitting free block.

        With a `max_split_size`, oversize blocks only serve requests of similar size.
        """
        pool.searches[0] += 1
        free = pool.free
        at = bisect.bisect_left(free, (size,))
        if at == len(free):
            return None
        if self.settings.expandable_segments:  # a block that can grow counts with all it can grow to
            while at + 1 < len(free) and room_bytes(free[at + 1][2]) < room_bytes(free[at][2]):
                at += 1
        block = free[at][2]
        if self._unsplit_bytes is not None:
            oversize = size >= self._unsplit_bytes
            if not oversize and block.size >= self._unsplit_bytes:
                return None
            if oversize and block.size >= size + LARGE_SEGMENT_BYTES:
                return None
        del free[at]
        return block

    def _fresh(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Return a block of a new segment.

        If the driver has no memory, cached memory is released step by step.
        """
        self._collect_garbage()
        block = self._segment(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._segment(pool, size)
        if block is None:
            self._release_cached()
            self.retries += 1
            block = self._segment(pool, size)
        return block

    def _segment(self, pool: Pool, size: int) -> SegmentBlock | None:
        if self.settings.expandable_segments:
            return self._grown(pool, size)
        whole = segment_bytes(size)
        if not self._reserve(whole):
            return None
        block = SegmentBlock(pool, self._next_address, whole)
        self._next_address += whole
        return block

    def _reserve(self, size: int) -> bool:
        cap = self.settings.cap_bytes
        if cap is not None and self.reserved_bytes + size > cap:
            return False
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        return True

    def _splits(self, pool: Pool, size: int, rest: int) -> bool:
        if pool.small or self.settings.expandable_segments:
            return rest >= SMALLEST_BYTES
        return rest > SMALL_BYTES and (self._unsplit_bytes is None or size < self._unsplit_bytes)

    # -- expandable segments ------------------------------------------------------------------------

    def _grown(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Return a block on the lowest run of idle addresses that is long enough, with memory mapped in
        pages.
        """
        block = next((b for b in growable(pool) if run_holds(b, size)), None)
        if block is None:
            block = SegmentBlock(pool, self._next_address, ADDRESSES_BYTES)
            self._next_address += ADDRESSES_BYTES
            block.mapped = False
            pool.add(block)
        if not block.mapped and not self._map(block, min(size, block.size)):
            return None
        while block.size < size:
            gap = block.after
            assert gap is not None and not gap.mapped
            if not self._map(gap, min(size - block.size, gap.size)):
                return None
            block = gap  # it merged with the mapped block before it
        pool.remove(block)
        return block

    def _map(self, block: SegmentBlock, size: int) -> bool:
        pool = block.pool
        mapped = -(-size // pool.page_bytes) * pool.page_bytes
        if not self._reserve(mapped):
            return False
        pool.remove(block)
        if mapped < block.size:
            rest = block.insert_after(block.address + mapped, block.size - mapped)
            rest.mapped = False
            pool.add(rest)
            block.size = mapped
        block.mapped = True
        merge(block, block.before)
        merge(block, block.after)
        pool.add(block)
        return True

    def _unmap(self, block: SegmentBlock) -> None:
        """Release the pages that lie entirely in a free block."""
        page, pool = block.pool.page_bytes, block.pool
        first = -(-block.address // page) * page
        last = (block.address + block.size) // page * page
        if first >= last:
            return
        pool.remove(block)
        middle = block
        if first > block.address:
            middle = block.insert_after(first, block.address + block.size - first)
            block.size = first - block.address
            pool.add(block)
        if middle.address + middle.size > last:
            pool.add(middle.insert_after(last, middle.address + middle.size - last))
            middle.size = last - first
        middle.mapped = False
        merge(middle, middle.before)
        merge(middle, middle.after)
        pool.add(middle)
        self.reserved_bytes -= last - first

    # -- giving memory back -------------------------------------------------------------------------

    def _collect_garbage(self) -> None:
        """Release unsplit large blocks that were unused for longer than the average, oldest first, until the
        reserved bytes are below the threshold.
        """
        threshold, cap = self.settings.garbage_collection_threshold, self.settings.cap_bytes
        if not threshold or cap is None or self.settings.expandable_segments:
            return
        excess = self.reserved_bytes - int(threshold * cap)
        while excess > 0:
            ages = {b: b.pool.age(b) for b in self._idle(small=False) if is_whole(b)}
            old = [b for b, age in ages.items() if age * len(ages) >= sum(ages.values())]
            if not old:
                return
            for block in old:
                excess -= block.size
                self._give_back(block)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Release oversize blocks when a `max_split_size` is set.

        The smallest one that is large enough is released, or else the largest ones until their total is
        enough. Does nothing with expandable segments.
        """
        if self._unsplit_bytes is None or self.settings.expandable_segments:
            return False
        wanted = max(size, self._unsplit_bytes)
        at = bisect.bisect_left(pool.free, (wanted,))
        if at < len(pool.free):
            self._give_back(pool.free[at][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= self._unsplit_bytes:
            released += pool.free[-1][0]
            self._give_back(pool.free[-1][2])
        return released >= wanted

    def _release_cached(self) -> None:
        """Wait for other streams, then release every segment and page without a live block."""
        for key in list(self._held):
            self.complete_free(key)
        for small in (False, True):
            for block in list(self._idle(small=small)):
                if self.settings.expandable_segments:
                    self._unmap(block)
                elif is_whole(block):
                    self._give_back(block)

    def _idle(self, *, small: bool) -> Iterator[SegmentBlock]:
        return (b for p in self._pools.values() if p.small is small for _, _, b in p.free)

    def _give_back(self, block: SegmentBlock) -> None:
        assert is_whole(block), "oversize blocks are never split, cached ones were checked"
        block.pool.remove(block)
        self.reserved_bytes -= block.size


def run(events: Iterable[Event], settings: Settings | None = None) -> Replayed:
    """Replay the events in order; stop at the first allocation that fails."""
    heap = CachingAllocator(settings)
    fits = all(_played(heap, *event) for event in events)
    return Replayed(
        allocated_peak_bytes=heap.allocated_peak_bytes,
        reserved_peak_bytes=heap.reserved_peak_bytes,
        allocated_bytes=heap.allocated_bytes,
        reserved_bytes=heap.reserved_bytes,
        retries=heap.retries,
        fits=fits,
    )


def _played(heap: CachingAllocator, key: Hashable, size_bytes: int, stream: str) -> bool:
    if size_bytes < 0:
        heap.free(key)
        return True
    return heap.allocate(key, size_bytes, stream)


def replay(allocations: Iterable[Allocation], settings: Settings | None = None) -> Replayed:
    """Replay the allocations of a trace in the order of their clock, as the device's allocator would serve
    them.
    """
    return run(events_of(allocations), settings)


def events_of(allocations: Iterable[Allocation]) -> list[Event]:
    """Return the events by clock. Empty tensors never reach the allocator, so they are left out."""
    lives = [a for a in allocations if a.size_bytes]
    ended = [i for i, a in enumerate(lives) if a.end is not None]
    clock = numpy.array([a.start for a in lives] + [lives[i].end for i in ended], dtype=numpy.int64)
    order: list[int] = numpy.argsort(clock, kind="stable").tolist()
    count = len(lives)
    return [
        (i, lives[i].size_bytes, lives[i].stream) if i < count else (ended[i - count], -1, "") for i in order
    ]
