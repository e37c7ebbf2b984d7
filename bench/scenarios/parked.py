"""The same call with a process guest that was parked, and nginx opening a new connection."""

from __future__ import annotations

from pathlib import Path

from bench import load
from bench.results import P50, Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.servers import guest, nginx, one_process, served

ABOUT = """
Real process guests, parked ahead. `alone`: the pool is full again before the next call. `in a row`: half as many calls
as the pool has guests, one right after another, while the next guests are made. nginx opens a connection to the
long-lived guest, which has no interpreter to wake: that difference is in the ratio. Nothing is pinned.
"""
POOL = 32


def run(home: Path, size: Size) -> Outcome:
    notes, calls = Notebook(), min(max(size.calls // 20, 4), POOL // 2)
    table = {"parked": served("substrate_guest.workloads.echo:app", pool=POOL)}
    with (
        guest(home) as guest_socket,
        nginx(home, guest_socket) as theirs,
        one_process(home, table, guest_socket=None, core=None) as ours,
    ):
        load.until_served(ours.port, "/invoke/parked", start="pool")
        for _ in range(size.repeats):
            nginx_us = load.drive(theirs.port, "/invoke/parked", clients=1, calls=size.calls).p50_us
            alone = []
            for _ in range(calls):
                ours.until_parked(POOL)
                alone += load.drive(ours.port, "/invoke/parked", clients=1, calls=1, start="pool").latencies_us
            ours.until_parked(POOL)
            row = load.drive(ours.port, "/invoke/parked", clients=1, calls=calls, start="pool")
            notes.note("nginx", {P50: nginx_us})
            notes.note("parked, alone", {P50: sorted(alone)[len(alone) // 2]})
            notes.note("parked, in a row", {P50: row.p50_us})
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.ratio("parked guest, alone: p50, ours / nginx", P50, ("parked, alone", "nginx"), at_most=2.5),
            notes.ratio("parking beside: p50, in a row / alone", P50, ("parked, in a row", "parked, alone")),
        ],
    )


SCENARIO = Scenario("parked", run, programs=("nginx",))
