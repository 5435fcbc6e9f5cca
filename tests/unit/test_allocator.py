"""The caching allocator's documented rules, in closed cases and in laws."""

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


@pytest.mark.parametrize(
    ("asked", "divisions", "given_"),
    [
        (1, 0, 512),
        (512, 0, 512),
        (513, 0, 1024),
        (1200, 0, 1536),
        (1200, 4, 1536),  # below 512 x divisions nothing changes
        (5000, 4, 5120),  # 4096, 5120, 6144, 7168
        (4096, 4, 4096),
        (7169, 4, 8192),
        (100 * MIB, 8, 104 * MIB),  # parts of 8 MiB above 64 MiB
    ],
)
def test_sizes_are_rounded(asked: int, divisions: int, given_: int) -> None:
    assert rounded_bytes(asked, divisions) == given_


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
def test_segments_by_size(asked: int, segment: int) -> None:
    assert segment_bytes(asked) == segment
    assert run(steps(("a", asked))).reserved_peak_bytes == segment


# -- closed cases -----------------------------------------------------------------------------------


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    four = [(i, 512 * KIB) for i in range(4)]
    assert run(steps(*four)).reserved_peak_bytes == 2 * MIB
    assert run(steps(*four, (4, 512))).reserved_peak_bytes == 4 * MIB


def test_small_and_large_requests_never_share() -> None:
    assert run(steps(("large", 2 * MIB), ("small", 512))).reserved_peak_bytes == 22 * MIB


def test_the_rest_of_a_large_segment_is_used_only_above_one_mib() -> None:
    """A 20 MiB segment holds 9 + 9 MiB; 2 MiB are left, which a third request of 2 MiB fills."""
    assert run(steps(("a", 9 * MIB), ("b", 9 * MIB), ("c", 2 * MIB))).reserved_peak_bytes == 20 * MIB
    # 19 + 1 MiB: the last MiB is not split off a block, so it counts as allocated.
    found = run(steps(("x", 20 * MIB), ("x",), ("a", 19 * MIB)))
    assert (found.allocated_bytes, found.reserved_bytes) == (20 * MIB, 20 * MIB)


def test_best_fit_takes_the_smallest_block_that_holds_it() -> None:
    """Free blocks of 60 and 40 MiB: 30 MiB goes into the 40, so that 60 is still there."""
    found = run(steps(("a", 60 * MIB), ("b", 40 * MIB), ("a",), ("b",), ("c", 30 * MIB), ("d", 60 * MIB)))
    assert found.reserved_peak_bytes == 100 * MIB


def test_neighbours_merge_when_both_are_free() -> None:
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
    """Pages of 20 MiB for large requests, of 2 MiB for small ones; the end is used first."""
    found = run(steps(("a", 21 * MIB), ("b", 512), ("c", 18 * MIB)), EXPANDABLE)
    assert found.reserved_peak_bytes == (40 + 2) * MIB
    # c did not fit in what a left of its second page: one more page, not two.
    found = run(steps(("a", 21 * MIB), ("c", 30 * MIB)), EXPANDABLE)
    assert found.reserved_peak_bytes == 60 * MIB


def test_streams_do_not_share_what_is_free() -> None:
    events = steps(("a", 40 * MIB, "compute"), ("a",), ("b", 40 * MIB, "all-gather"))
    assert run(events).reserved_peak_bytes == 80 * MIB
    assert run(events, EXPANDABLE).reserved_peak_bytes == 80 * MIB


def test_a_block_another_stream_still_uses_is_not_reused() -> None:
    heap = CachingAllocator()
    assert heap.allocate("a", 40 * MIB)
    heap.request_free("a")
    assert heap.allocated_bytes == 0
    assert heap.allocate("b", 40 * MIB)
    assert heap.reserved_bytes == 80 * MIB
    heap.complete_free("a")
    assert heap.allocate("c", 40 * MIB)
    assert heap.reserved_bytes == 80 * MIB


