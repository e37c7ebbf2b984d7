"""Which nodes there are. So far a list that people write: `id=url,…`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from msgspec import Struct

from substrate_cluster.ingress.hosts import is_loopback

_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
ACCEPTED = "a list such as `node-a=http://127.0.0.1:8443,node-b=https://10.0.0.7:8443`"


class NodeAddress(Struct, frozen=True, kw_only=True):
    """Where one node is spoken to: over TLS (`https`) or in plain text, at a host and port."""

    node_id: str
    host: str
    port: int
    tls: bool

    @property
    def loopback(self) -> bool:
        """Whether the node is on this machine."""
        return is_loopback(self.host)


def parse_nodes(text: str) -> dict[str, NodeAddress]:
    """The nodes of a list, by id. Raises `ValueError` that names every bad entry and what is accepted."""
    nodes: dict[str, NodeAddress] = {}
    problems: list[str] = []
    for entry in (part.strip() for part in text.split(",")):
        node_id, _, url = entry.partition("=")
        try:
            address = _address(node_id.strip(), url.strip())
        except ValueError as error:
            problems.append(f"{entry!r}: {error}")
            continue
        if address.node_id in nodes:
            problems.append(f"{entry!r}: node {address.node_id!r} is named twice")
        nodes[address.node_id] = address
    if problems:
        raise ValueError(f"{'; '.join(problems)}; accepted is {ACCEPTED}")
    return nodes


def _address(node_id: str, url: str) -> NodeAddress:
    if not _ID.fullmatch(node_id):
        raise ValueError("it does not begin with `id=`, an id of letters, digits, `.`, `_` and `-`")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port is None:
        raise ValueError("its address is not `http://host:port` or `https://host:port`")
    if parts.path.rstrip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError("its address has more than a host and a port")
    return NodeAddress(node_id=node_id, host=parts.hostname, port=parts.port, tls=parts.scheme == "https")
