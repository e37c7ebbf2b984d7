"""Memory of replies that are open and slow: 16 bytes each second."""

from __future__ import annotations

from pathlib import Path

from bench import load
from bench.results import Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.servers import SERVER_CORE, guest, nginx, one_process, workload

ABOUT = """
So many callers read slow replies at once. What the server then has in memory beyond what it had before, divided by
their number. Each server is started anew: memory does not come back when streams close.
"""
EACH = "each, KiB"


def run(home: Path, size: Size) -> Outcome:
    notes, table = Notebook(), {"slow": workload()}
    with guest(home) as guest_socket:
        for _ in range(3):
            with nginx(home, guest_socket) as theirs:
                notes.note("nginx, unbuffered", {EACH: _each_kib(theirs, "/unbuffered/slow", size.streams)})
            with one_process(home, table, guest_socket=guest_socket, core=SERVER_CORE) as ours:
                notes.note("ours", {EACH: _each_kib(ours, "/http/slow/slow", size.streams)})
    about = f"{size.streams:,} open streams: memory of each, ours"
    return Outcome(SCENARIO.name, ABOUT.strip(), notes.rows(), [notes.figure(about, "ours", EACH, at_most=32)])


def _each_kib(server, path: str, streams: int) -> float:
    with load.held_open(server.port, path, 3, answered=True):
        before_kib = server.front.resident_kib
        with load.held_open(server.port, path, streams, answered=True):
            return (server.front.resident_kib - before_kib) / streams


SCENARIO = Scenario("streams", run, programs=("nginx",))