def test_under_a_cap_cached_segments_are_given_back_first() -> None:
    """40 MiB are free but too small for 60: given back, 60 fits under 100 MiB beside the live 40."""
    events = steps(("a", 40 * MIB), ("b", 40 * MIB), ("a",), ("c", 60 * MIB))
    found = run(events, Settings(cap_bytes=100 * MIB))
    assert (found.fits, found.retries, found.reserved_peak_bytes) == (True, 1, 100 * MIB)
    assert not run(events, Settings(cap_bytes=98 * MIB)).fits


def test_a_split_segment_cannot_be_given_back_but_free_pages_can() -> None:
    """60 MiB cut to a live 20 and a free 40: only pages of an expandable segment can be given back."""
    events = steps(("w", 60 * MIB), ("w",), ("live", 20 * MIB), ("other", 50 * MIB, "side"))
    cap = Settings(cap_bytes=100 * MIB)
    assert not run(events, cap).fits
    grown = run(events, Settings(cap_bytes=100 * MIB, expandable_segments=True))
    assert (grown.fits, grown.reserved_bytes, grown.retries) == (True, 80 * MIB, 1)


def test_unmapped_pages_are_filled_from_the_lowest_address() -> None:
    """Live blocks keep the ends; the hole between them is unmapped, and mapped again for what fits it."""
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


def test_oversize_blocks_are_not_split() -> None:
    """With max_split_size 100 MiB a free block of 200 serves neither 50, 150 nor 180, but 190."""
    setting = Settings(max_split_size_bytes=100 * MIB)
    for asked, reserved in ((50, 250), (150, 350), (180, 380), (190, 200)):
        found = run(steps(("a", 200 * MIB), ("a",), ("b", asked * MIB)), setting)
        assert found.reserved_peak_bytes == reserved * MIB, asked
    # Without the setting it serves all of them.
    assert run(steps(("a", 200 * MIB), ("a",), ("b", 50 * MIB))).reserved_peak_bytes == 200 * MIB


def test_one_oversize_block_is_given_back_before_all_are() -> None:
    """Free 200 MiB (oversize) and 40: room for 150 is made from the first alone, without a retry."""
    events = steps(("a", 200 * MIB), ("b", 40 * MIB), ("a",), ("b",), ("c", 150 * MIB))
    found = run(events, Settings(max_split_size_bytes=100 * MIB, cap_bytes=250 * MIB))
    assert (found.fits, found.retries, found.reserved_bytes) == (True, 0, 190 * MIB)


def test_garbage_is_collected_above_the_threshold() -> None:
    """Above 80 % of the cap, a segment unused for longer than the average is given back before growing."""
    events = steps(("old", 50 * MIB), ("old",), ("a", 60 * MIB), ("b", 70 * MIB))
    lazy = run(events, Settings(cap_bytes=200 * MIB))
    eager = run(events, Settings(cap_bytes=200 * MIB, garbage_collection_threshold=0.5))
    assert (lazy.reserved_bytes, eager.reserved_bytes) == (180 * MIB, 130 * MIB)
    assert eager.retries == 0


def test_garbage_of_all_streams_ages_by_one_count() -> None:
    """PyTorch counts requests of its one pool of large blocks, whatever their streams: when the last is made,
    the side stream's 60 MiB have aged by two, the main stream's 40 by one; the older of them goes."""
    events = [
        ("s", 60 * MIB, "side"),
        ("o", 40 * MIB, ""),
        ("s", -1, ""),
        ("p", 20 * MIB, "third"),
        ("o", -1, ""),
        ("x", 60 * MIB, ""),
    ]
    found = run(events, Settings(cap_bytes=220 * MIB, garbage_collection_threshold=0.5))
    assert found.reserved_bytes == 120 * MIB


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


def test_a_trace_is_played_by_its_clock() -> None:
    lives = [life(5, None, 40 * MIB), life(0, 3, 40 * MIB), life(1, 2, 0)]
    assert [(size, key) for key, size, _ in events_of(lives)] == [(40 * MIB, 1), (-1, 1), (40 * MIB, 0)]
    found = replay(lives)
    assert (found.reserved_peak_bytes, found.allocated_bytes) == (40 * MIB, 40 * MIB)
    assert replay([life(0, 3, MIB * 40), life(5, None, MIB * 40, "side")]).reserved_bytes == 80 * MIB


