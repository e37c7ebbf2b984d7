"""The host's side of a guest, as a node spells it."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DATA, CONTROL, JOURNAL = 1027, 1028, 1029
PATIENCE_S = 20.0

IDENTITY = {
    "epoch_ns": 1_700_000_000_000_000_000,
    "entropy_b64": base64.b64encode(bytes(range(64))).decode(),
    "guest_id": "inv-0123456789abcdef",
    "hostname": "guest",
    "boot_id": "5a1c0f6e-0000-4000-8000-000000000001",
    "ca_pem": None,
    "restored": True,
}


@dataclass(frozen=True)
class Reply:
    """A whole reply, as its reader saw it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self):
        return self.body.decode()

    def json(self):
        return json.loads(self.body)


def request_bytes(method="POST", target="/invoke", body=b"", headers=()):
    """A request as the node spells it."""
    lines = [f"{method} {target} HTTP/1.1", "host: vsock", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_reply(sock, method="POST"):
    """The reply on `sock`; raises `http.client.IncompleteRead` or `ConnectionError` when it is cut."""
    with http.client.HTTPResponse(sock, method=method) as response:
        try:
            response.begin()
        except http.client.BadStatusLine as error:
            raise ConnectionResetError("no reply at all") from error
        body = response.read()
        return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


@dataclass
class Guest:
    """A shim in a process of its own, and the socket it listens on."""

    process: subprocess.Popen[str]
    path: Path
    journal: list[str] = field(default_factory=list)

    @contextmanager
    def connection(self, port=DATA):
        """A connection to `port`, after the handshake."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(self.path))
            sock.sendall(f"CONNECT {port}\n".encode())
            assert sock.recv(len(f"OK {port}\n"), socket.MSG_WAITALL) == f"OK {port}\n".encode()
            yield sock

    def ask(self, method="POST", target="/invoke", body=b"", headers=(), port=DATA):
        with self.connection(port) as sock:
            sock.sendall(request_bytes(method, target, body, headers))
            return read_reply(sock, method)

    def control(self, method, target, body=b""):
        return self.ask(method, target, body, port=CONTROL)

    def restored(self, **changed):
        return self.control("POST", "/shim/restored", json.dumps(IDENTITY | changed).encode())

    def ended(self):
        """The exit status and what the guest wrote to its console, once it is dead."""
        console, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, console
