"""Addresses that a daemon listens on: `host:port`, `[::]:8080`, `:8080` (every interface) or `unix:/path`."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Final

from msgspec import Struct

_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]/\s]*)):(?P<port>[0-9]{1,5})")
_UNIX_PATH_BYTES_MAX: Final = 107
ACCEPTED: Final = "host:port, [::1]:port, :port for every interface, or unix:/path"


class ListenFailed(Exception):
    """An address cannot be listened on; the message names the setting to change."""


class TcpAddress(Struct, frozen=True):
    """A host and a port; an empty host is every interface, port 0 any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class UnixAddress(Struct, frozen=True):
    """A socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        return True


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """The address that `text` names; raises `ValueError` saying what is accepted."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
            raise ValueError(
                f"found {text!r}; the path of a socket is absolute and at most {_UNIX_PATH_BYTES_MAX} bytes"
            )
        return UnixAddress(path)
    match = _TCP.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"found {text!r}; accepted is {ACCEPTED}")
    return TcpAddress(match["v6"] or match["host"] or "", int(match["port"]))


@contextlib.contextmanager
def bound(address: Address, *, setting: str) -> Generator[socket.socket]:
    """A socket bound to `address`, not listening yet; closed, and its path removed, at the end of the block.

    Raises `ListenFailed` naming `setting`.
    """
    with contextlib.ExitStack() as undo:
        try:
            place = _bind_unix(address.path, undo) if isinstance(address, UnixAddress) else _bind_tcp(address)
        except OSError as exc:
            raise ListenFailed(f"{setting}: cannot listen on {address}: {_why(exc)}") from exc
        with place:
            yield place


def _bind_tcp(address: TcpAddress) -> socket.socket:
    if address.host:
        family, _, _, _, name = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    elif socket.has_dualstack_ipv6():
        family, name = socket.AF_INET6, ("::", address.port)
    else:
        family, name = socket.AF_INET, ("0.0.0.0", address.port)  # noqa: S104  # an empty host asks for it
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(address.host) and address.host != "::"))
        sock.bind(name)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: str, undo: contextlib.ExitStack) -> socket.socket:
    _remove_stale(Path(path))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        Path(path).chmod(0o660)  # nobody can connect before it listens
    except BaseException:
        sock.close()
        raise
    undo.callback(_remove_own, Path(path), Path(path).stat().st_ino)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more; raises `OSError` when somebody does, or it is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "something that is no socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _remove_own(path: Path, inode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.lstat().st_ino == inode:
            path.unlink()


def _why(exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return "another process listens there already. Stop it, or choose another address"
        case errno.EACCES:
            return "permission denied. Choose a port above 1023, or a path that this user may write"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address"
        case _:
            return exc.strerror or str(exc)
