"""A reply of 100 MiB, through nginx with its buffers and through ours."""

from __future__ import annotations

from pathlib import Path

from bench import load
from bench.results import Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.servers import SERVER_CORE, guest, nginx, one_process, workload

ABOUT = """
The guest sends 100 MiB as fast as it is read. nginx buffers as it does by default. `growth` is how much more memory the
server had at the worst moment than before the reply.
"""
THROUGHPUT, GROWTH = "throughput, MiB/s", "growth, MiB"


def run(home: Path, size: Size) -> Outcome:
    notes, table = Notebook(), {"large": workload()}
    with (
        guest(home) as guest_socket,
        nginx(home, guest_socket) as theirs,
        one_process(home, table, guest_socket=guest_socket, core=SERVER_CORE) as ours,
    ):
        for repeat in range(size.large_replies * 2 + 1):
            for name, server, path in (("nginx", theirs, "/large"), ("ours", ours, "/http/large/large")):
                before_kib = server.front.resident_kib
                server.front.forget_peak()
                seconds, body_bytes = load.download(server.port, path)
                if repeat:
                    grown_mib = max(0, server.front.peak_kib - before_kib) / 1024
                    notes.note(name, {THROUGHPUT: body_bytes / 2**20 / seconds, GROWTH: grown_mib})
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.ratio("100 MiB: throughput, ours / nginx", THROUGHPUT, ("ours", "nginx"), at_least=0.9),
            notes.figure("100 MiB: growth of the daemon", "ours", GROWTH, at_most=4),
        ],
    )


SCENARIO = Scenario("reply", run, programs=("nginx",))
