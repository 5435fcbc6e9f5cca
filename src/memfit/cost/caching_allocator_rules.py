"""What the CUDA caching allocator's pools are made of: blocks of segments, and the rules of their sizes.

From c10/cuda/CUDACachingAllocator.cpp (read at pytorch@001074d).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Final

from memfit.types.units import MIB

SMALLEST_BYTES: Final = 512
SMALL_BYTES: Final = 1 * MIB  # the largest request of the small pool
SMALL_SEGMENT_BYTES: Final = 2 * MIB
LARGE_SEGMENT_BYTES: Final = 20 * MIB  # for requests below 10 MiB; also the slack of oversize blocks
PACKED_BYTES: Final = 10 * MIB
ROUND_LARGE_BYTES: Final = 2 * MIB
ADDRESSES_BYTES: Final = LARGE_SEGMENT_BYTES << 24  # of an expandable segment: never used up


def rounded_bytes(size_bytes: int, divisions: int = 0) -> int:
    """Multiples of 512; with ``divisions``, the next of so many equal parts between powers of two."""
    if divisions > 1 and size_bytes > SMALLEST_BYTES * divisions:
        step = (1 << (size_bytes.bit_length() - 1)) // divisions
        return -(-size_bytes // step) * step
    return max(SMALLEST_BYTES, -(-size_bytes // SMALLEST_BYTES) * SMALLEST_BYTES)


def segment_bytes(size_bytes: int) -> int:
    """What is asked of the driver for a rounded request that no cached block holds."""
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < PACKED_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class SegmentBlock:
    """A piece of a segment. ``idle``: free to be used; ``mapped``: has memory behind its addresses."""

    __slots__ = ("address", "after", "before", "born", "idle", "mapped", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.before: SegmentBlock | None = None
        self.after: SegmentBlock | None = None
        self.idle, self.mapped, self.born = True, True, 0

    def insert_after(self, address: int, size: int) -> SegmentBlock:
        """A new block behind this one in the same segment."""
        new = SegmentBlock(self.pool, address, size)
        new.before, new.after, self.after = self, self.after, new
        if new.after is not None:
            new.after.before = new
        return new


class Pool:
    """Idle blocks of one stream and size class: mapped ones by (size, address), unmapped by address.
    ``searches`` counts requests of the size class, for all streams together: PyTorch has one pool for them,
    whose blocks it tells apart by stream."""

    __slots__ = ("free", "page_bytes", "searches", "small", "unmapped")

    def __init__(self, *, small: bool, searches: list[int]) -> None:
        self.small, self.searches = small, searches
        self.page_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.free: list[tuple[int, int, SegmentBlock]] = []
        self.unmapped: list[tuple[int, SegmentBlock]] = []

    def add(self, block: SegmentBlock) -> None:
        block.idle = True
        if block.mapped:
            block.born = self.searches[0]
            bisect.insort(self.free, (block.size, block.address, block))
        else:
            bisect.insort(self.unmapped, (block.address, block))

    def remove(self, block: SegmentBlock) -> None:
        if block.mapped:
            del self.free[bisect.bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect.bisect_left(self.unmapped, (block.address,))]

    def age(self, block: SegmentBlock) -> int:
        return self.searches[0] - block.born


def merge(block: SegmentBlock, neighbour: SegmentBlock | None) -> None:
    """Take in an idle neighbour of the same kind (with memory behind it, or without)."""
    if neighbour is None or not neighbour.idle or neighbour.mapped != block.mapped:
        return
    block.pool.remove(neighbour)
    if neighbour is block.before:
        block.address, block.before = neighbour.address, neighbour.before
        if block.before is not None:
            block.before.after = block
    else:
        block.after = neighbour.after
        if block.after is not None:
            block.after.before = block
    block.size += neighbour.size


def is_whole(block: SegmentBlock) -> bool:
    """The block is a segment by itself."""
    return block.before is None and block.after is None


def room_bytes(block: SegmentBlock) -> int:
    beyond = block.after
    return block.size + (beyond.size if beyond is not None and not beyond.mapped else 0)


def growable(pool: Pool) -> Iterator[SegmentBlock]:
    """Unmapped blocks by address, each with the idle block right before it where there is one."""
    for _, block in pool.unmapped:
        before = block.before
        yield before if before is not None and before.idle else block


def run_holds(block: SegmentBlock | None, size: int) -> bool:
    found = 0
    while found < size and block is not None and block.idle:
        found += block.size
        block = block.after
    return found >= size
