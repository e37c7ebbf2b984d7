"""What a daemon knows of itself, put together: a log, metrics, stories and the present, all fed by the same events."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from msgspec import Struct

from substrate_seam.events import Emit
from substrate_service.live import Live
from substrate_service.logs import event_log, library_logs_to
from substrate_service.metrics import Metrics
from substrate_service.sinks import fan_out
from substrate_service.stories import Stories

STDERR = 2


class Observed(Struct, frozen=True, kw_only=True):
    """Where a daemon's events go (`emit`), and what has become of them."""

    emit: Emit
    metrics: Metrics
    stories: Stories
    live: Live


@contextmanager
def observed() -> Generator[Observed]:
    """Log to standard error, count and remember, for the length of the block."""
    with event_log(STDERR) as log, told_to(log) as observations:
        yield observations


@contextmanager
def told_to(log: Emit) -> Generator[Observed]:
    """Count and remember for the length of the block, and tell every event to `log`."""
    metrics, stories = Metrics(), Stories(clock=time.time_ns)
    live = Live(clock=time.monotonic, wall_ms=lambda: time.time_ns() // 1_000_000)
    emit = fan_out(log, metrics, stories.emit, live)
    with library_logs_to(emit):
        yield Observed(emit=emit, metrics=metrics, stories=stories, live=live)
