"""Guests to talk to: in a process of their own, or in this one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from guest.host import JOURNAL, PATIENCE_S, Guest, read_reply, request_bytes
from substrate_guest.exchange import Exchange
from substrate_guest.loading import adapted
from substrate_guest.shim import answering


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


def _kill_with_children(process):
    """What a node does by the namespace of a guest's processes, which these shims do without."""
    children = []
    with suppress(FileNotFoundError):  # it has ended, and was waited for
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Guest]]:
    """Start shims; each is dead, and its threads are gone, when the test ends.

    `source` becomes the module `handlers` beside the shim. `journal` is what the host's journal answers to an entry;
    with `None` there is no journal. `command` is for another verb than `serve`.
    """
    with ExitStack() as undo:

        def started(target="handlers:app", *, source="", env=None, journal=None, options=(), command=None):
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
                    [sys.executable, "-m", "substrate_guest", *(command or ("serve", target, *options))],
                    cwd=directory,
                    env={name: value for name, value in os.environ.items() if not name.startswith("SUBSTRATE_")}
                    | {"SUBSTRATE_LISTEN_FD": str(listener.fileno()), "SUBSTRATE_DIAL_FD": str(theirs.fileno())}
                    | (env or {}),
                    pass_fds=(listener.fileno(), theirs.fileno()),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            guest = Guest(process, path)
            undo.enter_context(process)
            dials = threading.Thread(target=_serve_dials, args=(ours, guest, journal))
            dials.start()
            undo.callback(dials.join, PATIENCE_S)
            undo.callback(_kill_with_children, process)
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
    """How to ask a workload in this process: a block in which every call is one exchange."""
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
