"""The caching allocator's documented rules, in worked examples and in properties that hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cost.allocator import CachingAllocator, Event, Settings, events_of, replay, run
from memfit.cost.caching_allocator_rules import rounded_bytes, segment_bytes
from memfit.types.trace import Allocation, Category, Phase

KIB, MIB = 2**10, 2**20
EXPANDABLE = Settings(expandable_segments=True)


def steps(*events: tuple[object, ...]) -> list[Event]:
    """``("a", 5)`` allocates 5 bytes on the compute stream, ``("a",)`` frees them."""
    made: list[Event] = []
    for key, *rest in events:
        size, stream = (*rest, "")[:2] if rest else (-1, "")
        made.append((key, int(size), str(stream)))  # type: ignore[call-overload]
    return made


# -- sizes, from the documentation's own examples ---------------------------------------------------


@pytest.mark.parametrize(("asked", "rounded"), [(1, 512), (512, 512), (513, 1024), (1200, 1536)])
def test_requested_sizes_are_rounded_as_documented(asked: int, rounded: int) -> None:
    assert rounded_bytes(asked) == rounded


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_segment_size_follows_from_the_requested_size(asked: int, segment: int) -> None:
    assert segment_bytes(asked) == segment
    assert run(steps(("a", asked))).reserved_peak_bytes == segment


# -- worked examples --------------------------------------------------------------------------------


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    four = [(i, 512 * KIB) for i in range(4)]
    assert run(steps(*four)).reserved_peak_bytes == 2 * MIB
    assert run(steps(*four, (4, 512))).reserved_peak_bytes == 4 * MIB


def test_small_and_large_requests_never_share_a_segment() -> None:
    assert run(steps(("large", 2 * MIB), ("small", 512))).reserved_peak_bytes == 22 * MIB


def test_remainder_of_a_large_block_is_split_off_only_if_larger_than_one_mib() -> None:
    """A 20 MiB segment holds 9 + 9 MiB; 2 MiB are left, which a third request of 2 MiB fills."""
    assert run(steps(("a", 9 * MIB), ("b", 9 * MIB), ("c", 2 * MIB))).reserved_peak_bytes == 20 * MIB
    # 19 + 1 MiB: the last MiB is not split off the block, so it counts as allocated.
    found = run(steps(("x", 20 * MIB), ("x",), ("a", 19 * MIB)))
    assert (found.allocated_bytes, found.reserved_bytes) == (20 * MIB, 20 * MIB)


def test_best_fit_takes_the_smallest_block_that_holds_it() -> None:
    """With free blocks of 60 and 40 MiB, a request of 30 MiB takes the 40, so the 60 stays free."""
    found = run(steps(("a", 60 * MIB), ("b", 40 * MIB), ("a",), ("b",), ("c", 30 * MIB), ("d", 60 * MIB)))
    assert found.reserved_peak_bytes == 100 * MIB


def test_adjacent_blocks_merge_when_both_are_free() -> None:
    """Three thirds of one segment, freed out of order, are one block again."""
    thirds = [(i, 20 * MIB) for i in range(3)]
    first = [("whole", 60 * MIB), ("whole",), *thirds]
    assert run(steps(*first, (0,), (2,), ("again", 40 * MIB))).reserved_peak_bytes == 100 * MIB
    assert run(steps(*first, (0,), (2,), (1,), ("again", 60 * MIB))).reserved_peak_bytes == 60 * MIB


def test_segments_never_merge_but_expandable_ones_grow() -> None:
    """Two free segments of 40 MiB do not hold 80 MiB; an expandable segment does."""
    events = steps(("a", 40 * MIB), ("b", 40 * MIB), ("a",), ("b",), ("c", 80 * MIB))
    assert run(events).reserved_peak_bytes == 160 * MIB
    assert run(events, EXPANDABLE).reserved_peak_bytes == 80 * MIB


def test_expandable_segments_map_whole_pages() -> None:
    """Pages are 20 MiB for large requests and 2 MiB for small ones; free space at the end is used first."""
    found = run(steps(("a", 21 * MIB), ("b", 512), ("c", 18 * MIB)), EXPANDABLE)
    assert found.reserved_peak_bytes == (40 + 2) * MIB
    # c does not fit in the rest of a's second page: one more page is mapped, not two.
    found = run(steps(("a", 21 * MIB), ("c", 30 * MIB)), EXPANDABLE)
    assert found.reserved_peak_bytes == 60 * MIB


def test_free_blocks_are_not_shared_between_streams() -> None:
    events = steps(("a", 40 * MIB, "compute"), ("a",), ("b", 40 * MIB, "all-gather"))
    assert run(events).reserved_peak_bytes == 80 * MIB
    assert run(events, EXPANDABLE).reserved_peak_bytes == 80 * MIB


def test_cached_segments_are_released_before_a_request_fails_at_the_cap() -> None:
    """40 MiB are cached but too small for 60; once released, 60 fits under 100 MiB beside the live 40."""
    events = steps(("a", 40 * MIB), ("b", 40 * MIB), ("a",), ("c", 60 * MIB))
    found = run(events, Settings(cap_bytes=100 * MIB))
    assert (found.fits, found.retries, found.reserved_peak_bytes) == (True, 1, 100 * MIB)
    assert not run(events, Settings(cap_bytes=98 * MIB)).fits


def test_a_split_segment_cannot_be_released_but_free_expandable_pages_can() -> None:
    """60 MiB are split into a live 20 and a free 40: only pages of expandable segments can be released."""
    events = steps(("w", 60 * MIB), ("w",), ("live", 20 * MIB), ("other", 50 * MIB, "side"))
    cap = Settings(cap_bytes=100 * MIB)
    assert not run(events, cap).fits
    grown = run(events, Settings(cap_bytes=100 * MIB, expandable_segments=True))
    assert (grown.fits, grown.reserved_bytes, grown.retries) == (True, 80 * MIB, 1)


def test_unmapped_pages_are_mapped_again_for_a_later_request() -> None:
    """Live blocks keep both ends; the hole between them is unmapped, then mapped again for a request."""
    events = steps(
        ("a", 20 * MIB),
        ("hole", 60 * MIB),
        ("z", 20 * MIB),
        ("hole",),
        ("side", 60 * MIB, "side"),
        ("side",),
        ("new", 60 * MIB),
    )
    found = run(events, Settings(cap_bytes=100 * MIB, expandable_segments=True))
    assert (found.fits, found.reserved_bytes, found.retries) == (True, 100 * MIB, 2)


# -- traces -----------------------------------------------------------------------------------------


def life(start: int, end: int | None, size: int, stream: str = "") -> Allocation:
    return Allocation(
        start=start,
        end=end,
        size_bytes=size,
        category=Category.TEMPORARY,
        phase=Phase.FORWARD,
        step=0,
        module="",
        op="",
        stream=stream,
    )


def test_a_trace_is_replayed_in_clock_order() -> None:
    lives = [life(5, None, 40 * MIB), life(0, 3, 40 * MIB), life(1, 2, 0)]
    assert [(size, key) for key, size, _ in events_of(lives)] == [(40 * MIB, 1), (-1, 1), (40 * MIB, 0)]
    found = replay(lives)
    assert (found.reserved_peak_bytes, found.allocated_bytes) == (40 * MIB, 40 * MIB)
    assert replay([life(0, 3, MIB * 40), life(5, None, MIB * 40, "side")]).reserved_bytes == 80 * MIB


# -- properties -------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 2 * MIB), st.integers(MIB, 64 * MIB))


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Allocations on two streams, with frees of what is alive in between."""
    events: list[Event] = []
    alive: list[int] = []
    for index in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            events.append((alive.pop(draw(st.integers(0, len(alive) - 1))), -1, ""))
        else:
            events.append((index, draw(sizes), draw(st.sampled_from(["", "side"]))))
            alive.append(index)
    return events


