"""Small charts as inline SVG. Colours come from the page's CSS variables, so they follow its light or dark style."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, isfinite, log10

from dreamllm.inference.page import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 46, 12, 28
GLYPH = 6.6
"""Width of a bold digit of the labels, at their size of 10."""
MOST_POINTS = 300
SMOOTHING = 0.05
"""Width of the moving average as a share of the curve's points."""


CHART_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.5rem 2rem; }
.charts figure { margin: 0; max-width: 30rem; }
.charts figcaption { display: flex; gap: 0.6rem; align-items: baseline; }
.chart { width: 100%; height: auto; display: block; font: 10px var(--label); fill: var(--muted); }
.chart .grid { stroke: var(--line); } .chart path { fill: none; stroke: var(--accent); stroke-linejoin: round; }
.chart .raw { stroke-width: 1; opacity: 0.3; } .chart .curve { stroke-width: 1.8; }
.chart .dot { fill: var(--accent); } .chart .value { fill: var(--ink); font-weight: 600; }
.scale { position: relative; height: 0.8rem; border-radius: 3px; background: var(--line); }
.scale i { position: absolute; display: block; }
.scale .bar { inset: 0 auto 0 0; background: var(--accent); border-radius: 3px; opacity: 0.55; }
.scale .interval { top: calc(50% - 1px); height: 2px; background: var(--ink); }
.scale .interval::before, .scale .interval::after {
  content: ""; position: absolute; top: -3px; height: 8px; width: 2px; background: var(--ink);
}
.scale .interval::after { right: 0; }
.scale .target { top: -5px; bottom: -5px; width: 0; border-left: 2px dotted var(--ink); }
"""
"""Rules for pages with these charts; line charts stand as figures in a `div` of class `charts`."""


def line_chart(steps: Sequence[float], values: Sequence[float], title: str) -> str:
    """One curve over training steps: every point faint, its moving average strong, the mean of the last as a number.

    The vertical axis begins at zero; both axes are linear. Raises `ValueError` for an empty curve and for values that
    are not finite.
    """
    if not values or len(steps) != len(values) or not all(map(isfinite, values)):
        raise ValueError(f"{title}: a curve needs as many steps as values, at least one, all finite")
    steps, values = _thin(steps, values)
    width = max(1, round(SMOOTHING * len(values)))
    smooth = moving_average(values, width)
    y_ticks = nice_ticks(max(values))
    x_ticks = nice_ticks(max(steps), most=6)
    top, last = y_ticks[-1], max(max(steps), 1e-9)
    final = sum(values[-width:]) / width
    left = max(LEFT, 9 + GLYPH * max(len(short(tick)) for tick in y_ticks))
    right = max(RIGHT, 8 + GLYPH * len(short(final)))

    def x(step: float) -> float:
        return left + (WIDTH - left - right) * step / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    def path(points: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, points, strict=True))

    grid = [
        f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - right:.1f}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{left - 7:.1f}" y="{y(t) + 3.5:.1f}" text-anchor="end">{short(t)}</text>'
        for t in y_ticks
    ]
    grid += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{short(t)}</text>'
        for t in x_ticks
        if t <= last
    ]
    end_x, end_y = x(steps[-1]), y(final)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: '
        f'{values[0]:.3g} at the beginning, {final:.3g} at the end">{"".join(grid)}'
        f'<path class="raw" d="{path(values)}"/><path class="curve" d="{path(smooth)}"/>'
        f'<circle class="dot" cx="{end_x:.1f}" cy="{end_y:.1f}" r="2.5"/>'
        f'<text class="value" x="{end_x + 6:.1f}" y="{end_y + 3.5:.1f}">{short(final)}</text></svg>'
    )


def interval_chart(share: float, interval: tuple[float, float], target: float | None) -> str:
    """A share on a scale from 0 to 100%: a bar, its confidence interval, and a mark where the target is."""
    mark = "" if target is None else f'<i class="target" style="left:{target:.2%}" title="target {target:.0%}"></i>'
    low, high = interval
    return (
        f'<div class="scale"><i class="bar" style="width:{share:.2%}"></i>'
        f'<i class="interval" style="left:{low:.2%};width:{high - low:.2%}"></i>{mark}</div>'
    )


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Mean of the about `width` values around each one; of fewer near the ends, evenly on both sides."""
    means = []
    for i in range(len(values)):
        half = min(width // 2, i, len(values) - 1 - i)
        part = values[i - half : i + half + 1]
        means.append(sum(part) / len(part))
    return means


def nice_ticks(largest: float, most: int = 5) -> list[float]:
    """0 and round numbers up to at least `largest`, at most `most` of them."""
    if largest <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** (floor(log10(largest)) - 1)
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50, 100):
        step = factor * magnitude
        count = ceil(largest / step - 1e-9)
        if count <= most - 1:
            return [round(i * step, 12) for i in range(count + 1)]
    raise AssertionError(f"no round step for {largest}")


def short(value: float) -> str:
    """Three digits in at most seven characters: 0.455, 13.1k, 9.25e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over equal groups, so that a long run stays a light page. The mean loss keeps its last step."""
    size = -(-len(values) // MOST_POINTS)
    groups = range(0, len(values), size)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in groups]
    return [steps[min(i + size, len(steps)) - 1] for i in groups], means
