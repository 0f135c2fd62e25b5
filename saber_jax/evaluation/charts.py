"""Charts as inline SVG, in colours that the page's style sheet chooses."""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 34
MOST_POINTS = 300
SMOOTHED = 40
MOST_HOVERED = 60

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A horizontal line to compare a curve with."""

    value: float
    label: str


def line_chart(
    curves: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    reference: Reference | None = None,
    logarithmic: bool = False,
) -> str:
    """Curves over (x, y) points, each ordered by x; curve i has the class "curve ci".

    Long curves are drawn as means of neighbours. A curve of more than SMOOTHED points is drawn
    faintly, under its moving mean. Points show their values on hover. With `logarithmic` the y axis
    is so, where all y are above 0 and span more than a factor of ten. Raises ValueError without any
    point.
    """
    if not any(curves.values()):
        raise ValueError(f"There is nothing to draw for {y_label}.")
    xs = [x for points in curves.values() for x, _ in points]
    drawn = {name: thinned(points, MOST_POINTS) for name, points in curves.items() if points}
    ys = [y for points in drawn.values() for _, y in points]
    x_ticks = ticks(min(xs), max(xs), 5)
    logarithmic = logarithmic and max(ys) > 10 * min(ys) > 0
    shown = _span([*ys, reference.value] if reference else ys)
    y_ticks = decades(*shown) if logarithmic else ticks(*shown, 5)
    scale = math.log10 if logarithmic else float
    x_range = (min(xs), max(max(xs), min(xs) + 1e-9))
    y_range = (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> Point:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (scale(y) - scale(y_range[0])) / (scale(y_range[1]) - scale(y_range[0]))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y_label} by {x_label}">']
    for tick in y_ticks:
        _, y = place(x_range[0], tick)
        parts.append(svg_line("rule", LEFT, y, WIDTH - RIGHT, y))
        parts.append(svg_text("tick end", LEFT - 6, y + 4, _number(tick)))
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x, _ = place(tick, y_range[0])
            parts.append(svg_text("tick middle", x, HEIGHT - BOTTOM + 16, _number(tick)))
    parts.append(svg_text("tick middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label))
    for number, (name, points) in enumerate(drawn.items()):
        lines = {"": points}
        if len(points) > SMOOTHED:
            lines = {" raw": points, "": smoothed(points, len(points) // SMOOTHED)}
        for kind, line in lines.items():
            curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
            parts.append(f'<polyline class="curve c{number}{kind}" points="{curve}"/>')
        for x, y in points[:: -(-len(points) // MOST_HOVERED)]:
            across, down = place(x, y)
            said = html.escape(f"{name}, {x_label} {_number(round(x))}: {y:.4g}")
            parts.append(
                f'<circle class="hover c{number}" cx="{across:.1f}" cy="{down:.1f}" r="5">'
                f"<title>{said}</title></circle>"
            )
    if reference:
        _, y = place(x_range[0], reference.value)
        parts.append(svg_line("reference", LEFT, y, WIDTH - RIGHT, y))
        parts.append(svg_text("note end", WIDTH - RIGHT - 2, y - 5, reference.label))
    return "".join([*parts, "</svg>"])


def smoothed(points: Sequence[Point], reach: int) -> list[Point]:
    """Each point's y as the mean over the `reach` points before and after it, as far as there are
    as many on both sides."""
    means = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        part = points[i - near : i + near + 1]
        means.append((x, math.fsum(y for _, y in part) / len(part)))
    return means


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose `low` and `high`, both above 0."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(i for i, step in enumerate(steps) if step >= high * (1 - 1e-9))
    return steps[first : max(last, first + 1) + 1]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: means over equally long stretches."""
    stretch = -(-len(points) // most)
    means = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        means.append(tuple(math.fsum(axis) / len(part) for axis in zip(*part, strict=True)))
    return means


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, `most` steps or fewer."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


def _span(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def svg_line(name: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A line whose style the class `name` gives."""
    return f'<line class="{name}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_text(name: str, x: float, y: float, text: str) -> str:
    """A text, which is markup, with its baseline at `y`."""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{text}</text>'
