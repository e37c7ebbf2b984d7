"""Traces: events become spans under the Go daemon's names, and are sent by OTLP in the background."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

from substrate_seam.events import Emit, WarningRaised
from substrate_service.tracing.export import Exporter, Line
from substrate_service.tracing.settings import TracingSettings, read_tracing
from substrate_service.tracing.spans import Spans

__all__ = ["TracingSettings", "read_tracing", "traced"]

_HINT = "Calls are not affected. See OTEL_EXPORTER_OTLP_ENDPOINT, or set OTEL_SDK_DISABLED=true."


@contextmanager
def traced(settings: TracingSettings, *, emit: Emit, hide: Callable[[str], str]) -> Generator[Emit]:
    """Turn the events of the block into spans and send them; what can't be sent is told by `emit` and no more.

    `hide` makes of a session's id what may be shown of it.
    """
    for name in settings.unused:
        emit(WarningRaised(message=f"{name} is set and not used", hint="Traces know the variables in the README."))
    exporter = Exporter(
        partial(_open_line, settings), warn=lambda message: emit(WarningRaised(message=message, hint=_HINT))
    )
    exporter.start()
    try:
        yield Spans(exporter.put, clock=time.time_ns, hide=hide)
    finally:
        exporter.close()


def _open_line(settings: TracingSettings) -> Line:
    """Connect, in the exporter's thread: what this imports takes its time and need not be installed."""
    try:
        from substrate_service.tracing.otlp import GrpcLine
    except ImportError as error:
        raise RuntimeError(f"the extra `otel` is not installed ({error})") from error
    return GrpcLine(settings.endpoint, settings.resource)
