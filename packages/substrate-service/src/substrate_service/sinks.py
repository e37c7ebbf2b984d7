"""Where events go, when they go to several places."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from substrate_seam.events import DefectFound, Emit, Event

Sink = Callable[[type[Event]], Emit | None]
"""What one place does with events of a kind; None is nothing. It is asked once for each kind."""


def all_to(emit: Emit) -> Sink:
    """A place that takes events of every kind."""
    return lambda _: emit


def fan_out(*sinks: Sink) -> Emit:
    """An `Emit` that gives every event to those of `sinks` that take its kind, in order.

    One that raises never harms the others; they hear of its first failure as a `DefectFound`.
    """
    failed: set[Sink] = set()
    takers: dict[type[Event], list[tuple[Sink, Emit]]] = {}

    def emit(event: Event) -> None:
        kind = type(event)
        if kind not in takers:
            takers[kind] = [(sink, take) for sink in sinks if (take := sink(kind)) is not None]
        for sink, take in takers[kind]:
            try:
                take(event)
            except Exception as exc:  # noqa: BLE001  # whoever emits must not suffer from whoever listens
                if sink not in failed:
                    failed.add(sink)
                    emit(DefectFound(message=f"an event sink failed: {exc!r}", traceback=traceback.format_exc()))

    return emit
