"""Explanations: what is alive at the peak, why plans differ, and files for external viewers."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import estimate
from rich.console import Console

from memfit.cost.memory import live_peak_bytes, memory_profile, with_workspace
from memfit.report.explain import TracedEstimate, contributors, difference
from memfit.report.explain_files import chrome_trace, snapshot
from memfit.report.explain_html import MOST_BYTES, render_explained, series
from memfit.report.explain_terminal import print_difference, print_explained
from memfit.report.quantities import sentence_text
from memfit.report.words import load_words
from memfit.types.machine import Calibration
from memfit.types.plan import Plan, use
from memfit.types.result import Interval
from memfit.types.trace import UNKNOWN_BUFFER, Allocation, Category, OpCall, Phase, PhaseSpan, Trace

KIB = 1024
CHECKPOINTED = Plan(uses=(use("activation-checkpointing", every=1),))


def alloc(start: int, end: int | None, size_bytes: int, **other: Any) -> Allocation:
    about = {
        "category": Category.ACTIVATION,
        "phase": Phase.FORWARD,
        "module": "layers.0.mlp",
        "line": "my.py:7",
    }
    return Allocation(
        start=start, end=end, size_bytes=size_bytes, step=0, op="aten.mm.default", **(about | other)
    )


def traced(allocations: Sequence[Allocation], ops: Sequence[OpCall] = (), *, end: int = 30) -> Trace:
    spans = [(Phase.SETUP, 0, 10), (Phase.FORWARD, 10, 20), (Phase.BACKWARD, 20, end)]
    return Trace(
        device="cpu",
        steps=1,
        allocations=tuple(allocations),
        ops=tuple(ops),
        parameter_count=1,
        trainable_count=1,
        spans=tuple(PhaseSpan(phase=p, step=0, start=a, end=b) for p, a, b in spans),
    )


def op(clock: int, module: str, name: str = "aten.mm.default") -> OpCall:
    return OpCall(
        clock=clock,
        op=name,
        signature=f"{name} {clock}",
        phase=Phase.FORWARD,
        step=0,
        module=module,
        dtype="float32",
        flops=10,
        moved_bytes=20,
    )


def explained(trace: Trace, plan: Plan = Plan(), calibration: Calibration = Calibration()) -> TracedEstimate:  # noqa: B008
    profile = memory_profile(trace, calibration)
    peak = profile.peak_bytes
    found = dataclasses.replace(
        estimate(plan, peak),
        allocated_bytes=Interval(value=peak, low=peak, high=peak),
        plan=plan,
        phase_peak_bytes=profile.phase_peak_bytes,
        at_peak_bytes=profile.at_peak_bytes,
        peak_phase=profile.peak_phase,
        peak_op=profile.peak_op,
    )
    return TracedEstimate(estimate=found, trace=with_workspace(trace, profile), peak_clock=profile.peak_clock)


PARAMETERS = [
    alloc(i, None, 2 * KIB, category=Category.PARAMETER, phase=Phase.SETUP, module=f"layers.{i}.mlp", line="")
    for i in range(2)
]
SAVED = [alloc(11, 25, 8 * KIB), alloc(13, 23, 8 * KIB, module="layers.1.mlp")]
PLAIN = explained(
    traced([*PARAMETERS, *SAVED, alloc(12, 14, 1 * KIB, category=Category.TEMPORARY, module="")])
)
LIGHT = explained(
    traced([*PARAMETERS, SAVED[0], alloc(22, 24, 3 * KIB, category=Category.GRADIENT)]), CHECKPOINTED
)


# --- the peak


def test_workspace_inside_the_kernel_at_the_peak_is_added_to_the_workspaces_that_are_kept() -> None:
    kept = alloc(0, None, 4 * KIB, category=Category.WORKSPACE, module="", line="")
    step = dataclasses.replace(traced([kept, *SAVED]), ops=(op(14, "layers.0.mlp"),))
    calibration = Calibration(op_peak_bytes={step.ops[0].signature: 32 * KIB})
    found = explained(step, calibration=calibration)
    assert found.estimate.at_peak_bytes["workspace"] == 36 * KIB
    assert sum(found.estimate.at_peak_bytes.values()) == found.estimate.allocated_bytes.value
    assert live_peak_bytes(found.trace) == found.estimate.allocated_bytes.value


def test_equal_blocks_are_merged_into_one_contributor_and_the_sizes_add_up() -> None:
    found = [(c.category, c.module, c.op, c.line, c.size_bytes, c.count) for c in contributors(PLAIN)]
    assert found == [
        ("activation", "layers.*.mlp", "mm", "my.py:7", 16 * KIB, 2),
        ("parameter", "layers.*.mlp", "mm", "", 4 * KIB, 2),
        ("temporary", "", "mm", "my.py:7", 1 * KIB, 1),
    ]
    assert sum(size for *_, size, _ in found) == PLAIN.estimate.allocated_bytes.value == 21 * KIB


def test_workspace_of_a_kernel_is_alive_only_while_the_kernel_runs() -> None:
    probed = Calibration(op_peak_bytes={"aten.conv.default 12": 50 * KIB})
    trace = traced(SAVED, [op(12, "conv", "aten.conv.default")])
    found = explained(trace, calibration=probed)
    assert found.estimate.allocated_bytes.value == 58 * KIB
    assert [(c.category, c.module, c.size_bytes) for c in contributors(found)] == [
        ("workspace", "conv", 50 * KIB),
        ("activation", "layers.*.mlp", 8 * KIB),
    ]
    assert highest(active(pickle.loads(snapshot(found)))) == 58 * KIB


# --- two plans


def test_a_difference_adds_up_by_category_and_by_operator() -> None:
    found = difference(PLAIN, LIGHT)
    assert found.change_bytes == -6 * KIB
    assert sum(found.by_category_bytes.values()) == sum(m.change_bytes for m in found.movers) == -6 * KIB
    assert dict(found.by_category_bytes) == {
        "activation": -8 * KIB,
        "gradient": 3 * KIB,
        "temporary": -1 * KIB,
        "parameter": 0,
    }
    assert [(m.category, m.first_bytes, m.second_bytes) for m in found.movers] == [
        ("activation", 16 * KIB, 8 * KIB),
        ("gradient", 0, 3 * KIB),
        ("temporary", 1 * KIB, 0),
    ]


def test_a_difference_is_described_in_sentences_with_bytes() -> None:
    words = load_words("en")
    told = [sentence_text(s, words) for s in difference(PLAIN, LIGHT).sentences]
    assert told == [
        "Plan A (plain) peaks at 21 KiB, in the forward phase at mm.",
        "Plan B (activation-checkpointing(every=1)) peaks at 15 KiB, in the backward phase at mm.",
        "Plan B peaks 6 KiB (28.6 %) below plan A.",
        "The category that changes most is activations: 8 KiB less.",
        "The phase that changes most is forward: its peak falls by 9 KiB.",
        "The largest change is mm in layers.*.mlp (activations): 8 KiB less, 16 KiB for A and 8 KiB for B.",
    ]
    japanese = [sentence_text(s, load_words("ja")) for s in difference(LIGHT, PLAIN).sentences]
    assert "プラン B のピークは A より 6 KiB（40.0 %）大きくなります。" in japanese
    same = [sentence_text(s, words) for s in difference(PLAIN, PLAIN).sentences]
    assert same[2:] == ["Both plans peak at the same size: the difference is 0 B (0 %)."]


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_terminal_shows_line_module_and_count_of_a_contributor(lang: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=140, highlight=False)
    print_explained(PLAIN, console=console, lang=lang)
    print_difference(difference(PLAIN, LIGHT), console=console, lang=lang)
    row = next(line.split() for line in out.getvalue().splitlines() if "my.py:7" in line)
    assert row[1:] == ["layers.*.mlp", "mm", "my.py:7", "16", "KiB", "2"]
    assert "−8 KiB" in out.getvalue()


def test_the_terminal_shows_assumptions_in_the_language_of_the_answer() -> None:
    out = io.StringIO()
    estimate = dataclasses.replace(PLAIN.estimate, assumptions=(UNKNOWN_BUFFER,))
    assumed = dataclasses.replace(PLAIN, estimate=estimate)
    print_explained(assumed, console=Console(file=out, width=400, highlight=False), lang="ja")
    assert "仮定：再帰型ネットワーク" in out.getvalue()


# --- PyTorch's viewer


def active(data: dict[str, Any]) -> Iterator[int]:
    """Bytes alive after each event, from the file alone."""
    live = 0
    for event in data["device_traces"][0]:
        live += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
        yield live


def highest(levels: Iterator[int]) -> int:
    return max(levels)


@st.composite
def lives(draw: st.DrawFn) -> list[Allocation]:
    """Allocations whose starts and ends all have different clocks, as in a trace."""
    count = draw(st.integers(1, 25))
    order = draw(st.permutations([*range(count), *range(count)]))
    ends: dict[int, list[int]] = {}
    for clock, index in enumerate(order):
        ends.setdefault(index, []).append(clock)
    return [
        alloc(
            a,
            draw(st.sampled_from([b, None])),
            64 * draw(st.integers(0, 9)),
            category=draw(st.sampled_from(list(Category))),
            stream=draw(st.sampled_from(["", "all-gather"])),
        )
        for a, b in ends.values()
    ]


@given(lives())
def test_a_snapshot_holds_the_live_allocations_without_overlap(allocations: list[Allocation]) -> None:
    found = explained(traced([*allocations, alloc(60, None, 64)], end=100))
    data = pickle.loads(snapshot(found))
    assert highest(active(data)) == found.estimate.allocated_bytes.value
    taken: dict[int, int] = {}
    where = {s["stream"]: (s["address"], s["address"] + s["total_size"]) for s in data["segments"]}
    for event in data["device_traces"][0]:
        start, end = event.get("addr", 0), event.get("addr", 0) + event["size"]
        if event["action"] == "alloc":
            assert all(end <= a or start >= b for a, b in taken.items())
            assert where[event["stream"]][0] <= start
            assert end <= where[event["stream"]][1]
            taken[start] = end
        elif event["action"] == "free_completed":
            assert taken.pop(start) == end
    kept = {
        b["address"]: b["address"] + b["size"]
        for s in data["segments"]
        for b in s["blocks"]
        if b["state"] == "active_allocated"
    }
    assert kept == taken
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in data["segments"])


def test_pytorchs_own_viewer_opens_the_snapshot() -> None:
    from torch.cuda import _memory_viz

    data = pickle.loads(snapshot(PLAIN))
    assert "total_allocated: 4.0KiB" in _memory_viz.segsum(data)  # the parameters outlive the step
    assert "1000 entries" not in (told := _memory_viz.trace(data))
    assert told.count("cudaMalloc") == 1
    assert "layers.1.mlp" in _memory_viz.segments(data, format_flamegraph=lambda text: text)
    for page in (_memory_viz.trace_plot(data), _memory_viz.segment_plot(data)):
        assert "snapshot.pickle" in page
    frames = data["device_traces"][0][3]["frames"]
    assert [_memory_viz._frame_fmt(f) for f in frames] == [
        "my.py:7:mm",
        "module:0:layers.0.mlp",
        "memfit:0:activation made in forward, step 1",
    ]


def test_the_snapshot_uses_only_pickle_opcodes_that_the_web_viewer_reads() -> None:
    import pickletools

    codes = {code.name for code, *_ in pickletools.genops(snapshot(PLAIN))}
    assert codes <= {
        "PROTO",
        "FRAME",
        "MEMOIZE",
        "MARK",
        "STOP",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "SETITEM",
        "SETITEMS",
        "APPEND",
        "APPENDS",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINGET",
        "LONG_BINGET",
        "NEWFALSE",
        "TUPLE2",
    }


# --- Perfetto


def test_counters_reach_the_peak_and_end_at_the_bytes_still_live() -> None:
    data = json.loads(chrome_trace(PLAIN))
    counted = [e for e in data["traceEvents"] if e["ph"] == "C"]
    assert max(e["args"]["bytes"] for e in counted if e["name"] == "live bytes") == 21 * KIB
    last = {e["name"]: e["args"]["bytes"] for e in counted}
    assert last == {"live bytes": 4 * KIB, "parameter": 4 * KIB, "activation": 0, "temporary": 0}
    assert "not time" in data["otherData"]["clock"]
    (peak,) = [e for e in data["traceEvents"] if e["ph"] == "i"]
    assert (peak["ts"], peak["args"]["bytes"]) == (PLAIN.peak_clock, 21 * KIB)


def test_module_slices_nest_and_end_with_their_phase() -> None:
    ops = [op(11, "a.b"), op(13, "a.b"), op(15, "a.c"), op(22, "a.c")]
    data = json.loads(chrome_trace(explained(traced(SAVED, ops))))
    slices = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in data["traceEvents"] if e["ph"] == "X"]
    assert {("a", 11, 20), ("b", 11, 15), ("c", 15, 20), ("a", 22, 30), ("c", 22, 30)} <= set(slices)
    assert [s for s in slices if s[0] == "mm"] == [
        ("mm", 11, 13),
        ("mm", 13, 15),
        ("mm", 15, 20),
        ("mm", 22, 30),
    ]
    assert ("forward, step 1", 10, 20) in slices


# --- the page's data


def alive_by(data: dict[str, Any], instant: int) -> Counter[int]:
    """Bytes by category at an instant, from the page's data as its script reads them."""
    found, first = Counter[int](), 0
    for step, length, group, size, count in zip(
        *(data[k] for k in ("first", "length", "group", "bytes", "count")), strict=True
    ):
        first += step
        if first <= instant < first + length:
            found[data["groups"][group][0]] += size * count
    return found


