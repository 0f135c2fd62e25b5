"""The picture of an ablation: every arm's accuracy where modalities agree and where they conflict.

An SVG that stands alone. Its style sheet follows the reader's choice of light or dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ablation.compare import ACCURACIES
from saber_jax.evaluation import charts

WIDTH, LEFT, RIGHT = 760, 130, 96
TOP, ROW, APART, BOTTOM = 40, 40, 14, 44
NAMES = {"consistent": "modalities agree", "conflicting": "modalities conflict"}
STYLE = """
svg { color-scheme: light dark; }
text { font: 12px Helvetica, Arial, sans-serif; fill: #22242a; }
.soft { fill: #5d636e; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.page { fill: #ffffff; } .rule { stroke: #dddcd8; } .band { fill: #f5f4f1; }
.s0 { --series: #2563a8; } .s1 { --series: #b5541c; }
.s0, .s1 { stroke: var(--series); fill: var(--series); }
line.s0, line.s1 { stroke-width: 2; } .seed { fill: none; stroke-width: 1.2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e6e3; } .soft { fill: #a5abb6; }
  .page { fill: #17181c; } .rule { stroke: #373a42; } .band { fill: #1f2126; }
  .s0 { --series: #79b3f2; } .s1 { --series: #f0a36b; }
}
"""


def svg(found: Mapping[str, Any]) -> str:
    """One row an arm of `compare.compared`: a dot with its 95% interval, and a ring every seed."""
    arms = found["arms"]
    bottom = TOP + ROW * len(arms)
    height = bottom + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" '
        'aria-label="Accuracy of every arm of the ablation, with 95% intervals">',
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{height}"/>',
    ]
    for number in range(0, len(arms), 2):
        parts.append(
            f'<rect class="band" x="0" y="{TOP + ROW * number}" width="{WIDTH}" height="{ROW}"/>'
        )
    for share in (0, 25, 50, 75, 100):
        x = _place(share / 100)
        parts.append(charts.svg_line("rule", x, TOP, x, bottom))
        parts.append(charts.svg_text("soft middle", x, bottom + 16, str(share)))
    middle = _place(0.5)
    parts.append(charts.svg_text("soft middle", middle, bottom + 34, "per cent of test clips"))
    for series, measure in enumerate(ACCURACIES):
        x = LEFT + 180 * series
        parts.append(_dot(f"s{series}", x + 4, TOP - 20, 4))
        parts.append(charts.svg_text("", x + 14, TOP - 16, NAMES[measure]))
    parts.append(_dot("seed s1", LEFT + 364, TOP - 20, 3))
    parts.append(charts.svg_text("", LEFT + 374, TOP - 16, "one seed"))
    for number, name in enumerate(arms):
        y = TOP + ROW * (number + 0.5)
        parts.append(charts.svg_text("end", LEFT - 12, y + 4, name))
        for series, measure in enumerate(ACCURACIES):
            at = y + APART * (series - (len(ACCURACIES) - 1) / 2)
            score, seeds = arms[name][measure], found["by_seed"][name][measure]
            parts += _score(f"s{series}", score, seeds, at)
    return "".join([*parts, "</svg>"]) + "\n"


def _score(kind: str, score: Mapping[str, Any], seeds: Sequence[float], y: float) -> list[str]:
    if score["value"] is None:
        return []
    low, high = (_place(bound) for bound in score["interval"])
    return [
        charts.svg_line(kind, low, y, high, y),
        *(_dot(f"seed {kind}", _place(value), y, 3) for value in seeds),
        _dot(kind, _place(score["value"]), y, 4),
        charts.svg_text("soft end", WIDTH - 12, y + 4, f"{100 * score['value']:.1f}"),
    ]


def _place(share: float) -> float:
    return LEFT + share * (WIDTH - RIGHT - LEFT)


def _dot(kind: str, x: float, y: float, radius: int) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
