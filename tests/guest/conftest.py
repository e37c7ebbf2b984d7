"""The host's side of a guest: it makes the sockets, starts the shim and talks to it as a node would."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from substrate_guest.exchange import Exchange
from substrate_guest.loading import adapted
from substrate_guest.shim import answering

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
        _, console = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, console


def _serve_dials(dialer, guest, confirm):
    """The node's end of the way to dial: the journal confirms entries, every other port refuses."""
    with dialer:
        while port := dialer.recv(64):
            if port != str(JOURNAL).encode() or confirm is None:
                dialer.send(b"nothing listens on port " + port)
                continue
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(dialer, [b"ok"], [theirs.fileno()])
                theirs.close()
                with ours.makefile("r") as lines:
                    guest.journal.append(lines.readline())
                ours.sendall(confirm)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Guest]]:
    """Start shims; each is dead, and its threads are gone, when the test ends.

    `source` becomes the module `handlers` beside the shim. `journal` is what the host's journal answers to an entry;
    with `None` there is no journal.
    """
    with ExitStack() as undo:

        def started(target="handlers:app", *, source="", env=None, journal=None, options=()):
            directory = tmp_path / f"guest-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            (directory / "handlers.py").write_text(source)
            path = directory / "v.sock"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with listener, theirs:
                listener.bind(str(path))
                listener.listen()
                process = subprocess.Popen(
                    [sys.executable, "-m", "substrate_guest", "serve", target, *options],
                    cwd=directory,
                    env=os.environ
                    | {"SUBSTRATE_LISTEN_FD": str(listener.fileno()), "SUBSTRATE_DIAL_FD": str(theirs.fileno())}
                    | (env or {}),
                    pass_fds=(listener.fileno(), theirs.fileno()),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            guest = Guest(process, path)
            undo.enter_context(process)
            dials = threading.Thread(target=_serve_dials, args=(ours, guest, journal))
            dials.start()
            undo.callback(dials.join, PATIENCE_S)
            undo.callback(process.send_signal, signal.SIGKILL)
            return guest

        yield started


@asynccontextmanager
async def answered(found) -> AsyncIterator[Callable[..., object]]:
    """Ask a workload in this process: every request gets an exchange of its own, over a socket pair."""
    workload = adapted(found)
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as duties:
        await workload.prime()
        await workload.start(duties)

        async def ask(method="POST", target="/invoke", body=b"", headers=()):
            ours, theirs = socket.socketpair()
            ours.settimeout(PATIENCE_S)
            with ours:
                ours.sendall(request_bytes(method, target, body, headers))
                reading = loop.run_in_executor(None, read_reply, ours, method)
                with theirs:
                    await answering(workload.respond)(theirs, b"")
                return await reading

        yield ask
        for task in asyncio.all_tasks():
            if task.get_name() == "lifespan":
                task.cancel()


@pytest.fixture
def ask_of():
    """Ask a workload in this process, as `async with ask_of(workload) as ask`."""
    return answered


@pytest.fixture
def exchange_pair():
    """An exchange and the socket of its peer; must be asked for inside a running loop."""
    with ExitStack() as undo:

        def made(received=b""):
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            ours.settimeout(PATIENCE_S)
            return ours, Exchange(theirs, received)

        yield made
