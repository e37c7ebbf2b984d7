"""The settings of fc-invoke: the environment, read once, every problem told at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from msgspec import Struct

from substrate_seam.events import Event
from substrate_service.settings import EnvironmentReader
from substrate_service.shared_settings import FrontSettings, NodeSettings, read_front, read_node, read_quiet
from substrate_service.tracing import TracingSettings, read_tracing

PREFIX = "FC_INVOKE_"

UNUSED = {
    "FC_INVOKE_CANONICAL_VSOCK_DIR": "clones have their own sockets without it",
    "FC_INVOKE_SNAPSHOT_ROOT": "bases lie in FC_INVOKE_STATE_ROOT",
    "FC_INVOKE_EGRESS_SIDECAR_ADDR": "guests of this version have no egress",
}
"""Variables of the Go daemon that are accepted, and why they change nothing."""


class Settings(Struct, frozen=True, kw_only=True):
    """What fc-invoke was told, and `warnings` about what it was told in vain."""

    front: FrontSettings
    node: NodeSettings
    quiet: frozenset[type[Event]]
    tracing: TracingSettings | None
    warnings: tuple[str, ...]


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the environment. Raises `SettingsInvalid` with every problem."""
    reader = EnvironmentReader(environment, prefix=PREFIX)
    front = read_front(reader, PREFIX)
    node = read_node(reader, PREFIX, environment)
    quiet = read_quiet(reader, PREFIX)
    tracing = read_tracing(reader, environment, service="fc-invoke", version=version("fc-invoke"))
    reader.finish(known=UNUSED)
    warnings = tuple(f"{name} is set and not used: {why}" for name, why in UNUSED.items() if environment.get(name))
    return Settings(front=front, node=node, quiet=quiet, tracing=tracing, warnings=warnings)
