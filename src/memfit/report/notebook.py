"""Show an estimate as a few lines of HTML in a notebook; light or dark follows the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

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
.memfit .fits{color:light-dark(#1b7f3b,#5fd38a)}.memfit .not{color:light-dark(#b3261e,#ff8a80)}
</style>"""


def estimate_html(estimate: Estimate, *, title: str, machine: str, cap_bytes: int, fits: bool) -> str:
    """Return HTML for a notebook, in this order: ``title``, the plan's label, whether it fits ``cap_bytes``
    of ``machine`` (as ``fits`` says), and the phase of the peak; a table of the predicted kinds of memory
    (allocated, reserved, device, host), each with its range; a bar of the memory at the peak by category; a
    warning if splitting the batch may change the training or this was not tested; and the first five of the
    assumptions that are not taken from the batch."""
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
    rows = "".join(_row(name, value) for name, value in kinds.items() if value is not None)
    return (
        f'{_STYLE}<div class="memfit"><div><b>{escape(title)}</b>, {escape(estimate.plan.label)}: {verdict} '
        f"{format_bytes(cap_bytes)} of {escape(machine)}; peak in {escape(estimate.peak_phase)}</div>"
        f"<table><tr><th>memory</th><th>peak</th><th>from</th><th>to</th></tr>{rows}</table>"
        f"{_bar(estimate.at_peak_bytes)}{notes}</div>"
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
