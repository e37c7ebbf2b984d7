"""A fresh process guest for each call, and what else makes a process for a piece of work."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench import load
from bench.results import CPU, P50, RATE, Notebook, Outcome
from bench.scenarios import Scenario, Size
from bench.scenarios.exchange import measured
from bench.servers import ROOT, Server, one_process, served

ABOUT = """
A whole call, from the caller's request to its reply, of a guest that did not exist before: a clone of a primed process
in namespaces, a file tree and a filter of its own. Nothing is parked. `plain fork` is the same call of a zygote whose
clones are isolated from nothing: it is the limit. The programs are timed from their start to their end: the
distribution's Python with nothing to do, bare and within bubblewrap, which makes the same namespaces. Nothing is
pinned.
"""
PYTHON = ("/usr/bin/python3", "-c", "pass")
LEAN_PYTHON = ("/usr/bin/python3", "-I", "-S", "-c", "pass")
BUBBLE = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp")
PROGRAMS = {
    "fork + exec of Python": PYTHON,
    "bubblewrap + Python": (*BUBBLE, *PYTHON),
    "bubblewrap + Python -I -S": (*BUBBLE, *LEAN_PYTHON),
}


def run(home: Path, size: Size) -> Outcome:
    notes, calls = Notebook(), max(size.calls // 10, 8)
    table = {
        "fresh": served("substrate_guest.workloads.echo:app"),
        "plain": served("plainly_forked:app", path=str(ROOT / "bench/workloads")),
    }
    with one_process(home, table, guest_socket=None, core=None) as ours:
        for name in table:
            load.until_served(ours.port, f"/invoke/{name}", start="warm")
        for _ in range(size.repeats):
            for name, label in (("fresh", "fresh guest"), ("plain", "plain fork")):
                _note_calls(notes, ours, name, label, calls)
            for label, argv in PROGRAMS.items():
                notes.note(label, {P50: median_us(argv, max(calls // 5, 3))})
    return Outcome(
        SCENARIO.name,
        ABOUT.strip(),
        notes.rows(),
        [
            notes.ratio("1 client: p50, fresh guest / plain fork", P50, ("fresh guest", "plain fork"), at_most=1.8),
            notes.ratio("bubblewrap + Python / fresh guest", P50, ("bubblewrap + Python", "fresh guest"), at_least=4.5),
            notes.ratio("fork + exec of Python / fresh guest", P50, ("fork + exec of Python", "fresh guest")),
            notes.figure("4 in flight: fresh guests, calls/s", "fresh guest", RATE, at_least=250),
            notes.ratio("4 in flight: rate, fresh guest / plain fork", RATE, ("fresh guest", "plain fork")),
        ],
    )


def _note_calls(notes: Notebook, ours: Server, name: str, label: str, calls: int) -> None:
    one, cpu_us = measured(ours, clients=1, calls=calls, path=f"/invoke/{name}")
    four, _ = measured(ours, clients=4, calls=calls, path=f"/invoke/{name}")
    notes.note(label, {P50: one.p50_us, CPU: cpu_us, RATE: four.rate})


def median_us(argv: Sequence[str], times: int) -> float:
    """How long a program takes, from before it is started until it has ended, in microseconds."""
    took_us = []
    for _ in range(times):
        began_s = time.perf_counter()
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        took_us.append((time.perf_counter() - began_s) * 1e6)
    return statistics.median(took_us)


SCENARIO = Scenario("fresh", run, programs=("bwrap",))
