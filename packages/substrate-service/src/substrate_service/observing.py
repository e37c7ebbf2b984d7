"""What a daemon knows of itself, put together: a log, metrics, stories and the present, all fed by the same events."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from msgspec import Struct

from substrate_seam.events import Emit, Event
from substrate_service.live import Live
from substrate_service.logs import event_log, library_logs_to
from substrate_service.metrics import Metrics
from substrate_service.sinks import Sink, all_to, fan_out
from substrate_service.stories import Stories
from substrate_service.tracing import TracingSettings, traced

STDERR = 2


class Observed(Struct, frozen=True, kw_only=True):
    """Where a daemon's events go (`emit`), and what has become of them."""

    emit: Emit
    metrics: Metrics
    stories: Stories
    live: Live


Observing = Callable[[TracingSettings | None, frozenset[type[Event]]], AbstractContextManager[Observed]]
"""What observes a daemon for the length of a block: it is given where traces go, and kinds of events not to log."""


@contextmanager
def observed(
    tracing: TracingSettings | None = None, quiet: frozenset[type[Event]] = frozenset()
) -> Generator[Observed]:
    """Log all but `quiet` kinds to standard error, count, remember and perhaps trace, for the length of the block."""
    with event_log(STDERR, quiet=quiet) as log, told_to(log.sink, tracing, hide=log.hashed) as observations:
        yield observations


@contextmanager
def told_to(
    log: Sink, tracing: TracingSettings | None = None, *, hide: Callable[[str], str] = lambda _: "#"
) -> Generator[Observed]:
    """Count, remember and perhaps trace for the length of the block, and tell `log` what it takes.

    `hide` makes of a session's id what a trace may show of it.
    """
    metrics, stories = Metrics(), Stories(clock=time.time_ns)
    live = Live(clock=time.monotonic, wall_ms=lambda: time.time_ns() // 1_000_000)
    sinks: list[Sink] = [log, metrics.sink, stories.sink, live.sink]
    with ExitStack() as held:
        if tracing is not None:
            sinks.append(all_to(held.enter_context(traced(tracing, emit=fan_out(*sinks), hide=hide))))
        emit = fan_out(*sinks)
        held.enter_context(library_logs_to(emit))
        yield Observed(emit=emit, metrics=metrics, stories=stories, live=live)
