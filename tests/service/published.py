"""The page of event and metric names, made from the code: `uv run python tests/service/published.py` writes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec

from substrate_seam import events
from substrate_seam.events import Event
from substrate_service import logs
from substrate_service.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "events-and-metrics.md"

_HEAD = """\
# Events and metrics

What happens is told as typed events, one per state change. A daemon turns each of them into metrics on the admin
listener's `/metrics`, and, if it belongs to an invocation, into a step of the story that `fc-invoke explain <id>`
tells. Its log (JSON, or readable on a terminal) has a line for each, but for the steps of a call that goes well: such a
call is one line, `invocation.ended`, or `exchange.ended` where only guests are run. With `*_LOG_LEVEL=debug` every step
is a line. Names on this page are kept: charts, scalers and pages rest on them.

The steps: {steps}.

This page is made from the code, and a test holds it to the code.

## Events

A log line has `time`, `level` and `event`, and the fields below; a field that has its default may be left out. Fields
ending in `_ms`, `_s` and `_mib` are in that unit. Session ids and URLs are hashed.
"""

_METRICS_HEAD = """
## Metrics

Labels never hold callers, sessions, guests or nodes, so that their number is bounded. Times are histograms in seconds.
Besides these there are the `process_*` metrics of the Prometheus client.

| name | type | labels | meaning |
| --- | --- | --- | --- |
"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD.format(steps=", ".join(f"`{name}`" for name in sorted(map(_tag, logs.STEPS))))]
    for kind in sorted(_kinds(), key=_tag):
        fields = ", ".join(f"`{name}`" for name in get_type_hints(kind, vars(events)) if not name.startswith("_"))
        about = " ".join((inspect.getdoc(kind) or "").split())
        parts.append(f"\n- **`{_tag(kind)}`**: {about}\n  Fields: {fields}.")
    return "".join([*parts, "\n", _METRICS_HEAD, *(f"{row}\n" for row in sorted(_metric_rows()))])


def _kinds() -> Iterator[type[Event]]:
    for module in (events, logs):
        for kind in vars(module).values():
            ours = inspect.isclass(kind) and kind.__module__ == module.__name__
            if ours and issubclass(kind, Event) and kind is not Event:
                yield kind


def _tag(kind: type[Event]) -> str:
    return str(msgspec.inspect.type_info(kind).tag)  # type: ignore[attr-defined]  # a Struct's has one


def _metric_rows() -> Iterator[str]:
    for metric in Metrics().published():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        yield f"| `{metric.name}` | {metric.kind} | {labels} | {metric.about} |"


if __name__ == "__main__":
    PAGE.write_text(render())
