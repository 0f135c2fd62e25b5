"""The figure for a paper: scores of every model with their intervals, and the paired change.

An SVG that stands alone: its colours and fonts are its own, so it can be saved from the report and
put into a document.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, LEFT, MIDDLE, GAP, RIGHT = 760, 230, 450, 60, 20
LINE, TOP, BOTTOM = 46, 34, 40
COLOURS = ("#4c6a92", "#c2552d", "#5b8c5a")
INK, SOFT, RULE = "#1a1a1a", "#666666", "#dddddd"
CHANGES = 30
"""Percentage points on either side of no change."""


def svg(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """`rows` are lines of `report_tables.cards`: left each model's share with its 95% interval,
    right the change from the first model to the last over the same clips."""
    height = TOP + LINE * len(rows) + BOTTOM
    bottom = height - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="12" role="img" aria-label="Scores with 95 % intervals">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for share in (0, 25, 50, 75, 100):
        x = _share(share / 100)
        parts.append(_line(x, TOP, x, bottom, RULE))
        parts.append(_text(x, bottom + 16, f"{share}", SOFT, "middle"))
    parts.append(_text(_share(0.5), bottom + 32, "per cent of clips", SOFT, "middle"))
    for number, model in enumerate(models):
        x = LEFT + 90 * number
        parts.append(_dot(x, TOP - 16, number) + _text(x + 8, TOP - 12, model, INK, "start"))
    if len(models) > 1:
        zero = _change(0.0)
        for points in (-CHANGES, 0, CHANGES):
            x = _change(points / 100)
            parts.append(_line(x, TOP, x, bottom, RULE if points else SOFT))
            parts.append(
                _text(x, bottom + 16, f"{points:+d}".replace("-", "\N{MINUS SIGN}"), SOFT, "middle")
            )
        parts.append(_text(zero, bottom + 32, "change, points", SOFT, "middle"))
    for i, row in enumerate(rows):
        y = TOP + LINE * (i + 0.5)
        parts.append(_text(LEFT - 12, y + 4, row["name"], INK, "end"))
        for number, value in enumerate(row["values"]):
            if value and value["value"] is not None:
                at = y + 9 * (number - (len(row["values"]) - 1) / 2)
                parts.append(_interval(_share, value, at, number))
        gain = row["gain"]
        if gain and gain["interval"]:
            parts.append(_interval(_change, gain, y, len(models) - 1))
    return "".join([*parts, "</svg>"])


def link(drawn: str) -> str:
    """A data: URI of the figure, for a link that saves it."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()


def _share(value: float) -> float:
    return LEFT + value * (MIDDLE - LEFT)


def _change(value: float) -> float:
    left = MIDDLE + GAP
    share = (100 * value + CHANGES) / (2 * CHANGES)
    return left + min(max(share, 0.0), 1.0) * (WIDTH - RIGHT - left)


def _interval(place: Any, score: Mapping[str, Any], y: float, number: int) -> str:
    low, high = score.get("interval") or (score["value"], score["value"])
    colour = COLOURS[number % len(COLOURS)]
    line = _line(place(low), y, place(high), y, colour, 2)
    return line + _dot(place(score["value"]), y, number)


def _dot(x: float, y: float, number: int) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )
