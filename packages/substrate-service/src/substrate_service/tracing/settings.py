"""What the environment says about traces: the standard OTEL_* variables, as far as they mean anything here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from msgspec import Struct

from substrate_seam.tracing import Join, Sampler, joining
from substrate_service.settings import EnvironmentReader

_ENDPOINT = re.compile(r"(?:http://)?((?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})/?")
_SAMPLERS: Final = {
    "always_on": Sampler(parent=False, ratio=1.0),
    "always_off": Sampler(parent=False, ratio=0.0),
    "traceidratio": Sampler(parent=False, ratio=-1.0),
    "parentbased_always_on": Sampler(parent=True, ratio=1.0),
    "parentbased_always_off": Sampler(parent=True, ratio=0.0),
    "parentbased_traceidratio": Sampler(parent=True, ratio=-1.0),
}
_READ: Final = frozenset(
    {
        "OTEL_SDK_DISABLED",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_SERVICE_NAME",
        "OTEL_SERVICE_VERSION",
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_TRACES_SAMPLER",
        "OTEL_TRACES_SAMPLER_ARG",
    }
)


class TracingSettings(Struct, frozen=True, kw_only=True):
    """Where spans go (`host:port`, gRPC without TLS), whose they are, and which are kept.

    `unused` names the variables that were set in vain.
    """

    endpoint: str
    resource: dict[str, str]
    sampler: Sampler
    unused: tuple[str, ...] = ()

    @property
    def join(self) -> Join:
        """Which trace context the guest of a call is given."""
        return joining(self.sampler)


def read_tracing(
    reader: EnvironmentReader, environment: Mapping[str, str], *, service: str, version: str
) -> TracingSettings | None:
    """The settings of traces; None when there are to be none. Problems stay in the reader."""
    disabled = reader.boolean("OTEL_SDK_DISABLED", default=False)
    if disabled or not environment.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    endpoint = reader.matching("OTEL_EXPORTER_OTLP_ENDPOINT", _ENDPOINT, "host:port, or http://host:port (gRPC)")
    reader.choice("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", among=("grpc",))
    sampler = _SAMPLERS[reader.choice("OTEL_TRACES_SAMPLER", "parentbased_always_on", among=tuple(_SAMPLERS))]
    ratio = reader.fraction("OTEL_TRACES_SAMPLER_ARG", 1.0)
    return TracingSettings(
        endpoint=endpoint or "",
        resource={
            **_attributes(reader),
            "service.name": reader.text("OTEL_SERVICE_NAME", service),
            "service.version": reader.text("OTEL_SERVICE_VERSION", version),
        },
        sampler=Sampler(sampler.parent, ratio) if sampler.ratio < 0 else sampler,
        unused=tuple(name for name, value in sorted(environment.items()) if value and _is_unused(name)),
    )


def _attributes(reader: EnvironmentReader) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in reader.names("OTEL_RESOURCE_ATTRIBUTES")]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        reader.refuse("OTEL_RESOURCE_ATTRIBUTES", "key=value, with commas between")
    return {key.strip(): unquote(value.strip()) for key, _, value in pairs}


def _is_unused(name: str) -> bool:
    return name.startswith("OTEL_") and name not in _READ
