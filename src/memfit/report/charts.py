"""The report's charts as hand-written inline SVG.

Each chart has a few kilobytes and no script, where plotly's script alone has 4 MB. Print and dark mode come
from the page's own style. An SVG is as wide as its box: x is in percent of the width and y in pixels, so that
text keeps its size on a phone. Only the paths are inside a nested picture that is stretched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final

HEIGHT: Final = 260  # height of the plot area in px
WIDE: Final = 1000  # width of the stretched picture's coordinate system


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of a plot, from ``low`` to ``high``. Ticks are at round multiples of ``scale``: 2**20 if the
    labels are in MiB. ``text``: function that returns the label of a tick from its value."""

    title: str
    low: float
    high: float
    scale: float = 1.0
    text: Callable[[float], str] = "{:g}".format

    def ticks(self, count: int = 7) -> list[float]:
        """Return the values of the ticks from ``low`` to ``high``: multiples of a step, which is 1, 2, 2.5
        or 5 times a power of ten times ``scale``. There are at most about ``count`` of them. ``high`` must
        be greater than ``low``."""
        low, high = self.low / self.scale, self.high / self.scale
        step = _round_step((high - low) / count)
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        return [i * step * self.scale for i in range(first, last + 1)]

    def share(self, value: float) -> float:
        """Return where ``value`` is on the axis: 0 at ``low``, 1 at ``high``, below 0 or above 1 outside
        them."""
        return (value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot through ``points``, each (x, y).

    ``css``: CSS classes that determine its colour. ``area``: whether the area between it and the x axis is
    filled. ``stepped``: whether it is horizontal from each point to the x of the next one, instead of going
    straight to it.
    """

    css: str
    points: Sequence[tuple[float, float]]
    area: bool = False
    stepped: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One marker of a plot. ``css``: CSS classes that determine its colour; ``label``: text below it, or
    above it if another marker is in the way; "" for none."""

    css: str
    x: float
    y: float
    hint: str  # shown on hover
    label: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A straight labelled line across the whole plot: upright at x = ``value`` if ``vertical``, else level at
    y = ``value``."""

    value: float
    label: str
    vertical: bool = False


def axis(
    title: str,
    *,
    values: Sequence[float],
    zero: bool = True,
    scale: float = 1.0,
    text: Callable[[float], str] = "{:g}".format,
) -> Axis:
    """Return an axis that covers the finite ``values``, or 0 and 1 if there are none.

    It begins at 0 if ``zero``, and values below 0 are then outside it; otherwise it begins below the smallest
    value, with a margin. It ends above the largest value, with the same margin: 8 % of the range from the
    beginning (0 or the smallest value) to the largest; if that range is 0, the absolute largest value, or 1
    if that is 0, too. ``title``, ``scale`` and ``text`` are as in `Axis`.
    """
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    top, bottom = max(finite), 0.0 if zero else min(finite)
    padding = 0.08 * (top - bottom) or abs(top) or 1.0
    return Axis(
        title=title, low=bottom if zero else bottom - padding, high=top + padding, scale=scale, text=text
    )


def plot(
    chart_id: str,
    *,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line] = (),
    dots: Sequence[Dot] = (),
    rules: Sequence[Rule] = (),
) -> str:
    """Return one chart as the text of an SVG element: axes with ticks, then ``lines``, ``rules`` and
    ``dots``, drawn in this order, later ones over earlier ones.

    ``chart_id``: id that is unique on the page. ``title`` and ``description`` are for screen readers. All
    texts are escaped here for HTML.
    """
    parts = [_grid(x, y), _stretch([_path(line, x, y) for line in lines])]
    parts += [_rule(rule, x, y, lines) for rule in rules]
    parts += [_dot(dot, x, y, is_label_above=_has_dot_below(dot, dots, x, y)) for dot in dots]
    return (
        f'<svg class="plot" role="img" aria-labelledby="{chart_id}-t {chart_id}-d" height="{HEIGHT}">'
        f'<title id="{chart_id}-t">{escape(title)}</title>'
        f'<desc id="{chart_id}-d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def bar(
    value: float | None,
    *,
    full: float,
    css: str,
    marker: float | None = None,
    rule: float | None = None,
    whole: bool = True,
) -> str:
    """Return a bar of the length ``value`` / ``full`` as the text of an SVG element. None counts as 0;
    ``full``, above 0, is the whole width.

    ``css``: CSS class of the bar. ``marker``: value at which a tick is drawn (the prediction); ``rule``:
    value at which a line is drawn (a limit); None draws none. ``whole``: whether the bar is filled; False for
    a value that is only predicted. Screen readers skip the bar, because the page has its numbers as text
    beside it.
    """
    style = css if whole else f"{css} hollow"
    box = f'<rect class="{style}" x="0" y="3" height="14" width="{_pct((value or 0) / full)}"/>'
    tick = _upright("tick", marker, full, 0, 20)
    limit = _upright("limit", rule, full, -4, 24)
    track = '<rect class="track" x="0" y="3" height="14" width="100%"/>'
    return f'<svg class="bar" aria-hidden="true" height="20">{track}{box}{tick}{limit}</svg>'


def stacked(parts: Sequence[tuple[str, float]], *, full: float, rule: float | None = None) -> str:
    """Return a bar whose ``parts`` are drawn one after the other as the text of an SVG element; ``full``,
    above 0, is the whole width.

    ``parts``: (name of the kind, value); the CSS class of a part is "c-" and this name. ``rule``: value at
    which a line is drawn (a limit), unless it is None or above ``full``. Screen readers skip the bar, because
    the page has its numbers as text beside it.
    """
    boxes, start = "", 0.0
    for css, value in parts:
        place, width = _pct(start / full), _pct(value / full)
        boxes += f'<rect class="c-{css}" x="{place}" y="3" height="14" width="{width}"/>'
        start += value
    track = '<rect class="track" x="0" y="3" height="14" width="100%"/>'
    limit = _upright("limit", rule if rule is not None and rule <= full else None, full, -4, 24)
    return f'<svg class="bar" aria-hidden="true" height="20">{track}{boxes}{limit}</svg>'


def interval(bounds: tuple[float, float, float], *, reach: float, css: str) -> str:
    """Return a strip of the scale from -``reach`` to ``reach`` as the text of an SVG element, with a line
    from ``bounds[0]`` (low) to ``bounds[2]`` (high) and a dot at ``bounds[1]``.

    The unit of the scale is the margin within which results count as equivalent; the part from -1 to 1 is
    shaded. ``css``: CSS class of the line and the dot.
    """
    low, value, high = (_pct((b + reach) / (2 * reach)) for b in bounds)
    left, right = _pct((reach - 1) / (2 * reach)), _pct((reach + 1) / (2 * reach))
    return (
        '<svg class="interval" aria-hidden="true" height="34">'
        f'<rect class="band" x="{left}" y="0" width="{_pct(1 / reach)}" height="34"/>'
        f'<line class="edge" x1="{left}" x2="{left}" y1="0" y2="34"/>'
        f'<line class="edge" x1="{right}" x2="{right}" y1="0" y2="34"/>'
        '<line class="zero" x1="50%" x2="50%" y1="0" y2="34"/>'
        f'<g class="{css}"><line class="whisker" x1="{low}" x2="{high}" y1="17" y2="17"/>'
        f'<line class="whisker" x1="{low}" x2="{low}" y1="11" y2="23"/>'
        f'<line class="whisker" x1="{high}" x2="{high}" y1="11" y2="23"/>'
        f'<circle cx="{value}" cy="17" r="5.5"/></g></svg>'
    )


def _round_step(raw_step: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below the positive
    ``raw_step``: 2.5 for 2.1."""
    power = 10.0 ** math.floor(math.log10(raw_step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw_step * 0.999)


def _pct(share: float) -> str:
    return f"{100 * share:.2f}%"


def _px(share: float) -> str:
    return f"{HEIGHT * (1 - share):.1f}"


def _upright(css: str, value: float | None, full: float, top: int, bottom: int) -> str:
    if value is None:
        return ""
    place = _pct(value / full)
    return f'<line class="{css}" x1="{place}" x2="{place}" y1="{top}" y2="{bottom}"/>'


def _grid(x: Axis, y: Axis) -> str:
    horizontal_lines = "".join(
        f'<line class="grid" x1="0" x2="100%" y1="{_px(y.share(v))}" y2="{_px(y.share(v))}"/>'
        f'<text class="y" x="-10" y="{_px(y.share(v))}" dy=".35em">{escape(y.text(v))}</text>'
        for v in y.ticks()
    )
    x_labels = "".join(
        f'<text class="x" x="{_pct(x.share(v))}" y="{HEIGHT + 20}">{escape(x.text(v))}</text>'
        for v in x.ticks(4)
    )
    baseline = f'<line class="base" x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>'
    titles = (
        f'<text class="title" x="-82" y="-24">{escape(y.title)}</text>'
        f'<text class="title end" x="100%" y="{HEIGHT + 42}">{escape(x.title)}</text>'
    )
    return horizontal_lines + x_labels + baseline + titles


def _stretch(paths: Sequence[str]) -> str:
    return (
        f'<svg width="100%" height="{HEIGHT}" viewBox="0 0 {WIDE} {HEIGHT}" preserveAspectRatio="none">'
        f"{''.join(paths)}</svg>"
    )


def _path(line: Line, x: Axis, y: Axis) -> str:
    """Return a line as an SVG path element, or "" if it has no points. Points whose y is not finite are left
    out and the line is interrupted there."""
    if not line.points:
        return ""
    step = "H" if line.stepped else ""
    text, pen_up = "", True
    for px, py in line.points:
        if not math.isfinite(py):
            pen_up = True
            continue
        at_x, at_y = f"{WIDE * x.share(px):.1f}", _px(y.share(py))
        text += f"M{at_x},{at_y}" if pen_up else f"{step}{at_x}V{at_y}" if step else f"L{at_x},{at_y}"
        pen_up = False
    if line.area:
        left, right = (WIDE * x.share(line.points[i][0]) for i in (0, -1))
        text += f"L{right:.1f},{HEIGHT}L{left:.1f},{HEIGHT}Z"
    return f'<path class="{"area" if line.area else "line"} {line.css}" d="{text}"/>'


def _has_line_above(at: float, lines: Sequence[Line], y: Axis) -> bool:
    """Return whether a line ends where the label of a level rule would be if it were above the rule, which is
    ``at`` pixels below the top."""
    ends = (HEIGHT * (1 - y.share(line.points[-1][1])) for line in lines if line.points)
    return any(math.isfinite(end) and 0 <= at - end < 22 for end in ends)


def _rule(rule: Rule, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    label = escape(rule.label)
    if rule.vertical:
        at = _pct(x.share(rule.value))
        side = "start" if x.share(rule.value) < 0.6 else "end"
        return (
            f'<line class="limit" x1="{at}" x2="{at}" y1="0" y2="{HEIGHT}"/>'
            f'<text class="rule {side}" x="{at}" y="-6">{label}</text>'
        )
    at = _px(y.share(rule.value))
    dy = 16 if _has_line_above(float(at), lines, y) else -6
    return (
        f'<line class="limit" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        f'<text class="rule end" x="100%" y="{at}" dy="{dy}">{label}</text>'
    )


def _has_dot_below(dot: Dot, dots: Sequence[Dot], x: Axis, y: Axis) -> bool:
    """Return whether another dot lies where the label of ``dot`` would be if it were below it."""
    share, top = x.share(dot.x), HEIGHT * (1 - y.share(dot.y))
    left, right = (share - 0.01, share + 0.12) if share < 0.6 else (share - 0.12, share + 0.01)
    return any(
        left <= x.share(d.x) <= right and 4 < HEIGHT * (1 - y.share(d.y)) - top < 30
        for d in dots
        if d is not dot
    )


def _dot(dot: Dot, x: Axis, y: Axis, *, is_label_above: bool) -> str:
    share = x.share(dot.x)
    cx, cy, side = _pct(share), _px(y.share(dot.y)), "start" if share < 0.6 else "end"
    dy = -12 if is_label_above else 22
    label = ""
    if dot.label:
        label = f'<text class="name {side}" x="{cx}" y="{cy}" dy="{dy}">{escape(dot.label)}</text>'
    circle = f'<circle class="{dot.css}" cx="{cx}" cy="{cy}" r="6"><title>{escape(dot.hint)}</title></circle>'
    return circle + label
