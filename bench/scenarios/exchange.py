"""A call of a parked guest, and nginx opening a new connection to the same guest."""

from __future__ import annotations

from pathlib import Path

from bench import load
from bench.results import CPU, P50, RATE, Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.servers import POOL, SERVER_CORE, Server, guest, nginx, one_process, workload

ABOUT = """
nginx opens a connection to the guest for each request. Ours claims a guest that was parked before, exchanges one
request with it and gives it back; the double makes every guest the same server. `parked` has as many guests as calls,
made ready beforehand. `parking` makes the next one ready beside each call, as a daemon does that is never idle.
Each call sends 64 bytes and gets 15. The server has a core to itself; the guest and the callers share the other one.
"""
PATH = "/invoke/hello"


def run(home: Path, size: Size) -> Outcome:
    notes, table = Notebook(), {"hello": workload(pool=POOL)}
    with (
        guest(home) as guest_socket,
        nginx(home, guest_socket) as theirs,
        one_process(home, table, guest_socket=guest_socket, core=SERVER_CORE) as ours,
    ):
        for repeat in range(size.repeats + 1):  # the first one warms up
            for clients in (1, 16):
                variants = (("nginx", theirs), ("parked", ours), ("parking", ours))
                for name, server in variants:
                    if name == "parked":
                        server.park("hello")
                    elif name == "parking":
                        server.park_whenever("hello")
                    burst, cpu_us = measured(server, clients=clients, calls=size.calls)
                    if repeat:
                        label = f"{name}, {clients} client{'s' * (clients > 1)}"
                        notes.note(label, {P50: burst.p50_us, CPU: cpu_us, RATE: burst.rate})
    one, many = (("parked, 1 client", "nginx, 1 client"), ("parked, 16 clients", "nginx, 16 clients"))
    beside = ("parking, 16 clients", "nginx, 16 clients")
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.ratio("1 client: p50, ours / nginx", P50, one, at_most=1.8),
            notes.ratio("16 clients: CPU per call, ours / nginx", CPU, many, at_most=4.5),
            notes.ratio("16 clients: rate, ours / nginx", RATE, many, at_least=0.25),
            notes.ratio("16 clients, parking beside: CPU, ours / nginx", CPU, beside),
        ],
    )


def measured(server: Server, *, clients: int, calls: int, path: str = PATH) -> tuple[load.Burst, float]:
    """A burst of calls, and the server's processor time for each in microseconds."""
    before_s = server.cpu_s
    burst = load.drive(server.port, path, clients=clients, calls=calls)
    return burst, (server.cpu_s - before_s) / calls * 1e6


SCENARIO = Scenario("exchange", run, programs=("nginx",))
