"""A daemon that has much to keep track of, and one that has nothing: the same call must cost the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from bench import load
from bench.results import CPU, P50, Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.scenarios.exchange import measured
from bench.servers import POOL, SERVER_CORE, Server, guest, one_process, workload

ABOUT = """
Four daemons on the same core take the same bursts in turn: an empty one, one with many workloads, one with many callers
that wait for another workload, and one with many parked guests of another workload. One client; the called workload has
a guest parked for each call.
"""
HELLO = workload(pool=POOL)
NARROW = workload(concurrency=1, queue=65_536, startTimeout="1h", requestTimeout="1h")


def run(home: Path, size: Size) -> Outcome:
    notes = Notebook()
    with ExitStack() as held:
        guest_socket = held.enter_context(guest(home))

        def started(name: str, **others: object) -> Server:
            table = {"hello": HELLO, **others}
            server = one_process(home, table, guest_socket=guest_socket, core=SERVER_CORE, name=name)
            return held.enter_context(server)

        servers = {
            "empty": started("empty"),
            "workloads": started("workloads", **{f"other-{n}": workload() for n in range(size.workloads)}),
            "waiting": started("waiting", narrow=NARROW),
            "parked": started("parked", other=workload(pool=min(size.workloads, POOL))),
        }
        servers["parked"].park("other", min(size.workloads, POOL))
        held.enter_context(load.held_open(servers["waiting"].port, "/http/narrow/hang", size.waiting, answered=False))
        for repeat in range(size.repeats + 1):
            for name, server in servers.items():
                server.park("hello")
                burst, cpu_us = measured(server, clients=1, calls=size.calls)
                if repeat:
                    notes.note(name, {P50: burst.p50_us, CPU: cpu_us})
    crowds = {
        "workloads": f"{size.workloads:,} workloads",
        "waiting": f"{size.waiting:,} callers waiting elsewhere",
        "parked": f"{min(size.workloads, POOL):,} guests parked elsewhere",
    }
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.ratio(f"{crowd}: {words} / empty", quantity, (name, "empty"), at_most=1.15)
            for name, crowd in crowds.items()
            for quantity, words in ((P50, "p50"), (CPU, "CPU per call"))
        ],
    )


SCENARIO = Scenario("scale", run)