@given(lives(), st.integers(1, 60))
def test_every_instant_in_the_page_is_exact_and_the_peak_is_included(
    allocations: list[Allocation], points: int
) -> None:
    found = explained(traced([*allocations, alloc(60, None, 64)], end=100))
    data = series(found, points)
    assert len(data["clock"]) <= points + 4  # the peak and the three phases
    for instant, clock in enumerate(data["clock"]):
        alive = [a for a in found.trace.allocations if a.start <= clock and (a.end is None or a.end > clock)]
        assert sum(alive_by(data, instant).values()) == sum(a.size_bytes for a in alive)
    assert sum(alive_by(data, data["peak"]).values()) == found.estimate.allocated_bytes.value


def test_a_long_trace_makes_a_page_below_two_megabytes() -> None:
    many = [
        alloc(
            10 + i,
            11 + i + (i * 7919) % (40 if i % 5 else 30_000),
            64 * (1 + i % 977),
            line=f"my.py:{i % 300}",
            module=f"layers.{i % 120}.part.{i % 7}",
        )
        for i in range(100_000)
    ]
    page = render_explained(explained(traced(many, end=200_000)), job="big", lang="en")
    assert MOST_BYTES / 4 < len(page.encode()) < 2_000_000
    assert "https://" not in page


def test_html_in_names_cannot_close_the_script_of_the_page() -> None:
    odd = [alloc(11, 25, 64, module="</script><b>", line="<x>.py:1")]
    page = render_explained(explained(traced(odd)), job="</title>", lang="ja")
    assert page.count("</script>") == 2
    assert "<b>" not in page.partition('id="data"')[2].partition("</script>")[0]
    assert "</title></title>" not in page
