"""The settings of node-daemon: the environment, read once, every problem told at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from msgspec import Struct

from substrate_seam.events import Event, ExchangeEnded
from substrate_seam.tls import plaintext_refusal
from substrate_service.address import Address, TcpAddress
from substrate_service.settings import EnvironmentReader
from substrate_service.shared_settings import NodeSettings, TlsFiles, read_node, read_quiet, read_tls
from substrate_service.tracing import TracingSettings, read_tracing

PREFIX = "NODE_DAEMON_"


class Settings(Struct, frozen=True, kw_only=True):
    """What node-daemon was told. `agents` are the certificate names that may command it (empty: any that verify).

    `drain_within_s` is how long running invocations have when it is asked to stop.
    """

    listen: Address
    admin_listen: Address
    tls: TlsFiles | None
    agents: tuple[str, ...]
    body_limit_bytes: int
    drain_within_s: float
    node: NodeSettings
    quiet: frozenset[type[Event]]
    tracing: TracingSettings | None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the environment. Raises `SettingsInvalid` with every problem."""
    reader = EnvironmentReader(environment, prefix=PREFIX)
    settings = Settings(
        listen=reader.address(f"{PREFIX}LISTEN_ADDR", TcpAddress("127.0.0.1", 8443)),
        admin_listen=reader.address(f"{PREFIX}ADMIN_LISTEN_ADDR", TcpAddress("127.0.0.1", 8081)),
        tls=read_tls(reader, PREFIX),
        agents=reader.names(f"{PREFIX}AGENTS"),
        body_limit_bytes=reader.size(f"{PREFIX}BODY_LIMIT", 8 * 1024 * 1024),
        drain_within_s=reader.duration(f"{PREFIX}DRAIN_TIMEOUT", 120.0, zero=True),
        node=read_node(reader, PREFIX, environment),
        quiet=read_quiet(reader, PREFIX, call=ExchangeEnded),
        tracing=read_tracing(reader, environment, service="node-daemon", version=version("substrate-node-daemon")),
    )
    insecure = reader.boolean(f"{PREFIX}INSECURE_WIRE", default=False)
    refusal = plaintext_refusal(
        PREFIX, tls=settings.tls is not None, loopback=settings.listen.loopback, insecure=insecure
    )
    if refusal is not None:
        reader.refuse(f"{PREFIX}LISTEN_ADDR", f"an address of this machine alone: {refusal}")
    reader.finish()
    return settings
