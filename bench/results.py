"""What was measured, and what it means: samples by variant, and the ratios of two variants taken in the same repeat."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from msgspec import Struct

P50, CPU, RATE = "p50, µs", "CPU per call, µs", "rate, calls/s"
"""Quantities are named with their unit."""


class Row(Struct, frozen=True):
    """One quantity of one variant, a sample for each repeat."""

    variant: str
    quantity: str
    samples: list[float]


class Figure(Struct, frozen=True):
    """One quantity and its target: `at_most` that or, if false, at least. Without a target it is for the record."""

    about: str
    unit: str
    samples: list[float]
    target: float | None = None
    at_most: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "reached" if (self.median <= self.target) == self.at_most or self.median == self.target else "missed"


class Outcome(Struct, frozen=True):
    """One scenario: its rows and its figures."""

    scenario: str
    about: str
    rows: list[Row]
    figures: list[Figure]


class Notebook:
    """Collects samples while a scenario runs."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], list[float]] = {}

    def note(self, variant: str, quantities: Mapping[str, float]) -> None:
        """Add a sample to each quantity."""
        for quantity, value in quantities.items():
            self._samples.setdefault((variant, quantity), []).append(value)

    def rows(self) -> list[Row]:
        return [Row(*key, samples) for key, samples in self._samples.items()]

    def samples(self, variant: str, quantity: str) -> list[float]:
        """All samples of a quantity."""
        return self._samples[variant, quantity]

    def ratio(
        self,
        about: str,
        quantity: str,
        variants: tuple[str, str],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """The first variant over the second, repeat by repeat: what disturbs one of them mostly disturbs both."""
        over, under = (self.samples(variant, quantity) for variant in variants)
        ratios = [one / other for one, other in zip(over, under, strict=True)]
        target = at_least if at_most is None else at_most
        return Figure(about, "x", ratios, target=target, at_most=at_least is None)

    def figure(
        self, about: str, variant: str, quantity: str, *, at_most: float | None = None, at_least: float | None = None
    ) -> Figure:
        """A quantity as it is."""
        target = at_least if at_most is None else at_most
        unit = quantity.rpartition(", ")[2]
        return Figure(about, unit, self.samples(variant, quantity), target=target, at_most=at_least is None)


def spread(samples: Sequence[float]) -> str:
    """`median (least-most)`."""
    middle, least, most = statistics.median(samples), min(samples), max(samples)
    return f"{brief(middle)} ({brief(least)}-{brief(most)})"


def brief(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def bound(figure: Figure) -> str:
    """The target in words; nothing where there is none."""
    return "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}"


def as_text(outcome: Outcome) -> str:
    """A scenario as its reader sees it in a terminal; good Markdown too."""
    lines = [f"## {outcome.scenario}", "", outcome.about, ""]
    lines += ["| figure | median (least-most) | target | |", "| --- | --- | --- | --- |"]
    for figure in outcome.figures:
        measured = f"{spread(figure.samples)} {figure.unit}"
        lines.append(f"| {figure.about} | {measured} | {bound(figure)} | {figure.verdict} |")
    lines.append("")
    quantities = list(dict.fromkeys(row.quantity for row in outcome.rows))
    lines += ["| | " + " | ".join(quantities) + " |", "| --- |" + " --- |" * len(quantities)]
    cells = {(row.variant, row.quantity): spread(row.samples) for row in outcome.rows}
    for variant in dict.fromkeys(row.variant for row in outcome.rows):
        lines.append("| " + " | ".join([variant, *(cells.get((variant, each), "") for each in quantities)]) + " |")
    lines.append("")
    return "\n".join(lines)
