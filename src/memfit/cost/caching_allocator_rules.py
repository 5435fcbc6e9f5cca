"""Data structures of the CUDA caching allocator: segments, blocks, pools, and the rules for their sizes.

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
LARGE_SEGMENT_BYTES: Final = 20 * MIB  # for requests below 10 MiB
PACKED_BYTES: Final = 10 * MIB
ROUND_LARGE_BYTES: Final = 2 * MIB
ADDRESSES_BYTES: Final = LARGE_SEGMENT_BYTES << 24  # address range of an expandable segment, never used up


def rounded_bytes(size_bytes: int) -> int:
    """Return ``size_bytes`` rounded up as the allocator does it: to a multiple of 512 bytes, at least 512."""
    return max(SMALLEST_BYTES, -(-size_bytes // SMALLEST_BYTES) * SMALLEST_BYTES)


def segment_bytes(size_bytes: int) -> int:
    """Return the bytes of the new segment that the allocator requests from the driver for a request of
    ``size_bytes``, already rounded by `rounded_bytes`: 2 MiB for at most 1 MiB, 20 MiB for more but less than
    10 MiB, else the size rounded up to a multiple of 2 MiB. Expandable segments do not use this.
    """
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < PACKED_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class SegmentBlock:
    """A block: a range of device addresses in a segment. The blocks of a segment lie side by side and fill
    it.

    ``idle``: True if it is not in use. ``mapped``: True if memory backs its addresses, as is always so
    without expandable segments. ``before`` and ``after``: the neighbouring blocks in the segment, None at its
    ends.
    """

    __slots__ = ("address", "after", "before", "idle", "mapped", "pool", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.before: SegmentBlock | None = None
        self.after: SegmentBlock | None = None
        self.idle = self.mapped = True

    def insert_after(self, address: int, size: int) -> SegmentBlock:
        """Insert a new block of ``size`` bytes at ``address`` after this one in the same segment and return
        it. The size of this one is not changed, and the new one is not yet added to the pool's lists.
        """
        block = SegmentBlock(self.pool, address, size)
        block.before, block.after, self.after = self, self.after, block
        if block.after is not None:
            block.after.before = block
        return block


class Pool:
    """The idle blocks of one stream and one size class, small (requests of at most 1 MiB) or large.

    ``free``: the mapped ones as (size, address, block). ``unmapped``: the others as (address, block). Both
    are sorted. ``page_bytes``: expandable segments map memory in pages of this size, 2 MiB if ``small``, else
    20 MiB.
    """

    __slots__ = ("free", "page_bytes", "small", "unmapped")

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.page_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.free: list[tuple[int, int, SegmentBlock]] = []
        self.unmapped: list[tuple[int, SegmentBlock]] = []

    def add(self, block: SegmentBlock) -> None:
        block.idle = True
        if block.mapped:
            bisect.insort(self.free, (block.size, block.address, block))
        else:
            bisect.insort(self.unmapped, (block.address, block))

    def remove(self, block: SegmentBlock) -> None:
        if block.mapped:
            del self.free[bisect.bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect.bisect_left(self.unmapped, (block.address,))]


def merge(block: SegmentBlock, neighbour: SegmentBlock | None) -> None:
    """Extend ``block`` over the ``neighbour`` before or after it and remove the neighbour from its pool, if
    the neighbour is idle and both are mapped or both unmapped. Do nothing otherwise, or if the neighbour is
    None. ``block`` itself must not be in the lists of its pool, which are sorted by size and address.
    """
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
    """Return whether the block is a whole segment: it has no neighbours."""
    return block.before is None and block.after is None


def room_bytes(block: SegmentBlock) -> int:
    """Return the size to which the block can grow: its own plus that of the block directly after it, if that
    one is unmapped.
    """
    next_block = block.after
    return block.size + (next_block.size if next_block is not None and not next_block.mapped else 0)


def growable(pool: Pool) -> Iterator[SegmentBlock]:
    """Yield, by address, the blocks of the pool at which mapping more pages makes room: for each unmapped
    block the block directly before it in the segment if that one is idle, else the unmapped block itself.
    """
    for _, block in pool.unmapped:
        previous = block.before
        yield previous if previous is not None and previous.idle else block


def run_holds(block: SegmentBlock | None, size: int) -> bool:
    """Return whether ``block`` and the idle blocks directly after it, mapped or not, up to the first one in
    use, have at least ``size`` bytes together. False for None and for a block in use, unless ``size`` is 0.
    """
    total_bytes = 0
    while total_bytes < size and block is not None and block.idle:
        total_bytes += block.size
        block = block.after
    return total_bytes >= size
