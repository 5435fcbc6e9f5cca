"""Show an estimate as a few lines of HTML in a notebook; light or dark follows the page."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from html import escape

from memfit.report import charts, report_charts
from memfit.types.result import Estimate, Interval
from memfit.types.units import format_bytes

_COLOURS = {
    "parameter": "#3b7dd8",
    "gradient": "#8a63d2",
    "optimizer_state": "#2a9d8f",
    "ema": "#607d3b",
    "activation": "#e08a1e",
    "temporary": "#9aa0a6",
    "input": "#c2185b",
    "workspace": "#6d4c41",
}
_MOST_GUESSES = 5
_STYLE = """<style>
.memfit{font:14px/1.5 system-ui,sans-serif;max-width:44rem;color-scheme:light dark;color:inherit}
.memfit table{border-collapse:collapse;margin:.4rem 0;background:none;color:inherit}
.memfit th,.memfit td{text-align:right;padding:.1rem .9rem .1rem 0;border:0;background:none;color:inherit}
.memfit th:first-child,.memfit td:first-child{text-align:left;font-weight:400}
.memfit .bar{display:flex;height:1.1rem;border-radius:3px;overflow:hidden;background:#8884}
.memfit .bar i{display:block;min-width:1px}
.memfit .key i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin:0 .3rem 0 .8rem}
.memfit .plot{display:block;overflow:visible;width:calc(100% - 6rem);margin:2.6rem .6rem 3.4rem 5.2rem}
.memfit .plot{font-size:12px}.memfit .plot svg{overflow:hidden}.memfit .plot .x{text-anchor:middle}
.memfit .plot text{fill:currentColor;opacity:.75}
.memfit .plot :is(.y,.end){text-anchor:end}.memfit .plot .grid{stroke:#8883}.memfit .plot .base{stroke:#888}
.memfit .plot .limit{stroke:#c0392b;stroke-dasharray:5 4}.memfit .plot .area{fill:#e08a1e88;stroke:#e08a1e}
.memfit .fits{color:light-dark(#1b7f3b,#5fd38a)}.memfit .not{color:light-dark(#b3261e,#ff8a80)}
</style>"""


def estimate_html(
    estimate: Estimate,
    *,
    title: str,
    machine: str,
    cap_bytes: int,
    fits: bool,
    host: str = "",
    timeline_bytes: Sequence[int] = (),
) -> str:
    """Return HTML for a notebook, in this order: ``title``, the plan's label, whether it fits ``cap_bytes``
    of ``machine`` (as ``fits`` says), and the phase of the peak; a table of the predicted kinds of memory
    (allocated, reserved, device, host), each with its range; a bar of the memory at the peak by category; the
    live bytes over one step, if ``timeline_bytes`` has them at equal distances; ``host``, a sentence on the
    memory of the host; a warning if splitting the batch may change the training or this was not tested; and
    the first five of the assumptions that are not taken from the batch."""
    verdict = f'<b class="{"fits" if fits else "not"}">{"fits" if fits else "does not fit"}</b>'
    kinds = {
        "allocated": estimate.allocated_bytes,
        "reserved": estimate.reserved_bytes,
        "device": estimate.device_bytes,
        "host": estimate.host_bytes,
    }
    notes = "".join(
        f"<div>assumed: {escape(assumption)}</div>" for assumption in estimate.guesses[:_MOST_GUESSES]
    )
    if estimate.split_warning:
        notes = f"<div>{escape(estimate.split_warning)}</div>{notes}"
    if host:
        notes = f"<div>{escape(host)}</div>{notes}"
    rows = "".join(_row(name, value) for name, value in kinds.items() if value is not None)
    return (
        f'{_STYLE}<div class="memfit"><div><b>{escape(title)}</b>, {escape(estimate.plan.label)}: {verdict} '
        f"{format_bytes(cap_bytes)} of {escape(machine)}; peak in {escape(estimate.peak_phase)}</div>"
        f"<table><tr><th>memory</th><th>peak</th><th>from</th><th>to</th></tr>{rows}</table>"
        f"{_bar(estimate.at_peak_bytes)}{_timeline(timeline_bytes, cap_bytes)}{notes}</div>"
    )


def _timeline(live_bytes: Sequence[int], cap_bytes: int) -> str:
    """Return the plot of the live bytes over one step as SVG text, "" if there are none. ``cap_bytes`` is
    drawn as a level line if it is at most three times the peak."""
    if not live_bytes:
        return ""
    peak = max(live_bytes)
    cap = [charts.Rule(value=cap_bytes, label=format_bytes(cap_bytes))] if cap_bytes <= 3 * peak else []
    points = [(i / len(live_bytes), float(v)) for i, v in enumerate([*live_bytes, live_bytes[-1]])]
    return charts.plot(
        f"memfit-{uuid.uuid4().hex[:8]}",  # one page has many outputs
        title="memory over one step",
        description=f"live bytes of tensors over a step, {format_bytes(peak)} at the peak",
        x=charts.Axis(title="through the step", low=0, high=1, text="{:.0%}".format),
        y=report_charts.bytes_axis("live tensors", [peak, *(rule.value for rule in cap)]),
        lines=[charts.Line(css="live", points=points, area=True, stepped=True)],
        rules=cap,
    )


def _row(name: str, value: Interval) -> str:
    cells = "".join(f"<td>{format_bytes(v)}</td>" for v in (value.value, value.low, value.high))
    return f"<tr><td>{name}</td>{cells}</tr>"


def _bar(parts: Mapping[str, int]) -> str:
    scale = sum(parts.values()) or 1
    segments = [(n.replace("_", " "), size, _COLOURS.get(n, "#607d8b")) for n, size in parts.items() if size]
    pieces = "".join(
        f'<i style="width:{100 * size / scale:.2f}%;background:{colour}" title="{escape(name)}"></i>'
        for name, size, colour in segments
    )
    key = "".join(
        f'<i style="background:{colour}"></i>{escape(name)} {format_bytes(size)}'
        for name, size, colour in segments
    )
    bar = f'<div class="bar" role="img" aria-label="what is alive at the peak">{pieces}</div>'
    return f'{bar}<div class="key">{key}</div>'
