"""The settings of cluster-agent: the environment, read once, every problem told at once."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from msgspec import Struct

from substrate_cluster.nodes.discovery import ACCEPTED, NodeAddress, parse_nodes
from substrate_seam.events import Event
from substrate_seam.tls import plaintext_refusal
from substrate_service.settings import EnvironmentReader
from substrate_service.shared_settings import FrontSettings, TlsFiles, read_front, read_quiet, read_tls
from substrate_service.tracing import TracingSettings, read_tracing

PREFIX = "CLUSTER_AGENT_"


class Settings(Struct, frozen=True, kw_only=True):
    """What cluster-agent was told: its front, and its nodes by id."""

    front: FrontSettings
    nodes: dict[str, NodeAddress]
    tls: TlsFiles | None
    quiet: frozenset[type[Event]]
    tracing: TracingSettings | None


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the environment. Raises `SettingsInvalid` with every problem."""
    reader = EnvironmentReader(environment, prefix=PREFIX)
    front, tls = read_front(reader, PREFIX), read_tls(reader, PREFIX)
    nodes = _read_nodes(reader)
    insecure = reader.boolean(f"{PREFIX}INSECURE_WIRE", default=False)
    for node in nodes.values():
        if node.tls and tls is None:
            reader.refuse(
                f"{PREFIX}NODES", f"{node.node_id!r} over https only with {PREFIX}TLS_CERT_FILE, _KEY_FILE and _CA_FILE"
            )
        refusal = plaintext_refusal(PREFIX, tls=node.tls, loopback=node.loopback, insecure=insecure)
        if refusal is not None:
            reader.refuse(f"{PREFIX}NODES", f"{node.node_id!r} over http only on this machine: {refusal}")
    if front.workloads is None and front.workloads_file is None:
        reader.refuse(
            f"{PREFIX}WORKLOADS_FILE", f"the path of a workload table, or {PREFIX}WORKLOADS with the table itself"
        )
    quiet = read_quiet(reader, PREFIX)
    tracing = read_tracing(reader, environment, service="cluster-agent", version=version("substrate-cluster-agent"))
    reader.finish()
    return Settings(front=front, nodes=nodes, tls=tls, quiet=quiet, tracing=tracing)


def _read_nodes(reader: EnvironmentReader) -> dict[str, NodeAddress]:
    text = reader.text(f"{PREFIX}NODES", None)
    if text is None:
        reader.refuse(f"{PREFIX}NODES", ACCEPTED)
        return {}
    try:
        return parse_nodes(text)
    except ValueError as error:
        reader.refuse(f"{PREFIX}NODES", str(error))
        return {}
