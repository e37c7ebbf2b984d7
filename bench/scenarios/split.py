"""Agent and node as two processes, and the one process that is both; all on the same core."""

from __future__ import annotations

from pathlib import Path

from bench.results import CPU, P50, RATE, Figure, Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.scenarios.exchange import measured
from bench.servers import POOL, SERVER_CORE, guest, one_process, two_processes, workload

ABOUT = """
The same call of a parked guest, once through fc-invoke and once through cluster-agent and node-daemon, with the wire
and its commit point between them. Whatever serves has one core in all; the guest and the callers share the other one.
"""


def run(home: Path, size: Size) -> Outcome:
    notes, table = Notebook(), {"hello": workload(pool=POOL)}
    with (
        guest(home) as guest_socket,
        one_process(home, table, guest_socket=guest_socket, core=SERVER_CORE) as one,
        two_processes(home, table, guest_socket=guest_socket, core=SERVER_CORE) as two,
    ):
        for repeat in range(size.repeats + 1):
            for clients in (1, 16):
                for name, server in (("one process", one), ("split", two)):
                    server.park("hello")
                    burst, cpu_us = measured(server, clients=clients, calls=size.calls)
                    if repeat:
                        label = f"{name}, {clients} client{'s' * (clients > 1)}"
                        notes.note(label, {P50: burst.p50_us, CPU: cpu_us, RATE: burst.rate})
    pairs = zip(notes.samples("split, 1 client", P50), notes.samples("one process, 1 client", P50), strict=True)
    added_ms = [(split_us - one_us) / 1e3 for split_us, one_us in pairs]
    many = ("split, 16 clients", "one process, 16 clients")
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            Figure("1 client: p50 added by the wire", "ms", added_ms, target=0.5),
            notes.ratio("16 clients: rate, split / one process", RATE, many, at_least=0.4),
        ],
    )


SCENARIO = Scenario("split", run)
