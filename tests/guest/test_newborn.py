"""A clone from its birth to its first request, in a process of its own that was not cloned."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guest.host import CONTROL, DATA, PATIENCE_S, Guest, request_bytes

PROGRAM = """
import socket, sys
from substrate_guest import newborn
from substrate_guest.loading import load
from substrate_guest.vsock import HybridVsock

def rehearse_and_tell(*arguments, rehearse=newborn.rehearse):
    rehearse(*arguments)
    print("rehearsed", flush=True)

loop = newborn.ClonedLoop()
newborn.rehearse_birth(loop)
newborn.rehearse, newborn.IDLE_S = rehearse_and_tell, float(sys.argv[2])
loop.be_ones_own()
newborn.serve(load("handlers:app"), HybridVsock(socket.socket(fileno=int(sys.argv[1]))), loop, audit=False)
"""


@pytest.fixture
def born(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Start what serves `source` as a clone would; it is dead when the test ends."""
    with ExitStack() as undo:

        def started(source: str, *, idle_s: float = PATIENCE_S) -> Guest:
            (tmp_path / "handlers.py").write_text(source)
            path = tmp_path / "v.sock"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(listener.fileno()), str(idle_s)],
                    cwd=tmp_path,
                    pass_fds=[listener.fileno()],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            undo.enter_context(process)
            undo.callback(process.send_signal, signal.SIGKILL)
            return Guest(process, path)

        yield started


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_it_hears_who_it_is_and_answers(kind: str, born: Callable[..., Guest]):
    """A plain function runs in a thread, which wakes the loop when it is done."""
    guest = born(f"{kind} app(request): return request.body")
    assert guest.restored().status == 200
    assert guest.ask(body=b"hello").body == b"hello"
    assert guest.control("GET", "/shim/ready").status == 200


@pytest.mark.parametrize("sent", [b"", b"nonsense\n", b"CONNECT 9\n", f"CONNECT {CONTROL}\nGET".encode()])
def test_a_peer_that_wants_nothing_holds_nobody_up(sent: bytes, born: Callable[..., Guest]):
    guest = born("async def app(request): return request.body")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(guest.path))
        peer.sendall(sent)
    assert guest.restored().status == 200
    assert guest.ask(body=b"hello").body == b"hello"


def test_others_are_answered_while_the_first_request_waits(born: Callable[..., Guest]):
    guest = born(
        "import asyncio\n"
        "asked = asyncio.Event()\n"
        "async def app(request):\n"
        "    if request.path == '/first':\n"
        "        await asked.wait()\n"
        "    asked.set()\n"
        "    return request.path\n"
    )
    with guest.connection(DATA) as first:
        first.sendall(request_bytes(target="/first"))
        assert guest.ask(target="/second").text == "/second"
        assert guest.control("GET", "/shim/ready").status == 200
        assert b"/first" in first.recv(4096)


def test_one_that_is_parked_rehearses_once_and_asks_no_workload_for_it(born: Callable[..., Guest]):
    guest = born(
        "asked = []\nasync def app(request):\n    asked.append(request.target)\n    return asked", idle_s=0.001
    )
    assert guest.process.stdout is not None
    assert guest.process.stdout.readline() == "rehearsed\n"
    assert guest.restored().status == 200
    assert guest.ask(target="/invoke").json() == ["/invoke"]


def test_what_a_restored_hook_began_goes_on_before_the_first_request(born: Callable[..., Guest]):
    guest = born(
        "import asyncio\n"
        "from substrate_guest import App\n"
        "async def go_on():\n"
        "    await asyncio.sleep(0.001)\n"
        "    print('it went on', flush=True)\n"
        "async def restored(identity):\n"
        "    global going_on\n"
        "    going_on = asyncio.create_task(go_on())\n"
        "app = App(lambda request: b'', restored=[restored])\n"
    )
    assert guest.restored().status == 200
    assert guest.process.stdout is not None
    assert guest.process.stdout.readline() == "it went on\n"
