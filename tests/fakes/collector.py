"""A collector of traces: the real protocol, OTLP over gRPC, on a free port of the loopback."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

PATIENCE_S = 30.0


class Received:
    """One span as it arrived, and whose it is."""

    def __init__(self, span: Any, service: str, scope: str) -> None:
        self.service = service
        self.scope = scope
        self.name = span.name
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.kind = span.kind
        self.took_ms = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        self.start_ns, self.end_ns = span.start_time_unix_nano, span.end_time_unix_nano
        self.error = span.status.message
        self.attributes = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}
        self.events = [event.name for event in span.events]


class Collector(TraceServiceServicer):
    """Keeps every span; `refuse` makes it answer UNAVAILABLE, `stall` not at all."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.requests = 0
        self.refuse = False
        self.endpoint = ""
        self._news = Condition()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # the name is gRPC's
        """Take a batch."""
        with self._news:
            self.requests += 1
            self._news.notify_all()
            if self.refuse:
                context.abort(grpc.StatusCode.UNAVAILABLE, "come back later")
            for resource in request.resource_spans:
                labels = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [Received(span, labels["service.name"], scope.scope.name) for span in scope.spans]
        return ExportTraceServiceResponse()

    def wait(self, condition: Any) -> None:
        """Wait until `condition` holds; it is looked at with each batch."""
        with self._news:
            assert self._news.wait_for(condition, PATIENCE_S), [span.name for span in self.spans]

    def named(self, name: str) -> list[Received]:
        """The spans of that name so far."""
        return [span for span in self.spans if span.name == name]


@contextmanager
def collector() -> Generator[Collector]:
    """Collect for the length of the block."""
    there = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(there, server)
    there.endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield there
    finally:
        server.stop(None).wait()
