"""Where events go, when they go to several places."""

from __future__ import annotations

import traceback

from substrate_seam.events import DefectFound, Emit, Event


def fan_out(*emits: Emit) -> Emit:
    """An `Emit` that gives every event to all of `emits`, in order.

    One that raises never harms the others; they hear of its first failure as a `DefectFound`.
    """
    failed: set[Emit] = set()

    def emit(event: Event) -> None:
        for each in emits:
            try:
                each(event)
            except Exception as exc:  # noqa: BLE001  # whoever emits must not suffer from whoever listens
                if each not in failed:
                    failed.add(each)
                    emit(DefectFound(message=f"an event sink failed: {exc!r}", traceback=traceback.format_exc()))

    return emit
