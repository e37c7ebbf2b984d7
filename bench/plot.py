"""Figures drawn as SVG: a bar for each median, a line from the least to the most, and a mark where the target is."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.results import Figure, Outcome, bound, brief

_WIDTH, _LABELS, _BAR, _GAP, _EDGE, _VALUES = 920, 380, 16, 10, 12, 150
_COLOURS = {"reached": "#2f7d4f", "missed": "#b5482a", "": "#4a6fa5"}
_SCALE = _WIDTH - _LABELS - _VALUES - 2 * _EDGE
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:13px}.v{fill:#555}"
    ".s{stroke:#222;stroke-width:1.5}.g{stroke:#222;stroke-width:2;stroke-dasharray:3 2}"
)


def drawn(outcomes: Sequence[Outcome]) -> str:
    """All figures of all scenarios, each bar on the scale of its own figure."""
    parts: list[str] = []
    y = _EDGE
    for outcome in outcomes:
        if not outcome.figures:
            continue
        y += 16
        parts.append(_text(_EDGE, y, outcome.scenario, "t"))
        y += _GAP
        for figure in outcome.figures:
            parts += _bar(figure, y)
            y += _BAR + _GAP
        y += _GAP
    size = f'width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{_STYLE}</style>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _bar(figure: Figure, y: float) -> list[str]:
    most = max(*figure.samples, figure.target or 0.0, 1e-9) * 1.05

    def x(value: float) -> float:
        return _LABELS + value / most * _SCALE

    middle = y + _BAR / 2
    least, largest = x(min(figure.samples)), x(max(figure.samples))
    colour, width = _COLOURS[figure.verdict], x(figure.median) - _LABELS
    parts = [
        _text(_EDGE, y + 12, figure.about),
        f'<rect x="{_LABELS}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<line class="s" x1="{least:.1f}" y1="{middle}" x2="{largest:.1f}" y2="{middle}"/>',
        _text(_WIDTH - _VALUES - _EDGE + 8, y + 12, f"{brief(figure.median)} {figure.unit}"),
    ]
    if figure.target is not None:
        place = x(figure.target)
        parts += [
            f'<line class="g" x1="{place:.1f}" y1="{y - 2}" x2="{place:.1f}" y2="{y + _BAR + 2}"/>',
            _text(_WIDTH - _EDGE - 52, y + 12, bound(figure), "v"),
        ]
    return parts


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{attribute}>{escape(words)}</text>'