any_settings = st.builds(Settings, expandable_segments=st.booleans())


def rest(events: list[Event]) -> list[Event]:
    """Frees of everything that is still allocated."""
    freed = {key for key, size, _ in events if size < 0}
    return [(key, -1, "") for key, size, _ in events if size >= 0 and key not in freed]


@given(histories(), any_settings)
def test_reserved_covers_allocated_and_never_falls_without_a_cap(events: list[Event], how: Settings) -> None:
    heap = CachingAllocator(how)
    live: dict[object, int] = {}
    for key, size, stream in events:
        before = heap.reserved_bytes
        if size < 0:
            heap.free(key)
            del live[key]
        else:
            assert heap.allocate(key, size, stream)
            live[key] = size
        assert heap.reserved_bytes >= before
        assert heap.reserved_bytes >= heap.allocated_bytes >= sum(live.values())
        assert heap.reserved_bytes % (2 * MIB) == 0


@given(histories(), any_settings)
def test_when_everything_is_freed_all_reserved_memory_can_be_released(
    events: list[Event], how: Settings
) -> None:
    """Nothing is allocated, and everything reserved can be released to make room for one request."""
    played = run(events + rest(events), how)
    assert played.allocated_bytes == 0
    cap = played.reserved_peak_bytes
    everything = [*events, *rest(events), ("last", cap, "third stream")]
    limited = Settings(cap_bytes=cap + 20 * MIB, expandable_segments=how.expandable_segments)
    assert run(everything, limited).fits


@given(histories(), any_settings, st.integers(1, 40))
def test_reserved_memory_never_exceeds_the_cap(events: list[Event], how: Settings, share: int) -> None:
    free = run(events, how)
    cap = max(2 * MIB, free.reserved_peak_bytes * share // 40)
    capped = run(events, Settings(cap_bytes=cap, expandable_segments=how.expandable_segments))
    assert capped.reserved_peak_bytes <= cap
    assert capped.fits or cap < free.reserved_peak_bytes


@given(histories(), st.booleans())
def test_repeating_a_loop_that_frees_everything_reserves_no_more(
    events: list[Event], expandable: bool
) -> None:
    """A loop that frees all it allocates reuses the segments that its last round left."""
    how, loop = Settings(expandable_segments=expandable), events + rest(events)
    rounds = [run([((n, k), s, t) for n in range(many) for k, s, t in loop], how) for many in (3, 6)]
    assert rounds[0].reserved_peak_bytes == rounds[1].reserved_peak_bytes


@given(st.lists(sizes, min_size=1, max_size=40))
def test_expandable_segments_waste_less_than_a_page_per_pool_while_nothing_is_freed(asked: list[int]) -> None:
    found = run([(i, s, "") for i, s in enumerate(asked)], EXPANDABLE)
    assert found.reserved_bytes - found.allocated_bytes < (2 + 20) * MIB
