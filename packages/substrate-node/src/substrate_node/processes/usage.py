"""What the processes of a guest have used, read from `/proc`."""

from __future__ import annotations

import os

from substrate_node.processes.procfs import read
from substrate_node.vmm import Sample

_MS_PER_TICK = 1000 / os.sysconf("SC_CLK_TCK")


def sampled(first: int, *, first_is_ours: bool = True) -> Sample:
    """CPU time of the guest whose first process is `first`, and its peak memory.

    Counts user and system time of each living process and of the children that each has reaped; orphans are reaped by
    `first`. Memory is the sum of the resident peaks of the living processes, without the first where that is ours:
    pages that they share count more than once, and what has ended does not count (see `vmm.Exit`).
    """
    try:
        descendants = _descendants(first)
        cpu_ticks = sum(map(_cpu_ticks, [first, *descendants]))
        peak_kib = sum(map(_peak_kib, descendants if first_is_ours else [first, *descendants]))
    except (OSError, ValueError, IndexError):  # it ended while we looked
        return Sample(cpu_ms=None, peak_mib=None)
    return Sample(cpu_ms=cpu_ticks * _MS_PER_TICK, peak_mib=peak_kib / 1024 if peak_kib else None)


def sampled_alone(pid: int) -> Sample:
    """CPU time and peak memory of a guest that is one process (children that it has reaped count for the time)."""
    try:
        return Sample(cpu_ms=_cpu_ticks(pid) * _MS_PER_TICK, peak_mib=_peak_kib(pid) / 1024 or None)
    except (OSError, ValueError, IndexError):  # it ended while we looked
        return Sample(cpu_ms=None, peak_mib=None)


def share_mib(pid: int) -> float | None:
    """What a process costs in memory now: its own pages, and its share of those it shares (PSS).

    The kernel walks all of its page tables for this: 1 ms and more for a large process.
    """
    try:
        rollup = read(f"/proc/{pid}/smaps_rollup")
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in rollup.splitlines() if line.startswith(b"Pss:")), None)


def _descendants(pid: int) -> list[int]:
    found = []
    for child in map(int, read(f"/proc/{pid}/task/{pid}/children").split()):
        found += [child, *_descendants(child)]
    return found


def _cpu_ticks(pid: int) -> int:
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return sum(map(int, fields[11:15]))


def _peak_kib(pid: int) -> int:
    status = read(f"/proc/{pid}/status")
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith(b"VmHWM:")), 0)
