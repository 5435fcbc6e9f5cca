"""A replay of PyTorch's CUDA caching allocator: what it reserves for a sequence of allocations and frees.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (read at pytorch@001074d) and of the notes in the
documentation ("Memory management" and "Optimizing memory usage with PYTORCH_CUDA_ALLOC_CONF"). Small requests
(up to 1 MiB) and large ones have separate free lists, one per stream. A request takes the smallest free block
that is large enough and splits it. If there is none, a segment is requested from the driver. A freed block
merges with its free neighbours in the segment. Not modelled are private pools of CUDA graphs, blocks that
another stream still uses when they are freed (``Tensor.record_stream``), and the other options of
PYTORCH_CUDA_ALLOC_CONF.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Hashable, Iterable

import numpy

from memfit.cost.caching_allocator_rules import (
    ADDRESSES_BYTES,
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
    """Settings of the simulated allocator. ``expandable_segments``: the option of that name in
    PYTORCH_CUDA_ALLOC_CONF. ``cap_bytes``: the most bytes that the driver gives to this process; None:
    unlimited.
    """

    expandable_segments: bool = False
    cap_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What the allocator held during a replay: the peaks of the allocated and of the reserved bytes, and both
    at the end of the replay.

    ``retries``: how often all cached memory was released to make room, which synchronises the device.
    ``fits``: False if an allocation failed even after that. The replay ended there, and all numbers are those
    up to then.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    retries: int
    fits: bool


class CachingAllocator:
    """A simulated CUDA caching allocator of one device.

    Call ``allocate`` and ``free``, then read ``allocated_bytes`` and ``reserved_bytes`` (at this moment),
    ``allocated_peak_bytes`` and ``reserved_peak_bytes`` (the highest so far) and ``retries`` (how often all
    cached memory was released to make room). ``settings``: None means `Settings` with its defaults.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.allocated_bytes = self.reserved_bytes = 0
        self.allocated_peak_bytes = self.reserved_peak_bytes = 0
        self.retries = 0
        self._pools: dict[tuple[str, bool], Pool] = {}
        self._live: dict[Hashable, SegmentBlock] = {}
        self._next_address = 0

    def allocate(self, key: Hashable, size_bytes: int, stream: str = "") -> bool:
        """Allocate a block of at least ``size_bytes``, rounded up to a multiple of 512 bytes, on ``stream``
        and return True. ``stream``: "" is the compute stream. ``key``: any value that is not in use; `free`
        takes it to find the block.

        Returns False, with nothing allocated, if the memory is not enough even after all cached memory was
        released.
        """
        size = rounded_bytes(size_bytes)
        small = size <= SMALL_BYTES
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(small=small)
        block = self._take_cached(pool, size) or self._take_new(pool, size)
        if block is None:
            return False
        remainder_bytes = block.size - size
        splits_small = pool.small or self.settings.expandable_segments
        is_split = remainder_bytes >= SMALLEST_BYTES if splits_small else remainder_bytes > SMALL_BYTES
        if is_split:
            remainder = block.insert_after(block.address + size, remainder_bytes)
            block.size = size
            pool.add(remainder)
        block.idle = False
        self._live[key] = block
        self.allocated_bytes += block.size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)
        return True

    def free(self, key: Hashable) -> None:
        """Free the block of ``key``. Raises KeyError if ``key`` is not allocated."""
        block = self._live.pop(key)
        self.allocated_bytes -= block.size
        if (before := block.before) is not None and before.idle:
            merge(block, before)
        if (after := block.after) is not None and after.idle:
            merge(block, after)
        block.pool.add(block)

    # -- where a block comes from ---------------------------------------------------------------------

    def _take_cached(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Remove a free block of at least ``size`` bytes from the pool and return it; None if there is none.

        It is the smallest block that is large enough. With expandable segments, the search goes on to the
        next larger block as long as that one, together with the unmapped addresses after it, is smaller than
        the current one together with those after it.
        """
        free = pool.free
        index = bisect.bisect_left(free, (size,))
        if index == len(free):
            return None
        if self.settings.expandable_segments:  # a block that can grow counts with all it can grow to
            while index + 1 < len(free) and room_bytes(free[index + 1][2]) < room_bytes(free[index][2]):
                index += 1
        return free.pop(index)[2]

    def _take_new(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Return a block of at least ``size`` bytes in a new segment or, with expandable segments, on newly
        mapped pages.

        If the driver has not enough memory, all cached memory is released, ``retries`` is increased by 1, and
        the request is repeated. None if it fails again.
        """
        block = self._take_segment(pool, size)
        if block is None:
            self._release_cached()
            self.retries += 1
            block = self._take_segment(pool, size)
        return block

    def _take_segment(self, pool: Pool, size: int) -> SegmentBlock | None:
        if self.settings.expandable_segments:
            return self._take_grown(pool, size)
        segment_size = segment_bytes(size)
        if not self._reserve(segment_size):
            return None
        block = SegmentBlock(pool, self._next_address, segment_size)
        self._next_address += segment_size
        return block

    def _reserve(self, size: int) -> bool:
        cap = self.settings.cap_bytes
        if cap is not None and self.reserved_bytes + size > cap:
            return False
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        return True

    # -- expandable segments ------------------------------------------------------------------------

    def _take_grown(self, pool: Pool, size: int) -> SegmentBlock | None:
        """Take a block of at least ``size`` bytes from the pool of expandable segments, mapping the pages
        that it lacks, and return it. None if the driver has not enough memory; pages mapped until then stay
        mapped.

        The block starts at the lowest address where idle blocks side by side, at least one of them unmapped,
        have ``size`` bytes together. If there is no such place, it lies on a new address range.
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
        mapped_bytes = -(-size // pool.page_bytes) * pool.page_bytes
        if not self._reserve(mapped_bytes):
            return False
        pool.remove(block)
        if mapped_bytes < block.size:
            remainder = block.insert_after(block.address + mapped_bytes, block.size - mapped_bytes)
            remainder.mapped = False
            pool.add(remainder)
            block.size = mapped_bytes
        block.mapped = True
        merge(block, block.before)
        merge(block, block.after)
        pool.add(block)
        return True

    def _unmap(self, block: SegmentBlock) -> None:
        """Return to the driver those pages that lie entirely in the free block ``block``; do nothing if there
        is none. What is left of the block at either end stays mapped and free.
        """
        page_bytes, pool = block.pool.page_bytes, block.pool
        start = -(-block.address // page_bytes) * page_bytes
        end = (block.address + block.size) // page_bytes * page_bytes
        if start >= end:
            return
        pool.remove(block)
        middle = block
        if start > block.address:
            middle = block.insert_after(start, block.address + block.size - start)
            block.size = start - block.address
            pool.add(block)
        if middle.address + middle.size > end:
            pool.add(middle.insert_after(end, middle.address + middle.size - end))
            middle.size = end - start
        middle.mapped = False
        merge(middle, middle.before)
        merge(middle, middle.after)
        pool.add(middle)
        self.reserved_bytes -= end - start

    # -- giving memory back -------------------------------------------------------------------------

    def _release_cached(self) -> None:
        """Release to the driver every segment or, with expandable segments, every page that has no block in
        use.
        """
        for block in [block for pool in self._pools.values() for _, _, block in pool.free]:
            if self.settings.expandable_segments:
                self._unmap(block)
            elif is_whole(block):
                block.pool.remove(block)
                self.reserved_bytes -= block.size


def run(events: Iterable[Event], settings: Settings | None = None) -> ReplayResult:
    """Replay the events in order with a new allocator, up to and including the first allocation that fails,
    and return what the allocator held.

    An event is (key, size in bytes, stream) for an allocation, or (key, -1, "") to free it. ``settings``:
    None means `Settings` with its defaults: segments that do not expand, unlimited memory. Raises KeyError if
    an event frees a key that is not allocated.
    """
    allocator = CachingAllocator(settings)
    fits = True
    for key, size_bytes, stream in events:
        if size_bytes < 0:
            allocator.free(key)
        elif not allocator.allocate(key, size_bytes, stream):
            fits = False
            break
    return ReplayResult(
        allocated_peak_bytes=allocator.allocated_peak_bytes,
        reserved_peak_bytes=allocator.reserved_peak_bytes,
        allocated_bytes=allocator.allocated_bytes,
        reserved_bytes=allocator.reserved_bytes,
        retries=allocator.retries,
        fits=fits,
    )


def replay(allocations: Iterable[Allocation], settings: Settings | None = None) -> ReplayResult:
    """Replay the allocations of a trace and their frees in the order of their clocks, at the same clock
    allocations first, with a new allocator, up to and including the first allocation that fails. Return what
    the allocator held.

    ``settings``: None means `Settings` with its defaults: segments that do not expand, unlimited memory.
    """
    return run(events_of(allocations), settings)


def _pieces(allocation: Allocation) -> Iterable[Allocation]:
    if allocation.pieces == 1:
        return (allocation,)
    size_bytes = allocation.size_bytes // allocation.pieces
    return [dataclasses.replace(allocation, size_bytes=size_bytes, pieces=1)] * allocation.pieces


def events_of(allocations: Iterable[Allocation]) -> list[Event]:
    """Return each allocation as an event, (key, size in bytes, stream), and its free as another, (key, -1,
    ""), sorted by their clocks ``start`` and ``end``. At the same clock, allocations come before frees.

    Allocations of 0 bytes never reach the allocator and are left out. An allocation that stands for several
    equal ones (``pieces``) becomes as many events, each with an equal share of its bytes. ``key``: number of
    the allocation or piece among those that are not left out, from 0, in the order of ``allocations``. An
    allocation whose ``end`` is None is never freed.
    """
    nonempty = [piece for a in allocations if a.size_bytes for piece in _pieces(a)]
    free_indices = [i for i, a in enumerate(nonempty) if a.end is not None]
    clocks = numpy.array(
        [a.start for a in nonempty] + [nonempty[i].end for i in free_indices], dtype=numpy.int64
    )
    order: list[int] = numpy.argsort(clocks, kind="stable").tolist()
    count = len(nonempty)
    return [
        (i, nonempty[i].size_bytes, nonempty[i].stream) if i < count else (free_indices[i - count], -1, "")
        for i in order
    ]
