"""A long-lived guest for both sides: `python -S guest.py SOCKET`.

It answers plain HTTP (a proxy's) and hybrid vsock (ours, which begins with `CONNECT`) alike, on bare descriptors, so
that little of what is measured is this program. The path says what comes back:

- `large`: 100 MiB at once
- `slow`: 16 bytes each second, without end
- `hang`: nothing
- anything else: 15 bytes

Requests must arrive in one piece, as the small ones here do.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

SMALL = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\nconnection: close\r\n\r\nhello, callers\n"
LARGE_BYTES = 100 * 2**20
LARGE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % LARGE_BYTES
SLOW = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
DROP = b"10\r\n" + b"." * 16 + b"\r\n"
VSOCK_OK = b"OK 1073741824\n"
DROP_EVERY_S = 1.0
_TARGET_BYTES = 64
"""The request's target ends within its first bytes; bodies are not looked at."""
_PIECE = memoryview(bytes(2**20))


class Guest:
    """One listening socket and its connections, by descriptor."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(4096)
        os.set_blocking(self.listener.fileno(), False)
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.large_left: dict[int, int] = {}
        self.slow: set[int] = set()
        self.silent: set[int] = set()

    def serve(self) -> None:
        """Answer until killed."""
        accepting, next_drop_s = self.listener.fileno(), 0.0
        while True:
            for descriptor, _ in self.poll.poll(DROP_EVERY_S / 10 if self.slow else None):
                if descriptor == accepting:
                    self.poll.register(self.listener.accept()[0].detach(), select.EPOLLIN)
                else:
                    self.turn(descriptor)
            if self.slow and time.monotonic() >= next_drop_s:
                next_drop_s = time.monotonic() + DROP_EVERY_S
                for descriptor in [*self.slow]:
                    self.write(descriptor, DROP)

    def turn(self, descriptor: int) -> None:
        """Read a request, or send more of a large reply."""
        if descriptor in self.large_left:
            self.send_large(descriptor)
            return
        try:
            request = os.read(descriptor, 65_536)
        except OSError:
            request = b""
        if not request or descriptor in self.slow or descriptor in self.silent:
            self.close(descriptor)
            return
        greeting = VSOCK_OK if request.startswith(b"CONNECT") else b""
        target = request[:_TARGET_BYTES]
        if b"/large" in target:
            self.write(descriptor, greeting + LARGE)
            self.large_left[descriptor] = LARGE_BYTES
            os.set_blocking(descriptor, False)
            self.poll.modify(descriptor, select.EPOLLOUT)
        elif b"/slow" in target:
            self.slow.add(descriptor)
            self.write(descriptor, greeting + SLOW + DROP)
        elif b"/hang" in target:
            self.silent.add(descriptor)
        else:
            self.write(descriptor, greeting + SMALL)
            self.close(descriptor)

    def send_large(self, descriptor: int) -> None:
        left = self.large_left[descriptor]
        left -= self.write(descriptor, _PIECE[:left])
        self.large_left[descriptor] = left
        if not left:
            self.close(descriptor)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        """Send what fits; a peer that has left costs only its connection."""
        try:
            return os.write(descriptor, data)
        except BlockingIOError:
            return 0
        except OSError:
            self.slow.discard(descriptor)
            return len(data)

    def close(self, descriptor: int) -> None:
        self.large_left.pop(descriptor, None)
        self.slow.discard(descriptor)
        self.silent.discard(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    Guest(sys.argv[1]).serve()
