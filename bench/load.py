"""Callers in a closed loop: each sends its next request when it has the reply to the last one.

One process, one thread, bare sockets: on the machine of `README.md` its medians scattered less from run to run than
those of `wrk`. Every reply is checked, because a server that fails is fast.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)\r\n", re.IGNORECASE)
_END_OF_HEAD = b"\r\n\r\n"
PATIENCE_S = 30.0


class Wrong(Exception):
    """A server answered something else than it should, or not at all."""


class Burst(Struct, frozen=True):
    """What some load came to: each call's latency in microseconds, sorted, and the calls per second."""

    latencies_us: list[float]
    rate: float

    @property
    def calls(self) -> int:
        return len(self.latencies_us)

    @property
    def p50_us(self) -> float:
        return self.latencies_us[self.calls // 2]


def request(path: str, *, start: str | None = None, body: bytes = b"x" * 64) -> bytes:
    """A POST of `body`, which insists on a `start` of its guest at least that fast."""
    demand = f"fc-require-start: {start}\r\n" if start else ""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{demand}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def connected(port: int, clients: int) -> Iterator[list[socket.socket]]:
    """Connections to a server of this machine."""
    sockets = []
    try:
        for _ in range(clients):
            client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sockets.append(client)
        yield sockets
    finally:
        for client in sockets:
            client.close()


def drive(port: int, path: str, *, clients: int, calls: int, start: str | None = None) -> Burst:
    """Make so many calls, `clients` of them at a time; every one of them ends. Raises `Wrong`."""
    with connected(port, clients) as sockets:
        return _drive(sockets, request(path, start=start), calls)


def until_served(port: int, path: str, *, start: str | None = None) -> None:
    """Call until a guest answers: a base may still have to be made. Raises `Wrong` when that takes too long."""
    ends_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            drive(port, path, clients=1, calls=1, start=start)
        except Wrong:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.05)
        else:
            return


def _drive(sockets: list[socket.socket], message: bytes, calls: int) -> Burst:
    clock = time.perf_counter
    by_descriptor = {client.fileno(): client for client in sockets}
    read = dict.fromkeys(by_descriptor, b"")
    sent_s: dict[int, float] = {}
    latencies_s: list[float] = []
    with select.epoll() as poll:
        began_s = now_s = clock()
        for descriptor, client in list(by_descriptor.items())[:calls]:
            poll.register(descriptor, select.EPOLLIN)
            sent_s[descriptor] = clock()
            client.send(message)
        to_send = calls - len(sent_s)
        while len(latencies_s) < calls:
            ready = poll.poll(PATIENCE_S)
            if not ready:
                raise Wrong(f"no answer for {PATIENCE_S:.0f} s")
            for descriptor, _ in ready:
                client = by_descriptor[descriptor]
                reply = read[descriptor] + client.recv(65_536)
                now_s = clock()
                if not _whole(reply):
                    read[descriptor] = reply
                    continue
                read[descriptor] = b""
                latencies_s.append(now_s - sent_s[descriptor])
                if to_send:
                    to_send -= 1
                    sent_s[descriptor] = now_s
                    client.send(message)
    return Burst([each * 1e6 for each in sorted(latencies_s)], calls / (now_s - began_s))


def _whole(reply: bytes) -> bool:
    """Whether a reply with a Content-Length has arrived to its end."""
    if not reply.startswith(b"HTTP/1.1 200"[: len(reply)]) or not reply:
        raise Wrong(f"not a 200: {reply[:500]!r}")
    end = reply.find(_END_OF_HEAD)
    if end < 0:
        return False
    length = _LENGTH.search(reply, 0, end + 2)
    if length is None:
        raise Wrong(f"a reply without Content-Length: {reply[:500]!r}")
    return len(reply) - end - len(_END_OF_HEAD) >= int(length[1])


def download(port: int, path: str) -> tuple[float, int]:
    """Read one large reply: seconds from the request to its last byte, and the bytes of its body. Raises `Wrong`."""
    buffer = memoryview(bytearray(2**20))
    with connected(port, 1) as (client,):
        began_s = time.perf_counter()
        client.sendall(request(path))
        head = b""
        while _END_OF_HEAD not in head:
            head += client.recv(65_536) or _broke(head)
        length = _LENGTH.search(head)
        if not head.startswith(b"HTTP/1.1 200") or length is None:
            raise Wrong(f"not a 200 of known length: {head[:500]!r}")
        left = int(length[1]) - len(head.partition(_END_OF_HEAD)[2])
        while left:
            left -= client.recv_into(buffer) or len(_broke(head))
        return time.perf_counter() - began_s, int(length[1])


def _broke(head: bytes) -> bytes:
    raise Wrong(f"the reply broke off: {head[:500]!r}")


@contextmanager
def held_open(port: int, path: str, clients: int, *, answered: bool) -> Iterator[None]:
    """Keep calls open for the length of the block, each with the first bytes of its reply if it is to be `answered`."""
    with connected(port, clients) as sockets:
        for client in sockets:
            client.sendall(request(path))
        if answered:
            for client in sockets:
                if not client.recv(12).startswith(b"HTTP/1.1 200"):
                    raise Wrong("a stream did not open")
        yield
