"""The line to a collector: OTLP over gRPC, without TLS. Needs the extra `otel`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1 import trace_pb2 as otlp

from substrate_service.tracing.export import NotSent
from substrate_service.tracing.spans import Span

_SAMPLED = 1


class GrpcLine:
    """Sends batches to `endpoint` (`host:port`) in the name of `resource`."""

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._resource = Resource(attributes=_attributes(resource))
        self._channel = grpc.insecure_channel(endpoint)
        self._export = self._channel.unary_unary(
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            request_serializer=ExportTraceServiceRequest.SerializeToString,
            response_deserializer=ExportTraceServiceResponse.FromString,
        )

    def send(self, spans: list[Span], *, within_s: float) -> None:
        """Send a batch. Raises `NotSent`."""
        request = ExportTraceServiceRequest(
            resource_spans=[otlp.ResourceSpans(resource=self._resource, scope_spans=_by_scope(spans))]
        )
        try:
            self._export(request, timeout=within_s)
        except grpc.RpcError as error:
            raise NotSent(f"{self._endpoint} answers {error.code().name}: {error.details()}") from error
        except ValueError as error:  # the channel was closed meanwhile
            raise NotSent(str(error)) from error

    def close(self) -> None:
        """End it, and whatever is being sent."""
        self._channel.close()


def _by_scope(spans: Iterable[Span]) -> list[otlp.ScopeSpans]:
    scopes: dict[str, list[otlp.Span]] = {}
    for span in spans:
        scopes.setdefault(span.scope, []).append(encoded(span))
    return [otlp.ScopeSpans(scope=InstrumentationScope(name=name), spans=of) for name, of in scopes.items()]


def encoded(span: Span) -> otlp.Span:
    """A span as it travels."""
    return otlp.Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id),
        flags=_SAMPLED,
        name=span.name,
        kind=otlp.Span.SPAN_KIND_SERVER if span.server else otlp.Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        attributes=_attributes(span.attributes),
        events=[
            otlp.Span.Event(time_unix_nano=each.at_ns, name=each.name, attributes=_attributes(each.attributes))
            for each in span.moments
        ],
        status=otlp.Status(code=otlp.Status.STATUS_CODE_ERROR, message=span.error) if span.error else None,
    )


def _attributes(attributes: Mapping[str, str | bool | int | float]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_value(value)) for key, value in attributes.items()]


def _value(value: str | bool | int | float) -> AnyValue:  # noqa: FBT001  # one of four, told apart by its type
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=str(value))
