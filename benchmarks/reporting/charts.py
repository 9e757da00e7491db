"""Charts as inline SVG. Ink and lines come from the page's CSS variables, so they follow its light or dark style."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from math import atan2, ceil, degrees, floor, log10

from benchmarks.reporting.history import Trend
from benchmarks.reporting.records import Record, RecordedCase
from benchmarks.reporting.tables import times
from dreamllm.evaluation.charts import nice_ticks
from dreamllm.inference.page import escape

WIDTH = 760
BARS_WIDTH, BAR, GAP, LABEL, VALUE = 520, 14, 12, 172, 46  # narrow enough to be read on a phone
LETTER, BOLD_LETTER = 6.7, 7.4  # mean widths at the charts' font size
ROOFLINE_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 58, 24, 14, 44
# Middle lightness, so that they stand out on a light and on a dark page.
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b65fc4", "#c9504a", "#1f9fb0", "#8f8a1f", "#8a7a6d")
SHAPES = ("circle", "square", "diamond")


def bar_chart(cases: Sequence[RecordedCase]) -> str:
    """Times as fast as each peer, on one logarithmic scale for the operator: a bar to the right of 1x means faster."""
    ratios = [case.times_as_fast_as(peer) for case in cases for peer in case.peers]
    if not ratios:
        return ""
    low, high = _decade_part(min([*ratios, 1.0]), floor), _decade_part(max([*ratios, 2.0]), ceil)
    labels = max(LABEL, 12 + LETTER * max(len(peer) for case in cases for peer in case.peers))
    width = round(BARS_WIDTH + labels - LABEL)

    def x(ratio: float) -> float:
        return labels + (width - labels - VALUE) * (log10(ratio) - log10(low)) / (log10(high) - log10(low))

    mixed = len({case.caches for case in cases}) > 1
    parts, y = [], float(TOP)
    for case in cases:
        if not case.peers:
            continue
        label = f"{case.label}, {case.caches or 'unknown'} caches" if mixed else case.label
        for line in textwrap.wrap(label, int(width / BOLD_LETTER)):
            y += 14
            parts.append(f'<text class="case" x="0" y="{y:.0f}">{escape(line)}</text>')
        y += 5
        for peer in case.peers:
            ratio = case.times_as_fast_as(peer)
            left, right = sorted((x(1), x(ratio)))
            value = f'x="{max(right, x(1)) + 5:.1f}" y="{y + 10:.0f}"'
            style = "bar" if ratio >= 1 else "bar slower"
            parts.append(
                f'<text x="{labels - 8:.0f}" y="{y + 10:.0f}" text-anchor="end">{escape(peer)}</text>'
                f'<rect class="{style}" x="{left:.1f}" y="{y:.0f}" width="{right - left:.1f}" height="{BAR - 2}"/>'
                f'<text class="value" {value}>{times(ratio)}</text>'
            )
            y += BAR
        y += GAP
    bottom = y
    grid = [
        f'<line class="{"one" if tick == 1 else "grid"}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" '
        f'y2="{bottom:.0f}"/>'
        + "".join(
            f'<text x="{x(tick):.1f}" y="{at:.0f}" text-anchor="middle">{tick:g}x</text>'
            for at in (TOP - 5, bottom + 14)  # a chart of many cases is taller than a window
        )
        for tick in _decade_ticks(low, high)
    ]
    title = f"{cases[0].operator}: times as fast as each peer"
    return _svg(bottom + 20, title, [*grid, *parts], width, "chart bars")


def roofline(record: Record) -> tuple[str, str] | None:
    """Operations per byte against GFLOP/s, both logarithmic, and the legend as HTML. None without such cases.

    Limits are drawn only where the record has measured them.
    """
    cases = [case for case in record.cases if case.flops_per_byte]
    if not cases:
        return None
    copies = sorted(speed for case in record.cases if (speed := case.copy_gb_per_second))
    xs = [case.flops_per_byte or 0.0 for case in cases]
    ys = [case.gflops(name) or 0.0 for case in cases for name in (case.ours, case.reference) if name]
    x_low, x_high = _decade(min(xs), floor), _decade(max(xs), ceil)
    y_low, y_high = _decade(min(ys), floor), _decade(max([*ys, *record.matmul_gflops.values()]), ceil)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (log10(value) - log10(x_low)) / (log10(x_high) - log10(x_low))

    def y(value: float) -> float:
        return (
            ROOFLINE_HEIGHT
            - BOTTOM
            - (ROOFLINE_HEIGHT - TOP - BOTTOM) * ((log10(value) - log10(y_low)) / (log10(y_high) - log10(y_low)))
        )

    parts = _log_axes(x, y, (x_low, x_high), (y_low, y_high))
    peak = max(record.matmul_gflops.values(), default=y_high)
    names = []  # over everything else
    speeds = [("fastest copy", copies[-1], "limit"), ("median copy", statistics.median(copies), "limit usual")]
    for title, speed, style in speeds if copies else []:
        begin, end = max(x_low, y_low / speed), min(x_high, peak / speed)
        if begin < end:
            label = f"{title}, {speed:.3g} GB/s"
            line, name = _limit(x, y, (begin, begin * speed), (end, end * speed), label, style)
            parts.append(line)
            names.append(name)
    for dtype, gflops in record.matmul_gflops.items():
        begin = min(x_high, max(x_low, gflops / copies[-1])) if copies else x_low
        label = f"matrix product {dtype}, {gflops:.4g} GFLOP/s"
        line, name = _limit(x, y, (begin, gflops), (x_high, gflops), label, "limit")
        parts.append(line)
        names.append(name)
    operators = list(dict.fromkeys(case.operator for case in cases))
    marks = {
        name: (COLOURS[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)]) for i, name in enumerate(operators)
    }
    for case in cases:
        colour, shape = marks[case.operator]
        at = x(case.flops_per_byte or 0.0)
        for contender in dict.fromkeys([case.reference or case.ours, case.ours]):
            speed = case.gflops(contender) or 0.0
            title = f"{case.name}: {contender} {speed:.3g} GFLOP/s at {case.flops_per_byte:.3g} operations per byte"
            parts.append(_mark(at, y(speed), colour, shape, contender == case.ours, title))
    legend = "".join(
        f'<span><svg viewBox="0 0 12 12" width="12" height="12">{_mark(6, 6, *marks[name], True, name)}</svg>'
        f" {escape(name)}</span>"
        for name in operators
    )
    svg = _svg(ROOFLINE_HEIGHT, f"Roofline of {record.name}: GFLOP/s over operations per byte", [*parts, *names])
    return svg, f'<div class="legend">{legend}</div>'


def trend_chart(trend: Trend) -> str:
    """Ratios over the commits of a record, evenly spaced; the vertical axis begins at zero."""
    width, height, left, right, top, bottom = 360, 170, 38, 46, 12, 28
    ticks = nice_ticks(max([1.0, *(ratio for _, _, ratio in trend.points)]))

    def x(number: int) -> float:
        return left + (width - left - right) * number / (len(trend.points) - 1)

    def y(ratio: float) -> float:
        return height - bottom - (height - top - bottom) * ratio / ticks[-1]

    parts = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{left - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}x</text>'
        for tick in ticks
    ]
    spots = [(x(number), y(ratio)) for number, (_, _, ratio) in enumerate(trend.points)]
    parts += [f'<path class="curve" d="M{"L".join(f"{a:.1f},{b:.1f}" for a, b in spots)}"/>']
    parts += [
        f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.5">'
        f"<title>{escape(commit)}, {escape(date)}: {times(ratio)}</title></circle>"
        for (a, b), (commit, date, ratio) in zip(spots, trend.points, strict=True)
    ]
    (first, first_date, _), (last, last_date, ratio) = trend.points[0], trend.points[-1]
    # Days where they differ; records of one day are told apart by their commits.
    begin, end = (first, last) if first_date == last_date else (first_date, last_date)
    parts += [
        f'<text x="{left}" y="{height - 8}">{escape(begin)}</text>'
        f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{escape(end)}</text>'
        f'<text class="value" x="{spots[-1][0] + 6:.1f}" y="{spots[-1][1] + 3.5:.1f}">{times(ratio)}</text>'
    ]
    return _svg(height, f"{trend.operator} from {first} to {last}", parts, width)


def _svg(height: float, title: str, parts: Sequence[str], width: int = WIDTH, style: str = "chart") -> str:
    return (
        f'<svg class="{style}" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _decade(value: float, towards) -> float:
    return 10.0 ** towards(log10(value) + (0.02 if towards is ceil else -0.02))


def _decade_part(value: float, towards) -> float:
    """The next of 1, 2, 5, 10, ... below (floor) or above (ceil)."""
    steps = [factor * 10.0**power for power in range(-6, 8) for factor in (1, 2, 5)]
    if towards is floor:
        return max(step for step in steps if step <= value)
    return min(step for step in steps if step >= value)


def _decade_ticks(low: float, high: float) -> list[float]:
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    ticks = [round(factor * 10.0**power, 9) for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def _log_axes(x, y, x_range: tuple[float, float], y_range: tuple[float, float]) -> list[str]:
    def decades(low: float, high: float) -> list[float]:
        return [10.0**power for power in range(round(log10(low)), round(log10(high)) + 1)]

    bottom, right = ROOFLINE_HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in decades(*x_range)
    ]
    parts += [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in decades(*y_range)
    ]
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 34}" text-anchor="middle">operations per byte</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">GFLOP/s</text>')
    return parts


def _limit(x, y, begin: tuple[float, float], end: tuple[float, float], label: str, style: str) -> tuple[str, str]:
    """A line and its name."""
    (x1, y1), (x2, y2) = (x(begin[0]), y(begin[1])), (x(end[0]), y(end[1]))
    line = f'<path class="{style}" d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}"/>'
    if y1 == y2:
        return line, f'<text class="name" x="{x2 - 4:.1f}" y="{y2 - 5:.1f}" text-anchor="end">{escape(label)}</text>'
    # Where the lines begin there are the fewest points; the dashed line's name stands below it.
    below = 15 if "usual" in style else -5
    at = f"translate({x1 + 0.06 * (x2 - x1):.1f} {y1 + 0.06 * (y2 - y1) + below:.1f})"
    turned = f"rotate({degrees(atan2(y2 - y1, x2 - x1)):.1f})"
    return line, f'<text class="name" transform="{at} {turned}">{escape(label)}</text>'


def _mark(x: float, y: float, colour: str, shape: str, filled: bool, title: str) -> str:
    paint = f'fill="{colour}"' if filled else f'fill="none" stroke="{colour}" stroke-width="1.2"'
    if shape == "circle":
        body = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {paint}'
    elif shape == "square":
        body = f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2" {paint}'
    else:
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in ((0, -5), (5, 0), (0, 5), (-5, 0)))
        body = f'<polygon points="{points}" {paint}'
    return f"{body}><title>{escape(title)}</title></{body[1:].split()[0]}>"
