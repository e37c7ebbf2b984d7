"""Under which names a listener may be called, and that no web page may call it.

A page in a developer's browser can send requests to loopback, and by DNS rebinding even read the answers. The name in
`Host`, `Origin` and `Sec-Fetch-Site` give it away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from substrate_cluster.ingress.errors import refused
from substrate_seam.errors import Reason

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_ADDRESS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104  # recognised here, bound nowhere
_REMEMBERED: Final = 64
_OWN_SITES: Final = ([b"same-origin"], [b"none"])


def host_of(address: str) -> str:
    """The host of `host:port`, `[v6]:port`, `:port` or a bare host, in lower case without brackets and final dot."""
    host, colon, _ = address.rpartition(":")
    if not colon or address.endswith("]") or (":" in host and not host.startswith("[")):
        host = address
    return host.strip("[]").removesuffix(".").lower()


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address` (`unix:/path` too); a name other than `localhost` may be anywhere."""
    host = host_of(address)
    return address.startswith("unix:") or host == "localhost" or (_is_literal(host) and ip_address(host).is_loopback)


def default_hosts(address: str) -> frozenset[str]:
    """The names that a listener bound to `address` answers to when nobody says otherwise."""
    return _LOOPBACK if address.startswith("unix:") else _LOOPBACK | {host_of(address)}


def refuse_open(public_address: str, *, has_auth: bool, has_process_workloads: bool) -> str | None:
    """Why a daemon must not start on this address, or None: strangers get no guests that share the host's kernel."""
    if has_auth or not has_process_workloads or is_loopback(public_address):
        return None
    return (
        f"{public_address!r} can be reached from other machines, callers are not authenticated, and some workloads run "
        "in process guests, which are no security boundary: listen on 127.0.0.1, give the callers tokens, or run "
        "these workloads in microVMs"
    )


class HostRule:
    """Refuses requests for names that are not ours, and requests that a web page of another origin makes.

    `allowed` holds host names and addresses without a port. `*` stands for every name; the address of every interface
    (`0.0.0.0`, `::`) for every literal address, which DNS cannot rebind. `prefix` is that of the daemon's settings.
    """

    def __init__(self, allowed: Collection[str], *, prefix: str = "") -> None:
        self._setting = f"{prefix}ALLOWED_HOSTS"
        hosts = {host_of(host) for host in allowed}
        self._names = hosts - _EVERY_ADDRESS
        self._any_name = "*" in hosts
        self._any_address = not hosts.isdisjoint(_EVERY_ADDRESS)
        self._is_served = lru_cache(_REMEMBERED)(self._serves)  # the same few come all the time

    def check(self, ours: Mapping[bytes, list[bytes]]) -> bytes:
        """The request's `Host`; raises `bad-request` or `forbidden`."""
        hosts = ours.get(b"host", ())
        if len(hosts) != 1:
            raise refused(Reason.BAD_REQUEST, f"the request has {len(hosts)} Host fields; accepted is exactly one")
        host = hosts[0]
        if not self._is_served(host):
            found = host[:100].decode("latin-1")
            raise _forbidden(f"Host {found!r} is not served here: see the setting {self._setting}.")
        for origin in ours.get(b"origin", ()):
            if origin.partition(b"://")[2].lower() != host.lower():
                raise _forbidden("Web pages of another origin may not call workloads.")
        if ours.get(b"sec-fetch-site", [b"none"]) not in _OWN_SITES:
            raise _forbidden("Web pages of another site may not call workloads.")
        return host

    def _serves(self, host: bytes) -> bool:
        name = host_of(host.decode("latin-1"))
        return name in self._names or self._any_name or (self._any_address and _is_literal(name))


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _forbidden(hint: str) -> Exception:
    return refused(Reason.FORBIDDEN, "forbidden", hint=hint)