# -- laws -------------------------------------------------------------------------------------------

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


any_settings = st.builds(
    Settings,
    max_split_size_bytes=st.sampled_from([None, 32 * MIB]),
    expandable_segments=st.booleans(),
    roundup_power2_divisions=st.sampled_from([0, 4]),
)


def rest(events: list[Event]) -> list[Event]:
    """Frees of all that is still alive."""
    freed = {key for key, size, _ in events if size < 0}
    return [(key, -1, "") for key, size, _ in events if size >= 0 and key not in freed]


@given(histories(), any_settings)
def test_reserved_holds_allocated_and_never_falls_without_a_cap(events: list[Event], how: Settings) -> None:
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
def test_when_all_is_freed_the_segments_are_whole_again(events: list[Event], how: Settings) -> None:
    """Nothing is allocated, and everything reserved can be given back to make room for one request."""
    played = run(events + rest(events), how)
    assert played.allocated_bytes == 0
    cap = played.reserved_peak_bytes
    everything = [*events, *rest(events), ("last", cap, "third stream")]
    limited = Settings(
        cap_bytes=cap + 20 * MIB,
        expandable_segments=how.expandable_segments,
        max_split_size_bytes=how.max_split_size_bytes,
    )
    assert run(everything, limited).fits


@given(histories(), any_settings, st.integers(1, 40))
def test_a_cap_is_never_exceeded(events: list[Event], how: Settings, share: int) -> None:
    free = run(events, how)
    cap = max(2 * MIB, free.reserved_peak_bytes * share // 40)
    capped = run(
        events,
        Settings(
            cap_bytes=cap,
            expandable_segments=how.expandable_segments,
            max_split_size_bytes=how.max_split_size_bytes,
            roundup_power2_divisions=how.roundup_power2_divisions,
        ),
    )
    assert capped.reserved_peak_bytes <= cap
    assert capped.fits or cap < free.reserved_peak_bytes


@given(histories(), st.booleans())
def test_the_same_loop_again_reserves_no_more(events: list[Event], expandable: bool) -> None:
    """A loop that frees all it allocates finds in its segments what its last round left."""
    how, loop = Settings(expandable_segments=expandable), events + rest(events)
    rounds = [run([((n, k), s, t) for n in range(many) for k, s, t in loop], how) for many in (3, 6)]
    assert rounds[0].reserved_peak_bytes == rounds[1].reserved_peak_bytes


def test_a_request_just_below_max_split_size_grows_by_a_segment_a_round() -> None:
    """Its segment of 32 MiB is oversize for the request of 31 and is never found again (PyTorch's rule),
    until a cap makes the allocator give it back."""
    loop = steps(*[event for n in range(5) for event in ((n, 31 * MIB - 512), (n,))])
    assert run(loop, Settings(max_split_size_bytes=32 * MIB)).reserved_peak_bytes == 160 * MIB
    capped = run(loop, Settings(max_split_size_bytes=32 * MIB, cap_bytes=64 * MIB))
    assert (capped.fits, capped.retries) == (True, 0)


def test_expandable_segments_are_not_given_back_as_oversize_blocks() -> None:
    """With a `max_split_size` too: their pages are unmapped when everything cached is given back."""
    loop = steps(("a", 100 * MIB), ("b", 10 * MIB), ("a",), ("c", 150 * MIB))
    how = Settings(expandable_segments=True, max_split_size_bytes=50 * MIB, cap_bytes=200 * MIB)
    found = run(loop, how)
    assert (found.fits, found.retries, found.reserved_bytes) == (True, 1, 160 * MIB)


@given(st.lists(sizes, min_size=1, max_size=40))
def test_expandable_segments_waste_less_than_a_page_while_nothing_is_freed(asked: list[int]) -> None:
    found = run([(i, s, "") for i, s in enumerate(asked)], EXPANDABLE)
    assert found.reserved_bytes - found.allocated_bytes < (2 + 20) * MIB
